"""Messages as Flower records, and back. Only this module knows the keys of these records."""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, RecordDict

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError
from privet.common.study.messages import SAME_VERSION, Message, Parts, rebuild

RECORD = "privet"
_KIND, _FIELDS, _BLOB = "kind", "fields", "blob."


def pack(message: Message) -> RecordDict:
    """Return a message as one record: one large record is sent faster than many small ones."""
    parts = message.parts()
    record = ConfigRecord({_KIND: parts.kind, _FIELDS: canonical_json(parts.fields)})
    for name, data in parts.blobs.items():
        record[_BLOB + name] = data
    return RecordDict({RECORD: record})


def unpack(content: RecordDict) -> Message:
    """Read a message that `pack` wrote.

    Raises:
        ProtocolError: It is not such a message.
    """
    record = content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise ProtocolError(f"a message of Flower lacks the record {RECORD!r}", SAME_VERSION)
    kind, text = record.get(_KIND), record.get(_FIELDS)
    if not isinstance(kind, str) or not isinstance(text, bytes):
        raise ProtocolError(f"a message of Flower: its record {RECORD!r} lacks the kind or the fields", SAME_VERSION)
    try:
        fields = json.loads(text, parse_int=_number)
        # A value that canonical JSON cannot hold (a lone surrogate, NaN, a huge integer) would fail later, in the log.
        canonical = isinstance(fields, dict) and canonical_json(fields) == text
    except (ValueError, RecursionError):
        raise ProtocolError(
            f"a message of Flower: the fields in its record {RECORD!r} are not JSON", SAME_VERSION
        ) from None
    if not canonical:
        raise ProtocolError(
            f"a message of Flower: the fields in its record {RECORD!r} are not an object in canonical JSON",
            SAME_VERSION,
        )
    named = {str(name)[len(_BLOB) :]: value for name, value in record.items() if str(name).startswith(_BLOB)}
    blobs = {name: value for name, value in named.items() if isinstance(value, bytes)}
    if len(blobs) != len(named):
        raise ProtocolError(f"a message of Flower: a binary part of its record {RECORD!r} is not bytes", SAME_VERSION)
    return rebuild(Parts(kind, fields, blobs))


def _number(text: str) -> int | float:
    """Read a number without a decimal point as RFC 8785 does: as a double, which is exact below 2^53."""
    value = float(text)
    return int(value) if abs(value) < 2**53 else value
