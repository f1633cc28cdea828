"""The bytes of the protocol's messages: one table with the fields of each kind, written and read strictly."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from privet.common.errors import PrivetError, ProtocolError
from privet.common.secagg.codec import (
    MALFORMED,
    NAME,
    Bytes,
    Codec,
    Flag,
    Many,
    PerSite,
    Reader,
    Real,
    Struct,
    Text,
    Unsigned,
)
from privet.common.secagg.messages import (
    MAX_CONTROL_BYTES,
    MAX_SEGMENTS,
    MAX_SITES,
    MAX_WORDS,
    SEALED_BYTES,
    TAG_BYTES,
    VERSION,
    Advertise,
    CohortMember,
    Confirm,
    Delivery,
    Masked,
    Parameters,
    Proof,
    ProtocolMessage,
    Reveal,
    Roster,
    Sealed,
    Share,
    Shares,
    Survivors,
    Tag,
)
from privet.common.secagg.quantize import WORD, Segment, Words
from privet.common.secagg.shamir import SHARE_BYTES

_MAGIC = b"PSA" + bytes([VERSION])
_M = TypeVar("_M", Parameters, Advertise, Roster, Shares, Delivery, Masked, Survivors, Confirm, Proof, Reveal)


class _Words:
    """The masked vector: a u32 count and little-endian words. Reading returns a view of the message, not a copy."""

    def put(self, out: bytearray, value: Words) -> None:
        out += _word_count(value)
        out += _word_bytes(value)

    def get(self, reader: Reader) -> Words:
        count = int.from_bytes(reader.take(4), "big")
        if count > MAX_WORDS:
            raise ProtocolError(
                f"a masked vector may have at most {MAX_WORDS} words of 64 bits, got {count}", MALFORMED
            )
        return np.frombuffer(reader.take(8 * count), WORD)


def _word_count(words: Words) -> bytes:
    if words.ndim != 1 or words.dtype != WORD or words.size > MAX_WORDS or not words.flags.c_contiguous:
        raise ProtocolError(
            f"a masked vector must be one row of at most {MAX_WORDS} little-endian 64-bit words", MALFORMED
        )
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
# Confirmations in a proof have no tags. If they could, a small message could make a large object.
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
            "cohort": Many(
                Struct(CohortMember, {"name": Text(63, NAME), "identity": _KEY}), MAX_SITES, by=lambda m: m.name
            ),
            "degree": _U16,
            "threshold": _U16,
            "corrupt": _U16,
            "security": Unsigned(1),
            "min_survivors": _U16,
            "bits": Unsigned(1),
            "segments": Many(Struct(Segment, _SEGMENT), MAX_SEGMENTS),
        },
    ),
    (2, Advertise, _ADVERTISE),
    (3, Roster, {"adverts": Many(Struct(Advertise, _ADVERTISE), MAX_SITES, by=_site)}),
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
            "confirms": Many(Struct(Confirm, _WITHOUT_TAGS), MAX_SITES, by=_site),
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
KIND_NUMBERS = {kind: number for number, kind, _ in _TABLE}
FIELDS: dict[type[Any], Struct[Any]] = {kind: Struct(kind, spec) for _, kind, spec in _TABLE}


def encode_parts(message: ProtocolMessage) -> tuple[bytes, memoryview]:
    """Return the encoding in two parts. The second holds the words of a `Masked`, without a copy; else it is empty.

    Raises:
        ProtocolError: A field is out of range.
    """
    kind = type(message)
    out = bytearray(_MAGIC)
    out.append(KIND_NUMBERS[kind])
    for name, codec in FIELDS[kind].fields.items():
        if name == "words":
            words: Words = getattr(message, name)
            out += _word_count(words)
            return bytes(out), _word_bytes(words)
        codec.put(out, getattr(message, name))
    return bytes(out), memoryview(b"")


def encode(message: ProtocolMessage) -> bytes:
    """Return the message's bytes.

    Raises:
        ProtocolError: A field is out of range.
    """
    head, words = encode_parts(message)
    return head + words if len(words) else head


def is_kind(kind: type[_M], data: bytes) -> bool:
    """Return whether the first bytes of `data` are those of a message of this kind. The rest is not checked."""
    return data.startswith(_MAGIC + bytes([KIND_NUMBERS[kind]]))


def decode(kind: type[_M], data: bytes | memoryview) -> _M:
    """Read a message of the given kind.

    Raises:
        ProtocolError: The bytes are too many, of another version or kind, or not those that `encode` would write.
    """
    most = 8 * MAX_WORDS + MAX_CONTROL_BYTES if kind is Masked else MAX_CONTROL_BYTES
    if len(data) > most:
        raise ProtocolError(f"a {kind.__name__} message may have at most {most} bytes, got {len(data)}", MALFORMED)
    reader = Reader(data)
    head = bytes(reader.take(len(_MAGIC) + 1))
    if head != _MAGIC + bytes([KIND_NUMBERS[kind]]):
        raise ProtocolError(
            f"expected a {kind.__name__} message of secure aggregation, version {VERSION}, got another kind or version",
            MALFORMED,
        )
    try:
        message: _M = FIELDS[kind].get(reader)
    except ProtocolError:
        raise
    except PrivetError as error:
        raise ProtocolError(f"a {kind.__name__} message is not valid: {error.message}", MALFORMED) from None
    if reader.left:
        raise ProtocolError(f"a {kind.__name__} message has {reader.left} bytes too many at its end", MALFORMED)
    return message


def kind_of(data: bytes) -> type[ProtocolMessage] | None:
    """Return the kind of message that the first bytes of `data` name; None if they are not those of a message."""
    numbers = {number: kind for kind, number in KIND_NUMBERS.items()}
    return numbers.get(data[len(_MAGIC)]) if data.startswith(_MAGIC) and len(data) > len(_MAGIC) else None
