"""Private gradients: one unit moves a sum by at most C, batches do not matter, noise is noise."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from privet.client.site import Resources
from privet.client.training.dp import (
    Clipping,
    clip_units,
    draw_rows,
    draw_units,
    noisy,
    per_sample_gradients,
    physical_batches,
)
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.tasks import collate, forward, record_losses, token_losses
from privet.client.training.train import gradient_sum, step_batches
from privet.common.privacy.noise import (
    Randomness,
    SecretRandomness,
    SeededRandomness,
    derive_key,
    derive_seed,
    gaussian_release,
)
from privet.common.study.study import Study
from tests.support.tiny import Row, private, random_adapter, records_of, rows_for, tiny_study

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")

CPU = Resources(device="cpu", precision="fp32")


def clipped_sum(
    gradients: Sequence[torch.Tensor], owner: torch.Tensor | None, units: int, clip_norm: float
) -> torch.Tensor:
    return clip_units(gradients, owner, units, clip_norm)[0]


def prepare(study: Study, rows: int = 7, seed: int = 3) -> tuple[ModelHost, list[Feature]]:
    """Return a host with random adapter values in place, and features of ragged length."""
    host = open_host(study, CPU)
    host.mount(random_adapter(host.spec))
    return host, encode_records(study, host.tokenizer, records_of(study, rows_for(study, rows, seed)))


def trained_parameters(host: ModelHost, study: Study) -> list[nn.Parameter]:
    return [p for _, p in host.train_only(host.spec.trained(study.aggregation.method))]


def per_sample(
    host: ModelHost, study: Study, features: Sequence[Feature], loss: str = "per record"
) -> list[torch.Tensor]:
    """Return [n, size] per trained parameter; `loss` "batch mean" weighs tokens as the model library does."""
    parameters = trained_parameters(host, study)
    with per_sample_gradients(host.model, parameters) as collected:
        batch = collate(host, features)
        logits = forward(host, batch)
        if loss == "per record":
            total = record_losses(study, logits, batch).sum()
        else:
            sums, counts = token_losses(study, logits, batch)
            total = sums.sum() / counts.sum() * len(features)
        total.backward()  # type: ignore[no-untyped-call]
        return by_parameter(collected.take(len(features)), parameters)


def by_parameter(blocks: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Return one tensor [n, size] per parameter."""
    return list(torch.split(torch.cat(list(blocks), dim=1), [p.numel() for p in parameters], dim=1))


# --- sensitivity -----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    clip_norm=st.floats(1e-3, 1e3),
    spread=st.floats(0, 12),
    by_record=st.booleans(),
    data=st.data(),
)
def test_adding_or_removing_a_unit_moves_the_sum_by_at_most_the_clip_norm(
    seed: int,
    rows: list[int],
    sizes: list[int],
    clip_norm: float,
    spread: float,
    by_record: bool,
    data: st.DataObject,
) -> None:
    if by_record:
        rows = [1] * len(rows)
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(rows)), rows)
    # Norms far below, around and far above C, several of them aligned, which is the worst case for a sum.
    scale = clip_norm * 10.0 ** rng.uniform(-spread, spread, (len(owner), 1))
    common = rng.standard_normal(sum(sizes))
    flat = np.where(rng.random((len(owner), 1)) < 0.5, common, rng.standard_normal((len(owner), sum(sizes))))
    flat = (flat * scale).astype(np.float32)
    removed = data.draw(st.integers(0, len(rows) - 1), label="removed")

    def total(kept: Sequence[int]) -> np.ndarray[Any, Any]:
        position = {unit: index for index, unit in enumerate(kept)}
        chosen = [i for i, unit in enumerate(owner) if unit in position]
        parts = np.split(flat[chosen], np.cumsum(sizes)[:-1], axis=1)
        index = None if by_record else torch.tensor([position[owner[i]] for i in chosen], dtype=torch.long)
        gradients = [torch.from_numpy(part.copy()) for part in parts]
        return clipped_sum(gradients, index, len(kept), clip_norm).double().numpy()

    everyone = list(range(len(rows)))
    without = [unit for unit in everyone if unit != removed]
    # Each sum is rounded to float32 once per unit.
    slack = 1 + 1e-6 * len(rows)
    difference = total(everyone) - (total(without) if without else 0.0)
    assert np.linalg.norm(difference) <= clip_norm * slack
    assert np.linalg.norm(total([removed])) <= clip_norm


def test_small_gradients_are_summed_unclipped_and_large_ones_keep_their_direction() -> None:
    small, large = torch.tensor([[0.3, 0.4]]), torch.tensor([[30.0, 40.0]])
    torch.testing.assert_close(clipped_sum([small], None, 1, 1.0), small[0].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped_sum([large], None, 1, 1.0), small[0].double() * 2, rtol=1e-5, atol=0)


def test_the_rows_of_a_unit_are_clipped_together() -> None:
    gradients = [torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])]
    found = clipped_sum(gradients, torch.tensor([0, 0, 0, 1]), 2, 1.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_unit_that_is_not_finite_counts_as_zero_and_disturbs_no_other(bad: float) -> None:
    gradients = [torch.randn(4, 3), torch.randn(4, 2)]
    owner = torch.tensor([0, 1, 1, 2])
    without = clipped_sum([g[[0, 3]] for g in gradients], None, 2, 0.5)
    gradients[1][2, 0] = bad
    torch.testing.assert_close(clipped_sum(gradients, owner, 3, 0.5), without, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["causal-lm", "token-classification"])
def test_a_long_record_among_short_ones_moves_the_sum_by_at_most_the_clip_norm(llama: Path, kind: str) -> None:
    study = tiny_study(llama, **{"task.kind": kind, "aggregation.method": "ffa", "data.max_length": 100})
    host, _ = prepare(study)
    words = ["chest", "pain", "since", "monday"]
    short: Row
    long: Row
    if kind == "causal-lm":
        short = {"prompt": "man", "answer": "z"}
        long = {"prompt": "man", "answer": " ".join(words * 15)}
    else:
        short = {"tokens": ["man"], "tags": ["O"]}
        long = {"tokens": words * 15, "tags": ["B-sign", "I-sign", "O", "O"] * 15}
    few, many = encode_records(study, host.tokenizer, records_of(study, [short, long]))
    features = [few] * 32 + [many]
    own = per_sample(host, study, features)
    clip_norm = 1.05 * float(torch.cat([g[0] for g in own]).norm())

    def change(loss: str) -> float:
        both = clipped_sum(per_sample(host, study, features, loss), None, 33, clip_norm)
        without = clipped_sum(per_sample(host, study, features[:-1], loss), None, 32, clip_norm)
        return float((both - without).norm()) / clip_norm

    assert change("per record") <= 1 + 1e-5
    assert change("batch mean") > 2, "the case is too mild to show the trap"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_real_gradients_have_the_sensitivity_of_one_unit(bases: Mapping[str, Path], family: str, unit: str) -> None:
    # C below every gradient's norm: each unit is clipped, where the bound is tight.
    study = tiny_study(bases[family], privacy=private(clip_norm=0.01, unit=unit), **{"data.unit": "patient"})
    host, features = prepare(study, rows=12)
    parameters = trained_parameters(host, study)
    units = [[3 * p, 3 * p + 1, 3 * p + 2] for p in range(4)] if unit == "patient" else [[r] for r in range(12)]

    def total(chosen: dict[int, Sequence[int]]) -> np.ndarray[Any, Any]:
        with per_sample_gradients(host.model, parameters) as collected:
            clipping = Clipping(collected, study.privacy.promise.clip_norm)
            return gradient_sum(host, study, step_batches(features, chosen, 5), parameters, clipping).gradient.numpy()

    everyone: dict[int, Sequence[int]] = dict(enumerate(units))
    whole = total(everyone)
    for removed in everyone:
        rest = {name: rows for name, rows in everyone.items() if name != removed}
        moved = float(np.linalg.norm(whole - total(rest)))
        assert 0.99 * 0.01 < moved <= 0.01 * (1 + 1e-4)


# --- batches ---------------------------------------------------------------------------------------------


@given(
    counts=st.dictionaries(st.integers(0, 50), st.integers(1, 5), max_size=20),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_physical_batches_hold_every_row_once_and_never_split_a_unit(
    counts: dict[int, int], size: int, seed: int
) -> None:
    rows_by_unit: dict[int, list[int]] = {}
    for unit, count in counts.items():
        start = sum(len(rows) for rows in rows_by_unit.values())
        rows_by_unit[unit] = list(range(start, start + count))
    unit_of = {row: unit for unit, rows in rows_by_unit.items() for row in rows}
    lengths = np.random.default_rng(seed).integers(1, 30, max(len(unit_of), 1)).tolist()
    seen: list[int] = []
    units_seen: list[int] = []
    for rows, owner in physical_batches(rows_by_unit, lengths, size):
        assert rows
        units = list(dict.fromkeys(unit_of[row] for row in rows))
        assert owner == [units.index(unit_of[row]) for row in rows]
        assert len(rows) <= size or len(units) == 1
        seen += rows
        units_seen += units
    assert sorted(seen) == sorted(unit_of)
    assert sorted(units_seen) == sorted(rows_by_unit)


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_the_sum_does_not_depend_on_the_physical_batch(bert: Path, unit: str) -> None:
    study = tiny_study(bert, privacy=private(clip_norm=0.3, unit=unit), **{"data.unit": "patient"})
    host, features = prepare(study, rows=12)
    parameters = trained_parameters(host, study)
    groups = [[0, 1, 2], [3], [4, 5], [6, 7, 8], [9], [10, 11]] if unit == "patient" else [[r] for r in range(12)]
    totals = []
    for size in (1, 3, 32):
        with per_sample_gradients(host.model, parameters) as collected:
            batches = step_batches(features, dict(enumerate(groups)), size)
            totals.append(gradient_sum(host, study, batches, parameters, Clipping(collected, 0.3)).gradient.numpy())
    scale = float(np.linalg.norm(totals[0]))
    assert scale > 0.3
    assert max(float(np.linalg.norm(other - totals[0])) for other in totals[1:]) < 1e-5 * scale


# --- sampling --------------------------------------------------------------------------------------------


def test_each_unit_enters_with_the_sampling_rate_and_on_its_own() -> None:
    randomness = SeededRandomness(1, "sampling")
    units, rate, draws = 40, 0.15, 4000
    entered = np.zeros((draws, units))
    for draw in range(draws):
        entered[draw, draw_units(units, rate, randomness)] = 1
    per_unit = entered.sum(0)
    spread = (draws * rate * (1 - rate)) ** 0.5
    assert np.abs(per_unit - draws * rate).max() < 5 * spread
    # Poisson, not fixed-size: the batch size has the binomial's variance.
    assert entered.sum(1).var() == pytest.approx(units * rate * (1 - rate), rel=0.1)
    correlation = np.corrcoef(entered.T) - np.eye(units)
    assert np.abs(correlation).max() < 5 / draws**0.5


def test_sampling_at_the_ends() -> None:
    assert draw_units(5, 1.0, SeededRandomness(0)) == [0, 1, 2, 3, 4]
    assert draw_units(100, 1e-12, SeededRandomness(0)) == []
    assert draw_units(0, 0.5, SeededRandomness(0)) == []


def test_rows_of_a_unit_are_drawn_uniformly_without_replacement() -> None:
    randomness = SeededRandomness(2, "rows")
    rows = [10, 20, 30, 40, 50]
    counts = Counter(tuple(draw_rows(rows, 2, randomness)) for _ in range(5000))
    assert all(len(set(pair)) == 2 and set(pair) <= set(rows) for pair in counts)
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert draw_rows(rows, 5, randomness) == rows
    assert draw_rows(rows, 9, randomness) == rows


# --- randomness and noise --------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    sample = SeededRandomness(3, "noise").normal(200_001)
    assert sample.shape == (200_001,)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert sample.mean() == pytest.approx(0, abs=5 / len(sample) ** 0.5)
    assert sample.var() == pytest.approx(1, abs=5 * (2 / len(sample)) ** 0.5)
    # The tails, where a weak transform would show: 0.27 % beyond three deviations.
    assert np.mean(np.abs(sample) > 3) == pytest.approx(2 * stats.norm.sf(3), rel=0.15)
    # The transform makes variates in pairs, which must not depend on each other.
    half = len(sample) // 2
    for first, second in ((sample[:half], sample[half + 1 :]), (sample[:-1], sample[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / half**0.5
        assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 5 / half**0.5


@given(deviation=st.floats(1e-6, 1e6), seed=st.integers(0, 2**32))
def test_noise_is_that_of_the_proof_to_the_last_bit(deviation: float, seed: int) -> None:
    total = np.random.default_rng(seed).normal(0, 100 * deviation, 1000)
    found = noisy(torch.from_numpy(total), deviation, SeededRandomness(seed).lattice_normal(1000))
    assert np.array_equal(found.numpy(), gaussian_release(total, deviation, SeededRandomness(seed)))


def test_noise_has_the_deviation_asked_for_and_keeps_the_total() -> None:
    total = torch.full((100_000,), 7.0, dtype=torch.float64)
    variates = SeededRandomness(4).lattice_normal(100_000)
    found = noisy(total, 0.25, variates).numpy()
    assert found.dtype == np.float64
    assert stats.kstest((found - 7.0) / 0.25, "norm").pvalue > 1e-3
    assert np.allclose(noisy(total, 1e-9, variates), total, rtol=0, atol=1e-7)


def test_uniform_variates_fill_the_unit_interval() -> None:
    sample = SeededRandomness(5).uniform(100_000)
    assert 0 <= sample.min() < 1e-3 < 1 - 1e-3 < sample.max() < 1
    assert stats.kstest(sample, "uniform").pvalue > 1e-3
    assert np.array_equal(sample * 2**53, np.floor(sample * 2**53))


def test_purposes_sites_rounds_and_seeds_have_streams_of_their_own() -> None:
    names: list[tuple[Any, ...]] = [
        (1, "a", 1, "noise"), (1, "a", 1, "sampling"), (1, "a", 2, "noise"), (1, "b", 1, "noise"),
        (2, "a", 1, "noise"), (1, "a1", "noise"), (1, "a", "1noise"), (11, "a", "noise"),
        (1, "1", "a", "noise"),
    ]  # fmt: skip
    assert len({derive_key(seed, *purpose) for seed, *purpose in names}) == len(names)
    assert len({derive_seed(seed, *purpose) for seed, *purpose in names}) == len(names)
    streams = np.stack([SeededRandomness(seed, *purpose).normal(20_000) for seed, *purpose in names])
    assert np.abs(np.corrcoef(streams) - np.eye(len(names))).max() < 5 / 20_000**0.5


def test_secret_streams_never_repeat() -> None:
    assert len({SecretRandomness().words(2).tobytes() for _ in range(50)}) == 50


def test_a_stream_goes_on_and_does_not_start_again() -> None:
    whole = SeededRandomness(6, "x").words(12)
    parts = SeededRandomness(6, "x")
    assert np.array_equal(np.concatenate([parts.words(5), parts.words(0), parts.words(7)]), whole)
    first, second = SeededRandomness(6, "x"), SeededRandomness(6, "x")
    assert not np.array_equal(first.normal(4), first.normal(4))
    assert np.array_equal(second.normal(4), SeededRandomness(6, "x").normal(4))


def test_the_key_is_the_digest_of_its_parts_with_their_lengths() -> None:
    parts = b"\x00\x00\x00\x0242" + b"\x00\x00\x00\x06site-a" + b"\x00\x00\x00\x013"
    assert derive_key(42, "site-a", 3) == hashlib.sha256(parts).digest()
    assert derive_key(42, "site-a", 3).hex()[:16] == "ef5f188c4452dbe4"  # sha256sum
    assert derive_seed(42, "site-a", 3) == int(hashlib.sha256(parts).hexdigest()[:16], 16) // 2


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    # Counter mode (NIST SP 800-38A, section 6.5) is the block cipher applied to 0, 1, 2, ... in turn.
    key = derive_key(42, "noise")
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305 - the oracle, not a cipher
    blocks = b"".join(ecb.update(counter.to_bytes(16, "big")) for counter in range(4))
    expected = [int.from_bytes(blocks[i : i + 8], "little") for i in range(0, 64, 8)]
    assert Randomness(key).words(8).tolist() == expected
    assert SeededRandomness(42, "noise").words(8).tolist() == expected
    # head -c 16 /dev/zero | openssl enc -aes-256-ctr -K 0001..1f -iv 00..00 | xxd -p
    assert Randomness(bytes(range(32))).words(2).tobytes().hex() == "f29000b62a499fd0a9f39a6add2e7780"
