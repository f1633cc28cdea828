"""Masked vectors without their unused top bits: sums are the same, and a vector has one form."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ProtocolError
from privet.common.privacy.shared_noise import pack_lanes, unpack_lanes
from privet.common.secagg import masks, site
from privet.common.secagg.quantize import WORD, Layout, Segment, Words, dequantise, quantise
from privet.common.secagg.suites import Suite

world = importlib.import_module("tests.support.secagg_world")
reference = importlib.import_module("tests.support.secagg_reference")
HYBRID = [suite for suite in Suite if suite.hybrid]


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 2**64, shape, np.uint64).astype(WORD)


def unpacked(packed: Words, size: int) -> Words:
    total = np.zeros(size, WORD)
    masks.add_packed(total, packed, whose="x")
    return total & masks.LOW


@given(size=st.integers(0, 400), sites=st.integers(1, 5), block=st.sampled_from([1, 9, 32768]), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_sums_of_packed_words_are_sums_of_the_lower_bits(size: int, sites: int, block: int, seed: int) -> None:
    words = drawn(seed, sites, size)
    total, before = np.zeros(size, WORD), words.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_PACK_BLOCK", block)
        for row in words:
            packed = masks.pack(row)
            assert packed.size == size - size // 64
            assert not size or np.shares_memory(packed, row)
            masks.add_packed(total, packed, whose="x")
    assert np.array_equal(total & masks.LOW, before.sum(axis=0, dtype=WORD) & masks.LOW)


@given(size=st.integers(0, 300), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_reference_packs_the_same(size: int, seed: int) -> None:
    words = drawn(seed, size)
    sent = reference.without_top_bits(words.tolist())
    assert reference.with_top_bits(sent, size) == (words & masks.LOW).tolist()
    packed = masks.pack(words)
    assert packed.tolist() == sent
    assert masks.pack(unpacked(packed, size)).tolist() == sent


@given(
    bits=st.integers(14, 24),
    sites=st.one_of(st.integers(1, 8), st.sampled_from([100, 600])),
    size=st.integers(1, 700),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_the_values_of_any_width_are_the_same_with_and_without_the_top_bit(
    bits: int, sites: int, size: int, seed: int
) -> None:
    layout = Layout((Segment("n", 1, 9, count=True), Segment("x", size, 1.0)), bits, sites)
    assert layout.spare_bit == (layout.lanes == 3)
    rng = np.random.default_rng(seed)
    plain, sent = np.zeros(layout.words, WORD), np.zeros(layout.words, WORD)
    # A mask on each site's words; the last one's cancels the others'.
    hidden = drawn(seed, min(sites, 5), layout.words)
    hidden[-1] -= hidden.sum(axis=0, dtype=WORD)
    for number, mask in enumerate(hidden):
        values = {"n": np.array([number]), "x": rng.uniform(-1, 1, size).astype(np.float32)}
        words = quantise(layout, values, rng.bytes).words
        plain += words
        if layout.spare_bit:
            masks.add_packed(sent, masks.pack(words + mask), whose="x")
        else:
            sent += words + mask
    if layout.spare_bit:
        sent &= masks.LOW
    assert np.array_equal(sent, plain)
    assert dequantise(layout, sent, len(hidden)).values["n"] == sum(range(len(hidden)))


@given(count=st.integers(1, 500), sites=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_signed_integers_of_21_bits_do_not_need_the_top_bit(count: int, sites: int, seed: int) -> None:
    half = 2**20 // sites
    parts = np.random.default_rng(seed).integers(-half, half, (sites, count))
    parts[:, 0], parts[:, -1] = half - 1, -half
    total = np.zeros(-(-count // 3), WORD)
    for part in parts:
        masks.add_packed(total, masks.pack(pack_lanes(part, 21)), whose="x")
    assert np.array_equal(unpack_lanes(total & masks.LOW, count, 21), parts.sum(axis=0))


@pytest.mark.parametrize(("bits", "lanes"), [(14, 4), (16, 3), (24, 2)])
@pytest.mark.parametrize("suite", HYBRID, ids=lambda suite: suite.value)
def test_whole_rounds_of_each_width_have_the_sum_of_the_classical_suite(suite: Suite, bits: int, lanes: int) -> None:
    def of(chosen: Suite) -> tuple[Any, Any]:
        play = world.World(world.parameters(4, dropouts=1, size=500, bits=bits, suite=chosen))
        play.vector = lambda i: {"examples": np.array([i]), "update": np.full(500, [-1.0, 0.0, 1.0, 0.0][i])}
        return play, play.finish({"mask": {1}})

    play, total = of(suite)
    classical, expected = of(Suite.X25519)
    assert play.layout.lanes == lanes
    assert play.parameters.packed == (lanes == 3)
    assert not classical.parameters.packed
    saved = play.layout.words // 64 if lanes == 3 else 0
    assert saved == (2 if lanes == 3 else 0)
    assert {m.words.size for m in play.masked.values()} == {play.layout.words - saved}
    assert {m.words.size for m in classical.masked.values()} == {play.layout.words}
    assert np.array_equal(total.words, sum(play.words[i] for i in total.survivors))
    assert np.array_equal(expected.words, sum(classical.words[i] for i in expected.survivors))


@pytest.fixture(scope="module")
def play() -> Any:
    """A round whose vectors have 168 words: 126 that carry two others, 40 that carry none."""
    found = world.World(world.parameters(3, size=500)).advertise().share()
    assert found.layout.words == 168
    assert found.parameters.packed
    return found


@pytest.fixture(scope="module")
def sent(play: Any) -> Any:
    words = play.encoded(0)
    _, message = site.mask(play.shared[0], play.deliveries[0], words, play.journals[0])
    assert np.shares_memory(words, message.words)
    return message


def refused(play: Any, message: Any, match: str) -> None:
    before = play.coordinator._sum.copy()
    with pytest.raises(ProtocolError, match=match):
        play.coordinator.admit(world.over_the_wire(message))
    assert np.array_equal(play.coordinator._sum, before)
    assert 0 not in play.coordinator._tags


def test_every_other_length_is_refused(play: Any, sent: Any) -> None:
    for size in (0, 1, 63, 126, 165, 167, 168, 169):
        words = np.resize(sent.words, size)
        refused(play, dataclasses.replace(sent, words=words), "site-0000 must send a masked vector of 166 words")


def test_a_top_bit_that_carries_nothing_is_refused(play: Any, sent: Any) -> None:
    for at in range(126, 166):
        words = sent.words.copy()
        words[at] |= np.uint64(1 << 63)
        refused(play, dataclasses.replace(sent, words=words), "site-0000 .* or another top bit")


def test_each_bit_that_is_sent_changes_the_vector(sent: Any) -> None:
    # So no two encodings have one vector: what is accepted is what the vector's own packing gives.
    first = unpacked(sent.words, 168)
    assert masks.pack(first.copy()).tolist() == sent.words.tolist()
    for at, bit in itertools.product((0, 1, 62, 63, 125), range(64)):
        words = sent.words.copy()
        words[at] ^= np.uint64(1 << bit)
        assert (unpacked(words, 168) != first).sum() == 1


def test_a_site_cannot_reach_beyond_the_sum_by_its_top_bits(play: Any) -> None:
    # Words that are all ones, of every site: the sum has the lower 63 bits alone, whatever was carried.
    total = np.zeros(168, WORD)
    for _ in range(3):
        masks.add_packed(total, masks.pack(np.full(168, 2**64 - 1, WORD)), whose="x")
    assert set((total & masks.LOW).tolist()) == {2**63 - 3}
    with pytest.raises(ProtocolError, match="exceeds"):
        dequantise(play.layout, total & masks.LOW, 3)
