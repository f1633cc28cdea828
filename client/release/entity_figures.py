"""Figures of taggers: F1 of entities by type, for exact spans and for spans that overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from privet.client.release.bootstrap import Array, Measure, Measured, divided, ratio
from privet.client.training.passes import Score

Span = tuple[str, int, int]
"""Type, first word, last word."""

_SUMS = 5  # of each type: exactly right, found, true; found that overlap a true one, true that overlap a found one


def spans(tags: Sequence[str]) -> set[Span]:
    """Return the entities of IOB2 tags, read leniently as seqeval does by default: a stray I-x begins one."""
    found: set[Span] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == kind
        if kind and not continues:
            found.add((kind, start, place - 1))
            kind = ""
        if prefix in ("B", "I") and not continues:
            start, kind = place, name
    return found


def types_of(labels: Sequence[str]) -> list[str]:
    """Return the types of entities of a study's tags, sorted."""
    return sorted({label[2:] for label in labels if label != "O"})


def entity_sums(scores: Sequence[Score], labels: Sequence[str]) -> Array:
    """Return the sums of each type for each record [n, types * 5], then its words that are right and its words."""
    types = types_of(labels)
    rows = []
    for score in scores:
        true = spans([labels[label] for label in score.truth])
        found = spans([labels[label] for label in score.predicted])
        row: list[float] = []
        for kind in types:
            own, guess = [s for s in true if s[0] == kind], [s for s in found if s[0] == kind]
            row += [len(set(own) & set(guess)), len(guess), len(own), _touching(guess, own), _touching(own, guess)]
        rows.append([*row, int(np.count_nonzero(score.truth == score.predicted)), len(score.truth)])
    return np.array(rows, np.float64).reshape(-1, _SUMS * len(types) + 2)


def _touching(some: Sequence[Span], others: Sequence[Span]) -> int:
    return sum(any(a[1] <= b[2] and b[1] <= a[2] for b in others) for a in some)


def _exact(sums: Array) -> Array:
    return divided(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _overlap(sums: Array) -> Array:
    # Harmonic mean of: found entities that overlap a true one, true entities that overlap a found one.
    precision, recall = divided(sums[..., 3], sums[..., 1]), divided(sums[..., 4], sums[..., 2])
    nothing = (sums[..., 1] == 0) & (sums[..., 2] > 0)
    return np.where(
        nothing, 0.0, np.where(precision + recall == 0, 0.0, divided(2 * precision * recall, precision + recall))
    )


ENTITIES = (
    Measure("f1", "entity F1", "higher", _exact, percent=True),
    Measure("precision", "precision", "higher", ratio(0, 1), percent=True),
    Measure("recall", "recall", "higher", ratio(0, 2), percent=True),
    Measure("overlap_f1", "F1 of overlapping spans", "higher", _overlap, percent=True),
)

WORDS = Measure("word_accuracy", "words tagged right", "higher", ratio(_SUMS, _SUMS + 1), percent=True)


def tagged(base: Array, tuned: Array, labels: Sequence[str]) -> Measured:
    """Return the sums over all types, from `entity_sums` of base and tuned model."""
    types = len(types_of(labels))
    sums = []
    for rows in (base, tuned):
        whole = rows[:, : types * _SUMS].reshape(len(rows), types, _SUMS).sum(1)
        sums.append(np.concatenate([whole, rows[:, types * _SUMS :]], axis=1))
    return Measured((*ENTITIES, WORDS), sums[0], sums[1])


def of_type(base: Array, tuned: Array, place: int) -> Measured:
    """Return the sums of one type, by its place in `types_of`."""
    part = slice(place * _SUMS, (place + 1) * _SUMS)
    return Measured(ENTITIES, base[:, part], tuned[:, part])
