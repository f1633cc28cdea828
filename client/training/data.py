"""A site's file becomes records: read, checked against the study's data contract, cleaned, counted.

Nothing that a record holds leaves this module except in `Records`. Errors and `DataReport` carry file names,
column names and counts. Nothing stays on disk either: what `datasets` writes while it converts a file goes to
a private temporary folder that is gone before `load_records` returns.

CSV and Parquet are read by Hugging Face `datasets`. JSON Lines is parsed by the standard library, because
`Dataset.from_json` guesses types with no way to stop it: a column of strings such as "2020-01-01" comes back
as timestamps, so that two different units could become one, and a wrong type in one row turns into text.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.client.training.files import Columns, reader_of
from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError
from privet.common.study.sections import ROLES
from privet.common.study.study import Study

MISSING = "missing value"
EMPTY = "empty text"
DUPLICATE = "exact duplicate"
NO_UNIT = "no unit"


@dataclass(frozen=True)
class Records:
    """Rows that fit the contract, in file order, each with the unit of privacy it belongs to.

    Attributes:
        rows: Role to value: `{"text": str, "label": int}`, `{"tokens": list[str], "tags": list[int]}` or
            `{"prompt": str, "answer": str}`. Labels and tags are indices into `study.task.labels`.
        units: Unit of each row, as long as `rows`: the value of the study's `data.unit` column, or
            a digest of the row where the study names none.
    """

    rows: tuple[dict[str, Any], ...]
    units: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.units):
            raise DataError(f"every row needs one unit: got {len(self.rows)} rows, {len(self.units)} units")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        """Return the rows at `indices`, in that order."""
        return Records(tuple(self.rows[i] for i in indices), tuple(self.units[i] for i in indices))

    def by_unit(self) -> dict[str, list[int]]:
        """Return the row indices of each unit, units in the order in which they first appear."""
        groups: dict[str, list[int]] = {}
        for index, unit in enumerate(self.units):
            groups.setdefault(unit, []).append(index)
        return groups


@dataclass(frozen=True)
class DataReport:
    """What became of a file, in counts. Exact counts are the site's own: they stay on its screen.

    Attributes:
        file: Name of the file, without its folder.
        format: csv, jsonl or parquet.
        rows_read: Rows in the file.
        kept: Rows that became records.
        units: Distinct units among the records.
        dropped: Rows left out, by reason; reasons that did not occur are absent.
        labels: Records per label of the study, or tokens per tag; zero where the file has none. Empty for
            causal-lm.
    """

    file: str
    format: str
    rows_read: int
    kept: int
    units: int
    dropped: dict[str, int]
    labels: dict[str, int]

    def lines(self) -> list[str]:
        """Return the report for a person to read, one fact a line."""
        lines = [
            f"{self.file} ({self.format}): {self.kept} of {self.rows_read} rows kept, units: {self.units}",
            *(f"  dropped, {reason}: {count}" for reason, count in self.dropped.items()),
        ]
        width = max(map(len, self.labels), default=0)
        return lines + [f"  {label:<{width}}  {count}" for label, count in self.labels.items()]


def load_records(path: Path, study: Study, *, training: bool = True) -> tuple[Records, DataReport]:
    """Read the file at `path` and return the records that fit `study`, with a report in counts.

    Text is normalised as `study.data.unicode` says. Text to classify has its white space collapsed, prompts
    and answers keep their inner lines. Rows with a missing value or no text are dropped. For `training`, so are
    rows without a unit where the study names a unit column, as nobody can say whose privacy they would spend,
    and rows that repeat an earlier one of the same unit after cleaning (of any row, where the study names no
    unit column).
    Spellings of a unit that differ in Unicode form or outer white space are one unit: splitting a patient in
    two would break the guarantee, joining two only costs accuracy.

    Raises:
        DataError: The file is missing, of an unknown format or unreadable; a column is missing or has the
            wrong type; tokens and tags differ in length; a label is not the study's; or no row is
            left.
    """
    file = path.name
    columns = dict(study.data.columns)
    unit_column = study.data.unit
    needed = list(dict.fromkeys([*columns.values(), *([unit_column] if unit_column else [])]))
    format_, table = read_columns(path, study, needed)
    rows_read = len(table[needed[0]])
    raw = {role: table[columns[role]] for role in ROLES[study.task.kind]}
    if "label" in raw:  # CSV writes null as the empty string
        raw["label"] = [None if label == "" else label for label in raw["label"]]
    for role, values in raw.items():
        _check_type(values, role, columns[role], file)
    _check_labels(raw, study, file)
    units = _units(table[unit_column], study, file) if unit_column else None

    records, dropped = _clean(raw, units, rows_read, study, training)
    if not records.rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"{file} leaves no record: {rows_read} rows read" + (f", dropped as {reasons}" if reasons else ""),
            "a site without records cannot take part",
        )
    return records, DataReport(
        file=file,
        format=format_,
        rows_read=rows_read,
        kept=len(records),
        units=len(set(records.units)),
        dropped=dropped,
        labels=_count_labels(records, study),
    )


def read_columns(path: Path, study: Study, names: Sequence[str]) -> tuple[str, dict[str, list[Any]]]:
    """Return the format of a data file, and the values of some of its columns as they stand there.

    Raises:
        DataError: The file is missing, of an unknown format or unreadable, or has no such column.
    """
    try:
        format_, read = reader_of(path, study)
        return format_, read(path, names)
    except OSError as error:
        raise DataError(
            f"cannot read {path.name}: {error.strerror or type(error).__name__}",
            "check the file's permissions, and the space in the temporary folder (TMPDIR)",
        ) from None


def split_records(records: Records, fraction: float, key: bytes) -> tuple[Records, Records]:
    """Split `records` by unit into (train, validation).

    A unit goes to validation when HMAC-SHA256(key, unit), read as a number in [0, 1), is below `fraction`:
    decided by the key and the unit's own name alone. Adding or removing one unit therefore never moves
    another, so two data sets that differ in one unit give parts that differ in that unit, in one part only.
    That is what lets the two parts have separate privacy guarantees: what is learnt from one says nothing
    about the units of the other. (A share drawn by shuffling would not do: one unit more moves many.)

    Raises:
        DataError: `fraction` is outside [0, 1], or the key is empty.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"the validation fraction must lie in [0, 1], got {fraction}")
    if not key:
        raise DataError("the split needs a key, got an empty one")
    train: list[int] = []
    validation: list[int] = []
    for unit, indices in records.by_unit().items():
        (validation if _share(key, unit) < fraction * 2**64 else train).extend(indices)
    return records.select(sorted(train)), records.select(sorted(validation))


def concatenate(parts: Sequence[Records], *, distinct: bool = False) -> Records:
    """Return all rows of a site's files, in order.

    A unit keeps its name, so that a patient whose rows stand in two files is still one unit: two would give
    that patient twice the influence, and a part of each in training and in validation. With `distinct`, the
    files are different sites' and unit `u` of file `i` becomes `i:u`.
    """
    return Records(
        tuple(row for part in parts for row in part.rows),
        tuple(f"{i}:{unit}" if distinct else unit for i, part in enumerate(parts) for unit in part.units),
    )


def _share(key: bytes, unit: str) -> int:
    """Return the first 64 bits of HMAC-SHA256(key, unit)."""
    return int.from_bytes(hmac.digest(key, unit.encode(), hashlib.sha256)[:8], "big")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# What the column of a role may hold.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("strings", _is_text),
    "prompt": ("strings", _is_text),
    "answer": ("strings", _is_text),
    "label": ("strings or integers", _is_name),
    "unit": ("strings or integers", _is_name),
    "tokens": ("lists of strings", _is_texts),
    "tags": ("lists of strings", _is_texts),
}


def _check_type(values: Sequence[Any], role: str, column: str, file: str) -> None:
    expected, fits = _TYPES[role]
    wrong = sum(value is not None and not fits(value) for value in values)
    if wrong:
        raise DataError(
            f"{file}: the column {column} must hold {expected}, but {wrong} of {len(values)} rows hold something else",
            "convert the column, or check data.columns in the study",
        )


def _check_labels(raw: Columns, study: Study, file: str) -> None:
    """Check that every label is the study's, and that every token has a tag. Missing values pass."""
    known = set(study.task.labels)
    if study.task.kind == "token-classification":
        pairs = [(t, g) for t, g in zip(raw["tokens"], raw["tags"], strict=True) if None not in (t, g)]
        uneven = sum(len(tokens) != len(tags) for tokens, tags in pairs)
        if uneven:
            raise DataError(
                f"{file}: each token needs one tag, but the columns {study.data.columns['tokens']} and "
                f"{study.data.columns['tags']} differ in length in {uneven} of {len(raw['tags'])} rows"
            )
        role, unknown = "tags", sum(not known.issuperset(tags) for _, tags in pairs)
    elif study.task.kind == "text-classification":
        labels = [str(label) for label in raw["label"] if label is not None]
        role, unknown = "label", sum(label not in known for label in labels)
    else:
        return
    if unknown:
        raise DataError(
            f"{file}: in the column {study.data.columns[role]}, {unknown} of {len(raw[role])} rows hold a "
            f"label that is not the study's; task.labels allows {', '.join(study.task.labels)}",
            "labels must match exactly, upper and lower case and spaces included",
        )


def _units(values: Sequence[Any], study: Study, file: str) -> list[str]:
    """Return the unit of every row, empty where it has none."""
    _check_type(values, "unit", str(study.data.unit), file)
    named = ["" if value is None else str(value).encode("utf-8", "replace").decode("utf-8") for value in values]
    return [unicodedata.normalize("NFKC", name).strip() for name in named]


# --- cleaning --------------------------------------------------------------------------------------------


def _clean(
    raw: Columns, units: Sequence[str] | None, count: int, study: Study, training: bool
) -> tuple[Records, dict[str, int]]:
    """Return the rows that are left after cleaning, and how many were dropped for which reason."""
    rows: list[dict[str, Any]] = []
    kept_units: list[str] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    index_of = {label: index for index, label in enumerate(study.task.labels)}
    for index in range(count):
        values = {role: column[index] for role, column in raw.items()}
        if None in values.values():
            dropped[MISSING] += 1
            continue
        row = {role: _clean_value(role, value, index_of, study) for role, value in values.items()}
        if _is_empty(row):
            dropped[EMPTY] += 1
            continue
        if training and units and not units[index]:
            dropped[NO_UNIT] += 1
            continue
        # Two patients may well have the same text: they are duplicates only where rows have no owner.
        own = digest(canonical_json({"unit": units[index] if units else None, "row": row}))
        if training and own in seen:
            dropped[DUPLICATE] += 1
            continue
        seen.add(own)
        rows.append(row)
        kept_units.append(units[index] if units else own)
    reasons = {reason: dropped[reason] for reason in (MISSING, EMPTY, NO_UNIT, DUPLICATE) if dropped[reason]}
    return Records(tuple(rows), tuple(kept_units)), reasons


def _clean_value(role: str, value: Any, index_of: dict[str, int], study: Study) -> Any:
    if role == "label":
        return index_of[str(value)]
    if role == "tags":
        return [index_of[tag] for tag in value]
    if role == "tokens":  # an empty token stays, or its tag would have no token
        return [_normalise(token, study).strip() for token in value]
    text = _normalise(value, study)
    return " ".join(text.split()) if role == "text" else text.replace("\r\n", "\n").strip()


def _normalise(text: str, study: Study) -> str:
    """Return `text` in the study's Unicode form; half a surrogate pair, which JSON can spell, becomes `?`."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if study.data.unicode == "none" else unicodedata.normalize(study.data.unicode, text)


def _is_empty(row: dict[str, Any]) -> bool:
    if "tokens" in row:
        return not any(row["tokens"])
    return not all(row[role] for role in ("text", "prompt", "answer") if role in row)


def _count_labels(records: Records, study: Study) -> dict[str, int]:
    counts: Counter[int] = Counter()
    for row in records.rows:
        counts.update(row["tags"] if "tags" in row else [row["label"]] if "label" in row else [])
    return {label: counts[index] for index, label in enumerate(study.task.labels)}
