"""Randomness for sampling and noise: one cryptographic stream, secret or reproducible.

Both sources expand a 256-bit key with AES-256-CTR (NIST SP 800-38A, section 6.5). `SecretRandomness` takes
its key from the operating system and is what a site uses. `SeededRandomness` derives it from a public seed:
it makes simulations reproducible and protects nothing, which is why it is a type of its own.

Normal variates come from the Box-Muller transform of 53-bit uniforms. Values are rounded to float64, so the
attack of Mironov (2012) on the low bits of floating-point noise is not addressed here.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


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
        """Return `count` standard normal variates (Box and Muller 1958)."""
        half = (count + 1) // 2
        uniform = self.uniform(2 * half)
        # 1 - u lies in (0, 1], so the logarithm is finite; the largest variate is sqrt(2 * 53 * ln 2) = 8.6.
        radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class SecretRandomness(Randomness):
    """Keyed by the operating system: what a site uses for anything it releases."""

    def __init__(self) -> None:
        super().__init__(os.urandom(32))


class SeededRandomness(Randomness):
    """Keyed by public values: reproducible, for simulations only. It protects nothing."""

    def __init__(self, seed: int, *purpose: str | int) -> None:
        super().__init__(derive_key(seed, *purpose))


def derive_key(seed: int, *purpose: str | int) -> bytes:
    """Return a 256-bit key for one purpose, as the SHA-256 of an unambiguous list of its parts."""
    parts = [str(part).encode() for part in (seed, *purpose)]
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for generators that take integers."""
    return int.from_bytes(derive_key(seed, *purpose)[:8], "big") >> 1
