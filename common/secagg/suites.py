"""The key agreement of a round, by suite: one classical scheme, and ML-KEM-768 (FIPS 203) beside it.

docs/secure-aggregation.md, section 12, describes the suites. A private key is never drawn here: it is derived from a
seed of 32 bytes that the caller drew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privet.common.errors import VerificationError

KEM_KEY_BYTES: Final = 1184
"""An ML-KEM-768 encapsulation key (FIPS 203, table 3)."""
CIPHERTEXT_BYTES: Final = 1088
"""An ML-KEM-768 ciphertext (FIPS 203, table 3)."""

_CURVE = ec.SECP256R1()
# Order of P-256's group (SP 800-186, 3.2.1.3).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_KEY_HINT = "take part in no further round until its operator knows why: the key was forged or damaged"

ClassicalKey = X25519PrivateKey | ec.EllipticCurvePrivateKey


class Suite(Enum):
    """Which schemes a round uses. The value is the name in a study file."""

    X25519 = "x25519"
    X25519_MLKEM768 = "x25519-mlkem768"
    P256_MLKEM768 = "p256-mlkem768"

    @property
    def version(self) -> int:
        """Version byte of the messages that differ between suites."""
        return _VERSIONS[self]

    @property
    def hybrid(self) -> bool:
        """Whether secrets stay secret if the classical scheme is broken."""
        return self is not Suite.X25519

    @property
    def curve(self) -> str:
        """Name of the classical scheme, for errors."""
        return "P-256" if self is Suite.P256_MLKEM768 else "X25519"

    @property
    def key_bytes(self) -> int:
        """Length of a classical public key."""
        return 65 if self is Suite.P256_MLKEM768 else 32

    @property
    def seed_bytes(self) -> int:
        """Length of what `private_key` takes: 48 bytes leave a distance of 2^-128 from uniform on P-256."""
        return 48 if self is Suite.P256_MLKEM768 else 32


_VERSIONS = {Suite.X25519: 1, Suite.X25519_MLKEM768: 2, Suite.P256_MLKEM768: 3}
DEFAULT: Final = Suite.X25519_MLKEM768
"""The suite of a round whose study names none."""


def private_key(suite: Suite, seed: bytes) -> ClassicalKey:
    """Return the classical private key that `seed`, of `suite.seed_bytes` bytes, determines."""
    if suite is Suite.P256_MLKEM768:
        # FIPS 186-5, appendix A.2.1: reduce more bits than the order has.
        return ec.derive_private_key(int.from_bytes(seed, "big") % (_ORDER - 1) + 1, _CURVE)
    return X25519PrivateKey.from_private_bytes(seed)


def public_bytes(key: ClassicalKey) -> bytes:
    """Return the public key: 32 bytes of X25519 (RFC 7748), or an uncompressed point of P-256 (SEC 1, 2.3.3)."""
    if isinstance(key, X25519PrivateKey):
        return key.public_key().public_bytes_raw()
    numbers = key.public_key().public_numbers()
    return b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def agree(private: ClassicalKey, public: bytes, *, whose: str) -> bytes:
    """Return the secret with the owner of `public`, 32 bytes.

    Raises:
        VerificationError: The public key has low order, so that everyone would know the secret, or is no point.
    """
    try:
        if isinstance(private, X25519PrivateKey):
            return private.exchange(X25519PublicKey.from_public_bytes(public))
        return private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public))
    except ValueError:
        curve = "X25519" if isinstance(private, X25519PrivateKey) else "P-256"
        raise VerificationError(
            f"the key that {whose} sent for this round is not a usable {curve} key", _KEY_HINT
        ) from None


@dataclass(frozen=True)
class Encapsulated:
    """A secret of 32 bytes, and the ciphertext (1088 bytes) that carries it."""

    secret: bytes
    ciphertext: bytes

    def __repr__(self) -> str:
        return "<Encapsulated>"


def check_kem_key(public: bytes, *, whose: str) -> None:
    """Check an ML-KEM-768 encapsulation key (FIPS 203, 7.2).

    Raises:
        VerificationError: It is malformed.
    """
    _kem_key(public, whose)


def encapsulate(public: bytes, *, whose: str) -> Encapsulated:
    """Return a fresh secret for the owner of `public`, an ML-KEM-768 encapsulation key of 1184 bytes.

    The randomness is the operating system's, by `cryptography`, which takes none from the caller.

    Raises:
        VerificationError: The key is malformed.
    """
    return Encapsulated(*_kem_key(public, whose).encapsulate())


def decapsulate(private: MLKEM768PrivateKey, ciphertext: bytes) -> bytes:
    """Return the secret in `ciphertext` (1088 bytes); for a changed one, another secret (implicit rejection)."""
    return private.decapsulate(ciphertext)


class Kem(Protocol):
    """How secrets are encapsulated. Real sites have `MLKEM`. Simulated ones make ciphertexts that repeat."""

    def encapsulate(self, public: bytes, *, roster: bytes, whose: str) -> Encapsulated:
        """Return a secret for the owner of `public`, in the round of `roster`. Raises as the function."""

    def decapsulate(self, private: MLKEM768PrivateKey, ciphertext: bytes) -> bytes:
        """Return the secret in a ciphertext."""


class _MlKem:
    def encapsulate(self, public: bytes, *, roster: bytes, whose: str) -> Encapsulated:
        return encapsulate(public, whose=whose)

    def decapsulate(self, private: MLKEM768PrivateKey, ciphertext: bytes) -> bytes:
        return decapsulate(private, ciphertext)


MLKEM: Final[Kem] = _MlKem()
"""ML-KEM-768 of `cryptography`."""


def _kem_key(public: bytes, whose: str) -> MLKEM768PublicKey:
    try:
        return MLKEM768PublicKey.from_public_bytes(public)
    except ValueError:
        raise VerificationError(
            f"the key that {whose} sent for this round is not a usable ML-KEM-768 key", _KEY_HINT
        ) from None
