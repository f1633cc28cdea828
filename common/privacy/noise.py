"""Randomness for sampling and noise: one cryptographic stream, secret or reproducible.

Both sources expand a 256-bit key with AES-256-CTR (NIST SP 800-38A, section 6.5). `SecretRandomness` takes
its key from the operating system; sites use it. `SeededRandomness` derives its key from a public seed. It
makes simulations reproducible and protects nothing, so it is a separate type.

Noise is a discrete Gaussian (Canonne, Kamath and Steinke 2020) on a lattice with a spacing of 2^-40 deviations.
What is released is a sum of integers on the same lattice (`lattice_release`). Floating-point noise
that is added naively leaks the value through its low-order bits (Mironov 2012).

Guarantee of the sampler (`lattice_normal`). Its distribution is that of a Gaussian rounded to half-integers, up to

* a factor between 1 - 2^-46 and 1 + 2^-46 for every value within 14 deviations, if exp is within 4 ulp of the truth;
* an additive 2^-126 in total variation for a variate (`SAMPLER_DISTANCE`), with the mass beyond 14 deviations.

`docs/privacy.md` has the proof, and what both add to epsilon and delta of a study.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privet.common.errors import StateError

LATTICE = 2.0**-40
"""Distance between neighbouring values of released noise, in standard deviations."""

SAMPLER_FACTOR, SAMPLER_DISTANCE = 2.0**-46, 2.0**-126
"""Errors of the sampler for one variate: relative within 14 deviations, and additive in total variation."""

# The envelope of the sampler: cells of 2^34 lattice points, 1/64 deviation each, to 10 deviations on each side.
_LOW_BITS, _CELLS, _CELL = 34, 640, 2.0**-6
_ENTRIES = 1 << 16
# 2^8 more cells, to 14 deviations, which one candidate in 2^64 is for.
_FAR_BITS = 8
_RAREST = (1 << 64) - 1
_BLOCK = 1 << 14  # candidates at a time, so that they stay in a core's cache


class Randomness:
    """A stream of uniform and normal variates expanded from a 256-bit key."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return `count` uniform variates in [0, 1), multiples of 2^-53."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` standard normal variates: odd multiples of 2^-41, at most 14 in absolute value."""
        return self.lattice_normal(count) * LATTICE

    def lattice_normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` variates of the discrete Gaussian of deviation 2^40 on the half-integers.

        The value h, a half-integer up to 14 * 2^40 in absolute value, has a probability proportional to
        exp(-h^2 / 2^81), up to a factor of 1 ± 2^-46 and an additive 2^-126 in total variation.
        """
        found = np.empty(count)
        filled = 0
        while filled < count:
            # A few more than are missing, as about one candidate in 70 is rejected.
            candidates = min(_BLOCK, count - filled + (count - filled) // 32 + 8)
            block = _accepted(self.words(2 * candidates), self.words)[: count - filled]
            found[filled : filled + len(block)] = block
            filled += len(block)
        return found


class SecretRandomness(Randomness):
    """Keyed by the operating system. A site uses it for everything that it releases."""

    def __init__(self) -> None:
        super().__init__(os.urandom(32))


class SeededRandomness(Randomness):
    """Keyed by public values: reproducible, and for simulations only. It protects nothing."""

    def __init__(self, seed: int, *purpose: str | int) -> None:
        super().__init__(derive_key(seed, *purpose))


def cut(values: NDArray[np.floating[Any]], unit: float) -> NDArray[np.int64]:
    """Return values in multiples of `unit`, cut to integers towards zero: no result times `unit` exceeds its value.

    Args:
        values: Finite, any shape, each below 2^60 multiples in absolute value.
        unit: Size of the integer 1: `lattice_unit` of the noise's deviation.
    """
    quotients = np.asarray(values, np.float64) / unit
    if math.frexp(unit)[0] != 0.5:
        # Only a division by a power of two is exact. The quotient and this product are each rounded, up by 2^-53 of
        # themselves at most; the factor takes both back.
        quotients = quotients * (1 - 2**-52)
    return np.trunc(quotients).astype(np.int64)


def lattice_release(points: NDArray[np.int64], unit: float, randomness: Randomness) -> NDArray[np.float64]:
    """Return integers of a lattice plus independent Gaussian noise of deviation 2^40, times `unit`, in float64.

    Guarantee: the result is a function of the half-integers `points` + h alone, where h is `lattice_normal`. The noise
    h does not depend on the points. The release is the Gaussian mechanism on the points, rounded to cells, which is
    post-processing (`docs/privacy.md` has the proof and its errors). The points are added up as integers before, so
    one unit changes them by exactly its own term. 2·points + 2h is an exact integer, and its conversion to float64 a
    function of it.

    Args:
        points: Below 2^60 in absolute value, any shape.
        unit: Size of the integer 1: `lattice_unit` of the noise's deviation.
        randomness: A stream that nothing else uses.
    """
    noise = (2 * randomness.lattice_normal(points.size)).astype(np.int64).reshape(points.shape)
    released: NDArray[np.float64] = (2 * points + noise).astype(np.float64) * (unit / 2)
    return released


def lattice_unit(deviation: float) -> float:
    """Return the distance u between neighbouring values of noise of standard deviation `deviation`.

    Raises:
        StateError: The deviation is not a positive finite number, or is too small to be divided.
    """
    unit = deviation * LATTICE
    if not (math.isfinite(deviation) and unit > 2.0**-1000):
        raise StateError(
            f"the standard deviation of the noise must be finite and large enough to compute with, got {deviation:g}",
            'check privacy.clip_norm and privacy.epsilon in the study; without privacy, set privacy.mode = "none"',
        )
    return unit


def _accepted(words: NDArray[np.uint64], more: Callable[[int], NDArray[np.uint64]]) -> NDArray[np.float64]:
    """Return the half-integers that rejection sampling keeps, from `words` [2n], two for each candidate.

    Of the first word, 16 bits choose the cell, 34 bits the point in it, and 1 bit the sign. The second word decides
    whether the candidate is kept: with the chance K / 2^64, a word below floor(K) keeps it. Two words in 2^64 need
    more words (`_decide`): the word floor(K), and the largest word.
    """
    start, height = _envelope()
    points, chances = np.split(words, 2)
    entries = (points >> np.uint64(48)).astype(np.intp)
    magnitude = start.take(entries)
    magnitude |= points.view(np.int64) & np.int64((1 << _LOW_BITS) - 1)
    found = magnitude.astype(np.float64)
    found += 0.5
    keep = found * found
    keep *= -0.5 * LATTICE**2
    np.exp(keep, out=keep)
    keep *= height.take(entries)
    keep -= chances.astype(np.float64) * 2.0**-64
    kept = keep >= 2.0**-64
    # A difference below 2^-64 is exact in float64, as its two terms differ by less than a factor of 2, or one is 0.
    if np.count_nonzero(keep > 0) > np.count_nonzero(kept) or chances.max(initial=0) == _RAREST:
        _decide(found, kept, keep, chances, more)
    signs = found.view(np.uint64)
    signs |= (points << np.uint64(63 - _LOW_BITS)) & np.uint64(1 << 63)
    return found[kept]


def _decide(
    found: NDArray[np.float64],
    kept: NDArray[np.bool_],
    left: NDArray[np.float64],
    chances: NDArray[np.uint64],
    more: Callable[[int], NDArray[np.uint64]],
) -> None:
    """Decide the candidates that one word of 64 bits cannot decide, in place.

    * The word floor(K): keep the candidate with the chance K - floor(K), which is 2^64 times what is `left`.
    * The largest word, which keeps no candidate: propose a point between 10 and 14 deviations instead. A point of the
      envelope has the weight 2^-51 M exp(-x²/2), and a point here 2^-107 times the chance that keeps it.
    """
    for index in np.flatnonzero((left > 0) & ~kept):
        kept[index] = float(more(1)[0]) * 2.0**-64 < left[index] * 2.0**64
    for index in np.flatnonzero(chances == _RAREST):
        point, chance = (int(word) for word in more(2))
        cell, low = _CELLS + (point >> (64 - _FAR_BITS)), point & ((1 << _LOW_BITS) - 1)
        found[index] = (cell << _LOW_BITS) + low + 0.5
        weight = float(_envelope()[1][-1]) * math.exp(-0.5 * (found[index] * LATTICE) ** 2)
        kept[index] = chance * 2.0**-64 < weight * 2.0**56


@lru_cache(maxsize=1)
def _envelope() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return, for each of 2^16 equally likely entries, its cell's first point and the factor for exp(-x²/2).

    A cell has n entries, so its points are proposed with a probability proportional to n. Keeping a point with
    probability M exp(-x²/2) / n leaves exp(-x²/2). The n are the smallest integers, at least 1, for which no such
    probability exceeds 1. M is the largest for which all n fit into the entries; bisection finds it.
    """
    peaks = np.exp(-0.5 * (np.arange(_CELLS) * _CELL) ** 2)
    low, high = 0.0, float(_ENTRIES)
    for _ in range(60):
        middle = (low + high) / 2
        fits = np.maximum(1, np.ceil(middle * peaks)).sum() <= _ENTRIES
        low, high = (middle, high) if fits else (low, middle)
    counts = np.maximum(1, np.ceil(low * peaks)).astype(np.int64)
    counts[0] += _ENTRIES - counts.sum()
    start = np.repeat(np.arange(_CELLS, dtype=np.int64) << _LOW_BITS, counts)
    return start, np.repeat(low / counts, counts)


def derive_key(seed: int, *purpose: str | int) -> bytes:
    """Return a 256-bit key for one purpose: the SHA-256 of seed and purpose, each with its length before it."""
    parts = [str(part).encode() for part in (seed, *purpose)]
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for generators that take integers."""
    return int.from_bytes(derive_key(seed, *purpose)[:8], "big") >> 1
