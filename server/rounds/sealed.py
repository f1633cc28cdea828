"""The state of a run, read piece by piece: whether it is whole, the last closed round, and whether the run has ended.

A state holds the adapter, the optimizer's momenta, and the statements of all rounds, which for 1,000 sites and 2,000
rounds take 90 MB. Whoever looks at a run needs none of that in memory, nor the libraries that read arrays.

The file is a safetensors file: the length of a header in 8 bytes, the header in JSON, and the arrays. In the header,
the text `state` is JSON as `RunDirectory.store` writes it, and `seal` is the digest of that text and of the arrays.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PIECE, _END = 1 << 18, 1 << 12
_LONGEST_HEADER = 100_000_000  # of a file that safetensors reads
_BEGINS = b'"state":"'
"""What the text stands behind. In a string of the header, its quotes would have backslashes."""
_FIRST = re.compile(rb'\{"round": ([0-9]+), "study": "(sha256:[0-9a-f]{64})", ')
_LAST = re.compile(rb', "stopped": (true|false)(?:, "mean": [-+.0-9e]+)?\}\Z')
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
"""The names of NumPy for those of safetensors, as a seal has them."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        round: Last closed round; 0 before the first.
        study: Digest of its study.
        stopped: Whether the run has ended, early or not.
    """

    round: int
    study: str
    stopped: bool


class BrokenSealError(Exception):
    """A state is not what was sealed."""


def standing_in(path: Path, *, sealed: bool = False) -> Standing:
    """Read the state of a run in little memory. `sealed`: also compare all of it, with its arrays, with its seal.

    Raises:
        BrokenSealError: It is not what was sealed.
        OSError: It cannot be read.
        ValueError, KeyError, TypeError: It is no such file.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise ValueError("no header")
        pieces = _pieces(file, length)
        before, rest = _until(pieces)
        first, last, after = _hashed(rest, pieces, found)
        header: dict[str, Any] = json.loads(before + after)
        if sealed:
            _hash_arrays(file, 8 + length, header, found)
    begins, ends = _FIRST.match(first), _LAST.search(last)
    if begins is None or ends is None:
        raise ValueError("no state")
    if sealed and header["__metadata__"]["seal"] != f"sha256:{found.hexdigest()}":
        raise BrokenSealError
    return Standing(int(begins[1]), begins[2].decode(), ends[1] == b"true")


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise ValueError("the file is too short")
        size -= len(piece)
        yield piece


def _until(pieces: Iterator[bytes]) -> tuple[bytes, bytes]:
    """Return the header up to the text, and the piece in which that begins."""
    before = b""
    for piece in pieces:
        before += piece
        head, mark, rest = before.partition(_BEGINS)
        if mark:
            return head + mark, rest
    raise ValueError("no state")


def _hashed(piece: bytes, pieces: Iterator[bytes], seal: Any) -> tuple[bytes, bytes, bytes]:
    """Hash the text; return how it begins and ends, and the header from the quote behind it on."""
    first, last = b"", b""
    while True:
        # The first quote that no backslash escapes ends the text. JSON's strings have no control characters, so two of
        # them stand for an escaped backslash, and two others for an escaped quote.
        marked = piece.replace(b"\\\\", b"\0\0").replace(b'\\"', b"\1\1")
        found = marked.find(b'"')
        end = found if found >= 0 else len(piece) - marked.endswith(b"\\")  # what it escapes comes with the next piece
        text = marked[:end].replace(b"\0\0", b"\\").replace(b"\1\1", b'"')
        seal.update(text)
        first, last = first + text[: max(_END - len(first), 0)], (last + text)[-_END:]
        if found >= 0:
            return first, last, piece[end:] + b"".join(pieces)
        more = next(pieces, b"")
        if not more:
            raise ValueError("the text has no end")
        piece = piece[end:] + more


def _hash_arrays(file: IO[bytes], start: int, header: dict[str, Any], seal: Any) -> None:
    for name, array in sorted(header.items()):
        if name == "__metadata__":
            continue
        begin, end = array["data_offsets"]
        seal.update(f"\0{name} {_DTYPES[array['dtype']]} {tuple(array['shape'])}\0".encode())
        file.seek(start + begin)
        for piece in _pieces(file, end - begin):
            seal.update(piece)
