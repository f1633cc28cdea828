"""The rules of membership: which token admits which request, which keys are new, and how many have to cosign.

Pure: no file and no clock. `server/consortium/members.py` keeps what these functions judge.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.x509 import Certificate

from privet.common.errors import RefusedError
from privet.common.log.checkpoint import least_quorum
from privet.common.log.note import NoteKey
from privet.common.pki.certificates import key_bytes, read_request
from privet.common.pki.enrolment import SiteKeys

NO_TOKEN = "the token is not valid: unknown, used, expired or withdrawn"  # noqa: S105 - which of them, nobody is told


@dataclass(frozen=True)
class Consortium:
    """What is decided when a consortium is made.

    Attributes:
        name: Its name.
        log: The log's key; its name is the origin.
        coordinator: Public key of the coordinator's statements, in hexadecimal.
        colluding: f: sites that may lie together with the coordinator (docs/round-log.md, section 2).
        address: Host and port of the service for members.
        enrolment: Host and port for joining.
        fleet: Host and port for studies.
    """

    name: str
    log: NoteKey
    coordinator: str
    colluding: int
    address: str
    enrolment: str
    fleet: str


@dataclass(frozen=True)
class Row:
    """A site that has asked.

    Attributes:
        keys: As they arrived.
        state: pending, member or revoked.
        since: When it came to that, in Unix seconds.
        reason: Why it was revoked; else empty.
        certificate: The newest issued to it.
    """

    keys: SiteKeys
    state: str
    since: int
    reason: str
    certificate: Certificate | None


def next_quorum(members: int, colluding: int) -> int:
    """Return how many cosignatures the log's checkpoints need, for so many members.

    With no more members than may lie together nothing can be shown against them; all have to cosign then.
    """
    return least_quorum(members, min(colluding, max(members - 1, 0)))


def check_token(invitation: Mapping[str, Any] | None, request: str, now: int) -> bool:
    """Check that a token admits a request, and return whether this is its first use.

    Args:
        invitation: Its row; None if the token's hash is unknown.
        request: Digest of the request.
        now: Unix seconds.

    Raises:
        RefusedError: It does not.
    """
    if invitation is not None and invitation["request"] is not None:
        if hmac.compare_digest(invitation["request"], request):
            return False  # its answer was lost, or the site asks whether it was approved
        raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
    if invitation is None or now >= invitation["expires"]:
        raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
    return True


def check_new_keys(keys: SiteKeys, others: Sequence[SiteKeys], reserved: frozenset[str]) -> None:
    """Check that keys were never used in this consortium, by whomever and for whatever.

    Raises:
        RefusedError: One was.
    """
    used = set(reserved)
    for other in others:
        used |= _public(other)
    if not used.isdisjoint(_public(keys)):
        raise RefusedError(
            f"{keys.site}: one of its keys was used in this consortium before", "make new keys in a new directory"
        )


def _public(keys: SiteKeys) -> set[str]:
    tls = key_bytes(read_request(keys.request)).hex()
    return {keys.identity, NoteKey.parse(keys.witness).public.hex(), keys.node.split()[1], tls}
