"""Correlated noise: the claims of `docs/correlated-noise.md`, each with a broken mechanism that fails it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from scipy.special import ndtr

from privet.common.errors import StateError, StudyError
from privet.common.masking.groups import corrupt_sites, quorums_meet, survivors_of
from privet.common.masking.noise_shares import least_helpers, shared_noise
from privet.common.privacy.accounting import PrivacyEvent, plan
from privet.common.privacy.correlated import Band, band_of
from privet.common.privacy.noise import Randomness, SeededRandomness
from privet.common.privacy.shared_noise import SharedNoise, approximation_error, contribute_correlated
from privet.common.secagg.graph import quorum
from privet.common.study.sections import MOST_BAND
from privet.common.study.study import Study
from tests.support.masked_world import masked_study, sharing_study

Array = NDArray[Any]
HALF = Band((1 << 13,))
UNIT = 1 << 14


def encoder(band: Band, steps: int) -> Array:
    """Return the lower triangular band [T, T] in float64."""
    found = np.eye(steps)
    for lag, value in enumerate(band.coefficients, 1):
        found += value / UNIT * np.eye(steps, k=-lag)
    return found


# --- the band ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "momentum"), [(2, 0.0), (5, 0.0), (4, 0.9), (8, 0.5)])
def test_the_band_squared_is_the_sum_of_steps(steps: int, momentum: float) -> None:
    band = band_of(steps, momentum)
    root = np.array([1.0, *(value / UNIT for value in band.coefficients)])
    squared = np.convolve(root, root)[:steps]
    workload = np.convolve(np.ones(steps), momentum ** np.arange(steps))[:steps]
    assert np.abs(squared - workload).max() < steps * 2.0**-14
    assert list(root) == sorted(root, reverse=True)  # its inverse stays bounded (Eneström and Kakeya)


def test_the_norm_is_rounded_up() -> None:
    for band in (HALF, band_of(7, 0.9), band_of(31, 0.0)):
        exact = 1 + sum(Fraction(value, UNIT) ** 2 for value in band.coefficients)
        assert exact <= Fraction(band.norm) ** 2 <= exact * (1 + Fraction(1, 2**45))


def test_the_spread_is_that_of_the_inverse() -> None:
    for band in (HALF, band_of(6, 0.9)):
        inverse = np.linalg.inv(encoder(band, 20))
        assert band.spread(20) == pytest.approx(np.linalg.norm(inverse[-1]), rel=1e-12)


def test_bands_that_do_not_fit_are_refused() -> None:
    for steps in (1, MOST_BAND + 1):
        with pytest.raises(StudyError, match="expected 2 to 64 steps"):
            band_of(steps, 0.0)
    with pytest.raises(StudyError, match="more than integers of 64 bits hold"):
        band_of(MOST_BAND, 0.999)


def test_rounding_beyond_the_margin_is_refused() -> None:
    HALF.check_rounding(0.6, 30, 10**6)
    with pytest.raises(StudyError, match="more than clipping leaves room for"):
        HALF.check_rounding(30.0, 300, 10**8)


def test_classes_follow_from_a_units_own_name() -> None:
    band = band_of(4, 0.0)
    names = [f"patient-{number}" for number in range(4000)]
    classes = [band.class_of(7, name) for name in names]
    assert [band.class_of(7, name) for name in names[1:]] == classes[1:]
    assert classes != [band.class_of(8, name) for name in names]
    assert all(850 < classes.count(each) < 1150 for each in range(4))


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
def test_sensitivity_is_the_norm_of_the_band_for_each_separated_draw(band: Band) -> None:
    steps = 8
    classes = [[t for t in range(steps) if t % band.steps == j] for j in range(band.steps)]
    separated = [part for each in classes for k in range(1, len(each) + 1) for part in itertools.combinations(each, k)]
    for pattern in separated:
        assert largest_shift(band, [pattern], steps) <= band.norm * math.sqrt(len(pattern)) + 1e-12
    assert largest_shift(band, [(0, band.steps)], steps) == pytest.approx(band.norm * math.sqrt(2))
    # Steps closer than the band cost more than two draws do.
    assert largest_shift(band, [(0, 1)], steps) > 1.05 * band.norm * math.sqrt(2)


# --- covariance over drop-outs -----------------------------------------------------------------------------------


def sums(band: Band, presence: Array, used: Array, scale: Array, *, paused: bool = False) -> Array:
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


def cost(matrix: Array, steps: list[int]) -> float:
    """Return the largest mu² of a unit in `steps`, over signs of its gradients, of norm 1 each."""
    inverse = np.linalg.inv(matrix @ matrix.T)
    found = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=len(steps)):
        x = np.zeros(len(matrix))
        x[steps] = signs
        found = max(found, float(x @ inverse @ x))
    return found


def histories(count: int, seed: int) -> Iterator[tuple[Band, Array, Array]]:
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


def test_whoever_drops_out_a_unit_pays_at_most_its_draws() -> None:
    worst = 0.0
    for band, presence, used in histories(400, 1):
        matrix = sums(band, presence, used, np.ones(presence.shape[1]))
        for j in range(min(band.steps, presence.shape[1])):
            steps = list(range(j, presence.shape[1], band.steps))
            claim = sum(band.norm**2 / presence[:, t].sum() for t in steps)
            worst = max(worst, cost(matrix, steps) / claim)
    assert 0.9 < worst <= 1 + 1e-9


def test_a_paused_clock_breaks_the_claim() -> None:
    worst = 0.0
    for band, presence, used in histories(400, 2):
        matrix = sums(band, presence, used, np.ones(presence.shape[1]), paused=True)
        for j in range(min(band.steps, presence.shape[1])):
            steps = list(range(j, presence.shape[1], band.steps))
            claim = sum(band.norm**2 / presence[:, t].sum() for t in steps)
            worst = max(worst, cost(matrix, steps) / claim)
    assert worst > 1.05


def test_a_smaller_share_in_a_later_step_breaks_the_claim() -> None:
    presence, band = np.ones((2, 4), bool), band_of(3, 0.0)
    matrix = sums(band, presence, np.ones((2, 4, 4)), np.array([1.0, 0.5, 0.5, 0.5]))
    # The unit is drawn in step 0 alone, when the deviation is still the full one.
    assert cost(matrix, [0]) > 1.3 * band.norm**2 / 2


def test_known_covariances() -> None:
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


def test_compensation_is_exact() -> None:
    band = band_of(9, 0.9)
    draws = np.random.default_rng(3)
    past = {lag: draws.integers(-(2**50), 2**50, 40) for lag in (1, 2, 5, 8)}
    past[5][:2] = 2**62, -(2**62)
    for number, got in enumerate(band.compensation(past, 40)):
        products = (
            Fraction(band.coefficients[lag - 1], UNIT) * min(max(int(noise[number]), -(2**44)), 2**44)
            for lag, noise in past.items()
        )
        assert got == sum(math.floor(product + Fraction(1, 2)) for product in products)
    assert not band.compensation({}, 3).any()


def test_compensation_never_overflows() -> None:
    for band in (band_of(16, 0.9), band_of(MOST_BAND, 0.0)):
        past = {lag: np.full(2, 2**62) for lag in range(1, band.steps)}
        assert band.compensation(past, 2)[0] == sum(band.coefficients) << 30


def test_memory_of_another_step_or_size_is_refused() -> None:
    none = np.zeros(3, np.int64)
    wrong: list[dict[int, Array]] = [{2: none}, {0: none}, {1: none[:2]}, {1: np.zeros(3)}]
    for past in wrong:
        with pytest.raises(StateError, match="the noise of an earlier step"):
            HALF.compensation(past, 3)


# --- the real code -----------------------------------------------------------------------------------------------


class Given(Randomness):
    """Gives the variates that a test sets, in their order."""

    def __init__(self, *variates: Array) -> None:
        self._left = list(variates)

    def lattice_normal(self, count: int) -> Array:
        found = self._left.pop(0)
        assert found.shape == (count,)
        return found


def noise_of(band: Band, bits: int = 7, z: float = 0.8) -> SharedNoise:
    return SharedNoise(4, 1, z, 0.5, bits, band=band, least_helpers=3)


def test_a_part_is_the_reference_in_exact_arithmetic() -> None:
    shares, draws = noise_of(band_of(3, 0.9), bits=8), np.random.default_rng(4)
    points, first, fresh = (
        draws.integers(-(2**45), 2**45, 60),
        *(SeededRandomness(1).lattice_normal(120).reshape(2, 60)),
    )
    past = {1: draws.integers(-(2**41), 2**41, 60), 2: draws.integers(-(2**41), 2**41, 60)}
    part, noise = contribute_correlated(points, shares, past, Given(first, fresh))
    assert shares.band is not None
    taken = shares.band.compensation(past, 60)
    for e in range(60):
        n = math.floor(Fraction(first[e])) - int(taken[e])
        f = math.floor(Fraction(fresh[e]) / 2 ** (8 - 3))  # a Gaussian of 8 levels of 2^32 lattice points
        assert noise[e] == n
        assert part[e] == math.floor(Fraction(int(points[e]) + n + f, 2**32) + Fraction(1, 2))


def test_independent_noise_takes_no_memory() -> None:
    with pytest.raises(StateError, match="expected a study with a band"):
        contribute_correlated(np.zeros(3, np.int64), SharedNoise(4, 1, 1.0, 1.0, 8), {}, SeededRandomness(1))


def play(
    band: Band, points: Array, fresh: Array, presence: Array, used: Array
) -> tuple[list[Array], dict[tuple[int, int], Array]]:
    """Play steps of several sites on the real code. Return the sums before rounding to levels, and all noise.

    Args:
        band: The band.
        points: Sums of terms, [sites, T, d].
        fresh: Variates of the sampler, [sites, T, d].
        presence: Who is in which sum, [sites, T].
        used: a, [sites, T, T].
    """
    shares, (sites, steps, size) = noise_of(band), points.shape
    kept: dict[tuple[int, int], Array] = {}
    totals = []
    for t in range(steps):
        total = np.zeros(size, np.int64)
        for i in range(sites):
            lags = range(1, min(band.steps, t + 1))
            past = {lag: kept[i, t - lag] for lag in lags if used[i, t, t - lag] and (i, t - lag) in kept}
            still = np.zeros(size) + 0.5
            _, kept[i, t] = contribute_correlated(points[i, t], shares, past, Given(fresh[i, t], still))
            total += (points[i, t] + kept[i, t]) * presence[i, t]
        totals.append(total)
    return totals, kept


def test_a_units_term_can_be_moved_into_the_noise_without_a_trace() -> None:
    """Steps 2 and 3 of the proof, in integers, on the code that sites run: equal sums, and a shift within the bound."""
    draws, size = np.random.default_rng(5), 6
    for band, presence, used in histories(60, 6):
        sites, steps = presence.shape
        points = draws.integers(-(2**42), 2**42, (sites, steps, size))
        fresh = SeededRandomness(int(draws.integers(2**32))).lattice_normal(sites * steps * size)
        fresh = fresh.reshape(sites, steps, size)
        t = int(draws.integers(steps))
        present = np.flatnonzero(presence[:, t])
        term = draws.integers(-(2**40), 2**40, size)
        having = points.copy()
        having[present[0], t] += term
        expected, noise = play(band, having, fresh, presence, used)
        # Two honest sites carry the shift, each number within 1 of its half.
        carriers = present[:2]
        moved = fresh.copy()
        deltas = {carriers[0]: term // 2, carriers[1]: term - term // 2}
        shifts = []
        for i, delta in deltas.items():
            moved[i, t] += delta
            shifts.append(delta)
            after_it = noise[i, t] + delta
            for u in range(t + 1, min(t + band.steps, steps)):
                if used[i, u, t]:
                    with_it, without = (band.compensation({u - t: n}, size) for n in (after_it, noise[i, t]))
                    shift = with_it - without
                    moved[i, u] += shift
                    shifts.append(shift)
        found, after = play(band, points, moved, presence, used)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        assert all(np.array_equal(after[i, u], noise[i, u]) for i, u in noise if u != t)
        length = math.sqrt(sum(float(np.sum(shift.astype(float) ** 2)) for shift in shifts))
        slack = math.sqrt(2 * size) * (band.norm + math.sqrt(band.steps - 1))
        assert length <= band.norm * float(np.linalg.norm(term.astype(float))) / math.sqrt(2) + slack


def test_noise_is_correlated_as_the_inverse_of_the_band_says() -> None:
    band, steps, size = band_of(3, 0.0), 5, 20_000
    fresh = SeededRandomness(9).lattice_normal(steps * size).reshape(1, steps, size)
    ones = np.ones((1, steps), bool)
    _, noise = play(band, np.zeros((1, steps, size), np.int64), fresh, ones, np.ones((1, steps, steps)))
    found = np.cov([noise[0, t] / 2.0**40 for t in range(steps)])
    inverse = np.linalg.inv(encoder(band, steps))
    assert np.abs(found - inverse @ inverse.T).max() < 0.05


# --- why single shares must be hidden ----------------------------------------------------------------------------


def law(offset: float, gradient: int, second: bool, hidden: float, scale: float = 0.3, level: int = 8) -> Array:
    """Return the probabilities of one site's two integers in two steps, b = 2 and c_1 = 1/2, exactly.

    Args:
        offset: Added to the noise of step 0, and half of it to that of step 1: the world without the unit.
        gradient: The unit's term in step 0: the world with it.
        second: Whether the site is in the second sum.
        hidden: Deviation of F, in levels; 0: none.
        scale: Deviation of fresh noise in levels.
        level: Lattice points of a level.
    """
    points, reach = np.arange(-26, 27), 9
    found = np.zeros((2 * reach + 1, 2 * reach + 1))

    def masses(mean: float) -> Array:
        weights = np.exp(-((points - mean) ** 2) / (2 * (scale * level) ** 2))
        return np.asarray(weights / weights.sum())

    def rounded(value: float) -> Array:
        edges = (np.arange(-reach, reach + 2) - 0.5) * level
        if hidden:
            return np.asarray(np.diff(ndtr((edges - value) / (hidden * level))))
        return np.asarray((edges[:-1] <= value) & (value < edges[1:]), float)

    for n, chance in zip(points, masses(offset), strict=True):
        one = rounded(float(n + gradient))
        later = np.zeros(2 * reach + 1)
        if second:
            back = math.floor((n + 1) / 2)
            # In the world without the unit, fresh noise of step 1 is moved by what the shift takes back more.
            shift = back - math.floor((n - offset + 1) / 2)
            for fresh, weight in zip(points, masses(shift), strict=True):
                later += weight * rounded(float(fresh - back))
        else:
            later[reach] = 1.0
        found += chance * np.outer(one, later)
    return found


@pytest.mark.parametrize("second", [(True, True), (True, False)])
def test_the_sums_of_two_steps_tell_no_single_share_if_and_only_if_some_noise_is_fresh(
    second: tuple[bool, bool],
) -> None:
    distances = {}
    for hidden in (0.0, 1.2):
        having = [law(0, 6, second[0], hidden), law(0, 0, second[1], hidden)]
        without = [law(3, 0, second[0], hidden), law(3, 0, second[1], hidden)]
        p, q = (fftconvolve(*sites) for sites in (having, without))
        distances[hidden] = 0.5 * float(np.abs(p - q).sum())
    assert distances[0.0] > 1e-2
    assert distances[1.2] <= math.exp(approximation_error(1.2, 2)) + 1e-9


# --- the study ---------------------------------------------------------------------------------------------------

BANDED = {"mode": "distributed", "epsilon": 4.0, "delta": 1e-4, "clip_norm": 0.5, "noise": "banded", "band": 4}


def banded_study(**changes: Any) -> Study:
    privacy, training = {**BANDED, **changes.pop("privacy", {})}, {"sampling_rate": 0.1, **changes.pop("training", {})}
    return sharing_study(privacy=privacy, training=training, aggregation={"largest_count": 60}, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"band": None}}, 'band: needs noise = "banded"'),
        ({"privacy": {"noise": "independent"}}, 'band: needs noise = "banded"'),
        ({"privacy": {"band": 31}}, "expected at most training.rounds = 30, found 31"),
        ({"privacy": {"band": 1}}, "greater than or equal to 2"),
        ({"training": {"sampling_rate": 0.26}}, "exceeds 1; lower one of them"),
        ({"cohort": {"fraction": 0.5}}, "cohort.fraction: banded noise needs the same sites"),
        ({"privacy": {"clipping": "adaptive"}}, "clipping: adaptive needs mode local"),
    ],
)
def test_what_is_not_proven_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=re.escape(said)):
        banded_study(**changes)


def test_banded_noise_needs_shared_noise() -> None:
    with pytest.raises(StudyError, match="banded needs mode distributed, found local"):
        masked_study(privacy={**BANDED, "mode": "local"})


def test_independent_noise_leaves_a_study_as_it_was() -> None:
    assert sharing_study().document()["privacy"].keys().isdisjoint({"noise", "band"})
    assert sharing_study(privacy={"noise": "independent"}).digest == sharing_study().digest
    assert banded_study().digest != sharing_study().digest
    assert Study.parse(banded_study().document()) == banded_study()


def test_a_study_is_accounted_for_its_largest_class() -> None:
    study = banded_study()
    mechanism = plan(study)
    assert mechanism is not None
    assert (mechanism.training.band, mechanism.training.sampling_rate) == (4, 0.4)
    assert study.draws == (0.4, 8)
    found = PLDAccountant()
    event = PoissonSampledDpEvent(0.4, GaussianDpEvent(mechanism.training.noise_multiplier))
    found.compose(SelfComposedDpEvent(event, 8))
    other = found.get_epsilon(1e-4)
    assert other <= mechanism.spent(30) <= 4.0
    assert other > 3.9
    assert mechanism.spent(4) == mechanism.spent([2]) == mechanism.spent([1, 2, 3]) < mechanism.spent([1, 5])
    assert mechanism.spent([]) == 0.0


@pytest.mark.parametrize(("rounds", "band"), [(1, 4), (7, 3), (8, 4), (60, 7)])
def test_the_largest_class_has_so_many_rounds(rounds: int, band: int) -> None:
    event = PrivacyEvent(1.0, 0.1, 1, "record", True, band)
    assert event.counted_rounds(rounds) == -(-rounds // band)
    assert replace(event, band=1).counted_rounds(rounds) == rounds


def test_an_event_states_its_band() -> None:
    event = PrivacyEvent(1.0, 0.1, 1, "record", True, 4)
    assert PrivacyEvent.parse(event.document()) == event
    assert event.document()["mechanism"] == "poisson-subsampled-shared-banded-gaussian"
    for change in ({"band": 1}, {"band": 65}, {"band": True}, {"mechanism": "poisson-subsampled-shared-gaussian"}):
        with pytest.raises(ValueError, match="not a mechanism"):
            PrivacyEvent.parse({**event.document(), **change})


def test_one_deviation_holds_for_all_cohorts_that_a_study_admits() -> None:
    """Corrupt sites and drop-outs are rounded fractions: a cohort of 20 has fewer honest sites than one of 19."""
    study = banded_study(cohort={"min_sites": 18, "sites": []})
    sizes = range(18, 60)
    shares = {size: shared_noise(study, size) for size in sizes}
    assert shares[20].helpers < shares[19].helpers
    assert {each.deviation for each in shares.values()} == {shares[20].deviation}
    assert all(each.level_bits >= 7 for each in shares.values())
    for each in shares.values():
        assert each.effective_multiplier(each.survivors) >= each.noise_multiplier * (1 - 1e-12)
        assert each.band is not None
        assert each.deviation == each.own_multiplier * 0.5 * each.band.norm


def test_a_band_that_does_not_fit_the_servers_momentum_is_refused() -> None:
    study = banded_study(training={"rounds": 200}, privacy={"band": 2})
    momentum = study.model_copy(
        update={"aggregation": study.aggregation.model_copy(update={"optimizer": "fedavgm", "momentum": 0.99})}
    )
    with pytest.raises(StudyError, match="expected at most 4"):
        shared_noise(momentum, 6)


def test_the_least_number_of_honest_sites_is_over_all_cohorts() -> None:
    for least, corrupt, drops in itertools.product((5, 18, 19, 28), (0.0, 0.1, 0.24), (0.0, 0.1, 0.3)):
        study = banded_study(
            cohort={"min_sites": least, "sites": []},
            privacy={"dropout_fraction": drops},
            secure_aggregation={"corrupt_fraction": corrupt},
        )
        honest = [survivors_of(study, n, n) - corrupt_sites(study, n) for n in range(least, 120)]
        assert least_helpers(study) == min(each for each in honest if each >= 2)


@pytest.mark.parametrize(
    ("sites", "least", "corrupt", "meet"),
    [(0, 3, 1, False), (4, 3, 1, True), (6, 5, 1, True), (6, 4, 1, False), (9, 8, 2, True)],
)
def test_two_quorums_of_a_banded_study_share_an_honest_site(sites: int, least: int, corrupt: int, meet: bool) -> None:
    names = [f"site-{number}" for number in range(sites)]
    masks = {"corrupt": corrupt, "corrupt_fraction": 0.0}
    study = banded_study(cohort={"min_sites": least, "sites": names}, secure_aggregation=masks)
    assert quorums_meet(study) == meet
    if sites:
        fewest = quorum(least, corrupt)
        # The smallest intersection of two quorums of cohorts of the least size.
        shared = 2 * fewest - min(sites, 2 * least)
        assert not meet or shared > corrupt


# --- an audit ----------------------------------------------------------------------------------------------------


def separation(band: Band, drawn: list[int], *, steps: int, noise: float = 1.0, size: int = 40_000) -> float:
    """Return how many deviations apart the best test of the released sums puts worlds with a unit and without it.

    Every number of a vector is one trial: its noise is independent of that of others. The unit's gradient has the clip
    norm and always the same sign.

    Args:
        band: The band.
        drawn: Steps in which the unit is drawn, with certainty.
        steps: T.
        noise: Factor of the noise of both sites; below 1: broken.
        size: Number of trials.
    """
    claimed = SharedNoise(3, 1, 0.7, 0.5, 7, band=band, least_helpers=2)
    shares = replace(claimed, noise_multiplier=noise * claimed.noise_multiplier)
    released = []
    for having in (False, True):
        kept: list[dict[int, Array]] = [{}, {}]
        sums = np.zeros((steps, size))
        for t in range(steps):
            for i in range(2):
                term = round(0.5 / shares.lattice) if having and i == 0 and t in drawn else 0
                past = {lag: kept[i][t - lag] for lag in range(1, min(band.steps, t + 1))}
                source = SeededRandomness(11, i, t, int(having))
                part, kept[i][t] = contribute_correlated(np.full(size, term), shares, past, source)
                sums[t] += part * shares.level
        released.append(sums)
    inverse = np.linalg.inv(encoder(band, steps))
    direction = np.zeros(steps)
    direction[drawn] = 1.0
    best = np.linalg.solve(inverse @ inverse.T, direction)
    without, having_it = (best @ sums for sums in released)
    return float((having_it.mean() - without.mean()) / without.std())


def test_an_audit_finds_what_is_claimed_and_no_more() -> None:
    band, steps = band_of(3, 0.0), 6
    claim = math.sqrt(2) / 0.7  # two draws
    found = separation(band, [0, 3], steps=steps)
    assert 0.93 * claim < found < 1.02 * claim
    # Half the noise, or a sampler that draws a unit beside its class as often, are found out.
    assert separation(band, [0, 3], steps=steps, noise=0.5) > 1.8 * claim
    assert separation(band, [2, 3], steps=steps) > 1.15 * claim
