"""`privet data`: what a site's files hold, what is wrong with them, and which lines of the site file would mend it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from privet.client.bases.names import on_this_machine
from privet.client.bases.opened import open_base
from privet.client.budget.withdrawals import Withdrawn, withdrawn_of
from privet.client.commands.policy import named_study
from privet.client.formats import FileFormat, Formatted
from privet.client.site import IdRule, SiteConfig, load_site
from privet.client.training.data import Records
from privet.client.training.examination import (
    Examined,
    count_lines,
    examine,
    labels_of,
    proposal,
    proposed_count,
    training_records,
    units_of,
    warnings_of,
)
from privet.client.training.features import length_lines, measure_records
from privet.client.training.ids import Spellings, check_spellings, spellings
from privet.client.training.tokenizer import open_tokenizer
from privet.common.errors import PrivetError, RefusedError, StudyError, VerificationError, together
from privet.common.options import site_file
from privet.common.progress import number_of, printable
from privet.common.study.reading import read_toml, validate
from privet.common.study.study import Study, load_study


@dataclass(frozen=True)
class Source:
    """The files of one site.

    Attributes:
        name: The site; empty for files of no named site.
        train: Training files.
        test: Test files.
        form_of: Returns how a file is written.
        rule: How ids of patients are written.
        table: The table of the site file, or of the study file of a simulation, that holds the settings.
        bases: Directories of base models.
        declared: The count that the site declares.
        real: Whether there is a site file.
        formatted: Whether the site file has a table `[format]`.
        withdrawn: Who is left out.
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    form_of: Callable[[Path], FileFormat]
    rule: IdRule | None
    table: str = "format"
    bases: Mapping[str, Path] = field(default_factory=dict)
    declared: int | None = None
    real: bool = False
    formatted: bool = False
    withdrawn: Withdrawn | None = None


@dataclass(frozen=True)
class Report:
    """What was found in a source's files.

    Attributes:
        source: The files.
        files: What was found in each.
        records: All training records.
        units: Number of their units of privacy.
        alike: Spellings of ids that may name fewer units; None where the study names no unit column.
        lengths: How long the records are in tokens; None where the base cannot be opened.
        warnings: What is in training and in test files, in counts.
    """

    source: Source
    files: Sequence[Examined]
    records: Records
    units: int
    alike: Spellings | None
    lengths: dict[str, Any] | None
    warnings: Sequence[str]


def report_data(study: str, paths: Sequence[Path], site: Path | None, *, as_json: bool) -> None:
    """Examine files, print the report, and end with an error that names every fault.

    Raises:
        PrivetError: The study or the site file is not valid, or a file does not fit.
    """
    site = None if site is None else site_file(site)
    config = None if site is None else load_site(site)
    if site is None or config is None:
        contract = load_study(Path(study))
    else:  # a site may have no study file: it names a study as `privet site approve` does
        contract, _ = named_study(site, config, study, read=True)
    faults: list[PrivetError] = []
    sources = _sources(contract, Path(study), paths, config)
    reports = [_report(contract, Path(study).resolve().parent, source, faults) for source in sources]
    if config is not None and contract.privacy.unit == "patient" and contract.data.unit != config.patient_column:
        faults.append(
            RefusedError(
                f"E_UNIT_COLUMN: the study's patients are the values of the column {contract.data.unit}, but the site "
                f"file's patient_column is {config.patient_column}; the site refuses the study",
                "correct data.unit in the study, or `patient_column` in the site file",
            )
        )
    if as_json:
        typer.echo(json.dumps(_document(contract, reports, faults)))
    else:
        for report in reports:
            typer.echo("\n".join(map(printable, _lines(contract, report))))
    if not faults:
        return
    found = together(faults)
    if as_json:  # `main` would print a second document
        typer.echo(f"error: {found.message}", err=True)
        raise typer.Exit(found.exit_code)
    raise found


def _sources(study: Study, file: Path, paths: Sequence[Path], config: SiteConfig | None) -> list[Source]:
    """Return whose files are examined: those of the site file, the named ones, or those of all simulated sites."""
    if config is not None:
        return [
            Source(
                config.name,
                tuple(paths) or config.train,
                () if paths else config.test,
                config.form_of,
                config.rule_for(study.data.unit),
                bases=config.resources.bases,
                declared=config.declared_count,
                withdrawn=withdrawn_of(config),
                real=True,
                formatted=config.format is not None,
            )
        ]
    simulation = read_toml(file, what="study").get("simulation", {})
    rule, root = simulation.get("patient_ids"), file.resolve().parent
    named = {name: _formatted(table).within(root) for name, table in simulation.get("sites", {}).items()}
    if paths:
        known = {path: site.form_of(path) for site in named.values() for path in (*site.train, *site.test)}
        return [Source("", tuple(paths), (), lambda path: known.get(path.resolve(), FileFormat()), rule)]
    if not named:
        raise StudyError(
            "expected at least one data file, found none",
            "name the files with `privet data STUDY FILE`, or the site file with `privet data STUDY --site SITE`",
        )
    return [
        Source(name, site.train, site.test, site.form_of, rule, f"simulation.sites.{name}.format")
        for name, site in named.items()
    ]


def _formatted(table: Mapping[str, Any]) -> Formatted:
    """Return the files of a simulated site; `privet check` says what is wrong with other fields."""
    own = {name: table[name] for name in Formatted.model_fields if name in table}
    return validate(Formatted, own, what="table of a simulated site")


def _report(study: Study, root: Path, source: Source, faults: list[PrivetError]) -> Report:
    """Examine a site's files, and add what is wrong with them to `faults`."""
    files = examine(study, source.train, source.test, source.form_of, source.rule, source.withdrawn)
    for each in files:
        if each.fault is not None:
            each.fault.message = f"site {source.name}: {each.fault.message}" if source.name else each.fault.message
            faults.append(each.fault)
    records, column = training_records(files), study.data.unit
    try:
        if study.privacy.unit == "patient" and column is not None and source.rule is None:
            check_spellings(records.units, column)
    except PrivetError as error:
        faults.append(error)
    lengths = None
    try:
        lengths = _token_lengths(study, root, source.bases, records) if len(records) else None
    except PrivetError as error:
        faults.append(error)
    return Report(
        source=source,
        files=files,
        records=records,
        units=units_of(study, records),
        alike=spellings(records.units) if column is not None else None,
        lengths=lengths,
        warnings=warnings_of(study, files, source.name or "these files"),
    )


def _document(study: Study, reports: Sequence[Report], faults: Sequence[PrivetError]) -> dict[str, Any]:
    """Return the reports as JSON values. `total` is that of the only site, or of the first."""
    first = reports[0]
    return {
        "files": [vars(each.report) for report in reports for each in report.files if each.report is not None],
        "total": _total(study, first),
        "sites": {report.source.name: _total(study, report) for report in reports},
        "problems": [{"message": fault.message, "hint": fault.hint} for fault in faults],
        "warnings": [line for report in reports for line in report.warnings],
        "proposal": [line for report in reports for line in proposal(report.files, report.source.table)],
    }


def _total(study: Study, report: Report) -> dict[str, Any]:
    return {
        "records": len(report.records),
        "units": report.units,
        "unit": study.privacy.unit,
        "column": study.data.unit,
        "patient_ids": report.source.rule,
        "alike": None if report.alike is None else vars(report.alike),
        "token_lengths": report.lengths,
        "declared_count": proposed_count(report.units) if report.units else None,
    }


def _lines(study: Study, report: Report) -> list[str]:
    """Return a report as text, one fact a line."""
    source, column = report.source, study.data.unit
    lines = [f"site {source.name}"] if source.name else []
    for each in report.files:
        unread = "does not fit the study" if each.path.is_file() else "there is no such file"
        read = f"{each.path}: {unread}" if each.report is None else each.report.lines()
        lines += [read] if isinstance(read, str) else read
        if each.letters:
            lines.append(f"  with the encoding below, its most frequent letters beyond ASCII are: {each.letters}")
    units = f"{report.units} {'unit' if report.units == 1 else 'units'} of privacy (each {study.privacy.unit} is one)"
    lines.append(f"all files: {number_of(len(report.records), 'record')}, {units}")
    if len(report.records):
        told = ["no token lengths: the base model cannot be opened"]
        lines += [f"  {line}" for line in (told if report.lengths is None else length_lines(report.lengths))]
    if (alike := report.alike) is not None and alike.names:
        lines.append(f"  {alike.names} spellings in the column {column} may name only {alike.units} units")
        if source.rule is None and not source.real:
            lines.append("  with --site SITE, patient_ids in the site file decides")
    lines += [f"WARNING: {line}." for line in report.warnings]
    return lines + _for_the_site_file(study, report)


def _for_the_site_file(study: Study, report: Report) -> list[str]:
    """Return the lines that a person may add to the site file."""
    table = report.source.table
    if settings := proposal(report.files, table):
        where = "site file (in a simulation: of the study file, as simulation.sites.NAME.format):"
        lines = ["settings that fit these files better: read them, and add them at the end of the"]
        if report.source.formatted and settings[0] == "[format]":  # the table itself must not stand there twice
            lines = ["settings that fit these files better: read them, and add them below the line [format] of the"]
            where, settings = "site file, in place of lines that set the same:", settings[1:]
        lines.append("study file:" if table != "format" else where)
        lines += [f"  {line}" for line in settings]
        if any("?" in each.settings.get("labels", {}).values() for each in report.files):
            lines.append(f"  (instead of ?, write one of the study's labels: {', '.join(labels_of(study))})")
        return lines
    if table != "format" or not report.units or any(each.fault is not None for each in report.files):
        return []
    source = report.source
    return count_lines(report.units, source.declared, study.aggregation.largest_count, at_site=source.real)


def _token_lengths(study: Study, root: Path, bases: Mapping[str, Path], records: Records) -> dict[str, Any] | None:
    """Return how long records are in tokens; None where the base is not on this machine, or not the study's.

    Raises:
        StudyError, DataError: The tokenizer lacks what the task needs, or the chat template does not take the records.
    """
    try:
        model, known, _ = on_this_machine(study.model, root, bases)
        base = open_base(model, known)
    except (StudyError, RefusedError, VerificationError):
        return None
    return measure_records(study, open_tokenizer(base, study.task), records).document()
