"""Figures of quality of a run: what the sites measured together on the units that they hold out for validation.

A round validates the adapter that it starts from, so the adapter of the last round is not validated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from privet.common.study.sections import VALIDATION_LOSS_CAP
from privet.common.study.study import Study

VALIDATED = "validation_accuracy"
_NORMAL = 1.96
"""95 % of a normal distribution lie within so many standard deviations of its mean."""
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
    loss, accuracy = metrics["validation_loss"], metrics["validation_accuracy"]
    units, noise = metrics.get("validation_units"), metrics.get("validation_noise")
    if units is None or noise is None:  # of an earlier version
        wide, blurred = "", 0.0
    else:
        wide = f" (\u00b1 {100 * accuracy_within(accuracy, units, noise):.0f})"
        blurred = _NORMAL * noise * math.hypot(VALIDATION_LOSS_CAP, loss) / units
    # Of few units, noise can make the loss negative.
    measured = f"loss {loss:.4g}" if loss > blurred else "loss not known: the noise is larger"
    return f"validation accuracy {100 * accuracy:.1f} %{wide}, {measured}"


def accuracy_within(accuracy: float, units: float, noise: float) -> float:
    """Return half the width of the 95 % interval of a measured accuracy, a fraction of at most 1.

    It has two parts: the units are a sample of all patients, and both sums of which accuracy is the quotient carry
    noise (to first order).

    Args:
        accuracy: As measured.
        units: How many units were measured, with noise.
        noise: Standard deviation of the noise on each sum.
    """
    held = min(max(accuracy, 0.0), 1.0)
    variance = held * (1 - held) / units + noise**2 * (1 + held**2) / units**2
    return min(1.0, _NORMAL * math.sqrt(variance))


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
