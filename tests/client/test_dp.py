"""Private gradients: one unit moves a sum by at most C, batches do not matter, noise is noise."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
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
    TermSum,
    clip_units,
    draw_rows,
    draw_units,
    noisy,
    per_sample_gradients,
)
from privet.client.training.features import IGNORED, Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.packing import Placed, Shape, pack, pack_in_order
from privet.client.training.passes import logits_of, losses_of, passes_of
from privet.client.training.train import Drawn, Steps, TrainingSet, clipping_of, term_sum
from privet.common.privacy.noise import (
    Randomness,
    SecretRandomness,
    SeededRandomness,
    cut,
    derive_key,
    derive_seed,
    lattice_release,
    lattice_unit,
)
from privet.common.study.study import Study
from tests.support.tiny import Row, private, random_adapter, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")


def flat(clip_norm: float, noise_multiplier: float = 1.0) -> Clipping:
    """Return flat clipping, on the lattice of noise with this multiplier."""
    return Clipping(clip_norm, lattice_unit(noise_multiplier * clip_norm))


def is_within(terms: torch.Tensor, clipping: Clipping) -> bool:
    """Return whether terms have a norm of at most C, computed without rounding."""
    return sum(int(term) ** 2 for term in terms) <= (Fraction(clipping.norm) / Fraction(clipping.lattice)) ** 2


def summed(passes: Sequence[tuple[torch.Tensor, Sequence[int]]], size: int, clipping: Clipping) -> torch.Tensor:
    """Return the sum of terms of passes, each with its gradients and the number of rows of their units."""
    terms = TermSum(clipping, torch.zeros(size, dtype=torch.int64))
    for gradients, rows in passes:
        terms.add(gradients, rows)
    return terms.total


def clipped_sum(gradients: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Return the sum of clipped gradients of units of one row, in units of the gradient, float64."""
    clipping = flat(clip_norm)
    return clip_units(gradients, clipping)[0].double() * clipping.lattice


def prepare(study: Study, rows: int = 7, seed: int = 3) -> tuple[ModelHost, list[Feature]]:
    """Return a host with random adapter values in place, and features of ragged length."""
    host = open_host(study, CPU)
    host.mount(random_adapter(host.spec))
    return host, encode_records(study, host.tokenizer, records_of(study, rows_for(study, rows, seed)))


def trained_parameters(host: ModelHost, study: Study) -> list[nn.Parameter]:
    return [p for _, p in host.train_only(host.spec.trained(study.aggregation.method))]


@contextmanager
def single_passes(host: ModelHost, engine: str) -> Iterator[None]:
    """Let a host run one record a pass where `engine` is "single"."""
    assert host.shape.packed, host.verdict
    before = host.shape
    host.shape = before if engine == "packed" else Shape()
    try:
        yield
    finally:
        host.shape = before


def step_terms(
    host: ModelHost, study: Study, features: Sequence[Feature], drawn: Drawn, clipping: Clipping, most: int = 32
) -> TermSum:
    """Return the terms of one step, from forward pass to clipping."""
    parameters = trained_parameters(host, study)
    steps = Steps(host, study, TrainingSet(features, [], 0), parameters, most)
    packed = host.shape.packed
    with host.passing(training=True), per_sample_gradients(host.model, parameters, packed=packed) as collected:
        return term_sum(steps, drawn, collected, clipping)


# --- sensitivity -----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    size=st.integers(1, 120),
    clip_norm=st.floats(1e-3, 1e3),
    spread=st.floats(0, 12),
    by_record=st.booleans(),
    data=st.data(),
)
def test_adding_or_removing_a_unit_moves_the_sum_by_exactly_its_own_term_of_at_most_the_clip_norm(
    seed: int,
    rows: list[int],
    size: int,
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
    common = rng.standard_normal(size)
    values = np.where(rng.random((len(owner), 1)) < 0.5, common, rng.standard_normal((len(owner), size)))
    gradients = torch.from_numpy((values * scale).astype(np.float32))
    clipping = flat(clip_norm, data.draw(st.floats(0.1, 100), label="noise multiplier"))

    def total(kept: Sequence[int]) -> torch.Tensor:
        # Units in any order, their rows one after another, cut into passes anywhere.
        chosen = [int(row) for unit in kept for row in np.flatnonzero(owner == unit)]
        cuts = data.draw(st.sets(st.integers(1, len(chosen))), label="passes") if chosen else set()
        edges = sorted({0, *cuts, len(chosen)})
        parts = [chosen[start:end] for start, end in itertools.pairwise(edges)]
        return summed([(gradients[part], [rows[owner[row]] for row in part]) for part in parts], size, clipping)

    everyone = data.draw(st.permutations(range(len(rows))), label="order")
    removed = data.draw(st.sampled_from(everyone), label="removed")
    without = data.draw(st.permutations([unit for unit in everyone if unit != removed]), label="other order")
    own = total([removed])
    assert torch.equal(total(everyone) - total(without), own)
    assert is_within(own, clipping)


def test_small_gradients_are_summed_unclipped_and_large_ones_keep_their_direction() -> None:
    small, large = torch.tensor([[0.3, 0.4]]), torch.tensor([[30.0, 40.0]])
    torch.testing.assert_close(clipped_sum(small, 1.0), small[0].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped_sum(large, 1.0), small[0].double() * 2, rtol=1e-5, atol=0)


def test_the_rows_of_a_unit_are_clipped_together() -> None:
    clipping = flat(1.0)
    gradients = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    found = summed([(gradients, [3, 3, 3, 1])], 2, clipping)
    torch.testing.assert_close(found.double() * clipping.lattice, torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.equal(summed([(gradients[:2], [3, 3]), (gradients[2:], [3, 1])], 2, clipping), found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_unit_that_is_not_finite_counts_as_zero_and_disturbs_no_other(bad: float) -> None:
    gradients, clipping = torch.randn(4, 5), flat(0.5)
    without = summed([(gradients[[0, 3]], [1, 1])], 5, clipping)
    gradients[2, 3] = bad
    assert torch.equal(summed([(gradients, [1, 2, 2, 1])], 5, clipping), without)
    assert torch.equal(clip_units(gradients[[0, 2, 3]], clipping)[0], without)


@pytest.mark.parametrize("kind", ["causal-lm", "token-classification"])
def test_a_long_record_among_short_ones_moves_the_sum_by_exactly_its_own_term(llama: Path, kind: str) -> None:
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
    parameters = trained_parameters(host, study)

    def per_sample(records: range, loss: str = "per record") -> torch.Tensor:
        """Return [n, P]; `loss` "batch mean" weighs tokens as the model library does."""
        with host.passing(training=True), per_sample_gradients(host.model, parameters, packed=True) as collected:
            (passed,) = passes_of(host, features, pack(host.shape, features, records, 64))
            collected.begin(passed.layout)
            labelled = (passed.labels != IGNORED).float()
            weights = passed.weights if loss == "per record" else labelled / labelled.sum() * len(records)
            torch.autograd.backward(losses_of(logits_of(host, passed), passed), weights)
            return collected.take()

    everyone, others = range(33), range(32)
    own = per_sample(range(32, 33))
    clipping = flat(1.05 * float(per_sample(range(1)).norm()))

    def change(loss: str) -> torch.Tensor:
        return clip_units(per_sample(everyone, loss), clipping)[0] - clip_units(per_sample(others, loss), clipping)[0]

    assert torch.equal(change("per record"), clip_units(own, clipping)[0])
    assert is_within(change("per record"), clipping)
    trap = float((change("batch mean").double() * clipping.lattice).norm()) / clipping.norm
    assert trap > 2, "the case is too mild to show the trap"


@pytest.mark.parametrize("engine", ["packed", "single"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_real_gradients_have_the_sensitivity_of_one_unit(
    bases: Mapping[str, Path], family: str, unit: str, engine: str
) -> None:
    # C below every gradient's norm: each unit is clipped, where the bound is tight.
    study = tiny_study(bases[family], privacy=private(clip_norm=0.01, unit=unit), **{"data.unit": "patient"})
    host, features = prepare(study, rows=12)
    units = [[3 * p, 3 * p + 1, 3 * p + 2] for p in range(4)] if unit == "patient" else [[r] for r in range(12)]
    clipping = clipping_of(study.privacy, study.privacy.promise.clip_norm, 1.0)
    everyone: dict[int, Sequence[int]] = dict(enumerate(units))
    with single_passes(host, engine):
        whole = step_terms(host, study, features, everyone, clipping, 5).total
        for removed, rows in everyone.items():
            rest = {name: rows for name, rows in everyone.items() if name != removed}
            own = step_terms(host, study, features, {removed: rows}, clipping, 3).total
            assert torch.equal(whole - step_terms(host, study, features, rest, clipping, 4).total, own)
            assert is_within(own, clipping)
            assert not is_within(own, Clipping(0.99 * clipping.norm, clipping.lattice))


# --- passes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A record of nothing but tokens."""

    ids: tuple[int, ...]


def check_layout(shape: Shape, records: Sequence[Tokens], placed: Placed) -> None:
    """Check that a pass has one of its sizes, and that each record has rows of its own, at its own width."""
    layout, ends = placed.layout, 0
    assert layout.rows in shape.sizes
    for block in layout.blocks:
        assert block.start == ends
        assert block.start % shape.alignment == 0
        assert len(block.lengths) == shape.group(block.width)
        assert {shape.width(length) for length in block.lengths if length} == {block.width}
        ends = block.rows.stop
    assert ends <= layout.rows
    assert all(smaller < ends for smaller in shape.sizes if smaller < layout.rows), "a smaller size would have done"
    assert [length for _, length in layout.spans] == [len(records[record].ids) for record in placed.records]


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    chosen=st.sets(st.integers(0, 39)),
    most=st.integers(1, 12),
    sizes=st.sets(st.sampled_from([128, 256, 384]), min_size=1),
    together=st.sampled_from([1, 16, 64]),
    in_order=st.booleans(),
)
def test_passes_hold_every_record_once_and_none_is_split(
    lengths: list[int], chosen: set[int], most: int, sizes: set[int], together: int, in_order: bool
) -> None:
    shape = Shape(tuple(sorted(sizes)), together)
    records = [Tokens((1,) * length) for length in lengths]
    wanted = [record for record in chosen if record < len(lengths)]
    passes = list((pack_in_order if in_order else pack)(shape, records, wanted, most))
    for placed in passes:
        check_layout(shape, records, placed)
        assert placed.records
        assert len(placed.records) <= max(most, max(len(block.lengths) for block in placed.layout.blocks))
    found = [record for placed in passes for record in placed.records]
    assert (found if in_order else sorted(found)) == (wanted if in_order else sorted(wanted))
    singles = list(pack(Shape(), records, wanted, most))
    assert [placed.records for placed in singles] == [(record,) for record in wanted]
    assert [placed.layout.rows for placed in singles] == [lengths[record] for record in wanted]


@given(
    counts=st.dictionaries(st.integers(0, 50), st.integers(1, 5), max_size=20),
    most=st.integers(1, 40),
    packed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_rows_of_a_unit_follow_one_another_in_their_order(
    bert: Path, counts: dict[int, int], most: int, packed: bool, seed: int
) -> None:
    study = tiny_study(bert)
    host = open_host(study, CPU)
    ends = np.cumsum([0, *counts.values()]).tolist()
    drawn = {unit: list(range(ends[i], ends[i + 1])) for i, unit in enumerate(counts)}
    lengths = np.random.default_rng(seed).integers(1, 30, max(ends[-1], 1)).tolist()
    features = [Feature((5,) * length, 0) for length in lengths]
    steps = Steps(host, study, TrainingSet(features, [], 0), [], most)
    with single_passes(host, "packed" if packed else "single"):
        found = [record for passed in steps.passes(drawn) for record in passed.records]
    assert sorted(found) == list(range(ends[-1]))
    for rows in drawn.values():
        first = found.index(rows[0])
        assert found[first : first + len(rows)] == rows


@pytest.mark.parametrize("engine", ["packed", "single"])
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_no_bit_of_the_sum_depends_on_the_physical_batch(bert: Path, unit: str, engine: str) -> None:
    study = tiny_study(bert, privacy=private(clip_norm=0.3, unit=unit), **{"data.unit": "patient"})
    host, features = prepare(study, rows=12)
    groups = [[0, 1, 2], [3], [4, 5], [6, 7, 8], [9], [10, 11]] if unit == "patient" else [[r] for r in range(12)]
    clipping = clipping_of(study.privacy, 0.3, 1.0)
    with single_passes(host, engine):
        terms = [step_terms(host, study, features, dict(enumerate(groups)), clipping, most) for most in (1, 3, 32)]
    assert float((terms[0].total.double() * clipping.lattice).norm()) > 0.3
    for other in terms[1:]:
        assert torch.equal(other.total, terms[0].total)
        assert other.balance == terms[0].balance


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
    unit = lattice_unit(deviation)
    points = cut(np.random.default_rng(seed).normal(0, 100 * deviation, 1000), unit)
    found = noisy(torch.from_numpy(points), unit, SeededRandomness(seed).lattice_normal(1000))
    assert np.array_equal(found.numpy(), lattice_release(points, unit, SeededRandomness(seed)))


def test_noise_has_the_deviation_asked_for_and_keeps_the_total() -> None:
    variates = SeededRandomness(4).lattice_normal(100_000)

    def released(deviation: float) -> np.ndarray[Any, Any]:
        unit = lattice_unit(deviation)
        points = torch.from_numpy(cut(np.full(100_000, 7.0), unit))
        return np.asarray(noisy(points, unit, variates).numpy())

    found = released(0.25)
    assert found.dtype == np.float64
    assert stats.kstest((found - 7.0) / 0.25, "norm").pvalue > 1e-3
    assert np.allclose(released(1e-5), 7.0, rtol=0, atol=1e-3)


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
