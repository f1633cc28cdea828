"""Load a site's data file as records: read it, check it against the study's data contract, clean it, count it.

Contents of records leave this module only in `Records`. Errors and `DataReport` hold file names, column names and
counts. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.client.budget.withdrawals import Withdrawn, withdrawn_of
from privet.client.formats import FileFormat
from privet.client.site import IdRule, SiteConfig
from privet.client.training.files import PLAIN, Columns, Table, check_exact, kept_columns
from privet.client.training.forms import (
    Places,
    cleaned,
    instruction_prompt,
    kinds_of,
    read_list,
    span_fault,
    tagged,
    turns_fault,
)
from privet.client.training.ids import check_spellings, unit_names
from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError, RefusedError, together
from privet.common.study.study import Study

MISSING = "missing value"
EMPTY = "empty text"
DUPLICATE = "exact duplicate"
NO_UNIT = "no unit"
NO_USER = "no user's turn before the answer"
NO_ANSWER = "no assistant's turn"
SAME = "equal chosen and rejected answers"


@dataclass(frozen=True)
class Records:
    """Rows that fit the contract, in file order, each with the unit of privacy it belongs to.

    Attributes:
        rows: `{"text": str, "label": int}`; `{"tokens": list[str], "tags": list[int]}`, from texts with spans also
            the `text` and the words' `places` in it; `{"prompt": str, "answer": str}`, also from instructions; or
            `{"messages": [{"role": str, "content": str}, ...]}`; of preference, `chosen` and `rejected` beside `prompt`
            or beside `messages` that end with the user's turn. Labels and tags are indices into `study.task.labels`.
            `privet.client.training.forms` reads all forms of language models alike.
        units: Name of the unit of each row, as long as `rows`: from the value of the study's `data.unit` column, or
            a digest of the row where the study names none.
        incomplete: Name of the unit of each row that is no record because a value is missing, empty or of no use.
            Where units are patients, rows without one are not among them.
    """

    rows: tuple[dict[str, Any], ...]
    units: tuple[str, ...]
    incomplete: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.units):
            raise DataError(
                f"records: expected one unit of privacy for each row, found {len(self.rows)} rows and "
                f"{len(self.units)} units",
                "report this as a bug",
            )

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
    """A report on a file, in counts. Exact counts are private to the site: they stay on its screen.

    Attributes:
        file: Name of the file, without its folder.
        format: csv, tsv, jsonl, json or parquet; with .gz if the file is compressed.
        rows_read: Rows of the file.
        kept: Rows that are records after cleaning.
        units: Distinct units among the records.
        dropped: Dropped rows by reason. Reasons that did not occur are absent.
        labels: Records per label of the study, or tokens per tag; zero for labels that the file does not have.
            Empty for language models.
        places: By reason, the first rows that were dropped, in words.
        path: The file with its folder.
    """

    file: str
    format: str
    rows_read: int
    kept: int
    units: int
    dropped: dict[str, int]
    labels: dict[str, int]
    places: dict[str, str] = field(default_factory=dict, compare=False)
    path: str = field(default="", compare=False)

    def lines(self) -> list[str]:
        """Return the report as text, one fact a line."""
        lines = [
            self.headline(self.path or self.file),
            *(
                f"  dropped, {reason}: {count}" + (f": {self.places[reason]}" if reason in self.places else "")
                for reason, count in self.dropped.items()
            ),
        ]
        width = max(map(len, self.labels), default=0)
        return lines + [f"  {label:<{width}}  {count}" for label, count in self.labels.items()]

    def headline(self, name: str) -> str:
        """Return the rows and units of the file in one line, under a name."""
        return f"{name} ({self.format}): {self.kept} of {self.rows_read} rows kept, units: {self.units}"


def load_records(
    path: Path,
    study: Study,
    *,
    training: bool = True,
    rule: IdRule | None = None,
    form: FileFormat = PLAIN,
    withdrawn: Withdrawn | None = None,
) -> tuple[Records, DataReport]:
    """Read the file at `path` and return the records that fit `study`, with a report in counts.

    Text is normalised as `study.data.unicode` says. White space is collapsed in texts to classify; prompts, answers and
    messages keep their inner lines, and texts with spans all of it. Rows with a missing value or without text are
    dropped, and so are conversations without a user's turn and an answer to it, and pairs of equal answers. For
    `training`, two more kinds of rows are dropped. If the study names a unit column, rows without a unit: it is unknown
    whose privacy they would spend. And rows that repeat, after cleaning, an earlier row of the same unit, or any
    earlier row if the study names no unit column.

    Values of the unit column become names of units by `rule`, which is how the site writes ids
    (`privet.client.training.ids`). Without a rule, spellings that differ in Unicode form or outer white space are one
    unit, and `check_spellings` must see the names of all files.

    Args:
        path: The file.
        study: The study, whose columns and labels are needed.
        training: Whether the records are to train on.
        rule: How ids of patients are written.
        form: How the file is written.
        withdrawn: Whose rows are left out, as if the file did not have them.

    Raises:
        DataError: The file is missing, of an unknown kind or does not match its format; a column is missing or has
            the wrong type; tokens and tags differ in length; a label is not the study's; spans overlap or leave their
            text; a conversation is not one; or no row is left. The message names the file and the rows.
    """
    columns = dict(study.data.columns)
    unit_column = study.data.unit
    needed = list(dict.fromkeys([*columns.values(), *([unit_column] if unit_column else [])]))
    table = kept_columns(path, study, needed, form, withdrawn)
    rows_read = len(table.columns[needed[0]])
    raw = {role: table.columns[column] for role, column in columns.items()}
    for role in _LISTS.intersection(raw):
        raw[role] = [read_list(value) for value in raw[role]]
    _respell(raw, form)
    here = _Here(path, study, table)
    faults = here.faults(raw)
    units: list[str] | None = None
    if unit_column is not None:
        ids = [form.number(value) for value in table.columns[unit_column]]
        try:
            units = unit_names(ids, rule, unit_column, str(path), table.places)
            if any(isinstance(value, float) for value in ids):
                check_exact(path, unit_column, form)
        except DataError as error:
            faults.append(error)
    if faults:
        raise together(faults)

    records, dropped = _clean(raw, units, rows_read, study, training)
    counts = {reason: len(rows) for reason, rows in dropped.items()}
    if not records.rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(
            f"{path}: expected at least 1 record, found none: {rows_read} rows read"
            + (f", dropped: {reasons}" if reasons else ""),
            "correct the dropped rows in the file; a site without records cannot take part",
        )
    return records, DataReport(
        file=path.name,
        format=table.kind,
        rows_read=rows_read,
        kept=len(records),
        units=len(set(records.units)),
        dropped=counts,
        labels=count_labels(records, study),
        places={reason: table.places(rows) for reason, rows in dropped.items()},
        path=str(path),
    )


def load_files(
    site: SiteConfig,
    study: Study,
    *,
    training: bool = True,
    withdrawn: Callable[[SiteConfig], Withdrawn | None] | None = None,
) -> tuple[list[Records], list[DataReport]]:
    """Return the records of each of a site's training files, or test files, with a report on each.

    Whoever was withdrawn at the site is left out, whatever column the study names as its unit.

    Raises:
        DataError: A file does not fit the study. One error names what is wrong with all of them.
        StateError, VerificationError: Who was withdrawn cannot be read or trusted.
    """
    rule, gone = site.rule_for(study.data.unit), (withdrawn or withdrawn_of)(site)
    found: list[tuple[Records, DataReport]] = []
    faults: list[DataError] = []
    for path in site.train if training else site.test:
        try:
            form = site.form_of(path)
            found.append(load_records(path, study, training=training, rule=rule, form=form, withdrawn=gone))
        except DataError as error:
            faults.append(error)
    if faults:
        raise together(faults)
    return [records for records, _ in found], [report for _, report in found]


def counted_files(site: SiteConfig, study: Study) -> SiteConfig:
    """Return a site's file with the files that a study reads as its training files.

    Raises:
        RefusedError: The study measures on test files, and the site file names none.
    """
    if study.evaluation is None or study.evaluation.files == "train":
        return site
    if not site.test:
        raise RefusedError(
            f"site {site.name}: the study measures on test files (evaluation.files), but the site file names none",
            "add `test = [FILE]` to the site file, or leave this study out",
        )
    return site.model_copy(update={"train": site.test})


def site_records(
    site: SiteConfig,
    study: Study,
    *,
    distinct: bool = False,
    withdrawn: Callable[[SiteConfig], Withdrawn | None] | None = None,
) -> tuple[Records, list[DataReport]]:
    """Return all training records of a site, checked as it checks them before it consents to a study.

    Args:
        site: The site.
        study: The study. The files must fit its data contract.
        distinct: Whether equal names of units in two files are two units.
        withdrawn: Returns who is left out. None: who is, by the site's own marks.

    Returns:
        The records, and a report on each file.

    Raises:
        DataError: The files do not fit the study; or two spellings may be one patient, and the site file does not say
            which rule holds.
    """
    parts, reports = load_files(site, study, withdrawn=withdrawn)
    records = concatenate(parts, distinct=distinct)
    if site.rule_for(study.data.unit) is None and study.data.unit is not None and study.privacy.unit == "patient":
        for part in parts if distinct else [records]:
            # Only a study that counts incomplete rows has to know whose they are.
            names = (*part.units, *part.incomplete) if study.kind == "statistics" else part.units
            check_spellings(names, study.data.unit)
    return records, reports


def split_records(records: Records, fraction: float, key: bytes) -> tuple[Records, Records]:
    """Split `records` by unit into (train, validation).

    A unit is held out for validation when HMAC-SHA256(key, unit), read as a number in [0, 1), is below `fraction`. So
    only the key and the unit's own name decide. Adding or removing one unit never moves another: two data sets that
    differ in one unit give parts that differ in that unit, in one part only. Therefore the two parts can have separate
    privacy guarantees: what is learnt from one part says nothing about the units of the other. A random shuffle would
    not have this property, as one more unit would move many.

    Raises:
        DataError: `fraction` is outside [0, 1], or the key is empty.
    """
    if not 0 <= fraction <= 1:
        raise DataError(
            f"data.validation_fraction: expected a number from 0 to 1, found {fraction}",
            "correct data.validation_fraction in the study",
        )
    if not key:
        raise DataError(
            "the split into training and validation records: expected a key, found an empty one", "report this as a bug"
        )
    train: list[int] = []
    validation: list[int] = []
    for unit, indices in records.by_unit().items():
        (validation if _share(key, unit) < fraction * 2**64 else train).extend(indices)
    return records.select(sorted(train)), records.select(sorted(validation))


def concatenate(parts: Sequence[Records], *, distinct: bool = False) -> Records:
    """Return all rows of a site's files, in order.

    A unit keeps its name, so that a patient with rows in two files is still one unit. As two units, the patient would
    have twice the influence, and could be in training and in validation. With `distinct`, the files belong to different
    sites, and unit `u` of file `i` becomes `i:u`.
    """
    return Records(
        tuple(row for part in parts for row in part.rows),
        tuple(f"{i}:{unit}" if distinct else unit for i, part in enumerate(parts) for unit in part.units),
        tuple(f"{i}:{unit}" if distinct else unit for i, part in enumerate(parts) for unit in part.incomplete),
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


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


# Types that the column of a role may hold.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("strings", _is_text),
    "prompt": ("strings", _is_text),
    "answer": ("strings", _is_text),
    "instruction": ("strings", _is_text),
    "input": ("strings", _is_text),
    "output": ("strings", _is_text),
    "chosen": ("strings", _is_text),
    "rejected": ("strings", _is_text),
    "label": ("strings or integers", _is_name),
    "tokens": ("lists of strings", _is_texts),
    "tags": ("lists of strings or of integers", _is_names),
    "spans": ("lists of {start, end, label}", _is_list),
    "messages": ("lists of {role, content}", _is_list),
}
# Roles whose lists may be given as JSON in a string.
_LISTS = {"spans", "messages"}
# Roles whose value may be missing.
_OPTIONAL = {"input"}


def _respell(raw: Columns, form: FileFormat) -> None:
    """Give labels, tags and labels of spans the study's spelling, where the format says what they are."""
    if "label" in raw:  # CSV stores null as the empty string
        raw["label"] = [None if (label := form.label(value)) == "" else label for value in raw["label"]]
    if "tags" in raw:
        raw["tags"] = [[form.label(tag) for tag in tags] if isinstance(tags, list) else tags for tags in raw["tags"]]
    if "spans" in raw and form.labels:
        raw["spans"] = [
            [_respelt(span, form) for span in spans] if isinstance(spans, list) else spans for spans in raw["spans"]
        ]


def _respelt(span: Any, form: FileFormat) -> Any:
    return {**span, "label": form.label(span["label"])} if isinstance(span, Mapping) and "label" in span else span


@dataclass(frozen=True)
class _Here:
    """Where values are, for errors: their file, study and rows."""

    path: Path
    study: Study
    table: Table

    def faults(self, raw: Columns) -> list[DataError]:
        """Return what is wrong with the values of a file; values of a wrong type are not looked into."""
        found = [fault for role, values in raw.items() for fault in self._types(values, role)]
        return found or [*self._labels(raw), *self._forms(raw)]

    def _fault(self, text: str, rows: Sequence[int], hint: str) -> DataError:
        total = len(next(iter(self.table.columns.values())))
        return DataError(f"{self.path}: {text} in {len(rows)} of {total} rows: {self.table.places(rows)}", hint)

    def _types(self, values: Sequence[Any], role: str) -> list[DataError]:
        expected, fits = _TYPES[role]
        wrong = [row for row, value in enumerate(values) if value is not None and not fits(value)]
        if not wrong:
            return []
        text = f"expected {expected} in the column {self.study.data.columns[role]}, found other types"
        return [self._fault(text, wrong, "convert the column in the file, or correct data.columns in the study")]

    def _labels(self, raw: Columns) -> list[DataError]:
        """Return the rows whose labels are not the study's, or whose tokens have no tag each. Missing values pass."""
        columns, labels = self.study.data.columns, self.study.task.labels
        known = Places(labels)
        found: list[DataError] = []
        if "tags" in raw:
            pairs = {
                row: pair for row, pair in enumerate(zip(raw["tokens"], raw["tags"], strict=True)) if None not in pair
            }
            if uneven := [row for row, (tokens, tags) in pairs.items() if len(tokens) != len(tags)]:
                text = f"expected one tag for each token, but the columns {columns['tokens']} and {columns['tags']} "
                hint = "correct these rows in the file: their two lists must have the same length"
                found.append(self._fault(text + "differ in length", uneven, hint))
            role, wrong = "tags", [row for row, (_, tags) in pairs.items() if any(tag not in known for tag in tags)]
        elif "label" in raw:
            role = "label"
            wrong = [row for row, label in enumerate(raw["label"]) if label is not None and label not in known]
        else:
            return []
        if wrong:
            text = f"expected the labels {', '.join(labels)} (task.labels) in the column {columns[role]}, found others"
            hint = (
                "correct the labels in the file: names must match exactly, including upper and lower case and spaces; "
                'integers are places in task.labels, from 0. Or map them in the site file: format.labels = { "J" = '
                '"yes" }; `privet data STUDY FILE` proposes it'
            )
            found.append(self._fault(text, wrong, hint))
        return found

    def _forms(self, raw: Columns) -> list[DataError]:
        """Return the rows whose conversations, or spans of texts, have a fault. Missing values pass."""
        if "spans" in raw:
            role, kinds = "spans", kinds_of(self.study.task.labels)
            pairs = zip(raw["text"], raw["spans"], strict=True)
            faults = ["" if None in pair else span_fault(*pair, kinds) for pair in pairs]
            hint = "correct these rows in the file: a span is {start, end, label}, in characters from 0, end excluded"
        elif "messages" in raw:
            role, faults = "messages", ["" if turns is None else turns_fault(turns) for turns in raw["messages"]]
            hint = "correct these rows in the file: a message is {role, content}; the system message, if any, is first"
        else:
            return []
        rows: dict[str, list[int]] = {}
        for row, fault in enumerate(faults):
            if fault:
                rows.setdefault(fault, []).append(row)
        column = self.study.data.columns[role]
        return [self._fault(f"the column {column} holds {fault},", which, hint) for fault, which in rows.items()]


# --- cleaning --------------------------------------------------------------------------------------------


def _clean(
    raw: Columns, units: Sequence[str] | None, count: int, study: Study, training: bool
) -> tuple[Records, dict[str, list[int]]]:
    """Return the rows left after cleaning, and the dropped rows by reason."""
    rows: list[dict[str, Any]] = []
    kept_units: list[str] = []
    dropped: dict[str, list[int]] = {}
    seen: set[str] = set()
    incomplete: list[str] = []
    places = Places(study.task.labels)
    for index in range(count):
        values = {role: column[index] for role, column in raw.items()}
        row: dict[str, Any] = {}
        if any(value is None and role not in _OPTIONAL for role, value in values.items()):
            reason = MISSING
        else:
            row = _clean_row(values, places, study)
            reason = _unusable(row)
        if reason:
            dropped.setdefault(reason, []).append(index)
            if not (units and not units[index] and study.privacy.unit == "patient"):
                incomplete.append(units[index] if units else f"row {index}")
            continue
        if training and units and not units[index]:
            dropped.setdefault(NO_UNIT, []).append(index)
            continue
        # Two patients may have the same text. Without a unit column, a row is its own unit, so equal rows are one unit.
        own = digest(canonical_json({"unit": units[index] if units else None, "row": row}))
        if training and own in seen:
            dropped.setdefault(DUPLICATE, []).append(index)
            continue
        seen.add(own)
        rows.append(row)
        kept_units.append(units[index] if units else own)
    reasons = {
        reason: dropped[reason]
        for reason in (MISSING, EMPTY, NO_USER, NO_ANSWER, SAME, NO_UNIT, DUPLICATE)
        if reason in dropped
    }
    return Records(tuple(rows), tuple(kept_units), tuple(incomplete)), reasons


def _clean_row(values: dict[str, Any], places: Places, study: Study) -> dict[str, Any]:
    """Return a row in its normal form."""

    def lines(text: str) -> str:
        return _normalise(text, study).replace("\r\n", "\n").strip()

    if "label" in values:
        return {"text": " ".join(_normalise(values["text"], study).split()), "label": places[values["label"]]}
    if "tags" in values:  # an empty token stays, because its tag needs a token
        tokens = [_normalise(token, study).strip() for token in values["tokens"]]
        return {"tokens": tokens, "tags": [places[tag] for tag in values["tags"]]}
    if "spans" in values:
        return tagged(values["text"], values["spans"], study.task.labels, lambda text: _normalise(text, study))
    if "chosen" in values:
        answers = {role: lines(values[role]) for role in ("chosen", "rejected")}
        if "messages" in values:
            return {"messages": cleaned(values["messages"], lines, "user"), **answers}
        return {"prompt": lines(values["prompt"]), **answers}
    if "messages" in values:
        return {"messages": cleaned(values["messages"], lines)}
    if "instruction" in values:
        instruction = lines(values["instruction"])
        prompt = instruction and instruction_prompt(instruction, lines(values.get("input") or ""))
        return {"prompt": prompt, "answer": lines(values["output"])}
    return {role: lines(text) for role, text in values.items()}


def _normalise(text: str, study: Study) -> str:
    """Return `text` in the study's Unicode form; half a surrogate pair, which JSON can spell, becomes `?`."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if study.data.unicode == "none" else unicodedata.normalize(study.data.unicode, text)


def _unusable(row: dict[str, Any]) -> str:
    """Return why a row is no record; empty if it is one."""
    if "tokens" in row:
        return "" if any(row["tokens"]) else EMPTY
    if not all(row[role] for role in ("text", "prompt", "answer", "chosen", "rejected") if role in row):
        return EMPTY
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return SAME
    return _unusable_turns(row) if "messages" in row else ""


def _unusable_turns(row: dict[str, Any]) -> str:
    roles = [turn["role"] for turn in row["messages"]]
    if not roles and "chosen" not in row:
        return NO_ANSWER
    if not all(turn["content"] for turn in row["messages"]):
        return EMPTY
    return "" if "user" in roles else NO_USER


def count_labels(records: Records, study: Study) -> dict[str, int]:
    """Return the records of each label of the study, or the tokens of each tag; zero where there are none."""
    counts: Counter[int] = Counter()
    for row in records.rows:
        counts.update(row["tags"] if "tags" in row else [row["label"]] if "label" in row else [])
    return {label: counts[index] for index, label in enumerate(study.task.labels)}
