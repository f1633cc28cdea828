"""A first look at a site's data files, before there is any study: their columns, and how many units they hold.

For the set-up of a site, whose operator is asked for what follows from it. `privet data` checks files against a study.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privet.client.site import IdRule
from privet.client.training.files import json_rows, reader_of
from privet.client.training.ids import unit_names, units_by_rule
from privet.common.errors import DataError
from privet.common.study.study import Study

_PLAIN = {
    "name": "glance",
    "model": {"base": "none", "sha256": {"model.safetensors": "0" * 64}},
    "task": {"kind": "text-classification", "labels": ["a", "b"]},
    "lora": {"targets": ["none"]},
    "training": {"rounds": 1, "local_steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    "privacy": {"mode": "none"},
}


def columns_of(path: Path) -> list[str]:
    """Return the names of a file's columns; of a JSON Lines file, those of its first row.

    Raises:
        DataError: The file is missing, empty or of another format.
    """
    reader_of(path, _study("a"))
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return next(csv.reader(file), [])
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_schema

            return list(read_schema(path).names)
        return list(next(json_rows(path), {}))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors, too
        raise DataError(
            f"{path.name}: the columns cannot be read ({type(error).__name__})", "check the file, or export it again"
        ) from None


def id_rule(paths: Sequence[Path], column: str) -> IdRule | None:
    """Return how the ids in a column seem to be written: all whole numbers, or text; None if neither is plain.

    Raises:
        DataError: As `columns_of`; or a file lacks the column.
    """
    values = _values(paths, column)
    try:
        found = units_by_rule(unit_names(values, None, column, "the files"))
    except DataError:
        return None
    return "number" if found["number"] is not None else "text"


def count_units(paths: Sequence[Path], column: str | None, rule: IdRule | None) -> int:
    """Return the number of units in files: of distinct ids in a column, or of rows.

    Raises:
        DataError: As `id_rule`; or an id is no whole number under `number`.
    """
    if column is None:
        return sum(len(_values([path], columns_of(path)[0])) for path in paths)
    names = unit_names(_values(paths, column), rule, column, "the files")
    return len({name for name in names if name})


def _values(paths: Sequence[Path], column: str) -> list[Any]:
    values: list[Any] = []
    for path in paths:
        _, read = reader_of(path, _study(column))
        values += read(path, [column])[column]
    return values


def _study(column: str) -> Study:
    return Study.parse({**_PLAIN, "data": {"columns": {"text": column, "label": column}}})
