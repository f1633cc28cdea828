"""Every message of the protocol and its one byte encoding.

A message is ``b"PSA" || version (1) || type || fields``, the fields as `codec` writes them in the order of
the tables at the end of this module. `decode` accepts only what `encode` would write, and nothing above the
size limits here. Sites are numbered by their place in the cohort (u16), in ascending order of name.

Signatures (Ed25519) cover::

    "privet-secagg/1 message" || 0 || type || session || round (u64) || parameters digest || roster digest
    || the message without signature, tags and words

where the roster digest is 32 zero bytes in `Advertise`. Tags prove themselves to their receivers. The words
of a `Masked` are left out because hashing them would cost the coordinator more than unmasking: their
integrity on the way is the transport's, and whoever could change them could only change the sum, as any site
can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np

from privet.common.errors import PrivetError, ProtocolError
from privet.common.secagg.codec import (
    NAME,
    Bytes,
    Codec,
    Flag,
    Many,
    PerSite,
    Reader,
    Real,
    Record,
    Text,
    Unsigned,
)
from privet.common.secagg.quantize import WORD, Layout, Segment, Words
from privet.common.secagg.shamir import SHARE_BYTES

VERSION: Final = 1
MAX_SITES: Final = 4096
MAX_SEGMENTS: Final = 65_535
MAX_WORDS: Final = 2**28
MAX_CONTROL_BYTES: Final = 64 * 2**20
# A share of the seed of the self mask and one of the seed of the mask key, and the tag of AES-GCM.
SEALED_BYTES: Final = 2 * SHARE_BYTES + 16
TAG_BYTES: Final = 16
NO_SIGNATURE: Final = bytes(64)

_MAGIC = b"PSA" + bytes([VERSION])
_DOMAIN = b"privet-secagg/1 "


@dataclass(frozen=True)
class Member:
    """A site of the cohort.

    Attributes:
        name: The site's name in the study.
        identity: Its Ed25519 public key, 32 bytes.
    """

    name: str
    identity: bytes


@dataclass(frozen=True)
class Parameters:
    """What the coordinator proposes for one round (coordinator to all sites).

    Attributes:
        session: 32 bytes that name the run.
        round: Number of the round in the session.
        inputs: Digest of all that the vectors depend on beside a site's data: the study and the model that
            the sites were given for the round. The caller defines it.
        cohort: The sites asked, ascending by name; a site's number is its place here.
        degree: Neighbours per site in the masking graph; 0 for all.
        threshold: Shares that reconstruct a secret.
        corrupt: Sites that may be in league with the coordinator without harm.
        security: Statistical security of the graph in bits.
        min_survivors: Least number of sites in the sum.
        bits: Resolution of real values.
        segments: The vector.
    """

    session: bytes
    round: int
    inputs: bytes
    cohort: tuple[Member, ...]
    degree: int
    threshold: int
    corrupt: int
    security: int
    min_survivors: int
    bits: int
    segments: tuple[Segment, ...]

    @property
    def layout(self) -> Layout:
        """How the vector lies in words.

        Raises:
            StudyError: Bits, segments and cohort make no layout.
        """
        return Layout(self.segments, self.bits, len(self.cohort))


@dataclass(frozen=True)
class Advertise:
    """A site's keys for one round (site to coordinator).

    Attributes:
        parameters: Digest of the `Parameters` that the site accepts.
        site: The sender.
        share_key: X25519 public key for the shares' encryption.
        mask_key: X25519 public key for the pairwise masks.
        nonce: 16 random bytes, so that no two rosters are alike.
        signature: Ed25519.
    """

    parameters: bytes
    site: int
    share_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Roster:
    """All sites' keys (coordinator to all sites that advertised).

    Attributes:
        adverts: Ascending by site.
    """

    adverts: tuple[Advertise, ...]


@dataclass(frozen=True)
class Sealed:
    """Encrypted shares; `site` is the receiver on the way in and the sender on the way out."""

    site: int
    data: bytes


@dataclass(frozen=True)
class Shares:
    """A site's shares for its neighbours (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        commitment: Digest of the seed of its self mask.
        sealed: For each neighbour, its two shares under AES-256-GCM.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    commitment: bytes
    sealed: tuple[Sealed, ...]
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Delivery:
    """The shares meant for one site (coordinator to that site).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        sharers: All sites that sent shares: U2.
        sealed: The shares from the receiver's neighbours among them.
    """

    roster: bytes
    site: int
    sharers: tuple[int, ...]
    sealed: tuple[Sealed, ...]


@dataclass(frozen=True)
class Tag:
    """A MAC by which one site tells a neighbour under which lists it acts.

    `site` is the receiver on the way in and the sender on the way out.
    """

    site: int
    data: bytes


@dataclass(frozen=True, eq=False)
class Masked:
    """A site's masked vector (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        sharers: Digest of U2 as the site was told.
        tags: For each neighbour in U2, a MAC on that digest.
        words: The masked vector, shape (layout.words,), little-endian.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    sharers: bytes
    tags: tuple[Tag, ...]
    words: Words
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Survivors:
    """Whose vectors are to be summed (coordinator to each survivor).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        survivors: U3.
        tags: From each of the receiver's neighbours in U3, its MAC.
    """

    roster: bytes
    site: int
    survivors: tuple[int, ...]
    tags: tuple[Tag, ...]


@dataclass(frozen=True)
class Confirm:
    """A site's signature on the one pair of lists that it accepts (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        lists: Digest of U2 and U3.
        tags: For each neighbour in U3, a MAC on that digest.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    lists: bytes
    tags: tuple[Tag, ...]
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Proof:
    """A quorum's confirmations (coordinator to each site that confirmed).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        tags: The MACs of its neighbours that confirmed.
        confirms: Signed confirmations of others, without tags, where the neighbours are no quorum.
    """

    roster: bytes
    site: int
    tags: tuple[Tag, ...]
    confirms: tuple[Confirm, ...]


@dataclass(frozen=True)
class Share:
    """A share of a secret of `site`: of the seed of its self mask if it survived, else of its mask key's."""

    site: int
    data: bytes


@dataclass(frozen=True)
class Reveal:
    """The shares that unmask the sum (site to coordinator).

    Which of a site's two secrets a share belongs to is not written: it follows from the survivors that the
    sender confirmed, so that no message can hold shares of both.

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        lists: Digest of U2 and U3.
        shares: For each site of U2 whose shares the sender holds, one.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    lists: bytes
    shares: tuple[Share, ...]
    signature: bytes = NO_SIGNATURE


Signed = Advertise | Shares | Masked | Confirm | Reveal
Message = Parameters | Roster | Delivery | Survivors | Proof | Signed
M = TypeVar("M", Parameters, Advertise, Roster, Shares, Delivery, Masked, Survivors, Confirm, Proof, Reveal)


class _Words:
    """The masked vector: a u32 count and little-endian words. Read as a view of the message, not a copy."""

    def put(self, out: bytearray, value: Words) -> None:
        out += _word_count(value)
        out += _word_bytes(value)

    def get(self, reader: Reader) -> Words:
        count = int.from_bytes(reader.take(4), "big")
        if count > MAX_WORDS:
            raise ProtocolError(f"a vector may have {MAX_WORDS} words, got {count}")
        return np.frombuffer(reader.take(8 * count), WORD)


def _word_count(words: Words) -> bytes:
    if words.ndim != 1 or words.dtype != WORD or words.size > MAX_WORDS or not words.flags.c_contiguous:
        raise ProtocolError(f"a vector must be flat little-endian 64-bit words, at most {MAX_WORDS} of them")
    return words.size.to_bytes(4, "big")


def _word_bytes(words: Words) -> memoryview:
    return words.view(np.uint8).data


def _site(item: Any) -> int:
    return int(item.site)


_U16 = Unsigned(2)
_DIGEST, _KEY, _SIGNATURE = Bytes(32), Bytes(32), Bytes(64)
_SITES: Codec[Any] = Many(_U16, MAX_SITES, by=int)


def _per_site(kind: type[Any], length: int, most: int = MAX_SITES) -> Codec[Any]:
    return PerSite(kind, length, most)


_ADVERTISE: dict[str, Codec[Any]] = {
    "parameters": _DIGEST,
    "site": _U16,
    "share_key": _KEY,
    "mask_key": _KEY,
    "nonce": Bytes(16),
    "signature": _SIGNATURE,
}
_TAGS = _per_site(Tag, TAG_BYTES)
_CONFIRM: dict[str, Codec[Any]] = {
    "roster": _DIGEST,
    "site": _U16,
    "lists": _DIGEST,
    "tags": _TAGS,
    "signature": _SIGNATURE,
}
# In a proof, where they could only make a small message a large object.
_WITHOUT_TAGS = {**_CONFIRM, "tags": _per_site(Tag, TAG_BYTES, 0)}
_SEGMENT: dict[str, Codec[Any]] = {"name": Text(255), "size": Unsigned(4), "bound": Real(), "count": Flag()}

# Type number, class and fields, in the order in which they are written.
_TABLE: tuple[tuple[int, type[Any], dict[str, Codec[Any]]], ...] = (
    (
        1,
        Parameters,
        {
            "session": Bytes(32),
            "round": Unsigned(8),
            "inputs": _DIGEST,
            "cohort": Many(Record(Member, {"name": Text(63, NAME), "identity": _KEY}), MAX_SITES, by=lambda m: m.name),
            "degree": _U16,
            "threshold": _U16,
            "corrupt": _U16,
            "security": Unsigned(1),
            "min_survivors": _U16,
            "bits": Unsigned(1),
            "segments": Many(Record(Segment, _SEGMENT), MAX_SEGMENTS),
        },
    ),
    (2, Advertise, _ADVERTISE),
    (3, Roster, {"adverts": Many(Record(Advertise, _ADVERTISE), MAX_SITES, by=_site)}),
    (
        4,
        Shares,
        {
            "roster": _DIGEST,
            "site": _U16,
            "commitment": _DIGEST,
            "sealed": _per_site(Sealed, SEALED_BYTES),
            "signature": _SIGNATURE,
        },
    ),
    (
        5,
        Delivery,
        {"roster": _DIGEST, "site": _U16, "sharers": _SITES, "sealed": _per_site(Sealed, SEALED_BYTES)},
    ),
    (
        6,
        Masked,
        {
            "roster": _DIGEST,
            "site": _U16,
            "sharers": _DIGEST,
            "tags": _TAGS,
            "signature": _SIGNATURE,
            "words": _Words(),
        },
    ),
    (7, Survivors, {"roster": _DIGEST, "site": _U16, "survivors": _SITES, "tags": _TAGS}),
    (8, Confirm, _CONFIRM),
    (
        9,
        Proof,
        {
            "roster": _DIGEST,
            "site": _U16,
            "tags": _TAGS,
            "confirms": Many(Record(Confirm, _WITHOUT_TAGS), MAX_SITES, by=_site),
        },
    ),
    (
        10,
        Reveal,
        {
            "roster": _DIGEST,
            "site": _U16,
            "lists": _DIGEST,
            "shares": _per_site(Share, SHARE_BYTES),
            "signature": _SIGNATURE,
        },
    ),
)
_NUMBER = {kind: number for number, kind, _ in _TABLE}
_RECORD: dict[type[Any], Record[Any]] = {kind: Record(kind, spec) for _, kind, spec in _TABLE}


def encode_parts(message: Message) -> tuple[bytes, memoryview]:
    """Return the encoding in two parts, the second being a `Masked`'s words without a copy (else empty).

    Raises:
        ProtocolError: A field is out of range.
    """
    kind = type(message)
    out = bytearray(_MAGIC)
    out.append(_NUMBER[kind])
    for name, codec in _RECORD[kind].fields.items():
        if name == "words":
            words: Words = getattr(message, name)
            out += _word_count(words)
            return bytes(out), _word_bytes(words)
        codec.put(out, getattr(message, name))
    return bytes(out), memoryview(b"")


def encode(message: Message) -> bytes:
    """Return the message's bytes.

    Raises:
        ProtocolError: A field is out of range.
    """
    head, words = encode_parts(message)
    return head + words if len(words) else head


def is_kind(kind: type[M], data: bytes) -> bool:
    """Whether bytes say that they are a message of this kind; nothing but their head is looked at."""
    return data.startswith(_MAGIC + bytes([_NUMBER[kind]]))


def decode(kind: type[M], data: bytes | memoryview) -> M:
    """Read a message of the given kind.

    Raises:
        ProtocolError: The bytes are too many, of another version or kind, or not what `encode` would write.
    """
    most = 8 * MAX_WORDS + MAX_CONTROL_BYTES if kind is Masked else MAX_CONTROL_BYTES
    if len(data) > most:
        raise ProtocolError(f"a {kind.__name__} may have {most} bytes, got {len(data)}")
    reader = Reader(data)
    head = bytes(reader.take(len(_MAGIC) + 1))
    if head != _MAGIC + bytes([_NUMBER[kind]]):
        raise ProtocolError(
            f"expected a {kind.__name__} of secure aggregation version {VERSION}, got other bytes",
            "coordinator and sites must run versions of privet that speak the same protocol",
        )
    try:
        message: M = _RECORD[kind].get(reader)
    except ProtocolError:
        raise
    except PrivetError as error:
        raise ProtocolError(f"a {kind.__name__} is not valid: {error.message}") from None
    if reader.left:
        raise ProtocolError(f"a {kind.__name__} is followed by {reader.left} bytes too many")
    return message


def kind_of(data: bytes) -> type[Message] | None:
    """Return the kind of message that the first bytes of `data` announce; None where they are no message's."""
    numbers = {number: kind for kind, number in _NUMBER.items()}
    return numbers.get(data[len(_MAGIC)]) if data.startswith(_MAGIC) and len(data) > len(_MAGIC) else None


def digest(purpose: str, *parts: bytes) -> bytes:
    """Return SHA-256 of the protocol's name, the purpose and `parts`, of fixed lengths but for the last."""
    return hashlib.sha256(b"".join((_DOMAIN, purpose.encode(), b"\0", *parts))).digest()


def parameters_digest(parameters: Parameters) -> bytes:
    """Return the digest that every later message of the round is bound to."""
    return digest("parameters", encode(parameters))


def roster_digest(parameters: bytes, roster: Roster) -> bytes:
    """Return the digest of the keys, bound to the parameters' digest; it salts every derived key."""
    return digest("roster", parameters, encode(roster))


def sharers_digest(roster: bytes, sharers: Iterable[int]) -> bytes:
    """Return the digest of U2 (ascending), bound to the roster's digest."""
    return digest("sharers", roster, _list(sharers))


def lists_digest(sharers: bytes, survivors: Iterable[int]) -> bytes:
    """Return the digest of U3 (ascending), bound to that of U2."""
    return digest("lists", sharers, _list(survivors))


def _list(sites: Iterable[int]) -> bytes:
    return b"".join(site.to_bytes(2, "big") for site in sites)


@dataclass(frozen=True)
class Binding:
    """What every signature of a round is bound to beside the message itself."""

    session: bytes
    round: int
    parameters: bytes
    roster: bytes = bytes(32)

    def with_roster(self, roster: bytes) -> Binding:
        """Return the binding of the messages that follow the roster."""
        return replace(self, roster=roster)


def signed_bytes(message: Signed, binding: Binding) -> bytes:
    """Return what the message's signature covers.

    `binding.roster` counts only for messages that follow the roster.
    """
    kind = type(message)
    out = bytearray(_DOMAIN + b"message\0")
    out.append(_NUMBER[kind])
    out += binding.session
    out += binding.round.to_bytes(8, "big")
    out += binding.parameters
    out += bytes(32) if kind is Advertise else binding.roster
    for name, codec in _RECORD[kind].fields.items():
        if name not in ("signature", "tags", "words"):
            codec.put(out, getattr(message, name))
    return bytes(out)
