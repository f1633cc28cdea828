"""The coordinator's commands for its service and its studies."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.clock import now
from privet.common.errors import ProtocolError
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
from privet.common.study.study import check_shareable, load_study
from privet.server.commands.enrolment import ask_passphrase, new_passphrase, read_passphrase
from privet.server.consortium.coordinator import Coordinator, encrypt_root, open_coordinator
from privet.server.consortium.rotation import rotate_keys
from privet.server.rounds.timing import Timing

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds
    from privet.server.studies import StudyRun


def serve(directory: Directory = HERE, passphrase_file: Passphrase = None) -> None:
    """Serve the sites: enrolment, the round log, and the messages of studies. Runs until you stop it.

    The service issues certificates, so it needs the passphrase of the root's key when it starts, and keeps the key in
    memory. Run a study at the same time with `privet coordinator run`, in another terminal. Both may be stopped and
    started at any time.
    """
    from privet.server.network.service import serve_until

    made, stop = _open(directory, passphrase_file), threading.Event()
    _ = made.authority  # ask for the passphrase before anything is served
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve_until(made, now, stop)


def run(
    study: StudyFile,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter to start from, made with `privet adapter`.")],
    name: Annotated[str | None, typer.Option(help="Name of the run.  [default: the name of the study]")] = None,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    metrics_port: RunMetricsPort = 0,
    gather: GatherTime = Timing.gathering,
    round_time: RoundTime = Timing.round,
    step_time: StepTime = Timing.step,
) -> None:
    """Run a study with the sites that consent to it, from a start adapter to a release.

    Start the service first: `privet coordinator serve`. If the run stops, continue it with `privet coordinator resume`.
    """
    from privet.server import studies

    made, asked = _open(directory, passphrase_file), load_study(study)
    check_shareable(asked)
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
    """Continue a run that was stopped or killed, or whose sites went offline.

    Continues after the last closed round. Nothing is released or charged twice.
    """
    from privet.server import studies

    found = studies.reopen_study(_open(directory, passphrase_file), run)
    _play(found, Timing(gather, round_time, step_time), metrics_port)


def stop(
    run: RunName,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Stop a run after its current round. Continue it with `privet coordinator resume`."""
    from privet.server import studies

    studies.reopen_study(_open(directory, passphrase_file), run).stop()
    typer.echo(f"run {run} stops after its current round\nnext: privet coordinator resume {run}")


def status(
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Show the members, the number of connected sites, and the state of each run."""
    from privet.server.overview import as_lines
    from privet.server.overview import consortium_status as look

    found = look(_open(directory, passphrase_file))
    typer.echo(json.dumps(found) if as_json else "\n".join(as_lines(found)))


def rotate(
    directory: Directory = HERE,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Change the passphrase of the root's key instead, or give it one.")
    ] = False,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", help="Replace the keys of log, statements and releases instead. Every site must confirm."
        ),
    ] = False,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File that holds the new passphrase.  [default: typed twice]"),
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Replace the TLS keys and certificates of the service, within a second if it is running.

    Sites need not do anything, because they trust the root certificate. A stolen old key works until its certificate
    expires, after 7 days at most.

    With --keys, a statement in the round log replaces the keys that the charter names. Stop runs before, and resume
    them afterwards. Each site's operator has to confirm the new charter by its words. If the command was interrupted,
    run it again.
    """
    if keys and passphrase:
        raise ProtocolError("--keys and --passphrase: expected one of them", "run the command twice")
    made = _open(directory, passphrase_file)
    if passphrase:
        _ = made.authority  # before a new passphrase is asked for
        encrypt_root(made, new_passphrase(new_passphrase_file))
        typer.echo("The root's key is encrypted under the new passphrase. Backups hold the key under the old one.")
        return
    if keys:
        _rotate_keys(made)
        return
    made.rotate(now())
    typer.echo("The service replaces its keys and certificates: now if it is running, otherwise when it starts.")


def _rotate_keys(made: Coordinator) -> None:
    found = rotate_keys(made)
    typer.echo(f"log          leaf {found.leaf} replaces the keys of log and statements; the release key is new, too")
    typer.echo(f"words        {found.charter.words}")
    typer.echo(
        "Call the operator of each site, and read these words. They are typed into `privet site trust SITE`. No round "
        f"opens before {found.needed} of {found.members} sites have confirmed.\n"
        "The running service names the new keys within a second. The old keys are gone from keys/: destroy their "
        "backups, and back up keys/ anew."
    )
    typer.echo("next: privet coordinator resume RUN, for each run that you stopped")


def _play(begun: StudyRun, timing: Timing, metrics_port: int) -> None:
    from privet.server.studies import StoppedError

    try:
        state = begun.play(timing, typer.echo, metrics_port)
    except StoppedError as stopped:
        typer.echo(f"{stopped.message}; {stopped.hint}")
        return
    typer.echo(f"ended after round {state.round}: {begun.directory.path / 'release'}")


def _open(directory: Path, passphrase_file: Path | None) -> Coordinator:
    return open_coordinator(directory, read_passphrase(passphrase_file), ask_passphrase)
