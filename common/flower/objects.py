"""Flower messages as the content-addressed objects that travel: taken apart, and put together again with care.

Flower inflates whatever it is sent. Here a message is put together only from parts that have the digests they are
named by, are as few as ours, and are of the three kinds that privet sends.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    _get_computed_object_ids,
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError

from privet.common.errors import ProtocolError

# What Flower's parsers stumble on; none of it says more than that the data is malformed.
_MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    DecodeError,
    UnexpectedObjectContentError,
)
_KINDS = frozenset({"Message", "RecordDict", "ConfigRecord"})
# A message, its record of records, and in it the one record.
_MOST_PARTS = 3
# Numbers of the fields in Flower's recorddict.proto.
_ITEM, _KEY, _VALUE, _TEXT, _BYTES = 1, 1, 2, 5, 6


@dataclass(frozen=True)
class Objects:
    """A message taken apart: its object tree, as Flower writes it, and the bytes of each object by its digest."""

    tree: Any
    contents: Mapping[str, bytes]


def take_apart(message: Message) -> Objects:
    """Take a message apart, and give it the id that Flower expects: its own digest."""
    contents = {}
    with no_object_id_recompute():
        for record in message.content.values() if message.has_content() else ():
            if isinstance(record, ConfigRecord) and (content := deflate(record)) is not None:
                contents[_know(record, content)] = content
        message.metadata.__dict__["_message_id"] = message.object_id
        for name, part in get_all_nested_objects(message).items():
            if name not in contents:
                contents[name] = part.deflate()
        return Objects(get_object_tree(message), contents)


def deflate(record: ConfigRecord) -> bytes | None:
    """Return what Flower's own `deflate` does, for a record of texts and bytes; None for any other.

    Flower copies each value a dozen times on the way, which for an update of 64 MB takes longer than sending it.
    """
    pieces: list[bytes] = []
    for name, value in record.items():
        if not name or not isinstance(value, str | bytes):
            return None
        key, data = name.encode(), value.encode() if isinstance(value, str) else value
        held = _field(_TEXT if isinstance(value, str) else _BYTES, len(data))
        head = _field(_KEY, len(key)) + key + _field(_VALUE, len(held) + len(data)) + held
        pieces += [_field(_ITEM, len(head) + len(data)) + head, data]
    size = sum(map(len, pieces))
    head = f"ConfigRecord{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{size}".encode() + HEAD_BODY_DIVIDER
    return b"".join([head, *pieces])


def _field(number: int, length: int) -> bytes:
    """Return how Protocol Buffers begin a field of so many bytes."""
    coded = bytearray([number << 3 | 2])
    while length > 0x7F:
        coded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*coded, length])


def _know(record: ConfigRecord, content: bytes) -> str:
    """Let Flower know a record's digest, within `no_object_id_recompute`, and return it."""
    name = str(get_object_id(content))
    record.__dict__["_object_id"] = name
    _get_computed_object_ids().add(name)
    return name


def part_names(tree: Any) -> list[str]:
    """Return the digests of a message's objects, children first.

    Raises:
        ProtocolError: There are more than a message of ours has.
    """
    names: list[str] = []
    for part in iterate_object_tree(tree):
        names.append(part.object_id)
        if len(names) > _MOST_PARTS:
            raise ProtocolError(f"message: more than {_MOST_PARTS} parts")
    return names


def put_together(identity: str, contents: Mapping[str, bytes]) -> Message:
    """Put a message together from its objects.

    Raises:
        ProtocolError: An object is missing, is not what its digest says, or is of another kind.
    """
    for name, content in contents.items():
        if not hmac.compare_digest(get_object_id(content), name):
            raise ProtocolError("message: a part does not have the digest it is named by")
    try:
        kinds = {get_object_head_values_from_object_content(content)[0] for content in contents.values()}
        if not kinds <= _KINDS:
            raise ProtocolError("message: a part is of a kind that is never sent")
        message = inflate_object_from_contents(identity, dict(contents))
    except _MALFORMED:
        raise ProtocolError("message: its parts make no message") from None
    if not isinstance(message, Message):
        raise ProtocolError("message: its parts make no message")
    message.metadata.__dict__["_message_id"] = identity
    return message
