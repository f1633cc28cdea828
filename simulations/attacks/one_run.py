"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

Each of m canaries enters the training data by a fair coin of its own. The auditor looks at what was released,
guesses some of the coins and abstains from the others. If the mechanism is (epsilon, delta)-differentially
private under adding or removing a record, then of r guesses at least v are right with a probability of at most

    P[B >= v]  +  2 m delta max over i in 1..v of P[v > B >= v - i] / i,    B ~ Binomial(r, e^eps / (e^eps + 1))

(theorem 5.2 and corollary 5.4; computed as in appendix D). Where that is below 1 - confidence, this epsilon is
refuted. The guesses may depend on what was released in any way, but not on the coins: so the numbers of guesses
are fixed beforehand, and the bound over several of them is at a confidence that the number of tries divides.
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
"""Which coins are guessed: those of the highest and lowest scores, the lowest alone, the highest alone."""
# Beyond, e^-epsilon is lost beside 1 in the last digits of any figure here.
_LARGEST = 32.0
_PRECISION = 1e-4


@dataclass(frozen=True)
class Audit:
    """What one run shows.

    Attributes:
        canaries: m.
        guesses: r of the best try.
        right: v of the best try.
        side: Which coins it guessed, of `SIDES`.
        epsilon: The lower bound at `confidence`, over all tries.
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
        StudyError: Not 0 <= right <= guesses <= canaries, epsilon below 0, or delta outside [0, 1].
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise StudyError(
            f"an audit needs 0 <= right <= guesses <= canaries, got {right}, {guesses}, {canaries}; "
            f"and epsilon >= 0, 0 <= delta <= 1, got {epsilon}, {delta}"
        )
    accuracy = 1 / (1 + math.exp(-epsilon))
    chance = float(binom.sf(right - 1, guesses, accuracy))
    if delta == 0 or right == 0:
        return min(chance, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))  # P[v > B >= v - i], i = 1..v
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(chance + 2 * canaries * delta * steepest, 1.0)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon that is refuted at the confidence, rounded down by up to 1e-4; 0 where none is.

    The p-value rises with epsilon where delta is 0. Its second term need not, so bisection finds a crossing, and
    what it returns is checked to be refuted itself; smaller epsilons are then refuted too, as the mechanism with
    a smaller epsilon is one with this epsilon.

    Raises:
        StudyError: As `p_value`, or the confidence is not strictly between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise StudyError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    level = 1 - confidence
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, _LARGEST
    if p_value(canaries, guesses, right, high, delta) < level:
        return high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def audit(
    scores: Sequence[float] | NDArray[np.float64],
    included: Sequence[bool] | NDArray[np.bool_],
    delta: float,
    confidence: float = 0.95,
) -> Audit:
    """Guess the coins from the scores and return the best bound of all tries.

    Args:
        scores: One per canary; a higher one says "included". What is not finite is the lowest.
        included: The coins.
        delta: Of the guarantee that is tested.
        confidence: Of the returned bound, over all tries together.

    Raises:
        StudyError: Not as many scores as coins, or fewer than 20.
    """
    values = np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf)
    truth = np.asarray(included, bool)
    m = values.size
    if m != truth.size or m < 20:
        raise StudyError(f"an audit needs one score per coin and at least 20, got {m} and {truth.size}")
    order = np.argsort(values, kind="stable")
    tries = len(SHARES) * len(SIDES)
    each = 1 - (1 - confidence) / tries
    best: Audit | None = None
    for share in SHARES:
        k = int(m * share)
        out_right, in_right = int((~truth[order[:k]]).sum()), int(truth[order[m - k :]].sum())
        found = {"both": (2 * k, out_right + in_right), "out": (k, out_right), "in": (k, in_right)}
        for side in SIDES:
            guesses, right = found[side]
            bound = epsilon_bound(m, guesses, right, delta, each)
            if best is None or bound > best.epsilon:
                best = Audit(m, guesses, right, side, bound, delta, confidence, tries)
    assert best is not None  # noqa: S101 - narrows the type; there is at least one try
    return best
