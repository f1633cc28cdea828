"""The digests of a round, which bind each message to all messages before it, and the bytes that are signed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from privet.common.secagg.encoding import KIND_NUMBERS, encode, fields_of
from privet.common.secagg.messages import Advertise, Parameters, Roster, Signed

_DOMAIN = b"privet-secagg/1 "


def transcript_digest(purpose: str, *parts: bytes) -> bytes:
    """Return SHA-256 of the protocol's name, the purpose and `parts`. All parts but the last have a fixed length."""
    return hashlib.sha256(b"".join((_DOMAIN, purpose.encode(), b"\0", *parts))).digest()


def parameters_digest(parameters: Parameters) -> bytes:
    """Return the digest that every later message of the round is bound to."""
    return transcript_digest("parameters", encode(parameters))


def roster_digest(parameters: bytes, roster: Roster) -> bytes:
    """Return the digest of the keys, bound to the parameters' digest. It is the salt of every derived key."""
    return transcript_digest("roster", parameters, encode(roster))


def sharers_digest(roster: bytes, sharers: Iterable[int]) -> bytes:
    """Return the digest of U2 (ascending), bound to the roster's digest."""
    return transcript_digest("sharers", roster, _list(sharers))


def step_digest(roster: bytes, round_number: int, inputs: bytes) -> bytes:
    """Return the digest of one round of a block, bound to the roster's: its number and the digest of its inputs."""
    return transcript_digest("step", roster, round_number.to_bytes(8, "big"), inputs)


def slot_digest(roster: bytes, round_number: int) -> bytes:
    """Return the digest that names a round of a block with drop-outs when its secrets are dealt."""
    return transcript_digest("slot", roster, round_number.to_bytes(8, "big"))


def members_digest(roster: bytes, members: Iterable[int]) -> bytes:
    """Return the digest of R (ascending), bound to the roster's. It takes the roster's place in a block's rounds."""
    return transcript_digest("members", roster, _list(members))


def expected_digest(step: bytes, expected: Iterable[int]) -> bytes:
    """Return the digest of F (ascending), bound to that of the round. It takes the place of that of U2."""
    return transcript_digest("expected", step, _list(expected))


def lists_digest(sharers: bytes, survivors: Iterable[int]) -> bytes:
    """Return the digest of U3 (ascending), bound to that of U2."""
    return transcript_digest("lists", sharers, _list(survivors))


def _list(sites: Iterable[int]) -> bytes:
    return b"".join(site.to_bytes(2, "big") for site in sites)


@dataclass(frozen=True)
class Binding:
    """The values that every signature of a round covers, besides the message itself."""

    session: bytes
    round: int
    parameters: bytes
    roster: bytes = bytes(32)

    def with_roster(self, roster: bytes) -> Binding:
        """Return the binding of the messages that follow the roster."""
        return replace(self, roster=roster)


def signed_bytes(message: Signed, binding: Binding) -> bytes:
    """Return the bytes that the message's signature covers.

    `binding.roster` is used only for messages that follow the roster.
    """
    kind = type(message)
    out = bytearray(_DOMAIN + b"message\0")
    out.append(KIND_NUMBERS[kind])
    out += binding.session
    out += binding.round.to_bytes(8, "big")
    out += binding.parameters
    out += bytes(32) if kind is Advertise else binding.roster
    for name, codec in fields_of(message).fields.items():
        if name not in ("signature", "tags", "words"):
            codec.put(out, getattr(message, name))
    return bytes(out)
