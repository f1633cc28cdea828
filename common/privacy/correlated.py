"""Correlated ("banded") noise in shares: each site takes part of the noise of its last steps back.

A site's noise of step t is N_t = Z_t - sum over l of R(c_l a_(t-l) N_(t-l)), l = 1..b-1. Z_t is fresh Gaussian noise,
c_1..c_(b-1) are public coefficients, and a_u is 1 where the site's share of step u entered a sum, otherwise 0. R rounds
to integers. A unit is drawn in every b-th step only, each unit in the steps of its class (`class_of`). So b consecutive
pieces of fresh noise protect one draw, and later noise cancels much of what earlier noise did to the model.

Guarantee. With |c| = sqrt(1 + sum c_l²), a clip norm C and m honest sites in every revealed sum, fresh noise of
deviation z C |c| / sqrt(m) at each site makes the study, for one unit, at most the composition of ceil(T / b)
Poisson-subsampled Gaussian mechanisms with noise multiplier z and rate b q. `docs/correlated-noise.md` has the
assumptions and the proof.

The coefficients are the first b of (1 - x)^(-1/2) (1 - beta x)^(-1/2), beta being the momentum of the server: the
banded square root of the workload (Kalinin and Lampert 2024, arXiv:2405.13763, theorem 1). They are computed in
rationals, so all machines get the same ones.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import StateError, StudyError
from privet.common.privacy.noise import derive_key
from privet.common.study.sections import MOST_BAND

Integers = NDArray[np.int64]

LEAST_LEVEL_BITS = 7
"""2^7 levels to a deviation keep the noise that hides single shares (`FRESH_LEVELS`) below 0.4 % of the variance."""
FRESH_BITS = 3
"""The noise that is never taken back has a deviation of 2^3 levels: see step 5 of the proof."""

_COEFFICIENT_BITS = 14
# Memory is cut to this before it is used, 16 deviations of fresh noise. Cutting is a contraction.
_MEMORY_BITS = 44
# Products of memory and coefficients fit an int64, whose sum has 63 bits.
_MOST_WEIGHT = 1 << (63 - _MEMORY_BITS)
# Steps after which entries of a band's inverse add nothing to its norm.
_SETTLED = 2000
# What rounding may add to the cost, of the 1e-6 by which units are clipped below C (`clip_units`).
_MARGIN = 9e-7


@dataclass(frozen=True)
class Band:
    """How noise is correlated over steps.

    Attributes:
        coefficients: c_1..c_(b-1) in multiples of 2^-14; c_0 is 1.
    """

    coefficients: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.coefficients or len(self.coefficients) >= MOST_BAND:
            raise StudyError(
                f"privacy.band: expected 2 to {MOST_BAND} steps, found {len(self.coefficients) + 1}",
                "change privacy.band in the study",
            )
        if min(self.coefficients) < 0 or sum(self.coefficients) >= _MOST_WEIGHT - (1 << _COEFFICIENT_BITS):
            raise StudyError(
                f"privacy.band: {len(self.coefficients) + 1} steps weigh more than integers of 64 bits hold under the "
                "server's momentum",
                "lower privacy.band or aggregation.momentum in the study",
            )

    @property
    def steps(self) -> int:
        """b: number of steps that a piece of fresh noise reaches over, its own included."""
        return len(self.coefficients) + 1

    @property
    def norm(self) -> float:
        """|c|, rounded up: by how much correlation raises the sensitivity."""
        squares = (1 << 2 * _COEFFICIENT_BITS) + sum(value * value for value in self.coefficients)
        return math.sqrt(squares) * (1 + 2.0**-50) / (1 << _COEFFICIENT_BITS)

    def spread(self, steps: int) -> float:
        """Return the largest deviation of a site's noise in `steps` steps without drop-outs, over that of fresh noise.

        It is the norm of the last row of the inverse of the band.
        """
        return _spread(self.coefficients, min(steps, _SETTLED))

    def check_rounding(self, own_multiplier: float, helpers: int, numbers: int) -> None:
        """Refuse a study in which rounding could raise the cost by more than the margin of clipping.

        A window of b steps at m sites moves by at most |c| C / sqrt(m) plus u sqrt(m d) (|c| + sqrt(b - 1)), with u
        the lattice of the noise and d numbers (`docs/correlated-noise.md`, "Integers").

        Raises:
            StudyError: It could.
        """
        excess = own_multiplier * helpers * math.sqrt(numbers) * (self.norm + math.sqrt(self.steps - 1)) * 2.0**-40
        if excess > _MARGIN:
            raise StudyError(
                f"privacy.noise: with a noise multiplier of {own_multiplier:.3g} at each of {helpers} sites and "
                f"{numbers} values, rounding would raise the cost by {excess:.2g}, more than clipping leaves room for",
                'set privacy.noise = "independent" in the study, or raise privacy.epsilon',
            )

    def compensation(self, past: Mapping[int, Integers], size: int) -> Integers:
        """Return the sum of R(c_l N_(t-l)), int64 [d]: a function of the memory alone, in exact integers.

        One number moves by at most c_l |x| + 1 where the memory of lag l moves by x. Products are rounded one by one,
        so that this move does not depend on the noise of other steps. Cutting memory keeps everything within 64 bits
        whatever was taken back: without a bound, some patterns of drop-outs make the recursion grow.

        Args:
            past: Noise of earlier steps, [d] each, by lag; only lags 1 to b-1 whose noise is to be taken back.
            size: d.

        Raises:
            StateError: A lag or a size does not fit.
        """
        total = np.zeros(size, np.int64)
        bound = 1 << _MEMORY_BITS
        for lag, noise in past.items():
            if not 1 <= lag < self.steps or noise.shape != (size,) or noise.dtype != np.int64:
                raise StateError(
                    f"the noise of an earlier step: expected {size} integers of one of the last {self.steps - 1} "
                    f"steps, found {noise.size} of {lag} steps before",
                    "report this as a bug",
                )
            product = np.clip(noise, -bound, bound) * self.coefficients[lag - 1]
            product += 1 << (_COEFFICIENT_BITS - 1)
            product >>= _COEFFICIENT_BITS
            total += product
        return total

    def class_of(self, seed: int, unit: str) -> int:
        """Return the class of a unit. It follows from the study's seed and the unit's own name, and nothing else."""
        key = derive_key(seed, "noise-classes", self.steps)
        return int.from_bytes(hmac.digest(key, unit.encode(), hashlib.sha256)[:8], "big") % self.steps


@lru_cache(maxsize=64)
def _spread(coefficients: tuple[int, ...], steps: int) -> float:
    return math.sqrt(math.fsum(value * value for value in _inverse(coefficients, steps)))


def _inverse(coefficients: tuple[int, ...], steps: int) -> list[float]:
    """Return the first column of the inverse of a band: noise of later steps as a sum of fresh noise."""
    found = [1.0]
    weights = [value / (1 << _COEFFICIENT_BITS) for value in coefficients]
    for step in range(1, steps):
        found.append(-sum(weight * found[step - 1 - lag] for lag, weight in enumerate(weights[:step])))
    return found


def error_of_sums(band: Band | None, steps: int, momentum: float) -> float:
    """Return the root mean square error of a server's running sums, in deviations of a step's fresh noise.

    The server adds up steps, each an average of sums with `momentum`. Correlated noise makes this error small, which is
    what it can do for a model whose gradients do not depend on the noise.

    Args:
        band: How the noise is correlated; None: not at all.
        steps: Number of steps of the study.
        momentum: From 0 up to below 1.
    """
    noise = [1.0] + [0.0] * (steps - 1) if band is None else _inverse(band.coefficients, steps)
    moving, total, found = 0.0, 0.0, 0.0
    for step, value in enumerate(noise):
        moving = momentum * moving + (1 - momentum) * value
        total += moving
        found += (steps - step) * total * total
    return math.sqrt(found / steps)


@lru_cache(maxsize=64)
def band_of(steps: int, momentum: float) -> Band:
    """Return the band of `steps` steps for a server whose momentum is `momentum`; 0: it adds sums up.

    Raises:
        StudyError: It is too long.
    """
    root = [Fraction(1)]
    for index in range(1, steps):
        root.append(root[-1] * (2 * index - 1) / (2 * index))
    beta = Fraction(momentum)
    found = [sum(root[i] * root[k - i] * beta ** (k - i) for i in range(k + 1)) for k in range(1, steps)]
    return Band(tuple(round(value * (1 << _COEFFICIENT_BITS)) for value in found))
