"""Counts without training: what a site's records add to the sum of a study of kind statistics or evaluate.

A unit's counts are a vector of an L2 norm of at most `Cells.bound` (`privet.common.study.counts`): of one unit, at most
`privacy.max_records_per_unit` records are counted, drawn from the unit's own records alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.training.data import Records
from privet.client.training.dp import Clipping, draw_rows
from privet.client.training.features import Feature, token_lengths
from privet.client.training.host import ModelHost
from privet.client.training.passes import Score
from privet.client.training.preference import Judged, judge
from privet.common.privacy.noise import Randomness, cut
from privet.common.privacy.shared_noise import Integers
from privet.common.study.adapter import Adapter
from privet.common.study.counts import (
    BEYOND,
    LABEL,
    LENGTH,
    MISSING,
    MOST_CLASSES,
    RECORDS,
    UNITS,
    Cells,
    cells_of,
    most_records,
)
from privet.common.study.sections import VALIDATION_LOSS_CAP
from privet.common.study.study import Study

Row = tuple[tuple[int, float], ...]
"""What a record adds: cells, each with a count."""


@dataclass(frozen=True)
class Countable:
    """A site's records as a study of kind statistics counts them.

    Attributes:
        rows: What each record adds.
        units: The rows of each unit, those of incomplete records included.
    """

    rows: Sequence[Row]
    units: Sequence[Sequence[int]]


def countable(study: Study, tokenizer: Any, records: Records) -> Countable:
    """Return a site's records as they are counted, incomplete ones included.

    Args:
        study: The study.
        tokenizer: Of the base; lengths are in its tokens.
        records: All of the site's records.
    """
    cells = cells_of(study)
    names = {name: place for place, name in enumerate(cells.names)}
    ends = () if study.statistics is None else study.statistics.lengths
    rows: list[Row] = []
    for row, length in zip(records.rows, token_lengths(study, tokenizer, records), strict=True):
        found = [(cells.first(LENGTH) + bisect_left(ends, length), 1.0), *_labels(cells, row)]
        rows.append((*found, (names[RECORDS], 1.0)) if RECORDS in names else tuple(found))
    rows += [((names[MISSING], 1.0),)] * len(records.incomplete)
    if study.privacy.unit != "patient":
        return Countable(rows, [[row] for row in range(len(rows))])
    units: dict[str, list[int]] = {}
    for place, name in enumerate([*records.units, *records.incomplete]):
        units.setdefault(name, []).append(place)
    return Countable(rows, list(units.values()))


def _labels(cells: Cells, row: dict[str, Any]) -> list[tuple[int, float]]:
    """Return the labels of a record, which together count 1: of tags, each by its share of the tokens."""
    if "label" in row:
        return [(cells.first(LABEL) + row["label"], 1.0)]
    if "tags" not in row:
        return []
    kinds, counts = np.unique(row["tags"], return_counts=True)
    return [(cells.first(LABEL) + int(k), float(n) / len(row["tags"])) for k, n in zip(kinds, counts, strict=True)]


def count_sum(study: Study, data: Countable, sampling: Randomness, clipping: Clipping) -> Integers:
    """Return the sum of all units' counts, each in multiples of the lattice, int64 [k].

    Args:
        study: The study, of kind statistics.
        data: The site's records.
        sampling: Draws the records of units with more than the study counts; a stream that nothing else uses.
        clipping: The lattice.
    """
    return count_rows(study, data, counted_rows(study, data.units, sampling), clipping)


def counted_rows(study: Study, units: Sequence[Sequence[int]], sampling: Randomness) -> list[list[int]]:
    """Draw the rows of each unit that a study counts: all of them, or the most that it counts of one unit."""
    most = most_records(study)
    return [draw_rows(unit, most, sampling) for unit in units]


def count_rows(study: Study, data: Countable, rows: Sequence[Sequence[int]], clipping: Clipping) -> Integers:
    """Return the sum of all units' counts over the rows that were drawn for each, int64 [k]. As `count_sum`."""
    cells, most = cells_of(study), most_records(study)
    names = {name: place for place, name in enumerate(cells.names)}
    total = np.zeros(len(names), np.int64)
    for unit, chosen in zip(data.units, rows, strict=True):
        counts = np.zeros(len(names))
        counts[names[UNITS]] = 1.0
        if BEYOND in names:
            counts[names[BEYOND]] = float(len(unit) > most)
        for row in chosen:
            for cell, count in data.rows[row]:
                counts[cell] += count
        total += cut(counts * cells.scale, clipping.lattice)
    return total


def score_sum(
    host: ModelHost,
    study: Study,
    adapter: Adapter,
    features: Sequence[Feature],
    units: Sequence[Sequence[int]],
    clipping: Clipping,
) -> Integers:
    """Return the sum of what an adapter makes of all units: loss, hits and confusion, in multiples of the lattice.

    A unit's records are averaged first, so all of them count.

    Args:
        host: The model; its lock is held by the caller.
        study: The study, of kind evaluate.
        adapter: The adapter that is measured.
        features: The site's records.
        units: The rows of each unit.
        clipping: The lattice.
    """
    cells = cells_of(study)
    host.mount(adapter)
    scores = judge(host, features)
    total = np.zeros(len(cells.names), np.int64)
    for rows in units:
        counts = np.concatenate([unit_scores(scores, rows), _confusion(study, [scores[row] for row in rows])])
        total += cut(counts * cells.scale, clipping.lattice)
    return total


def unit_scores(scores: Sequence[Judged], rows: Sequence[int]) -> NDArray[np.float64]:
    """Return what a unit adds to sums of units, capped losses and hits: three values of 0 to 1.

    A unit's rows are averaged first, and its loss is capped. So one unit adds at most a norm of √3, however many rows
    it has and however wrong the model is on them.

    Args:
        scores: Of all records.
        rows: The unit's.
    """
    loss = min(float(np.mean([finite_loss(scores[row]) for row in rows])), VALIDATION_LOSS_CAP) / VALIDATION_LOSS_CAP
    return np.array([1.0, loss, float(np.mean([scores[row].correct for row in rows]))])


def finite_loss(found: Judged) -> float:
    """Return a record's loss; the cap where it is not finite."""
    return found.loss if math.isfinite(found.loss) else VALIDATION_LOSS_CAP


def _confusion(study: Study, scores: Sequence[Judged]) -> NDArray[np.float64]:
    """Return the share of a unit's records in each cell of the confusion matrix; [0] for studies that have none."""
    classes = len(study.task.labels)
    if study.task.kind != "text-classification" or classes > MOST_CLASSES:
        return np.zeros(0)
    shares = np.zeros(classes**2)
    for score in scores:
        if isinstance(score, Score) and len(score.truth) == 1:
            shares[int(score.truth[0]) * classes + int(score.predicted[0])] += 1 / len(scores)
    return shares
