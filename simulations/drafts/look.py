"""What data files hold: which task they suit, which column has which role, and whom a row belongs to.

Columns are proposed by their names, and by the types and the variety of their values. A proposal is a guess that a
person confirms: `privet new` prints or asks for each.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from shlex import quote
from typing import Any

from privet.client.training.forms import read_list
from privet.client.training.headings import believed, listed
from privet.common.errors import StudyError
from privet.common.files import close_to
from privet.common.study.sections import FORMS, Form

Table = Mapping[str, Sequence[Any]]
"""Columns of all files by name, each with the values of all rows."""

MOST_LABELS = 100
"""Above this number of distinct values, a column is not taken for one of labels."""
LONGEST_NAME = 60
"""Characters. A longer name over a column of texts is taken for a text."""
_LOOKED_AT = 2000
_LEAST_PATTERN = 4
_FEW = 10  # values: so many distinct ones of a small file may be labels
_NAMED = 5
_LEAST_SIMILAR = 6
_SIMILAR = 0.9
_LEAST_IDS = 10  # distinct values
_MOST_ROWS = 20  # of one id, on average
_LONGEST_ID = 40  # characters
_DATE = re.compile(r"\d{4}-\d\d|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{1,2}:\d\d")
_NUMBER = re.compile(r"[-+]?[\d.,]+([eE][-+]?\d+)?")
_PATIENT, _CASE, _ID = (
    frozenset(words.split())
    for words in (
        "patient patients patientid patientnumber patid pat pid mrn subject subjectid person personid participant "
        "individual caseid patientin patienten patientennr patientennummer patientenid patnr proband probanden "
        "probandin patiente sujet ipp nip paciente pacientes sujeto nhc",
        "case fall fallnr fallnummer fallid aufnahme encounter admission stay visit episode hadm cas dossier sejour "
        "caso historia ingreso episodio pseudonym",
        "id ids nr no n num number nummer numero key kennung identifier code hash uid uuid",
    )
)
"""Words in names of columns, in English, German, French and Spanish: of patients, of what a patient may have several
of (its column protects less), and of identifiers."""
_PLACE = frozenset(("site", "hospital", "center", "centre", "clinic", "institution", "practice", "ward", "department"))
_NAMES: dict[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "text": "text note notes sentence document report letter content body comment review abstract description "
        "narrative message",
        "label": "label labels class category target specialty speciality diagnosis topic intent sentiment outcome",
        "prompt": "prompt question query",
        "answer": "answer response reply completion",
        "chosen": "chosen preferred better accepted",
        "rejected": "rejected dispreferred worse",
        "messages": "messages conversation conversations chat dialog dialogue",
        "tokens": "tokens words",
        "tags": "tags labels ner",
        "spans": "spans entities annotations",
        "instruction": "instruction",
        "input": "input",
        "output": "output",
    }.items()
}
"""Words in the names of columns that tell a role, the likeliest first."""
_SHAPES: dict[str, str] = {"messages": "turns", "spans": "spans", "tokens": "words", "tags": "words"}
_ORDER = ("preference", "token-classification", "causal-lm", "text-classification")
"""Kinds from the most particular columns to the least."""


@dataclass(frozen=True)
class Reading:
    """A way to read the files.

    Attributes:
        kind: The task.
        columns: The column of each role.
        others: Further columns that a role may be played by, best first.
    """

    kind: str
    columns: Mapping[str, str]
    others: Mapping[str, tuple[str, ...]]


def headless(table: Table) -> bool:
    """Return whether the names of columns look like values: the file has no line with names.

    Otherwise a row of the file would be taken for names, which are shown and enter the study.
    """
    return any(_is_value(name, values) for name, values in table.items())


def _is_value(name: str, values: Sequence[Any]) -> bool:
    """Return whether a name looks like the values below it: a label among labels, a text, or a date or id as theirs."""
    column, shape = _Column.of(name, values), _pattern(name)
    if column.labels and not name.isdigit() and name in values:
        return True
    if column.prose and (len(name) > LONGEST_NAME or "\n" in name):
        return True
    mixed = any(c.isdigit() for c in name) and not name.isdigit() and len(shape) >= _LEAST_PATTERN
    return mixed and 2 * sum(_pattern(str(value)) == shape for value in values) > len(values)


def _pattern(text: str) -> str:
    return "".join("9" if c.isdigit() else "a" if c.isalpha() else c for c in text)


def in_common(tables: Mapping[Path, Table]) -> Table:
    """Return the columns that all files have, with the values of all rows.

    Raises:
        StudyError: There is none.
    """
    first, *rest = tables.values()
    common = [name for name in first if all(name in table for table in rest)]
    if not common:
        raise StudyError(
            "the data files: expected the same columns in all of them, found none that all have"
            + "".join(f"\n  {line}" for line in differences(tables)),
            same_names(found)
            if (found := renames(tables))
            else "rename columns so that all sites' files have the same names",
        )
    return {name: [value for table in tables.values() for value in table[name]] for name in common}


def in_most(tables: Mapping[Path, Table]) -> Table:
    """Return the columns that at least half of the files have, with the values of all rows that have them."""
    counts = Counter(name for table in tables.values() for name in table)
    usual = [name for name, count in counts.items() if 2 * count >= len(tables)]
    return {name: [value for table in tables.values() for value in table.get(name, ())] for name in usual}


def lacking(column: str, tables: Mapping[Path, Table]) -> dict[Path, str]:
    """Return the files that lack a column, each with the column of its own that may be this one, or nothing."""
    found, usual = {}, in_most(tables)
    values = {str(value) for value in usual.get(column, ()) if value is not None}
    for file, table in tables.items():
        if column in table:
            continue
        own = [name for name in table if name not in usual or not all(name in other for other in tables.values())]
        near = close_to(column, own)
        shared = {name: len(values & {str(value) for value in table[name] if value is not None}) for name in own}
        if not near and shared and max(shared.values()):
            near = max(shared, key=lambda name: shared[name])
        found[file] = near if believed([*table], usual) else ""
    return found


def differences(tables: Mapping[Path, Table]) -> list[str]:
    """Return what the columns of single files have unlike those of most files, in words."""
    usual, found = in_most(tables), []
    for file, table in tables.items():
        if missing := [name[:LONGEST_NAME] for name in usual if name not in table]:
            found.append(f"{file} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing[:_NAMED])}")
    for file, roles in _unlike(tables).items():
        apart = ", ".join(f"{role} in {own} (others: {other})" for role, (own, other) in roles.items())
        found.append(f"{file} seems to have {apart}")
    return found


def renames(tables: Mapping[Path, Table]) -> dict[str, str]:
    """Return the names of columns in single files for which most files have another name, which they lack."""
    return {
        own: other
        for file, roles in _unlike(tables).items()
        for own, other in roles.values()
        if other not in tables[file]
    }


def same_names(found: Mapping[str, str]) -> str:
    """Return what to do where columns of some files have other names, as `renames` returns them."""
    options = " ".join(f"--rename {quote(f'{own}={other}')}" for own, other in found.items())
    return f"if they are the same columns under other names, say so: `privet new FILES {options}`"


def _unlike(tables: Mapping[Path, Table]) -> dict[Path, dict[str, tuple[str, str]]]:
    """Return the files that have a role in another column than most: by role, their own column and that of others."""
    usual, columns = in_most(tables), dict[Path, dict[str, str]]()
    for file, table in tables.items():
        if not believed([*table], usual):
            continue
        with suppress(StudyError):
            columns[file] = dict(readings(table)[0].columns)
    most = Counter(tuple(own.items()) for own in columns.values()).most_common(1)
    if not most or most[0][1] == 1:
        return {}
    roles = dict(most[0][0])
    return {
        file: {role: (name, roles[role]) for role, name in own.items() if name != roles[role]}
        for file, own in columns.items()
        if own != roles and own.keys() == roles.keys()
    }


def readings(table: Table, kind: str | None = None, given: Mapping[str, str] | None = None) -> list[Reading]:
    """Return the ways to read a table, the likeliest first.

    Args:
        table: The files' columns.
        kind: The task, where it is known.
        given: Columns of roles that are known.

    Raises:
        StudyError: A known column is not in the files, no task has such roles, or nothing fits the columns.
    """
    known = dict(given or {})
    for role, column in known.items():
        if column not in table:
            raise StudyError(
                f"--column: expected a column of the files, got {column!r} for {role}; found {listed([*table])}",
                "name a column that all files have, as in `privet new FILES --column text=note`",
            )
    kinds = [kind] if kind is not None else list(_ORDER)
    forms = [(each, form) for each in kinds for form in FORMS[each] if set(known) <= {*form.needed, *form.optional}]
    if not forms:
        roles = "; or ".join(str(form) for each in kinds for form in FORMS[each])
        raise StudyError(
            f"--column: expected roles that go together in {kind or 'one task'} ({roles}); got {', '.join(known)}",
            "correct the roles in --column ROLE=COLUMN",
        )
    looked = {name: _Column.of(name, values) for name, values in table.items()}
    found = [reading for each, form in forms if (reading := _reading(each, form, looked, known)) is not None]
    if found:
        return found
    for name, each in looked.items():
        named = each.shape in ("text", "number") and set(_NAMES["label"]) & set(each.words)
        if named and any("label" in form.needed for _, form in forms) and _candidates("text", looked):
            raise _unlabelled(name, each.distinct)
    roles = "; or ".join(f"{each}: {form}" for each, form in forms)
    raise StudyError(
        f"the data files: expected columns for a task ({roles}); found {listed([*table])}",
        "say which column is which, as in `privet new FILES --task text-classification --column text=note "
        "--column label=specialty`",
    )


def patient_column(table: Table, taken: Sequence[str]) -> str | None:
    """Return the column whose name says that it identifies patients; None if there is none.

    What tells of patients, as `patient_age`, does not identify them.
    """
    named = {name: set(_words(name)) for name in table if name not in taken and _PATIENT & set(_words(name))}
    looked = {name: _Column.of(name, table[name]) for name in named}
    ids = [name for name, words in named.items() if words <= _PATIENT | _ID]
    others = [name for name, column in looked.items() if not (column.labels or column.prose)]
    return next(iter([*ids, *others]), None)


@dataclass(frozen=True)
class Repeated:
    """A column that may identify patients: it repeats.

    Attributes:
        name: Of the column.
        distinct: Number of distinct values.
        rows: Number of rows that have a value.
    """

    name: str
    distinct: int
    rows: int

    def __str__(self) -> str:
        return f"the column {self.name} has {self.distinct} distinct values in {self.rows} rows"


def repeated_ids(tables: Collection[Table], taken: Sequence[str]) -> list[Repeated]:
    """Return the columns that may identify patients by their values or by a weaker name, the likeliest first.

    Their values look like ids, many are distinct, and some repeat in one file. A value that two files have may be
    two patients of two sites.

    Args:
        tables: The columns of each file.
        taken: Columns that have another role.
    """
    found: list[tuple[int, Repeated]] = []
    for name in dict.fromkeys(name for table in tables for name in table):
        looked = [_Column.of(name, table[name]) for table in tables if name in table]
        distinct, rows = sum(c.distinct for c in looked), sum(c.count for c in looked)
        if name in taken or not _LEAST_IDS <= distinct < rows <= _MOST_ROWS * distinct:
            continue
        values = [str(v) for table in tables for v in table.get(name, ()) if v is not None and v != ""][:_LOOKED_AT]
        words = set(_words(name))
        named = bool(_ID & words) or words <= _CASE
        if _are_ids(values, numbers=named):
            found.append((-2 * bool(_CASE & words) - named, Repeated(name, distinct, rows)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def _are_ids(values: Sequence[str], *, numbers: bool) -> bool:
    """Return whether most values look like ids: one word with digits that is no date; no number unless admitted."""

    def is_id(value: str) -> bool:
        plain = len(value) <= _LONGEST_ID and not any(c.isspace() for c in value) and any(c.isdigit() for c in value)
        return plain and not _DATE.match(value) and (numbers or not _NUMBER.fullmatch(value))

    return 10 * sum(map(is_id, values)) >= 9 * len(values)


def place_column(table: Table, taken: Sequence[str]) -> str | None:
    """Return the column whose name and values say which of several sites a row belongs to; None if there is none."""
    for name, values in table.items():
        if name not in taken and _PLACE & set(_words(name)):
            sizes = Counter(str(value) for value in values if value is not None)
            if 2 <= len(sizes) <= MOST_LABELS and min(sizes.values()) >= 4:
                return name
    return None


def labels_in(reading: Reading, table: Table) -> dict[str, int]:
    """Return the labels in the files with their counts: sorted, numbers by size. Empty for tasks without labels.

    For token-classification they are `O`, and `B-x` and `I-x` of each kind.

    Raises:
        StudyError: There are fewer than two, too many, or tags that are not IOB2.
    """
    if "label" in reading.columns:
        column = reading.columns["label"]
        counts = Counter(str(value) for value in table[column] if value is not None and value != "")
        if not 2 <= len(counts) <= MOST_LABELS:
            raise _unlabelled(column, len(counts))
        return {label: counts[label] for label in sorted(counts, key=_place)}
    if "spans" in reading.columns:
        listed = map(read_list, table[reading.columns["spans"]])
        counts = Counter(
            f"B-{span['label']}"
            for spans in listed
            if isinstance(spans, list)
            for span in spans
            if isinstance(span, Mapping) and isinstance(span.get("label"), str)
        )
        return _tags(counts, reading.columns["spans"])
    if "tags" in reading.columns:
        column = reading.columns["tags"]
        counts = Counter(str(tag) for tags in table[column] if isinstance(tags, list) for tag in tags)
        return _tags(counts, column)
    return {}


def _unlabelled(column: str, distinct: int) -> StudyError:
    return StudyError(
        f"the column {column}: expected labels, from 2 to {MOST_LABELS} distinct values; found {distinct}",
        "name the column of labels, as in `privet new FILES --column label=NAME`",
    )


def alike(labels: Sequence[str]) -> list[list[str]]:
    """Return groups of labels that differ only in case or in white space, which are often one label."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def misspelt(labels: Sequence[Collection[str]]) -> list[tuple[str, str]]:
    """Return pairs of a label that some files lack and a very similar one: the first may be a misspelling.

    Args:
        labels: The labels of each file.
    """
    known = sorted({label for each in labels for label in each})
    partial = [label for label in known if not all(label in each for each in labels)]
    pairs = {
        (label, other)
        for label in partial
        for other in known
        if label != other
        and min(len(label), len(other)) >= _LEAST_SIMILAR
        and [c for c in label if c.isdigit()] == [c for c in other if c.isdigit()]
        and SequenceMatcher(None, label, other).ratio() >= _SIMILAR
    }
    return sorted(pair for pair in pairs if pair[::-1] not in pairs or pair < pair[::-1])


def other_spellings(labels: Mapping[Path, Mapping[str, int]]) -> list[tuple[Path, list[str], list[str]]]:
    """Return the files that have no label in common with most others, each with its labels and with those of others.

    Such files may spell the same labels in another way.

    Args:
        labels: The labels of each file with their counts.
    """
    seen = {file: {label for label, count in counts.items() if count} for file, counts in labels.items()}
    groups: list[tuple[list[Path], set[str]]] = []
    for file, own in seen.items():
        joined = [group for group in groups if group[1] & own]
        groups = [group for group in groups if group not in joined]
        groups.append(([*(f for files, _ in joined for f in files), file], own.union(*(known for _, known in joined))))
    groups = [group for group in groups if group[1]]
    most = max(groups, key=lambda group: (len(group[0]), -list(seen).index(group[0][0])), default=([], set()))
    return [(file, sorted(seen[file]), sorted(most[1])) for files, _ in groups if files != most[0] for file in files]


def hold_texts(column: str, tables: Mapping[Path, Table]) -> list[Path]:
    """Return the files whose column of labels holds texts, which must not become names of labels."""
    looked = {file: _Column.of(column, table[column]) for file, table in tables.items()}
    return [file for file, found in looked.items() if found.prose and found.distinct > _FEW]


def _tags(counts: Mapping[str, int], column: str) -> dict[str, int]:
    wrong = [tag for tag in counts if tag != "O" and tag[:2] not in ("B-", "I-")]
    if wrong:
        raise StudyError(
            f"the column {column}: expected tags O, B-x and I-x (IOB2), found {len(wrong)} others",
            "write the tags of the files as O, B-x and I-x; for integers, write the names that they stand for",
        )
    kinds = sorted({tag[2:] for tag in counts if tag != "O"})
    if not kinds:
        raise StudyError(
            f"the column {column}: expected tags B-x and I-x, or spans with labels; found none",
            "name the column of tags or spans, as in `privet new FILES --column tags=NAME`",
        )
    return {tag: counts.get(tag, 0) for tag in ("O", *(f"{part}-{kind}" for kind in kinds for part in "BI"))}


@dataclass(frozen=True)
class _Column:
    """What a look at a column tells.

    Attributes:
        words: The words of its name, in lower case.
        shape: "text", "number", "words", "turns", "spans" or "other".
        length: Mean number of characters of a value.
        distinct: Number of distinct values; of lists, 0.
        count: Number of values.
    """

    words: tuple[str, ...]
    shape: str
    length: float
    distinct: int
    count: int

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> _Column:
        present = [value for value in values if value is not None and value != ""]
        sample = [read_list(v) if isinstance(v, str) and v[:1] == "[" else v for v in present[:_LOOKED_AT]]
        shape = _shape(sample)
        flat = shape in ("text", "number")
        length = sum(len(str(value)) for value in sample) / len(sample) if flat and sample else 0.0
        return cls(_words(name), shape, length, len(set(map(str, present))) if flat else 0, len(present))

    @property
    def labels(self) -> bool:
        """Whether the values may be labels: short, few, and each of them often."""
        return self.shape in ("text", "number") and 2 <= self.distinct <= min(MOST_LABELS, self.count // 4)

    @property
    def prose(self) -> bool:
        """Whether the values are texts of several words that mostly differ."""
        return self.shape == "text" and self.length >= 12 and self.distinct > self.count // 3


def _shape(sample: Sequence[Any]) -> str:
    if not sample:
        return "other"
    if all(isinstance(value, str) for value in sample):
        return "text"
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in sample):
        return "number"
    if not all(isinstance(value, list) for value in sample):
        return "other"
    parts = [part for value in sample for part in value]
    if parts and all(isinstance(part, str | int) for part in parts):
        return "words"
    for shape, keys in (("turns", {"role", "content"}), ("spans", {"start", "end", "label"})):
        if parts and all(isinstance(part, Mapping) and keys <= set(part) for part in parts):
            return shape
    return "other"


def _reading(kind: str, form: Form, table: Mapping[str, _Column], known: Mapping[str, str]) -> Reading | None:
    """Return how a table is read in a form; None if a role has no column."""
    columns: dict[str, str] = dict(known)
    others: dict[str, tuple[str, ...]] = {}
    for role in (*form.needed, *form.optional):
        if role in known:
            continue
        found = [name for name in _candidates(role, table) if name not in columns.values()]
        if found:
            columns[role], others[role] = found[0], tuple(found[1:])
        elif role in form.needed:
            return None
    return Reading(kind, {role: columns[role] for role in (*form.needed, *form.optional) if role in columns}, others)


def _candidates(role: str, table: Mapping[str, _Column]) -> list[str]:
    """Return the columns that may play a role, best first: by name, then by content."""
    shape = _SHAPES.get(role, "text")
    fits = {name: c for name, c in table.items() if c.shape == shape or (role == "label" and c.shape == "number")}
    if role == "label":
        fits = {name: column for name, column in fits.items() if 2 <= column.distinct <= MOST_LABELS}
    named = sorted(
        (name for name, column in fits.items() if set(_NAMES[role]) & set(column.words)),
        key=lambda name: (len(fits[name].words), _NAMES[role].index(_first(role, fits[name].words))),
    )
    if role == "text":
        further = sorted((name for name, c in fits.items() if c.prose), key=lambda name: -fits[name].length)
    elif role == "label":
        further = sorted(name for name, c in fits.items() if c.labels and not (_PATIENT | _CASE) & set(c.words))
    else:
        further = list(fits) if role in ("messages", "spans") else []
    return list(dict.fromkeys([*named, *further]))


def _first(role: str, words: Sequence[str]) -> str:
    return next(name for name in _NAMES[role] if name in words)


def _words(name: str) -> tuple[str, ...]:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()  # numéro, número
    return tuple(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain).lower()))


def _place(label: str) -> tuple[int, int, str]:
    """Return what sorts labels: numbers by size, before all others."""
    return (0, int(label), "") if label.isascii() and label.isdigit() else (1, 0, label)
