"""The head that a head start's sums give: right without noise, modest with it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from privet.common.errors import DivergedError
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.server.rounds.headstart import class_means, head_of, started
from privet.server.rounds.participants import RoundSum
from tests.support.masked_world import masked_study

CLASSES, WIDTH, UNITS = 4, 64, 400
Array = NDArray[np.float64]


def world(seed: int = 0, share: tuple[float, ...] = (0.25,) * CLASSES) -> tuple[Array, NDArray[np.int64]]:
    """Return features of norm root(WIDTH) around class means that share a large common part, and their classes."""
    rng = np.random.default_rng(seed)
    middles = 2 * np.eye(WIDTH)[0] + 0.7 * np.linalg.qr(rng.standard_normal((WIDTH, CLASSES)))[0].T
    labels = rng.choice(CLASSES, UNITS, p=share)
    features = middles[labels] + 0.15 * rng.standard_normal((UNITS, WIDTH))
    return WIDTH**0.5 * features / np.linalg.norm(features, axis=1, keepdims=True), labels


def sums_of(features: Array, labels: NDArray[np.int64]) -> Array:
    """Return the class sums of units with one record each."""
    found = np.zeros((CLASSES, WIDTH + 1))
    for row, label in zip(features, labels, strict=True):
        term = np.append(row / WIDTH**0.5, COUNT_WEIGHT)
        found[label] += term / np.linalg.norm(term)
    return found


@pytest.fixture
def sums() -> Array:
    """The class sums of 400 units."""
    return sums_of(*world())


def noisy(sums: Array, deviation: float, seed: int = 0) -> Array:
    """Return sums with noise."""
    return sums + deviation * np.random.default_rng(seed).standard_normal(sums.shape)


def test_without_noise_it_tells_the_classes_apart(sums: Array) -> None:
    features, labels = world()
    weights, biases = class_means(sums, 0.0)
    logits = features @ weights.T + biases
    assert (logits.argmax(1) == labels).mean() > 0.97
    # The logits are of a size that a loss can start from.
    assert 2 < np.abs(logits - logits.mean(1, keepdims=True)).max(1).mean() < 12


def test_noise_makes_the_logits_flatter(sums: Array) -> None:
    features, _ = world()
    spread = []
    for deviation in (0.0, 3.0, 10.0, 300.0):
        weights, biases = class_means(noisy(sums, deviation), deviation)
        spread.append((features @ weights.T + biases).std(1).mean())
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 1  # noise alone teaches next to nothing


def test_a_rare_class_that_noise_covers_is_not_predicted() -> None:
    features, labels = world(share=(0.5, 0.25, 0.248, 0.002))
    wins = 0
    for seed in range(5):
        weights, biases = class_means(noisy(sums_of(features, labels), 4.0, seed), 4.0)
        wins += int(((features @ weights.T + biases).argmax(1) == 3).sum())
    assert wins < 0.05 * 5 * UNITS


def test_negative_counts_are_survived() -> None:
    weights, biases = class_means(np.full((CLASSES, WIDTH + 1), -3.0), 1.0)
    assert np.isfinite([*weights.ravel(), *biases]).all()
    weights, biases = class_means(np.zeros((CLASSES, WIDTH + 1)), 0.0)
    assert np.isfinite([*weights.ravel(), *biases]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_values_are_those_of_the_heads_tensors(sums: Array, bias: bool) -> None:
    named = "base_model.model.classifier."
    tensors = [TensorSpec(f"{named}weight", (CLASSES, WIDTH), "full"), TensorSpec("x.lora_A.w", (2, 4), "lora_A")]
    if bias:
        tensors.append(TensorSpec(f"{named}bias", (CLASSES,), "full"))
    spec = AdapterSpec.of(tensors)
    assert spec.class_sums().shape == (CLASSES, WIDTH + 1)
    found = head_of(spec, sums.ravel(), 0.5)
    weights, biases = class_means(sums, 0.5)
    assert set(found) == {t.name for t in tensors if t.role == "full"}
    assert found[f"{named}weight"] == pytest.approx(weights, rel=1e-6)
    if bias:
        assert found[f"{named}bias"] == pytest.approx(biases, rel=1e-5)


def test_an_adapter_without_a_head_has_no_class_sums() -> None:
    with pytest.raises(ValueError, match="one head"):
        AdapterSpec.of([TensorSpec("x.lora_A.w", (2, 4), "lora_A")]).class_sums()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_sums_that_give_no_finite_head_end_the_run(value: float) -> None:
    """Attack: sums that no check before has refused. A head of NaN would be published, and all would carry it on."""
    tensor = TensorSpec("base_model.model.classifier.weight", (CLASSES, WIDTH), "full")
    spec = AdapterSpec.of([tensor])
    adapter = Adapter(spec, {tensor.name: np.zeros(tensor.shape, np.float32)})
    sums = np.full(spec.class_sums().size, value)
    total = RoundSum(1.0, sums, np.empty(0), ("a", "b"), {})
    with pytest.raises(DivergedError, match="the head of the head start"):
        started(masked_study(privacy={"mode": "none"}), adapter, total)
