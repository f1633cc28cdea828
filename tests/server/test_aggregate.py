"""Server aggregation: exact for B-only training, biased for fedavg; refactoring keeps product and momenta."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from privet.common.errors import DivergedError, ProtocolError, StateError, StudyError
from privet.common.privacy.schedule import rate_factor
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.sections import AggregationSection, Schedule
from privet.server.rounds.aggregate import ServerOptimizer, apply_update, refactor

Array = NDArray[np.float64]
Name = Literal["fedavg", "fedavgm", "fedadam", "fedyogi"]
OPTIMIZERS: tuple[Name, ...] = ("fedavg", "fedavgm", "fedadam", "fedyogi")
ROUNDS = 8
A, B, HEAD = "layer.0.lora_A.weight", "layer.0.lora_B.weight", "classifier.weight"
seeds = st.integers(0, 2**32 - 1)


def spec_of(d_in: int = 7, d_out: int = 5, rank: int = 3, layers: int = 1) -> AdapterSpec:
    tensors = [TensorSpec(HEAD, (2, 4), "full")]
    for i in range(layers):
        tensors.append(TensorSpec(f"layer.{i}.lora_A.weight", (rank, d_in), "lora_A"))
        tensors.append(TensorSpec(f"layer.{i}.lora_B.weight", (d_out, rank), "lora_B"))
    return AdapterSpec.of(tensors)


def random_adapter(spec: AdapterSpec, rng: np.random.Generator, scale: float = 1.0) -> Adapter:
    values = {t.name: (scale * rng.standard_normal(t.shape)).astype(np.float32) for t in spec.tensors}
    return Adapter(spec, values)


def product(adapter: Adapter, a: str = A, b: str = B) -> Array:
    return adapter.values[b].astype(np.float64) @ adapter.values[a].astype(np.float64)


def names_of(spec: AdapterSpec, method: str) -> list[str]:
    return [t.name for t in spec.trained(method)]


def weighted_mean(start: Adapter, trained: list[Adapter], weights: Array, method: str) -> Array:
    names = names_of(start.spec, method)
    origin = start.flatten(names).astype(np.float64)
    deltas = np.stack([site.flatten(names).astype(np.float64) - origin for site in trained])
    mean: Array = weights @ deltas / weights.sum()
    return mean


def optimizer_of(spec: AdapterSpec, **chosen: Any) -> ServerOptimizer:
    return ServerOptimizer(AggregationSection(**chosen), ROUNDS, spec)


def train(start: Adapter, method: str, rng: np.random.Generator) -> Adapter:
    """Stand in for a site: any values for what the method trains."""
    names = names_of(start.spec, method)
    values = {n: start.values[n] + rng.standard_normal(start.values[n].shape).astype(np.float32) for n in names}
    return start.replace(values)


# Exactness of aggregation


@settings(deadline=None)
@given(seeds, st.sampled_from(["ffa", "fedsvd"]), st.integers(1, 6))
def test_b_only_aggregation_is_the_exact_mean_of_the_products(seed: int, method: str, sites: int) -> None:
    rng = np.random.default_rng(seed)
    spec = spec_of(layers=2)
    start = random_adapter(spec, rng)
    trained = [train(start, method, rng) for _ in range(sites)]
    weights = rng.uniform(1, 100, sites)
    optimizer = optimizer_of(spec, method=method)
    done = apply_update(start, weighted_mean(start, trained, weights, method), optimizer, 0)
    if method == "fedsvd":
        done, _ = refactor(done)
    for a, b in spec.pairs():
        exact = sum(w * product(site, a, b) for w, site in zip(weights, trained, strict=True)) / weights.sum()
        assert np.linalg.norm(product(done, a, b) - exact) <= 1e-5 * np.linalg.norm(exact)
    head = sum(w * site.values[HEAD] for w, site in zip(weights, trained, strict=True)) / weights.sum()
    assert np.allclose(done.values[HEAD], head, atol=1e-5)


def test_ffa_and_fedsvd_leave_a_alone_in_the_step() -> None:
    rng = np.random.default_rng(0)
    start = random_adapter(spec_of(), rng)
    mean = weighted_mean(start, [train(start, "ffa", rng)], np.ones(1), "ffa")
    done = apply_update(start, mean, optimizer_of(start.spec, method="ffa"), 0)
    assert np.array_equal(done.values[A], start.values[A])


@given(seeds)
def test_fedavg_is_off_by_the_covariance_of_the_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = random_adapter(spec_of(), rng)
    one, two = (train(start, "fedavg", rng) for _ in range(2))
    optimizer = optimizer_of(start.spec, method="fedavg")
    done = apply_update(start, weighted_mean(start, [one, two], np.ones(2), "fedavg"), optimizer, 0)
    exact = (product(one) + product(two)) / 2
    covariance = (one.values[B] - two.values[B]) @ (one.values[A] - two.values[A]) / 4
    assert np.linalg.norm(product(done) - exact) > 1e-2 * np.linalg.norm(exact)
    assert np.allclose(product(done), exact - covariance, atol=1e-4)


# Server optimizers


def test_fedavg_at_rate_one_adds_the_mean_update() -> None:
    rng = np.random.default_rng(1)
    start = random_adapter(spec_of(), rng)
    names = names_of(start.spec, "ffa")
    mean = rng.standard_normal(start.flatten(names).size)
    done = apply_update(start, mean, optimizer_of(start.spec, method="ffa"), 0)
    assert np.array_equal(done.flatten(names), (start.flatten(names) + mean).astype(np.float32))


def oracle(name: Name, x: Array, updates: list[Array], rates: list[Array]) -> Array:
    """Reddi et al. 2021, Algorithm 2, in the paper's own direction (x moves along +delta)."""
    beta1, beta2, tau, momentum = 0.9, 0.99, 1e-3, 0.9
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for delta, rate in zip(updates, rates, strict=True):
        if name == "fedavg":
            x = x + rate * delta
            continue
        m = momentum * m + delta if name == "fedavgm" else beta1 * m + (1 - beta1) * delta
        if name == "fedadam":
            v = beta2 * v + (1 - beta2) * delta**2
        if name == "fedyogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + rate * (m if name == "fedavgm" else m / (np.sqrt(v) + tau))
        x = x.astype(np.float32).astype(np.float64)  # adapters travel as float32
    return x


@settings(deadline=None)
@given(seeds, st.sampled_from(OPTIMIZERS), st.floats(1e-4, 10))
def test_server_optimizers_follow_the_paper(seed: int, name: Name, scale: float) -> None:
    rng = np.random.default_rng(seed)
    adapter = random_adapter(spec_of(), rng)
    schedule = Schedule(shape="cosine", warmup=0.25, floor=0.1)
    optimizer = optimizer_of(
        adapter.spec,
        method="ffa",
        optimizer=name,
        learning_rate=0.3,
        head_learning_rate=0.05,
        schedule=schedule,
    )
    base = np.concatenate([np.full(t.size, 0.05 if t.role == "full" else 0.3) for t in optimizer.trained])
    names = [t.name for t in optimizer.trained]
    updates = [scale * rng.standard_normal(base.size) for _ in range(5)]
    expected = oracle(
        name,
        adapter.flatten(names).astype(np.float64),
        updates,
        [base * rate_factor(schedule, step, ROUNDS) for step in range(5)],
    )
    for step, update in enumerate(updates):
        adapter = apply_update(adapter, update, optimizer, step)
    assert adapter.flatten(names) == pytest.approx(expected, rel=1e-5, abs=1e-5 * (1 + scale))


def test_the_head_rate_is_the_learning_rate_unless_it_is_given() -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(2))
    mean = np.ones(adapter.flatten(names_of(adapter.spec, "ffa")).size)
    moved = apply_update(adapter, mean, optimizer_of(adapter.spec, method="ffa", learning_rate=0.5), 0)
    other = optimizer_of(adapter.spec, method="ffa", learning_rate=0.5, head_learning_rate=0.25)
    headed = apply_update(adapter, mean, other, 0)
    assert moved.values[HEAD] - adapter.values[HEAD] == pytest.approx(0.5, abs=1e-6)
    assert headed.values[HEAD] - adapter.values[HEAD] == pytest.approx(0.25, abs=1e-6)
    assert np.array_equal(moved.values[B], headed.values[B])


# What does not fit or is not finite


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 22), st.sampled_from(OPTIMIZERS))
def test_a_mean_that_is_not_finite_stops_before_the_optimizer_moves(bad: float, at: int, name: Name) -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(3))
    optimizer = optimizer_of(adapter.spec, method="ffa", optimizer=name)
    mean = np.zeros(23)
    mean[at] = bad
    with pytest.raises(DivergedError, match="1 of 23"):
        apply_update(adapter, mean, optimizer, 0)
    assert optimizer.state_dict()[1] == {}


def test_an_adapter_that_overflows_float32_is_an_error() -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(4))
    with pytest.raises(DivergedError):
        apply_update(adapter, np.full(23, 1e300), optimizer_of(adapter.spec, method="ffa"), 0)
    huge = {name: np.full_like(value, 1e38) for name, value in adapter.values.items()}
    with pytest.raises(DivergedError):
        refactor(adapter.replace(huge))
    with pytest.raises(DivergedError):
        refactor(adapter.replace({B: np.full((5, 3), np.nan, np.float32)}))


@pytest.mark.parametrize("shape", [(22,), (24,), (0,), (23, 1), ()])
def test_a_mean_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(5))
    with pytest.raises(ProtocolError, match="must have 23"):
        apply_update(adapter, np.zeros(shape), optimizer_of(adapter.spec, method="ffa"), 0)


def test_a_round_outside_the_study_is_refused() -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(6))
    with pytest.raises(StudyError):
        apply_update(adapter, np.zeros(23), optimizer_of(adapter.spec, method="ffa"), ROUNDS)


# Refactoring


@st.composite
def factor_pairs(draw: st.DrawFn) -> Adapter:
    """Adapters with factors of any shape, scale and rank, zero included."""
    d_in, d_out, rank = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(seeds))
    spec = spec_of(d_in, d_out, rank)

    def factor(rows: int, columns: int) -> NDArray[np.float32]:
        inner = draw(st.integers(0, min(rows, columns)))
        scale = 10.0 ** draw(st.integers(-6, 6))
        full = rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, columns))
        return np.asarray(scale * full, dtype=np.float32)

    adapter = random_adapter(spec, rng)
    return adapter.replace({A: factor(rank, d_in), B: factor(d_out, rank)})


@settings(deadline=None, max_examples=200)
@given(factor_pairs())
def test_refactoring_keeps_the_product_and_makes_a_orthonormal(adapter: Adapter) -> None:
    done, bases = refactor(adapter)
    before, after = product(adapter), product(done)
    cancelled = 1e-13 * np.linalg.norm(adapter.values[A]) * np.linalg.norm(adapter.values[B])
    assert np.linalg.norm(after - before) <= 1e-6 * np.linalg.norm(before) + cancelled
    rank, d_in = adapter.values[A].shape
    live = min(rank, d_in)
    rows = done.values[A].astype(np.float64)
    assert np.allclose(rows @ rows.T, np.diag([1.0] * live + [0.0] * (rank - live)), atol=1e-6)
    assert not done.values[B][:, live:].any()
    # B_new = B_old M and A_old = M A_new, which is what lets momenta follow.
    old_a, old_b = adapter.values[A].astype(np.float64), adapter.values[B].astype(np.float64)
    assert bases[B].shape == (rank, rank)
    assert np.allclose(old_b @ bases[B], done.values[B], rtol=1e-6, atol=1e-6 * np.abs(done.values[B]).max())
    assert np.allclose(bases[B] @ rows, old_a, rtol=1e-6, atol=1e-6 * np.linalg.norm(old_a))
    assert np.array_equal(done.values[HEAD], adapter.values[HEAD])


@settings(deadline=None)
@given(factor_pairs())
def test_refactoring_orders_and_signs_the_directions_and_is_deterministic(adapter: Adapter) -> None:
    done, _ = refactor(adapter)
    strengths = np.linalg.norm(done.values[B].astype(np.float64), axis=0)
    assert all(np.diff(strengths) <= 1e-6 * strengths.max(initial=0))
    for row in done.values[A]:
        assert row[np.abs(row).argmax()] >= 0
    assert refactor(adapter)[0].digest == done.digest


@given(seeds)
def test_refactoring_twice_changes_nothing_more(seed: int) -> None:
    once, _ = refactor(random_adapter(spec_of(), np.random.default_rng(seed)))
    twice, bases = refactor(once)
    gaps = -np.diff(np.linalg.norm(once.values[B], axis=0))
    assume(gaps.min() > 1e-2)  # directions of equal strength have no order
    assert np.allclose(twice.values[A], once.values[A], atol=1e-4)
    assert np.allclose(bases[B], np.eye(3), atol=1e-4)


@given(seeds)
def test_training_b_alone_never_leaves_the_span_of_the_first_a(seed: int) -> None:
    """And from the second refactoring on, the change of basis is a rotation."""
    rng = np.random.default_rng(seed)
    adapter = random_adapter(spec_of(), rng)
    first = np.linalg.qr(adapter.values[A].astype(np.float64).T)[0]
    for step in range(4):
        adapter, bases = refactor(train(adapter, "fedsvd", rng))
        rows = adapter.values[A].astype(np.float64)
        assert np.allclose(rows @ first @ first.T, rows, atol=1e-5)
        if step:
            assert np.allclose(bases[B] @ bases[B].T, np.eye(3), atol=1e-5)


def test_a_first_round_adapter_with_zero_b_gets_an_orthonormal_a_and_keeps_zero_b() -> None:
    adapter = random_adapter(spec_of(), np.random.default_rng(7))
    done, _ = refactor(adapter.replace({B: np.zeros((5, 3), np.float32)}))
    assert not done.values[B].any()
    assert done.values[A] @ done.values[A].T == pytest.approx(np.eye(3), abs=1e-6)


# Momenta across a change of basis


def trajectory(start: Adapter, updates: list[Array], *, refactored: bool, carried: bool) -> list[Array]:
    """Return B·A after each round of fedavgm; `updates` are of B in the first basis."""
    optimizer = optimizer_of(start.spec, method="fedsvd", optimizer="fedavgm", momentum=0.8)
    names = [t.name for t in optimizer.trained]
    adapter, total, products = start, np.eye(3), []
    for step, update in enumerate(updates):
        parts = {HEAD: np.zeros((2, 4)), B: update @ total}
        adapter = apply_update(adapter, np.concatenate([parts[n].ravel() for n in names]), optimizer, step)
        products.append(product(adapter))
        if refactored:
            adapter, bases = refactor(adapter)
            total = total @ bases[B]
            if carried:
                optimizer.change_basis(bases)
    return products


@settings(deadline=None)
@given(seeds)
def test_carried_momentum_moves_the_product_as_if_nothing_was_refactored(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = random_adapter(spec_of(), rng)
    updates = [rng.standard_normal((5, 3)) for _ in range(6)]
    plain = trajectory(start, updates, refactored=False, carried=False)
    carried = trajectory(start, updates, refactored=True, carried=True)
    left = trajectory(start, updates, refactored=True, carried=False)
    for one, other in zip(plain, carried, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)
    assert np.linalg.norm(plain[-1] - left[-1]) > 1e-3 * np.linalg.norm(plain[-1])


@pytest.mark.parametrize(
    ("method", "name"),
    [("ffa", "fedadam"), ("ffa", "fedyogi"), ("fedavg", "fedavgm"), ("fedavg", "fedavg")],
)
def test_a_change_of_basis_that_cannot_be_followed_is_refused(method: str, name: Name) -> None:
    adapter, bases = refactor(random_adapter(spec_of(), np.random.default_rng(8)))
    with pytest.raises(StudyError):
        optimizer_of(adapter.spec, method=method, optimizer=name).change_basis(bases)


# State


def steps(adapter: Adapter, optimizer: ServerOptimizer, first: int, last: int) -> Adapter:
    for step in range(first, last):
        mean = np.random.default_rng(step).standard_normal(23)
        adapter = apply_update(adapter, mean, optimizer, step)
    return adapter


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_continues_bit_for_bit(name: Name, stop: int) -> None:
    chosen = {"method": "ffa", "optimizer": name, "schedule": {"shape": "linear", "warmup": 0.2}}
    start = random_adapter(spec_of(), np.random.default_rng(9))
    whole = steps(start, optimizer_of(start.spec, **chosen), 0, 7)

    stopped = optimizer_of(start.spec, **chosen)
    halfway = steps(start, stopped, 0, stop)
    document, arrays = stopped.state_dict()
    text, data = json.dumps(document), save(arrays)
    steps(halfway, stopped, stop, stop + 1)  # what is saved does not follow the optimizer

    resumed = optimizer_of(start.spec, **chosen)
    loaded = load(data)
    resumed.load_state_dict(json.loads(text), loaded)
    assert steps(halfway, resumed, stop, 7).data == whole.data
    assert save(arrays) == save(loaded) == data


def saved(**chosen: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    adapter = random_adapter(spec_of(), np.random.default_rng(10))
    optimizer = optimizer_of(adapter.spec, method="ffa", **chosen)
    steps(adapter, optimizer, 0, 2)
    return optimizer.state_dict()


Change = Callable[[dict[str, Any], dict[str, Array]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda document, arrays: document.update(optimizer="fedyogi"),
        lambda document, arrays: document.pop("optimizer"),
        lambda document, arrays: document.pop("arrays"),
        lambda document, arrays: arrays.pop(f"v/{B}"),
        lambda document, arrays: arrays.clear(),
        lambda document, arrays: (arrays.pop(f"v/{B}"), document.update(arrays=sorted(arrays))),
        lambda document, arrays: arrays.update({f"v/{B}": np.zeros((3, 5))}),
        lambda document, arrays: arrays.update({f"v/{B}": np.full((5, 3), np.nan)}),
        lambda document, arrays: arrays.update({f"v/{B}": np.zeros((5, 3), np.float32)}),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: Change) -> None:
    document, arrays = saved(optimizer="fedadam")
    change(document, arrays)
    optimizer = optimizer_of(spec_of(), method="ffa", optimizer="fedadam")
    with pytest.raises(StateError):
        optimizer.load_state_dict(document, arrays)
    assert optimizer.state_dict()[1] == {}


def test_fedavg_has_no_state_and_takes_none() -> None:
    document, arrays = saved(optimizer="fedavg")
    assert document == {"optimizer": "fedavg", "arrays": []}
    assert arrays == {}
    _, foreign = saved(optimizer="fedavgm")
    with pytest.raises(StateError):
        optimizer_of(spec_of(), method="ffa").load_state_dict(
            {"optimizer": "fedavg", "arrays": sorted(foreign)}, foreign
        )
