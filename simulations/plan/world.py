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

# Part of a feature's squared norm that all records share. Sentence encoders have about so much.
_SHARED = 0.3
# Part of the variance within a class that a unit's records share: notes of one patient resemble each other.
_ALIKE = 0.4
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
    """How well classes come apart, as distances of two classes in deviations within a class.

    Attributes:
        seen: In frozen features.
        hidden: In what adapters see, beside it.
    """

    seen: float
    hidden: float


EASY, USUAL, HARD = Separability(4.6, 4.2), Separability(3.7, 3.6), Separability(2.8, 2.8)
"""Separabilities with which, of six classes, frozen features reach about 95, 88 and 75 % without noise."""


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
    middles = _middles(consortium.classes, width, apart.seen, rng), _middles(consortium.classes, hidden, apart.hidden, rng)
    shared = rng.standard_normal(width)
    shared *= np.sqrt(width * _SHARED / (1 - _SHARED)) / np.linalg.norm(shared)
    counts = 1 + rng.poisson(consortium.records - 1, consortium.total)
    tests = np.ones(_TESTS, np.int64)
    return World(
        _draw(consortium.classes, counts, middles, shared, rng), _draw(consortium.classes, tests, middles, shared, rng)
    )


def _middles(classes: int, width: int, apart: float, rng: np.random.Generator) -> Matrix:
    """Return the middles of classes, [classes, width], any two of which are about `apart` from each other."""
    found = rng.standard_normal((classes, width))
    return found * apart / np.sqrt(2) / np.linalg.norm(found, axis=1, keepdims=True)


def _draw(
    classes: int, counts: NDArray[np.int64], middles: tuple[Matrix, Matrix], shared: Matrix, rng: np.random.Generator
) -> Records:
    units = np.repeat(np.arange(len(counts)), counts)
    # Most of a unit's records have its class, and some another one.
    own = rng.integers(classes, size=len(counts))[units]
    labels = np.where(rng.random(len(units)) < 0.8, own, rng.integers(classes, size=len(units)))
    found = []
    for places in middles:
        width = places.shape[1]
        common = rng.standard_normal((len(counts), width))[units]
        noise = np.sqrt(_ALIKE) * common + np.sqrt(1 - _ALIKE) * rng.standard_normal((len(units), width))
        found.append(places[labels] + noise)
    seen = found[0] + shared
    seen *= np.sqrt(seen.shape[1]) / np.linalg.norm(seen, axis=1, keepdims=True)
    return Records(seen, found[1], labels, units)
