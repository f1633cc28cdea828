"""Shamir's secret sharing of 32-byte secrets over a prime field (Shamir, "How to share a secret", 1979).

Any `threshold` shares give the secret back. Fewer shares are independent of it. Shares are not authenticated: check
the combined secret against a commitment.

Python's integers do not run in constant time. So these functions are for parties that may know the secrets, on
machines whose timing no attacker measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from privet.common.errors import ProtocolError

RandomBytes = Callable[[int], bytes]

SECRET_BYTES = 32
SHARE_BYTES = 33
# The smallest prime above 2^256, so that every 32-byte secret is a field element.
PRIME = 2**256 + 297
# Bytes of a coefficient before it is reduced modulo PRIME: 48 bytes give a distance of 2^-127 from uniform.
_WIDE = 48


def split(secret: bytes, points: Sequence[int], threshold: int, random_bytes: RandomBytes) -> list[bytes]:
    """Split `secret` into shares, of which any `threshold` give it back.

    Args:
        secret: 32 bytes.
        points: The holders' x coordinates, distinct and from 1 up.
        threshold: Shares needed, from 1 to `len(points)`.
        random_bytes: Source of the coefficients; must be a CSPRNG.

    Returns:
        One share of 33 bytes (big-endian) per point, in the order of `points`.

    Raises:
        ProtocolError: The secret's length, the points or the threshold are out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise ProtocolError(
            f"a secret to be shared must have {SECRET_BYTES} bytes, got {len(secret)}", "report this as a bug"
        )
    if not 1 <= threshold <= len(points):
        raise ProtocolError(
            f"the threshold must be 1 to {len(points)}, the number of sites that get a share, got {threshold}",
            "report this as a bug",
        )
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise ProtocolError(
            "the numbers of the sites that get a share must be distinct and above 0", "report this as a bug"
        )
    coefficients = [int.from_bytes(random_bytes(_WIDE), "big") % PRIME for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    return [_evaluate(coefficients, constant, x).to_bytes(SHARE_BYTES, "big") for x in points]


def _evaluate(coefficients: Sequence[int], constant: int, x: int) -> int:
    # Points are small numbers, so reducing once at the end is cheaper than at every step.
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * x
    return (value + constant) % PRIME


def weights(points: Sequence[int]) -> list[int]:
    """Return the Lagrange coefficients at 0 for shares at `points`.

    Raises:
        ProtocolError: Two points are equal, or one is not above 0.
    """
    if not points or len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise ProtocolError(
            "the numbers of the sites that hold shares must be distinct and above 0", "report this as a bug"
        )
    product = math.prod(points)
    denominators = [math.prod([other - x for other in points if other != x]) * x % PRIME for x in points]
    # One modular inversion for all points (Montgomery's trick): prefixes[i] is the product of the first i denominators.
    prefixes = list(accumulate(denominators, lambda a, b: a * b % PRIME, initial=1))
    inverse = pow(prefixes[-1], -1, PRIME)
    result = []
    for prefix, denominator in zip(prefixes[-2::-1], denominators[::-1], strict=True):
        result.append(product * inverse * prefix % PRIME)
        inverse = inverse * denominator % PRIME
    return result[::-1]


def combine(shares: Mapping[int, bytes], coefficients: Sequence[int] | None = None) -> bytes:
    """Return the secret that `shares` (by point) determine.

    Args:
        shares: Exactly as many shares as the threshold, by x coordinate.
        coefficients: `weights` of the points in the mapping's order, if the caller has them already.

    Raises:
        ProtocolError: A share is malformed, or the shares determine no 32-byte secret.
    """
    values = [int.from_bytes(share, "big") for share in shares.values()]
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(v >= PRIME for v in values):
        raise ProtocolError(
            f"a share of a secret must have {SHARE_BYTES} bytes and be below 2^256 + 297",
            "leave out of the cohort the site that sent it",
        )
    if coefficients is None:
        coefficients = weights(list(shares))
    total = sum(w * v for w, v in zip(coefficients, values, strict=True)) % PRIME
    if total >= 2**256:
        raise ProtocolError(
            "no 32-byte secret can be reconstructed from these shares",
            "start a new round: at least one site sent a wrong share; if it happens again, leave that site out of "
            "the cohort",
        )
    return total.to_bytes(SECRET_BYTES, "big")
