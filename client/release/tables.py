"""Rows in and rows out, for predictions: every kind of data file in; CSV or JSON Lines out.

Training reads columns that a study fixes (`privet.client.training.data`). Here every row keeps all its columns, in
order, and no row is dropped.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from privet.client.formats import FileFormat
from privet.client.training.files import PLAIN, Row, read_rows
from privet.client.training.headings import listed
from privet.common.errors import DataError, StateError, StudyError

Write = Callable[[Sequence[Row]], None]
# What a spreadsheet takes for the beginning of a formula (OWASP, CSV Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"[+-][0-9]+([.,][0-9]+)?")
PREDICTION = "prediction"
"""Name of the column that results get."""


class Survey(NamedTuple):
    """What a file holds.

    Attributes:
        column: Name of the column with the texts.
        rows: Number of rows.
        names: Names of all columns.
    """

    column: str
    rows: int
    names: tuple[str, ...]


def survey(path: Path, wanted: Sequence[str], kept: str | None, form: FileFormat = PLAIN) -> Survey:
    """Read a file once, and find the column that holds the texts.

    Args:
        path: The file.
        wanted: Names of columns that may hold the texts, best first.
        kept: Name of a column that must be there too.
        form: How the file is written.

    Raises:
        DataError: The file is malformed or has no rows, no such column, or a column of the results' name.
    """
    found: dict[str, None] = {}
    count = 0
    for row in read_rows(path, form):
        found.update(dict.fromkeys(row))
        count += 1
    if not count:
        raise DataError(f"the data file {path} has no rows", "check the path of the file, or export it again")
    column = next((name for name in wanted if name in found), None)
    if column is None or (kept is not None and kept not in found):
        missing = " or ".join(wanted) if column is None else kept
        raise DataError(
            f"{path}: expected the column {missing}, found only {listed(list(found), wanted)}",
            "rename the column in the file, or name it with --column (texts) or --id",
        )
    names = tuple(found) if kept is None else (kept,)
    if taken := [name for name in names if name == PREDICTION or name.startswith(f"{PREDICTION}_")]:
        raise DataError(
            f"{path} has a column {taken[0]}, a name that results get",
            "rename that column in the file, or keep one other column with --id",
        )
    return Survey(column, count, names)


@contextmanager
def writing(out: Path | None, screen: TextIO, columns: Sequence[str], flat: Callable[[Row], Row]) -> Iterator[Write]:
    """Open the place of the results. Yield what writes a batch of rows, each with its result under `PREDICTION`.

    The file appears under its name when the block ends without an error, and not before.

    Args:
        out: A new CSV or JSON Lines file; None writes JSON Lines to `screen`.
        screen: Standard output.
        columns: Names of the columns that are kept of the rows.
        flat: Turns a result into the values of CSV columns, always the same columns.

    Raises:
        StudyError: The name has another ending.
        StateError: The file exists, or cannot be written.
    """
    if out is None:
        yield lambda rows: _write_json(screen, rows)
        return
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise StudyError(
            f"--out {out.name}: expected a file name that ends in .jsonl or .csv",
            "rename it: results are JSON Lines or CSV",
        )
    if out.exists():
        raise StateError(f"the file {out} exists already", "choose another file; an existing file is never overwritten")
    staging = out.with_name(f".{out.name}.partial")
    as_csv = out.suffix.lower() == ".csv"
    try:
        staging.unlink(missing_ok=True)
        with staging.open("x", encoding="utf-8", newline="") as file:  # through no link that somebody else made
            if as_csv:
                names = [*columns, *flat({})]
                csv.writer(file).writerow(names)
            yield lambda rows: _write_csv(file, rows, names, flat) if as_csv else _write_json(file, rows)
        staging.replace(out)
    except OSError as error:
        raise StateError(
            f"{out} cannot be written ({error.strerror or type(error).__name__})",
            "check that the directory exists, that you may write to it and that the disk is not full",
        ) from None
    finally:
        staging.unlink(missing_ok=True)


def _write_json(file: TextIO, rows: Sequence[Row]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    file.flush()


def _write_csv(file: TextIO, rows: Sequence[Row], names: Sequence[str], flat: Callable[[Row], Row]) -> None:
    lines = [{**row, **{name: _inert(value) for name, value in flat(row[PREDICTION]).items()}} for row in rows]
    csv.writer(file).writerows([_cell(line.get(name)) for name in names] for line in lines)
    file.flush()


def _inert(value: Any) -> Any:
    """Return a result as a value that a spreadsheet takes for text: with an apostrophe before what begins a formula.

    A model writes whatever it was taught, `=HYPERLINK(...)` too. Columns of the person's own file stay as they are, and
    JSON Lines holds results unchanged.
    """
    formula = isinstance(value, str) and value.startswith(_FORMULA) and _NUMBER.fullmatch(value) is None
    return f"'{value}" if formula else value


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
