"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

A fair coin decides for each of m canaries whether it enters the training data. The auditor sees the released values,
guesses some of the coins, and abstains from the others. If the mechanism is (epsilon, delta)-differentially private
under adding or removing a record, then at least v of r guesses are right with a probability of at most

    P[B >= v]  +  2 m delta max over i in 1..v of P[v > B >= v - i] / i,    B ~ Binomial(r, e^eps / (e^eps + 1))

(theorem 5.2 and corollary 5.4; computed as in appendix D). If that is below 1 - confidence, this epsilon is refuted.
The guesses may depend in any way on the released values, but not on the coins. The numbers of guesses are therefore
fixed in advance. For a bound over several tries, the failure probability 1 - confidence is divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from privet.common.errors import StudyError

SHARES = (1 / 20, 1 / 10, 1 / 4, 1 / 2)
"""Guesses on one side, as fractions of the canaries."""
SIDES = ("both", "out", "in")
"""Coins that are guessed: those of the highest and the lowest scores, only the lowest, or only the highest."""
TRIES = len(SHARES) * len(SIDES)
CONFIDENCE = 0.95
# Beyond this, e^-epsilon changes only the last digits of 1 + e^-epsilon.
_LARGEST = 32.0
_PRECISION = 1e-4


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        canaries: Number of canaries, m.
        guesses: Number of guesses of the best try, r.
        right: Right guesses of the best try, v.
        side: The coins that the best try guessed, one of `SIDES`.
        epsilon: The lower bound at `confidence`, over all tries.
        delta: Delta of the tested guarantee.
        confidence: Confidence of the bound.
        tries: Number of tries.
    """

    canaries: int
    guesses: int
    right: int
    side: str
    epsilon: float
    delta: float
    confidence: float
    tries: int


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of at least `right` right guesses that (epsilon, delta)-DP allows.

    Raises:
        StudyError: 0 <= right <= guesses <= canaries does not hold, epsilon is below 0, or delta is outside [0, 1].
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise StudyError(
            "audit of epsilon: expected 0 <= right <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1; "
            f"got {right} right, {guesses} guesses, {canaries} canaries, epsilon {epsilon}, delta {delta}",
            "report this as a bug unless your own code passed these numbers",
        )
    accuracy = 1 / (1 + math.exp(-epsilon))
    chance = float(binom.sf(right - 1, guesses, accuracy))
    if delta == 0 or right == 0:
        return min(chance, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))  # P[v > B >= v - i], i = 1..v
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(chance + 2 * canaries * delta * steepest, 1.0)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon that is refuted at the confidence, rounded down by up to 1e-4; 0 if none is refuted.

    If delta is 0, the p-value rises with epsilon. Its second term need not rise, so bisection finds a crossing, and the
    p-value of the returned epsilon itself was computed and is below the level. Smaller values are then refuted too: a
    mechanism that satisfies a smaller epsilon also satisfies this one.

    Raises:
        StudyError: `p_value` raises it, or the confidence is not strictly between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise StudyError(
            f"audit of epsilon: expected a confidence above 0 and below 1, got {confidence}",
            "pass a confidence such as 0.95",
        )
    level = 1 - confidence
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, _LARGEST
    if p_value(canaries, guesses, right, high, delta) < level:
        return high
    # `low` is always refuted and `high` never; returning `low` keeps the bound valid.
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def bound_of_best(canaries: int, guesses: int, right: int, delta: float) -> float:
    """Return the bound of `audit` from the numbers of its best try. Raises as `p_value`."""
    return epsilon_bound(canaries, guesses, right, delta, 1 - (1 - CONFIDENCE) / TRIES)


def audit(
    scores: Sequence[float] | NDArray[np.float64],
    included: Sequence[bool] | NDArray[np.bool_],
    delta: float,
    confidence: float = CONFIDENCE,
) -> Audit:
    """Guess the coins from the scores and return the best bound of all tries.

    Args:
        scores: One per canary; a higher score means "included". NaN counts as the lowest score.
        included: The coins.
        delta: Delta of the tested guarantee.
        confidence: Confidence of the returned bound, over all tries together.

    Raises:
        StudyError: The numbers of scores and coins differ, or there are fewer than 20.
    """
    values = np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf)
    truth = np.asarray(included, bool)
    m = values.size
    if m != truth.size or m < 20:
        raise StudyError(
            f"audit of epsilon: expected at least 20 canaries and one score for each, got {m} scores for {truth.size} "
            "canaries",
            "audit with --canaries 20 or more",
        )
    order = np.argsort(values, kind="stable")
    # The best of several tries is reported, so the failure probability is shared among them (union bound).
    each = 1 - (1 - confidence) / TRIES
    best: Audit | None = None
    for share in SHARES:
        k = int(m * share)
        out_right, in_right = int((~truth[order[:k]]).sum()), int(truth[order[m - k :]].sum())
        found = {"both": (2 * k, out_right + in_right), "out": (k, out_right), "in": (k, in_right)}
        for side in SIDES:
            guesses, right = found[side]
            bound = epsilon_bound(m, guesses, right, delta, each)
            if best is None or bound > best.epsilon:
                best = Audit(m, guesses, right, side, bound, delta, confidence, TRIES)
    assert best is not None  # noqa: S101 - narrows the type; there is at least one try
    return best
