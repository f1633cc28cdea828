"""The researcher's commands: check a study, simulate it, use its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privet.common.errors import StudyError
from privet.common.options import Json, RunPath, StudyFile, Workers


def check(study: StudyFile, as_json: Json = False) -> None:
    """Validate a study file and print what it means: noise, steps, sizes, memory."""
    from privet.simulations.data.federation import load_plan
    from privet.simulations.terminal.explain import explain_study

    meaning = explain_study(load_plan(study))
    if as_json:
        typer.echo(json.dumps(meaning))
        return
    from rich.console import Console

    from privet.simulations.terminal.report import meaning_table

    Console().print(meaning_table(meaning))


def simulate(
    study: Annotated[Path | None, typer.Argument(help="The study file, with a [simulation] table.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory to create; default runs/<name>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory after an interruption.")] = None,
    continue_from: Annotated[
        Path | None, typer.Option(help="Start from the adapter that this finished run released.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="memory: this process and its workers. ray: Flower's simulation engine.")
    ] = "memory",
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Train a study over simulated sites, and compare with each site alone and all data pooled."""
    from rich.console import Console

    from privet.simulations.runs.simulate import ENGINES, keeping_only_progress, prepare, reopen, run_simulation
    from privet.simulations.terminal.report import Screen, result_table, save_figure
    from privet.simulations.terminal.tables import scenario_lines

    if (study is None) == (resume is None):
        raise StudyError("name either a study file or --resume DIR", "privet simulate --help")
    if engine not in ENGINES:
        raise StudyError(f"--engine: {engine!r} is unknown", f"use {' or '.join(ENGINES)}")
    console = Console(quiet=as_json)
    if resume is not None:
        simulated = reopen(resume)
    else:
        assert study is not None  # noqa: S101 - narrows the type; checked above
        target = out or Path("runs") / study.stem
        simulated = prepare(study, target, continue_from, lambda line: console.print(line, style="dim"))
    with keeping_only_progress(simulated), Screen(console, simulated.plan.study) as screen:
        summary = run_simulation(simulated, screen.watch, engine, workers)
    console.print(result_table(summary))
    for line in scenario_lines(summary):
        console.print(line, highlight=False)
    figure = save_figure(summary, simulated.path)
    if figure is not None:
        console.print(f"curves   {figure}", highlight=False)
    console.print(f"adapter  {simulated.path / 'adapter'}", highlight=False)
    if as_json:
        typer.echo(json.dumps(summary))


def deploy(
    study: StudyFile,
    out: Annotated[Path, typer.Option(help="A new directory for everything that is made.")] = Path("runs/deploy-demo"),
    as_json: Json = False,
) -> None:
    """Run a study for real on this machine: a coordinator and three hospitals, each a process, over TLS on loopback.

    Enrolment, policies, approvals, ledgers, secure aggregation, the witnessed log and the audit are the ones that a
    consortium uses; the study has to be one on the generated notes (simulations/studies/deploy.toml).
    """
    from privet.simulations.deploy import run_deployment as run_deployed

    summary = run_deployed(study, out, lambda line: typer.echo(line) if not as_json else None)
    typer.echo(json.dumps(summary) if as_json else f"summary  {out / 'summary.json'}")


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep file (TOML).", metavar="SWEEP")],
    out: Annotated[Path | None, typer.Option(help="The sweep's directory, new or begun; default runs/<name>.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one run at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Simulate a study over many settings. After an interruption, the same command goes on where it was."""
    from rich.console import Console

    from privet.simulations.runs.sweep import load_sweep, named, run_sweep
    from privet.simulations.terminal.tables import save_sweep_figure, sweep_table

    asked, entries = load_sweep(file)
    console, target = Console(quiet=as_json), out or Path("runs") / file.stem
    result = run_sweep(
        asked,
        entries,
        target,
        lambda entry, row: console.print(f"{named(entry.fields)}: {row['outcome']}, {row['value']}", highlight=False),
        workers,
    )
    console.print(sweep_table(result))
    figure = save_sweep_figure(result, target / "sweep.png")
    if figure is not None:
        console.print(f"figure   {figure}", highlight=False)
    if as_json:
        typer.echo(json.dumps(result))


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Finished run directories, or one study file.", metavar="RUN... | STUDY")
    ],
    out: Annotated[Path | None, typer.Option(help="For a study file: where its runs go.")] = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Compare finished runs; or for a study file, each site alone, all data pooled, and each aggregation."""
    from rich.console import Console

    from privet.simulations.runs.compare import ask, compare_runs, load_question
    from privet.simulations.terminal.tables import answer_table, runs_table

    console = Console(quiet=as_json)
    if len(runs) == 1 and runs[0].is_file():
        question = load_question(runs[0])
        result = ask(
            question,
            out or Path("runs") / f"{runs[0].stem}-compared",
            lambda method: (
                lambda report: console.print(
                    f"{method}, {report.arm}: round {report.round} of {report.rounds}", style="dim", highlight=False
                )
            ),
            workers,
        )
        console.print(answer_table(result))
    else:
        if out is not None:
            raise StudyError("--out goes with one study file", "finished runs are only read")
        result = compare_runs(runs)
        console.print(runs_table(result))
    if as_json:
        typer.echo(json.dumps(result))


def predict(
    run: RunPath,
    text: Annotated[list[str], typer.Option(help="A text, sentence or prompt; may be repeated.")],
    as_json: Json = False,
) -> None:
    """Use a run's adapter: classify, tag or answer texts."""
    from privet.simulations.predict import predict_text as answer

    results = answer(run, text)
    if as_json:
        typer.echo(json.dumps(results))
        return
    for result in results:
        typer.echo(_readable(result))


def _readable(result: dict[str, Any]) -> str:
    if "probabilities" in result:
        best = sorted(result["probabilities"].items(), key=lambda item: -item[1])[:3]
        return "   ".join(f"{label} {probability:.1%}" for label, probability in best)
    if "tags" in result:
        return " ".join(
            f"{w}/{tag}" if tag != "O" else w for w, tag in zip(result["words"], result["tags"], strict=True)
        )
    return str(result["answer"])
