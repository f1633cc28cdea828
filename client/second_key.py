"""A member of an earlier version gains an ML-DSA-65 key, and stays the member that it is.

The site makes the key and asks the coordinator. The coordinator's operator approves it by its words, as a new site, and
the round log states it. Only then the site's own files name the key, so that it signs twice from there on and not
before. Each step can be repeated, and an interrupted command goes on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, keep_request, keep_terms, own_mldsa
from privet.client.setup import restore
from privet.client.site import load_site
from privet.common.errors import StateError, VerificationError
from privet.common.log.note import NoteKey
from privet.common.pki.enrolment import JoinRequest, KeysRequest, SiteKeys
from privet.common.pki.keyfile import public_key


def has_second_key(file: Path) -> bool:
    """Return whether the site file names the ML-DSA-65 key that the site's terms state, so that nothing is to be done.

    Raises as `load_site`, and `StateError` if the site has not joined.
    """
    asked = Enrolment(file.parent).asked
    return NoteKey.parse(asked.keys.witness).pq is not None and load_site(file).mldsa is not None


def gain_second_key(file: Path, service: ConsortiumClient) -> tuple[SiteKeys, bool]:
    """Ask for an ML-DSA-65 key, or take it into use where the round log states it.

    Args:
        file: The site file.
        service: The consortium service.

    Returns:
        The site's keys with the new one, and whether they are in use.

    Raises:
        StateError: A key or a file is missing or cannot be written, or is not the one with which the site joined.
        VerificationError: The coordinator received other keys, or names others.
        PrivetError: As `ConsortiumClient.renew_keys`.
    """
    enrolment, site = service.enrolment, load_site(file)
    asked = enrolment.asked
    if NoteKey.parse(asked.keys.witness).pq:  # it has one; or the command was interrupted at its last step
        restore(file)
        return asked.keys, True
    identity = site.identity_key()
    if identity is None or public_key(identity) != asked.keys.identity:
        raise StateError(
            f"{file}: `identity` does not name the key with which this site joined",
            f"let `privet site setup {file}` put the line back, or restore the key from a backup",
        )
    pq = own_mldsa(file.parent)
    witness = replace(NoteKey.parse(asked.keys.witness), pq=pq.public_key().public_bytes_raw()).text
    keys = asked.keys.model_copy(update={"witness": witness})
    reply = service.renew_keys(KeysRequest.make(enrolment.terms.consortium, asked.keys, witness, identity, pq))
    if reply.fingerprint != keys.fingerprint:
        raise VerificationError(
            "the coordinator received other public keys than this site sent: the fingerprint in its reply differs",
            "warn the coordinator's operator: the keys were replaced on the way",
        )
    if reply.terms is None:
        return keys, False
    if keys not in reply.terms.members:
        raise VerificationError(
            f"the coordinator's roster (list of members) holds other public keys for site {keys.site}",
            "do not take part in studies; warn the coordinator's operator",
        )
    keep_terms(file.parent, reply.terms)
    keep_request(file.parent, JoinRequest.make(bytes.fromhex(asked.secret), keys, identity, pq))
    restore(file)
    return keys, True
