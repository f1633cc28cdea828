"""A new study from data files: each choice is an option, an answer, or a proposal that is printed."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from privet.client.formats import FileFormat
from privet.client.site import IdRule
from privet.client.training.data import DataReport, Records, concatenate, load_records
from privet.client.training.decoding import kind_of
from privet.client.training.files import PLAIN, read_rows
from privet.client.training.headings import believed, listed
from privet.client.training.ids import check_spellings
from privet.client.training.proposals import letters_of, merged, proposed
from privet.common.errors import DataError, StudyError
from privet.common.study.sections import GENERATING
from privet.common.study.study import Study
from privet.server.rounds.quality import accuracy_within
from privet.server.rounds.statements import noise_of
from privet.simulations.drafts.bases import Base, choose_base
from privet.simulations.drafts.look import (
    LONGEST_NAME,
    Reading,
    Table,
    alike,
    differences,
    headless,
    hold_texts,
    in_common,
    in_most,
    labels_in,
    lacking,
    misspelt,
    other_spellings,
    patient_column,
    place_column,
    readings,
    renames,
    repeated_ids,
    same_names,
)
from privet.simulations.drafts.places import SAVE_SHEETS, SiteData, data_files, plain_name, sites_of, workbooks
from privet.simulations.drafts.values import (
    COMMENTS,
    FORMAT_COMMENT,
    delta_for,
    largest_count,
    length_for,
    training_values,
)
from privet.simulations.runs.toml import to_toml

TEST_FRACTION = 0.25
EPSILON = 8.0
VALIDATION = 0.1
NONE = "none"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DEALT = 4  # simulated sites of files that tell no sites
_MEASURED = 2000  # records
_LONGEST = 512  # tokens
_UNMEASURED = 256  # tokens
_SHOWN = 30  # labels
_UNSURE = 0.1  # half the width of an interval of accuracy, from which on a study is warned of
_FEW = 16  # units in a step
_CONSORTIUM = 3  # sites, whose sum hides each of them
_MAKING_UP = 5  # fewer sites cannot make up for the noise of one that is lost
_VALIDATING = 2000  # units of all sites, of which a tenth measures an accuracy to a few points under privacy
_BLOCK = 64  # rounds with one set-up of secure aggregation
_SPELLINGS = (
    "write each patient's id in one way in all files; or say how the ids are written: `privet new FILES --patient-ids "
    "number` if 101, 0101 and 101.0 are one patient, `text` if upper and lower case do not matter, `case` if they do"
)
_ORDER = tuple(name for name in (*Study.model_fields, "simulation") if name != "format")


class Asker(Protocol):
    """Whoever answers questions.

    Attributes:
        answers: Whether it is a person, who can decide what a proposal cannot.
    """

    answers: bool

    def choose(self, question: str, options: Sequence[str], default: str) -> str:
        """Return one of some options."""

    def enter(self, question: str, default: str) -> str:
        """Return a text."""


class Proposals:
    """Takes every proposal."""

    answers = False

    def choose(self, question: str, options: Sequence[str], default: str) -> str:
        """Return the proposal."""
        return default

    def enter(self, question: str, default: str) -> str:
        """Return the proposal."""
        return default


@dataclass(frozen=True)
class Wishes:
    """What is known before anything is asked. None: to be proposed.

    Attributes:
        name: Of the study.
        kind: The task.
        columns: Columns by role.
        patient: Column that identifies patients; `none`: a record is the unit.
        patient_ids: How their ids are written.
        site: Column that says which site a row belongs to; `none`: no column does.
        base: Directory or name of the base.
        mode: `privacy.mode`.
        epsilon: Of the whole study.
        delta: Of the whole study.
        sites: Number of sites of the consortium.
        largest: Units of the largest of them.
        labels: The study's label for a label of the files.
        renamed: For a column of some files, the name that it has in the others and in the study.
    """

    name: str | None = None
    kind: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    patient: str | None = None
    patient_ids: IdRule | None = None
    site: str | None = None
    base: str | None = None
    mode: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    sites: int | None = None
    largest: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    validation: float | None = None

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is read or said. Raises `StudyError`."""
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise StudyError(
                f"--name: expected small letters, digits and hyphens (at most 63), got {self.name!r}",
                f"write for example `privet new FILES --name {plain_name(self.name) or 'study'}`",
            )
        if (self.sites is None) is not (self.largest is None):
            raise StudyError(
                "--sites, --largest: expected both or none of them",
                "name both, as in `privet new FILES --sites 3 --largest 400`",
            )
        if self.validation is not None and not 0 <= self.validation <= 0.5:
            raise StudyError(
                f"--validation: expected a fraction from 0 to 0.5, got {self.validation:g}",
                "write for example `privet new FILES --validation 0.1`",
            )
        _check_privacy(self.epsilon, self.delta)


@dataclass(frozen=True)
class Draft:
    """A study as plain values.

    Attributes:
        document: The values.
        before: The command that has to be run before the study can be checked; nothing if there is none.
        alone: Whether the files tell fewer than three sites, and nobody said how many there will be.
    """

    document: Mapping[str, Any]
    before: str = ""
    alone: bool = False

    def text(self) -> str:
        """Return the study file: each line with what it changes."""
        sites = self.document["simulation"].get("sites", {})
        formats = {
            f"simulation.sites.{name}.format": FORMAT_COMMENT for name, site in sites.items() if "format" in site
        }
        return to_toml(self.document, {**COMMENTS, **formats})


Say = Callable[[str, str], None]
"""Receives a subject and a sentence about it."""


def draft_study(given: Sequence[Path], wishes: Wishes, root: Path, ask: Asker, say: Say) -> Draft:
    """Return a study for data files.

    Args:
        given: Data files, or directories of them.
        wishes: What is known.
        root: Directory of the study file. Paths in it are relative to this directory.
        ask: Answers questions.
        say: Receives what was found and chosen.

    Raises:
        StudyError: The files tell no task, or a wish does not fit them.
        DataError: A file cannot be read, or its rows do not fit.
        RefusedError: The base holds what is refused.
    """
    wishes.check()
    files = data_files(given)
    for file in workbooks(given):
        say("ignored", f"{file}: a workbook; to use it, {SAVE_SHEETS}")
    sites = sites_of(files)
    forms = _renamed({file: _form_of(file, say) for file in files}, wishes.renamed, say)
    tables = {file: _table_of(file, form) for file, form in forms.items()}
    table = in_common(tables)
    _check_names(files[0], [*table], [*wishes.columns.values(), *([wishes.patient] if wishes.patient else [])])
    drafting = _Drafting(table, sites, forms, wishes, root, ask, say, tables)
    return drafting.draft(files)


def _check_privacy(epsilon: float | None, delta: float | None) -> None:
    """Refuse a promise that cannot be made, before anything is read or said. Raises `StudyError`."""
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise StudyError(
            f"--epsilon: expected a number above 0, got {epsilon:g}",
            "give a larger one, such as 8; to train without privacy: `privet new FILES --privacy none`",
        )
    if delta is not None and not 0 < delta < 1:
        raise StudyError(
            f"--delta: expected a number above 0 and below 1, got {delta:g}",
            "leave --delta out: it then follows from the number of units",
        )


def _form_of(file: Path, say: Say) -> FileFormat:
    """Return how a file is written, as far as a look at it tells."""
    form = merged(PLAIN, proposed(file, (), PLAIN))
    header = next(iter(read_rows(file, form)), {})
    if any(name != name.strip() for name in header):
        form = merged(form, {"strip_header": True})
    if settings := _settings(form):
        beyond = "" if form.encoding.startswith("utf") else f"; letters beyond ASCII: {letters_of(file, form.encoding)}"
        said = ", ".join(f"{name} = {str(value).lower()}" for name, value in settings.items())
        say("format", f"{file}: {said}{beyond}. Check that this is how the file is written")
    return form


def _renamed(forms: Mapping[Path, FileFormat], meant: Mapping[str, str], say: Say) -> dict[Path, FileFormat]:
    """Return how files are written, with the columns renamed in those that have them under another name.

    Raises:
        StudyError: No file has such a column, none has the one that it is to be, or each that has one has both.
    """
    headers = {file: next(iter(read_rows(file, form)), {}) for file, form in forms.items()} if meant else {}
    for name, other in meant.items():
        having = [file for file, header in headers.items() if name in header]
        if not having:
            raise StudyError(
                f"--rename {name}={other}: expected a column of a file, and no file has the column {name}",
                "write the name as the file does, or leave this --rename out",
            )
        if not any(other in header for header in headers.values()):
            raise StudyError(
                f"--rename {name}={other}: expected a name that the column has in other files, and no file has {other}",
                f"name the column as other files do: --rename {quote(f'{name}=NAME')}",
            )
        if all(other in headers[file] for file in having):
            raise StudyError(
                f"--rename {name}={other}: {', '.join(map(str, having))} has both columns",
                "leave this --rename out, or name another column",
            )
    found = dict(forms)
    for file, header in headers.items():
        if own := {name: other for name, other in meant.items() if name in header and other not in header}:
            found[file] = merged(forms[file], {"columns": own})
            say("columns", f"{file}: " + ", ".join(f"{name} is {other}" for name, other in own.items()))
    return found


def _settings(form: FileFormat) -> dict[str, Any]:
    return {name: getattr(form, name) for name in sorted(form.model_fields_set)}


def _table_of(file: Path, form: FileFormat) -> Table:
    """Return the columns of a file, each with the values of all rows."""
    rows = list(read_rows(file, form))
    if not rows:
        raise DataError(f"{file}: expected rows of data, found the names of columns alone", "export the file again")
    table = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    if kind_of(file).name in ("csv", "tsv") and headless(table):
        raise DataError(
            f"{file}: expected the names of the columns in the first line, found what looks like a row of data",
            "write the names of the columns into a line above it, the same in all files, as in `text,label`; if they "
            f"are names, shorten them to {LONGEST_NAME} characters",
        )
    return table


def _check_names(file: Path, names: Sequence[str], known: Collection[str]) -> None:
    """Check that names of columns may be said, and enter a study. Raises `DataError` where they may be a record."""
    if not believed(names, known):
        raise DataError(
            f"{file}: expected names of columns, found {listed(names)}",
            "if these are names, say which column is which, as in `privet new FILES --column text=NAME --column "
            "label=NAME`; if not, write the names of the columns into a line above the rows",
        )


@dataclass(frozen=True)
class _Found:
    """The records of each file."""

    of: Mapping[Path, tuple[Records, DataReport]]

    def records(self, files: Sequence[Path]) -> Records:
        return concatenate([self.of[file][0] for file in files])

    def units(self, files: Sequence[Path], patients: bool) -> int:
        records = self.records(files)
        return len(set(records.units)) if patients else len(records)

    def labels(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for _, report in self.of.values():
            counts.update(report.labels)
        return dict(counts)


@dataclass
class _Drafting:
    """A study that is being drafted."""

    table: Table
    sites: Sequence[SiteData]
    forms: dict[Path, FileFormat]
    wishes: Wishes
    root: Path
    ask: Asker
    say: Say
    tables: Mapping[Path, Table]

    def draft(self, files: Sequence[Path]) -> Draft:
        reading = self.reading()
        self.map_labels(reading)
        patient = self.patient(list(reading.columns.values()))
        self.say("reading", f"{len(files)} data file{'s' if len(files) > 1 else ''} and the base model")
        base = choose_base(reading.kind, self.wishes.base, self.root, lambda line: self.say("base", line))
        here = "" if base.directory else "; it is not on this machine yet"
        self.say("base", f"{base.section.base}, {len(base.section.sha256)} files pinned{here}")
        document = self.skeleton(reading, patient, base)
        found = self.records(document, files)
        self.say_records(found)
        simulation = self.simulation([*reading.columns.values(), *filter(None, [patient])])
        units, sizes = self.sizes(found, simulation, patients=patient is not None)
        told = len(sizes)
        alone = len(self.sites) < _CONSORTIUM and "column" not in simulation.get("partition", ())
        sizes, known = self.consortium(sizes, ask=alone)
        units = sum(sizes) if known else units
        mode = self.mode(reading.kind, len(sizes))
        document["data"]["max_length"] = self.length(document, found, base)
        if fraction := self.validation(mode, sum(sizes)):
            document["data"]["validation_fraction"] = fraction
        document |= _values(document, mode, sizes, base)
        document["privacy"] = self.privacy(mode, units, len(sizes), patients=patient is not None)
        if told < document["cohort"]["min_sites"] or (
            known and simulation.get("partition", {}).get("sites", len(sizes)) != len(sizes)
        ):
            self.deal(simulation, len(sizes))
        if base.mapped is not None:
            simulation["resources"] = {"bases": {base.section.base: str(base.mapped)}}
        if document["training"]["rounds"] > 10:
            simulation["evaluate_every"] = math.ceil(document["training"]["rounds"] / 8)
        document["simulation"] = simulation
        self.say_values(document, int(statistics.median(sizes)))
        self.say_quality(document, sizes)
        Study.parse(document)
        return Draft({name: document[name] for name in _ORDER if name in document}, base.get, alone and not known)

    # --- what the files hold ---

    def reading(self) -> Reading:
        """Return task and columns."""
        wishes = self.wishes
        try:
            ways = readings(self.table, wishes.kind, wishes.columns)
        except StudyError as error:
            if not (lines := differences(self.tables)):
                raise
            apart = "\n  ".join(["the data files: expected the same columns in all of them", *lines])
            if found := renames(self.tables):
                raise StudyError(apart, same_names(found)) from None
            raise StudyError(
                f"{apart}\n  {error.message}", f"rename the columns where a file differs, or {error.hint}"
            ) from None
        self.require_everywhere(ways[0])
        kinds = list(dict.fromkeys(way.kind for way in ways))
        kind = self.ask.choose("task", kinds, kinds[0])
        way = next(way for way in ways if way.kind == kind)
        columns = dict(way.columns)
        for role, others in way.others.items():
            columns[role] = self.ask.choose(f"column of the {role}", [columns[role], *others], columns[role])
        chosen = readings(self.table, kind, columns)[0]
        if (label := chosen.columns.get("label")) and (wrong := hold_texts(label, self.tables)):
            raise StudyError(
                f"{', '.join(map(str, wrong))}: expected labels in the column {label}, found texts"
                + "".join(f"\n  {line}" for line in differences(self.tables)),
                "correct the names of the columns in this file, or name the column of labels, as in `privet new FILES "
                "--column label=NAME`",
            )
        self.say("task", f"{kind}: " + ", ".join(f'{role} = "{name}"' for role, name in chosen.columns.items()))
        if len(kinds) > 1 and wishes.kind is None:
            self.say("", f"The files also suit {', '.join(each for each in kinds if each != kind)}: --task TASK")
        for role, others in way.others.items():
            if others:
                rest = [name for name in (way.columns[role], *others) if name != columns[role]]
                self.say("", f"The {role} may also be in {', '.join(rest[:5])}: --column {role}=COLUMN")
        return chosen

    def of_all(self, names: Collection[str]) -> list[Table]:
        """Return the tables of all files with these columns alone, where they have them."""
        return [{name: table[name] for name in names if name in table} for table in self.tables.values()]

    def require_everywhere(self, proposed: Reading) -> None:
        """Refuse where another column would be chosen if all files had the columns that most of them have.

        Otherwise one renamed column would change what is learned, or whom privacy protects, without a word.

        Raises:
            StudyError: There is such a column.
        """
        wishes, usual = self.wishes, in_most(self.tables)
        try:
            roles = dict(readings(usual, wishes.kind, wishes.columns)[0].columns)
        except StudyError:  # it has no way to read that all files do not have as well
            roles = dict(proposed.columns)
        taken, most = [*roles.values()], self.of_all(usual)
        likely = patient_column(usual, taken) or next((each.name for each in repeated_ids(most, taken)), None)
        if wishes.patient is None and likely is not None:
            roles["patient"] = likely
        absent = {role: name for role, name in roles.items() if name not in self.table}
        if not absent:
            return
        lines, near = [], dict[str, str]()
        for name in absent.values():
            for file, other in lacking(name, self.tables).items():
                lines.append(f"{file} lacks the column {name}" + (f"; did you mean {other}?" if other else ""))
                near |= {other: name} if other else {}
        option = {
            role: "--patient none"
            if role == "patient"
            else f"--column {role}={quote(proposed.columns.get(role, 'COLUMN'))}"
            for role in absent
        }
        raise StudyError(
            f"the data files: expected the columns {', '.join(f'{name} ({role})' for role, name in absent.items())} in "
            "all of them" + "".join(f"\n  {line}" for line in lines),
            (same_names(near) if near else "rename the column in these files")
            + f"; or, to do without it, decide with `privet new FILES {' '.join(option.values())}`",
        )

    def map_labels(self, reading: Reading) -> None:
        """Take the labels that mean another one for it, in the files that have them.

        Raises:
            StudyError: The study reads no column of labels, or no file has such a label.
        """
        meant, column = self.wishes.labels, reading.columns.get("label")
        if not meant:
            return
        found = {file: {str(value) for value in table.get(column or "", ())} for file, table in self.tables.items()}
        unknown = [label for label in meant if not any(label in labels for labels in found.values())]
        if column is None or unknown:
            where = f"in the column {column}" if column else "and a task with a column of labels"
            raise StudyError(
                f"--label: expected labels of the files {where}, got {', '.join(unknown or meant)}",
                "write a label as the files do, as in `privet new FILES --label J=yes`",
            )
        for file, labels in found.items():
            if own := {label: name for label, name in meant.items() if label in labels}:
                self.forms[file] = merged(self.forms[file], {"labels": own})
        values = [value if value is None else meant.get(str(value), value) for value in self.table[column]]
        self.table = {**self.table, column: values}

    def patient(self, taken: Sequence[str]) -> str | None:
        """Return the column that identifies patients; None if a record is the unit.

        Raises:
            StudyError: There is no such column, or nobody can be asked whether a column that repeats is one.
        """
        chosen, rest = self.wishes.patient, [name for name in self.table if name not in taken]
        named = patient_column(self.table, taken)
        repeated = [] if named else repeated_ids(self.of_all(self.table), taken)
        if chosen is None:
            if repeated and not self.ask.answers:
                first = repeated[0]
                raise StudyError(
                    f"the unit of privacy: {first}, so it may identify patients; expected a decision, as a study "
                    "that protects each record by itself does not protect a patient with several",
                    f"protect all rows of one {first.name} together: `privet new FILES --patient {quote(first.name)}`; "
                    "or, if no patient has several rows, each row by itself: `privet new FILES --patient none`",
                )
            for each in repeated:
                self.say("", f"{each}: it may identify patients")
            question = "column that identifies the patient (none: each row is its own unit)"
            proposal = named or next((each.name for each in repeated), NONE)
            chosen = self.ask.choose(question, [*rest, NONE], proposal)
        if chosen == NONE:
            likely = [named] if named else [each.name for each in repeated]
            self.say("unit", "record: each row is protected by itself. If patients have several rows: --patient COLUMN")
            if likely:
                self.say("", f"Patients seem to be in the column {likely[0]}: --patient {quote(likely[0])}")
            return None
        if chosen not in self.table:
            raise StudyError(
                f"--patient: expected a column of the files or {NONE}, got {chosen!r}",
                "name the column that identifies patients, as in `privet new FILES --patient patient_id`",
            )
        self.say("unit", f"patient: all rows with one value in the column {chosen} are protected together")
        return chosen

    def records(self, document: Mapping[str, Any], files: Sequence[Path]) -> _Found:
        """Return the records of all files under a study whose values are not chosen yet."""
        rule, study = self.wishes.patient_ids, _unfinished(document)
        tested = {file for site in self.sites for file in site.test}
        found = {
            file: load_records(file, study, training=file not in tested, rule=rule, form=self.forms[file])
            for file in files
        }
        if study.data.unit is not None and rule is None:
            try:
                check_spellings([name for records, _ in found.values() for name in records.units], study.data.unit)
            except DataError as error:
                raise DataError(error.message, _SPELLINGS) from None
        return _Found(found)

    def sizes(self, found: _Found, simulation: Mapping[str, Any], *, patients: bool) -> tuple[int, list[int]]:
        """Return the number of training units, and that of each site; dealt out, each has the mean."""
        kept = [1.0 if site.test else 1 - TEST_FRACTION for site in self.sites]
        sizes = [round(part * found.units(site.train, patients)) for site, part in zip(self.sites, kept, strict=True)]
        if "sites" in simulation:
            return sum(sizes), sizes
        (units,) = sizes
        section = simulation["partition"]
        count = section.get("sites") or len({str(v) for v in self.table[section["column"]] if v is not None})
        return units, [max(1, units // count)] * count

    def consortium(self, sizes: list[int], *, ask: bool) -> tuple[list[int], bool]:
        """Return the number of units of each site, and whether somebody said how many sites there will be.

        Where the files are those of one or two sites, they do not tell of the consortium.

        Args:
            sizes: As the files tell it.
            ask: Whether to ask where it is not known.

        Raises:
            StudyError: The largest site is smaller than one of the files.
        """
        sites, largest = self.wishes.sites, self.wishes.largest
        if sites is None and ask:
            sites = _whole(self.ask.enter("number of sites in the consortium", f"{len(sizes)}"), "--sites", 2)
            if sites != len(sizes) or self.ask.answers:
                answer = self.ask.enter(
                    "units of the largest site (patients; without a patient column rows)", f"{max(sizes)}"
                )
                largest = _whole(answer, "--largest", 1)
        if sites is None or largest is None or (sites, largest) == (len(sizes), max(sizes)):
            return sizes, False
        if largest < max(sizes):
            raise StudyError(
                f"--largest: expected at least {max(sizes)}, the units of a site here; got {largest}",
                f"write `privet new FILES --sites {sites} --largest {max(sizes)}`, or more",
            )
        self.say("sites", f"{sites} in the consortium, of at most {largest} units; values fit sites of this size")
        return [largest] * sites, True

    def deal(self, simulation: dict[str, Any], sites: int) -> None:
        """Let all rows be dealt out to as many simulated sites as the study needs."""
        pool = SiteData("", [f for s in self.sites for f in s.train], [f for s in self.sites for f in s.test])
        simulation.pop("sites", None)
        simulation["partition"] = {"split": "iid", "sites": sites, **self.files(pool)}
        self.say("", f"In the simulation, the rows of the files are dealt out to {sites} sites at random.")

    # --- the study's tables ---

    def skeleton(self, reading: Reading, patient: str | None, base: Base) -> dict[str, Any]:
        """Return the tables that do not depend on how many records there are."""
        task: dict[str, Any] = {"kind": reading.kind}
        if labels := labels_in(reading, self.table):
            task["labels"] = list(labels)
        if reading.kind in GENERATING:
            task["max_new_tokens"] = 64
        classifies = reading.kind == "text-classification"
        if classifies and base.decoder:
            task["pooling"] = "last"
        if reading.kind == "token-classification" and not base.decoder:
            task["head_reads"] = "all-layers"
        return {
            "name": self.wishes.name or _named_after(self.root),
            "model": {"base": base.section.base, "sha256": dict(base.section.sha256)},
            "task": task,
            "data": {"columns": dict(reading.columns), **({} if patient is None else {"unit": patient})},
            "lora": {"targets": base.attention() if classifies else ["all-linear"]},
        }

    def length(self, document: Mapping[str, Any], found: _Found, base: Base) -> int:
        """Return a length in tokens that fits the records."""
        if base.directory is None:
            self.say("length", f"{_UNMEASURED} tokens of a record. `privet check` will say how many records that cuts.")
            return _UNMEASURED
        from privet.client.training.features import measure_records
        from privet.client.training.tokenizer import open_tokenizer

        study, records = _unfinished(document), found.records(list(found.of))
        some = records.select(range(0, len(records), -(-len(records) // _MEASURED)))
        tokens = measure_records(study, open_tokenizer(base.directory, study.task), some).tokens
        length = length_for(tokens, min(_LONGEST, base.positions or _LONGEST))
        cut = sum(count > length for count in tokens)
        longer = f"{cut or 'none'} of {len(tokens)} records {'is' if cut < 2 else 'are'} longer"
        self.say("length", f"at most {length} tokens of a record are used; {longer}{' and will be cut' if cut else ''}")
        return length

    def mode(self, kind: str, sites: int) -> str:
        """Return `privacy.mode`."""
        proposed = "distributed" if kind in GENERATING and sites >= 3 else "local"
        question = "privacy (local: each site adds its own noise; distributed: sites share it; none)"
        mode = self.wishes.mode or self.ask.choose(question, ["local", "distributed", "none"], proposed)
        if mode == "distributed" and sites < 3:
            raise StudyError(
                f"--privacy: distributed needs 3 or more sites, whose sum hides each of them; found {sites}",
                "name the files of 3 or more sites, or use `privet new FILES --privacy local`",
            )
        return mode

    def validation(self, mode: str, units: int) -> float:
        """Return `data.validation_fraction`: a tenth is proposed where enough units are left to train and to measure.

        Raises:
            StudyError: The study's privacy admits none.
        """
        fraction = self.wishes.validation
        if fraction and mode == "distributed":
            raise StudyError(
                f"--validation: expected 0 with distributed privacy, which releases gradients alone; got {fraction:g}",
                "leave --validation out, or use `privet new FILES --privacy local`",
            )
        if fraction is None:
            fraction = VALIDATION if mode != "distributed" and units >= _VALIDATING else 0.0
        return fraction

    def privacy(self, mode: str, units: int, sites: int, *, patients: bool) -> dict[str, Any]:
        """Return the table of privacy."""
        table: dict[str, Any] = {"mode": mode, "unit": "patient" if patients else "record"}
        if mode == NONE:
            return table
        epsilon = self.wishes.epsilon
        if epsilon is None:
            answer = self.ask.enter("privacy.epsilon of the whole study", f"{EPSILON:g}")
            try:
                epsilon = float(answer)
            except ValueError:
                raise StudyError(f"privacy.epsilon: expected a number, got {answer!r}", "answer as in 8") from None
            _check_privacy(epsilon, None)
        table |= {"epsilon": epsilon, "delta": self.wishes.delta or delta_for(units)}
        table["clip_norm"] = 1.0 if mode == "local" else 0.3
        if patients:
            table["max_records_per_unit"] = 4
        if mode == "distributed" and sites < _MAKING_UP:
            table |= {"dropouts": 0, "dropout_fraction": 0.0}
        return table

    # --- the simulation ---

    def simulation(self, taken: Sequence[str]) -> dict[str, Any]:
        """Return the simulator's table, in which the files stand for sites."""
        table: dict[str, Any] = {"data": "files", "baselines": ["local", "pooled"]}
        if self.wishes.patient_ids is not None:
            table["patient_ids"] = self.wishes.patient_ids
        if len(self.sites) > 1:
            names = [site.name or "site" for site in self.sites]
            table["sites"] = {name: self.files(site) for name, site in zip(names, self.sites, strict=True)}
            self.say("sites", ", ".join(names))
        else:
            table["partition"] = {**self.split(taken), **self.files(self.sites[0])}
        if len(self.sites) == 2:
            self.say("", "Two sites cannot hide from each other: each computes the other's part from the sum.")
        if untested := [site.name for site in self.sites if not site.test]:
            table["test_fraction"] = TEST_FRACTION
            share = f"{100 * TEST_FRACTION:.0f} % of the units are held out, by the study's seed"
            where = f" for {', '.join(untested)}" if len(untested) < len(self.sites) else ""
            self.say("test", f"no test file{where}: {share}")
        return table

    def split(self, taken: Sequence[str]) -> dict[str, Any]:
        """Return how the rows of one site's files become several sites."""
        column = self.wishes.site
        if column is None:
            rest = [name for name in self.table if name not in taken]
            question = f"column that says which site a row belongs to (none: rows are dealt out to {_DEALT} sites)"
            column = self.ask.choose(question, [*rest, NONE], place_column(self.table, taken) or NONE)
        if column == NONE:
            count = self.wishes.sites or _DEALT
            self.say("sites", f"{count} simulated ones, to which rows are dealt out at random: the files tell no sites")
            self.say("", "For your own: one file for each, as in north.csv south.csv west.csv; or --site-column COLUMN")
            return {"split": "iid", "sites": count}
        if column not in self.table:
            raise StudyError(
                f"--site-column: expected a column of the files or {NONE}, got {column!r}",
                "name the column that says which site a row belongs to, or leave --site-column out",
            )
        self.say("sites", f"one for each value of the column {column}")
        return {"split": "column", "column": column}

    def files(self, site: SiteData) -> dict[str, Any]:
        """Return a site's files as the study file names them, and how they are written."""
        names = {file: os.path.relpath(file.resolve(), self.root.resolve()) for file in (*site.train, *site.test)}
        parts = {"train": site.train, "test": site.test}
        table: dict[str, Any] = {part: [names[file] for file in each] for part, each in parts.items() if each}
        settings = {file: found for file in names if (found := _settings(self.forms[file]))}
        if settings and all(settings.get(file) == settings[next(iter(settings))] for file in names):
            table["format"] = next(iter(settings.values()))
        elif settings:
            table["format"] = {"files": {names[file]: found for file, found in settings.items()}}
        return table

    # --- what is said ---

    def say_records(self, found: _Found) -> None:
        """Say how many rows are records, and which labels become part of the study."""
        for file, (_, report) in found.of.items():
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in report.dropped.items())
            self.say("file", f"{file}: {report.kept} of {report.rows_read} rows kept{dropped}")
        counts = found.labels()
        if not counts:
            return
        listed = [f"{label} {count}" for label, count in counts.items()]
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        self.say("labels", ", ".join(listed[:_SHOWN]) + more)
        self.say("", "Their names become part of the study, which all sites and the coordinator see. Counts do not.")
        of = {file: report.labels for file, (_, report) in found.of.items()}
        for file, own, others in other_spellings(of):
            mine = ", ".join(f"{label} {of[file][label]}" for label in own[:_SHOWN])
            options = " ".join(f"--label {quote(f'{label}=LABEL')}" for label in own[:_SHOWN])
            self.say(
                "",
                f"WARNING: {file} has {mine}; it never has {', '.join(others[:_SHOWN])}, the labels of other files. "
                f"Are these spellings of them? If so, repeat the command with --force {options}.",
            )
        for group in alike(list(counts)):
            most = max(group, key=counts.__getitem__)
            options = " ".join(f"--label {quote(f'{label}={most}')}" for label in group if label != most)
            self.say(
                "",
                f"Are these one label? {' / '.join(map(repr, group))}. "
                f"If so, repeat the command with --force {options}.",
            )
        seen = [{label for label, count in report.labels.items() if count} for _, report in found.of.values()]
        for label, other in misspelt(seen):
            lines = f"Is {label!r}, which some files lack, a misspelling of {other!r}? If so, correct the file"
            self.say("", f"{lines}, and repeat the command with --force.")

    def say_values(self, document: Mapping[str, Any], typical: int) -> None:
        """Say how long training is, and what is promised."""
        training, privacy = document["training"], document["privacy"]
        steps = training["rounds"] * training["local_steps"]
        drawn = round(training["sampling_rate"] * typical)
        spoken = f"{training['rounds']} rounds, {steps} steps; a step draws about {drawn} of a site's {typical} units"
        self.say("training", spoken)
        if privacy["mode"] == NONE:
            self.say("privacy", "none: nothing is clipped or noised, so real sites refuse the study by default")
            return
        if drawn < _FEW:
            self.say("", "That is few: beside the noise of this privacy, the model improves little on them.")
        promise = f"epsilon {privacy['epsilon']:g} and delta {privacy['delta']:g} per {privacy['unit']}"
        self.say("privacy", f"{privacy['mode']}, {promise}")

    def say_quality(self, document: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """Say whether a deployed run measures how good its model is."""
        if fraction := document["data"].get("validation_fraction"):
            self.say("quality", f"each site sets about {100 * fraction:.0f} % of its units aside, on which all sites")
            self.say("", "together measure each round's model. To train on all units: --validation 0")
            units = fraction * sum(sizes)
            within = accuracy_within(0.8, max(units, 1.0), noise_of(Study.parse(dict(document)), len(sizes)))
            if within > _UNSURE:
                known = f"an accuracy of 80 % is known to \u00b1 {100 * within:.0f} points only"
                self.say("", f"WARNING: on {units:.0f} units, {known}. Each site can measure it on its own test files")
            return
        self.say("quality", "no units are set aside, so real sites will not measure the model together")
        if document["privacy"]["mode"] != "distributed":
            self.say("", f"To measure each round: --validation {VALIDATION}, which trains on fewer units")


def _unfinished(document: Mapping[str, Any]) -> Study:
    """Return a study with some values of training. It serves to read files."""
    training = {"rounds": 1, "local_steps": 1, "sampling_rate": 0.1, "learning_rate": 0.1}
    return Study.parse({**document, "training": training, "privacy": {"mode": NONE}})


def _values(document: Mapping[str, Any], mode: str, sizes: Sequence[int], base: Base) -> dict[str, Any]:
    """Return the tables of training, and of the sites that take part."""
    tables = training_values(document["task"]["kind"], mode, int(statistics.median(sizes)), base.layers)
    tables["lora"] |= document["lora"]
    tables["aggregation"]["largest_count"] = largest_count(max(sizes))
    sites = len(sizes)
    all_needed = mode == "distributed" and sites < _MAKING_UP
    tables["cohort"] = {"min_sites": sites if all_needed else min(3, sites)}
    if all_needed:
        # No site may be missed in any round, so one agreement on keys can serve many.
        tables["secure_aggregation"] = {"block": min(_BLOCK, tables["training"]["rounds"])}
    elif sites == 2:
        tables["secure_aggregation"] = {"corrupt": 0}
    return tables


def _whole(answer: str, option: str, least: int) -> int:
    if answer.isascii() and answer.isdigit() and int(answer) >= least:
        return int(answer)
    raise StudyError(
        f"{option}: expected a whole number of at least {least}, got {answer!r}",
        f"answer again, or run `privet new FILES {option} NUMBER`",
    )


def _named_after(root: Path) -> str:
    return plain_name(root.resolve().name) or "study"
