"""A pool of records: read it from files or generate it, deal it out to sites, and write the part of each site.

A pool is a table: values by column name. It has the columns that the study reads, and the column of the split. Where
no test file is named, a part of the units is held out for the test.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privet.client.formats import FileFormat
from privet.client.site import IdRule
from privet.client.training.files import read_columns
from privet.client.training.ids import unit_names
from privet.common.errors import DataError, StudyError
from privet.common.privacy.noise import derive_key
from privet.common.study.study import Study
from privet.simulations.data.clinical_notes import HOSPITALS, Split, generate_notes, generic_hospitals
from privet.simulations.data.partition import Pool, by_value, deal, draw_shares, level, numbered_names
from privet.simulations.data.scenario import Partition

PARTS: tuple[Split, Split] = ("train", "test")
_EVEN = 1e6  # Dirichlet concentration; all generated hospitals get the same mix of specialties

Table = Mapping[str, Sequence[Any]]
Rows = tuple[Sequence[int], Sequence[int]]
"""The rows of one site: indices into the training pool, and into the test pool."""


def read_pool(study: Study, section: Partition, data: str | None, root: Path, part: Split) -> Table:
    """Return all rows of one part; an empty table if the partition names no file for the part.

    Raises:
        StudyError: A file is missing, the generated notes lack a column, or the split needs labels and the task has
            none.
        DataError: A file cannot be read, or lacks a column.
    """
    if section.split == "dirichlet" and "label" not in study.data.columns:
        raise StudyError(
            'simulation.partition.split: "dirichlet" deals out records by label, '
            f"but records of the task {study.task.kind} have no labels",
            'set split = "iid", "quantity" or "column" in [simulation.partition]',
        )
    wanted = wanted_columns(study, section.column)
    if data == "notes":
        return _generated(study, section, wanted, part)
    named = section.train if part == "train" else section.test
    return read_files(study, [(root / path, section.form_of(path)) for path in named], wanted, "simulation.partition")


def wanted_columns(study: Study, further: str | None = None) -> list[str]:
    """Return the columns that a study reads, and one more where it is given."""
    names = dict.fromkeys([*study.data.columns.values(), study.data.unit, further])
    return [name for name in names if name is not None]


def read_files(study: Study, files: Sequence[tuple[Path, FileFormat]], wanted: Sequence[str], where: str) -> Table:
    """Return some columns of some files, each with how it is written, as one table; an empty one for no files.

    Raises:
        StudyError: A file, which the field `where` names, is missing.
        DataError: A file cannot be read, or lacks a column.
    """
    columns: dict[str, list[Any]] = {}
    for path, form in files:
        found = read_columns(require_file(path, where), study, wanted, form).columns
        for name, values in found.items():
            columns.setdefault(name, []).extend(map(_respelling(study, name, form), values))
    return columns


def rows_of(table: Table) -> int:
    """Return the number of rows of a table."""
    return len(next(iter(table.values()), ()))


def hold_out(study: Study, table: Table, fraction: float, rule: IdRule | None) -> tuple[Table, Table]:
    """Split a table by unit into one for training and one for the test, by the study's seed.

    Args:
        study: The study; its unit of privacy keeps rows together.
        table: The rows.
        fraction: Of the units, for the test: at least one of them, and never all.
        rule: How the ids in the study's `data.unit` are written; None: equal values are one unit.

    Raises:
        StudyError: There are fewer than two units.
    """
    units = _units(study, table, rule)
    key = derive_key(study.seed, "test")
    order = sorted(set(units), key=lambda unit: hmac.digest(key, unit.encode(), "sha256"))
    if len(order) < 2:
        raise StudyError(
            f"simulation.test_fraction: expected at least 2 units of privacy to divide, found {len(order)}",
            "name test files, or give the site more records",
        )
    tested = set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    rows = [[row for row, unit in enumerate(units) if (unit in tested) is test] for test in (False, True)]
    train, test = ({name: [values[row] for row in part] for name, values in table.items()} for part in rows)
    return train, test


def _respelling(study: Study, column: str, form: FileFormat) -> Callable[[Any], Any]:
    """Return what gives a column's values the study's spelling: the files that are written have no settings."""
    if column in (study.data.columns.get("label"), study.data.columns.get("tags")):
        return lambda value: [form.label(each) for each in value] if isinstance(value, list) else form.label(value)
    return form.number if column == study.data.unit else lambda value: value


def _generated(study: Study, section: Partition, wanted: Sequence[str], part: Split) -> Table:
    each = -(-section.patients // len(HOSPITALS))
    hospitals = generic_hospitals(len(HOSPITALS), patients=each, skew=_EVEN, seed=study.seed)
    notes = [(each.style, note) for each in hospitals for note in generate_notes(each, seed=study.seed, part=part)]
    table = {
        "patient": [note.patient for _, note in notes],
        "note": [note.note for _, note in notes],
        "specialty": [note.specialty for _, note in notes],
        "reply": [note.reply for _, note in notes],
        "style": [style for style, _ in notes],
    }
    if unknown := [name for name in wanted if name not in table]:
        raise StudyError(
            f"the study file: generated notes have no column {', '.join(unknown)}",
            f"in [data] and [simulation.partition], name only the columns {', '.join(table)}",
        )
    return {name: table[name] for name in wanted}


def require_file(path: Path, where: str) -> Path:
    """Return the path if it is a file.

    Raises:
        StudyError: There is no such file.
    """
    if not path.is_file():
        raise StudyError(f"{where}: there is no file {path}", "give the path relative to the study file")
    return path


def deal_out(
    study: Study,
    section: Partition,
    train: Table,
    test: Table,
    say: Callable[[str], None],
    rule: IdRule | None = None,
) -> dict[str, Rows]:
    """Return the rows of each site, by name of the site.

    Args:
        study: The study; its unit of privacy keeps rows together.
        section: How to split.
        train: The training pool.
        test: The test pool; may be empty.
        say: Receives a line if rows are left out.
        rule: How the ids in the study's `data.unit` are written; None: equal values are one unit.

    Raises:
        StudyError: There are too few units for the number of sites, or fewer than two values of the column have enough
            units.
    """
    units = [_units(study, table, rule) for table in (train, test)]
    if section.split == "column" and section.column is not None:
        rows, left = by_value(train[section.column], units[0], section.least_units)
        tested = by_value(test[section.column], units[1], 1)[0] if test else {}
        if left:
            say(
                f"partition: left out {left} rows, whose value of column {section.column} has fewer than "
                f"{section.least_units} units"
            )
        return {name: (indices, tested.get(name, ())) for name, indices in rows.items()}
    names = numbered_names(section.sites or 0)
    pools = [Pool(of, _classes(study, section, table)) for of, table in zip(units, (train, test), strict=True)]
    shares = draw_shares(section, len(names), list(dict.fromkeys(pools[0].classes)), study.seed)
    dealt = [deal(pool, shares, len(names), study.seed, part) for pool, part in zip(pools, PARTS, strict=True)]
    level(dealt[0], section.least_units)
    first, second = ([sorted(row for unit in site for row in unit) for site in sites] for sites in dealt)
    return {name: (first[number], second[number]) for number, name in enumerate(names)}


def _units(study: Study, table: Table, rule: IdRule | None) -> list[str]:
    """Return the unit of privacy of each row. Without a unit column, equal rows are one unit."""
    if not table:
        return []
    if study.data.unit is not None and rule is not None:
        return list(unit_names(table[study.data.unit], rule, study.data.unit, "simulation.partition"))
    if study.data.unit is not None:
        return [str(value) for value in table[study.data.unit]]
    return [json.dumps(row) for row in zip(*(table[name] for name in study.data.columns.values()), strict=True)]


def _classes(study: Study, section: Partition, table: Table) -> list[Any]:
    if not table:
        return []
    labels = table[study.data.columns["label"]] if section.split == "dirichlet" else None
    return [None] * rows_of(table) if labels is None else list(labels)


def write_rows(path: Path, table: Table, rows: Sequence[int]) -> tuple[Path, ...]:
    """Write some rows as JSON Lines, and return the file; write no file and return () if there are no rows.

    Raises:
        DataError: A column holds values of a type that JSON does not have, such as dates.
    """
    if not rows:
        return ()
    lines = []
    for row in rows:
        record = {name: values[row] for name, values in table.items()}
        try:
            lines.append(json.dumps(record, ensure_ascii=False))
        except TypeError:
            known = (str, int, float, list, dict, type(None))
            wrong = ", ".join(name for name, value in record.items() if not isinstance(value, known))
            raise DataError(
                f"the data files: expected text, numbers or lists of them, found another type in {wrong or 'a list'}",
                "convert the column to text in the files",
            ) from None
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return (path,)
