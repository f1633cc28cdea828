"""A stand-in for ML-KEM-768 whose ciphertexts follow from a seed, so that a simulation repeats to the byte.

`cryptography` encapsulates with the system's randomness alone. A simulated site's private keys follow from a public
seed, so nothing is lost: whoever knows the seed reads all its messages anyway. Keys and lengths are those of ML-KEM.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from privet.common.secagg.suites import CIPHERTEXT_BYTES, Encapsulated, check_kem_key

_SHOWN = 32


class SimulatedKem:
    """Encapsulation without secrecy, for simulated sites alone.

    Args:
        seed: 32 bytes, of one site.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    def encapsulate(self, public: bytes, *, roster: bytes, whose: str) -> Encapsulated:
        """Return a secret and a ciphertext (1088 bytes) that follow from the site's seed, the roster and the key.

        Raises:
            VerificationError: The key is malformed.
        """
        check_kem_key(public, whose=whose)
        shown = hashlib.sha256(self._seed + roster + public).digest()
        ciphertext = shown + hashlib.shake_256(shown).digest(CIPHERTEXT_BYTES - _SHOWN)
        return Encapsulated(_secret(public, ciphertext), ciphertext)

    def decapsulate(self, private: MLKEM768PrivateKey, ciphertext: bytes) -> bytes:
        """Return the secret in `ciphertext`; for a changed one or another's, another secret."""
        return _secret(private.public_key().public_bytes_raw(), ciphertext)


def _secret(public: bytes, ciphertext: bytes) -> bytes:
    return hashlib.sha256(public + ciphertext).digest()
