"""Read a site's files: CSV, JSON Lines or Parquet. Only the needed columns, with unchanged values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privet.common.errors import DataError
from privet.common.study.sections import FORMS
from privet.common.study.study import Study

_LISTED = 20
Columns = dict[str, list[Any]]


# --- reading ---------------------------------------------------------------------------------------------


def reader_of(path: Path, study: Study) -> tuple[str, Callable[[Path, Sequence[str]], Columns]]:
    """Return the format of `path` and its reader, after checking that the file exists and is not empty."""
    format_, read, _ = _checked(path)
    if format_ == "csv" and "tokens" in study.data.columns:
        raise DataError(
            f"{path.name}: the columns {', '.join(study.data.columns.values())} hold lists, which CSV cannot store",
            "convert the file to JSON Lines (.jsonl) or Parquet (.parquet)",
        )
    return format_, read


def whole_table(path: Path) -> Columns:
    """Return all columns of a data file, with unchanged values, for a study that is yet to be written.

    Raises:
        DataError: The file is missing, of an unknown format or unreadable, or has two columns of one name.
    """
    _, read, names = _checked(path)
    try:
        return read(path, names(path))
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    return DataError(
        f"{path.name} cannot be read ({error.strerror or type(error).__name__})",
        "check the file's permissions, and its disk",
    )


def _checked(path: Path) -> _Format:
    """Return how a file is read, after checking that it exists and is not empty."""
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path.name}: expected a file name that ends in {', '.join(_READERS)}",
            "convert the file to one of these formats, or rename it if only its name is unusual",
        )
    if not path.is_file():
        raise DataError(
            f"data file {path.name}: " + ("it is a directory, not a file" if path.is_dir() else "it does not exist"),
            "check the path of the file",
        )
    if path.stat().st_size == 0:
        raise DataError(f"the data file {path.name} is empty: it has 0 bytes", "export the file again")
    return _READERS[path.suffix.lower()]


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, without empty lines.

    Raises:
        DataError: A line is not one JSON object.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path.name}: line {number} is not one JSON object in UTF-8",
                    "write each row as one JSON object on its own line (JSON Lines)",
                )
            yield row


def _read_json_lines(path: Path, needed: Sequence[str]) -> Columns:
    """Read one JSON object a line, with exactly the types of the file."""
    table: Columns = {name: [] for name in needed}
    found: dict[str, None] = {}
    for row in json_rows(path):
        found.update(dict.fromkeys(row))
        for name in needed:
            table[name].append(row.get(name))
    if not found:
        return table
    _check_columns(list(found), needed, path.name)
    return table


# A field of RFC 4180, and what ends it: a quoted field doubles its quotes, and no other field holds any.
_FIELD = re.compile(r'(?:"([^"]*+(?:""[^"]*+)*+)"|([^",\r\n]*+))(,|\r\n|\n|\r|\Z)')


def _read_csv(path: Path, needed: Sequence[str]) -> Columns:
    """Read a CSV file with every value as a string, unchanged: "NA" and "001" included.

    The file must follow RFC 4180. Readers that accept a quote at a wrong place take the text up to the next quote for
    one value, and so move text from one record into another.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _not_csv(path, "it is not text in UTF-8") from None
    rows = _csv_rows(path, text)
    header = next((row for _, row in rows), [])
    if not set(header) & set(needed):
        # Without a header line, these names would be a record, so the message does not quote them.
        raise DataError(
            f"{path.name}: expected the column names {', '.join(needed)} in the first line, found {len(header)} other "
            "values separated by commas" + _other_form(header),
            "write the column names into the first line, or correct data.columns in the study",
        )
    _check_columns(header, needed, path.name)
    table: Columns = {name: [] for name in needed}
    places = [(values, header.index(name)) for name, values in table.items()]
    for line, row in rows:
        if len(row) > len(header):
            raise _not_csv(path, f"line {line}: expected at most {len(header)} values, found {len(row)}")
        for values, place in places:
            values.append(row[place] if place < len(row) else None)
    return table


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each row, without rows that are an empty line."""
    row: list[str] = []
    at, line, first = 0, 1, 1
    while at < len(text) or row:
        found = _FIELD.match(text, at)
        if found is None:
            raise _not_csv(path, _csv_fault(text, at, line))
        quoted, plain, end = found.groups()
        row.append(plain if quoted is None else quoted.replace('""', '"'))
        line += text.count("\n", at, found.end())
        at = found.end()
        if end != ",":
            if len(row) > 1 or row[0].strip() or quoted is not None:
                yield first, row
            row, first = [], line


def _csv_fault(text: str, at: int, line: int) -> str:
    """Return what is wrong with the field that begins at `at`, in line `line`."""
    if text[at] != '"':
        return f"line {line}: a quote inside a value that does not begin with one"
    closed = re.compile(r'"[^"]*+(?:""[^"]*+)*+"').match(text, at)
    if closed is None:
        return f"line {line}: a quote that is not closed"
    return f"line {line + text.count(chr(10), at, closed.end())}: text after a closing quote"


def _not_csv(path: Path, fault: str) -> DataError:
    return DataError(
        f"{path.name} is not a readable CSV file: {fault}",
        "export it as UTF-8, separated by commas, with one name per column in its first line, no row longer than "
        "that line, a value with a quote, comma or line break between quotes, and each quote in it doubled (RFC 4180)",
    )


def _read_parquet(path: Path, needed: Sequence[str]) -> Columns:
    """Read the needed columns of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = DataError(f"{path.name} is not a readable Parquet file", "export the file again")
    try:
        # An open file, as a path may be taken for the address of another place.
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            _check_columns(file.schema_arrow.names, needed, path.name)
            table = file.read(columns=list(needed))
            return {name: table.column(name).to_pylist() for name in needed}
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a fault of the disk, not of the file
            raise
        raise unreadable from None


def _csv_names(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _not_csv(path, "it is not text in UTF-8") from None
    return next((row for _, row in _csv_rows(path, text)), [])


def _json_names(path: Path) -> list[str]:
    return list(dict.fromkeys(name for row in json_rows(path) for name in row))


def _parquet_names(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            return list(file.schema_arrow.names)
    except (pa.ArrowException, ValueError):
        raise DataError(f"{path.name} is not a readable Parquet file", "export the file again") from None


class _Format(NamedTuple):
    name: str
    read: Callable[[Path, Sequence[str]], Columns]
    names: Callable[[Path], list[str]]


_READERS: dict[str, _Format] = {
    ".csv": _Format("csv", _read_csv, _csv_names),
    ".jsonl": _Format("jsonl", _read_json_lines, _json_names),
    ".json-lines": _Format("jsonl", _read_json_lines, _json_names),
    ".parquet": _Format("parquet", _read_parquet, _parquet_names),
}
SUFFIXES = tuple(_READERS)
"""How the names of data files end."""


def check_exact(path: Path, column: str) -> None:
    """Check that a column of floats holds every whole number below 2^53 exactly.

    Raises:
        DataError: The file stores the column in less than 64 bits, so that two ids may have become one or changed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        return
    kind = pq.read_schema(path).field(column).type
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        raise DataError(
            f"{path.name}: expected ids as integers, strings or floats of 64 bits in the column {column}, found floats "
            f"of {kind.bit_width} bits, which round large numbers",
            "export the column again as integers or strings",
        )


# --- the contract ----------------------------------------------------------------------------------------


def _check_columns(found: Sequence[str], needed: Sequence[str], file: str) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        shown = [name[:64] for name in found[:_LISTED]]
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise DataError(
            f"{file}: expected the columns {', '.join(missing)}, found only {', '.join(shown)}{more}"
            + _other_form(found),
            "rename the columns of the file to the names in data.columns and data.unit of the study",
        )
    repeated = [name for name in needed if list(found).count(name) > 1]
    if repeated:
        raise DataError(f"{file} has several columns named {', '.join(repeated)}", "keep one column of each name")


def _other_form(found: Sequence[str]) -> str:
    """Return a sentence about the form of records that the columns of a file suggest; empty if there is none."""
    for kind, forms in FORMS.items():
        for form in forms:
            if set(form.needed) <= set(found):
                pairs = ", ".join(f'{role} = "{role}"' for role in (*form.needed, *form.optional) if role in found)
                return f"; a study of kind {kind} reads these with data.columns = {{ {pairs} }}"
    return ""
