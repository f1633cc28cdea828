"""Shared noise: the sum of rounded shares is the Gaussian that is accounted, at every admitted drop-out; never less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from privet.common.errors import ProtocolError, StateError, StudyError
from privet.common.privacy.accounting import PrivacyEvent, epsilon
from privet.common.privacy.noise import SeededRandomness, cut
from privet.common.privacy.shared_noise import (
    LEAST_LEVEL_BITS,
    Integers,
    SharedNoise,
    approximation_error,
    contribute,
    level_bits,
    pack_lanes,
    rescale,
    unpack_lanes,
)
from privet.common.secagg.quantize import WORD, lane_bits

Array = NDArray[np.float64]
NINE = SharedNoise(survivors=8, corrupt=1, noise_multiplier=0.8, clip_norm=0.5, level_bits=4)


def share_of(points: Integers, shares: SharedNoise, *purpose: str | int) -> Integers:
    return contribute(points, shares, SeededRandomness(1, *purpose))


# --- a share ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8, 12])
def test_a_share_is_the_reference_in_exact_arithmetic(bits: int) -> None:
    shares = SharedNoise(5, 1, 1.3, 0.7, bits)
    points = cut(np.random.default_rng(bits).normal(scale=3.0, size=500), shares.lattice)
    noise = SeededRandomness(1, "reference").lattice_normal(500)
    cell = Fraction(2 ** (40 - bits))
    expected = [
        math.floor((Fraction(point) + Fraction(h)) / cell + Fraction(1, 2))
        for point, h in zip(points.tolist(), noise.tolist(), strict=True)
    ]
    before = points.copy()
    assert share_of(points, shares, "reference").tolist() == expected
    assert np.array_equal(points, before)


POINTS = arrays(np.int64, 20, elements=st.integers(-(2**50), 2**50))


@settings(max_examples=30)
@given(POINTS, st.floats(0.3, 50), st.integers(3, 12), st.integers(-1000, 1000))
def test_points_a_whole_level_apart_have_shares_one_apart(points: Integers, z: float, bits: int, levels: int) -> None:
    # So the noise is rounded to levels around the points themselves: nothing else enters.
    shares = SharedNoise(6, 2, z, 1.0, bits)
    assert math.isclose(shares.lattice * 2 ** (40 - bits), shares.level, rel_tol=1e-15)
    moved = share_of(points + (levels << (40 - bits)), shares)
    assert np.array_equal(moved, share_of(points, shares) + levels)


@settings(max_examples=40)
@given(
    arrays(np.float64, (5, 30), elements=st.floats(-1e4, 1e4)),
    arrays(np.float64, 30, elements=st.floats(-1, 1)),
    st.floats(0.3, 50),
)
def test_one_unit_moves_the_lattice_points_by_its_clip_norm(others: Array, gradient: Array, z: float) -> None:
    # Rounding to levels comes after the noise, and terms are added as integers, so nothing adds to the sensitivity.
    shares = SharedNoise(8, 1, z, 1.0, 4)
    clipped = gradient * (1 - 1e-6) / max(1.0, float(np.linalg.norm(gradient)))
    without = cut(others, shares.lattice).sum(axis=0)
    moved = cut(np.vstack([clipped, others]), shares.lattice).sum(axis=0) - without
    assert np.array_equal(moved, cut(clipped, shares.lattice))
    length = sum(point**2 for point in moved.tolist()) * Fraction(shares.lattice) ** 2
    assert length <= Fraction(shares.clip_norm) ** 2


def test_rounding_the_values_first_would_cost_sensitivity() -> None:
    # What this design avoids: on levels of s / 16, 40,000 values of one unit can move by 50 clip norms more.
    shares = SharedNoise(8, 1, 0.8, 1.0, 4)
    values = np.full(40_000, 0.5 * shares.level)
    step = np.full(40_000, 1e-9)
    moved = np.rint((values + step) / shares.level) - np.rint((values - step) / shares.level)
    assert float(np.linalg.norm(moved)) * shares.level > 3 * shares.clip_norm


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5, 0.83])
def test_a_shares_probabilities_are_a_rounded_gaussians(offset: float) -> None:
    shares = SharedNoise(3, 1, 1.0, 1.0, 3)
    sample = share_of(cut(np.full(200_000, offset * shares.level), shares.lattice), shares, "cells")
    edges = np.arange(-26, 27)
    expected = np.diff(stats.norm.cdf((edges - 0.5 - offset) / 8))
    found = np.histogram(sample, edges - 0.5)[0]
    rest = len(sample) - found.sum()
    assert stats.chisquare([*found, rest], np.array([*expected, 1 - expected.sum()]) * len(sample)).pvalue > 1e-3


def test_points_beyond_all_reach_are_cut_before_the_noise_and_nothing_wraps() -> None:
    found = share_of(np.array([2**63 - 1, -(2**63), 0]), NINE)
    again = share_of(np.array([2**60, -(2**60), 0]), NINE)
    assert np.array_equal(found, again)
    assert found[0] > 2**23 > -(2**23) > found[1]


# --- the sum ---------------------------------------------------------------------------------------------


def cells(centre: float, deviation: float, reach: int) -> Array:
    """Return P(floor(centre + N(0, deviation²) + 1/2) = k) for k from -reach to reach."""
    k = np.arange(-reach, reach + 1)
    below, above = (k - 0.5 - centre) / deviation, (k + 0.5 - centre) / deviation
    # Whichever tail is the shorter, so that small probabilities keep their digits.
    tails = stats.norm.sf(below) - stats.norm.sf(above), stats.norm.cdf(above) - stats.norm.cdf(below)
    return np.asarray(np.where(k > centre, *tails))


def sum_of_shares(centres: Sequence[float], deviation: float) -> Array:
    """Return the probabilities of the sum of rounded shares, by convolution."""
    reach = math.ceil(13 * deviation) + 2
    return reduce(np.convolve, [cells(centre, deviation, reach) for centre in centres])


def rounded_gaussian(centre: float, deviation: float, helpers: int, size: int) -> Array:
    """Return the density of N(centre, m s²) plus m uniforms on [-1/2, 1/2) at the integers, by its Fourier integral."""
    k = np.arange(size) - size // 2
    spread = deviation * math.sqrt(helpers)
    theta = np.linspace(-14 / spread, 14 / spread, 4001)
    transform = np.exp(-((spread * theta) ** 2) / 2) * np.sinc(theta / (2 * math.pi)) ** helpers
    return np.asarray((np.cos(np.outer(k - centre, theta)) @ transform) * (theta[1] - theta[0]) / (2 * math.pi))


@pytest.mark.parametrize("deviation", [1.0, 1.3, 1.6])
@pytest.mark.parametrize("helpers", [2, 3, 5])
def test_the_sum_of_rounded_shares_is_a_rounded_gaussian_as_closely_as_stated(deviation: float, helpers: int) -> None:
    for seed in range(3):
        centres = np.random.default_rng(seed).uniform(-0.5, 0.5, helpers)
        found = sum_of_shares(centres.tolist(), deviation)
        expected = rounded_gaussian(float(centres.sum()), deviation, helpers, len(found))
        distance = 0.5 * float(np.abs(found - expected).sum())
        assert distance <= math.exp(approximation_error(deviation, helpers)) + 1e-14
        assert not (deviation == 1.0 and helpers == 2) or distance > 1e-8  # there is something to bound


def test_on_the_coarsest_lattice_allowed_the_difference_is_nothing() -> None:
    # For 10^12 numbers (a million values, a million steps) and the largest cohort that masking takes.
    for helpers in (2, 10, 100, 4096):
        assert approximation_error(2.0**LEAST_LEVEL_BITS, helpers) / math.log(10) < -260
    # Finer lattices are closer still.
    assert approximation_error(16.0, 100) < approximation_error(8.0, 100)


def hockey_stick(p: Array, q: Array, eps: float) -> float:
    return float(np.maximum(p - math.exp(eps) * q, 0).sum())


@pytest.mark.parametrize(("helpers", "z"), [(2, 1.0), (3, 0.6), (7, 2.0)])
def test_one_release_costs_no_more_than_the_gaussian(helpers: int, z: float) -> None:
    # By brute force on the coarsest lattice, knowing neither the lemma nor an accountant.
    deviation = 2.0**LEAST_LEVEL_BITS
    moved = math.sqrt(helpers) * deviation / z
    for seed in range(4):
        centres = np.random.default_rng(seed).uniform(-0.5, 0.5, helpers)
        near, far = centres.copy(), centres.copy()
        near[0], far[0] = near[0] - moved / 2, far[0] + moved / 2
        p, q = (sum_of_shares(each.tolist(), deviation) for each in (near, far))
        for eps in (0.1, 0.5, 1.0, 3.0):
            exact = float(stats.norm.cdf(0.5 / z - eps * z) - math.exp(eps) * stats.norm.cdf(-0.5 / z - eps * z))
            assert max(hockey_stick(p, q, eps), hockey_stick(q, p, eps)) <= exact + 1e-12
            # And hardly less: the rounding is the only thing given away.
            assert hockey_stick(p, q, eps) >= 0.95 * exact


@pytest.mark.slow
@pytest.mark.parametrize(("helpers", "z", "rate", "steps"), [(2, 1.0, 0.05, 20), (7, 0.8, 1 / 27, 40)])
def test_sampled_steps_cost_what_the_accountant_says(helpers: int, z: float, rate: float, steps: int) -> None:
    deviation, delta = 2.0**LEAST_LEVEL_BITS, 1e-5
    centres = np.random.default_rng(5).uniform(-0.5, 0.5, helpers)
    there = centres + np.eye(helpers)[0] * math.sqrt(helpers) * deviation / z
    without, having = (sum_of_shares(each.tolist(), deviation) for each in (centres, there))
    mixed = (1 - rate) * without + rate * having
    kept = np.minimum(without, mixed) > 1e-30
    masses = [dict(enumerate(np.log(each[kept]).tolist())) for each in (without, mixed)]
    found = []
    for lower, upper in (masses, masses[::-1]):
        loss = from_two_probability_mass_functions(lower, upper, value_discretization_interval=1e-4)
        found.append(float(loss.self_compose(steps).get_epsilon_for_delta(delta)))
    stated = epsilon([PrivacyEvent(z, rate, steps, "record")], delta)
    assert max(found) <= stated
    assert max(found) >= 0.97 * stated - 0.02


def samples(shares: SharedNoise, present: int, size: int) -> Array:
    """Return the noise of a released sum over `present` sites, of which `corrupt` add nothing."""
    values = [np.random.default_rng(site).normal(size=size) for site in range(present)]
    honest = [cut(value, shares.lattice) for value in values[: present - shares.corrupt]]
    parts = [share_of(points, shares, "sum", site) for site, points in enumerate(honest)]
    level = shares.level
    silent = [np.rint(value / level).astype(np.int64) for value in values[present - shares.corrupt :]]
    released = rescale(np.sum([*parts, *silent], axis=0), shares)
    return np.asarray(released - np.sum(values, axis=0))


@pytest.mark.parametrize("present", [8, 9, 10, 12])
@pytest.mark.parametrize("bits", [3, 6])
def test_the_released_sum_has_the_variance_accounted_for_at_every_drop_out(present: int, bits: int) -> None:
    size = 60_000
    shares = SharedNoise(8, 2, 0.9, 0.5, bits)
    noise = samples(shares, present, size)
    expected = shares.effective_multiplier(present) * shares.clip_norm
    # Rounding, once per site, is beside the noise that is accounted.
    total = expected**2 + present * shares.level**2 / 12
    spread = float(np.sum(noise**2)) / total
    assert 2 * min(stats.chi2.cdf(spread, size), stats.chi2.sf(spread, size)) > 1e-3
    assert abs(float(noise.mean())) < 4 * math.sqrt(total / size)
    assert stats.kstest(noise / math.sqrt(total), "norm").pvalue > 1e-3
    # Never less than what is accounted: z C, with the fewest sites and all corrupt ones silent.
    assert expected >= shares.noise_multiplier * shares.clip_norm * (1 - 1e-12)
    assert stats.chi2.cdf(float(np.sum(noise**2)) / (shares.noise_multiplier * shares.clip_norm) ** 2, size) > 1e-3
    assert (present == 8) == math.isclose(expected, 0.45)


@settings(max_examples=60)
@given(st.integers(3, 200), st.integers(0, 60), st.floats(0.3, 20), st.data())
def test_any_admitted_sites_add_up_to_the_noise_accounted(
    survivors: int, corrupt: int, z: float, data: st.DataObject
) -> None:
    if survivors - corrupt < 2:
        with pytest.raises(StudyError, match="two honest sites"):
            SharedNoise(survivors, corrupt, z, 1.0, 4)
        return
    shares = SharedNoise(survivors, corrupt, z, 1.0, 4)
    present = data.draw(st.integers(survivors, survivors + 50))
    honest = present - corrupt
    assert honest * shares.deviation**2 >= z**2 * (1 - 1e-12)
    assert shares.effective_multiplier(present) >= z * (1 - 1e-12)
    assert math.isclose(shares.own_multiplier, shares.deviation)


# --- lanes -----------------------------------------------------------------------------------------------

LANES = st.sampled_from([16, 21, 32])


@settings(max_examples=60)
@given(st.integers(1, 40), LANES, st.integers(1, 9), st.integers(0, 2**32))
def test_sums_of_words_are_the_words_of_sums(count: int, lane: int, sites: int, seed: int) -> None:
    # Whatever the integers' size: what the coordinator sees is a function of their sums alone.
    parts = np.random.default_rng(seed).integers(-(2**60), 2**60, (sites, count))
    words = np.add.reduce([pack_lanes(part, lane) for part in parts])
    assert np.array_equal(words, pack_lanes(parts.sum(axis=0), lane))


@settings(max_examples=60)
@given(st.integers(1, 100), LANES, st.integers(1, 9), st.integers(0, 2**32))
def test_sums_within_the_lanes_come_back(count: int, lane: int, sites: int, seed: int) -> None:
    half = 2 ** (lane - 1) // sites
    parts = np.random.default_rng(seed).integers(-half, half, (sites, count))
    parts[:, 0] = -half
    words = np.add.reduce([pack_lanes(part, lane) for part in parts])
    assert len(words) == -(-count // (64 // lane))
    assert np.array_equal(unpack_lanes(words, count, lane), parts.sum(axis=0))


def test_a_sum_of_another_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="must have 4 words"):
        unpack_lanes(np.zeros(5, WORD), 12, 21)


@settings(max_examples=60)
@given(LANES, st.integers(3, 500), st.floats(0.3, 10), st.floats(1, 1e5))
def test_no_lane_overflows_whatever_the_gradients(lane: int, sites: int, z: float, units: float) -> None:
    helpers = max(2, sites - sites // 10 - 1)
    bits = level_bits(lane, sites, helpers, z, units)
    if bits < LEAST_LEVEL_BITS:
        return
    shares = SharedNoise(helpers, 0, z, 1.0, bits)
    aligned = units * shares.clip_norm / shares.level
    noise = 12 * math.sqrt(sites) * 2.0**bits
    assert LEAST_LEVEL_BITS <= bits <= 12
    assert aligned + noise <= 2.0 ** (lane - 1)


@pytest.mark.parametrize(("bits", "sites"), [(14, 3), (14, 100), (16, 9), (16, 30)])
def test_fourteen_bits_to_a_site_carry_a_step(bits: int, sites: int) -> None:
    lane = lane_bits(bits, sites)
    assert level_bits(lane, sites, sites - 2 if sites < 10 else sites * 8 // 10, 0.7, 400.0) >= LEAST_LEVEL_BITS


def test_terms_without_noise_are_refused() -> None:
    for z in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises((StateError, StudyError)):
            SharedNoise(5, 1, z, 1.0, 4)
    with pytest.raises(StudyError, match="standard deviation of a site's noise must take 3 to 12 bits"):
        SharedNoise(5, 1, 1.0, 1.0, 2)
