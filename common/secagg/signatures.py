"""Checks that sites and coordinator share: the signature of a message, and the commitment to a mask's seed."""

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
