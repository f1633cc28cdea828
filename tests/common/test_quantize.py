import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import DivergedError, ProtocolError, StudyError
from privet.common.secagg import quantize
from privet.common.secagg.quantize import Layout, Segment, dequantise, lane_bits, largest_sum, quantise
from privet.common.secagg.shamir import RandomBytes

BITS = st.integers(quantize.MIN_BITS, quantize.MAX_BITS)


def stream(seed: bytes) -> RandomBytes:
    counter = itertools.count()
    return lambda count: hashlib.shake_256(seed + next(counter).to_bytes(4, "big")).digest(count)


def lanes_of(layout: Layout, words: np.ndarray) -> list[int]:
    mask = 2**layout.lane_bits - 1
    return [
        (int(words[e % layout.words]) >> (e // layout.words * layout.lane_bits)) & mask for e in range(layout.length)
    ]


@given(bits=BITS, sites=st.integers(1, 65536))
def test_the_largest_sum_never_carries(bits: int, sites: int) -> None:
    width = lane_bits(bits, sites)
    assert largest_sum(bits, sites) < 2**width
    assert 64 // width * width <= 64
    # No wider than needed: one more lane would not fit.
    assert (64 // width + 1) * (bits + (sites - 1).bit_length()) > 64


@given(bits=BITS, sites=st.integers(1, 40), size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_sums_of_extreme_values_come_back(bits: int, sites: int, size: int) -> None:
    layout = Layout((Segment("n", 2, 2**40 + 7, count=True), Segment("x", size, 0.25)), bits, sites)
    top = {"n": np.array([2**40 + 7, 0]), "x": np.full(size, 1e30)}
    total = np.zeros(layout.words, quantize.WORD)
    for site in range(sites):
        total += quantise(layout, top, stream(b"%d" % site)).words
    sums = dequantise(layout, total, sites)
    assert sums.values["n"].tolist() == [sites * (2**40 + 7), 0]
    assert sums.values["x"].tolist() == pytest.approx([0.25 * sites] * size, rel=1e-12)
    assert int(sums.numbers.max()) <= largest_sum(bits, sites)


@given(data=st.data(), bits=BITS, sites=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_sum_is_the_sum_of_what_each_site_sent(data: st.DataObject, bits: int, sites: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    segments = tuple(
        Segment(f"s{i}", size, data.draw(st.sampled_from([1e-3, 1.0, 37.5]))) for i, size in enumerate(sizes)
    )
    layout = Layout((*segments, Segment("n", 1, 9, count=True)), bits, sites)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    total = np.zeros(layout.words, quantize.WORD)
    expected = np.zeros(layout.length, np.int64)
    true = {segment.name: np.zeros(segment.size) for segment in layout.segments}
    for site in range(sites):
        chosen = {s.name: rng.uniform(-s.bound, s.bound, s.size).astype(np.float32) for s in segments}
        chosen["n"] = np.array([site % 10])
        words = quantise(layout, chosen, stream(b"%d" % site)).words
        expected += lanes_of(layout, words)
        total += words
        for name, part in chosen.items():
            true[name] += part
    sums = dequantise(layout, total, sites)
    assert sums.numbers.tolist() == expected.tolist()
    assert sums.values["n"].tolist() == true["n"].tolist()
    for segment in segments:
        step = segment.bound / layout.level
        # Each site's part is off by less than one level, beside the single precision of its scale.
        slack = sites * (step + segment.bound * 2**-22)
        assert np.abs(sums.values[segment.name] - true[segment.name]).max() < slack


@given(bits=BITS, value=st.floats(-1.125, 1.125, width=32), seed=st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_rounding_agrees_with_the_definition_in_rational_numbers(bits: int, value: float, seed: int) -> None:
    layout = Layout((Segment("x", 4, 0.75),), bits, 5)
    random = stream(b"%d" % seed)
    words = quantise(layout, {"x": np.full(4, value, np.float32)}, random).words
    key = stream(b"%d" % seed)(32)
    f, level = min(16, 32 - bits), 2 ** (bits - 1) - 1
    for e, got in enumerate(lanes_of(layout, words)):
        lane, word = divmod(e, layout.words)
        keystream = Cipher(AES256(key), CTR(lane.to_bytes(8, "big") + bytes(8))).encryptor().update(bytes(2 * word + 2))
        u = int.from_bytes(keystream[2 * word :], "little") >> (16 - f)
        product = float(np.float32(value) * np.float32(level * 2**f / 0.75))
        z = max(-level * 2**f, min(level * 2**f, round(Fraction(product))))
        assert got == (z + u) // 2**f + level


def test_rounding_keeps_the_expectation() -> None:
    layout = Layout((Segment("x", 200_000, 1.0),), 14, 2)
    for value in (0.3, -0.7 / layout.level, 0.5 / layout.level):
        words = quantise(layout, {"x": np.full(200_000, value)}, stream(b"e")).words
        levels = dequantise(layout, words, 1).numbers - layout.level
        exact = value * layout.level
        assert set(np.unique(levels)) <= {int(np.floor(exact)), int(np.floor(exact)) + 1}
        part = exact - np.floor(exact)
        deviation = np.sqrt(part * (1 - part) / 200_000)
        assert abs(levels.mean() - exact) < 4.5 * deviation + 2.0**-16


def test_rounding_is_independent_between_lanes_and_calls() -> None:
    layout = Layout((Segment("x", 30_000, 1.0),), 16, 30)
    half = {"x": np.full(30_000, 0.5 / layout.level)}
    first = np.array(lanes_of(layout, quantise(layout, half, stream(b"1")).words)) - layout.level
    again = np.array(lanes_of(layout, quantise(layout, half, stream(b"2")).words)) - layout.level
    lanes = first.reshape(layout.lanes, layout.words)
    for a, b in ((lanes[0], lanes[1]), (lanes[1], lanes[2]), (first, again)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


def test_values_beyond_the_bound_are_cut_and_reported() -> None:
    layout = Layout((Segment("x", 3, 0.5),), 16, 2)
    inside = quantise(layout, {"x": np.array([0.5, -0.5, 0.0])}, stream(b"f"))
    assert inside.cut == 0
    outside = quantise(layout, {"x": np.array([7.0, -7.0, 0.0])}, stream(b"f"))
    assert outside.cut == 2
    assert outside.words.tolist() == inside.words.tolist()


def test_blocks_do_not_show() -> None:
    # The same vector as one segment or as many, and across the block size, gives the same words.
    size = 3 * quantize._BLOCK + 1234
    x = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    whole = quantise(Layout((Segment("x", size, 1.0),), 16, 30), {"x": x}, stream(b"g")).words
    cuts = [0, 1, 5000, 40_000, size]
    parts = {f"p{i}": x[a:b] for i, (a, b) in enumerate(itertools.pairwise(cuts))}
    segments = tuple(Segment(name, part.size, 1.0) for name, part in parts.items())
    assert np.array_equal(quantise(Layout(segments, 16, 30), parts, stream(b"g")).words, whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    layout = Layout((Segment("x", 3, 0.5),), 16, 2)
    with pytest.raises(DivergedError, match="segment x"):
        quantise(layout, {"x": np.array([0.0, bad, 0.1])}, stream(b"h"))


@pytest.mark.parametrize("bad", [-1, 2.5, 11, np.nan])
def test_counts_that_are_no_counts_are_refused(bad: float) -> None:
    layout = Layout((Segment("n", 1, 10, count=True),), 16, 2)
    with pytest.raises(DivergedError, match="segment n"):
        quantise(layout, {"n": np.array([bad])}, stream(b"h"))


def test_vectors_that_do_not_fit_the_layout_are_refused() -> None:
    layout = Layout((Segment("x", 3, 0.5),), 16, 2)
    with pytest.raises(ProtocolError, match="missing or unknown: x, y"):
        quantise(layout, {"y": np.zeros(3)}, stream(b"i"))
    with pytest.raises(ProtocolError, match="expected 3 values, got 4"):
        quantise(layout, {"x": np.zeros(4)}, stream(b"i"))
    with pytest.raises(ProtocolError, match="words"):
        dequantise(layout, np.zeros(9, quantize.WORD), 1)
    with pytest.raises(ProtocolError, match="number of sites in the sum"):
        dequantise(layout, np.zeros(1, quantize.WORD), 3)


def test_a_sum_that_no_site_can_have_sent_is_refused() -> None:
    layout = Layout((Segment("x", 2, 0.5),), 16, 30)
    words = np.full(layout.words, 2 * (2**16 - 1) + 1, quantize.WORD)
    dequantise(layout, words, 3)
    with pytest.raises(ProtocolError, match="sent values outside the agreed bounds"):
        dequantise(layout, words, 2)


@pytest.mark.parametrize(("bits", "bound", "digits"), [(16, 10.0, [31]), (14, 2.0**48 - 1, [0, 0, 0, 2**26])])
def test_a_sum_of_counts_above_its_bound_is_refused(bits: int, bound: float, digits: list[int]) -> None:
    # Each digit is one that the sites can send, the count is not; the second would not fit 64 bits.
    layout = Layout((Segment("n", 1, bound, count=True),), bits, 3 if bits == 16 else 2**13)
    words = np.zeros(layout.words, quantize.WORD)
    for number, digit in enumerate(digits):
        lane, word = divmod(number, layout.words)
        words[word] |= np.uint64(digit << lane * layout.lane_bits)
    with pytest.raises(ProtocolError, match="segment n of the vectors: the sum of the sites' counts exceeds"):
        dequantise(layout, words, layout.sites)


def test_a_weighted_mean_comes_out_of_one_sum() -> None:
    bound, most = 0.5, 200
    layout = Layout((Segment("weight", 1, most, count=True), Segment("wx", 50, bound * most)), 20, 4)
    rng = np.random.default_rng(3)
    weights, updates = [7, 200, 31, 1], rng.uniform(-bound, bound, (4, 50))
    total = np.zeros(layout.words, quantize.WORD)
    for site, (w, x) in enumerate(zip(weights, updates, strict=True)):
        total += quantise(layout, {"weight": np.array([w]), "wx": w * x}, stream(b"%d" % site)).words
    sums = dequantise(layout, total, 4)
    assert sums.values["weight"].tolist() == [239]
    mean = sums.values["wx"] / 239
    step = bound * most / layout.level
    assert np.abs(mean - np.average(updates, axis=0, weights=weights)).max() < 4 * step / 239


def test_layouts_out_of_range_are_refused() -> None:
    for bits in (13, 25):
        with pytest.raises(StudyError, match="14 to 24"):
            lane_bits(bits, 2)
    with pytest.raises(StudyError, match="same name"):
        Layout((Segment("x", 1, 1.0), Segment("x", 2, 1.0)), 16, 2)
    with pytest.raises(StudyError, match="at least one segment"):
        Layout((), 16, 2)
    for bound in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(StudyError, match="bound"):
            Segment("x", 1, bound)
    for bound in (2.5, 2.0**48):
        with pytest.raises(StudyError, match="count"):
            Segment("x", 1, bound, count=True)


def test_sixteen_bits_and_thirty_sites_take_two_and_two_thirds_bytes_a_value() -> None:
    layout = Layout((Segment("x", 3_000_000, 1.0),), 16, 30)
    assert layout.lane_bits == 21
    assert 8 * layout.words / 3_000_000 == pytest.approx(8 / 3)
