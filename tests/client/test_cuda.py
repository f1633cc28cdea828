"""On a CUDA device: the same gradients, the same noise to the last bit, and the same training as on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from privet.client.site import Resources
from privet.client.training.dp import Clipping, clip_units, hooked_gradients, noisy, per_sample_gradients
from privet.client.training.features import encode_records
from privet.client.training.model import open_host
from privet.client.training.train import (
    Draws,
    TrainingSet,
    draw_noise,
    gradient_sum,
    noise_ahead,
    step_batches,
    train_round,
)
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness, gaussian_release
from privet.common.study.sections import PrivacySection
from tests.client.test_persample import ALL_LINEAR, collect, one_by_one, own, prepare, relative
from tests.support.tiny import private, random_adapter, records_of, rows_for, tiny_study

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning"),
]

CPU = Resources(device="cpu", precision="fp32")
GPU = Resources(device="cuda", precision="fp32")
KINDS = {"bert": "text-classification", "gpt2": "causal-lm", "llama": "causal-lm", "qwen2": "token-classification"}


@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize(("family", "kind"), KINDS.items())
def test_per_sample_gradients_are_those_of_the_cpu(
    bases: Mapping[str, Path], family: str, kind: str, method: str
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": method})
    host, features, trained = prepare(study)
    expected = collect(own, host, study, features, trained)
    host, features, trained = prepare(study, GPU)
    for engine in (own, hooked_gradients):
        found = collect(engine, host, study, features, trained)
        assert found.device.type == "cuda"
        assert relative(found.cpu(), expected, trained) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_gradients_are_as_exact_as_plain_ones(bases: Mapping[str, Path], checkpointing: bool) -> None:
    extra = {"task.kind": "causal-lm", "aggregation.method": "fedavg", "lora.targets": ALL_LINEAR}
    study = tiny_study(bases["llama"], **extra)
    host, features, trained = prepare(study)
    exact = one_by_one(host, study, features, trained)
    resources = Resources(device="cuda", precision="bf16")
    host, features, trained = prepare(study, resources)
    plain = one_by_one(host, study, features, trained).cpu()
    resources = resources.model_copy(update={"gradient_checkpointing": checkpointing})
    host, features, trained = prepare(study, resources)
    found = collect(own, host, study, features, trained)
    assert found.dtype == torch.float32
    usual = float((plain - exact).norm())
    assert usual > 1e-3 * float(exact.norm()), "nothing was rounded"
    assert float((found.cpu() - exact).norm()) < 1.25 * usual


@pytest.mark.parametrize("stability", [None, 0.01])
def test_units_are_clipped_as_on_the_cpu_and_a_broken_one_counts_for_nothing(stability: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(6, 40_000, generator=generator) * 10.0 ** torch.arange(-3, 3).unsqueeze(1)
    gradients[2, 7] = torch.nan
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    expected, norms = clip_units([gradients], owner, 4, 0.5, stability)
    found, found_norms = clip_units([gradients.cuda()], owner.cuda(), 4, 0.5, stability)
    assert torch.allclose(found.cpu(), expected, rtol=1e-6, atol=1e-9)
    assert torch.allclose(found_norms.cpu(), norms, rtol=1e-6, equal_nan=True)
    assert bool(found.isfinite().all())
    assert float(found.norm()) <= 3 * 0.5


@pytest.mark.parametrize("deviation", [1e-6, 0.37, 1e5])
def test_noise_is_that_of_the_proof_to_the_last_bit(deviation: float) -> None:
    total = np.random.default_rng(3).normal(0, 100 * deviation, 100_003)
    expected = gaussian_release(total, deviation, SeededRandomness(5))
    drawn = SeededRandomness(5).lattice_normal(total.size)
    found = noisy(torch.from_numpy(total).cuda(), deviation, drawn)
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


def test_a_steps_sum_stays_on_the_device_and_does_not_depend_on_the_physical_batch(bases: Mapping[str, Path]) -> None:
    study = tiny_study(bases["bert"], privacy=private(clip_norm=0.3))
    host, features, trained = prepare(study, GPU)
    units = {row: [row] for row in range(len(features))}
    totals = []
    for size in (1, 3, 32):
        with per_sample_gradients(host.model, trained) as collected:
            summed = gradient_sum(host, study, step_batches(features, units, size), trained, Clipping(collected, 0.3))
        assert summed.gradient.device.type == "cuda"
        totals.append(summed.gradient)
    for other in totals[1:]:
        assert float((other - totals[0]).norm()) < 1e-5 * float(totals[0].norm())
