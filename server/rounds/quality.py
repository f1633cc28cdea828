"""Figures of quality of a run: what the sites measured together on the units that they hold out for validation.

A round validates the adapter that it starts from, so the adapter of the last round is not validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privet.common.study.study import Study

VALIDATED = "validation_accuracy"
NONE = (
    "Nobody has measured how good this model is: the study set no patients or records aside for it "
    "(data.validation_fraction = 0)."
)
_EACH = " Each site can measure it with `privet site evaluate SITE RUN`."


def unmeasured_sentence(study: Study) -> str:
    """Return what to know before a study is run whose sites will not measure the model together; else nothing."""
    if study.counts or study.data.validation_fraction:
        return ""
    instead = "" if study.distributed else ", or set data.validation_fraction in the study before it is run"
    return (
        "Real sites will not measure together how good the model is: the study sets no patients or records aside for "
        "it. "
        f"Each site can measure it afterwards with `privet site evaluate SITE RUN`{instead}."
    )


def quality(metrics: Mapping[str, float] | None) -> str:
    """Return validation accuracy and loss as text; empty if a round has none."""
    if not metrics or VALIDATED not in metrics:  # of a study that counts, they are counts
        return ""
    loss = metrics["validation_loss"]  # of few units, noise can make it negative
    measured = f"loss {loss:.4g}" if loss > 0 else "a loss that the noise hides"
    return f"validation accuracy {100 * metrics['validation_accuracy']:.1f} %, {measured}"


def course(statements: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence about the first and the last validation of a run."""
    found = [(each["round"], each["metrics"]) for each in statements if quality(each["metrics"])]
    if not found:
        return NONE + _EACH
    (first, before), (last, after) = found[0], found[-1]
    if first == last:
        return f"Before round {first}, the sites together measured {quality(before)}."
    return (
        f"The sites together measured {quality(before)} before round {first}, and {quality(after)} before round {last}."
    )
