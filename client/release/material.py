"""The records of an evaluation: read from files, with the unit, the site and the groups of each."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.client.budget.withdrawals import Withdrawn
from privet.client.formats import FileFormat, FormatSection, Formatted
from privet.client.training.data import Records, concatenate, load_records
from privet.client.training.files import kept_columns, read_columns
from privet.client.training.forms import Turn
from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError, PrivetError, StudyError
from privet.common.study.reading import read_toml, validate
from privet.common.study.study import Study

PLAINLY = FormatSection()
NOT_GIVEN = "(not given)"
MOST_GROUPS = 30
"""A column with more values than this names individuals rather than groups."""
UNNAMED = "(no site)"


@dataclass(frozen=True)
class Material:
    """Records, in the order of their files.

    Attributes:
        records: The records; a unit of two files of one site is one unit, of two sites two.
        unit_column: Column of the units; None where each distinct record is a unit.
        sites: Site of each record.
        groups: By column, the value for each record.
        files: Names of the files.
        dropped: Rows that are not records, by reason.
    """

    records: Records
    unit_column: str | None
    sites: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    files: tuple[str, ...]
    dropped: Mapping[str, int]


def read_material(
    study: Study,
    files: Sequence[tuple[str, Path]],
    columns: Sequence[str] = (),
    forms: FormatSection = PLAINLY,
    withdrawn: Withdrawn | None = None,
) -> Material:
    """Read all records of some files.

    Args:
        study: The study.
        files: Site and path of each file; `UNNAMED` for a file of no named site.
        columns: Columns to group by.
        forms: How the files are written.
        withdrawn: Whose records are left out.

    Raises:
        DataError: A file does not fit the study, or lacks a column.
        StudyError: There is no file.
    """
    if not files:
        raise StudyError(
            "expected at least one file of records, found none",
            "name a file that the run was not trained on, with --data FILE or --site NAME=FILE",
        )
    if len({path.resolve() for _, path in files}) < len(files):
        raise StudyError(
            "--data and --site: expected each file once, found one twice: its records would count twice",
            "name each file once",
        )
    unit = study.data.unit if all(_has(path, study, study.data.unit, forms) for _, path in files) else None
    own = _by(study, unit)
    parts, dropped = [], dict[str, int]()
    groups: dict[str, list[str]] = {column: [] for column in columns}
    for number, (site, path) in enumerate(files):
        records, report = load_records(path, own, training=False, form=forms.of(path), withdrawn=withdrawn)
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        # A record whose unit is not known is a unit of its own.
        units = [f"{site}:{name}" if name else f"{number}:{row}" for row, name in enumerate(records.units)]
        parts.append(Records(records.rows, tuple(units)))
        for column in columns:
            groups[column] += [value.strip() or NOT_GIVEN for value in _column(path, study, column, forms, withdrawn)]
    return Material(
        records=concatenate(parts),
        unit_column=unit,
        sites=tuple(site for (site, _), part in zip(files, parts, strict=True) for _ in part.rows),
        groups={column: tuple(values) for column, values in groups.items()},
        files=tuple(path.name for _, path in files),
        dropped=dropped,
    )


def prompt_text(turns: Sequence[Turn]) -> str:
    """Return a prompt as people read it: a question alone, or a conversation with its roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def row_of(prompt: str, answer: str) -> dict[str, Any]:
    """Return a record of a prompt and an answer."""
    return {"prompt": prompt, "answer": answer}


def _by(study: Study, unit: str | None) -> Study:
    """Return the study with another column of units, for reading alone."""
    return study.model_copy(update={"data": study.data.model_copy(update={"unit": unit})})


def _column(path: Path, study: Study, column: str, forms: FormatSection, withdrawn: Withdrawn | None) -> Sequence[str]:
    """Return the values of a column for the rows that are records: what is read as the unit comes with these rows."""
    try:
        own = _by(study, column)
        return load_records(path, own, training=False, form=forms.of(path), withdrawn=withdrawn)[0].units
    except DataError:
        if not _has(path, study, column, forms):
            raise
        raise DataError(
            f"--by: {path.name}: expected texts or whole numbers in the column {column}, found other values",
            "write the groups as text, for example ranges of ages",
        ) from None


def _has(path: Path, study: Study, column: str | None, forms: FormatSection) -> bool:
    if column is None:
        return False
    try:
        read_columns(path, study, [column], forms.of(path))
    except DataError:  # what is wrong with a file itself is reported when its records are read
        return False
    return True


# --- multiple choice -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: its prompt, its choices and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    right: int
    unit: str


def read_questions(
    study: Study,
    files: Sequence[tuple[str, Path]],
    choices: str,
    right: str | None,
    unit: str | None,
    forms: FormatSection = PLAINLY,
    withdrawn: Withdrawn | None = None,
) -> list[Question]:
    """Read questions: the study's prompt, a column of choices, and the right choice.

    Choices are a list of texts, or a JSON list in a text. The right one is its text, its number from 0, or its letter.

    Args:
        study: The study.
        files: As in `read_material`.
        choices: Column of the choices.
        right: Column of the right choice; None: the study's answer.
        unit: Column of the units.
        forms: How the files are written.
        withdrawn: Whose records are left out.

    Raises:
        DataError: A file lacks a column, or a row has no list of two choices and more, or no right choice.
        StudyError: The study has no column of prompts.
    """
    columns = study.data.columns
    if "prompt" not in columns or "answer" not in columns:
        raise StudyError(
            "--choices: expected a study whose data.columns names prompt and answer, found another form of data",
            "leave --choices out",
        )
    answer, found = right or columns["answer"], []
    for number, (site, path) in enumerate(files):
        needed = list(dict.fromkeys([columns["prompt"], choices, answer, *([unit] if unit else [])]))
        table = kept_columns(path, study, needed, forms.of(path), withdrawn).columns
        wrong = 0
        for row in range(len(table[choices])):
            texts = _choices(table[choices][row])
            place = _right(table[answer][row], texts)
            prompt, name = table[columns["prompt"]][row], table[unit][row] if unit else None
            if not isinstance(prompt, str) or len(texts) < 2 or place is None:
                wrong += 1
                continue
            own = f"{site}:{name}" if name not in (None, "") else f"{number}:{row}"
            found.append(Question(prompt, tuple(texts), place, own))
        if wrong:
            raise DataError(
                f"{path.name}: expected two or more choices in the column {choices} and one of them in the column "
                f"{answer}, found others in {wrong} of {len(table[choices])} rows",
                "write choices as a list of texts, and the right one as its text, its number from 0 or its letter; "
                "--right names its column",
            )
    return found


def _choices(value: Any) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) and all(isinstance(text, str) and text for text in value) else []


def _right(value: Any, choices: Sequence[str]) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        if text in choices:
            return choices.index(text)
        if len(text) == 1 and text.isascii() and text.isalpha():
            value = ord(text.upper()) - ord("A")
        elif text.isascii() and text.isdigit():
            value = int(text)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices)
    return int(value) if fits else None


# --- records that were trained on ------------------------------------------------------------------------


def trained_on(run: Path, files: Sequence[tuple[str, Path]]) -> list[str]:
    """Return the names of files that a run directory lists as training files.

    A run of a deployment lists none, so an empty answer proves nothing.
    """
    trained: set[Path] = set()
    for listed in (run / "study.toml", *sorted((run / "sites").glob("*.toml"))):
        try:
            document = tomllib.loads(listed.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        simulation = document.get("simulation", {})
        tables = [document, *(simulation.get("sites", {}) if isinstance(simulation, dict) else {}).values()]
        for table in tables:
            for name in table.get("train", ()) if isinstance(table, dict) else ():
                trained.add((listed.parent / str(name)).resolve())
    return [path.name for _, path in files if path.resolve() in trained]


def rows_trained_on(run: Path, study: Study, records: Records) -> int:
    """Return how many records are equal to a training record of the simulated sites of a run directory.

    A simulation that holds out a part of its files trains on copies, so names of files do not tell.
    """
    parts: list[Records] = []
    for file in sorted((run / "sites").glob("*.toml")):
        with suppress(PrivetError):  # what cannot be read is not known
            table = read_toml(file, what="site")
            own = {name: table[name] for name in Formatted.model_fields if name in table}
            site = validate(Formatted, own, what="site file").within(file.parent)
            parts.append(readable_records(study, site.train, site.form_of))
    return shared_rows(records, concatenate(parts)) if parts else 0


def readable_records(study: Study, files: Sequence[Path], form_of: Callable[[Path], FileFormat]) -> Records:
    """Return the training records of some files. A file that cannot be read has none."""
    parts = [Records((), ())]
    for path in files:
        with suppress(PrivetError):
            parts.append(load_records(path, study, form=form_of(path))[0])
    return concatenate(parts)


def shared_rows(some: Records, others: Records) -> int:
    """Return how many of some records are equal to one of others, units apart."""
    known = {digest(canonical_json(row)) for row in others.rows}
    return sum(digest(canonical_json(row)) in known for row in some.rows)
