"""The coordinator's commands about its service and its studies."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.clock import now
from privet.common.options import (
    HERE,
    Directory,
    GatherTime,
    Json,
    Passphrase,
    RoundTime,
    RunMetricsPort,
    RunName,
    StepTime,
    StudyFile,
)
from privet.common.study.study import load_study
from privet.server.commands.enrolment import read_passphrase
from privet.server.consortium.coordinator import Coordinator, open_coordinator
from privet.server.rounds.timing import Timing

if TYPE_CHECKING:  # PyTorch comes along, which takes seconds
    from privet.server.studies import StudyRun


def serve(directory: Directory = HERE, passphrase_file: Passphrase = None) -> None:
    """Serve the network: enrolment, the log, and the messages of studies. Runs until it is stopped.

    A study is run beside it, with `privet coordinator run`. Both may be stopped and started at any time.
    """
    from privet.server.network.service import serve_until

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve_until(_open(directory, passphrase_file), now, stop)


def run(
    study: StudyFile,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter to start from; `privet adapter` makes it.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; the study's if not given.")] = None,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    metrics_port: RunMetricsPort = 0,
    gather: GatherTime = Timing.gathering,
    round_time: RoundTime = Timing.round,
    step_time: StepTime = Timing.step,
) -> None:
    """Run a study with the sites that agree to it, from a start adapter to a release. The service has to be running."""
    from privet.server import studies

    made, asked = _open(directory, passphrase_file), load_study(study)
    begun = studies.begin(made, asked, adapter, name or asked.name)
    typer.echo(f"run {begun.name}: study {asked.digest}")
    _play(begun, Timing(gather, round_time, step_time), metrics_port)


def resume(
    run: RunName,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    metrics_port: RunMetricsPort = 0,
    gather: GatherTime = Timing.gathering,
    round_time: RoundTime = Timing.round,
    step_time: StepTime = Timing.step,
) -> None:
    """Go on with a run that was stopped, killed or left alone by its sites. Nothing is released or charged twice."""
    from privet.server import studies

    found = studies.reopen_study(_open(directory, passphrase_file), run)
    _play(found, Timing(gather, round_time, step_time), metrics_port)


def stop(
    run: RunName,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Let a run stop after the round that it is in. It can be resumed."""
    from privet.server import studies

    studies.reopen_study(_open(directory, passphrase_file), run).stop()
    typer.echo(f"run {run} stops after its round")


def status(
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Say who is a member, how many are connected, and how each run stands."""
    from privet.server.overview import as_lines
    from privet.server.overview import consortium_status as look

    found = look(_open(directory, passphrase_file))
    typer.echo(json.dumps(found) if as_json else "\n".join(as_lines(found)))


def rotate(directory: Directory = HERE, passphrase_file: Passphrase = None) -> None:
    """Replace the keys and certificates with which the service speaks TLS, within a second if it is running.

    Sites notice nothing: they trust the root. An old key that somebody copied works until its certificate expires,
    after 7 days at most.
    """
    _open(directory, passphrase_file).rotate(now())
    typer.echo("the service replaces its keys and certificates: at once if it is running, otherwise when it starts")


def _play(begun: StudyRun, timing: Timing, metrics_port: int) -> None:
    from privet.server.studies import StoppedError

    try:
        state = begun.play(timing, typer.echo, metrics_port)
    except StoppedError as stopped:
        typer.echo(f"{stopped.message}; {stopped.hint}")
        return
    typer.echo(f"ended after round {state.round}: {begun.directory.path / 'release'}")


def _open(directory: Path, passphrase_file: Path | None) -> Coordinator:
    return open_coordinator(directory, read_passphrase(passphrase_file))
