"""Measure how well scores separate two groups, with intervals that hold for small groups.

`positive` are the scores of records that were used in training, `negative` those of records that were not. A higher
score means "used".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv
from scipy.stats import rankdata

from privet.common.errors import StudyError

Scores = NDArray[np.float64]
Interval = tuple[float, float]
RATES = (0.001, 0.01)
"""False-positive rates at which the true-positive rate is measured (Carlini et al. 2022, section III)."""


@dataclass(frozen=True)
class Rate:
    """True positives at a bounded false-positive rate.

    Attributes:
        at: The bound on the false-positive rate.
        tpr: Fraction of the positives above the threshold.
        interval: Clopper-Pearson interval of `tpr` at this threshold, 95 %.
        false_positives: Negatives above the threshold: at most `at` of them.
        resolved: Whether there are enough negatives for the bound to allow at least one false positive.
    """

    at: float
    tpr: float
    interval: Interval
    false_positives: int
    resolved: bool


@dataclass(frozen=True)
class Separation:
    """The separation of positives and negatives by their scores.

    Attributes:
        auc: Probability that a positive scores higher than a negative, ties counting half.
        interval: Its 95 % interval by DeLong et al. (1988).
        rates: `Rate` at each of `RATES`.
    """

    positives: int
    negatives: int
    auc: float
    interval: Interval
    rates: tuple[Rate, ...]


def separation(positive: Sequence[float] | Scores, negative: Sequence[float] | Scores) -> Separation:
    """Compare two groups of scores.

    Raises:
        StudyError: A group has fewer than two scores, or a score is NaN.
    """
    above, below = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if min(above.size, below.size) < 2 or np.isnan(above).any() or np.isnan(below).any():
        raise StudyError(
            "the scores of an attack: expected two groups of at least 2 scores, none of them NaN (not a number); "
            f"got groups of {above.size} and {below.size} scores",
            "if a group has fewer than 2 scores, give the study more records; otherwise a score is NaN: "
            "lower the study's learning rate",
        )
    area, interval = _area(above, below)
    return Separation(above.size, below.size, area, interval, tuple(rate(above, below, at) for at in RATES))


def _area(above: Scores, below: Scores) -> tuple[float, Interval]:
    """Return the AUC and its interval.

    V_i is the fraction of negatives below positive i, and W_j the fraction of positives above negative j. The variance
    of the AUC is var(V)/n + var(W)/m (DeLong et al. 1988, equations 5 to 8). V and W follow from ranks (Sun and Xu
    2014). The interval is computed on the logit scale, so that it stays within 0..1.
    """
    n, m = above.size, below.size
    together = rankdata(np.concatenate([above, below]))
    wins = (together[:n] - rankdata(above)) / m  # V
    losses = 1 - (together[n:] - rankdata(below)) / n  # W
    area = float(wins.mean())
    spread = math.sqrt(float(wins.var(ddof=1)) / n + float(losses.var(ddof=1)) / m)
    if area in (0.0, 1.0) or spread == 0:
        # The scores show no spread, so the formula gives no interval. The exact interval of the smaller group covers
        # the worst case, in which one more score falls on the other side.
        low, high = clopper_pearson(round(area * min(n, m)), min(n, m))
        return area, (low, high)
    centre, half = math.log(area / (1 - area)), NormalDist().inv_cdf(0.975) * spread / (area * (1 - area))
    return area, (1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-centre - half)))


def rate(positive: Scores, negative: Scores, at: float) -> Rate:
    """Return the true positives at the lowest threshold that at most a fraction `at` of the negatives exceeds."""
    allowed = math.floor(at * negative.size)
    threshold = np.sort(negative)[::-1][allowed]  # The first negative that must not exceed the threshold.
    hits = int((positive > threshold).sum())
    return Rate(
        at,
        hits / positive.size,
        clopper_pearson(hits, positive.size),
        int((negative > threshold).sum()),
        allowed >= 1,
    )


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return the exact two-sided interval of a success probability (Clopper and Pearson 1934).

    Raises:
        StudyError: Not 0 <= successes <= trials, or no trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise StudyError(
            "confidence interval of a success rate: expected at least 1 trial and 0 <= successes <= trials, "
            f"got {successes} successes in {trials} trials",
            "report this as a bug unless your own code passed these numbers",
        )
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high
