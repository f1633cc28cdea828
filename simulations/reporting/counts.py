"""The parts of a report on a study that counts: its result, and what moved since an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privet.client.pages.html import Html, joined, paragraph, table
from privet.common.audit.counts import count_rows, counts_document, drift
from privet.simulations.reporting.gather import RunFacts

_BLOCKS = {"label": "labels", "length": "lengths"}


def result(run: RunFacts) -> Mapping[str, Any]:
    """Return the run's result, computed from its statements."""
    return counts_document(run.study, run.statements)


def outcome(run: RunFacts) -> Html:
    """Return the table of counts and figures."""
    document = result(run)
    noise = (
        f"Sites added noise before anything left: of each count, a standard deviation of {document['deviation']:,.1f}. "
        "So a count may be below 0. Intervals cover this noise."
        if document["deviation"]
        else "The counts have no noise: they may reveal single records."
    )
    sampling = " Those of figures also cover which units there are." if run.study.kind == "evaluate" else ""
    rows = count_rows(document)
    name = "All sites together"
    return joined(
        [
            table(name, ["what", "value", f"{document['confidence']:.0%} interval"], rows, numbers=(1, 2)),
            paragraph(noise + sampling),
        ]
    )


def moved(runs: Sequence[RunFacts]) -> Html | str:
    """Return what moved from the first run of kind statistics to each later one; nothing where there are not two."""
    counted = [run for run in runs if run.study.kind == "statistics"]
    rows = [
        [later.name, _BLOCKS[each["block"]], f"{each['distance']:.3f}", f"{each['noise']:.3f}"]
        for later in counted[1:]
        for each in drift(result(counted[0]), result(later))
    ]
    if not rows:
        return ""
    head = ["run", "shares of", "distance", "expected from noise alone"]
    return joined(
        [
            table(f"What moved since {counted[0].name}", head, rows, numbers=(2, 3)),
            paragraph(
                "The distance is half the sum of the differences of all shares, from 0 (equal) to 1. One that is not "
                "well above what noise alone gives says nothing. It is computed from what was released, and costs no "
                "privacy."
            ),
        ]
    )
