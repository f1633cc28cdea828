"""Flower messages as the content-addressed objects that travel: taken apart, and put together again with care.

Flower inflates whatever it is sent. Here a message is put together only from parts that have the digests they are
named by, are few, and are of the three kinds that privet sends.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
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
_MOST_PARTS = 8


@dataclass(frozen=True)
class Objects:
    """A message taken apart: its object tree, as Flower writes it, and the bytes of each object by its digest."""

    tree: Any
    contents: Mapping[str, bytes]


def take_apart(message: Message) -> Objects:
    """Take a message apart, and give it the id that Flower expects: its own digest."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        return Objects(get_object_tree(message), {name: part.deflate() for name, part in objects.items()})


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
