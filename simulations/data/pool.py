"""A pool of records on disk: read from files or generated, dealt out, and each site's part written.

A pool is a table, column name to values, with the columns that the study reads and the one that the split goes by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privet.client.training.data import read_columns
from privet.common.errors import StudyError
from privet.common.study.study import Study
from privet.simulations.data.clinical_notes import HOSPITALS, Split, generate_notes, generic_hospitals
from privet.simulations.data.partition import Pool, by_value, deal, draw_shares, level, numbered_names
from privet.simulations.data.scenario import Partition

PARTS: tuple[Split, Split] = ("train", "test")
_EVEN = 1e6  # concentration at which generated hospitals have the same mix

Table = Mapping[str, Sequence[Any]]
Rows = tuple[Sequence[int], Sequence[int]]
"""A site's rows of the training pool and of the test pool."""


def read_pool(study: Study, section: Partition, data: str, root: Path, part: Split) -> Table:
    """Return all rows of one part; an empty table where no file is named.

    Raises:
        StudyError: A file is missing, generated notes have no such column, or the task has none of the labels that
            the split goes by.
        DataError: A file cannot be read, or has no such column.
    """
    if section.split == "dirichlet" and "label" not in study.data.columns:
        raise StudyError(f"simulation.partition.split: dirichlet deals out by labels, {study.task.kind} has none")
    names = dict.fromkeys([*study.data.columns.values(), study.data.unit, section.column])
    wanted = [name for name in names if name is not None]
    if data == "notes":
        return _generated(study, section, wanted, part)
    columns: dict[str, list[Any]] = {}
    for path in section.train if part == "train" else section.test:
        _, found = read_columns(require_file(root / path, "simulation.partition"), study, wanted)
        for name, values in found.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _generated(study: Study, section: Partition, wanted: Sequence[str], part: Split) -> Table:
    each = -(-section.patients // len(HOSPITALS))
    hospitals = generic_hospitals(len(HOSPITALS), patients=each, skew=_EVEN, seed=study.seed)
    notes = [(each.style, note) for each in hospitals for note in generate_notes(each, seed=study.seed, part=part)]
    table = {
        "patient": [note.patient for _, note in notes],
        "note": [note.note for _, note in notes],
        "specialty": [note.specialty for _, note in notes],
        "style": [style for style, _ in notes],
    }
    if unknown := [name for name in wanted if name not in table]:
        raise StudyError(f"generated notes have no column {', '.join(unknown)}", f"they have {', '.join(table)}")
    return {name: table[name] for name in wanted}


def require_file(path: Path, where: str) -> Path:
    """Return the path of a file that is there. Raises `StudyError` otherwise."""
    if not path.is_file():
        raise StudyError(f"{where}: no file {path}", "paths are relative to the study file")
    return path


def deal_out(
    study: Study, section: Partition, train: Table, test: Table, say: Callable[[str], None]
) -> dict[str, Rows]:
    """Return each site's rows by its name.

    Raises:
        StudyError: There are too few units for so many sites, or the column gives no two sites.
    """
    units = [_units(study, table) for table in (train, test)]
    if section.split == "column" and section.column is not None:
        rows, left = by_value(train[section.column], units[0], section.least_units)
        tested = by_value(test[section.column], units[1], 1)[0] if test else {}
        if left:
            say(f"partition: {left} rows have a value of {section.column} with too few units and are left out")
        return {name: (indices, tested.get(name, ())) for name, indices in rows.items()}
    names = numbered_names(section.sites or 0)
    pools = [Pool(of, _classes(study, section, table)) for of, table in zip(units, (train, test), strict=True)]
    shares = draw_shares(section, len(names), list(dict.fromkeys(pools[0].classes)), study.seed)
    dealt = [deal(pool, shares, len(names), study.seed, part) for pool, part in zip(pools, PARTS, strict=True)]
    level(dealt[0], section.least_units)
    first, second = ([sorted(row for unit in site for row in unit) for site in sites] for sites in dealt)
    return {name: (first[number], second[number]) for number, name in enumerate(names)}


def _units(study: Study, table: Table) -> list[Any]:
    """Return each row's unit of privacy: equal rows are one where the study names no column."""
    if not table:
        return []
    if study.data.unit is not None:
        return [str(value) for value in table[study.data.unit]]
    return [json.dumps(row) for row in zip(*(table[name] for name in study.data.columns.values()), strict=True)]


def _classes(study: Study, section: Partition, table: Table) -> list[Any]:
    if not table:
        return []
    labels = table[study.data.columns["label"]] if section.split == "dirichlet" else None
    return [None] * len(next(iter(table.values()))) if labels is None else list(labels)


def write_rows(path: Path, table: Table, rows: Sequence[int]) -> tuple[Path, ...]:
    """Write some rows as JSON Lines, and return the file; nothing where there are none."""
    if not rows:
        return ()
    lines = (json.dumps({name: values[row] for name, values in table.items()}, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return (path,)
