"""Fixed-point numbers with stochastic rounding, packed into 64-bit words whose lanes cannot carry in a sum.

A site's vector is a list of named segments. A *real* segment has a public bound: values are cut to
[-bound, bound] and become integers in [0, 2L], L = 2^(bits-1) - 1, whose expectation is that of the value. A
*count* segment holds whole numbers from 0 to its bound, exactly, as digits of base 2^bits. So every number in a
lane is below 2^bits, and the sum of `sites` such numbers is below 2^lane_bits (`largest_sum`): if all sites follow
this encoding, no lane carries into the next.

Layout of the words (planar, so that packing is contiguous): with m words, number e of the vector is in word
e mod m, in bits [j * lane_bits, (j + 1) * lane_bits) for j = e div m.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from privet.common.errors import DivergedError, ProtocolError, StudyError
from privet.common.secagg.shamir import RandomBytes

Words = NDArray[np.uint64]
Values = Mapping[str, NDArray[np.floating | np.integer]]

MIN_BITS = 14
MAX_BITS = 24
MAX_COUNT = 2**48 - 1
MIN_BOUND, MAX_BOUND = 1e-24, 1e24
WORD = np.dtype("<u8")
_MAX_COUNTS = 2**62
# Numbers handled at a time: enough for few calls, and few enough that most buffers stay in the second-level cache.
_BLOCK = 65536


@dataclass(frozen=True)
class Segment:
    """A named part of the vector.

    Attributes:
        name: What the part is, e.g. the tensor's name.
        size: How many values it has.
        bound: Largest magnitude of a value; for counts, the largest count. Public, the same for all sites.
        count: Whether the values are whole numbers from 0 to `bound`, summed exactly.
    """

    name: str
    size: int
    bound: float
    count: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise StudyError(f"segment {self.name} of the vector: expected at least 1 value, got {self.size}")
        if not MIN_BOUND <= self.bound <= MAX_BOUND:
            raise StudyError(
                f"segment {self.name} of the vector: the bound on its values must be {MIN_BOUND} to {MAX_BOUND}, got "
                f"{self.bound}"
            )
        if self.count and not (self.bound == int(self.bound) and self.bound <= MAX_COUNT):
            raise StudyError(
                f"segment {self.name} of the vector: the bound on a count must be a whole number up to 2^48 - 1, got "
                f"{self.bound}"
            )


def largest_sum(bits: int, sites: int) -> int:
    """Return the largest sum that a lane can reach: `sites` numbers, each below 2^bits."""
    return sites * ((1 << bits) - 1)


def lane_bits(bits: int, sites: int) -> int:
    """Return the width of a lane in bits, so that `largest_sum(bits, sites)` < 2^width.

    The least width, bits + ceil(log2 sites), is widened until the lanes fill the word: their number stays the same.

    Raises:
        StudyError: `bits` is outside 14 to 24, or `sites` outside 1 to 65536.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise StudyError(f"secure_aggregation.bits must be {MIN_BITS} to {MAX_BITS}, got {bits}")
    if not 1 <= sites <= 2**16:
        raise StudyError(f"secure aggregation: the number of sites must be 1 to 65536, got {sites}")
    needed = bits + (sites - 1).bit_length()
    return 64 // (64 // needed)


@dataclass(frozen=True)
class Layout:
    """The layout of a vector of segments in words.

    Attributes:
        segments: The segments in their order.
        bits: Resolution of a real value, 14 to 24.
        sites: Largest number of sites whose vectors may be summed.
    """

    segments: tuple[Segment, ...]
    bits: int
    sites: int

    def __post_init__(self) -> None:
        lane_bits(self.bits, self.sites)
        if not self.segments:
            raise StudyError(
                "secure aggregation: the layout of the vector needs at least one segment, got none",
                "report this as a bug",
            )
        if len({segment.name for segment in self.segments}) != len(self.segments):
            raise StudyError(
                "secure aggregation: two segments of the vector have the same name", "report this as a bug"
            )

    @cached_property
    def lane_bits(self) -> int:
        """Bits from one lane to the next."""
        return lane_bits(self.bits, self.sites)

    @cached_property
    def lanes(self) -> int:
        """Lanes in a word."""
        return 64 // self.lane_bits

    @property
    def spare_bit(self) -> bool:
        """Whether the lanes leave the top bit of a word unused, as three of 21 bits do. Others fill the word."""
        return self.lanes * self.lane_bits < 64

    @cached_property
    def length(self) -> int:
        """Numbers in the vector; each digit of a count is one number."""
        return sum(segment.size * self.digits(segment) for segment in self.segments)

    @cached_property
    def words(self) -> int:
        """64-bit words of the packed vector."""
        return -(-self.length // self.lanes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each segment starts in the vector, and the vector's length."""
        return (0, *accumulate(segment.size * self.digits(segment) for segment in self.segments))

    @property
    def level(self) -> int:
        """L: a real value v becomes round(v / bound * L) + L."""
        return (1 << (self.bits - 1)) - 1

    @property
    def fraction_bits(self) -> int:
        """Bits below one level that stochastic rounding uses, so that level, fraction and sign fit 32 bits."""
        return min(16, 32 - self.bits)

    def digits(self, segment: Segment) -> int:
        """Return how many lanes one value of `segment` takes."""
        return -(-int(segment.bound).bit_length() // self.bits) if segment.count else 1


@dataclass(frozen=True)
class Encoded:
    """A packed vector.

    Attributes:
        words: Shape (layout.words,), not masked: they are the site's update in clear.
        cut: Number of values that were cut to their segment's bound.
    """

    words: Words = field(repr=False)
    cut: int


def quantise(layout: Layout, values: Values, random_bytes: RandomBytes) -> Encoded:
    """Quantise and pack a site's values.

    For a real value v, with f = layout.fraction_bits, z = rint(v * s) in single precision where
    s = float32(L * 2^f / bound), cut to [-L * 2^f, L * 2^f], becomes floor((z + u) / 2^f) + L for u uniform
    on [0, 2^f). Its expectation is exactly z / 2^f + L. The only bias is that of z: at most half of 2^-f of a
    level, and the error of single precision. The 16-bit u of lane j are the keystream of AES-256-CTR with a
    fresh key and the initial counter block j * 2^64.

    Args:
        layout: Layout of the vector.
        values: By segment, its values, flat or of any shape with `size` elements.
        random_bytes: Source of the rounding key; must be a CSPRNG where rounding has to be unpredictable.

    Returns:
        The words. Memory use beyond them is a few blocks.

    Raises:
        ProtocolError: A segment is missing, unknown, or has another size.
        DivergedError: A value is not finite, or a count is not a whole number in range.
    """
    numbers = _flat(layout, values)
    key = random_bytes(32)
    streams = [Cipher(AES256(key), CTR(_counter(j))).encryptor() for j in range(layout.lanes)]
    with np.errstate(over="ignore"):
        return _encode(layout, numbers, streams)


def _encode(layout: Layout, numbers: list[NDArray[np.generic]], streams: list[CipherContext]) -> Encoded:
    words = np.empty(layout.words, WORD)
    scratch, scales = _Scratch(min(_BLOCK, layout.words)), _scales(layout)
    cut = 0
    for start in range(0, layout.words, _BLOCK):
        stop = min(start + _BLOCK, layout.words)
        for lane, stream in enumerate(streams):
            first = lane * layout.words + start
            last = min(lane * layout.words + stop, layout.length)
            if last <= first:
                continue
            # Always a whole block of keystream, so that the noise of a number depends on its place alone.
            stream.update_into(scratch.zeros, scratch.bytes)
            levels = scratch.levels[: last - first]
            for index, inside, at in _pieces(layout, first, last):
                part = numbers[index][inside]
                if layout.segments[index].count:
                    np.copyto(levels[at], part, casting="unsafe")
                else:
                    cut += _round(layout, index, scales[index], part, scratch, at)
            part_words = words[start : start + levels.size]
            if lane == 0:
                # The first lane covers every word, so it also initialises them.
                np.copyto(part_words, levels, casting="unsafe")
                continue
            wide = scratch.wide[: levels.size]
            np.copyto(wide, levels, casting="unsafe")
            np.left_shift(wide, np.uint64(lane * layout.lane_bits), out=wide)
            np.bitwise_or(part_words, wide, out=part_words)
    return Encoded(words, cut)


class _Scratch:
    """Buffers of one block, reused."""

    def __init__(self, size: int) -> None:
        self.zeros = bytes(2 * size)
        self.noise = np.empty(size, "<u2")
        self.bytes = self.noise.view(np.uint8).data
        self.real = np.empty(size, np.float32)
        self.levels = np.empty(size, np.int32)
        # The values are not needed any more once they are integers, so the noise takes their memory.
        self.integers = self.real.view(np.int32)
        self.wide = np.empty(size, WORD)


def _counter(lane: int) -> bytes:
    return lane.to_bytes(8, "big") + bytes(8)


def _round(
    layout: Layout, index: int, scale: np.float32, values: NDArray[np.generic], scratch: _Scratch, at: slice
) -> int:
    """Round `values` to levels, into the scratch buffers. Return how many were cut to the bound."""
    f = layout.fraction_bits
    top = np.float32(layout.level << f)
    real, out, random = scratch.real[at], scratch.levels[at], scratch.integers[at]
    np.multiply(values, scale, out=real)
    cut = 0
    # NaN fails both comparisons, so it is found here. (The array methods max and min cost more than the work itself.)
    if not (np.maximum.reduce(real) <= top and np.minimum.reduce(real) >= -top):
        if not np.isfinite(values).all():
            raise DivergedError(
                f"segment {layout.segments[index].name} of the site's vector: a value is not finite (infinite or NaN)",
                "lower the learning rate: training diverged",
            )
        cut = int(np.count_nonzero(np.abs(real) > top))
        np.clip(real, -top, top, out=real)
    # First to the grid of 2^f fractions of a level, then stochastically to levels: the second step has no bias.
    np.rint(real, out=real)
    np.copyto(out, real, casting="unsafe")
    np.copyto(random, scratch.noise[at])
    if f < 16:
        np.right_shift(random, np.int32(16 - f), out=random)
    np.add(out, random, out=out)
    np.right_shift(out, np.int32(f), out=out)
    np.add(out, np.int32(layout.level), out=out)
    return cut


def _scales(layout: Layout) -> list[np.float32]:
    return [np.float32((layout.level << layout.fraction_bits) / segment.bound) for segment in layout.segments]


def _flat(layout: Layout, values: Values) -> list[NDArray[np.generic]]:
    """Return each segment's numbers in their order in the vector: float32 values, or the digits of counts."""
    expected = {segment.name for segment in layout.segments}
    if set(values) != expected:
        wrong = sorted(expected.symmetric_difference(values))
        raise ProtocolError(
            f"the site's vector must have exactly the segments of the layout; missing or unknown: {', '.join(wrong)}",
            "report this as a bug",
        )
    result: list[NDArray[np.generic]] = []
    for segment in layout.segments:
        array = np.asarray(values[segment.name]).reshape(-1)
        if array.size != segment.size:
            raise ProtocolError(
                f"segment {segment.name} of the site's vector: expected {segment.size} values, got {array.size}",
                "report this as a bug",
            )
        result.append(_digits(layout, segment, array) if segment.count else array.astype(np.float32, copy=False))
    return result


def _digits(layout: Layout, segment: Segment, array: NDArray[np.floating | np.integer]) -> NDArray[np.int32]:
    """Write counts in base 2^bits: the least digit of all values, then the next digit, and so on."""
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if not (np.array_equal(whole, array) and (whole >= 0).all() and (whole <= segment.bound).all()):
        raise DivergedError(
            f"segment {segment.name} of the site's vector: each count (such as a number of units) must be a whole "
            "number from 0 to "
            f"{segment.bound:.0f}, found another value",
            "report this as a bug",
        )
    shifts = layout.bits * np.arange(layout.digits(segment))
    digits: NDArray[np.int64] = (whole >> shifts[:, None]) & ((1 << layout.bits) - 1)
    return digits.astype(np.int32).reshape(-1)


def _pieces(layout: Layout, first: int, last: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the parts of segments in [first, last) of the vector.

    Each is the segment's index, the slice of the segment's numbers, and the slice of [first, last).
    """
    index = bisect.bisect_right(layout.starts, first) - 1
    here = first
    while here < last:
        start, end = layout.starts[index], min(last, layout.starts[index + 1])
        yield index, slice(here - start, end - start), slice(here - first, end - first)
        here, index = end, index + 1


@dataclass(frozen=True)
class Sums:
    """The exact sums of all sites' numbers, as integers and as values.

    Attributes:
        numbers: Shape (layout.length,), the integer sums of the lanes.
        values: By segment, the sum of the sites' values: float64 for real values, int64 for counts.
    """

    numbers: NDArray[np.int64]
    values: dict[str, NDArray[np.float64 | np.int64]]


def dequantise(layout: Layout, words: Words, contributors: int) -> Sums:
    """Unpack the sum of the words of `contributors` sites.

    The sum of real values is (S - contributors * L) * bound / L for the integer sum S, exact up to one rounding
    in double precision. Each site's part differs from its own value by less than bound / L.

    Raises:
        ProtocolError: The number of words or of contributors does not fit the layout, or a lane or a sum of
            counts exceeds the most that the contributors can send: a site did not follow the encoding.
    """
    if words.shape != (layout.words,):
        raise ProtocolError(
            f"the sum of the sites' vectors must have {layout.words} words of 64 bits, got an array of shape "
            f"{words.shape}",
            "report this as a bug",
        )
    if not 1 <= contributors <= layout.sites:
        raise ProtocolError(
            f"the number of sites in the sum must be 1 to {layout.sites}, got {contributors}", "report this as a bug"
        )
    numbers = np.empty(layout.length, np.int64)
    values: dict[str, NDArray[np.float64 | np.int64]] = {}
    scratch = np.empty(_BLOCK, WORD)
    mask = np.uint64(2**layout.lane_bits - 1)
    limit = largest_sum(layout.bits, contributors)
    for lane in range(layout.lanes):
        begin = lane * layout.words
        for start in range(begin, min(begin + layout.words, layout.length), _BLOCK):
            stop = min(start + _BLOCK, begin + layout.words, layout.length)
            block = scratch[: stop - start]
            np.right_shift(words[start - begin : stop - begin], np.uint64(lane * layout.lane_bits), out=block)
            np.bitwise_and(block, mask, out=block)
            # A lane above the limit shows a site that broke the encoding. It may have carried into other lanes, so no
            # part of the sum can be used.
            if int(block.max()) > limit:
                raise ProtocolError(
                    f"a number in the sum of the sites' vectors exceeds {limit}, the largest sum that {contributors} "
                    "sites can send",
                    "start a new round: a site sent values outside the agreed bounds, so this round is lost",
                )
            np.copyto(numbers[start:stop], block, casting="unsafe")
    for index, segment in enumerate(layout.segments):
        part = numbers[layout.starts[index] : layout.starts[index + 1]]
        values[segment.name] = _values(layout, segment, part, contributors)
    return Sums(numbers, values)


def _values(
    layout: Layout, segment: Segment, numbers: NDArray[np.int64], contributors: int
) -> NDArray[np.float64 | np.int64]:
    if segment.count:
        digits = numbers.reshape(layout.digits(segment), segment.size)
        places = np.int64(2) ** (layout.bits * np.arange(digits.shape[0], dtype=np.int64))
        counts: NDArray[np.int64] = (digits * places[:, None]).sum(axis=0)
        most = min(contributors * int(segment.bound), _MAX_COUNTS)
        # Also in double precision: a sum that overflows an int64 may look small.
        if counts.max() > most or (digits * places[:, None].astype(np.float64)).sum(axis=0).max() > _MAX_COUNTS:
            raise ProtocolError(
                f"segment {segment.name} of the vectors: the sum of the sites' counts exceeds {most}, the largest "
                "sum that they can send",
                "start a new round: a site sent values outside the agreed bounds, so this round is lost",
            )
        return counts
    result = numbers.astype(np.float64)
    np.subtract(result, contributors * layout.level, out=result)
    np.multiply(result, segment.bound / layout.level, out=result)
    return result
