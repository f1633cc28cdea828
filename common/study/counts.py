"""What a study that trains nothing counts: the cells of its one sum, how much a unit adds to them, and their names.

A unit adds a vector of counts, of an L2 norm of at most `Cells.bound` (`docs/privacy.md`, "Counting without training").
Sites release it times `Cells.scale`, so that its norm is at most the clip norm and the round is one of the same noise
and masks as a head start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from privet.common.errors import StudyError
from privet.common.study.adapter import Adapter, TensorSpec
from privet.common.study.study import Study

UNITS, BEYOND, RECORDS, MISSING, LOSS, CORRECT = "units", "beyond", "records", "missing", "loss", "correct"
LABEL, LENGTH, CONFUSION = "label", "length", "confusion"
TENSOR = "counts"
"""Name of the sum in the vector that a site masks."""

MOST_CLASSES = 20
"""Labels up to which an evaluation counts the confusion matrix: the statement of a round has to fit in the log."""
_MARGIN = 1 - 2.0**-40
"""Covers what rounding in float64 can add to a unit's norm when it is scaled to the clip norm."""


@dataclass(frozen=True)
class Cells:
    """The cells of a study's sum.

    Attributes:
        titles: Meaning of each cell in words, by its name. A name is a label of the round log.
        bound: Largest L2 norm of what one unit adds, in counts.
        scale: Value that is released for a count of 1.
    """

    titles: dict[str, str]
    bound: float
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cells, in order."""
        return tuple(self.titles)

    @property
    def tensor(self) -> TensorSpec:
        """The layout of the sum."""
        return TensorSpec(TENSOR, (len(self.titles),), "full")

    def first(self, block: str) -> int:
        """Return the place of a block's first cell."""
        return self.names.index(f"{block}.0")


def most_records(study: Study) -> int:
    """Return the number of records that one unit adds at most."""
    return study.privacy.max_records_per_unit if study.privacy.unit == "patient" else 1


def cells_of(study: Study) -> Cells:
    """Return the cells of a study that counts.

    Raises:
        ValueError: The study trains.
    """
    if not study.counts:
        raise ValueError("a study that trains has no cells")
    titles, squared = _statistics(study) if study.kind == "statistics" else _evaluation(study)
    bound = math.sqrt(squared)
    # Without privacy, counts are released as they are, so that whole numbers stay whole.
    scale = study.privacy.promise.clip_norm / bound * _MARGIN if study.private else 1.0
    return Cells(titles, bound, scale)


def check_measured(study: Study, adapter: Adapter) -> None:
    """Check that an adapter is the one that a study measures; other studies start from any.

    Raises:
        StudyError: It is another one.
    """
    if study.evaluation is None:
        return
    asked = study.evaluation.adapter
    if asked == "base" and not adapter.adds_nothing:
        raise StudyError(
            f"evaluation.adapter: the study measures the base alone, found the adapter {adapter.digest}",
            "leave the adapter out of the command, or set its digest as evaluation.adapter in the study",
        )
    if asked not in ("base", adapter.digest):
        raise StudyError(
            f"evaluation.adapter: the study measures {asked}, found the adapter {adapter.digest}",
            "name the adapter of that digest, or set this digest as evaluation.adapter in the study",
        )


def _statistics(study: Study) -> tuple[dict[str, str], float]:
    """Return the cells of statistics, and the square of the largest norm of a unit.

    A record adds 1 to one bin of lengths and spreads 1 over labels. One with a missing value adds 1 to `missing`
    instead. So m records of one unit have the largest norm where they are alike and complete.
    """
    unit, most = study.privacy.unit, most_records(study)
    titles, blocks = {UNITS: f"{unit}s"}, 1  # of lengths
    squared = 1.0
    if unit == "patient":
        titles |= {BEYOND: f"patients with more than {most} records", RECORDS: "records"}
        blocks += 1
        squared += 1
    titles[MISSING] = "records with a missing or empty value"
    if study.task.labels:
        blocks += 1
        share = "tokens in records, as records" if study.task.kind == "token-classification" else "records"
        titles |= {f"{LABEL}.{k}": f"{share} of label {name}" for k, name in enumerate(study.task.labels)}
    ends = () if study.statistics is None else study.statistics.lengths
    low = 0
    for k, end in enumerate(ends):
        titles[f"{LENGTH}.{k}"] = f"records of {low} to {end} tokens"
        low = end + 1
    titles[f"{LENGTH}.{len(ends)}"] = f"records of {low} tokens or more"
    return titles, squared + blocks * most**2


def _evaluation(study: Study) -> tuple[dict[str, str], float]:
    """Return the cells of an evaluation, and the square of the largest norm of a unit: those of a validation, and more.

    Each of units, loss and hits is at most 1. A unit spreads 1 over the cells of the confusion matrix.
    """
    unit = study.privacy.unit
    titles = {UNITS: f"{unit}s", LOSS: "capped losses, in caps", CORRECT: "shares of correct answers"}
    labels = study.task.labels
    if study.task.kind != "text-classification" or len(labels) > MOST_CLASSES:
        return titles, 3.0
    for i, true in enumerate(labels):
        for j, found in enumerate(labels):
            titles[f"{CONFUSION}.{i * len(labels) + j}"] = f"{unit}s of label {true} predicted {found}"
    return titles, 4.0
