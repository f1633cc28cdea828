"""The building blocks of the byte encoding: fixed-width integers, byte strings, names and lists.

Every value has exactly one encoding, and reading accepts no other. Integers are big-endian with a fixed width,
lists begin with a u32 count, lists of sites ascend strictly, and no bytes may follow the last field.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from privet.common.errors import ProtocolError

_T = TypeVar("_T")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


MALFORMED = "install the same version of privet at coordinator and sites; if it is the same, the message was changed"
"""Hint of errors about a message's form."""


class Reader:
    """Reads a message from front to back."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._length = len(self._data)
        self._at = 0

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes.

        Raises:
            ProtocolError: The message has fewer bytes left.
        """
        start, end = self._at, self._at + count
        if end > self._length:
            raise ProtocolError(f"a message of secure aggregation is {end - self._length} bytes too short", MALFORMED)
        self._at = end
        return self._data[start:end]

    @property
    def left(self) -> int:
        """Number of bytes not yet taken."""
        return self._length - self._at


class Codec(Protocol[_T]):
    """How one kind of value is written and read."""

    def put(self, out: bytearray, value: _T) -> None:
        """Append `value` to `out`."""

    def get(self, reader: Reader) -> _T:
        """Read a value, refusing any encoding but the canonical one."""


@dataclass(frozen=True)
class Unsigned:
    """An unsigned big-endian integer of `width` bytes."""

    width: int

    def put(self, out: bytearray, value: int) -> None:
        """Append `value` to `out`."""
        if not 0 <= value < 256**self.width:
            raise ProtocolError(
                f"a number in a message must be 0 or more and fit {self.width} bytes, got {value}", MALFORMED
            )
        out += value.to_bytes(self.width, "big")

    def get(self, reader: Reader) -> int:
        """Read an integer."""
        return int.from_bytes(reader.take(self.width), "big")


@dataclass(frozen=True)
class Bytes:
    """A byte string of fixed length."""

    length: int

    def put(self, out: bytearray, value: bytes) -> None:
        """Append `value` to `out`."""
        if len(value) != self.length:
            raise ProtocolError(
                f"a key or digest in a message must have {self.length} bytes, got {len(value)}", MALFORMED
            )
        out += value

    def get(self, reader: Reader) -> bytes:
        """Read the bytes."""
        return bytes(reader.take(self.length))


class Real:
    """A positive finite double, big-endian IEEE 754."""

    def put(self, out: bytearray, value: float) -> None:
        """Append `value` to `out`."""
        self._check(value)
        out += struct.pack(">d", value)

    def get(self, reader: Reader) -> float:
        """Read a double."""
        (value,) = struct.unpack(">d", reader.take(8))
        self._check(value)
        return float(value)

    def _check(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ProtocolError(f"a bound on values, in a message, must be finite and above 0, got {value}", MALFORMED)


class Flag:
    """A truth value: one byte, 0 or 1."""

    def put(self, out: bytearray, value: bool) -> None:
        """Append `value` to `out`."""
        out.append(int(value))

    def get(self, reader: Reader) -> bool:
        """Read a truth value."""
        byte = reader.take(1)[0]
        if byte > 1:
            raise ProtocolError(f"a yes-or-no field in a message must be 0 or 1, got {byte}", MALFORMED)
        return bool(byte)


@dataclass(frozen=True)
class Constant:
    """A field that takes no bytes, because it has one value in messages of this version."""

    value: Any

    def put(self, out: bytearray, value: Any) -> None:
        """Append nothing; refuse another value."""
        if value != self.value:
            raise ProtocolError("a message has a field that messages of its suite do not have", MALFORMED)

    def get(self, reader: Reader) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Text:
    """Printable ASCII of at most `most` characters, after a u8 count; `pattern` narrows it."""

    most: int
    pattern: re.Pattern[str] = re.compile(r"[ -~]+")

    def put(self, out: bytearray, value: str) -> None:
        """Append `value` to `out`."""
        self._check(value)
        out.append(len(value))
        out += value.encode("ascii")

    def get(self, reader: Reader) -> str:
        """Read a text."""
        raw = bytes(reader.take(reader.take(1)[0]))
        value = raw.decode("ascii", errors="replace")
        self._check(value)
        return value

    def _check(self, value: str) -> None:
        if not (1 <= len(value) <= self.most and self.pattern.fullmatch(value)):
            raise ProtocolError(
                f"a name in a message must have 1 to {self.most} ASCII characters and match {self.pattern.pattern}",
                MALFORMED,
            )


@dataclass(frozen=True)
class Many(Generic[_T]):
    """A list of `least` to `most` items after a u32 count. If `by` is given, its keys must ascend strictly."""

    item: Codec[_T]
    most: int
    by: Callable[[_T], Any] | None = None
    least: int = 0

    def put(self, out: bytearray, value: tuple[_T, ...]) -> None:
        """Append `value` to `out`."""
        self._check(value)
        out += len(value).to_bytes(4, "big")
        for item in value:
            self.item.put(out, item)

    def get(self, reader: Reader) -> tuple[_T, ...]:
        """Read a list."""
        count = int.from_bytes(reader.take(4), "big")
        # Each item takes at least a byte, so a sender cannot make the reader allocate more than it sent.
        if count > min(self.most, reader.left):
            raise ProtocolError(
                f"a list in a message may have at most {self.most} items and must fit the message, got {count} items",
                MALFORMED,
            )
        value = tuple(self.item.get(reader) for _ in range(count))
        self._check(value)
        return value

    def _check(self, value: tuple[_T, ...]) -> None:
        if not self.least <= len(value) <= self.most:
            raise ProtocolError(
                f"a list in a message may have at most {self.most} items and must have {self.least}, got {len(value)}",
                MALFORMED,
            )
        if self.by is not None and not ascends([self.by(item) for item in value]):
            raise ProtocolError("a list in a message must be in ascending order and hold no item twice", MALFORMED)


class Numbered(Protocol):
    """A byte string for or from a site."""

    @property
    def site(self) -> int:
        """The site's number."""

    @property
    def data(self) -> bytes:
        """The byte string."""


N = TypeVar("N", bound=Numbered)


@dataclass(frozen=True)
class PerSite(Generic[N]):
    """A list of at most `most` pairs of a site (u16, ascending) and `length` bytes, after a u32 count.

    The bytes are those of `Many` over a `Struct`, but reading is several times faster: a round has n^2 of them. Without
    `length`, the items have one length, which stands after the count as a u32: 0 in an empty list, and only there.
    """

    make: Callable[[int, bytes], N]
    length: int | None
    most: int

    def put(self, out: bytearray, value: tuple[N, ...]) -> None:
        """Append `value` to `out`."""
        if len(value) > self.most or not ascends([item.site for item in value]):
            raise ProtocolError(
                f"a list in a message must be in ascending order, hold no item twice and have at most {self.most} "
                "items",
                MALFORMED,
            )
        length = (len(value[0].data) if value else 0) if self.length is None else self.length
        if any(len(item.data) != length or not 0 <= item.site < 65536 for item in value) or (value and not length):
            raise ProtocolError(
                f"an item of a list in a message must have a site number below 65536 and {length} bytes", MALFORMED
            )
        out += len(value).to_bytes(4, "big")
        if self.length is None:
            out += length.to_bytes(4, "big")
        out += b"".join([item.site.to_bytes(2, "big") + item.data for item in value])

    def get(self, reader: Reader) -> tuple[N, ...]:
        """Read a list."""
        count = int.from_bytes(reader.take(4), "big")
        if count > self.most:
            raise ProtocolError(f"a list in a message may have at most {self.most} items, got {count}", MALFORMED)
        length = int.from_bytes(reader.take(4), "big") if self.length is None else self.length
        if self.length is None and bool(length) != bool(count):
            raise ProtocolError(
                f"a list in a message has {count} items of {length} bytes; a list without items has the length 0",
                MALFORMED,
            )
        width = 2 + length
        raw = bytes(reader.take(count * width))
        sites = [int.from_bytes(raw[at : at + 2], "big") for at in range(0, len(raw), width)]
        if not ascends(sites):
            raise ProtocolError("a list in a message must be in ascending order and hold no item twice", MALFORMED)
        return tuple(self.make(site, raw[i * width + 2 : (i + 1) * width]) for i, site in enumerate(sites))


def ascends(keys: Sequence[Any]) -> bool:
    """Return whether each key is above the one before it."""
    return all(a < b for a, b in pairwise(keys))


@dataclass(frozen=True)
class Struct(Generic[_T]):
    """A frozen dataclass, its fields in order."""

    kind: type[_T]
    fields: Mapping[str, Codec[Any]]

    def put(self, out: bytearray, value: _T) -> None:
        """Append `value` to `out`."""
        for name, codec in self.fields.items():
            codec.put(out, getattr(value, name))

    def get(self, reader: Reader) -> _T:
        """Read all fields and return the dataclass."""
        return self.kind(**{name: codec.get(reader) for name, codec in self.fields.items()})
