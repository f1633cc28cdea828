"""A member's renewal: an ML-DSA-65 key beside the Ed25519 keys that it joined with (docs/decisions/0017-renewal.md).

Its identity key signs the change, and so does the new key. They sign the same text, which names the consortium, the
member's keys until now and from now on: a copied signature is of no use elsewhere, and none can be used twice.
"""

from __future__ import annotations

from privet.common.canonical import canonical_json
from privet.common.errors import VerificationError
from privet.common.log.mldsa import Use
from privet.common.log.note import NoteKey
from privet.common.log.proofs import proves
from privet.common.log.statements import Member

_RENEWS = b"privet-renew/1\x00"


def renewal_text(consortium: str, present: Member, renewed: Member) -> bytes:
    """Return what the old and the new key sign. The first bytes separate it from all else that they sign."""
    members = {"present": present.model_dump(mode="json"), "renewed": renewed.model_dump(mode="json")}
    return _RENEWS + canonical_json({"consortium": consortium, **members})


def check_renewal(consortium: str, present: Member, renewed: Member, proof: str) -> bytes:
    """Check that a member's keys gain an ML-DSA-65 key and nothing else, and that old and new key say so.

    Args:
        consortium: Its name.
        present: The member until now.
        renewed: The member from now on.
        proof: Signature by the identity key, followed by one by the new key, in hexadecimal.

    Returns:
        The ML-DSA-65 public key.

    Raises:
        VerificationError: They change otherwise, or one has not signed.
    """
    was, new = (None if each.witness is None else NoteKey.parse(each.witness) for each in (present, renewed))
    # A second key is never replaced: whoever had stolen the first pair would be rid of the owner's.
    if was is None or new is None or was.pq or not new.pq or (present.site, present.key) != (renewed.site, renewed.key):
        raise VerificationError(f"renewal of {present.site}: expected its present keys with an ML-DSA-65 key besides")
    if (was.name, was.public) != (new.name, new.public):
        raise VerificationError(f"renewal of {present.site}: its cosigning key with Ed25519 must stay the same")
    text = renewal_text(consortium, present, renewed)
    if not proves((bytes.fromhex(present.key), new.pq), proof, text, Use.RENEWAL):
        raise VerificationError(f"renewal of {present.site}: its identity key and the new key have not both signed it")
    return new.pq
