"""Checks that sites and coordinator share: the signature of a message, and commitments to the secrets of masks."""

from __future__ import annotations

from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privet.common.errors import VerificationError
from privet.common.secagg.messages import Advertise, Confirm, Parameters, Signed
from privet.common.secagg.transcript import Binding, signed_bytes, transcript_digest


def commitment(roster: bytes, site: int, self_seed: bytes) -> bytes:
    """Return the digest against which the coordinator checks a reconstructed seed of a self mask."""
    return transcript_digest("commitment", roster, site.to_bytes(2, "big"), self_seed)


def seed_commitment(roster: bytes, site: int, seed: bytes) -> bytes:
    """Return the digest against which the coordinator checks a reconstructed seed of pairwise masks (hybrid suites)."""
    return transcript_digest("seed", roster, site.to_bytes(2, "big"), seed)


def pair_commitment(roster: bytes, sender: int, receiver: int, secret: bytes) -> bytes:
    """Return the digest of what `sender` sends to `receiver` for their common mask (hybrid suites)."""
    return transcript_digest("pair", roster, sender.to_bytes(2, "big"), receiver.to_bytes(2, "big"), secret)


def check_signature(parameters: Parameters, binding: Binding, message: Signed) -> None:
    """Check a site's signature against its identity key in the cohort.

    Raises:
        VerificationError: The signature does not match.
    """
    member = parameters.cohort[message.site]
    # Simulated sites in one process check the same signatures of these two kinds, so the results are kept. Messages of
    # the other kinds are not, as they would stay in memory.
    verify = _verify_once if isinstance(message, Advertise | Confirm) else _verify
    try:
        verify(member.identity, message.signature, signed_bytes(message, binding))
    except (InvalidSignature, ValueError):
        raise VerificationError(
            f"the {type(message).__name__} message of {member.name} does not match its signature and the site's "
            "pinned identity key",
            "take part in no further round until this is explained: the message was forged, changed, or belongs to "
            "another round",
        ) from None


def _verify(identity: bytes, signature: bytes, signed: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(identity).verify(signature, signed)


_verify_once = lru_cache(maxsize=2048)(_verify)
