"""What the coordinator sees looks like uniform words, whatever the input, and never repeats."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, norm

from privet.common.secagg import masks
from privet.common.secagg.quantize import Segment

world = importlib.import_module("tests.support.secagg_world")

SIZE = 60_000
LAYOUT = (Segment("a", SIZE, 1.0), Segment("b", SIZE, 1.0), Segment("examples", 1, 1e6, count=True))
# Seeds are fixed, so that a test always passes or always fails; of sound masks one in 10^6 would fail.
RARE = 1e-6


def constant(value: float) -> Any:
    return lambda index: {"a": np.full(SIZE, value), "b": np.full(SIZE, value), "examples": np.array([0])}


def masked(value: float, *, number: int = 1, seed: bytes = b"s") -> dict[int, Any]:
    parameters = world.parameters(4, dropouts=1, number=number, layout=LAYOUT)
    play = world.World(parameters, seed=seed, vector=constant(value)).advertise().share().mask()
    return {i: message.words for i, message in play.masked.items()}


INPUTS = {"all zero": masked(0.0), "all maximum": masked(1.0), "all minimum": masked(-1.0)}


def assert_uniform(words: np.ndarray) -> None:
    """Chi-square of bytes and of each bit, and serial correlation of bytes and of words."""
    raw = words.view(np.uint8)
    counts = np.bincount(raw, minlength=256)
    expected = raw.size / 256
    assert chi2.sf(((counts - expected) ** 2 / expected).sum(), 255) > RARE
    ones = np.array([np.count_nonzero(words >> np.uint64(bit) & np.uint64(1)) for bit in range(64)])
    bits = ((ones - words.size / 2) ** 2 / (words.size / 4)).sum()
    assert chi2.sf(bits, 64) > RARE
    limit = norm.isf(RARE / 2)
    for series in (raw.astype(float), words.astype(float)):
        for lag in (1, 2, 8):
            r = np.corrcoef(series[:-lag], series[lag:])[0, 1]
            assert abs(r) * np.sqrt(series.size - lag) < limit


@pytest.mark.parametrize("name", INPUTS)
def test_masked_words_are_uniform_whatever_the_input(name: str) -> None:
    for words in INPUTS[name].values():
        assert_uniform(words)


def test_the_detectors_detect() -> None:
    # The same tests refuse unmasked words, and masks with a structure.
    play = world.World(world.parameters(4, dropouts=1, layout=LAYOUT), vector=constant(0.0))
    with pytest.raises(AssertionError):
        assert_uniform(play.encoded(0))
    key = [bytes(32)]
    repeated = np.zeros(40_000, dtype="<u8")
    masks.apply(repeated[:20_000], key, [])
    repeated[1::2] = repeated[::2]
    with pytest.raises(AssertionError):
        assert_uniform(repeated)


def test_differences_of_equal_inputs_are_uniform() -> None:
    # A mask used twice would cancel: between rounds, sites, segments of one vector, or inputs.
    first, again = INPUTS["all zero"], masked(0.0, number=2, seed=b"t")
    same_randomness = masked(0.0, number=2, seed=b"s")
    for i in range(4):
        assert_uniform(first[i] - again[i])
        # Even where a site's randomness repeats, so that all its seeds are equal, the round is in every key.
        assert_uniform(first[i] - same_randomness[i])
    for i in range(1, 4):
        assert_uniform(first[0] - first[i])
    half = first[0].size // 2
    assert_uniform(first[0][:half] - first[0][half : 2 * half])


def test_partial_sums_are_uniform_and_the_whole_is_the_sum() -> None:
    # Two or three of four sites' vectors added up say nothing: each pair's mask with the rest stays on.
    words = INPUTS["all maximum"]
    for group in ((0, 1), (1, 3), (0, 1, 2), (0, 1, 2, 3)):
        # All four still bear their own masks.
        assert_uniform(sum(words[i] for i in group[1:]) + words[group[0]])


def test_masked_words_do_not_correlate_between_sites() -> None:
    limit = norm.isf(RARE / 2)
    words = INPUTS["all zero"]
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3)):
        a, b = words[i].view(np.uint8).astype(float), words[j].view(np.uint8).astype(float)
        assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(a.size) < limit


def test_every_derived_key_differs() -> None:
    secret, roster = b"\x01" * 32, b"\x02" * 32
    keys = [masks.self_mask_key(secret, roster, i) for i in range(20)]
    keys += [masks.pair_mask_key(secret, roster, i, j) for i in range(20) for j in range(i)]
    keys += [
        masks.derive(secret, roster, "channels", i, j, length=128)[s]
        for i in range(6)
        for j in range(6)
        for s in (slice(0, 32), slice(32, 64))
    ]
    keys += [masks.self_mask_key(secret, b"\x03" * 32, i) for i in range(20)]
    keys += [masks.derive(secret, roster, "self mask", 0, vector) for vector in range(1, 20)]
    assert len(set(keys)) == len(keys)
    assert masks.pair_mask_key(secret, roster, 3, 5) == masks.pair_mask_key(secret, roster, 5, 3)
