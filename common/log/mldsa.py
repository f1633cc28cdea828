"""ML-DSA-65 (FIPS 204): the second signature beside Ed25519, for whoever reads the log when Ed25519 is broken.

One key of a site, or of the coordinator, signs all that has to last. A context string (FIPS 204, section 5.2) says for
what a signature was made, so none passes for one of another use. Signing is hedged: two signatures over one message
differ, and both are valid. So nothing may compare signatures in order to compare messages.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from privet.common.errors import StateError

PUBLIC_BYTES = 1952
SIGNATURE_BYTES = 3309
"""Sizes of ML-DSA-65 (FIPS 204, table 2)."""
_SEED_BYTES, _T1_BITS = 32, 10


class Use(Enum):
    """What a signature is for. The value is the context string."""

    CHECKPOINT = b"privet-checkpoint/1"
    COSIGNATURE = b"privet-cosignature/1"
    STATEMENT = b"privet-statement/2"
    ROTATION = b"privet-rotate/1"
    JOINING = b"privet-join/1"
    RENEWAL = b"privet-renew/1"


def new_key() -> MLDSA65PrivateKey:
    """Make a private key.

    Raises:
        StateError: The installed library has no ML-DSA.
    """
    try:
        return MLDSA65PrivateKey.generate()
    except UnsupportedAlgorithm:
        raise _unsupported() from None


def public_of(key: MLDSA65PrivateKey) -> bytes:
    """Return the public key, 1,952 bytes."""
    return key.public_key().public_bytes_raw()


def sign(key: MLDSA65PrivateKey, message: bytes, use: Use) -> bytes:
    """Return a signature for one use, 3,309 bytes."""
    return key.sign(message, use.value)


def verifies(public: bytes, signature: bytes, message: bytes, use: Use) -> bool:
    """Return whether a signature over a message was made with a key for this use. Under a weak key none is.

    Raises:
        StateError: The installed library has no ML-DSA: then nothing may pass, and nothing is proved wrong.
    """
    try:
        _public(public).verify(signature, message, use.value)
    except UnsupportedAlgorithm:
        raise _unsupported() from None
    except (InvalidSignature, ValueError):
        return False
    return True


def is_weak(public: bytes) -> bool:
    """Whether anybody can sign under a key, as t1, the half of it that binds its owner, is nearly 0.

    A verifier computes A z - c t1 2^13 (FIPS 204, algorithm 8). Where t1 2^13 is near 0 modulo q, c does not matter, so
    whoever picks z first has a signature. The coefficients of an honest key are uniform: half of the 1,536 are far from
    0, and fewer than a quarter are with probability below 2^-270. FIPS 204 demands no such check, as a key's owner
    harms itself alone. Here the owner could deny what it signed, and would seem to have a hybrid key.
    """
    packed = int.from_bytes(public[_SEED_BYTES:], "little")
    count = 8 * (len(public) - _SEED_BYTES) // _T1_BITS
    mask, quarter = (1 << _T1_BITS) - 1, 1 << _T1_BITS - 2
    far = sum(quarter <= (packed >> _T1_BITS * i & mask) < 3 * quarter for i in range(count))
    return far < count // 4


@lru_cache(maxsize=1024)
def _public(data: bytes) -> MLDSA65PublicKey:
    if is_weak(data):
        raise ValueError("anybody signs under this key")
    return MLDSA65PublicKey.from_public_bytes(data)


def _unsupported() -> StateError:
    return StateError(
        "the installed library `cryptography` has no ML-DSA-65, which the keys of this consortium need",
        "install privet with its locked requirements (docs/supply-chain.md)",
    )
