"""Distributed differential privacy: every site adds a share of the noise, and only the sum of the sites is private.

A step's vector at site i is v_i, the sum of its units' clipped gradients. Let m sites be certain to add their share.
Each site adds Gaussian noise of deviation s = z C / sqrt(m), and rounds the result to multiples ("levels") of s / 2^k,
k >= 3. Secure aggregation adds the integers; the coordinator learns their sum and nothing else.

Guarantee of one step: for any m or more honest sites in the sum, the sum of their integers is, up to a total
variation distance of at most `approximation_error` per number (below 10^-260), a randomised function of
sum(v_i) + N(0, z²C²) alone. With Poisson sampling it is therefore accounted as the Poisson-subsampled Gaussian
mechanism of noise multiplier z (`docs/privacy.md` has the proof). The noise is added before rounding, so rounding
does not raise the sensitivity. A sum over more than m sites is that over m, with further independent noise. The
adversary may know the integers of corrupt sites and subtract them; that changes nothing.

No value is cut after the noise, and lanes may overflow: the coordinator sees a sum of words modulo 2^64, which is a
function of the sums of integers, whatever their size. Overflow makes a step useless, and leaks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import ProtocolError, StateError, StudyError
from privet.common.privacy.correlated import FRESH_BITS, Band
from privet.common.privacy.correlated import LEAST_LEVEL_BITS as LEAST_BANDED_BITS
from privet.common.privacy.noise import LATTICE, Randomness
from privet.common.secagg.quantize import WORD, Words

Integers = NDArray[np.int64]

LEAST_LEVEL_BITS = 3
"""2^3 levels to a deviation make the sum of rounded shares a rounded Gaussian, to 10^-260."""
MOST_LEVEL_BITS = 12
_LATTICE_BITS = 40
# The noise of a sum is within so many deviations, except with a probability of 10^-32.
_NOISE_RANGE = 12.0
# Bound on a value in fine levels before the noise, so that it fits an int64. No step comes near it. Cutting to a bound
# is a contraction, so it does not raise the sensitivity.
_LARGEST = 2**60


@dataclass(frozen=True)
class SharedNoise:
    """The noise that each site adds in a step, and its lattice. All sites and the coordinator derive the same one.

    Attributes:
        survivors: Least number of sites in a sum. With fewer, the step ends before anything is revealed.
        corrupt: c, how many of these may collude with the coordinator, or add no noise.
        noise_multiplier: z, the noise multiplier of a sum in the worst case that is admitted.
        clip_norm: C.
        level_bits: k; the deviation of a share has 2^k levels.
        least_multiplier: Least noise multiplier of one share; it counts if z / sqrt(m) is below it.
        band: How the noise is correlated over steps; None: each step's is fresh.
        least_helpers: With a band, m over all sums of the study, from which the deviation follows: correlated noise has
            one deviation, whatever the cohort of a step.
    """

    survivors: int
    corrupt: int
    noise_multiplier: float
    clip_norm: float
    level_bits: int
    least_multiplier: float = 0.0
    band: Band | None = None
    least_helpers: int = 0

    def __post_init__(self) -> None:
        if self.helpers < 2:
            raise StudyError(
                "privacy: noise in shares needs at least two honest sites in every sum, but a sum may be over "
                f"{self.survivors} "
                f"sites, {self.corrupt} of them corrupt",
                "raise cohort.min_sites, or lower privacy.dropouts or secure_aggregation.corrupt",
            )
        least = least_level_bits(self.band)
        if not least <= self.level_bits <= MOST_LEVEL_BITS:
            raise StudyError(
                f"privacy: one standard deviation of a site's noise must take {least} to "
                f"{MOST_LEVEL_BITS} bits of a "
                f"masked value, got {self.level_bits}",
                "change secure_aggregation.bits in the study",
            )
        if not (math.isfinite(self.deviation) and self.deviation * LATTICE > 2.0**-1000):
            raise StateError(
                "the standard deviation of the noise must be finite and large enough to compute with, got "
                f"{self.deviation:g}",
                "check privacy.clip_norm and privacy.epsilon in the study",
            )

    @property
    def helpers(self) -> int:
        """m: least number of honest sites in a sum. Their shares alone have a noise multiplier of at least z."""
        return self.survivors - self.corrupt

    @property
    def deviation(self) -> float:
        """Standard deviation of one site's share, in units of the gradient; with a band, of its fresh noise."""
        return self.own_multiplier * self.clip_norm * (1.0 if self.band is None else self.band.norm)

    @property
    def level(self) -> float:
        """Size of one level: the value of the integer 1, in units of the gradient."""
        return self.deviation * 2.0**-self.level_bits

    @property
    def lattice(self) -> float:
        """Distance between neighbouring values of the noise before it is rounded to levels."""
        return self.deviation * LATTICE

    @property
    def own_multiplier(self) -> float:
        """Noise multiplier of one share: all that is left if every other site is corrupt."""
        helpers = self.helpers if self.band is None else min(self.helpers, self.least_helpers)
        return max(self.noise_multiplier / math.sqrt(helpers), self.least_multiplier)

    def effective_multiplier(self, present: int) -> float:
        """Return the noise multiplier of a sum over `present` sites, of which `corrupt` added nothing."""
        return self.own_multiplier * math.sqrt(present - self.corrupt)

    def document(self, present: int) -> dict[str, Any]:
        """Return the part of a step's statement about the noise in a sum over `present` sites, as plain JSON values."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "of_this_sum": self.effective_multiplier(present),
            "of_one_share": self.own_multiplier,
            "level_bits": self.level_bits,
        }


def contribute(points: Integers, shares: SharedNoise, randomness: Randomness) -> Integers:
    """Return a site's part of a step: the sum of its terms plus its share of the noise, in levels.

    With u = `shares.lattice` this is floor((points + h) / 2^(40 - k) + 1/2), in exact integers: h is
    `Randomness.lattice_normal`, a Gaussian rounded to half-integers. Cells of the coarse lattice end where cells of the
    fine one do, so this is exactly a Gaussian around u·points, rounded once.

    Args:
        points: Sum of clipped gradients in multiples of `shares.lattice`, shape (d,).
        shares: The noise of the step.
        randomness: A stream that nothing else uses.
    """
    shift = _LATTICE_BITS - shares.level_bits
    found: Integers = np.clip(points, -_LARGEST, _LARGEST)
    found += _drawn(found.size, randomness)
    found += 1 << (shift - 1)
    found >>= shift
    return found


def contribute_correlated(
    points: Integers, shares: SharedNoise, past: Mapping[int, Integers], randomness: Randomness
) -> tuple[Integers, Integers]:
    """Return a site's part of a step with correlated noise, in levels, and the step's noise, which the site must keep.

    The noise is N = floor(h) - R(past): fresh noise less what is taken back (`Band.compensation`). The part is
    floor((points + N + F) / 2^(40 - k) + 1/2). F has a deviation of 8 levels, is fresh and is never kept, so that the
    sum of several sites' parts is a function of their points and N together (`docs/correlated-noise.md`, step 1).

    Args:
        points: As for `contribute`.
        shares: The noise of the step, with a band.
        past: The noise of earlier steps that is taken back, [d] each, by the number of steps since.
        randomness: A stream that nothing else uses.

    Raises:
        StateError: The noise has no band, or `past` does not fit it.
    """
    if shares.band is None:
        raise StateError("correlated noise: expected a study with a band, found none", "report this as a bug")
    shift = _LATTICE_BITS - shares.level_bits
    noise = _drawn(points.size, randomness) - shares.band.compensation(past, points.size)
    found: Integers = np.clip(points, -_LARGEST, _LARGEST)
    found += noise
    found += _drawn(points.size, randomness) >> (shares.level_bits - FRESH_BITS)
    found += 1 << (shift - 1)
    found >>= shift
    return found, noise


def _drawn(count: int, randomness: Randomness) -> Integers:
    return np.floor(randomness.lattice_normal(count)).astype(np.int64)


def least_level_bits(band: Band | None) -> int:
    """Return the least number of bits that one standard deviation of a share must take."""
    return LEAST_LEVEL_BITS if band is None else LEAST_BANDED_BITS


def rescale(sums: Integers, shares: SharedNoise) -> NDArray[np.float64]:
    """Return the sum of the sites' noisy gradients, from the sums of their integers."""
    return sums.astype(np.float64) * shares.level


def pack_lanes(numbers: Integers, lane_bits: int) -> Words:
    """Lay signed integers into 64-bit words, `64 // lane_bits` to a word, number e in word e mod words.

    A word is the sum of its numbers times powers of 2^lane_bits, modulo 2^64. So the sum of words is the word of sums.
    """
    lanes = 64 // lane_bits
    size = -(-len(numbers) // lanes)
    words = np.zeros(size, WORD)
    for lane in range(lanes):
        part = numbers[lane * size : (lane + 1) * size].astype(np.uint64)
        words[: len(part)] += part << np.uint64(lane * lane_bits)
    return words


def unpack_lanes(words: Words, count: int, lane_bits: int) -> Integers:
    """Return the `count` sums in a sum of packed words, each in [-2^(lane_bits - 1), 2^(lane_bits - 1)).

    Raises:
        ProtocolError: The number of words is not the one that `count` numbers take.
    """
    lanes = 64 // lane_bits
    size = -(-count // lanes)
    if words.shape != (size,):
        raise ProtocolError(
            f"the sum of the sites' vectors must have {size} words of 64 bits, got an array of shape {words.shape}",
            "report this as a bug",
        )
    numbers = np.empty(lanes * size, np.int64)
    mask, sign = np.uint64(2**lane_bits - 1), np.int64(2 ** (lane_bits - 1))
    rest = words.astype(np.uint64)
    for lane in range(lanes):
        # A negative number borrows from the lane above it: subtract it with its sign before the next lane is read.
        low = ((rest & mask).astype(np.int64) ^ sign) - sign
        numbers[lane * size : (lane + 1) * size] = low
        rest = (rest - low.astype(np.uint64)) >> np.uint64(lane_bits)
    return numbers[:count]


def level_bits(
    lane_bits: int, sites: int, helpers: int, noise_multiplier: float, units: float, spread: float = 1.0
) -> int:
    """Return k for the finest lattice on which no lane overflows, at most 12. It may be too coarse to be used.

    The noise of a sum over `sites` shares has a deviation of sqrt(sites) 2^k levels, and stays within 12 deviations;
    correlated noise has `spread` times as much. The gradients of `units` drawn units change one number by at most C
    each, if all point the same way. C is sqrt(helpers) / z times 2^k levels, or less.
    """
    reach = _NOISE_RANGE * math.sqrt(sites) * spread + units * math.sqrt(helpers) / noise_multiplier
    return min(math.floor(lane_bits - 1 - math.log2(reach)), MOST_LEVEL_BITS)


def approximation_error(deviation: float, helpers: int) -> float:
    """Return the natural logarithm of the largest distance between the sum of rounded shares and a rounded sum.

    With values u_i and deviation s in levels, let X = sum of floor(u_i + N(0, s²) + 1/2) over m = `helpers` sites
    and Y = floor(sum(u_i) + N(0, m s²) + U_1 + ... + U_(m-1) + 1/2) with U uniform on [-1/2, 1/2). By Poisson
    summation, P(X = k) - P(Y = k) is at most sum exp(-2 pi² s² V(j)) / (s sqrt(2 pi m)) over the tuples j of m
    integers that are not all equal, counted up to a common shift, V(j) = sum (j_i - mean)². Shifted to median 0,
    V(j) >= sum |j_i| / 2, hence with x = exp(-pi² s²)

        |P(X = k) - P(Y = k)| <= (((1 + x) / (1 - x))^m - 1) / (s sqrt(2 pi m)).

    Beyond K = sqrt(2 m) pi s² + m / 2 of sum(u_i), either has probability 2 x at most. The total variation distance is
    (K + 1) times the bound, plus 2 x.

    Args:
        deviation: s, at least 1.
        helpers: m.
    """
    log_x = -((math.pi * deviation) ** 2)
    # ((1 + x) / (1 - x))^m - 1 <= 2.1 m x exp(2.1 m x) for x <= exp(-pi²).
    slack = 2.1 * helpers * math.exp(log_x)
    reach = math.sqrt(2 * helpers) * math.pi * deviation**2 + helpers / 2 + 1
    factor = reach * 2.1 * helpers * math.exp(slack) / (deviation * math.sqrt(2 * math.pi * helpers)) + 2
    return log_x + math.log(factor)
