"""Noise is the Gaussian it is accounted as and hides low bits; sampling is Poisson; no stream knows another.

Seeded streams make the statistics repeatable; one slow test looks at streams that the operating system keys,
with bounds that honest randomness crosses once in 10^9 runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from privet.client.rounds.site import RealSite, Site
from privet.client.site import SiteConfig
from privet.client.training.dp import draw_rows, draw_units
from privet.common.errors import StateError
from privet.common.privacy.noise import (
    _CELLS,
    _ENTRIES,
    LATTICE,
    SAMPLER_DISTANCE,
    SAMPLER_FACTOR,
    Randomness,
    SecretRandomness,
    SeededRandomness,
    _accepted,
    _envelope,
    cut,
    lattice_release,
    lattice_unit,
)
from privet.simulations.sites import SimulatedConfig, SimulatedSite

Array = NDArray[np.float64]

# --- what the statistics are -----------------------------------------------------------------------------


def anderson_darling(sample: Array) -> float:
    """Return A² against the standard normal; 3.857 is passed once in 100, about 20 once in 10^9 (case 0)."""
    x, n = np.sort(sample), len(sample)
    weights = 2 * np.arange(1, n + 1) - 1
    return float(-n - np.mean(weights * (stats.norm.logcdf(x) + stats.norm.logsf(x[::-1]))))


def variance_pvalue(sample: Array) -> float:
    """Return the two-sided p-value of the sum of squares, which is chi-square of n degrees of freedom."""
    below = float(stats.chi2.cdf(float(np.sum(sample**2)), len(sample)))
    return 2 * min(below, 1 - below)


def tail_pvalue(sample: Array, beyond: float) -> float:
    """Return the two-sided p-value of how many variates lie beyond so many deviations."""
    hits = int(np.sum(np.abs(sample) > beyond))
    return float(stats.binomtest(hits, len(sample), 2 * float(stats.norm.sf(beyond))).pvalue)


def worst_correlation(streams: Array) -> float:
    """Return the largest correlation of any two rows, or of their squares, in standard errors."""
    apart = ~np.eye(len(streams), dtype=bool)
    found = [np.abs(np.asarray(np.corrcoef(each))[apart]).max() for each in (streams, streams**2)]
    return float(max(found) * streams.shape[1] ** 0.5)


def inclusions(draw: Callable[[], list[int]], units: int, steps: int) -> Array:
    """Return which unit was drawn in which step, 0 or 1 [steps, units]."""
    drawn = np.zeros((steps, units))
    for row in drawn:
        row[draw()] = 1
    return drawn


def sampling_pvalues(drawn: Array, rate: float) -> dict[str, float]:
    """Return p-values of Poisson sampling: each unit's frequency, batch sizes, dependence of units and of steps."""
    steps, units = drawn.shape
    sizes = drawn.sum(axis=1)
    frequencies = (drawn.sum(axis=0) - steps * rate) / math.sqrt(steps * rate * (1 - rate))
    scaled = (drawn - rate) / math.sqrt(rate * (1 - rate))
    gram: Array = scaled.T @ scaled / math.sqrt(steps)
    pairs = gram[np.triu_indices(units, 1)]
    lagged = (scaled[1:] * scaled[:-1]).sum() / math.sqrt((steps - 1) * units)
    spread = float(stats.chi2.cdf(np.sum((sizes - units * rate) ** 2) / (units * rate * (1 - rate)), steps))
    return {
        "frequency": float(stats.chi2.sf(np.sum(frequencies**2), units)),
        "mean size": float(stats.binomtest(int(sizes.sum()), steps * units, rate).pvalue),
        "variance of sizes": 2 * min(spread, 1 - spread),
        "units": float(min(1.0, 2 * stats.norm.sf(np.abs(pairs).max()) * len(pairs))),
        "steps": float(2 * stats.norm.sf(abs(lagged))),
    }


# --- the distribution ------------------------------------------------------------------------------------


def test_variates_are_standard_normal() -> None:
    sample = SeededRandomness(1, "normal").normal(400_001)
    assert sample.shape == (400_001,)
    assert stats.kstest(sample, "norm").pvalue > 1e-2
    assert anderson_darling(sample) < 3.857
    assert variance_pvalue(sample) > 1e-2
    assert abs(sample.mean()) < 3 / len(sample) ** 0.5


def test_the_tails_are_as_heavy_as_the_normals() -> None:
    sample = np.concatenate([SeededRandomness(2, part).normal(1_000_000) for part in range(4)])
    for beyond in (3.0, 4.0, 5.0):
        assert tail_pvalue(sample, beyond) > 1e-2
    assert np.abs(sample).max() > 5


@pytest.mark.parametrize(
    ("mutate", "statistic"),
    [
        (lambda x: 1.01 * x, variance_pvalue),
        (lambda x: np.clip(x, -4, 4), lambda x: tail_pvalue(x, 4.0)),
        (lambda x: x + 0.01, lambda x: float(anderson_darling(x) < 3.857)),
        (lambda x: np.where(np.abs(x) < 0.02, 0.02, x), lambda x: float(stats.kstest(x[:100_000], "norm").pvalue)),
    ],
    ids=["too wide", "tails cut", "shifted", "a hole"],
)
def test_the_statistics_find_what_is_not_normal(
    mutate: Callable[[Array], Array], statistic: Callable[[Array], float]
) -> None:
    assert statistic(mutate(SeededRandomness(1, "normal").normal(400_001))) < 1e-2


def test_every_cell_gets_the_normals_probability() -> None:
    # Not a sample: the sampler's own tables, integrated, against scipy's distribution function.
    start, height = _envelope()
    assert len(start) == len(height) == _ENTRIES
    cells, counts = np.unique(start, return_counts=True)
    assert np.array_equal(cells, np.arange(_CELLS) << 34)
    edges = np.arange(_CELLS + 1) / 64
    masses = stats.norm.sf(edges[:-1]) - stats.norm.sf(edges[1:])
    proposed = counts / _ENTRIES
    by_cell = height[np.searchsorted(start, cells)]
    # Of the points proposed in a cell, height * exp(-x²/2) are kept: 64 * sqrt(2 pi) * mass on average.
    kept = proposed * by_cell * masses * 64 * math.sqrt(2 * math.pi)
    assert kept / kept.sum() == pytest.approx(2 * masses, rel=1e-12)
    assert kept.sum() > 0.98
    assert (by_cell * np.exp(-0.5 * edges[:-1] ** 2)).max() <= 1
    assert height[-1] == by_cell[-1]  # one entry: the factor of the envelope itself, which the tails need


def test_the_sampler_is_the_reference_in_plain_integers() -> None:
    start, height = _envelope()
    words = SeededRandomness(3, "reference").words(4000)
    expected = []
    for point, chance in zip(*(half.tolist() for half in np.split(words, 2)), strict=True):
        entry, low, sign = point >> 48, point & (2**34 - 1), point >> 34 & 1
        magnitude = Fraction(int(start[entry]) + low) + Fraction(1, 2)
        bound = height[entry] * math.exp(-float(magnitude * magnitude / 2**81))
        if Fraction(chance, 2**64) < Fraction(bound):
            expected.append(float(-magnitude if sign else magnitude))
    assert _accepted(words, no_more).tolist() == expected
    assert 0.97 < len(expected) / 2000 < 1


@pytest.mark.parametrize("entry", [0, 1, 40_000, _ENTRIES - 1])
def test_a_point_is_kept_below_its_chance_and_not_above(entry: int) -> None:
    start, height = _envelope()
    low = 2**33
    magnitude = int(start[entry]) + low + 0.5
    bound = height[entry] * math.exp(-((magnitude * LATTICE) ** 2) / 2)
    assert 0 < bound < 1 - 1e-6
    below, above = max(int(bound * (1 - 1e-9) * 2**64) - 1, 0), int(bound * (1 + 1e-9) * 2**64) + 1
    for sign in (0, 1):
        point = entry << 48 | sign << 34 | low
        for chance in {0, below}:
            kept = _accepted(np.array([point, chance], np.uint64), no_more)
            assert kept.tolist() == [-magnitude if sign else magnitude]
        for chance in (above, 2**64 - 2):
            assert _accepted(np.array([point, chance], np.uint64), no_more).tolist() == []


def no_more(count: int) -> NDArray[np.uint64]:
    raise AssertionError("words beyond two for a candidate are drawn once in 2^63 candidates")


def given_words(*words: int) -> Callable[[int], NDArray[np.uint64]]:
    """Return a source of exactly these words."""
    left = list(words)

    def more(count: int) -> NDArray[np.uint64]:
        return np.array([left.pop(0) for _ in range(count)], np.uint64)

    return more


def test_a_chance_between_two_words_is_decided_by_another_word() -> None:
    # In the last cell, points are kept with K / 2^64, K about 3: the cut at a whole number would be seen there.
    start, height = _envelope()
    entry, low = _ENTRIES - 1, 2**33
    chance = height[entry] * math.exp(-(((int(start[entry]) + low + 0.5) * LATTICE) ** 2) / 2) * 2.0**64
    whole, rest = int(chance), chance - int(chance)
    assert 1 <= whole < 10
    assert 0.01 < rest < 0.99
    point = entry << 48 | low

    def kept(word: int, *more: int) -> int:
        return len(_accepted(np.array([point, word], np.uint64), given_words(*more)))

    assert [kept(word) for word in range(whole)] == [1] * whole
    assert kept(whole, int((rest - 1e-9) * 2**64)) == 1
    assert kept(whole, int((rest + 1e-9) * 2**64)) == 0
    assert kept(whole + 1) == 0


def test_the_largest_word_proposes_a_point_of_the_tails() -> None:
    _, height = _envelope()
    for cell, low, sign in ((0, 0, 0), (17, 12345, 1), (255, 2**34 - 1, 0)):
        magnitude = ((640 + cell) << 34) + low + 0.5
        # 2^-51 M exp(-x²/2) for each point, as within 10 deviations: 2^-64 for the word, 2^-43 for the point.
        chance = float(height[-1]) * math.exp(-((magnitude * LATTICE) ** 2) / 2) * 2.0 ** (64 + 8 + 35 - 51)
        assert chance < 0.02
        words = np.array([sign << 34, 2**64 - 1], np.uint64)
        for word, expected in ((int(chance * (1 - 1e-9) * 2**64), 1), (int(chance * (1 + 1e-9) * 2**64) + 1, 0)):
            found = _accepted(words, given_words(cell << 56 | low, word))
            assert found.tolist() == [-magnitude if sign else magnitude] * expected
    assert (640 + 256) / 64 == 14


# --- its errors, for the table that is used ----------------------------------------------------------------


def deviations_of(entry: int) -> float:
    return float(_envelope()[0][entry] * LATTICE)


def test_the_factor_of_the_sampler_is_within_what_is_claimed() -> None:
    # Float64 against 60 digits, at points of every cell to 14 deviations: the chance that a candidate is kept.
    _, height = _envelope()
    rng = np.random.default_rng(0)
    cells = np.repeat(np.arange(14 * 64), 8)
    found = ((cells << 34) + rng.integers(0, 1 << 34, len(cells))).astype(np.float64) + 0.5
    square = found * found
    square *= -0.5 * LATTICE**2
    computed = np.exp(square)
    with mpmath.workdps(60):
        for value, got in zip(found.tolist(), computed.tolist(), strict=True):
            exact = mpmath.exp(-(mpmath.mpf(value) ** 2) / mpmath.mpf(2) ** 81)
            assert abs(mpmath.mpf(got) / exact - 1) < (98 + 8) * 2.0**-53
    # That, and the roundings of height, product and comparison, and of the sum of all, which lies where x is small.
    assert SAMPLER_FACTOR / 2.0**-53 > (98 + 8 + 3) + (0.5 + 8 + 3)
    assert (height > 0).all()


def test_the_distance_of_the_sampler_is_within_what_is_claimed() -> None:
    _, height = _envelope()
    accepted = float(height[-1]) * 2.0**-51 * 2.0**40 * math.sqrt(2 * math.pi)
    assert accepted == pytest.approx(0.986, abs=1e-3)
    # One word too many of 2^64, and that in one candidate of 2^64: for what two words leave open, and for the tails.
    undecided = 2 * 2.0**-128 / accepted
    beyond = float(mpmath.erfc(mpmath.mpf(14) / mpmath.sqrt(2)))
    assert undecided + beyond < SAMPLER_DISTANCE


def test_one_word_alone_would_be_off_by_far_more() -> None:
    # What a single comparison does: the chance K is rounded up to whole words. Exact sums over points of each cell.
    start, height = _envelope()
    total = 0.0
    with mpmath.workdps(40):
        for entry in range(_ENTRIES - 300, _ENTRIES):
            points = [float(start[entry]) + 2**34 * (part + 0.5) / 64 for part in range(64)]
            chances = [float(height[entry]) * mpmath.exp(-(mpmath.mpf(x) ** 2) / 2**81) * 2**64 for x in points]
            total += float(sum(mpmath.ceil(chance) - chance for chance in chances)) / 64 * 2.0**-64 / _ENTRIES
    assert 1e-22 < total < 2e-22
    assert total > 2.0**50 * SAMPLER_DISTANCE
    # In the last cell a point is more likely by so much than it should be.
    last = float(height[-1]) * math.exp(-0.5 * deviations_of(_ENTRIES - 1) ** 2) * 2**64
    assert math.ceil(last) / last > 1.01


def test_variates_lie_on_the_lattice_and_their_low_bits_are_even() -> None:
    points = SeededRandomness(4, "lattice").lattice_normal(200_000)
    assert np.array_equal(points * 2 % 2, np.ones(len(points)))
    assert np.abs(points).max() <= 10 * 2**40
    for shift in (0, 8, 16, 24):
        low = ((np.abs(points).astype(np.int64) >> shift) & 255).astype(int)
        assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-3
    assert stats.binomtest(int((points > 0).sum()), len(points)).pvalue > 1e-3


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 16_384, 50_001])
def test_as_many_variates_come_as_were_asked_for(count: int) -> None:
    stream = SeededRandomness(5, "count")
    found = stream.normal(count)
    assert found.shape == (count,)
    assert len(set(found.tolist())) == count
    assert np.array_equal(found, SeededRandomness(5, "count").normal(count))
    assert not set(stream.normal(count).tolist()) & set(found.tolist())


def test_known_variates() -> None:
    # Fixed once: a change of these changes every seeded simulation.
    found = SeededRandomness(42, "noise").lattice_normal(3)
    assert found.tolist() == [-138510065155.5, -13897019660.5, 621287425222.5]


# --- independence ----------------------------------------------------------------------------------------


def site(name: str, seed: int | None) -> Site:
    if seed is None:
        return RealSite(SiteConfig(name=name, train=(Path("nowhere.csv"),)))
    return SimulatedSite(SimulatedConfig(name=name, train=(Path("nowhere.csv"),), reproducible_seed=seed))


def streams_of_sites(seed: int | None) -> list[Randomness]:
    """Return the streams of two sites, two rounds and every purpose, as sites derive them."""
    purposes = ("noise", "sampling", "validation-noise", "secagg")
    sites = [site(name, seed) for name in ("north", "south")]
    return [each.randomness(number, purpose) for each in sites for number in (1, 2) for purpose in purposes]


def test_steps_sites_rounds_and_purposes_do_not_know_each_other() -> None:
    per_step, steps = 5000, 4
    streams = [*streams_of_sites(7), *streams_of_sites(8)]
    rows = np.stack([stream.normal(per_step) for stream in streams for _ in range(steps)])
    assert rows.shape == (2 * 2 * 2 * 4 * steps, per_step)
    pairs = len(rows) * (len(rows) - 1)
    assert 2 * stats.norm.sf(worst_correlation(rows)) * pairs > 1e-2
    # Nor one of them a shifted copy of another.
    sums = np.abs(np.fft.irfft(np.conj(np.fft.rfft(rows[0])) * np.fft.rfft(rows[1:]), per_step))
    assert 2 * stats.norm.sf(sums.max() / per_step**0.5) * sums.size > 1e-2


def test_a_stream_used_twice_would_be_found() -> None:
    rows = np.stack([site("north", 7).randomness(1, "noise").normal(5000) for _ in range(2)])
    assert worst_correlation(rows) > 50


@pytest.mark.parametrize("seed", [7, None])
def test_no_word_comes_twice(seed: int | None) -> None:
    # Of 320,000 words of 64 bits, two are equal by chance with a probability of 3e-9.
    words = np.concatenate([stream.words(20_000) for stream in streams_of_sites(seed)])
    assert len(np.unique(words)) == len(words)


def test_a_site_without_a_seed_draws_from_the_operating_system() -> None:
    assert all(isinstance(stream, SecretRandomness) for stream in streams_of_sites(None))
    assert all(isinstance(stream, SeededRandomness) for stream in streams_of_sites(7))
    first, again = (np.stack([s.normal(4) for s in streams_of_sites(None)]) for _ in range(2))
    assert not set(first.ravel().tolist()) & set(again.ravel().tolist())


# --- releases --------------------------------------------------------------------------------------------

VALUES = arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e3, 1e3))
POINTS = arrays(np.int64, st.integers(1, 20), elements=st.integers(-(2**60) + 1, 2**60 - 1))
DEVIATIONS = st.floats(1e-3, 1e4)  # so that a value has fewer than 2^60 units


@settings(max_examples=40)
@given(POINTS, DEVIATIONS)
def test_a_release_is_the_exact_sum_of_points_and_noise_times_the_unit(
    points: NDArray[np.int64], deviation: float
) -> None:
    unit = lattice_unit(deviation)
    found = lattice_release(points, unit, SeededRandomness(1))
    halves = SeededRandomness(1).lattice_normal(len(points))
    # Python's integers do not overflow, and its conversion rounds correctly.
    exact = [2 * point + int(2 * half) for point, half in zip(points.tolist(), halves.tolist(), strict=True)]
    assert found.tolist() == [float(whole) * (unit / 2) for whole in exact]


@settings(max_examples=40)
@given(VALUES, DEVIATIONS)
def test_a_release_depends_on_the_cut_values_alone(values: Array, deviation: float) -> None:
    unit = lattice_unit(deviation)
    found = lattice_release(cut(values, unit), unit, SeededRandomness(1))
    # Any other values in the same cells are released as the very same numbers.
    other = (np.abs(cut(values, unit)) + np.linspace(0.01, 0.99, len(values))) * np.copysign(unit, values)
    if np.array_equal(cut(other, unit), cut(values, unit)):
        assert np.array_equal(lattice_release(cut(other, unit), unit, SeededRandomness(1)), found)


def multiples(outputs: Array, unit: float) -> bool:
    """Whether all outputs are float64's nearest to odd multiples of half a unit."""
    halves = np.rint(2 * outputs / unit)
    return bool(np.array_equal(halves / 2 * unit, outputs) and np.all(halves % 2 == 1))


def test_low_bits_of_a_release_do_not_tell_the_value() -> None:
    deviation, count = 0.7, 20_000
    zeros, ones = np.zeros(count), np.full(count, 1 + 2.0**-50)
    # Plain floating-point noise: around 0 it has digits that nothing near 1 has (Mironov 2012).
    noise = deviation * np.random.default_rng(0).standard_normal(count)
    fine = [np.mean(2.0**53 * sums % 1 != 0) for sums in (zeros + noise, ones + noise)]
    assert fine[0] > 0.3
    assert fine[1] < 0.3
    unit = lattice_unit(deviation)
    for values in (zeros, ones):
        released = lattice_release(cut(values, unit), unit, SeededRandomness(9, "low bits"))
        assert multiples(released, unit)


@settings(max_examples=60)
@given(VALUES, DEVIATIONS)
def test_cutting_goes_towards_zero_by_less_than_a_unit(values: Array, deviation: float) -> None:
    unit = lattice_unit(deviation)
    for value, point in zip(values.tolist(), cut(values, unit).tolist(), strict=True):
        # Exactly: a quotient that floating point rounds up to a whole number would be one point too far.
        exact, slack = Fraction(value) / Fraction(unit), 1 + Fraction(1, 2**51)
        assert abs(point) <= abs(exact)
        assert abs(exact) < (abs(point) + 1) * slack
        assert point == 0 or (point > 0) == (value > 0)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 10.0]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_one_unit_moves_a_release_by_its_own_term_and_no_more(units: int, seed: int, z: float, c: float) -> None:
    rng, unit = np.random.default_rng(seed), lattice_unit(z * c)
    gradients = rng.normal(size=(units, 50))
    clipped = gradients * (c * (1 - 1e-6) / np.linalg.norm(gradients, axis=1, keepdims=True))
    terms = cut(clipped, unit)
    order = rng.permutation(units)
    assert np.array_equal(terms[order].cumsum(axis=0)[-1], terms.sum(axis=0))
    moved = terms.sum(axis=0) - terms[1:].sum(axis=0)
    assert np.array_equal(moved, terms[0])
    # Exactly: the squared norm in units, against C in units.
    assert sum(point**2 for point in moved.tolist()) * Fraction(unit) ** 2 <= Fraction(c) ** 2
    having, without = (
        lattice_release(total, unit, SeededRandomness(2)) for total in (terms.sum(axis=0), terms[1:].sum(axis=0))
    )
    assert np.array_equal(np.rint(having / (unit / 2)) - np.rint(without / (unit / 2)), 2 * moved)


def test_adding_before_cutting_would_let_others_change_a_term() -> None:
    # What this design avoids: float64 rounds the sum of all units, so one unit moves it by less or more than its term.
    others = np.array([2.0**52, 2.0**52 + 1])
    assert (others + 0.5 - others).tolist() == [0.0, 1.0]


def test_releases_are_the_values_plus_noise_of_the_deviation_asked_for() -> None:
    values = np.linspace(-1e3, 1e3, 100_000).astype(np.float32).reshape(100, 1000)
    unit = lattice_unit(0.25)
    found = lattice_release(cut(values, unit), unit, SeededRandomness(6, "release"))
    assert found.dtype == np.float64
    assert found.shape == values.shape
    noise = ((found - values.astype(np.float64)) / 0.25).ravel()
    assert stats.kstest(noise, "norm").pvalue > 1e-2
    assert variance_pvalue(noise) > 1e-3
    assert abs(np.corrcoef(noise, values.ravel())[0, 1]) < 4 / len(noise) ** 0.5


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-310])
def test_no_lattice_is_given_without_noise(deviation: float) -> None:
    with pytest.raises(StateError, match="deviation of the noise must be finite"):
        lattice_unit(deviation)


# --- Poisson sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "rate", "steps"), [(60, 0.03, 6000), (40, 0.5, 3000), (300, 0.05, 4000)])
def test_sampling_is_poisson(units: int, rate: float, steps: int) -> None:
    stream = SeededRandomness(11, "sampling", units)
    found = sampling_pvalues(inclusions(lambda: draw_units(units, rate, stream), units, steps), rate)
    assert min(found.values()) > 1e-3, found


def test_the_statistics_find_what_is_not_poisson() -> None:
    units, rate, steps = 60, 0.1, 4000
    stream, rng = SeededRandomness(12, "sampling"), np.random.default_rng(0)
    once = draw_units(units, rate, stream)
    samplers: dict[str, Callable[[], list[int]]] = {
        "variance of sizes": lambda: rng.permutation(units)[:6].tolist(),  # shuffled batches
        "frequency": lambda: sorted({0, *draw_units(units, rate, stream)}),  # a favourite
        "steps": lambda: once,
        "units": lambda: [2 * pair + i for pair in draw_units(units // 2, rate, stream) for i in (0, 1)],
        "mean size": lambda: draw_units(units, 1.05 * rate, stream),
    }
    for statistic, draw in samplers.items():
        assert sampling_pvalues(inclusions(draw, units, steps), rate)[statistic] < 1e-6


def test_the_rows_of_a_unit_are_drawn_alike() -> None:
    stream, rows, most, times = SeededRandomness(13, "rows"), [3, 5, 8, 13, 21, 34, 55], 3, 4000
    drawn = [draw_rows(rows, most, stream) for _ in range(times)]
    assert all(each == sorted(set(each)) and len(each) == most for each in drawn)
    subsets = {tuple(each): 0 for each in drawn}
    for each in drawn:
        subsets[tuple(each)] += 1
    assert len(subsets) == math.comb(len(rows), most)
    assert stats.chisquare(list(subsets.values())).pvalue > 1e-2


# --- what a site really uses -----------------------------------------------------------------------------


@pytest.mark.slow
def test_streams_of_the_operating_system_pass_too() -> None:
    sample = SecretRandomness().normal(4_000_000)
    assert stats.kstest(sample, "norm").pvalue > 1e-9
    assert anderson_darling(sample) < 25
    assert variance_pvalue(sample) > 1e-9
    assert min(tail_pvalue(sample, beyond) for beyond in (3.0, 4.0, 5.0)) > 1e-9
    rows = np.stack([stream.normal(100_000) for stream in streams_of_sites(None)])
    assert 2 * stats.norm.sf(worst_correlation(rows)) * len(rows) ** 2 > 1e-9
    stream = SecretRandomness()
    found: dict[str, Any] = sampling_pvalues(inclusions(lambda: draw_units(60, 0.05, stream), 60, 20_000), 0.05)
    assert min(found.values()) > 1e-9, found
