"""Rows of separated values by RFC 4180, strictly: text never moves from one record into another.

Readers that accept a quote at a wrong place take the text up to the next quote for one value. Here these are refused
with their line: a stray quote, a quote that never closes, a line break of another kind than the file's other rows end
with, a row longer than the first, and the first line once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from privet.client.formats import DELIMITERS, Delimiter, FileFormat
from privet.client.training.decoding import PROPOSES
from privet.common.errors import DataError

_MARK = re.compile(r'"?sep=([^\r\n"])"?(?:\r\n|\n|\r)', re.IGNORECASE)
_ENDS = {"\r\n": "CRLF", "\n": "LF", "\r": "CR"}
_QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
_PLURAL = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}


class Body(NamedTuple):
    """A file of separated values: the names of its columns, the line and the values of each row, and its separator."""

    header: list[str]
    rows: Iterator[tuple[int, list[str]]]
    separated: str


def read_body(path: Path, text: str, form: FileFormat, default: Delimiter) -> Body:
    """Return the columns and the rows of a text. Rows may be shorter than the header.

    Raises:
        DataError: Now or while rows are read: the text breaks a rule of the module, in the named line.
    """
    separator = form.separator(default)
    rows = csv_rows(path, text, separator)
    header = next((row for _, row in rows), [])
    return Body(form.names(header), _checked(path, header, rows), _PLURAL[separator])


def _checked(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    for line, row in rows:
        if len(row) > len(header):
            raise not_csv(path, f"line {line}: expected at most {len(header)} values, found {len(row)}")
        if len(row) > 1 and row[0].removeprefix("\ufeff") == header[0] and row[1:] == header[1:]:
            raise not_csv(path, f"line {line}: the column names once more, as where two files were joined")
        yield line, row


def check_length(path: Path, line: int, row: list[str], least: int) -> None:
    """Raise `DataError` where a row has fewer values than are needed: a line break may have cut it."""
    if len(row) < least:
        raise not_csv(path, f"line {line}: expected at least {least} values, found {len(row)}")


def csv_rows(path: Path, text: str, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each row, without rows that are an empty line.

    A first line `sep=` and the separator, as Excel writes and reads it, is no row.

    Raises:
        DataError: As `read_body`.
    """
    field = _field(separator)
    row: list[str] = []
    at, line, first, ends = 0, 1, 1, ""
    if (mark := _MARK.match(text)) is not None:
        if mark[1] != separator:
            raise not_csv(
                path, f"line 1: the file says that {_named(mark[1])} separate values, not {_named(separator)}"
            )
        at, line, first = mark.end(), 2, 2
    while at < len(text) or row:
        found = field.match(text, at)
        if found is None:
            raise _stray(path, text, at, line)
        quoted, plain, end = found.groups()
        at = found.end()
        if quoted is None:
            row.append(plain)
        else:
            row.append(quoted.replace('""', '"'))
            line += _breaks(quoted)
        if end == separator:
            continue
        if end:
            if end != (ends or end):
                raise not_csv(path, f"line {line}: it ends with {_ENDS[end]}, and the lines before with {_ENDS[ends]}")
            ends, line = end, line + 1
        if len(row) > 1 or row[0].strip() or quoted is not None:
            yield first, row
        row, first = [], line


@lru_cache(maxsize=8)
def _field(separator: str) -> re.Pattern[str]:
    """Return a field and what ends it: a quoted field doubles its quotes, and no other field holds any."""
    mark = re.escape(separator)
    return re.compile(rf'(?:"([^"]*+(?:""[^"]*+)*+)"|([^"{mark}\r\n]*+))({mark}|\r\n|\n|\r|\Z)')


def _breaks(text: str) -> int:
    """Return the number of line breaks, of any kind."""
    return text.count("\n") + (text.count("\r") - text.count("\r\n") if "\r" in text else 0)


def _stray(path: Path, text: str, at: int, line: int) -> DataError:
    """Return the error of a field that begins at `at`, in line `line`, and has a quote at a wrong place."""
    if text[at] != '"':
        fault = "a quote inside a value that does not begin with one"
    elif (closed := _QUOTED.match(text, at)) is None:
        fault = "a quote that is not closed"
    else:
        line, fault = line + _breaks(closed[0]), "text after a closing quote"
    return DataError(
        f"{path} is not a readable CSV file: line {line}: {fault}",
        'put the whole value between quotes, and write each quote in it twice, as in "she said ""no""" (RFC 4180)',
    )


def _named(separator: str) -> str:
    return _PLURAL.get(separator, f"characters U+{ord(separator):04X}")


def not_csv(path: Path, fault: str) -> DataError:
    """Return the error of a file that is not separated values, with its fault."""
    return DataError(
        f"{path} is not a readable CSV file: {fault}",
        "export it with one name per column in its first line, no row of another length, one kind of line ends, a "
        f"value with a quote, separator or line break between quotes, and each quote in it doubled (RFC 4180); "
        f"{PROPOSES}",
    )


def marked(text: str) -> Delimiter | None:
    """Return the delimiter that a first line `sep=` names; None where there is none."""
    found = _MARK.match(text)
    return None if found is None else next((name for name, each in DELIMITERS.items() if each == found[1]), None)
