"""Correlated noise: the claims of `docs/correlated-noise.md`, each with a broken mechanism that fails it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from privet.common.errors import StateError, StudyError
from privet.common.privacy.correlated import MOST_STEPS, Band, band_of, most_draws

HALF = Band((1 << 13,))
UNIT = 1 << 14


def encoder(band: Band, steps: int) -> np.ndarray:
    """Return the lower triangular band [T, T] in float64."""
    found = np.eye(steps)
    for lag, value in enumerate(band.coefficients, 1):
        found += value / UNIT * np.eye(steps, k=-lag)
    return found


# --- the band ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "momentum"), [(2, 0.0), (5, 0.0), (4, 0.9), (8, 0.5)])
def test_the_band_squared_is_the_sum_of_steps(steps, momentum):
    band = band_of(steps, momentum)
    root = np.array([1.0, *(value / UNIT for value in band.coefficients)])
    squared = np.convolve(root, root)[:steps]
    workload = np.convolve(np.ones(steps), momentum ** np.arange(steps))[:steps]
    assert np.abs(squared - workload).max() < steps * 2.0**-14
    assert list(root) == sorted(root, reverse=True)  # its inverse stays bounded (Eneström and Kakeya)


def test_the_norm_is_rounded_up():
    for band in (HALF, band_of(7, 0.9), band_of(31, 0.0)):
        exact = 1 + sum(Fraction(value, UNIT) ** 2 for value in band.coefficients)
        assert exact <= Fraction(band.norm) ** 2 <= exact * (1 + Fraction(1, 2**45))


def test_the_spread_is_that_of_the_inverse():
    for band in (HALF, band_of(6, 0.9)):
        inverse = np.linalg.inv(encoder(band, 20))
        assert band.spread(20) == pytest.approx(np.linalg.norm(inverse[-1]), rel=1e-12)


def test_bands_that_do_not_fit_are_refused():
    for steps in (1, MOST_STEPS + 1):
        with pytest.raises(StudyError, match="expected 2 to 64 steps"):
            band_of(steps, 0.0)
    with pytest.raises(StudyError, match="more than integers of 64 bits hold"):
        band_of(MOST_STEPS, 0.999)


def test_rounding_beyond_the_margin_is_refused():
    HALF.check_rounding(0.6, 30, 10**6)
    with pytest.raises(StudyError, match="more than clipping leaves room for"):
        HALF.check_rounding(30.0, 300, 10**8)


def test_classes_follow_from_a_units_own_name():
    band = band_of(4, 0.0)
    names = [f"patient-{number}" for number in range(4000)]
    classes = [band.class_of(7, name) for name in names]
    assert [band.class_of(7, name) for name in names[1:]] == classes[1:]
    assert classes != [band.class_of(8, name) for name in names]
    assert all(850 < classes.count(each) < 1150 for each in range(4))


@pytest.mark.parametrize(("rounds", "band"), [(1, 4), (7, 3), (8, 4), (60, 7)])
def test_most_draws_is_the_largest_class(rounds, band):
    steps = [Band((0,) * (band - 1)).step_class(step) for step in range(rounds)]
    assert most_draws(rounds, band) == max(map(steps.count, steps))


# --- sensitivity -------------------------------------------------------------------------------------------------


def largest_shift(band: Band, patterns: list[tuple[int, ...]], steps: int) -> float:
    """Return the largest norm of E x over patterns, each entry a vector of the unit disc's corners in R²."""
    found, corners = 0.0, [np.array(v) for v in ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0))]
    for pattern in patterns:
        for signs in itertools.product(corners, repeat=len(pattern)):
            x = np.zeros((steps, 2))
            x[list(pattern)] = signs
            found = max(found, float(np.linalg.norm(encoder(band, steps) @ x)))
    return found


@pytest.mark.parametrize("band", [HALF, band_of(3, 0.0), band_of(3, 0.9)])
def test_sensitivity_is_the_norm_of_the_band_for_each_separated_draw(band):
    steps = 8
    classes = [[t for t in range(steps) if t % band.steps == j] for j in range(band.steps)]
    separated = [part for each in classes for k in range(1, len(each) + 1) for part in itertools.combinations(each, k)]
    for pattern in separated:
        assert largest_shift(band, [pattern], steps) <= band.norm * math.sqrt(len(pattern)) + 1e-12
    assert largest_shift(band, [(0, band.steps)], steps) == pytest.approx(band.norm * math.sqrt(2))
    # Steps closer than the band cost more than two draws do.
    assert largest_shift(band, [(0, 1)], steps) > 1.05 * band.norm * math.sqrt(2)


# --- covariance over drop-outs -----------------------------------------------------------------------------------


def sums(band: Band, presence: np.ndarray, used: np.ndarray, scale: np.ndarray, *, paused: bool = False) -> np.ndarray:
    """Return the matrix that takes all sites' fresh noise [sites * T] to the revealed sums [T].

    Args:
        band: The band.
        presence: Which sites are in which sum, [sites, T].
        used: a, what a site takes back, [sites, T at which it draws, T of the noise].
        scale: Deviation of fresh noise by step, [T]; the claim has 1 everywhere.
        paused: Whether a site counts only the steps in which it is present: the broken clock.
    """
    sites, steps = presence.shape
    found = np.zeros((steps, sites * steps))
    for site in range(sites):
        rows = np.zeros((steps, sites * steps))
        known = [t for t in range(steps) if presence[site, t]] if paused else list(range(steps))
        for place, t in enumerate(known):
            rows[t, site * steps + t] = scale[t]
            for lag in range(1, min(band.steps, place + 1)):
                before = known[place - lag]
                rows[t] -= used[site, t, before] * band.coefficients[lag - 1] / UNIT * rows[before]
        found += presence[site][:, None] * rows
    return found


def cost(matrix: np.ndarray, steps: list[int]) -> float:
    """Return the largest mu² of a unit in `steps`, over signs of its gradients, of norm 1 each."""
    inverse = np.linalg.inv(matrix @ matrix.T)
    found = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=len(steps)):
        x = np.zeros(len(matrix))
        x[steps] = signs
        found = max(found, float(x @ inverse @ x))
    return found


def histories(count: int, seed: int):
    """Yield random bands, presences with at least m = 2 sites in each sum, and sites' choices what to take back."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        steps, width, sites = int(draws.integers(2, 9)), int(draws.integers(2, 5)), int(draws.integers(2, 5))
        presence = draws.random((sites, steps)) < 0.7
        for t in range(steps):
            presence[draws.permutation(sites)[:2], t] = True
        shape = (sites, steps, steps)
        kind = draws.integers(3)
        used = np.ones(shape) if kind == 0 else draws.random(shape) < 0.5
        if kind == 1:
            used = np.broadcast_to(presence[:, None, :], shape)
        yield band_of(width, float(draws.choice([0.0, 0.9]))), presence, used


def test_whoever_drops_out_a_unit_pays_at_most_its_draws():
    worst = 0.0
    for band, presence, used in histories(400, 1):
        matrix = sums(band, presence, used, np.ones(presence.shape[1]))
        for j in range(min(band.steps, presence.shape[1])):
            steps = list(range(j, presence.shape[1], band.steps))
            claim = sum(band.norm**2 / presence[:, t].sum() for t in steps)
            worst = max(worst, cost(matrix, steps) / claim)
    assert 0.9 < worst <= 1 + 1e-9


def test_a_paused_clock_breaks_the_claim():
    worst = 0.0
    for band, presence, used in histories(400, 2):
        matrix = sums(band, presence, used, np.ones(presence.shape[1]), paused=True)
        for j in range(min(band.steps, presence.shape[1])):
            steps = list(range(j, presence.shape[1], band.steps))
            claim = sum(band.norm**2 / presence[:, t].sum() for t in steps)
            worst = max(worst, cost(matrix, steps) / claim)
    assert worst > 1.05


def test_a_smaller_share_in_a_later_step_breaks_the_claim():
    presence, band = np.ones((2, 4), bool), band_of(3, 0.0)
    matrix = sums(band, presence, np.ones((2, 4, 4)), np.array([1.0, 0.5, 0.5, 0.5]))
    # The unit is drawn in step 0 alone, when the deviation is still the full one.
    assert cost(matrix, [0]) > 1.3 * band.norm**2 / 2


def test_known_covariances():
    """T = b = m = 2 and c_1 = 1/2, with and without drop-outs."""
    ones = np.ones((3, 2, 2))
    for presence, used, expected in [
        ([[1, 1], [1, 1], [0, 0]], ones, [0.625, 0.5]),
        ([[1, 0], [1, 1], [0, 1]], ones, [10 / 19, 8 / 19]),
        ([[1, 0], [1, 1], [0, 1]], np.array([[[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]), [9 / 17, 8 / 17]),
    ]:
        matrix = sums(HALF, np.array(presence, bool), used, np.ones(2))
        assert np.diag(np.linalg.inv(matrix @ matrix.T)) == pytest.approx(expected, abs=1e-12)
    both = sums(HALF, np.ones((2, 2), bool), ones[:2], np.ones(2))
    assert cost(both, [0, 1]) == pytest.approx(1.625)  # a unit that is not separated pays more than its two draws


# --- integers ----------------------------------------------------------------------------------------------------


def test_compensation_is_exact():
    band = band_of(9, 0.9)
    draws = np.random.default_rng(3)
    past = {lag: draws.integers(-(2**50), 2**50, 40) for lag in (1, 2, 5, 8)}
    past[5][:2] = 2**62, -(2**62)
    for number, got in enumerate(band.compensation(past, 40)):
        weighted = sum(
            Fraction(band.coefficients[lag - 1], UNIT) * min(max(int(noise[number]), -(2**44)), 2**44)
            for lag, noise in past.items()
        )
        assert got == math.floor(weighted + Fraction(1, 2))
    assert not band.compensation({}, 3).any()


def test_compensation_never_overflows():
    for band in (band_of(16, 0.9), band_of(MOST_STEPS, 0.0)):
        past = {lag: np.full(2, 2**62) for lag in range(1, band.steps)}
        assert band.compensation(past, 2)[0] == math.floor(
            Fraction(sum(band.coefficients) * 2**44, UNIT) + Fraction(1, 2)
        )


def test_memory_of_another_step_or_size_is_refused():
    for past in ({2: np.zeros(3, np.int64)}, {0: np.zeros(3, np.int64)}, {1: np.zeros(4, np.int64)}, {1: np.zeros(3)}):
        with pytest.raises(StateError, match="the noise of an earlier step"):
            HALF.compensation(past, 3)
