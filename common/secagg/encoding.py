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
    Constant,
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
    DIGEST_BYTES,
    HYBRID_LINK_BYTES,
    HYBRID_SEALED_BYTES,
    LINK_BYTES,
    MAX_BLOCK,
    MAX_CONTROL_BYTES,
    MAX_SEGMENTS,
    MAX_SITES,
    MAX_WORDS,
    SEALED_BYTES,
    SECRET_BYTES,
    TAG_BYTES,
    VERSION,
    Advertise,
    BlockParameters,
    CohortMember,
    Confirm,
    Deal,
    DealDelivery,
    DealtParameters,
    Delivery,
    Expected,
    Finish,
    Joined,
    LinkDelivery,
    Links,
    Masked,
    Parameters,
    Proof,
    ProtocolMessage,
    Reveal,
    Roster,
    Sealed,
    Share,
    Shares,
    Step,
    Survivors,
    Tag,
    Wrap,
)
from privet.common.secagg.quantize import WORD, Segment, Words
from privet.common.secagg.shamir import SHARE_BYTES
from privet.common.secagg.suites import KEM_KEY_BYTES, Suite

_MAGIC = b"PSA"
_M = TypeVar(
    "_M",
    Parameters,
    BlockParameters,
    Advertise,
    Roster,
    Links,
    LinkDelivery,
    DealtParameters,
    Deal,
    DealDelivery,
    Joined,
    Step,
    Expected,
    Finish,
    Shares,
    Delivery,
    Masked,
    Survivors,
    Confirm,
    Proof,
    Reveal,
)


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


def _per_site(kind: type[Any], length: int | None, most: int = MAX_SITES) -> Codec[Any]:
    return PerSite(kind, length, most)


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

_PARAMETERS: dict[str, Codec[Any]] = {
    "session": Bytes(32),
    "round": Unsigned(8),
    "inputs": _DIGEST,
    "cohort": Many(Struct(CohortMember, {"name": Text(63, NAME), "identity": _KEY}), MAX_SITES, by=lambda m: m.name),
    "degree": _U16,
    "threshold": _U16,
    "corrupt": _U16,
    "security": Unsigned(1),
    "min_survivors": _U16,
    "bits": Unsigned(1),
    "segments": Many(Struct(Segment, _SEGMENT), MAX_SEGMENTS),
}
KIND_NUMBERS: dict[type[Any], int] = {
    Parameters: 1,
    Advertise: 2,
    Roster: 3,
    Shares: 4,
    Delivery: 5,
    Masked: 6,
    Survivors: 7,
    Confirm: 8,
    Proof: 9,
    Reveal: 10,
    BlockParameters: 11,
    Links: 12,
    LinkDelivery: 13,
    Step: 14,
    Joined: 15,
    DealtParameters: 16,
    Deal: 17,
    DealDelivery: 18,
    Expected: 19,
    Finish: 20,
}


def _table(suite: Suite) -> dict[type[Any], Struct[Any]]:
    """Return the fields of the messages that differ between suites, in the order in which they are written."""
    named: dict[str, Codec[Any]] = {"suite": Constant(suite)}
    second: dict[str, Codec[Any]] = {"mask_key": _KEY, "kem_key": Constant(b"")}
    seed: Codec[Any] = Constant(b"")
    wraps: Codec[Any] = Constant(())
    sealed, linked = _per_site(Sealed, SEALED_BYTES), _per_site(Sealed, LINK_BYTES)
    if suite.hybrid:
        second = {"mask_key": Constant(b""), "kem_key": Bytes(KEM_KEY_BYTES)}
        seed, wraps = Bytes(DIGEST_BYTES), _per_site(Wrap, SECRET_BYTES)
        sealed, linked = _per_site(Sealed, HYBRID_SEALED_BYTES), _per_site(Sealed, HYBRID_LINK_BYTES)
    advertise: dict[str, Codec[Any]] = {
        **named,
        "parameters": _DIGEST,
        "site": _U16,
        "share_key": Bytes(suite.key_bytes),
        **second,
        "nonce": Bytes(16),
        "signature": _SIGNATURE,
    }
    # The suite of an empty roster would follow from nothing.
    adverts = Many(Struct(Advertise, advertise), MAX_SITES, by=_site, least=int(suite.hybrid))
    shares = {
        **named,
        "roster": _DIGEST,
        "site": _U16,
        "commitment": _DIGEST,
        "seed_commitment": seed,
        "sealed": sealed,
        "signature": _SIGNATURE,
    }
    masked = {
        **named,
        "roster": _DIGEST,
        "site": _U16,
        "sharers": _DIGEST,
        "wraps": wraps,
        "tags": _TAGS,
        "signature": _SIGNATURE,
        "words": _Words(),
    }
    dealt: dict[type[Any], Struct[Any]] = {}
    if suite.hybrid:
        # Of as many bytes as the block has rounds.
        items = _per_site(Sealed, None)
        commitments: Codec[Any] = Many(Bytes(2 * DIGEST_BYTES), MAX_BLOCK)
        deal = {"commitments": commitments, "sealed": items, "signature": _SIGNATURE}
        dealt = {
            DealtParameters: Struct(DealtParameters, {**named, **_PARAMETERS, "rounds": _U16}),
            Deal: Struct(Deal, {**named, "roster": _DIGEST, "site": _U16, **deal}),
            DealDelivery: Struct(DealDelivery, {**named, "roster": _DIGEST, "site": _U16, "sealed": items}),
        }
    return {
        **dealt,
        Parameters: Struct(Parameters, {**named, **_PARAMETERS}),
        BlockParameters: Struct(BlockParameters, {**named, **_PARAMETERS, "rounds": _U16}),
        Advertise: Struct(Advertise, advertise),
        Roster: Struct(Roster, {"adverts": adverts}),
        Shares: Struct(Shares, shares),
        Delivery: Struct(Delivery, {**named, "roster": _DIGEST, "site": _U16, "sharers": _SITES, "sealed": sealed}),
        Masked: Struct(Masked, masked),
        Links: Struct(Links, {**named, "roster": _DIGEST, "site": _U16, "sealed": linked, "signature": _SIGNATURE}),
        LinkDelivery: Struct(LinkDelivery, {**named, "roster": _DIGEST, "site": _U16, "sealed": linked}),
    }


_BY_SUITE = {suite: _table(suite) for suite in Suite}
_SUITES = {suite.version: suite for suite in Suite}
# The same in all suites.
_COMMON: dict[type[Any], Struct[Any]] = {
    Step: Struct(Step, {"roster": _DIGEST}),
    Expected: Struct(Expected, {"roster": _DIGEST, "sites": _SITES}),
    Finish: Struct(Finish, {"roster": _DIGEST, "site": _U16, "tags": _TAGS}),
    Joined: Struct(Joined, {"roster": _DIGEST, "site": _U16, "signature": _SIGNATURE}),
    Survivors: Struct(Survivors, {"roster": _DIGEST, "site": _U16, "survivors": _SITES, "tags": _TAGS}),
    Confirm: Struct(Confirm, _CONFIRM),
    Proof: Struct(
        Proof,
        {
            "roster": _DIGEST,
            "site": _U16,
            "tags": _TAGS,
            "confirms": Many(Struct(Confirm, _WITHOUT_TAGS), MAX_SITES, by=_site),
        },
    ),
    Reveal: Struct(
        Reveal,
        {
            "roster": _DIGEST,
            "site": _U16,
            "lists": _DIGEST,
            "shares": _per_site(Share, SHARE_BYTES),
            "signature": _SIGNATURE,
        },
    ),
}


def fields_of(message: ProtocolMessage) -> Struct[Any]:
    """Return the fields of a message in the order in which they are written."""
    kind = type(message)
    if kind in _COMMON:
        return _COMMON[kind]
    suite: Suite = message.suite  # type: ignore[union-attr]
    fields = _BY_SUITE[suite].get(kind)
    if fields is None:
        raise ProtocolError(f"the suite {suite.value} has no {kind.__name__} message", MALFORMED)
    return fields


def _version(message: ProtocolMessage) -> int:
    return VERSION if type(message) in _COMMON else message.suite.version  # type: ignore[union-attr]


def encode_parts(message: ProtocolMessage) -> tuple[bytes, memoryview]:
    """Return the encoding in two parts. The second holds the words of a `Masked`, without a copy; else it is empty.

    Raises:
        ProtocolError: A field is out of range.
    """
    out = bytearray(_MAGIC)
    out += bytes((_version(message), KIND_NUMBERS[type(message)]))
    for name, codec in fields_of(message).fields.items():
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
    return _fields_for(kind, data[:_HEAD]) is not None


_HEAD = len(_MAGIC) + 2


def _fields_for(kind: type[Any], head: bytes) -> Struct[Any] | None:
    """Return the fields of a message of `kind` that begins with `head`, 5 bytes; None if it is no such message."""
    if len(head) < _HEAD or head[:3] != _MAGIC or head[4] != KIND_NUMBERS[kind]:
        return None
    if kind in _COMMON:
        return _COMMON[kind] if head[3] == VERSION else None
    suite = _SUITES.get(head[3])
    return None if suite is None else _BY_SUITE[suite].get(kind)


def decode(kind: type[_M], data: bytes | memoryview) -> _M:
    """Read a message of the given kind, in any suite: the caller compares the suite with the round's.

    Raises:
        ProtocolError: The bytes are too many, of another version or kind, or not those that `encode` would write.
    """
    most = 8 * MAX_WORDS + MAX_CONTROL_BYTES if kind is Masked else MAX_CONTROL_BYTES
    if len(data) > most:
        raise ProtocolError(f"a {kind.__name__} message may have at most {most} bytes, got {len(data)}", MALFORMED)
    reader = Reader(data)
    fields = _fields_for(kind, bytes(reader.take(_HEAD)))
    if fields is None:
        raise ProtocolError(
            f"expected a {kind.__name__} message of secure aggregation, of a version from 1 to {max(_SUITES)}, got "
            "another kind or version",
            MALFORMED,
        )
    try:
        message: _M = fields.get(reader)
    except ProtocolError:
        raise
    except PrivetError as error:
        raise ProtocolError(f"a {kind.__name__} message is not valid: {error.message}", MALFORMED) from None
    if reader.left:
        raise ProtocolError(f"a {kind.__name__} message has {reader.left} bytes too many at its end", MALFORMED)
    return message


def asks_for_keys(masking: bytes) -> bool:
    """Return whether a round that opens with this message begins with keys: it is masked, and no block's later one."""
    return bool(masking) and not begins_step(masking)


def begins_step(body: bytes) -> bool:
    """Return whether this message begins a round of a block that is set up: the site trains for its answer."""
    return is_kind(Step, body) or is_kind(Expected, body)


def kind_of(data: bytes) -> type[ProtocolMessage] | None:
    """Return the kind of message that the first bytes of `data` name; None if they are not those of a message."""
    found = (kind for kind in KIND_NUMBERS if _fields_for(kind, data[:_HEAD]) is not None)
    return next(found, None)
