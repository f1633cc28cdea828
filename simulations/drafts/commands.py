"""The command that makes a study."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer

from privet.common.errors import PrivetError, StateError, StudyError
from privet.common.progress import doing, folded

_SCHEMA_FILE = "study.schema.json"
_FILES = re.compile(r"privet new FILES([^`]*)")


class _Terminal:
    """Asks whoever sits at the terminal. Enter takes the proposal."""

    answers = True

    def choose(self, question: str, options: Sequence[str], default: str) -> str:
        """Return one of some options, which may be given by their numbers."""
        if len(options) < 2:
            return default
        listed = "  ".join(f"{number} {option}" for number, option in enumerate(options, start=1))
        typer.echo(f"{question}\n  {listed}")
        while True:
            answer = typer.prompt("choice", default=default).strip()
            if answer in options:
                return str(answer)
            if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(options):
                return options[int(answer) - 1]
            typer.echo(f"expected one of the {len(options)} choices or its number, got {answer!r}")

    def enter(self, question: str, default: str) -> str:
        """Return a text."""
        return str(typer.prompt(question, default=default)).strip()


def _reading(data: str | None, source: str | None, schema: bool, **_: object) -> str:
    return "Describing the fields of a study" if schema else f"Reading {source or data or 'the data files'}"


@doing(_reading)
def new(
    context: typer.Context,
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The sites' data files, or a directory of them. Their names tell site and part: north-train.csv, "
            "north-test.csv, south.csv, west/train.csv.",
            metavar="DATA...",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The study file to write.")] = Path("study.toml"),
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the study. Default: that of the directory that the study file (--out) is written to."
        ),
    ] = None,
    task: Annotated[
        Literal["text-classification", "token-classification", "causal-lm", "preference"] | None,
        typer.Option(help="What the model learns. Default: what the columns suit."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of a role, as in text=note. May be given several times.", metavar="ROLE=COLUMN"),
    ] = None,
    patient: Annotated[
        str | None,
        typer.Option(help="Column that identifies patients, whose rows are then protected together; or none."),
    ] = None,
    patient_ids: Annotated[
        Literal["number", "text", "case"] | None,
        typer.Option(help="How the ids of patients are written. number: 0101 is 101; text: A1 is a1; case: it is not."),
    ] = None,
    site_column: Annotated[
        str | None, typer.Option(help="For one file: column that says which site a row belongs to; or none.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Directory of the base model, or a name that this machine knows. Default: one for the task."),
    ] = None,
    privacy: Annotated[
        Literal["local", "distributed", "none"] | None,
        typer.Option(help="local: each site adds all of its noise. distributed: sites share it."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Epsilon of the whole study. Default: 8.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the whole study. Default: from the counts.")] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Fraction of its units that each site sets aside, so that the sites measure the model together in "
            "each round. Default: 0.1 where there are enough units, otherwise 0.",
            metavar="FRACTION",
        ),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(help="Number of sites of the consortium, where files of all are not here.", min=2)
    ] = None,
    largest: Annotated[
        int | None, typer.Option(help="Units (patients or rows) of the largest of these sites.", min=1)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A label of some files, and the study's label that it means, such as J=yes. May be given several "
            "times.",
            metavar="FILE=STUDY",
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of some files, and the name that it has in the others, such as befund=text. May be given "
            "several times.",
            metavar="FILE=STUDY",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A study: make it again with --seed; or, from one that trains, one that counts with --kind."
        ),
    ] = None,
    kind: Annotated[
        Literal["statistics", "evaluate"] | None,
        typer.Option(help="With --from. statistics: count units, labels and lengths. evaluate: measure an adapter."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="With --from: the same study with this seed. Sites run each round of a study once, so a study that "
            "was run needs another seed to be run again.",
            min=0,
            max=2**53 - 1,
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="With --kind evaluate: digest of the adapter, or base.", metavar="DIGEST")
    ] = None,
    measure: Annotated[
        Literal["train", "test"] | None,
        typer.Option(help="With --kind evaluate: which of a site's files are measured on. Default: train."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take every proposal, and ask nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the study file if it exists.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of study files, for editors, and do nothing else.")
    ] = False,
) -> None:
    """Make a study file from data files; with --from, from a study: one that counts or measures, or the same again.

    It proposes the task, the columns, the labels, the unit of privacy, the base model, the sites, and values that fit
    the data's size. At a terminal it asks; otherwise, and with --yes, it takes its proposals. It prints each of them.
    Data is only read. Label names go into the study, and no other value of a row does.
    """
    if schema:
        from privet.simulations.drafts.reference import study_schema

        typer.echo(json.dumps(study_schema(), indent=2, ensure_ascii=False))
        return
    if not data and source is None and kind is None and seed is None:
        raise StudyError(
            "expected data files, or a directory of them; got none",
            "name one file for each site, as in `privet new north.csv south.csv west.csv`",
        )
    if missing := [path for path in data or () if not path.exists()]:
        from privet.simulations.drafts.places import data_files

        data_files(missing)  # which says so
    if out.exists() and not force:
        raise StateError(
            f"{out}: expected a new file, found one that exists",
            f"write another file with `{_command(context, ' --out FILE')}`, or replace {out} with "
            f"`{_command(context, ' --force')}`",
        )
    if not out.parent.is_dir():
        raise StudyError(f"--out: there is no directory {out.parent}", "make the directory, or correct --out")
    from privet.common.files import write_whole
    from privet.simulations.drafts.draft import Proposals, Wishes, draft_study

    if seed is not None:
        write_whole(out, _again(data, source, kind, out, name, seed).encode())
        typer.echo(f"wrote     {out}\nnext: privet check {out}")
        return
    if source is not None or kind is not None:
        text = _counting(data, source, kind, out, name, epsilon, adapter, measure)
        write_whole(out, text.encode())
        typer.echo(f"wrote     {out}\nnext: privet check {out}")
        return
    wishes = Wishes(
        name,
        task,
        dict(_pair("--column", text, "ROLE=COLUMN", "text=note") for text in column or []),
        patient,
        patient_ids,
        site_column,
        base,
        privacy,
        epsilon,
        delta,
        sites,
        largest,
        dict(_pair("--label", text, "FILE=STUDY", "J=yes") for text in label or []),
        dict(_pair("--rename", text, "FILE=STUDY", "befund=text") for text in rename or []),
        validation,
    )
    asker = Proposals() if yes or not sys.stdin.isatty() else _Terminal()
    root = out.resolve().parent
    try:
        draft = draft_study(
            data or (), wishes, root, asker, lambda subject, text: typer.echo(folded(f"{subject:<9} {text}", 10))
        )
    except PrivetError as error:
        error.hint = _FILES.sub(lambda found: _command(context, found[1]), error.hint)
        raise
    directive = f"#:schema {_SCHEMA_FILE}\n" if (root / _SCHEMA_FILE).is_file() else ""
    write_whole(out, (directive + draft.text()).encode())
    typer.echo(f"wrote     {out}")
    if draft.alone:
        again = f"{_command(context)} --force --sites NUMBER --largest UNITS"
        said = f"A consortium of three or more sites needs their number, and the units of the largest: {again}"
        typer.echo(folded(f"sites     {said}", 10))
    check = f"privet check {out}"
    typer.echo(f"next: {draft.before}\nthen: {check}" if draft.before else f"next: {check}")


def _counting(
    data: list[Path] | None,
    source: Path | None,
    kind: Literal["statistics", "evaluate"] | None,
    out: Path,
    name: str | None,
    epsilon: float | None,
    adapter: str | None,
    measure: str | None,
) -> str:
    """Return the text of a study that trains nothing, made from one that trains."""
    from privet.simulations.drafts.counting import draft_counting

    if data or source is None or kind is None:
        raise StudyError(
            "expected --from and --kind together, and no data files",
            "write for example `privet new --from study.toml --kind statistics --out counts.toml`",
        )
    _check_beside(source, out, f"--kind {kind}")
    return draft_counting(source, kind, name=name, epsilon=epsilon, adapter=adapter, files=measure).text()


def _again(
    data: list[Path] | None, source: Path | None, kind: str | None, out: Path, name: str | None, seed: int
) -> str:
    """Return the text of a study with another seed, and with another name if one is given. All else stays."""
    from privet.client.editing import changed
    from privet.common.study.reading import read_toml
    from privet.common.study.study import Study

    if data or source is None or kind is not None:
        raise StudyError(
            "expected --seed with --from, and neither data files nor --kind",
            "write for example `privet new --from study.toml --seed 2 --out study-2.toml`",
        )
    _check_beside(source, out, f"--seed {seed}")
    study = Study.parse(_shared(read_toml(source, what="study")))
    if seed == study.seed and name in {None, study.name}:
        raise StudyError(f"--seed: expected another seed than that of {source}, found the same: {seed}", "add one")
    text = changed(source.read_text(encoding="utf-8-sig"), {"seed": seed, "name": name or study.name}, source.name)
    Study.parse(_shared(tomllib.loads(text)))
    return text


def _shared(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study file's content without what only a simulation reads."""
    return {key: value for key, value in document.items() if key != "simulation"}


def _check_beside(source: Path, out: Path, how: str) -> None:
    """Check that a study is written beside the one that it is made from."""
    if out.resolve().parent != source.resolve().parent:
        raise StudyError(
            f"--out: expected a file beside {source}, as its [simulation] names files from there; found {out}",
            f"write `privet new --from {source} {how} --out {source.parent / out.name}`",
        )


def _command(context: typer.Context, more: str = "") -> str:
    """Return the command as it was given, with more options, which replace single ones; without --force."""
    words: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if not value or value == parameter.default or parameter.name == "force":
            continue
        if " --privacy none" in more and parameter.name in ("epsilon", "delta"):
            continue
        several = isinstance(value, list | tuple)
        if not several and any(f" {option} " in f"{more} " for option in parameter.opts):
            continue
        for each in value if several else [value]:
            option = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            if option and f" {option[0]} {str(each).partition('=')[0]}=" in more:
                continue  # of --column ROLE=NAME, another one for the same role
            words += option if each is True else [*option, str(each)]
    return f"privet new {shlex.join(words)}{more}"


def _pair(option: str, text: str, form: str, example: str) -> tuple[str, str]:
    first, equals, second = text.partition("=")
    if not (first and equals and second):
        raise StudyError(f"{option}: expected {form}, got {text!r}", f"write it as in `{option} {example}`")
    return first, second
