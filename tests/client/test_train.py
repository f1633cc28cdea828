"""A round of local training: it moves, it is reproducible, and its noise is what the accountant was told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy import stats

from privet.client.site import Resources
from privet.client.training.dp import Clipping, per_sample_gradients
from privet.client.training.features import IGNORED, Feature, Pair, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import _host, initial_adapter, open_host
from privet.client.training.tasks import evaluate
from privet.client.training.train import (
    Draws,
    Steps,
    TrainingSet,
    check_room,
    clipping_of,
    draw_step,
    prepare,
    term_sum,
    train_round,
)
from privet.common.errors import DivergedError, StateError
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.privacy.noise import SeededRandomness
from privet.common.privacy.schedule import rate_factor
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from tests.client.test_dp import single_passes
from tests.support.losses import one_by_one
from tests.support.tiny import private, random_adapter, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
SGD = {"training.optimizer": "sgd", "training.learning_rate": 0.1}
Vector = NDArray[np.float64]


def training_set(study: Study, host: ModelHost, rows: int = 24, declared: int | None = None) -> TrainingSet:
    records = records_of(study, rows_for(study, rows, seed=3))
    by_patient = study.privacy.unit == "patient"
    units = list(records.by_unit().values()) if by_patient else [[row] for row in range(rows)]
    return TrainingSet(encode_records(study, host.tokenizer, records), units, declared or len(units))


def draws(seed: int = 0) -> Draws:
    return Draws(SeededRandomness(seed, "sampling"), SeededRandomness(seed, "noise"))


def mechanism(study: Study, noise_multiplier: float = 1.0) -> PrivacyEvent | None:
    if not study.private:
        return None
    return PrivacyEvent(noise_multiplier, study.training.sampling_rate, study.training.steps, "record")


def run(
    study: Study,
    *,
    seed: int = 0,
    adapter: Adapter | None = None,
    data: TrainingSet | None = None,
    noise_multiplier: float = 1.0,
    first_step: int = 0,
    resources: Resources = CPU,
) -> Vector:
    """Return one round's update in float64."""
    host = open_host(study, resources)
    update = train_round(
        host,
        study,
        adapter or initial_adapter(study, host),
        data or training_set(study, host),
        draws(seed),
        first_step=first_step,
        mechanism=mechanism(study, noise_multiplier),
        physical_batch=resources.physical_batch,
    )
    assert update.dtype == np.float32
    return update.astype(np.float64)


def distance(one: Vector, other: Vector) -> float:
    """Return the L2 distance relative to `other`."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def split(study: Study, update: Vector) -> dict[str, Vector]:
    trained = open_host(study, CPU).spec.trained(study.aggregation.method)
    ends = np.cumsum([tensor.size for tensor in trained])
    return dict(zip([t.name for t in trained], np.split(update, ends[:-1]), strict=True))


PRIVACY = {"none": {"mode": "none"}, "local": private()}


# --- what a round changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRIVACY)
@pytest.mark.parametrize("method", ["ffa", "fedsvd", "fedavg"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_adapter_moves_and_frozen_parameters_do_not(
    bases: Mapping[str, Path], family: str, method: str, mode: str
) -> None:
    # Opacus issue 820: gradients of stale parameters, a healthy looking run and an adapter that never moves.
    study = tiny_study(bases[family], privacy=PRIVACY[mode], **{"aggregation.method": method})
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec, seed=2)
    before = {name: p.detach().clone() for name, p in host.model.named_parameters()}
    update = run(study, adapter=adapter)
    trained = host.spec.trained(method)
    assert update.size == sum(tensor.size for tensor in trained)
    for name, part in split(study, update).items():
        assert np.abs(part).max() > 1e-4, name
        after = host.parameters[name].detach().numpy().ravel()
        np.testing.assert_allclose(after, adapter.values[name].ravel() + part, atol=1e-6)
    for name, _ in host.spec.pairs():
        same = np.array_equal(host.parameters[name].detach().numpy(), adapter.values[name])
        assert same == (method != "fedavg")
    mine = {id(parameter) for parameter in host.parameters.values()}
    for name, parameter in host.model.named_parameters():
        if id(parameter) not in mine:
            assert torch.equal(parameter, before[name]), name


def test_a_fresh_adapter_moves_b_and_head_in_the_first_round(bert: Path) -> None:
    # With B and the head both zero, B's gradient is zero until the head has moved.
    study = tiny_study(bert, **{"training.local_steps": 4})
    for name, part in split(study, run(study)).items():
        assert np.abs(part).max() > 0, name


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "text-classification"), ("llama", "token-classification"), ("qwen2", "causal-lm")],
)
def test_training_lowers_the_loss(bases: Mapping[str, Path], family: str, kind: str) -> None:
    change = {"task.kind": kind, "training.local_steps": 25, "training.sampling_rate": 0.5}
    study = tiny_study(bases[family], **change)
    host = open_host(study, CPU)
    data = training_set(study, host)
    start = initial_adapter(study, host)
    host.mount(start)
    before = evaluate(host, study, data.features).metrics(study.task.labels)["loss"]
    run(study, data=data)
    after = evaluate(host, study, data.features).metrics(study.task.labels)["loss"]
    assert after < 0.7 * before


# --- determinism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRIVACY)
def test_the_same_seed_gives_the_same_bits(bert: Path, mode: str) -> None:
    study = tiny_study(bert, privacy=PRIVACY[mode])
    first = run(study, seed=4)
    run(study, seed=5, adapter=random_adapter(open_host(study, CPU).spec))
    assert np.array_equal(run(study, seed=4), first)
    assert not np.array_equal(run(study, seed=5), first)


def test_a_round_carries_nothing_over_from_the_site_before(bert: Path) -> None:
    # Sites of one process share the model: a gradient left on it would be one site's data in another's update.
    study = tiny_study(bert, **{"training.local_steps": 1})
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    first = run(study, adapter=adapter)
    data = training_set(study, host)
    other = TrainingSet(data.features[:3], data.units[:3], 3)
    run(study, seed=8, data=other)
    for parameter in host.parameters.values():
        parameter.grad = torch.full_like(parameter, 1e3)
    assert np.array_equal(run(study, adapter=adapter), first)


def test_two_hosts_of_one_base_give_the_same_bits(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    here = open_host(study, CPU)
    first = run(study)
    elsewhere = tiny_study(Path(shutil.copytree(bert, tmp_path / "copy")), privacy=private())
    torch.manual_seed(123)  # a process that has used its generator otherwise
    assert open_host(elsewhere, CPU) is not here
    assert open_host(elsewhere, CPU).spec.digest == here.spec.digest
    assert np.array_equal(run(elsewhere), first)
    _host.cache_clear()
    assert np.array_equal(run(study), first)


@pytest.mark.parametrize("mode", PRIVACY)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(bases: Mapping[str, Path], family: str, mode: str) -> None:
    study = tiny_study(bases[family], privacy=PRIVACY[mode], **SGD)
    spec = open_host(study, CPU).spec
    plain = run(study, adapter=random_adapter(spec), noise_multiplier=0.01)
    saving = CPU.model_copy(update={"gradient_checkpointing": True})
    found = run(study, adapter=random_adapter(spec), resources=saving, noise_multiplier=0.01)
    assert np.array_equal(found, plain)
    with single_passes(open_host(study, CPU), "single"):
        plain = run(study, adapter=random_adapter(spec), noise_multiplier=0.01)
    with single_passes(open_host(study, saving), "single"):
        found = run(study, adapter=random_adapter(spec), resources=saving, noise_multiplier=0.01)
    assert np.array_equal(found, plain)


@pytest.mark.parametrize("mode", PRIVACY)
def test_the_physical_batch_changes_nothing(llama: Path, mode: str) -> None:
    study = tiny_study(llama, privacy=PRIVACY[mode], **SGD)
    adapter = random_adapter(open_host(study, CPU).spec)
    sizes = [CPU.model_copy(update={"physical_batch": size}) for size in (1, 3, 32)]
    for engine in ("packed", "single"):
        updates = []
        for size in sizes:
            with single_passes(open_host(study, size), engine):
                updates.append(run(study, adapter=adapter, resources=size, noise_multiplier=0.01))
        if mode == "local":
            assert all(np.array_equal(update, updates[0]) for update in updates[1:])
        assert max(distance(update, updates[0]) for update in updates[1:]) < 1e-4


@pytest.mark.parametrize("mode", PRIVACY)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen2"])
def test_passes_of_one_record_train_as_packed_ones_do(bases: Mapping[str, Path], family: str, mode: str) -> None:
    study = tiny_study(bases[family], privacy=PRIVACY[mode], **SGD)
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    packed = run(study, adapter=adapter, noise_multiplier=0.01)
    with single_passes(host, "single"):
        assert 0 < distance(run(study, adapter=adapter, noise_multiplier=0.01), packed) < 1e-4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16_comes_close_to_float32(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family], privacy=private(clip_norm=0.5), **SGD)
    low = CPU.model_copy(update={"precision": "bf16"})
    host = open_host(study, low)
    assert host.autocast is torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in host.parameters.values())
    adapter = random_adapter(host.spec, scale=0.1)
    exact = run(study, adapter=adapter, noise_multiplier=0.001)
    rough = run(study, adapter=adapter, noise_multiplier=0.001, resources=low)
    assert 0 < distance(rough, exact) < 0.1


# --- noise -----------------------------------------------------------------------------------------------


def without_gradient(features: Sequence[Feature]) -> list[Feature]:
    """Return the records with no labelled token: their loss is 0 and so is its gradient."""
    return [Feature(feature.ids, (-100,) * len(feature.ids)) for feature in features]


@pytest.mark.parametrize(("rate", "declared"), [(0.25, 24), (0.25, 100), (1.0, 24)])
@pytest.mark.parametrize("clip_norm", [0.3, 2.0])
def test_the_noise_in_a_gradient_has_deviation_zc_over_the_expected_batch(
    bert: Path, rate: float, declared: int, clip_norm: float
) -> None:
    z, learning_rate, steps = 1.7, 0.1, 9
    study = tiny_study(
        bert,
        privacy=private(clip_norm=clip_norm),
        **SGD,
        **{
            "task.kind": "token-classification",
            "training.local_steps": steps,
            "training.sampling_rate": rate,
        },
    )
    host = open_host(study, CPU)
    full = training_set(study, host, declared=declared)
    data = TrainingSet(without_gradient(full.features), full.units, full.declared)
    updates = np.stack([run(study, seed=seed, data=data, noise_multiplier=z) for seed in range(4)])
    # SGD adds up its steps: -rate * (noise_1 + ... + noise_steps), all coordinates independent.
    deviation = learning_rate * steps**0.5 * z * clip_norm / (rate * declared)
    scaled = updates.ravel() / deviation
    assert stats.kstest(scaled, "norm").pvalue > 1e-3
    assert scaled.var() == pytest.approx(1, abs=5 * (2 / scaled.size) ** 0.5)
    assert np.abs(np.corrcoef(updates) - np.eye(4)).max() < 5 / updates.shape[1] ** 0.5


def test_noise_is_drawn_anew_for_every_step(bert: Path) -> None:
    common = {"task.kind": "token-classification", "training.rounds": 1, **SGD}
    one = tiny_study(bert, privacy=private(), **common, **{"training.local_steps": 1})
    two = tiny_study(bert, privacy=private(), **common, **{"training.local_steps": 2})
    host = open_host(one, CPU)
    full = training_set(one, host)
    data = TrainingSet(without_gradient(full.features), full.units, full.declared)
    first = run(one, data=data)
    second = run(two, data=data) - first
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / first.size**0.5
    assert second.std() == pytest.approx(first.std(), rel=0.2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_round_of_empty_draws_releases_noise_all_the_same(
    bases: Mapping[str, Path], family: str, optimizer: str
) -> None:
    study = tiny_study(
        bases[family],
        privacy=private(),
        **{"training.sampling_rate": 1e-9, "training.optimizer": optimizer, "training.learning_rate": 1e-3},
    )
    update = run(study)
    assert np.isfinite(update).all()
    assert (update != 0).mean() > 0.99
    if optimizer == "sgd":
        # Of the size that the expected batch gives it, as for any other step.
        expected = 1e-3 * study.training.steps**0.5 / (1e-9 * 24)
        assert update.std() == pytest.approx(expected, rel=0.2)


def test_without_privacy_an_empty_draw_is_a_step_of_zero(bert: Path) -> None:
    study = tiny_study(bert, **SGD, **{"training.sampling_rate": 1e-9})
    assert not run(study).any()


@pytest.mark.parametrize("mode", PRIVACY)
def test_the_first_batch_may_be_empty(llama: Path, mode: str) -> None:
    study = tiny_study(
        llama, privacy=PRIVACY[mode], **SGD, **{"training.sampling_rate": 0.05, "training.local_steps": 4}
    )
    data = training_set(study, open_host(study, CPU), rows=10)

    def sizes(seed: int) -> list[int]:
        sampling = draws(seed).sampling
        return [len(draw_step(study, data, sampling)) for _ in range(4)]

    seed = next(seed for seed in range(100) if sizes(seed)[0] == 0 and sum(sizes(seed)) > 0)
    update = run(study, seed=seed, data=data)
    assert np.isfinite(update).all()
    assert update.any()


# --- the step, by hand -----------------------------------------------------------------------------------


def batch_gradient(study: Study, adapter: Adapter, data: TrainingSet, rows: Sequence[int]) -> Vector:
    """Return the sum of the rows' gradients by plain autograd, one record at a time."""
    host = open_host(study, CPU)
    host.mount(adapter)
    parameters = [p for _, p in host.train_only(host.spec.trained(study.aggregation.method))]
    found: Vector = one_by_one(host, [data.features[row] for row in rows], parameters).double().sum(0).numpy()
    return found


@pytest.mark.parametrize("declared", [24, 20, 300])
@pytest.mark.parametrize("mode", PRIVACY)
def test_a_step_divides_by_the_expected_batch_and_never_by_the_drawn_one(bert: Path, mode: str, declared: int) -> None:
    # A clip norm above every gradient, and as little noise as 64 bits hold: what is left is the plain gradient sum.
    allowed = 3e-3 if mode == "local" else 1e-4
    privacy = private(clip_norm=40.0) if mode == "local" else PRIVACY[mode]
    study = tiny_study(bert, privacy=privacy, **SGD, **{"training.local_steps": 1})
    host = open_host(study, CPU)
    data = training_set(study, host, declared=declared)
    adapter = random_adapter(host.spec)
    for seed in range(3):
        drawn = draw_step(study, data, draws(seed).sampling)
        assert drawn
        expected = -0.1 * batch_gradient(study, adapter, data, list(drawn)) / (0.25 * declared)
        found = run(study, seed=seed, adapter=adapter, data=data, noise_multiplier=1e-5)
        assert distance(found, expected) < allowed


def test_clipping_bounds_a_step_by_the_number_of_units_drawn(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(clip_norm=0.01), **SGD, **{"training.local_steps": 1})
    host = open_host(study, CPU)
    data = training_set(study, host)
    drawn = len(draw_step(study, data, draws().sampling))
    # No less noise: on the lattice of still less, terms would be too large for 64 bits. A study never has below 0.3.
    update = run(study, data=data, adapter=random_adapter(host.spec), noise_multiplier=1e-5)
    bound = 0.1 * drawn * 0.01 / (0.25 * 24)
    assert 0.3 * bound < np.linalg.norm(update) <= bound


def test_a_patients_rows_are_drawn_together_and_at_most_so_many(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(unit="patient", max_records_per_unit=2), **{"data.unit": "patient"})
    data = training_set(study, open_host(study, CPU))
    assert {len(rows) for rows in data.units} == {3}
    sampling = draws().sampling
    seen: set[int] = set()
    for _ in range(200):
        for unit, rows in draw_step(study, data, sampling).items():
            assert len(rows) == 2
            assert set(rows) <= set(data.units[unit])
            seen |= set(rows)
    assert seen == set(range(24))


def test_without_patients_every_row_is_drawn_alone(bert: Path) -> None:
    study = tiny_study(bert, privacy=private())
    data = training_set(study, open_host(study, CPU))
    assert all(rows == [unit] for unit, rows in draw_step(study, data, draws().sampling).items())


# --- records that are not finite -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in which the last token's embedding is NaN: texts with it have no finite loss."""
    base = Path(shutil.copytree(bert, tmp_path_factory.mktemp("poisoned") / "base"))
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][-1] = np.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def with_bad_record(study: Study, at: int) -> tuple[TrainingSet, TrainingSet]:
    """Return a set whose record `at` is not finite, and the same without it; the good records are finite."""
    host = open_host(study, CPU)
    clean = training_set(study, host, rows=9)
    vocabulary = len(host.tokenizer)
    features = [f for f in clean.features if vocabulary - 1 not in f.ids][:6]
    bad = Feature((2, vocabulary - 1, 3), 0)
    mixed = [*features[:at], bad, *features[at:]]
    units = [[row] for row in range(len(mixed))]
    return TrainingSet(mixed, units, 6), TrainingSet(features, units[:-1], 6)


@pytest.mark.parametrize("at", [0, 3])
def test_with_privacy_a_record_without_a_finite_loss_counts_as_zero(poisoned: Path, at: int) -> None:
    study = tiny_study(poisoned, privacy=private(), **SGD, **{"training.sampling_rate": 1.0})
    mixed, clean = with_bad_record(study, at)
    adapter = random_adapter(open_host(study, CPU).spec)
    with_it = run(study, data=mixed, adapter=adapter)
    without = run(study, data=clean, adapter=adapter)
    assert np.isfinite(with_it).all()
    assert np.array_equal(with_it, without)


def test_without_privacy_it_stops_the_round(poisoned: Path) -> None:
    study = tiny_study(poisoned, **{"training.sampling_rate": 1.0})
    mixed, clean = with_bad_record(study, 2)
    run(study, data=clean)
    with pytest.raises(DivergedError, match="diverged at step 1 of 3"):
        run(study, data=mixed)


# --- the optimizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_the_schedule_runs_over_the_whole_study(bert: Path, shape: str) -> None:
    schedule = {"shape": shape, "warmup": 0.25, "floor": 0.1}
    common = {**SGD, "training.sampling_rate": 1.0, "training.schedule": schedule}
    study = tiny_study(bert, **common, **{"training.rounds": 8, "training.local_steps": 1})
    adapter = random_adapter(open_host(study, CPU).spec)
    full = tiny_study(bert, **SGD, **{"training.sampling_rate": 1.0, "training.local_steps": 1})
    whole = run(full, adapter=adapter)
    for step in range(8):
        factor = rate_factor(study.training.schedule, step, 8)
        found = run(study, adapter=adapter, first_step=step)
        assert distance(found, factor * whole) < 1e-5


def test_rounds_of_many_steps_continue_the_schedule(bert: Path) -> None:
    schedule = {"shape": "linear", "warmup": 0.3}
    common = {**SGD, "training.sampling_rate": 1.0, "training.schedule": schedule}
    long = tiny_study(bert, **common, **{"training.rounds": 1, "training.local_steps": 6})
    short = tiny_study(bert, **common, **{"training.rounds": 2, "training.local_steps": 3})
    host = open_host(long, CPU)
    adapter = random_adapter(host.spec)
    at_once = run(long, adapter=adapter)
    first = run(short, adapter=adapter)
    names = [tensor.name for tensor in host.spec.trained(short.aggregation.method)]
    moved = {name: host.parameters[name].detach().numpy().copy() for name in names}
    second = run(short, adapter=adapter.replace(moved), first_step=3)
    assert distance(first + second, at_once) < 1e-4


def test_the_head_has_a_learning_rate_of_its_own(bert: Path) -> None:
    common = {**SGD, "training.local_steps": 1}
    same = tiny_study(bert, **common)
    faster = tiny_study(bert, **common, **{"training.head_learning_rate": 0.3})
    adapter = random_adapter(open_host(same, CPU).spec)
    one, other = split(same, run(same, adapter=adapter)), split(faster, run(faster, adapter=adapter))
    for name, part in one.items():
        factor = 3.0 if ".classifier." in name else 1.0
        np.testing.assert_allclose(other[name], factor * part, rtol=1e-3, atol=1e-6)


def test_adamw_starts_each_round_with_fresh_state(bert: Path) -> None:
    study = tiny_study(bert, **{"training.local_steps": 1})
    adapter = random_adapter(open_host(study, CPU).spec)
    first = run(study, adapter=adapter)
    # The first step of Adam moves every coordinate with a gradient by the learning rate.
    assert np.quantile(np.abs(first), [0.05, 1.0]) == pytest.approx([0.02, 0.02], rel=1e-3)
    assert np.array_equal(run(study, adapter=adapter), first)


def _decay(study: dict[str, Any], value: float) -> dict[str, Any]:
    return {**study, "training.weight_decay": value}


def _momentum(study: dict[str, Any], value: float) -> dict[str, Any]:
    return {**study, "training.momentum": value}


@pytest.mark.parametrize("change", [_decay, _momentum])
def test_weight_decay_and_momentum_take_effect(
    bert: Path, change: Callable[[dict[str, Any], float], dict[str, Any]]
) -> None:
    adapter = random_adapter(open_host(tiny_study(bert), CPU).spec)
    plain = run(tiny_study(bert, **SGD), adapter=adapter)
    assert distance(run(tiny_study(bert, **change(SGD, 0.5)), adapter=adapter), plain) > 0.01


@pytest.mark.parametrize("mode", PRIVACY)
def test_fedprox_pulls_back_to_where_the_round_started(bert: Path, mode: str) -> None:
    norms = []
    for mu in (0.0, 0.5, 2.0, 8.0):
        change = {**SGD, "training.local_steps": 8, "training.fedprox_mu": mu}
        study = tiny_study(bert, privacy=PRIVACY[mode], **change)
        adapter = random_adapter(open_host(study, CPU).spec)
        norms.append(float(np.linalg.norm(run(study, adapter=adapter, noise_multiplier=0.01))))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.8 * norms[0]


def test_fedprox_adds_mu_times_the_distance_to_the_gradient(bert: Path) -> None:
    mu, rate, steps = 3.0, 0.1, 2
    common = {"task.kind": "token-classification", "training.rounds": 1, **SGD, "training.local_steps": steps}
    free = tiny_study(bert, privacy=private(), **common)
    bound = tiny_study(bert, privacy=private(), **common, **{"training.fedprox_mu": mu})
    single = tiny_study(bert, privacy=private(), **{**common, "training.local_steps": 1})
    full = training_set(free, open_host(free, CPU))
    data = TrainingSet(without_gradient(full.features), full.units, full.declared)
    # On noise alone: w1 = g1, and the second step adds mu * w1 to its gradient.
    first, both = run(single, data=data), run(free, data=data)
    assert distance(run(bound, data=data), both - rate * mu * first) < 1e-4


def test_dropout_is_off_unless_the_study_asks_for_it(bert: Path) -> None:
    still = tiny_study(bert, **SGD)
    torch.manual_seed(1)
    first = run(still)
    torch.manual_seed(2)
    assert np.array_equal(run(still), first)
    adapter = random_adapter(open_host(still, CPU).spec)
    for name in ("training.dropout", "lora.dropout"):
        shaky = tiny_study(bert, **SGD, **{name: 0.3})
        open_host(shaky, CPU)  # loading draws random numbers as well
        torch.manual_seed(1)
        first = run(shaky, adapter=adapter)
        torch.manual_seed(2)
        assert not np.array_equal(run(shaky, adapter=adapter), first)
        torch.manual_seed(1)
        assert np.array_equal(run(shaky, adapter=adapter), first)


def test_a_step_whose_sum_could_wrap_around_is_refused() -> None:
    clipping = Clipping(1.0, 2.0**-40)
    # At a rate of 1, all 2^20 units may be drawn, each with 2^40 at most.
    check_room(clipping, 2**20, 1.0, 2**60 + 1)
    with pytest.raises(StateError, match="could exceed what 64 bits hold"):
        check_room(clipping, 2**20, 1.0, 2**60)
    # At a small rate, as many as are ever drawn: far fewer than there are.
    check_room(clipping, 2**30, 2.0**-20, 2**54)


def test_tiny_values_count_whatever_a_library_has_switched_off(bert: Path) -> None:
    host = open_host(tiny_study(bert), Resources(device="cpu", precision="fp32"))
    tiny = torch.tensor([1e-39])
    torch.set_flush_denormal(True)
    try:
        with host.passing(training=False):
            assert float(tiny * 0.5) > 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", ["causal-lm", "preference"])
def test_a_record_that_teaches_nothing_has_a_term_of_zero(kind: str, bases: Mapping[str, Path]) -> None:
    study = tiny_study(bases["llama"], **{"task.kind": kind, "privacy": private()})
    host = open_host(study, CPU)
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 5)))
    blank = Feature((host.tokenizer.pad_token_id,), (IGNORED,))
    if kind == "preference":
        blank = Pair(blank.ids, blank.labels, blank)

    def total(chosen: Sequence[Feature]) -> torch.Tensor:
        data = TrainingSet(chosen, [[row] for row in range(len(chosen))], 10)
        prepare(host, data, 64)
        host.mount(random_adapter(host.spec, 1))
        steps = Steps(host, study, data, [parameter for _, parameter in host.train_only(host.spec.tensors)], 64)
        collecting = per_sample_gradients(host.model, steps.parameters, packed=host.shape.packed)
        with host.passing(training=True), collecting as collected:
            drawn = {row: [row] for row in range(len(chosen))}
            return term_sum(steps, drawn, collected, clipping_of(study.privacy, 1.0, 1.0)).total

    assert total(features).any()
    assert torch.equal(total(features), total([*features[:2], blank, *features[2:]]))
    assert not total([blank]).any()
