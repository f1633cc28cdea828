"""Proofs that somebody holds a private key: an Ed25519 signature, followed by one with ML-DSA-65 where it is hybrid."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.log import mldsa
from privet.common.log.mldsa import Use

_ED25519_BYTES = 64


def prove(message: bytes, key: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None, use: Use) -> str:
    """Return the signature of each key over a message, in hexadecimal, one behind the other."""
    second = b"" if pq is None else mldsa.sign(pq, message, use)
    return (key.sign(message) + second).hex()


def proves(keys: Sequence[bytes], proof: str, message: bytes, use: Use) -> bool:
    """Return whether a proof has a valid signature of each public key, and nothing else.

    Args:
        keys: The Ed25519 key, and the ML-DSA-65 key if there is one.
        proof: The proof, in hexadecimal.
        message: What was signed.
        use: What the signature with ML-DSA-65 is for.
    """
    key, *pq = keys
    try:
        signatures = bytes.fromhex(proof)
        first, second = signatures[:_ED25519_BYTES], signatures[_ED25519_BYTES:]
        Ed25519PublicKey.from_public_bytes(key).verify(first, message)
    except (InvalidSignature, ValueError):
        return False
    return mldsa.verifies(pq[0], second, message, use) if pq else not second
