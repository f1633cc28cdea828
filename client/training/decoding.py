"""Bytes of a data file, decompressed, and their text. What is not in the stated encoding is refused with its line."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from privet.client.formats import Encoding
from privet.common.errors import DataError
from privet.common.files import most_like

MOST_BYTES = 2**31
"""Most bytes that a compressed file may hold: more are not read, as a few kilobytes can hold any number of them."""
PROPOSES = "`privet data STUDY FILE` prints the settings for the site file that fit this file"

_CHUNK = 2**20
_GZIP = b"\x1f\x8b"
_UTF_8_MARK = b"\xef\xbb\xbf"
_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_NAMES = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8", "cp1252": "Windows-1252", "latin-1": "Latin-1"}
# Latin-1 has control characters here, which no text holds: letters, dashes and quotes of Windows-1252.
_CONTROL = re.compile("[\x80-\x9f]")


class Kind(NamedTuple):
    """What the name of a data file says: `csv`, `tsv`, `jsonl`, `json` or `parquet`, and whether it is compressed."""

    name: str
    packed: bool

    @property
    def text(self) -> str:
        """The kind in words of reports."""
        return f"{self.name}.gz" if self.packed else self.name


_KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}


def kind_of(path: Path) -> Kind:
    """Return what the name of a data file says.

    Raises:
        DataError: The name has another ending.
    """
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (packed and kind == "parquet"):
        raise DataError(
            f"{path}: expected a file name that ends in {', '.join(_KINDS)}, or in .gz after one of them "
            "(except .parquet)",
            "convert the file to one of these formats (a workbook: save its sheet as CSV UTF-8), or rename it if only "
            "its name is unusual",
        )
    return Kind(kind, packed)


def content_of(path: Path) -> bytes:
    """Return the bytes of a file; of a file whose name ends in .gz, the bytes that are compressed in it.

    Raises:
        DataError: There is no such file, it is empty, it is not what its name says, or it holds more than `MOST_BYTES`.
        OSError: It cannot be read.
    """
    packed = kind_of(path).packed
    check_file(path)
    if packed:
        data = _unpacked(path)
    else:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            raise DataError(f"{path} is compressed with gzip, but its name does not say so", "add .gz to its name")
    if not data:
        raise DataError(f"the data file {path} is empty: it has 0 bytes", "export the file again")
    if data.startswith(_WORKBOOKS):
        raise DataError(
            f"{path} is not text: it is a workbook or an archive",
            "save the sheet as CSV UTF-8 in the program that made it",
        )
    return data


def check_file(path: Path) -> None:
    """Raise `DataError` where there is no file, or an empty one."""
    if not path.is_file():
        raise DataError(
            f"data file {path}: " + ("it is a directory, not a file" if path.is_dir() else "it does not exist"),
            f"check the path of the file{most_like(path)}",
        )
    if path.stat().st_size == 0:
        raise DataError(f"the data file {path} is empty: it has 0 bytes", "export the file again")


def _unpacked(path: Path) -> bytes:
    found = bytearray()
    try:
        with path.open("rb") as opened, gzip.GzipFile(fileobj=opened) as file:
            while chunk := file.read(_CHUNK):
                found += chunk
                if len(found) > MOST_BYTES:
                    raise DataError(
                        f"{path} holds more than {MOST_BYTES:,} bytes when it is decompressed",
                        "divide the file into smaller ones, or convert it to Parquet",
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(
            f"{path} is not a readable gzip file, or its end is missing", "copy or export it again"
        ) from None
    return bytes(found)


def text_of(path: Path, encoding: Encoding) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        DataError: As `content_of`, or the file is not text in this encoding. The message names the line.
        OSError: It cannot be read.
    """
    data = content_of(path)
    text = _decoded(path, data, encoding)
    if "\0" in text:
        wide = " (it may be UTF-16)" if encoding in _NAMES else ""
        raise _not_text(path, encoding, text.count("\n", 0, text.index("\0")) + 1, f"a NUL character{wide}")
    if encoding in ("cp1252", "latin-1") and not data.isascii() and is_utf_8(data):
        raise _not_text(path, encoding, 1, "text in UTF-8, with letters beyond ASCII")
    if encoding == "latin-1" and (found := _CONTROL.search(text)):
        line = text.count("\n", 0, found.start()) + 1
        raise _not_text(path, encoding, line, "a control character, which is a letter or mark in Windows-1252")
    return text


def _decoded(path: Path, data: bytes, encoding: Encoding) -> str:
    codec: str = encoding
    if encoding in ("utf-8", "utf-8-sig"):
        codec, data = "utf-8", data.removeprefix(_UTF_8_MARK)
    elif encoding == "utf-16":
        if data[:2] not in _MARKS:
            raise _not_text(path, encoding, 1, "no byte order mark; utf-16-le and utf-16-be need none")
        codec, data = _MARKS[data[:2]], data[2:]
    elif _MARKS.get(data[:2]) == encoding:
        data = data[2:]
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(codec, "ignore").count("\n") + 1
    raise _not_text(path, encoding, line, "bytes that mean nothing in it")


def _not_text(path: Path, encoding: Encoding, line: int, fault: str) -> DataError:
    name = _NAMES.get(encoding, encoding.upper())
    return DataError(
        f"{path} is not text in {name}: line {line}: found {fault}", f"{PROPOSES}; or export the file again as UTF-8"
    )


def is_utf_8(data: bytes) -> bool:
    """Return whether bytes are text in UTF-8, with or without a byte order mark."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def detected(data: bytes) -> Encoding | None:
    """Return the encoding that the bytes of a text file suggest; None if they suggest none.

    UTF-16 is told by its mark, or by NUL at every second place of ASCII characters. Other bytes that are not UTF-8 are
    taken for Windows-1252, or for Latin-1 where both give the same text. Other encodings of one byte a character look
    alike, so a person has to look at the letters.
    """
    if data[:2] in _MARKS:
        return "utf-16"
    sample = data[:4096]
    for place, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = sample[place::2]
        if half and half.count(0) > len(half) // 2 and not sample[1 - place :: 2].count(0):
            return "utf-16-le" if encoding == "utf-16-le" else "utf-16-be"
    if is_utf_8(data):
        return None if b"\0" in data else "utf-8"
    if b"\0" in data:
        return None
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "cp1252" if _CONTROL.search(data.decode("latin-1")) else "latin-1"
