"""Clipping: what one unit can move, however it is clipped, and that the noise covers it as accounted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privet.client.site import Resources
from privet.client.training.dp import (
    Clipping,
    Columns,
    TermSum,
    balance,
    clip_units,
    next_clip_norm,
    noisy,
    per_sample_gradients,
)
from privet.client.training.features import encode_records
from privet.client.training.model import open_host
from privet.client.training.train import (
    Draws,
    Steps,
    TrainingSet,
    clipping_of,
    draw_noise,
    head_columns,
    release,
    term_sum,
    train_round,
)
from privet.common.errors import StateError, StudyError
from privet.common.privacy.accounting import PrivacyEvent, split_noise
from privet.common.privacy.noise import SeededRandomness, lattice_release, lattice_unit
from privet.common.study.sections import PrivacySection
from tests.client.test_dp import is_within, single_passes
from tests.support.tiny import private, random_adapter, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
MODES = ("flat", "automatic", "adaptive")
ONE = torch.zeros(1, dtype=torch.int64)
Vector = NDArray[np.float64]
Total = Callable[[Mapping[int, Sequence[int]], str, float, int], TermSum]


def stability(mode: str) -> float | None:
    return 0.01 if mode == "automatic" else None


def clip(norm: float, s: float | None = None, noise_multiplier: float = 1.0) -> Clipping:
    """Return clipping on the lattice of noise with this multiplier."""
    return Clipping(norm, lattice_unit(noise_multiplier * norm), s)


def clipped(gradient: torch.Tensor, clipping: Clipping) -> tuple[torch.Tensor, float]:
    """Return the term of a unit [P] in units of the gradient, float64, and its norm before clipping."""
    terms, norms = clip_units(gradient.unsqueeze(0), clipping)
    return terms.double() * clipping.lattice, float(norms)


def section(**more: Any) -> PrivacySection:
    return PrivacySection.model_validate(private(**more))


# --- one unit's share ------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    exponent=st.integers(-30, 37),
    clip_norm=st.floats(1e-6, 1e6),
    s=st.none() | st.floats(1e-6, 1),
    size=st.integers(1, 40),
)
def test_every_unit_stays_within_the_clip_norm_and_the_count_within_one_half(
    seed: int, rows: list[int], exponent: int, clip_norm: float, s: float | None, size: int
) -> None:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(rows)), rows)
    scale = 10.0 ** rng.uniform(exponent - 3, exponent, (len(owner), 1))
    flat = torch.from_numpy((rng.standard_normal((len(owner), size)) * scale).astype(np.float32))
    clipping = clip(clip_norm, s)
    everyone = TermSum(clipping, torch.zeros(size, dtype=torch.int64))
    everyone.add(flat, [rows[unit] for unit in owner])
    total, halves = torch.zeros(size, dtype=torch.int64), 0.0
    for unit, count in enumerate(rows):
        alone = TermSum(clipping, torch.zeros(size, dtype=torch.int64))
        alone.add(flat[np.flatnonzero(owner == unit)], [count] * count)
        assert is_within(alone.total, clipping)
        assert abs(alone.balance) <= 0.5
        total, halves = total + alone.total, halves + alone.balance
    assert torch.equal(everyone.total, total)
    assert everyone.balance == halves


@given(seed=st.integers(0, 2**32 - 1), units=st.integers(1, 9), size=st.integers(1, 40_000))
def test_a_units_norm_is_the_same_bits_whatever_the_other_units(seed: int, units: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = torch.from_numpy(rng.standard_normal((units, size)).astype(np.float32))
    together = clip_units(gradients, clip(1.0))[1]
    assert together.tolist() == [clipped(gradient, clip(1.0))[1] for gradient in gradients]


@pytest.mark.parametrize("clip_norm", [1e-6, 0.5, 1e6])
@pytest.mark.parametrize("s", [None, 1e-6, 1.0])
def test_a_gradient_too_large_to_be_scaled_counts_as_zero(clip_norm: float, s: float | None) -> None:
    # The factor would be a denormal number, whose rounding alone could exceed the clip norm by half.
    for size in (1e30, 1e34, 3e38):
        terms, _ = clip_units(torch.full((1, 50), size), clip(clip_norm, s))
        assert is_within(terms, clip(clip_norm, s))


def test_automatic_clipping_divides_by_the_norm_plus_the_stability() -> None:
    g = torch.tensor([[3.0, 4.0], [0.003, 0.004], [0.0, 0.0]])
    for row, norm in zip(g, (5.0, 0.005, 0.0), strict=True):
        total, found = clipped(row, clip(2.0, 0.01))
        torch.testing.assert_close(total, row.double() * 2.0 / (norm + 0.01), rtol=1e-5, atol=0)
        assert found == pytest.approx(norm, rel=1e-6)


def test_long_gradients_are_measured_over_all_their_columns() -> None:
    # The norm is taken by blocks of columns; the last one is not full.
    g = torch.zeros(2, 100_001)
    g[0, [0, 40_000, 100_000]] = torch.tensor([2.0, 3.0, 6.0])
    g[1] = 1.0
    assert clip_units(g, clip(1.0))[1].tolist() == pytest.approx([7.0, 100_001**0.5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_that_is_not_finite_adds_nothing_to_gradient_and_count(mode: str, bad: float) -> None:
    gradients, clipping = torch.randn(5, 5), clip(1.5, stability(mode))

    def summed(chosen: torch.Tensor, rows: Sequence[int]) -> TermSum:
        terms = TermSum(clipping, torch.zeros(5, dtype=torch.int64))
        terms.add(chosen, rows)
        return terms

    without = summed(gradients[[0, 3, 4]], [1, 1, 1])
    gradients[2, 3] = bad
    found = summed(gradients, [1, 2, 2, 1, 1])
    assert torch.equal(found.total, without.total)
    assert found.balance == without.balance
    assert math.isnan(clip_units(gradients[[0, 2]], clipping)[1][1])


def test_the_balance_counts_halves() -> None:
    norms = torch.tensor([0.1, 1.0, 1.0001, 7.0, math.nan], dtype=torch.float64)
    assert balance(norms, 1.0) == 0.0
    assert balance(norms, 5.0) == 1.0
    assert balance(norms, 0.01) == -2.0
    assert balance(norms[:0], 1.0) == 0.0


# --- head and adapter apart --------------------------------------------------------------------------------


def apart(norm: float, share: float, columns: Columns, s: float | None = None) -> Clipping:
    return replace(clip(norm, s), head=columns, head_share=share)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    exponent=st.integers(-30, 37),
    clip_norm=st.floats(1e-6, 1e6),
    s=st.none() | st.floats(1e-6, 1),
    share=st.floats(1e-9, 1 - 1e-9),
    cuts=st.lists(st.integers(1, 39), unique=True, min_size=2, max_size=4).map(sorted),
)
def test_parts_clipped_apart_stay_within_their_norms_and_a_unit_moves_the_sum_by_its_own_term(
    seed: int,
    rows: list[int],
    exponent: int,
    clip_norm: float,
    s: float | None,
    share: float,
    cuts: list[int],
) -> None:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(rows)), rows)
    scale = 10.0 ** rng.uniform(exponent - 3, exponent, (len(owner), 40))  # columns of very different sizes
    flat = torch.from_numpy((rng.standard_normal((len(owner), 40)) * scale).astype(np.float32))
    columns = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    clipping = apart(clip_norm, share, columns, s)
    everyone = TermSum(clipping, torch.zeros(40, dtype=torch.int64))
    everyone.add(flat, [rows[unit] for unit in owner])
    total = torch.zeros(40, dtype=torch.int64)
    for unit, count in enumerate(rows):
        alone = TermSum(clipping, torch.zeros(40, dtype=torch.int64))
        alone.add(flat[np.flatnonzero(owner == unit)], [count] * count)
        assert is_within(alone.total, clipping)  # the norm of the whole term is at most C, without rounding
        for part, norm in clipping.parts(40):
            own = torch.cat([alone.total[start:end] for start, end in part])
            assert is_within(own, replace(clipping, norm=norm, head=()))
        total += alone.total
    assert torch.equal(everyone.total, total)


def test_parts_that_were_each_given_the_whole_norm_would_exceed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping, gradient = apart(1.0, 0.5, ((1, 2),)), torch.full((1, 3), 9.0)
    assert is_within(clip_units(gradient, clipping)[0], clipping)
    monkeypatch.setattr(Clipping, "parts", lambda self, size: [(((1, 2),), 1.0), (((0, 1), (2, 3)), 1.0)])
    assert not is_within(clip_units(gradient, clipping)[0], clipping)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("place", [0, 1])
def test_a_unit_that_one_part_cannot_hold_adds_nothing_to_any(bad: float, place: int) -> None:
    gradients = torch.ones(2, 3)
    gradients[1, place] = bad
    terms, norms = clip_units(gradients, apart(1e-6, 0.5, ((0, 1),)))
    assert torch.equal(terms, clip_units(gradients[:1], apart(1e-6, 0.5, ((0, 1),)))[0])
    assert norms[0] == pytest.approx(3**0.5)
    assert math.isnan(norms[1])


def test_a_large_head_no_longer_takes_the_norm_of_the_adapter() -> None:
    gradient = torch.tensor([[30.0, 0.3, 0.4]])
    together = clip_units(gradient, clip(1.0))[0].double() * clip(1.0).lattice
    found = clip_units(gradient, apart(1.0, 0.36, ((0, 1),)))[0].double() * clip(1.0).lattice
    assert float(together[1:].norm()) < 0.02
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3, 0.4], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("columns", "share"), [(((0, 3),), 0.5), (((0, 1),), 0.0), (((0, 1),), 1.0)])
def test_a_head_that_is_everything_or_nothing_is_refused(columns: Columns, share: float) -> None:
    with pytest.raises(StateError, match="report this as a bug"):
        clip_units(torch.ones(1, 3), apart(1.0, share, columns))


def test_the_columns_of_the_head_are_those_of_modules_trained_in_full(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(head_clip_share=0.1))
    host = open_host(study, CPU)
    columns, trained = head_columns(study, host.spec), study.trained(host.spec)
    assert sum(end - start for start, end in columns) == sum(t.size for t in trained if t.role == "full")
    flat = np.concatenate([np.full(t.size, t.role == "full") for t in trained])
    assert all(flat[start:end].all() for start, end in columns)
    assert head_columns(tiny_study(bert, privacy=private()), host.spec) == ()


# --- real gradients --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert-packed", "bert-single", "llama-packed", "llama-single"])
def total(request: pytest.FixtureRequest, bases: Mapping[str, Path]) -> Total:
    """Sum a step of a tiny model over the given units, from forward pass to clipping."""
    family, _, engine = request.param.partition("-")
    study = tiny_study(bases[family], privacy=private(), **{"aggregation.method": "fedavg"})
    host = open_host(study, CPU)
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 12, seed=3)))
    parameters = [p for _, p in host.train_only(host.spec.trained("fedavg"))]

    def found(units: Mapping[int, Sequence[int]], mode: str, clip_norm: float, size: int) -> TermSum:
        host.mount(random_adapter(host.spec))  # the host is shared
        steps = Steps(host, study, TrainingSet(features, [], 0), parameters, size)
        with (
            single_passes(host, engine),
            host.passing(training=True),
            per_sample_gradients(host.model, parameters, packed=host.shape.packed) as collected,
        ):
            return term_sum(steps, units, collected, clip(clip_norm, stability(mode)))

    return found


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 11), unique=True, max_size=6),
    removed=st.integers(0, 6),
    exponent=st.floats(-3, 2),
    z=st.floats(0.3, 10),
    share=st.floats(1e-4, 0.5),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_one_unit_moves_what_a_step_releases_by_the_accounted_sensitivity(
    total: Total,
    mode: str,
    cuts: list[int],
    removed: int,
    exponent: float,
    z: float,
    share: float,
    sizes: tuple[int, int],
) -> None:
    edges = [0, *sorted(cuts), 12]
    units = {number: list(range(a, b)) for number, (a, b) in enumerate(itertools.pairwise(edges))}
    removed %= len(units)
    clip_norm = 10.0**exponent
    rest = {number: rows for number, rows in units.items() if number != removed}
    both, without = total(units, mode, clip_norm, sizes[0]), total(rest, mode, clip_norm, sizes[1])
    own = total({0: units[removed]}, mode, clip_norm, sizes[1])
    # Not a bit of the other units' terms depends on the company or on the passes.
    assert torch.equal(both.total - without.total, own.total)
    assert both.balance - without.balance == own.balance
    assert is_within(own.total, own.clipping)
    assert abs(own.balance) == 0.5
    if mode == "adaptive":
        for_gradient, for_count = split_noise(z, share)
        moved = float(np.linalg.norm(own.total.double())) * own.clipping.lattice
        joint = math.hypot(moved / (for_gradient * clip_norm), 0.5 / for_count)
        assert joint <= (1 + 1e-12) / z


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_is_reached_by_real_gradients(total: Total, mode: str) -> None:
    units = {number: [number] for number in range(12)}
    both = total(units, mode, 0.01, 5)
    without = total({number: rows for number, rows in units.items() if number != 4}, mode, 0.01, 5)
    moved = both.total - without.total
    assert is_within(moved, both.clipping)
    assert float(np.linalg.norm(moved.double())) * both.clipping.lattice > 0.95 * 0.01
    assert (both.balance, without.balance) == (-6.0, -5.5)


# --- noise -----------------------------------------------------------------------------------------------


@given(z=st.floats(0.3, 100), share=st.floats(1e-4, 0.5))
def test_the_split_is_the_papers(z: float, share: float) -> None:
    for_gradient, for_count = split_noise(z, share)
    assert for_gradient == pytest.approx((z**-2 - (2 * for_count) ** -2) ** -0.5, rel=1e-9)
    assert z < for_gradient
    assert z < 2 * for_count


def test_known_splits() -> None:
    # A count with deviation 5 beside z = 1, as 100 units with the paper's deviation of a twentieth of them.
    assert split_noise(1.0, 0.01) == pytest.approx((1.0050378, 5.0), rel=1e-6)
    assert split_noise(2.0, 0.02) == pytest.approx((2.0203051, 7.0710678), rel=1e-6)
    assert split_noise(0.0, 0.02) == (0.0, 0.0)


@pytest.mark.parametrize(("z", "share", "rate", "steps"), [(1.0, 0.02, 1 / 32, 192), (0.7, 0.3, 0.1, 20)])
def test_both_releases_cost_what_one_with_the_whole_noise_costs(
    z: float, share: float, rate: float, steps: int
) -> None:
    # Google's dp-accounting, which composes the two Gaussian releases of a step itself.
    def cost(event: DpEvent) -> float:
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(PoissonSampledDpEvent(rate, event), steps)
        return float(accountant.get_epsilon(1e-5))

    for_gradient, for_count = split_noise(z, share)
    pair = ComposedDpEvent([GaussianDpEvent(for_gradient), GaussianDpEvent(for_count / 0.5)])
    assert cost(pair) == pytest.approx(cost(GaussianDpEvent(z)), rel=1e-6)
    assert cost(pair) > 1.005 * cost(GaussianDpEvent(for_gradient))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_get_the_deviation_that_was_accounted(mode: str) -> None:
    z, clip_norm, size = 1.3, 0.4, 60_000
    privacy = section(clipping=mode, quantile_share=0.3)
    clipping = clipping_of(privacy, clip_norm, z)
    terms = TermSum(clipping, torch.full((size,), int(5.0 / clipping.lattice)))
    released, _ = release(privacy, z, terms, 30.0, draw_noise(privacy, size, SeededRandomness(1, mode)))
    expected = z * clip_norm / (math.sqrt(0.7) if mode == "adaptive" else 1)
    noise = (released.numpy() - 5.0) / expected
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert noise.var() == pytest.approx(1, abs=4 * (2 / size) ** 0.5)


def test_the_count_gets_the_deviation_that_was_accounted() -> None:
    z, share, expected, rate = 1.3, 0.1, 1000.0, 0.2
    privacy = section(clipping="adaptive", quantile_share=share, quantile_rate=rate)
    stream, terms = SeededRandomness(2), TermSum(clipping_of(privacy, 1.0, z), ONE, 100.0)
    norms = [release(privacy, z, terms, expected, draw_noise(privacy, 1, stream))[1] for _ in range(4000)]
    # Back through the update: log C' = -rate * (1/2 + (balance + noise) / expected - 1/2).
    counts = -np.log(norms) / rate * expected
    deviation = z / (2 * share**0.5)
    assert stats.kstest((counts - 100.0) / deviation, "norm").pvalue > 1e-3


@pytest.mark.parametrize("mode", ["flat", "automatic"])
def test_other_clip_norms_stay_and_cost_no_noise(mode: str) -> None:
    first, second = SeededRandomness(3), SeededRandomness(3)
    privacy = section(clipping=mode)
    terms = TermSum(clipping_of(privacy, 0.7, 1.0), torch.zeros(3, dtype=torch.int64), -40.0)
    released, clip_norm = release(privacy, 1.0, terms, 30.0, draw_noise(privacy, 3, first))
    assert clip_norm == 0.7
    assert np.array_equal(released, 0.7 * second.normal(3))
    assert first.words(1) == second.words(1)


def test_what_is_released_is_a_sum_on_the_noises_lattice() -> None:
    # One unit more or less within C moves the count by one half on its lattice, whatever else is in the sum.
    z, share, size = 0.9, 0.1, 50
    privacy = section(clipping="adaptive", quantile_share=share)
    clipping = clipping_of(privacy, 0.7, z)
    for_gradient, for_count = split_noise(z, share)
    assert clipping == Clipping(0.7, lattice_unit(for_gradient * 0.7))
    points = np.random.default_rng(0).integers(-(2**44), 2**44, size)
    terms = TermSum(clipping, torch.from_numpy(points), 3.5)
    drawn = draw_noise(privacy, size, SeededRandomness(6))
    released, following = release(privacy, z, terms, 30.0, drawn)
    stream = SeededRandomness(6)
    assert np.array_equal(released.numpy(), lattice_release(points, clipping.lattice, stream))
    half = int(0.5 / lattice_unit(for_count))
    count = float(noisy(torch.tensor([7 * half]), lattice_unit(for_count), stream.lattice_normal(1))[0])
    assert following == next_clip_norm(0.7, count, 30.0, privacy.quantile, privacy.quantile_rate)
    assert half * lattice_unit(for_count) <= 0.5


# --- the clip norm follows the quantile ------------------------------------------------------------------


def test_the_update_is_the_papers() -> None:
    # 30 of 40 expected units within C, the median wanted: C exp(-0.2 * (0.75 - 0.5)).
    assert next_clip_norm(2.0, 10.0, 40.0, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.05))
    assert next_clip_norm(2.0, -10.0, 40.0, 0.9, 0.2) == pytest.approx(2.0 * math.exp(0.13))
    assert next_clip_norm(2.0, 0.0, 40.0, 0.5, 0.2) == 2.0


@given(
    clip_norm=st.floats(1e-6, 1e6),
    noised=st.floats(-1e300, 1e300),
    expected=st.floats(1e-9, 1e9),
    target=st.floats(0.01, 0.99),
    rate=st.floats(1e-3, 2),
)
def test_a_step_moves_the_clip_norm_by_at_most_the_rate_and_never_off_the_scale(
    clip_norm: float, noised: float, expected: float, target: float, rate: float
) -> None:
    found = next_clip_norm(clip_norm, noised, expected, target, rate)
    assert 1e-6 <= found <= 1e6
    assert abs(math.log(found / clip_norm)) <= rate * (1 + 1e-9)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [1e-3, 100.0])
def test_the_clip_norm_finds_the_quantile_from_far_off(quantile: float, start: float) -> None:
    rng = np.random.default_rng(4)
    privacy = section(clipping="adaptive", quantile=quantile)
    noise, clip_norm, units, rate = SeededRandomness(5), start, 400, 0.25
    path = []
    for _ in range(300):
        drawn = rng.lognormal(math.log(2.0), 0.7, units)[rng.random(units) < rate]
        terms = TermSum(clipping_of(privacy, clip_norm, 1.0), ONE, balance(torch.from_numpy(drawn), clip_norm))
        _, clip_norm = release(privacy, 1.0, terms, units * rate, draw_noise(privacy, 1, noise))
        path.append(clip_norm)
    expected = stats.lognorm(0.7, scale=2.0).ppf(quantile)
    assert np.median(path[150:]) == pytest.approx(expected, rel=0.1)


def updated(base: Path, mode: str, clip_norm: float, steps: int, learning_rate: float) -> Vector:
    """Return the update of a round of SGD with hardly any noise, in which all eight units enter every step."""
    change = {"training.optimizer": "sgd", "training.learning_rate": learning_rate, "training.sampling_rate": 1.0}
    privacy = private(clip_norm=clip_norm, clipping=mode)
    study = tiny_study(base, privacy=privacy, **change, **{"training.local_steps": steps})
    host = open_host(study, CPU)
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 8)))
    found = train_round(
        host,
        study,
        random_adapter(host.spec),
        TrainingSet(features, [[row] for row in range(8)], 8),
        Draws(SeededRandomness(0, "sampling"), SeededRandomness(0, "noise")),
        first_step=0,
        mechanism=PrivacyEvent(1e-5, 1.0, steps, "record"),
        physical_batch=5,
    )
    assert np.linalg.norm(found) > 1e-4, "lost in rounding"
    return found.astype(np.float64)


@pytest.mark.parametrize("mode", MODES)
def test_a_round_takes_its_clip_norm_from_the_study_and_adapts_it_step_by_step(bert: Path, mode: str) -> None:
    # Every gradient is far above C, the steps too small to change it: a step's update is C_t times a constant.
    steps = 4
    many, one = updated(bert, mode, 1e-3, steps, 1.0), updated(bert, mode, 1e-3, 1, 1.0)
    # None of the units is within C, so that each step multiplies C by exp(0.2 * 0.5).
    factor = sum(math.exp(0.1 * step) for step in range(steps)) if mode == "adaptive" else steps
    assert np.linalg.norm(many) == pytest.approx(factor * np.linalg.norm(one), rel=0.01)
    assert np.array_equal(updated(bert, mode, 1e-3, steps, 1.0), many), "a round left something for the next one"


def test_a_round_scales_short_gradients_up_where_clipping_is_automatic(bert: Path) -> None:
    # Every gradient is far below C: flat clipping leaves it as it is, automatic clipping brings it to C.
    found = {mode: np.linalg.norm(updated(bert, mode, 1e2, 1, 1e-2)) for mode in MODES}
    assert found["flat"] == pytest.approx(found["adaptive"], rel=1e-6)
    assert 1 > found["automatic"] > 3 * found["flat"]


# --- the study -------------------------------------------------------------------------------------------


def test_flat_is_the_default_and_the_choice_is_part_of_the_agreement(bert: Path) -> None:
    plain = tiny_study(bert, privacy=private())
    assert plain.privacy.clipping == "flat"
    digests = {tiny_study(bert, privacy=private(clipping=mode)).digest for mode in MODES}
    digests.add(tiny_study(bert, privacy=private(head_clip_share=0.1)).digest)
    assert len(digests) == 4
    assert plain.digest in digests


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"mode": "none", "clipping": "automatic"}, "clipping: mode none does not clip"),
        (private(clipping="automatic", stability=0.0), r"privacy\.stability"),
        (private(clipping="adaptive", quantile=1.0), r"privacy\.quantile"),
        (private(clipping="adaptive", quantile_rate=0.0), r"privacy\.quantile_rate"),
        (private(clipping="adaptive", quantile_share=1.0), r"privacy\.quantile_share"),
        (private(clipping="none"), r"privacy\.clipping"),
        ({"mode": "none", "head_clip_share": 0.1}, "head_clip_share: mode none does not clip"),
        (private(clipping="adaptive", head_clip_share=0.1), "head_clip_share: adaptive moves one clip norm"),
        (private(head_clip_share=1.0), r"privacy\.head_clip_share"),
    ],
)
def test_settings_that_would_not_clip_are_refused(bert: Path, privacy: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        tiny_study(bert, privacy=privacy)
