"""Synthetic records that stand in for those of a consortium, made from counts that its sites declare.

A record has two vectors. `seen` is what the frozen base tells of it, the input of the classifier: classes are Gaussian
clusters around a middle that all records share. `hidden` is what adapters see of its tokens through A; it holds a part
of the class that only a trained adapter brings out. With B an adapter's factors, a classifier's logits are

    (seen + B·hidden)·W + b

so that the head alone reaches the accuracy of frozen features, and head and adapter together more. How well classes
come apart, in either part, is not known before records are read: it is an assumption (`EASY`, `USUAL`, `HARD`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import StudyError

Matrix = NDArray[np.float64]

# Measured on the frozen features of a sentence encoder (all-MiniLM-L6-v2) and generated triage notes: the part of a
# feature's squared norm that all records share; the part of the variance within a class that a unit's records share;
# and how many of a unit's records have its class. The variance within a class falls by a power law of the direction.
_SHARED, _ALIKE, _SAME = 0.33, 0.28, 0.88
_OFFSET, _POWER = 10.0, 1.6
# Middles of classes lie along the directions of large variance even more than records do.
_MIDDLES = 2.0
_TESTS = 1500
_MOST_RECORDS = 60_000
# Beyond these sizes, the stand-in is smaller than the model: noise per value stays, and there are fewer values.
MOST_WIDTH, MOST_HIDDEN = 768, 64


@dataclass(frozen=True)
class Consortium:
    """What sites declare, and the sizes of the model.

    Attributes:
        units: Units (records, patients) of each site.
        records: Records of a unit, on the mean.
        classes: Number of classes.
        width: Values of a feature.
        modules: Number of layers with an adapter.
        rank: Rank of an adapter.
    """

    units: tuple[int, ...]
    records: float
    classes: int
    width: int
    modules: int
    rank: int

    def __post_init__(self) -> None:
        if not self.units or min(self.units) < 1 or self.records < 1:
            raise StudyError(
                "plan: expected 1 or more units at each site, and 1 or more records in each, found "
                f"{list(self.units)} and {self.records:g}",
                "name each site's count, as in `privet plan STUDY --units 120 --units 95 --units 80`",
            )
        if self.total * self.records > _MOST_RECORDS:
            raise StudyError(
                f"plan: expected at most {_MOST_RECORDS} records in all, found about {self.total * self.records:.0f}",
                "with so many records, settings matter less; use those of `privet new FILES`, and try others with "
                "`privet sweep SWEEP`",
            )

    @property
    def total(self) -> int:
        """Units of all sites."""
        return sum(self.units)

    @property
    def values(self) -> tuple[int, int]:
        """Number of values of the adapter (its B), and of the head."""
        return self.modules * self.rank * self.width, self.classes * (self.width + 1)


@dataclass(frozen=True)
class Separability:
    """How well classes come apart.

    Attributes:
        seen: In frozen features: variance between classes over variance within a class.
        hidden: In what adapters see beside it: distance of two classes, in deviations within a class.
    """

    seen: float
    hidden: float


EASY, USUAL, HARD = Separability(0.3, 2.8), Separability(0.2, 2.2), Separability(0.12, 1.7)
"""USUAL is that of generated triage notes of six classes, of which a head start alone tells 88 % apart."""


@dataclass(frozen=True)
class Records:
    """Records with features.

    Attributes:
        seen: [n, width], each of norm √width.
        hidden: [n, hidden].
        labels: [n].
        units: Number of the unit of each record, [n], in order.
    """

    seen: Matrix
    hidden: Matrix
    labels: NDArray[np.int64]
    units: NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """Training and test records of one draw."""

    train: Records
    test: Records


def draw_world(consortium: Consortium, apart: Separability, seed: int) -> World:
    """Draw the records of a consortium. Equal arguments give equal records."""
    rng = np.random.default_rng(seed)
    width = min(consortium.width, MOST_WIDTH)
    hidden = min(consortium.modules * consortium.rank, MOST_HIDDEN)
    falling = (np.arange(width) + _OFFSET) ** -_POWER
    parts = (
        _Part.drawn(consortium.classes, np.sqrt(falling / falling.sum()), apart.seen, rng),
        _Part.drawn(consortium.classes, np.ones(hidden), apart.hidden**2 / (2 * hidden), rng),
    )
    shared = rng.standard_normal(width)
    shared *= np.sqrt((1 + apart.seen) * _SHARED / (1 - _SHARED)) / np.linalg.norm(shared)
    counts = 1 + rng.poisson(consortium.records - 1, consortium.total)
    tests = np.ones(_TESTS, np.int64)
    return World(*(_draw(consortium.classes, each, parts, shared, rng) for each in (counts, tests)))


@dataclass(frozen=True)
class _Part:
    """A part of all records' vectors: deviations within a class along each direction [size], and middles of classes."""

    deviations: Matrix
    middles: Matrix

    @classmethod
    def drawn(cls, classes: int, deviations: Matrix, between: float, rng: np.random.Generator) -> _Part:
        """Draw middles whose mean squared norm is `between` times the variance within a class."""
        found = rng.standard_normal((classes, len(deviations))) * deviations**_MIDDLES
        found -= found.mean(0)
        scale = np.sqrt(between * (deviations**2).sum() / (found**2).sum(1).mean())
        return cls(deviations, found * scale)


def _draw(
    classes: int, counts: NDArray[np.int64], parts: tuple[_Part, _Part], shared: Matrix, rng: np.random.Generator
) -> Records:
    units = np.repeat(np.arange(len(counts)), counts)
    own = rng.integers(classes, size=len(counts))[units]
    labels = np.where(rng.random(len(units)) < _SAME, own, rng.integers(classes, size=len(units)))
    found = []
    for part in parts:
        size = len(part.deviations)
        common = rng.standard_normal((len(counts), size))[units]
        noise = np.sqrt(_ALIKE) * common + np.sqrt(1 - _ALIKE) * rng.standard_normal((len(units), size))
        found.append(part.middles[labels] + noise * part.deviations)
    seen = found[0] + shared
    seen *= np.sqrt(seen.shape[1]) / np.linalg.norm(seen, axis=1, keepdims=True)
    return Records(seen, found[1], labels, units)
