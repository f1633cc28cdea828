"""The command that recommends settings for a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import Json, StudyFile, require_study
from privet.common.progress import Stages, closing, doing


@doing("Planning {study}: simulating stand-ins of it, from counts alone")
def plan(
    study: StudyFile,
    units: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Units (records or patients) that a site declares; once for each site, as in --units 120 --units 95. "
            "Default: those of [simulation.partition] in the study file.",
        ),
    ] = None,
    records: Annotated[
        float, typer.Option(min=1, help="Records of a unit on the mean. It matters for unit patient.")
    ] = 2.2,
    out: Annotated[
        Path | None, typer.Option(help="The study file to write. Default: STUDY-plan.toml beside the study file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulated stand-ins.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Recommend settings for a private study that classifies texts, before any record is read.

    It takes what the study promises (mode, unit, epsilon, delta) and the counts that sites declare, simulates a small
    stand-in for the model on synthetic records under many settings, and writes a study with the best ones. It prints
    what they are expected to reach, and what each other choice would cost. It takes one to three minutes.
    """
    require_study(study)
    target = out or study.with_name(f"{study.stem}-plan.toml")
    if target.exists() and not force:
        raise StateError(
            f"{target}: expected a new file, found one that exists",
            "write another file with `privet plan STUDY --out FILE`, or replace it with `privet plan STUDY --force`",
        )
    from privet.common.files import write_whole
    from privet.common.study.reading import read_toml
    from privet.simulations.plan.declared import consortium_of, readable
    from privet.simulations.plan.search import advise
    from privet.simulations.plan.settings import changed
    from privet.simulations.plan.words import advice_document, advice_lines, advice_sentence
    from privet.simulations.runs.toml import absolute_paths, to_toml
    from privet.simulations.terminal.sentences import path_text

    document = read_toml(study, what="study")
    declared = consortium_of(document, study.resolve().parent, units, records)
    if as_json:
        advice = advise(readable(document), declared.consortium, seed=seed)
    else:
        with Stages() as stages:
            advice = advise(readable(document), declared.consortium, seed=seed, tell=stages.tell)
    written = changed(document, advice.choice, max(declared.consortium.units))
    if target.resolve().parent != study.resolve().parent:
        written = absolute_paths(written, study.resolve().parent)
    write_whole(target, to_toml(written).encode())
    if as_json:
        typer.echo(json.dumps({**advice_document(advice, declared), "file": str(target)}))
        return
    for line in advice_lines(advice, declared):
        typer.echo(line)
    typer.echo(f"wrote {target}")
    typer.echo(closing(advice_sentence(advice), f"check it with `privet check {path_text(target)}`"))
