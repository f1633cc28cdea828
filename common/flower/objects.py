"""Flower messages as content-addressed objects: taken apart to be sent, and put together with strict checks.

Flower itself accepts objects of any kind and number. Here a message is put together only if each part has the digest
that names it, there are at most three parts, and all are of the three kinds that privet sends.
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
from privet.common.study.messages import SAME_VERSION

# Errors that Flower's parsers raise for malformed data. Their texts say nothing more than that.
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
MOST_PARTS = 3
"""Objects of a message: the message, its record of records, and the one record in it."""
# Field numbers of Flower's recorddict.proto.
_ITEM, _KEY, _VALUE, _TEXT, _BYTES = 1, 1, 2, 5, 6


@dataclass(frozen=True)
class Objects:
    """A message taken apart: Flower's object tree, and the bytes of each object by its digest."""

    tree: Any
    contents: Mapping[str, bytes]


def take_apart(message: Message) -> Objects:
    """Take a message apart, and set its id to its own digest, as Flower expects."""
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
    """Return the same bytes as Flower's own `deflate`, for a record of texts and bytes; None for any other record.

    Flower copies each value about twelve times, which for an update of 64 MB takes longer than sending it.
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
    """Return the bytes before a length-delimited field in Protocol Buffers: its tag and its length."""
    coded = bytearray([number << 3 | 2])
    while length > 0x7F:
        coded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*coded, length])


def _know(record: ConfigRecord, content: bytes) -> str:
    """Return a record's digest, and let Flower use it within `no_object_id_recompute` instead of computing it."""
    name = str(get_object_id(content))
    record.__dict__["_object_id"] = name
    _get_computed_object_ids().add(name)
    return name


def part_names(tree: Any) -> list[str]:
    """Return the digests of a message's objects, children first.

    Raises:
        ProtocolError: There are more objects than a message of privet has.
    """
    names: list[str] = []
    for part in iterate_object_tree(tree):
        # Counted inside the loop: the tree comes from the sender, and may be huge.
        names.append(part.object_id)
        if len(names) > MOST_PARTS:
            raise ProtocolError(f"a message of Flower: expected at most {MOST_PARTS} parts, got more", SAME_VERSION)
    return names


def put_together(identity: str, contents: Mapping[str, bytes]) -> Message:
    """Put a message together from its objects.

    Raises:
        ProtocolError: An object is missing, does not have its digest, or is of another kind.
    """
    for name, content in contents.items():
        if not hmac.compare_digest(get_object_id(content), name):
            raise ProtocolError(
                "a message of Flower: the content of a part does not match the digest that is its name", SAME_VERSION
            )
    try:
        kinds = {get_object_head_values_from_object_content(content)[0] for content in contents.values()}
        if not kinds <= _KINDS:
            raise ProtocolError("a message of Flower: a part is of a kind that privet does not send", SAME_VERSION)
        message = inflate_object_from_contents(identity, dict(contents))
    except _MALFORMED:
        raise ProtocolError(
            "a message of Flower: its parts cannot be joined to a whole message", SAME_VERSION
        ) from None
    if not isinstance(message, Message):
        raise ProtocolError("a message of Flower: its parts cannot be joined to a whole message", SAME_VERSION)
    message.metadata.__dict__["_message_id"] = identity
    return message
