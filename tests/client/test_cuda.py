"""On a CUDA device: the same gradients, the same noise to the last bit, and the same training as on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from privet.client.site import Resources
from privet.client.training.dp import Clipping, TermSum, noisy
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.quantised import QuantisedLinear, quantised_digest
from privet.client.training.train import Draws, TrainingSet, clipping_of, draw_noise, noise_ahead, train_round
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness, cut, lattice_release, lattice_unit
from privet.common.study.sections import PrivacySection, Quantisation
from tests.client.test_dp import is_within, step_terms
from tests.client.test_persample import ALL_LINEAR, ENGINES, collect, prepare, relative, shaped
from tests.support.losses import one_by_one
from tests.support.tiny import private, random_adapter, records_of, rows_for, sha256_table, tiny_study

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CPU = Resources(device="cpu", precision="fp32")
GPU = Resources(device="cuda", precision="fp32")

KINDS = {"bert": "text-classification", "gpt2": "causal-lm", "llama": "causal-lm", "qwen2": "token-classification"}


def quantised_layers(host: ModelHost) -> list[QuantisedLinear]:
    return [module for module in host.model.modules() if isinstance(module, QuantisedLinear)]


@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize(("family", "kind"), KINDS.items())
def test_per_sample_gradients_are_those_of_the_cpu(
    bases: Mapping[str, Path], family: str, kind: str, method: str
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": method})
    host, features, trained = prepare(study)
    expected = collect(host, features, trained)
    host, features, trained = prepare(study, GPU)
    for engine in ENGINES:
        with shaped(host, engine):
            found = collect(host, features, trained)
        assert found.device.type == "cuda"
        assert relative(found.cpu(), expected, trained) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_in_few_bits_have_the_values_and_gradients_of_the_cpu(
    bases: Mapping[str, Path], kind: Quantisation
) -> None:
    base = bases["llama"]
    few = {"model.quantisation": kind, "model.quantised": quantised_digest(base, sha256_table(base), kind)}
    study = tiny_study(base, **{"task.kind": "causal-lm", "lora.targets": ALL_LINEAR, **few})
    host, features, trained = prepare(study)
    expected, layers = collect(host, features, trained), quantised_layers(host)
    host, features, trained = prepare(study, GPU)
    assert relative(collect(host, features, trained).cpu(), expected, trained) < 1e-4
    for ours, theirs in zip(quantised_layers(host), layers, strict=True):
        assert ours.packed.device.type == "cuda"
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ours.values(dtype).cpu(), theirs.values(dtype))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_gradients_are_as_exact_as_plain_ones(bases: Mapping[str, Path], checkpointing: bool) -> None:
    extra = {"task.kind": "causal-lm", "aggregation.method": "fedavg", "lora.targets": ALL_LINEAR}
    study = tiny_study(bases["llama"], **extra)
    host, features, trained = prepare(study)
    exact = one_by_one(host, features, trained)
    resources = Resources(device="cuda", precision="bf16")
    host, features, trained = prepare(study, resources)
    plain = one_by_one(host, features, trained).cpu()
    resources = resources.model_copy(update={"gradient_checkpointing": checkpointing})
    host, features, trained = prepare(study, resources)
    usual = float((plain - exact).norm())
    assert usual > 1e-3 * float(exact.norm()), "nothing was rounded"
    for engine in ENGINES:
        with shaped(host, engine):
            found = collect(host, features, trained)
        assert found.dtype == torch.float32
        assert float((found.cpu() - exact).norm()) < 1.25 * usual


@pytest.mark.parametrize("stability", [None, 0.01])
def test_units_are_clipped_as_on_the_cpu_and_a_broken_one_counts_for_nothing(stability: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(6, 40_000, generator=generator) * 10.0 ** torch.arange(-3, 3).unsqueeze(1)
    gradients[2, 7] = torch.nan
    rows = [2, 2, 1, 2, 2, 1]
    clipping = Clipping(0.5, lattice_unit(0.5), stability)

    def summed(device: str, chosen: list[int]) -> TermSum:
        terms = TermSum(clipping, torch.zeros(40_000, dtype=torch.int64, device=device))
        terms.add(gradients[chosen].to(device), [rows[row] for row in chosen])
        return terms

    everyone = [0, 1, 2, 3, 4, 5]
    expected, found = summed("cpu", everyone), summed("cuda", everyone)
    assert found.total.device.type == "cuda"
    # A norm's last bit differs between devices, by which a value can fall into the next cell of the lattice.
    difference = (found.total.cpu() - expected.total).double().norm()
    assert float(difference) <= 1e-9 * float(expected.total.double().norm())
    assert found.balance == expected.balance
    # On one device, the sum is that of the units alone.
    alone = [summed("cuda", unit).total for unit in ([0, 1], [2], [3, 4], [5])]
    assert torch.equal(found.total, torch.stack(alone).sum(0))
    assert not alone[1].any()
    assert all(is_within(terms.cpu(), clipping) for terms in alone)


@pytest.mark.parametrize("deviation", [1e-6, 0.37, 1e5])
def test_noise_is_that_of_the_proof_to_the_last_bit(deviation: float) -> None:
    unit = lattice_unit(deviation)
    points = cut(np.random.default_rng(3).normal(0, 100 * deviation, 100_003), unit)
    expected = lattice_release(points, unit, SeededRandomness(5))
    found = noisy(torch.from_numpy(points).cuda(), unit, SeededRandomness(5).lattice_normal(points.size))
    assert found.device.type == "cuda"
    assert np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_noise_drawn_ahead_is_the_streams_in_its_order(clipping: str) -> None:
    privacy = PrivacySection.model_validate(private(clipping=clipping))
    ahead, stream = SeededRandomness(2), SeededRandomness(2)
    for _ in range(3):
        drawn = noise_ahead(torch.device("cuda"), privacy, 70_000, ahead)()
        expected = draw_noise(privacy, 70_000, stream)
        assert np.array_equal(drawn.gradient, expected.gradient)
        assert np.array_equal(drawn.balance, expected.balance)


@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "adaptive"])
def test_a_private_round_is_the_cpus_and_the_same_each_time(
    bases: Mapping[str, Path], clipping: str, method: str
) -> None:
    steps = {"training.local_steps": 3, "training.optimizer": "sgd", "training.learning_rate": 0.05}
    study = tiny_study(bases["bert"], privacy=private(clipping=clipping), **{"aggregation.method": method, **steps})
    updates = []
    mechanism = plan(study)
    assert mechanism is not None
    for resources in (CPU, GPU, GPU):
        host = open_host(study, resources)
        features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 24, seed=3)))
        data = TrainingSet(features, [[row] for row in range(24)], 24)
        draws = Draws(SeededRandomness(1, "sampling"), SeededRandomness(1, "noise"))
        with host.lock:
            updates.append(
                train_round(
                    host, study, random_adapter(host.spec), data, draws,
                    first_step=0, mechanism=mechanism.training, physical_batch=8,
                )
            )  # fmt: skip
    cpu, first, second = updates
    assert np.array_equal(first, second)
    assert np.linalg.norm(first - cpu) < 1e-3 * np.linalg.norm(cpu)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_steps_sum_stays_on_the_device_and_no_bit_depends_on_the_physical_batch(
    bases: Mapping[str, Path], precision: str, engine: str
) -> None:
    study = tiny_study(bases["bert"], privacy=private(clip_norm=0.3))
    host, features, _ = prepare(study, GPU.model_copy(update={"precision": precision}))
    units = {row: [row] for row in range(len(features))}
    clipping = clipping_of(study.privacy, 0.3, 1.0)
    with shaped(host, engine):
        totals = [step_terms(host, study, features, units, clipping, most).total for most in (1, 3, 32)]
        assert totals[0].device.type == "cuda"
        assert all(torch.equal(other, totals[0]) for other in totals[1:])
        rest = {row: [row] for row in units if row != 2}
        without = step_terms(host, study, features, rest, clipping).total
        own = step_terms(host, study, features, {2: [2]}, clipping).total
    assert torch.equal(totals[0] - without, own)
    assert is_within(own.cpu(), clipping)
