"""The attacks' statistics, against brute force, exact distributions and mechanisms of known epsilon."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privet.client.release.separation import clopper_pearson, rate, separation
from privet.common.errors import StudyError
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.privacy.accounting import epsilon as accounted
from privet.common.privacy.one_run import SHARES, SIDES, audit, epsilon_bound, p_value

# The audit


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_papers(canaries: int, guesses: int, right: int, delta: float, published: float) -> None:
    # Steinke et al. 2023, appendix D and section 7 (figure 11): printed to three digits, one of them cut.
    assert epsilon_bound(canaries, guesses, right, delta) == pytest.approx(published, abs=1e-3)


def randomised_response(epsilon: float, delta: float) -> dict[tuple[bool, str], float]:
    """Return P[output | coin] of the mechanism that shows the coin with probability delta, and else flips it by
    randomised response: (epsilon, delta)-DP, and the one that gives most away."""
    truth = (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    found = {}
    for coin in (False, True):
        found[coin, "shown"] = delta
        found[coin, "same"] = truth
        found[coin, "other"] = 1 - delta - truth
    return found


def right_guesses(epsilon: float, delta: float, canaries: int) -> dict[int, float]:
    """Return the distribution of right guesses when every coin is guessed, by adding up all outcomes."""
    chances = randomised_response(epsilon, delta)
    found = dict.fromkeys(range(canaries + 1), 0.0)
    for outputs in product(("shown", "same", "other"), repeat=canaries):
        right = sum(output != "other" for output in outputs)
        found[right] += math.prod(chances[True, output] for output in outputs)
    return found


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_no_outcome_is_likelier_than_its_p_value(epsilon: float, delta: float) -> None:
    canaries = 7
    chances = right_guesses(epsilon, delta, canaries)
    for right in range(canaries + 1):
        tail = sum(chances[count] for count in range(right, canaries + 1))
        assert tail <= p_value(canaries, canaries, right, epsilon, delta) + 1e-12
    if delta == 0:  # where randomised response is the worst case, the bound is met
        assert sum(chances[c] for c in range(5, 8)) == pytest.approx(p_value(7, 7, 5, epsilon, 0.0), abs=1e-12)


@given(
    guesses=st.integers(1, 60),
    data=st.data(),
    epsilon=st.floats(0, 6),
    delta=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
)
def test_the_p_value_is_the_theorems_sum(guesses: int, data: Any, epsilon: float, delta: float) -> None:
    right = data.draw(st.integers(0, guesses))
    extra = data.draw(st.integers(0, 40))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    steepest = max((sum(chances[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
    expected = sum(chances[right:]) + 2 * (guesses + extra) * delta * steepest
    found = p_value(guesses + extra, guesses, right, epsilon, delta)
    assert found == pytest.approx(min(1.0, expected), rel=1e-6, abs=1e-9)


@settings(max_examples=60)
@given(guesses=st.integers(1, 400), data=st.data(), delta=st.sampled_from([0.0, 1e-5, 1e-2]))
def test_what_is_returned_is_refuted(guesses: int, data: Any, delta: float) -> None:
    right = data.draw(st.integers(0, guesses))
    bound = epsilon_bound(guesses, guesses, right, delta)
    assert bound == 0 or p_value(guesses, guesses, right, bound, delta) < 0.05
    if right < guesses:
        assert bound <= epsilon_bound(guesses, guesses, right + 1, delta)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_the_bound_lies_below_the_epsilon_of_randomised_response(epsilon: float) -> None:
    rng = np.random.default_rng(1)
    trials, canaries = 80, 400
    bounds = []
    for _ in range(trials):
        coins = rng.random(canaries) < 0.5
        told = np.where(rng.random(canaries) < math.exp(epsilon) / (1 + math.exp(epsilon)), coins, ~coins)
        bounds.append(audit(told + 0.5 * rng.random(canaries), coins, 0.0).epsilon)
    exceeded = sum(bound > epsilon for bound in bounds)
    assert stats.binomtest(exceeded, trials, 0.05, alternative="greater").pvalue > 1e-3
    assert np.mean(bounds) > 0.4 * epsilon  # and the bound is worth something


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.6, 1.5])
def test_the_bound_lies_below_the_epsilon_of_the_gaussian_mechanism(noise: float) -> None:
    rng = np.random.default_rng(2)
    delta = 1e-5
    claimed = accounted([PrivacyEvent(noise, 1.0, 1, "record")], delta)
    bounds = []
    for _ in range(15):
        coins = rng.random(1000) < 0.5  # each canary a coordinate of its own, of sensitivity 1
        bounds.append(audit(coins + noise * rng.standard_normal(1000), coins, delta).epsilon)
    assert max(bounds) < claimed
    assert min(bounds) > 0


def test_guessing_at_random_shows_nothing_and_perfect_guesses_a_lot() -> None:
    rng = np.random.default_rng(3)
    coins = rng.random(1000) < 0.5
    assert audit(rng.random(1000), coins, 1e-5).epsilon < 0.5
    perfect = audit(coins.astype(float), coins, 1e-5)
    assert perfect.epsilon > 4.5
    assert perfect.right >= perfect.guesses - abs(1000 - 2 * int(coins.sum()))
    # All tries share the confidence.
    assert perfect.tries == len(SHARES) * len(SIDES)
    assert perfect.epsilon < epsilon_bound(1000, perfect.guesses, perfect.right, 1e-5)


def test_a_score_that_is_no_number_is_no_evidence_of_membership() -> None:
    coins = [True, False] * 10
    assert audit([math.nan if coin else 1.0 for coin in coins], coins, 0.0).epsilon == 0


@pytest.mark.parametrize("wrong", [(10, 11, 5, 1.0, 0.0), (10, 5, 6, 1.0, 0.0), (10, 5, 5, -1.0, 0.0), (1, 1, 1, 1, 2)])
def test_impossible_audits_are_refused(wrong: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(StudyError):
        p_value(*wrong)


def test_an_audit_needs_canaries() -> None:
    with pytest.raises(StudyError, match="at least 20"):
        audit([1.0] * 19, [True] * 19, 0.0)


# Separation


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=25),
    st.lists(st.integers(0, 6), min_size=2, max_size=25),
)
def test_the_area_is_the_share_of_pairs_in_order(above: list[int], below: list[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below]
    found = separation([float(a) for a in above], [float(b) for b in below])
    assert found.auc == pytest.approx(np.mean(pairs))
    assert 0 <= found.interval[0] <= found.auc + 1e-9
    assert found.auc - 1e-9 <= found.interval[1] <= 1


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_areas_interval_covers_the_truth(shift: float) -> None:
    rng = np.random.default_rng(4)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    inside = 0
    for _ in range(300):
        low, high = separation(shift + rng.standard_normal(60), rng.standard_normal(90)).interval
        inside += low <= truth <= high
    assert stats.binomtest(inside, 300, 0.95, alternative="less").pvalue > 1e-3


@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=40),
    st.lists(st.integers(0, 20), min_size=2, max_size=40),
    st.sampled_from([0.001, 0.01, 0.1, 0.3]),
)
def test_the_rate_is_the_best_within_the_bound(above: list[int], below: list[int], at: float) -> None:
    found = rate(np.array(above, float), np.array(below, float), at)
    allowed = [t for t in range(-1, 21) if sum(b > t for b in below) <= at * len(below)]
    assert found.tpr == max(sum(a > t for a in above) for t in allowed) / len(above)
    assert found.false_positives <= at * len(below)
    assert found.resolved == (len(below) * at >= 1)


@given(st.integers(1, 200), st.data())
def test_exact_intervals_are_scipys(trials: int, data: Any) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, "exact")
    assert clopper_pearson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_scores_that_are_no_numbers_or_too_few_are_refused() -> None:
    for above, below in (([1.0], [0.0, 1.0]), ([math.nan, 1.0], [0.0, 1.0])):
        with pytest.raises(StudyError):
            separation(above, below)
    with pytest.raises(StudyError):
        clopper_pearson(3, 2)
