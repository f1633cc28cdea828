"""The command that evaluates a trained adapter beside its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import DataError, StudyError
from privet.common.files import write_durably
from privet.common.options import FormatFile, Json, RunPath, require_files
from privet.common.progress import Stages, closing, doing

if TYPE_CHECKING:
    from privet.client.release.asking import Asked
    from privet.client.release.opened import Release
    from privet.client.site import Resources


@doing("Evaluating the adapter of {run} beside its base")
def evaluate(
    run: RunPath,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File of records that the run was not trained on. Give the option once for each file."),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="Name of a site and a file of its records, as NAME=FILE. Results are given by site."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Column of the files to group results by. Give the option once for each column."),
    ] = None,
    positive: Annotated[str | None, typer.Option(help="For classes: the label whose thresholds are tabulated.")] = None,
    answers: Annotated[
        int,
        typer.Option(
            min=0,
            help="For answers: most records to answer, and most answers of --train to continue.",
        ),
    ] = 64,
    choices: Annotated[
        str | None, typer.Option(help="For answers: column of the choices of multiple-choice questions.")
    ] = None,
    right: Annotated[
        str | None, typer.Option(help="Column of the right choice. Default: the study's column of answers.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help='For answers: a part that each answer has, written `PART: value.`, such as "Refer to". How often it '
            "is right is counted, and the verdict follows from it too."
        ),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(help="For answers: file that the run was trained on, to find what the model repeats of it."),
    ] = None,
    canaries: Annotated[
        Path | None, typer.Option(help="For answers: file of planted records (JSON Lines), to measure their exposure.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Sampled continuations of each training answer, besides the greedy one.")
    ] = 0,
    show: Annotated[
        int, typer.Option(min=0, help="Records whose texts and answers are printed. Only on a screen of the site.")
    ] = 0,
    smallest: Annotated[
        int, typer.Option(min=1, help="Least number of units (patients, documents) of a group that is shown.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Decides resampling, and which records are drawn.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Most records of a forward pass. Fewer take less memory.")] = 32,
    form: FormatFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for evaluation.json and evaluation.html. It is created.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a run's adapter with the base alone on records of your own, with intervals.

    Each figure of base and tuned model, and their difference, has an interval of 95 %: a bootstrap over patients or
    documents. The result is not differentially private. It follows from real records and stays at the site, or leaves
    it under the site's rules for releasing figures.
    """
    if show and as_json:
        raise StudyError(
            "--show: expected no --json beside it, as records are for a screen of the site alone",
            "leave one of them out",
        )
    from privet.client.formats import load_format, training_files
    from privet.client.release.opened import open_release
    from privet.client.site import Resources

    forms, own = (None, ()) if form is None else (load_format(form), training_files(form))
    require_files(data or (), "--data")
    release = open_release(run, testing=True)
    from privet.client.release.asking import Asked  # PyTorch, which takes seconds
    from privet.client.release.material import PLAINLY, UNNAMED

    asked = Asked(
        files=(*((UNNAMED, path) for path in data or ()), *map(_named, site or ())),
        by=tuple(dict.fromkeys(by or ())),
        seed=seed,
        smallest=smallest,
        answers=max(answers, show),
        show=show,
        positive=positive,
        choices=choices,
        right=right,
        part=part,
        train=tuple(train or ()),
        openings=answers,
        samples=samples,
        canaries=canaries,
        forms=forms or PLAINLY,
        own=own,
    )
    show_evaluation(release, asked, Resources(physical_batch=batch), out, as_json=as_json, formed=form is not None)


def show_evaluation(
    release: Release, asked: Asked, resources: Resources, out: Path | None, *, as_json: bool, formed: bool = True
) -> None:
    """Evaluate a trained adapter, print the result, and write its files.

    Args:
        release: The trained adapter.
        asked: What to evaluate.
        resources: The machine.
        out: Directory for the files; None: none are written.
        as_json: Print JSON alone.
        formed: Whether somebody has said how the files are written. If not, an error about a file proposes settings.
    """
    from rich.console import Console

    from privet.client.release.evaluation import evaluate_release
    from privet.client.release.evaluation_page import evaluation_page
    from privet.client.release.evaluation_text import evaluation_text, texts_shown
    from privet.client.release.opened import caution
    from privet.client.training.proposals import with_settings

    if note := caution(release):
        typer.echo(note, err=True)
    with Stages(quiet=as_json) as stages:
        stages.tell("loading the base")
        try:
            found = evaluate_release(release, asked, resources, stages.tell)
        except DataError as error:
            plain = [] if formed else [path for _, path in asked.files]
            raise with_settings(error, plain, list(release.study.data.columns.values())) from None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / "evaluation.json", (json.dumps(found.document, indent=2) + "\n").encode())
        write_durably(out / "evaluation.html", evaluation_page(found.document).encode())
    if as_json:
        typer.echo(json.dumps(found.document))
        return
    console = Console()
    if found.shown:
        console.print(texts_shown(found.shown))
    console.print(evaluation_text(found.document), highlight=False)
    following = f"open {out / 'evaluation.html'} in a browser" if out else "add --out DIRECTORY for a page with figures"
    typer.echo(closing(found.document["verdict"], following))


def _named(text: str) -> tuple[str, Path]:
    """Return site and file of NAME=FILE."""
    name, equals, file = text.partition("=")
    if not name or not equals or not file:
        raise StudyError("--site: expected NAME=FILE, found another form", "write for example --site north=north.jsonl")
    return name, Path(file)
