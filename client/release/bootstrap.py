"""Intervals by a paired bootstrap over units: base and tuned model are resampled together.

Records of one patient or document resemble each other, so whole units are drawn with replacement (Efron and Tibshirani
1993, "An Introduction to the Bootstrap", chapter 8). Each replicate weighs base and tuned model by the same units;
therefore their difference has an interval of its own, which is narrower than the two intervals suggest. Intervals are
percentiles of the replicates.

A measure is a function of sums over records, as in `privet.client.training.scores`. A replicate is then one product of
unit counts and unit sums, and no record is scored twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privet.common.privacy.noise import SeededRandomness

REPLICATES = 2000
CONFIDENCE = 0.95
FEWEST = 10
"""Fewer units than this allow no verdict."""

_ENTRIES = 4_000_000  # of a block of weights, so that memory stays below 100 MB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """One measure of base and tuned model on the same records.

    Attributes:
        base: The base alone.
        tuned: The base with the adapter.
        difference: Tuned minus base, record by record.
        records: Number of records.
        units: Number of units that these records belong to.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate
    records: int
    units: int


@dataclass(frozen=True)
class Measure:
    """A figure that follows from sums over records.

    Attributes:
        name: Key in JSON.
        title: Name for people.
        better: Which direction is better.
        of: From sums [..., k] to values [...].
        percent: Whether people read it in percent.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    of: Callable[[Array], Array]
    percent: bool = False


@dataclass(frozen=True)
class Measured:
    """Sums of single records for some measures: base and tuned [n, k]."""

    measures: tuple[Measure, ...]
    base: Array
    tuned: Array


class Resampling:
    """Replicates of some records, drawn by units.

    Args:
        units: Name of the unit of each record [n].
        seed: The same seed gives the same replicates.
        replicates: Number of replicates.
    """

    def __init__(self, units: Sequence[str], seed: int, replicates: int = REPLICATES) -> None:
        index: dict[str, int] = {}
        self.codes = np.array([index.setdefault(unit, len(index)) for unit in units], np.int64)
        self.units, self.replicates, self._seed = len(index), replicates, seed

    def weights(self) -> Iterator[Array]:
        """Yield blocks [r, units]: how often each replicate draws each unit. Every call gives the same blocks."""
        randomness, left = SeededRandomness(self._seed, "bootstrap"), self.replicates
        while left and self.units:
            rows = min(left, max(1, _ENTRIES // self.units))
            drawn = (randomness.uniform(rows * self.units) * self.units).astype(np.int64)
            drawn += np.repeat(np.arange(rows) * self.units, self.units)
            counts = np.bincount(drawn, minlength=rows * self.units)
            yield counts.reshape(rows, self.units).astype(np.float64)
            left -= rows

    def sums(self, rows: Array) -> Array:
        """Return the sums of each replicate [replicates, k] over rows of records [n, k]."""
        totals = np.zeros((self.units, rows.shape[1]))
        np.add.at(totals, self.codes, rows)
        blocks = [weights @ totals for weights in self.weights()]
        return np.concatenate(blocks) if blocks else np.zeros((0, rows.shape[1]))

    def replicated(self, function: Callable[[Array], Array]) -> Array:
        """Return a function's value for each replicate: it takes weights of records [r, n] and returns [r]."""
        found = []
        for weights in self.weights():
            step = max(1, _ENTRIES // max(len(self.codes), 1))
            for start in range(0, len(weights), step):
                found.append(function(weights[start : start + step][:, self.codes]))
        return np.concatenate(found) if found else np.zeros(0)


def compare(measured: Measured, resampling: Resampling, rows: NDArray[np.bool_] | None = None) -> list[Compared]:
    """Return each measure of base and tuned model, with intervals.

    Args:
        measured: Sums of all records [n, k].
        resampling: Of the same records.
        rows: Which records count [n]; None for all. All groups of a file share replicates.
    """
    kept = np.ones(len(measured.base), bool) if rows is None else rows
    base, tuned = (np.where(kept[:, None], sums, 0.0) for sums in (measured.base, measured.tuned))
    width = base.shape[1]
    drawn = resampling.sums(np.concatenate([base, tuned], axis=1))
    found = []
    for measure in measured.measures:
        with np.errstate(all="ignore"):
            whole = float(measure.of(base.sum(0))), float(measure.of(tuned.sum(0)))
            replicates = measure.of(drawn[:, :width]), measure.of(drawn[:, width:])
        found.append(compared(whole, replicates, int(kept.sum()), len(np.unique(resampling.codes[kept]))))
    return found


def compared(whole: tuple[float, float], replicates: tuple[Array, Array], records: int, units: int) -> Compared:
    """Return base and tuned value with the intervals of their replicates [r] each."""
    return Compared(
        interval(whole[0], replicates[0]),
        interval(whole[1], replicates[1]),
        interval(whole[1] - whole[0], replicates[1] - replicates[0]),
        records,
        units,
    )


def interval(value: float, replicates: Array) -> Estimate:
    """Return a value with the percentiles of its replicates. Replicates that are not finite are left out."""
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def ratio(over: int, under: int) -> Callable[[Array], Array]:
    """Return the function that divides one sum by another; NaN where there is nothing to divide by."""

    def of(sums: Array) -> Array:
        return divided(sums[..., over], sums[..., under])

    return of


def divided(over: Array, under: Array) -> Array:
    """Return a quotient; NaN where the denominator is 0."""
    over, under = np.broadcast_arrays(np.asarray(over, np.float64), np.asarray(under, np.float64))
    found: Array = np.divide(over, under, out=np.full(over.shape, np.nan), where=under != 0)
    return found


# --- in words --------------------------------------------------------------------------------------------

Tendency = Literal["better", "worse", "unclear", "equal", "few"]


def tendency(found: Compared, better: Literal["lower", "higher"], fewest: int = FEWEST) -> Tendency:
    """Return what a comparison says about the tuned model."""
    low, high = found.difference.low, found.difference.high
    if found.units < fewest or not math.isfinite(low + high):
        return "few"
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == (better == "lower") else "worse"


def shown(value: float, *, percent: bool = False, signed: bool = False) -> str:
    """Return a value for people: three digits, or percent with one decimal; with a real minus sign."""
    if not math.isfinite(value):
        return "not defined" if math.isnan(value) else "infinite"
    sign = "+" if signed else ""
    if percent:
        text = f"{100 * value:{sign}.1f}"
    else:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:{sign}.{min(digits, 4)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def between(estimate: Estimate, *, percent: bool = False, signed: bool = False, level: str = "95 % ") -> str:
    """Return an estimate with its interval, as in `7.3 (95 % 6.9 to 7.8)`. Tables name the level once."""
    value = shown(estimate.value, percent=percent, signed=signed)
    if not math.isfinite(estimate.low + estimate.high):
        return f"{value} (no interval)"
    low, high = (shown(bound, percent=percent, signed=signed) for bound in (estimate.low, estimate.high))
    return f"{value} ({level}{low} to {high})"


_VERDICTS: dict[Tendency, str] = {
    "better": "Tuned is better",
    "worse": "Tuned is worse",
    "unclear": "No clear difference",
    "equal": "No difference",
    "few": "Too few units for a verdict",
}


@dataclass(frozen=True)
class Figure:
    """A measure, its comparison, and the records that it is of, in words."""

    measure: Measure
    found: Compared
    of_what: str

    @property
    def tells(self) -> Tendency:
        """What it says about the tuned model."""
        return tendency(self.found, self.measure.better)

    @property
    def values(self) -> str:
        """Base, tuned and difference in words."""
        percent = self.measure.percent
        unit, points = (" %", " points") if percent else ("", "")
        base, tuned = (shown(e.value, percent=percent) for e in (self.found.base, self.found.tuned))
        difference = between(self.found.difference, percent=percent, signed=True).replace(" (", f"{points} (", 1)
        return f"{self.measure.title} {base}{unit} → {tuned}{unit}, difference {difference}, {self.of_what}"


def verdict(*figures: Figure) -> str:
    """Return one sentence on one comparison, or on two that may disagree."""
    return f"{_lead(figures)}: {'; '.join(each.values for each in figures)}."


def _lead(figures: Sequence[Figure]) -> str:
    if len({each.tells for each in figures}) == 1:
        return _VERDICTS[figures[0].tells]
    clear = [each for each in figures if each.tells in ("better", "worse")]
    if len(clear) > 1:
        return "Tuned is better by one figure and worse by the other"
    if clear:
        return f"{_VERDICTS[clear[0].tells]} in {clear[0].measure.title} alone"
    return _VERDICTS[figures[-1].tells]


# --- as JSON ---------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return values as JSON holds them: numbers that are not finite become null."""
    if isinstance(value, Estimate):
        return {"value": plain(value.value), "low": plain(value.low), "high": plain(value.high)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def as_document(measure: Measure, found: Compared) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    document: dict[str, Any] = plain(
        {
            "title": measure.title,
            "better": measure.better,
            "percent": measure.percent,
            "base": found.base,
            "tuned": found.tuned,
            "difference": found.difference,
            "records": found.records,
            "units": found.units,
            "tells": tendency(found, measure.better),
        }
    )
    return document
