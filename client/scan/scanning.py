"""Scan data files for direct identifiers and faults of texts. What comes back holds counts, and never contents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from privet.client.budget.withdrawals import Withdrawn
from privet.client.formats import FileFormat
from privet.client.pages.suppression import SMALLEST
from privet.client.scan.kinds import ANY, KINDS
from privet.client.scan.patterns import kinds_in, may_be_name
from privet.client.scan.twins import Twins
from privet.client.training.decoding import kind_of
from privet.client.training.files import Row, left_out, read_rows
from privet.client.training.headings import believed, numbered
from privet.common.canonical import canonical_json
from privet.common.errors import DataError, StateError, StudyError
from privet.common.study.sections import Section
from privet.common.study.study import Study

Recogniser = Callable[[str], Iterable[str]]
"""Returns the kinds of identifiers in a text, of `privet.client.scan.kinds.KINDS`."""
RECOGNISERS = "privet.recognisers"
"""Group of entry points. Each one is a `Recogniser`."""

RARE = "(keys of few records)"
"""In place of the names of columns that few records of a JSON file have."""

_Count = Annotated[int, Field(ge=0)]
_SHORT = 48
_ROWS = 5
_DEEPEST = 6
_MOST_COLUMNS = 1000
_NO_TEXT = frozenset({"label", "tags", "spans"})


class ColumnCounts(Section):
    """One column of one file: records with a value, and of these, records with each kind of identifier."""

    records: _Count = 0
    kinds: dict[str, _Count] = Field(default={})


class FileCounts(Section):
    """One file."""

    path: str
    role: Literal["train", "test"]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    form: str = ""
    """SHA-256 of the settings that the file was read with, in hexadecimal; empty in scans of earlier versions."""
    records: _Count
    columns: dict[str, ColumnCounts]


class TextCounts(Section):
    """The texts of the training files together, in numbers of records."""

    records: _Count
    compared: _Count
    """Texts that were compared with each other, those of test files included."""
    complete: bool
    """Whether all texts were compared."""
    labelled: bool
    """Whether labels were compared, which needs a study."""
    tested: bool
    """Whether there were test files."""
    empty: _Count
    near_duplicate: _Count
    train_test: _Count
    label_noise: _Count
    sampled: _Count
    """Texts among which templated ones were counted."""
    templated: _Count


class Scan(Section):
    """The result of a scan, in exact counts. It stays at the site."""

    version: Literal[1] = 1
    time: str
    names: _Count
    """Names in the operator's lists."""
    recognisers: tuple[str, ...]
    files: tuple[FileCounts, ...]
    texts: TextCounts


@dataclass(frozen=True)
class Source:
    """What is scanned, and how.

    Attributes:
        train: Training files.
        test: Test files.
        form_of: Returns how a file is written.
        study: Only its columns are scanned; None: all columns.
        unit: Column that names the unit of privacy; it is not scanned.
        names: Names that the operator listed, in lower case.
        recognisers: Further recognisers by name.
        withdrawn: Whose rows are left out.
    """

    train: Sequence[Path]
    test: Sequence[Path] = ()
    form_of: Callable[[Path], FileFormat] = lambda path: FileFormat()
    study: Study | None = None
    unit: str | None = None
    names: Collection[str] = ()
    recognisers: Mapping[str, Recogniser] = field(default_factory=dict)
    withdrawn: Withdrawn | None = None

    @property
    def label(self) -> str | None:
        """The column of labels; None where no study names one."""
        return None if self.study is None else self.study.data.columns.get("label")


Places = dict[tuple[str, str, str], list[int]]
"""The first rows, from 1, by path, column and kind."""


def scan(source: Source, time: str, progress: Callable[[int], None] = lambda rows: None) -> tuple[Scan, Places]:
    """Return the counts of all files, and the first rows of each kind.

    Args:
        source: What is scanned.
        time: The time that the result states.
        progress: Called after each 1,000 rows, with their number so far.

    Raises:
        DataError: A file cannot be read, or lacks a column of the study.
        StateError: A file changed during the scan. StudyError: A recogniser failed or returned an unknown kind.
    """
    twins, totals, places = Twins(), Counter[str](), Places()
    files = []
    for role, paths in (("train", source.train), ("test", source.test)):
        for path in dict.fromkeys(paths):
            files.append(_file(source, path, role == "test", twins, totals, places, progress))
    alike = twins.counts()
    texts = TextCounts(
        records=totals["train"],
        compared=alike.compared,
        complete=alike.compared == totals["texts"],
        labelled=source.label is not None,
        tested=bool(source.test),
        empty=totals["empty"],
        near_duplicate=alike.near_duplicate,
        train_test=alike.train_test,
        label_noise=alike.label_noise,
        sampled=alike.sampled,
        templated=alike.templated,
    )
    found = Scan(
        time=time,
        names=len(source.names),
        recognisers=tuple(sorted(source.recognisers)),
        files=tuple(files),
        texts=texts,
    )
    return found, places


def _file(
    source: Source,
    path: Path,
    test: bool,
    twins: Twins,
    totals: Counter[str],
    places: Places,
    progress: Callable[[int], None],
) -> FileCounts:
    before, number, skipped, order = sha256_of(path), 0, 0, dict[str, None]()
    gone = _left_out(source, path)
    counts: dict[str, Counter[str]] = {}
    present = Counter[str]()
    for number, row in enumerate(read_rows(path, source.form_of(path)), start=1):
        if gone(row):
            skipped += 1
            continue
        texts = _texts(source, path, row)
        if source.study is None:
            _check_header(path, texts, counts)
            present.update(texts.keys())
            order.update(dict.fromkeys(row))
        for column, text in texts.items():
            counted = counts.setdefault(column, Counter())
            if not text.strip():
                continue
            counted[""] += 1
            for kind in _kinds(source, column, text):
                counted[kind] += 1
                rows = places.setdefault((str(path), column, kind), [])
                if len(rows) < _ROWS:
                    rows.append(number)
        whole = "\n".join(texts.values())
        totals["test" if test else "train"] += 1
        if any(map(str.isalnum, whole)):
            totals["texts"] += 1
            unit = f"{path}:{number}" if source.unit is None else str(row.get(source.unit))
            twins.add(whole, unit, None if source.label is None else str(row.get(source.label)), test=test)
        elif not test:
            totals["empty"] += 1
        if not number % 1000:
            progress(totals["train"] + totals["test"])
    if sha256_of(path) != before:
        raise StateError(f"{path} changed while it was scanned", "run the scan again when nothing writes to the file")
    _join_rare(
        path, [column for column, rows in present.items() if rows < min(SMALLEST, number - skipped)], counts, places
    )
    counts = _named(source, path, [*order], counts, places)
    columns = {
        column: ColumnCounts(records=found.pop("", 0), kinds=dict(sorted(found.items())))
        for column, found in counts.items()
    }
    return FileCounts(
        path=str(path),
        role="test" if test else "train",
        sha256=before,
        form=sha256_of_form(source.form_of(path)),
        records=number - skipped,
        columns=columns,
    )


def _left_out(source: Source, path: Path) -> Callable[[Row], bool]:
    """Return a function that says whether a row is left out.

    Raises:
        DataError: The row has no column of patients, and people were withdrawn by their ids.
    """
    withdrawn = source.withdrawn
    if not withdrawn or withdrawn.column is None:
        return lambda row: False
    column, held = withdrawn.column, left_out(path, withdrawn, source.form_of(path))

    def gone(row: Row) -> bool:
        if column not in row and not kind_of(path).name.startswith("json"):
            raise DataError(
                f"{path}: expected the column {column}, by which people were withdrawn at this site",
                "add the column to the file",
            )
        return held(row.get(column))

    return gone


def _join_rare(path: Path, rare: Sequence[str], counts: dict[str, Counter[str]], places: Places) -> None:
    """Put keys of JSON objects that few records have under one name: such a key may be a value, such as a name.

    A record with several of them counts once for each.
    """
    for column in rare:
        joined = counts.setdefault(RARE, Counter())
        found = counts.pop(column)
        joined.update(found)
        for kind in found:
            rows = places.pop((str(path), column, kind), [])
            there = places.get((str(path), RARE, kind), [])
            if rows:
                places[str(path), RARE, kind] = sorted({*there, *rows})[:_ROWS]


def _named(
    source: Source, path: Path, order: Sequence[str], counts: dict[str, Counter[str]], places: Places
) -> dict[str, Counter[str]]:
    """Return the counts by the names of their columns; by their numbers where the names may be a record."""
    given = [*source.form_of(path).columns.values(), *([] if source.unit is None else [source.unit])]
    if source.study is not None or believed(order, given):
        return counts
    numbers = {name: numbered(place) for place, name in enumerate(order)}
    for at, column, kind in [key for key in places if key[0] == str(path) and key[1] in numbers]:
        places[at, numbers[column], kind] = places.pop((at, column, kind))
    return {numbers.get(column, column): found for column, found in counts.items()}


def _check_header(path: Path, texts: Mapping[str, str], known: Mapping[str, Counter[str]]) -> None:
    """Refuse a file whose names of columns may be a record: they are printed.

    Raises:
        DataError: A name is long, holds an identifier or is also a value of its column; or there are too many names.
    """
    for column, text in texts.items():
        looks = column not in known and not may_be_name(column)
        if looks or text == column or len(known) > _MOST_COLUMNS:
            raise DataError(
                f"{path}: expected names of columns in the first line, or as the keys of JSON objects; found what may "
                "be contents of a record",
                "write the column names into the first line of the file, or name the study with --study STUDY",
            )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or type(error).__name__})",
            "check the path, the file's permissions, and its disk",
        ) from None


def sha256_of_form(form: FileFormat) -> str:
    """Return the SHA-256 of the settings of a file, in hexadecimal: with others, the same bytes are other texts."""
    settings = form.model_dump(mode="json", include=set(FileFormat.model_fields))
    return hashlib.sha256(canonical_json(settings)).hexdigest()


def text_columns(study: Study) -> frozenset[str]:
    """Return the columns whose texts a study trains on."""
    return frozenset(column for role, column in study.data.columns.items() if role not in _NO_TEXT)


def _texts(source: Source, path: Path, row: Row) -> dict[str, str]:
    """Return the scanned texts of a row by column."""
    if source.study is None:
        return {column: text_in(value) for column, value in row.items() if column != source.unit}
    wanted = text_columns(source.study)
    missing = sorted(wanted - row.keys())
    if missing and not kind_of(path).name.startswith("json"):  # in JSON, a row may lack what has no value
        raise DataError(
            f"{path}: expected the columns {', '.join(missing)}, which the study names",
            "correct data.columns in the study, or name another file",
        )
    return {column: text_in(row.get(column)) for column in sorted(wanted)}


def text_in(value: Any, depth: int = 0) -> str:
    """Return a value as text: a list of tokens as a sentence, the contents of a conversation by lines."""
    if isinstance(value, str):
        return value
    if value is None or depth > _DEEPEST:
        return ""
    if isinstance(value, Mapping):
        return "\n".join(text_in(each, depth + 1) for each in value.values())
    if isinstance(value, list | tuple):
        separator = " " if value and isinstance(value[0], str) else "\n"
        return separator.join(text_in(each, depth + 1) for each in value)
    return str(value)


def _kinds(source: Source, column: str, text: str) -> Iterator[str]:
    # The name of a column says what a bare value is: a column `phone` holds telephone numbers.
    named = f"{column.replace('_', ' ')}: {text}" if len(text) < _SHORT else text
    found = kinds_in(named, source.names)
    for name, recogniser in source.recognisers.items():
        found |= _recognised(name, recogniser, text)
    yield from found
    if found:
        yield ANY


def _recognised(name: str, recogniser: Recogniser, text: str) -> set[str]:
    fault = "failed"
    try:
        found = set(recogniser(text))
        if found <= KINDS.keys():
            return found
        fault = "returned an unknown kind of identifier"
    except Exception as error:  # its text may quote the record
        fault = f"failed ({type(error).__name__})"
    raise StudyError(f"the recogniser {name} {fault}", f"correct it; the kinds are {', '.join(KINDS)}")


def load_recognisers(names: Sequence[str]) -> dict[str, Recogniser]:
    """Return installed recognisers by name. Only those that are named are loaded.

    Raises:
        StudyError: None of that name is installed, or it cannot be loaded.
    """
    installed = {entry.name: entry for entry in entry_points(group=RECOGNISERS)}
    loaded: dict[str, Recogniser] = {}
    for name in names:
        if name not in installed:
            raise StudyError(
                f"no recogniser {name} is installed; installed: {', '.join(sorted(installed)) or 'none'}",
                f"install a package with an entry point of that name in the group {RECOGNISERS}",
            )
        try:
            loaded[name] = installed[name].load()
        except Exception as error:
            raise StudyError(
                f"the recogniser {name} cannot be loaded ({type(error).__name__})", "install what it needs"
            ) from None
    return loaded


def read_names(path: Path) -> frozenset[str]:
    """Return the words of a list of names, one name a line, in lower case.

    Raises:
        DataError: The file cannot be read as UTF-8 text.
    """
    try:
        words = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the list of names {path} cannot be read ({type(error).__name__})", "write one name a line, in UTF-8"
        ) from None
    return frozenset(word.lower() for word in words if len(word) > 1)
