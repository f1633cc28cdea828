"""The rules of membership: which token admits which request, which keys are new, and how many must cosign.

Pure functions: no file and no clock. `server/consortium/members.py` stores the data that they check.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.x509 import Certificate

from privet.common.errors import RefusedError
from privet.common.log.checkpoint import least_quorum
from privet.common.log.note import NoteKey
from privet.common.pki.certificates import key_bytes, read_request
from privet.common.pki.enrolment import SiteKeys

# One text for all four cases: otherwise answers would show an attacker which tokens exist.
NO_TOKEN = "the token is not valid: unknown, used, expired or withdrawn"  # noqa: S105 - a message, not a token


@dataclass(frozen=True)
class Consortium:
    """The settings of a consortium. All but its keys are fixed when it is created.

    Attributes:
        name: Its name.
        log: The log's key; its name is the origin.
        coordinator: Public key of the coordinator's statements, in hexadecimal.
        colluding: f: number of sites that may collude with the coordinator (docs/round-log.md, section 2).
        address: Host and port of the service for members.
        enrolment: Host and port for enrolment.
        fleet: Host and port for studies.
        former: Public keys of log and coordinator that a rotation has replaced, in hexadecimal.
    """

    name: str
    log: NoteKey
    coordinator: str
    colluding: int
    address: str
    enrolment: str
    fleet: str
    former: frozenset[str] = frozenset()

    @property
    def reserved(self) -> frozenset[str]:
        """The public keys that no site may have, in hexadecimal."""
        return self.former | {self.coordinator, *(key.hex() for key in self.log.publics)}


@dataclass(frozen=True)
class Row:
    """A site that has asked to join.

    Attributes:
        keys: The keys in its request.
        state: pending, member or revoked.
        since: When it entered this state, in Unix seconds.
        reason: Why it was revoked; empty otherwise.
        certificate: The newest certificate issued to it.
    """

    keys: SiteKeys
    state: str
    since: int
    reason: str
    certificate: Certificate | None


@dataclass(frozen=True)
class Listed:
    """What a page lists of a site that has asked to join.

    Attributes:
        site: Its name.
        state: As in `Row`.
        since: As in `Row`.
        reason: As in `Row`.
        node: The key of its node, as OpenSSH writes it.
        certificate: From when until when the newest certificate issued to it is valid; None without one.
    """

    site: str
    state: str
    since: int
    reason: str
    node: str
    certificate: tuple[datetime, datetime] | None


def next_quorum(members: int, colluding: int) -> int:
    """Return how many cosignatures the log's checkpoints need, for this number of members.

    If there are no more members than may collude, no quorum protects against them; then all must cosign.
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
    # Bound to its first request: a thief who copies a used token cannot join with other keys. The same request is
    # accepted again, also after the token has expired, because its answer may have been lost.
    if invitation is not None and invitation["request"] is not None:
        if hmac.compare_digest(invitation["request"], request):
            return False  # its answer was lost, or the site asks whether it was approved
        raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
    if invitation is None or now >= invitation["expires"]:
        raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
    return True


def check_new_keys(keys: SiteKeys, others: Sequence[SiteKeys], reserved: frozenset[str]) -> None:
    """Check that keys were never used in this consortium, by any site and for any purpose.

    Raises:
        RefusedError: One was.
    """
    # A key with two owners could not be revoked for one of them, and a signature would not show who made it.
    used = set(reserved)
    for other in others:
        used |= _public(other)
    if not used.isdisjoint(_public(keys)):
        raise RefusedError(
            f"{keys.site}: one of its keys was used in this consortium before",
            "make new keys: run `privet site join TOKEN` in a new directory",
        )


def _public(keys: SiteKeys) -> set[str]:
    tls = key_bytes(read_request(keys.request)).hex()
    return {keys.identity, *(key.hex() for key in NoteKey.parse(keys.witness).publics), keys.node.split()[1], tls}
