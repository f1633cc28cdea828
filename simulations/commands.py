"""The commands of a researcher: check a study, simulate it, and compare results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.errors import Interrupted, PrivetError, StudyError
from privet.common.files import require_free
from privet.common.options import Json, StudyFile, Workers, require_study
from privet.common.progress import Stages, closing, doing, lasting

if TYPE_CHECKING:
    from privet.simulations.runs.simulate import RoundReport
    from privet.simulations.runs.sweep import SweepRun


def _simulating(study: str | None, resume: str | None, **_: object) -> str:
    if (study is None) == (resume is None):
        return ""
    return f"Resuming {resume}" if study is None else f"Simulating {study}"


@doing("Checking {study}: opening its base, measuring its records")
def check(study: StudyFile, as_json: Json = False) -> None:
    """Check a study file, and print the noise, privacy cost, steps, traffic and memory that follow from it.

    Nothing is trained. The base model must be on this machine; its digest is verified. Where the file says
    what simulated sites train on, the data files of all of them are read too, and everything that `privet simulate
    STUDY` would refuse is named at once.
    """
    require_study(study)
    with lasting():
        from privet.simulations.data.federation import load_plan
        from privet.simulations.runs.inspection import check_simulation
        from privet.simulations.terminal.explain import explain_study

        plan, warnings, host = load_plan(study), list[str](), None
        simulated = plan.simulation.data is not None
        if simulated:
            host = check_simulation(plan, warnings.append).host
        meaning = explain_study(plan, host) | ({"warnings": warnings} if warnings else {})
    if as_json:
        typer.echo(json.dumps(meaning))
        return
    from rich.console import Console

    from privet.server.rounds.quality import unmeasured_sentence
    from privet.simulations.terminal.report import meaning_table
    from privet.simulations.terminal.sentences import check_sentence, path_text

    console = Console()
    console.print(meaning_table(meaning))
    for line in plan.lines():
        console.print(line, style="dim", highlight=False)
    for line in warnings:
        console.print(f"WARNING: {line}", style="yellow", markup=False, highlight=False)
    if unmeasured := unmeasured_sentence(plan.study):
        console.print(unmeasured, style="dim", highlight=False)
    following = f"simulate it with `privet simulate {path_text(study)}`; real sites train it with "
    following += f"`privet coordinator run {path_text(study)}`"
    if meaning.get("cells"):
        following = f"run it with `privet {'simulate' if simulated else 'coordinator run'} {path_text(study)}`"
    elif not simulated:
        following = f"make the adapter that sites start from with `privet adapter {path_text(study)} adapter`"
    typer.echo(closing(check_sentence(meaning), following))


@doing(_simulating)
def simulate(
    study: Annotated[
        Path | None,
        typer.Argument(help="The study file (TOML), with a [simulation] table."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory to create. Default: runs/NAME for a study file NAME.toml.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run directory of an interrupted simulation to continue.")] = None,
    continue_from: Annotated[
        Path | None, typer.Option(help="Directory of a finished run. Training starts from its released adapter.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="memory (train in this process and its workers) or ray (Flower's simulation engine).")
    ] = "memory",
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Train a study over simulated sites, and compare the result with each site alone and with all data pooled.

    Simulated sites draw their noise from a public seed. Their privacy figures are those of the study, but a simulation
    protects nobody.
    """
    if (study is None) == (resume is None):
        raise StudyError(
            f"expected either a study file or --resume with a directory, got {'neither' if study is None else 'both'}",
            "begin with `privet simulate STUDY`, or continue with `privet simulate --resume RUN`",
        )
    with _saying_what_is_kept(resume) as begins:
        _simulate(study, out, resume, continue_from, engine, workers, as_json, begins)


@contextmanager
def _saying_what_is_kept(resume: Path | None) -> Iterator[Callable[[Path], None]]:
    """Where Ctrl-C ends the block, say what the run's directory holds by then, and how to continue.

    Args:
        resume: The directory of a run that began earlier.

    Yields:
        Receives the directory of a new run, which is not there yet.
    """
    runs = [] if resume is None else [resume]
    try:
        yield runs.append
    except KeyboardInterrupt:
        if not any(run.exists() for run in runs):
            raise Interrupted(
                "No run directory was made yet: nothing is kept. To begin again, run the same command again."
            ) from None
        from privet.server.rounds.state import RunDirectory
        from privet.simulations.terminal.sentences import path_text

        try:
            rounds, _ = RunDirectory.open(runs[0]).standing()
        except PrivetError:
            raise Interrupted("To continue, run the same command again.") from None
        kept = "no round is complete yet" if rounds == 0 else f"{rounds} round{'s' * (rounds > 1)} complete and kept"
        raise Interrupted(
            f"{runs[0]}: {kept}; continue with `privet simulate --resume {path_text(runs[0])}`."
        ) from None


def _simulate(
    study: Path | None,
    out: Path | None,
    resume: Path | None,
    continue_from: Path | None,
    engine: str,
    workers: int,
    as_json: bool,
    begins: Callable[[Path], None],
) -> None:
    from privet.simulations.engines.choice import check_engine

    check_engine(engine, workers)
    if study is not None:
        require_study(study)
        from privet.server.rounds.state import TAKEN

        require_free(out or Path("runs") / study.stem, TAKEN)
        begins(out or Path("runs") / study.stem)
    from rich.console import Console

    from privet.simulations.runs.simulate import finished, keeping_only_progress, prepare, reopen, run_simulation
    from privet.simulations.terminal.report import Screen, result_parts, save_figure
    from privet.simulations.terminal.sentences import path_text, result_sentence
    from privet.simulations.terminal.tables import scenario_lines, titled

    console, summary = Console(quiet=as_json), None
    with Stages(quiet=as_json) as stages:
        if resume is not None:
            target, simulated = resume, reopen(resume)
            summary = finished(simulated)
        else:
            assert study is not None  # noqa: S101 - narrows the type; checked above
            target = out or Path("runs") / study.stem
            stages.tell("opening the sites and the base")
            simulated = prepare(
                study,
                target,
                continue_from,
                lambda line: stages.line(line, "yellow" if line.startswith("WARNING") else "dim"),
            )
        done = summary is not None
        if summary is None:
            screen = Screen(stages, simulated)
            with keeping_only_progress(simulated):
                summary = run_simulation(simulated, screen.watch, engine, workers, stages.tell)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for part in result_parts(summary):
        console.print(*titled(part), sep="\n", highlight=False, markup=False)  # site names and [privacy] are no markup
    for line in scenario_lines(summary):
        console.print(line, highlight=False)
    if done:
        typer.echo(f"{target} is finished; nothing was changed")
    elif (figure := save_figure(summary, simulated.path)) is not None:
        typer.echo(f"curves   {target / figure.name}")
    made = "counts.json" if "counts" in summary else "adapter"
    typer.echo(f"{made.partition('.')[0]:<7}  {target / made}")
    typer.echo(closing(result_sentence(summary), f"write a report with `privet report {path_text(target)}`"))


@doing("Deploying a coordinator and three hospitals on this machine, in {out}")
def deploy(
    study: StudyFile,
    out: Annotated[Path, typer.Option(help="Directory to create for all files of the deployment.")] = Path(
        "runs/deploy-demo"
    ),
    as_json: Json = False,
) -> None:
    """Deploy a coordinator and three hospitals on this machine, and run a study over them.

    Each is a process of its own. They connect over TLS on the loopback interface. Enrolment, policies, approvals,
    ledgers, secure aggregation, the witnessed round log and the audit are the same as in a real consortium. The study
    must train on the generated notes, as simulations/studies/deploy.toml does.
    """
    from privet.simulations.deploy import run_deployment as run_deployed

    summary = run_deployed(study, out, lambda line: typer.echo(line) if not as_json else None)
    typer.echo(json.dumps(summary) if as_json else f"summary  {out / 'summary.json'}")


@doing("Sweeping {file}: checking all of its settings")
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep file (TOML).", metavar="SWEEP")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the runs: a new one, or that of this sweep. Default: runs/NAME for NAME.toml."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes. Each simulates one run at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Simulate a study over many settings.

    After an interruption, run the same command again: finished runs are kept, and an interrupted run is resumed.
    """
    from rich.console import Console

    from privet.simulations.runs.sweep import load_sweep, run_sweep
    from privet.simulations.terminal.sentences import arm_name, path_text, sweep_sentence
    from privet.simulations.terminal.tables import save_sweep_figure, sweep_line, sweep_table

    asked, entries = load_sweep(file)
    console, target = Console(quiet=as_json), out or Path("runs") / file.stem
    ended: list[str] = []
    with Stages(quiet=as_json) as stages:
        stages.tell("runs", 0, len(entries))

        def watch(entry: SweepRun, row: Mapping[str, Any]) -> None:
            ended.append(entry.identity)
            stages.line(sweep_line(row))
            stages.tell("runs", len(ended), len(entries))

        def rounds(report: RoundReport) -> None:
            where = f"{arm_name(report.arm)}, round {report.round} of {report.rounds}"
            stages.tell("runs", len(ended), len(entries), where)

        result = run_sweep(asked, entries, target, watch, workers, rounds)
    if as_json:
        typer.echo(json.dumps(result))
        save_sweep_figure(result, target / "sweep.png")
        return
    console.print(sweep_table(result))
    figure = save_sweep_figure(result, target / "sweep.png")
    if figure is not None:
        typer.echo(f"figure   {figure}")
    best = target / "runs" / (result["best"] or "ID")
    typer.echo(closing(sweep_sentence(result), f"look at a run with `privet report {path_text(best)}`"))


@doing("Comparing {runs}")
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, simulated or of a coordinator; or one study file.", metavar="RUN... | STUDY"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="For a study file: directory of its runs. Default: runs/NAME-compared for NAME.toml."),
    ] = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Compare runs, or the ways to train one study.

    Of runs it shows their figures, and in what their studies differ. Runs of real sites have the figures of their
    validation; only their sites can test them.
    For one study file, the study is simulated with each aggregation method, on each site alone, and on all data pooled.
    After an interruption, run the same command again.
    """
    from rich.console import Console

    from privet.simulations.runs.compare import ask, compare_runs, load_question
    from privet.simulations.terminal.sentences import answer_sentence, arm_name, path_text, runs_sentence
    from privet.simulations.terminal.tables import answer_table, runs_tables, titled

    console = Console(quiet=as_json)
    if len(runs) == 1 and runs[0].is_file():
        question, target = load_question(runs[0]), out or Path("runs") / f"{runs[0].stem}-compared"
        with Stages(quiet=as_json) as stages:
            result = ask(
                question,
                target,
                lambda method: (
                    lambda report: stages.tell(f"{method}, {arm_name(report.arm)}", report.round, report.rounds)
                ),
                workers,
            )
        tables, sentence = [answer_table(result)], answer_sentence(result)
        best = next(iter(question.entries.values()))
        following = f"look at the run with all baselines: `privet report {path_text(target / 'runs' / best.identity)}`"
    else:
        if out is not None:
            raise StudyError(
                "--out: it can be given only if the one argument is an existing study file; "
                f"the arguments are {', '.join(map(str, runs))}",
                "to compare finished runs, leave --out out; otherwise correct the path of the study file",
            )
        result = compare_runs(runs)
        tables, sentence = runs_tables(result), runs_sentence(result)
        following = (
            f"write one page about these runs with `privet report {' '.join(map(path_text, runs))} --out report.html`"
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    console.print(*(each for table in tables for each in titled(table)), sep="\n")
    typer.echo(closing(sentence, following))
