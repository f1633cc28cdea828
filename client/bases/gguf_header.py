"""Walk the header of a GGUF file before a library reads it.

The library believes the counts that a file states. A few bytes that claim 2^60 entries have it fill memory without end.
Here every count must fit into the bytes that the file has left. Layout: ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Bytes of a number, by type.
_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS, _MOST_NESTED = 8, 4


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._order = "<"

    @property
    def _left(self) -> int:
        return self._size - self._file.tell()

    def _number(self, width: int) -> int:
        data = self._file.read(width)
        if len(data) < width:
            raise ValueError("the file ends within its header")
        found: int = struct.unpack(self._order + {4: "I", 8: "Q"}[width], data)[0]
        return found

    def _count(self, least: int, width: int = 8) -> int:
        """Return the number of entries that follow, each of so many bytes at least."""
        count = self._number(width)
        if count * least > self._left:
            raise ValueError(f"the file states {count} entries, which it is too short for")
        return count

    def _skip(self, size: int) -> None:
        self._file.seek(size, 1)

    def _text(self) -> None:
        self._skip(self._count(1))

    def walk(self) -> None:
        if self._file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self._number(4) & 0xFFFF == 0:
            self._order = ">"
        tensors, entries = self._count(24), self._count(12)
        for _ in range(entries):
            self._text()
            self._value(self._number(4), 0)
        for _ in range(tensors):
            self._text()
            dimensions = self._count(8, width=4)
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self._skip(8 * dimensions + 12)
        if self._left < 0:
            raise ValueError("the file ends within its header")

    def _value(self, kind: int, depth: int) -> None:
        if kind in _WIDTH:
            self._skip(_WIDTH[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY and depth < _MOST_NESTED:
            inner = self._number(4)
            count = self._count(_WIDTH.get(inner, 8))
            if inner in _WIDTH:
                self._skip(count * _WIDTH[inner])
                return
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise ValueError(f"an entry is of the unknown type {kind}")


def check_header(path: Path) -> None:
    """Check that the counts in a GGUF file's header fit into the file.

    Raises:
        ValueError: They do not, or it is no GGUF file.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        _Header(file, path.stat().st_size).walk()
