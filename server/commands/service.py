"""The coordinator's commands for its service and its studies."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.clock import now
from privet.common.errors import StateError, StudyError, TooFewSitesError
from privet.common.jsonlog import log_as_json
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
from privet.common.pki.commands import ask_passphrase, new_passphrase, read_passphrase
from privet.common.progress import doing, folded, in_directory, ticking
from privet.server.commands.enrolment import write_genesis
from privet.server.rounds.timing import Timing

_INTERRUPTED = 130
# Seconds between two looks whether the service still listens.
_LOOKS = 15.0

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds
    from privet.server.commands.screen import Screen
    from privet.server.consortium.coordinator import Coordinator
    from privet.server.studies import StudyRun


def serve(directory: Directory = HERE, passphrase_file: Passphrase = None) -> None:
    """Serve the sites: enrolment, the round log, and the messages of studies. Runs until you stop it.

    The service issues certificates, so it needs the passphrase of the root's key when it starts, and keeps the key in
    memory. Run a study at the same time with `privet coordinator run`, in another terminal. Both may be stopped and
    started at any time.
    """
    log_as_json()  # the first line too, which comes before the imports that take seconds
    logging.getLogger("privet").info("opening the consortium in %s", directory)
    from privet.common.pki.addresses import port_lines
    from privet.server.network.service import serve_until

    made, stop = _open(directory, passphrase_file), threading.Event()
    _ = made.authority  # ask for the passphrase before anything is served

    def ready() -> None:
        for line in port_lines(made.settings.address, made.settings.enrolment, made.settings.fleet):
            typer.echo(folded(line, 16))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve_until(made, now, stop, ready)


@doing("Opening {study} for a run")
def run(
    study: StudyFile,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the adapter to start from, made with `privet adapter`.  [default: made here, from the "
            "base model on this machine]"
        ),
    ] = None,
    continued: Annotated[
        str | None,
        typer.Option("--continue", metavar="RUN", help="Start from the adapter that this run released."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.  [default: the name of the study]")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Found the consortium without asking, if it is not founded yet.")
    ] = False,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    metrics_port: RunMetricsPort = 0,
    gather: GatherTime = Timing.gathering,
    round_time: RoundTime = Timing.round,
    step_time: StepTime = Timing.step,
) -> None:
    """Run a study with the sites that consent to it, from a start adapter to a release.

    Start the service first: `privet coordinator serve`. The first run founds the consortium, after asking: its members
    become the first leaf of the round log, once for ever.

    While it waits, the command says for which sites, and why. If the run stops, continue it with `privet coordinator
    resume`; to give it up, use `privet coordinator withdraw`.
    """
    from privet.common.log.statements import StatedFloor
    from privet.common.study.study import check_shareable, load_study
    from privet.server.rounds.quality import unmeasured_sentence

    made, asked = _open(directory, passphrase_file), load_study(study)
    check_shareable(asked)
    typer.echo(f"study {asked.name}: {asked.rounds} rounds, {asked.cohort.min_sites} sites or more", err=True)
    if unmeasured := unmeasured_sentence(asked):
        typer.echo(folded(unmeasured, err=True), err=True)
    founds = not made.members.founded()
    if founds:
        confirm_founding(made, asked.cohort.min_sites, yes=yes)
    from privet.server import studies

    studies.check_new(made, asked, study)
    chosen = studies.free_name(made, name or asked.name)
    if continued is not None:
        adapter = _release_of(made, continued, adapter)
    with starting_adapter(made, study, adapter) as start:
        if founds:
            write_genesis(made, StatedFloor())
        begun = studies.begin(made, asked, start, chosen, lambda text: typer.echo(text, err=True))
    if begun.name != (name or asked.name):
        typer.echo(f"A run of that name was withdrawn, and the round log keeps its name: this one is {begun.name}.")
    typer.echo(folded(f"run {begun.name}: study {asked.digest}", 2))
    _play(begun, Timing(gather, round_time, step_time), metrics_port)


def _release_of(made: Coordinator, name: str, adapter: Path | None) -> Path:
    """Return the directory of what a run released. Its terms must not have ended."""
    from privet.common.study.terms import check_until
    from privet.server.consortium.registry import entry_of
    from privet.server.rounds.run_log import RELEASE
    from privet.server.rounds.state import RunDirectory

    if adapter is not None:
        raise StudyError("--continue: expected no --adapter beside it", "leave one of them out")
    run = made.directory / "runs" / entry_of(made, name).name
    check_until(RunDirectory.open(run).study, now())
    return run / RELEASE


def confirm_founding(made: Coordinator, needed: int, *, yes: bool) -> None:
    """Say what founding the consortium now would fix, and ask whether to.

    Args:
        made: The coordinator.
        needed: Sites that the study needs.
        yes: Whether it was agreed to on the command line.

    Raises:
        StateError: There are fewer members than the study needs, nobody agreed, or there is no terminal to ask at.
    """
    from privet.server.consortium.membership import next_quorum

    rows = made.members.rows()
    members = [row.keys.site for row in rows if row.state == "member"]
    pending = [row.keys.site for row in rows if row.state == "pending"]
    if len(members) < needed:
        who = ", ".join(members) or "none"
        raise StateError(
            f"the consortium is not founded yet: the study needs {needed} sites, but the members are {who}"
            + (f"; not approved yet: {', '.join(pending)}" if pending else ""),
            f"approve more sites with `privet coordinator approve {' '.join(pending) or 'SITE'}`, or found "
            "it with fewer with `privet coordinator found`",
        )
    quorum = next_quorum(len(members), made.settings.colluding)
    text = (
        f"The consortium is not founded yet. This run founds it, once for ever, with {len(members)} members: "
        f"{', '.join(members)}.\n{quorum} of them must cosign the round log. Sites that you approve later are added to "
        "the log." + (f"\nNot approved yet: {', '.join(pending)}." if pending else "")
    )
    typer.echo(folded(text, err=True), err=True)
    if yes:
        return
    hint = "add --yes to found it with this run, or run `privet coordinator found` once"
    if not sys.stdin.isatty():
        raise StateError("the consortium is not founded, and there is no terminal to ask whether to found it", hint)
    if not typer.confirm("Found the consortium with these members?", err=True):
        raise StateError("the consortium was not founded, so no run has begun", hint)


@contextmanager
def starting_adapter(made: Coordinator, study: Path, given: Path | None) -> Iterator[Path]:
    """Yield the directory of the adapter that a study starts from: the given one, or one that is made here for now.

    Raises:
        StateError: It cannot be made here, for the reason that `privet adapter` gives.
    """
    from privet.common.audit.release import ADAPTER
    from privet.common.study.adapter import NO_CONFIG, Adapter, AdapterSpec
    from privet.common.study.study import load_study

    if given is not None:
        yield given
        return
    if load_study(study).kind == "statistics":
        with tempfile.TemporaryDirectory(dir=made.directory, prefix=".start-") as folder:
            (Path(folder) / ADAPTER).write_bytes(Adapter(AdapterSpec(()), {}).data)  # which takes no base
            (Path(folder) / "adapter_config.json").write_text(NO_CONFIG, encoding="utf-8")
            yield Path(folder)
        return
    typer.echo("making the adapter that the study starts from ...", err=True)
    with tempfile.TemporaryDirectory(dir=made.directory, prefix=".start-") as folder:
        start = Path(folder) / "start"
        # Another process: the coordinator itself never loads a model. -P: it imports nothing from the present
        # directory, where the study may have arrived together with files of others.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "privet", "adapter", str(study), str(start)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            told = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise StateError(
                "the adapter that the study starts from cannot be made on this machine: "
                + (told[0] if told else f"`privet adapter` ended with exit code {done.returncode}"),
                f"where the base model is, run `privet adapter {study} start --base DIRECTORY`; then add "
                "--adapter start to this command",
            )
        yield start


@doing("Opening run {run}")
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

    Continues after the last closed round. Nothing is released or charged twice. Under secure aggregation the number of
    an aborted round is spent, so the run continues with the next one.
    """
    from privet.server import studies

    try:
        found = studies.reopen_study(_open(directory, passphrase_file), run)
        path, (number, ended) = found.directory.path, found.directory.standing()
        if ended and (path / "release").is_dir():  # it appears last, once a quorum has cosigned it
            typer.echo(f"run {run} ended after round {number}; nothing was changed, and no site was asked")
            _what_follows(path, run)
            return
        _play(found, Timing(gather, round_time, step_time), metrics_port)
    except studies.WithdrawnError as error:  # no failure: a service that resumes runs must not try again
        typer.echo(in_directory(f"{error.message}; {error.hint}", directory))


@doing("Asking run {run} to stop")
def stop(
    run: RunName,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Stop a run after its current round; while it waits for consent, at once. `resume` continues it."""
    from privet.server import studies
    from privet.server.rounds.wait import CONSENT

    found = studies.reopen_study(_open(directory, passphrase_file), run)
    wait = found.directory.waiting
    found.stop()
    if wait is None:
        said = f"no process of this machine runs {run}, so nothing is left to stop"
    elif wait.stage == CONSENT:
        said = f"run {run} waits for consent, and stops within seconds"
    else:
        said = f"run {run} stops after its current round"
    following = in_directory(f"next: privet coordinator resume {run}", directory)
    typer.echo(f"{said}\n{following}")


@doing("Opening run {run}")
def withdraw(
    run: RunName,
    reason: Annotated[str, typer.Option(help="Why. The round log shows it if a round has to be aborted.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Give up a run for good, so that its name is free for another: one that nobody consented to, or that failed.

    A round that is open is aborted in the round log. What sites were charged stays charged. A site's operator can give
    back what is reserved for a round that never began there: `privet site cancel SITE STUDY`.
    """
    from privet.server import studies

    found = studies.reopen_study(_open(directory, passphrase_file), run)
    closed = studies.withdraw(found, reason)
    typer.echo(f"run {run} is withdrawn" + ("; its open round was aborted in the round log" if closed else ""))
    if found.directory.withdrawn_begun:
        typer.echo(
            "What sites have charged for its rounds stays charged; a site that dropped out before it trained charged "
            "nothing. To start over, change the study's seed: `privet coordinator run` names the command."
        )
    typer.echo(in_directory("next: privet coordinator run STUDY", directory))


@doing("Reading the runs in {directory}")
def status(
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Show the members, the number of connected sites, and the state of each run."""
    from privet.server.overview import as_lines
    from privet.server.overview import consortium_status as look

    found = look(_open(directory, passphrase_file))
    typer.echo(json.dumps(found) if as_json else in_directory("\n".join(as_lines(found)), directory))


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
    them afterwards; a round that is left open is aborted. Each site's operator has to confirm the new charter by its
    words. If the command was interrupted, run it again.
    """
    from privet.server.consortium.coordinator import encrypt_root

    if keys and passphrase:
        raise StudyError("--keys and --passphrase: expected one of them", "run the command twice")
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
    typer.echo("A running service replaces its keys and certificates now. Otherwise it does so when it starts.")


def _rotate_keys(made: Coordinator) -> None:
    from privet.server.consortium.rotation import rotate_keys
    from privet.server.studies import end_rounds

    found = rotate_keys(made, partial(end_rounds, made))
    typer.echo(f"log          leaf {found.leaf} replaces the keys of log and statements; the release key is new, too")
    typer.echo(f"words        {found.charter.words}")
    typer.echo(
        "Call the operator of each site, and read these words. They are typed into `privet site trust SITE`. No round "
        f"opens before {found.needed} of {found.members} sites have confirmed.\n"
        "The running service names the new keys within a second. The old keys are gone from keys/: destroy their "
        "backups, and back up keys/ anew."
    )
    typer.echo(in_directory("next: privet coordinator resume RUN, for each run that you stopped", made.directory))


def _play(begun: StudyRun, timing: Timing, metrics_port: int) -> None:
    from privet.server.commands.screen import Screen
    from privet.server.network.nodes import listens
    from privet.server.rounds.quality import course
    from privet.server.rounds.statements import lost_in_a_row
    from privet.server.studies import StoppedError

    screen = Screen()
    watched = _Service(begun.made, screen)
    watched.look()
    try:
        with screen.ticking(), ticking(_LOOKS, watched.look, "service"):
            state = replace(begun, tell=screen.tell).play(timing, screen.say, metrics_port)
    except StoppedError as stopped:
        typer.echo(in_directory(f"{stopped.message}; {stopped.hint}", begun.made.directory))
        return
    except TooFewSitesError as error:
        reached = begun.directory.load()
        if not listens(begun.made.settings):
            service = in_directory("privet coordinator serve", begun.made.directory)
            error.hint = f"start the coordinator's service in another terminal, `{service}`"
        if not reached.stopped:
            again = f"continue with `privet coordinator resume {begun.name}`, or give the run up with "
            again += f"`privet coordinator withdraw {begun.name} --reason TEXT`"
            error.hint = f"{error.hint}; {again}" if error.hint else again
        elif lost_in_a_row(reached) < len(reached.statements):
            error.hint = f"{error.hint}: `privet coordinator resume {begun.name}`"
        raise
    except KeyboardInterrupt:
        said = (
            "Interrupted. Closed rounds are saved. A round that was open is lost, and stays spent at the sites that "
            f"had charged it; next time, `privet coordinator stop {begun.name}` ends a run after its open round.\n"
            f"next: privet coordinator resume {begun.name}"
        )
        typer.echo(folded(in_directory(said, begun.made.directory), err=True), err=True)
        raise typer.Exit(_INTERRUPTED) from None
    run = begun.directory.path
    if begun.directory.study.gate is not None and not (run / "release").is_dir():
        typer.echo(folded(course(state.statements)))
        typer.echo(f"ended after round {state.round} with a candidate, which has to pass the gate of its study")
        typer.echo(in_directory(f"next: privet gate status {begun.name}", begun.made.directory))
        return
    typer.echo(f"ended after round {state.round}: {run / 'release'}")
    typer.echo(folded(course(state.statements)))
    _what_follows(run, begun.name)


def _what_follows(path: Path, run: str) -> None:
    typer.echo(f"next: privet report {path} --out {run}.html")
    typer.echo(f"then: privet audit bundle {path} --out {run}.tar")


class _Service:
    """Says when nothing listens where sites connect, and when it does again. Nothing leaves this machine."""

    def __init__(self, made: Coordinator, screen: Screen) -> None:
        self._made, self._screen, self._listened = made, screen, True

    def look(self) -> None:
        """Look, and say what has changed."""
        from privet.server.network.nodes import listens

        listened, self._listened = self._listened, listens(self._made.settings)
        if self._listened == listened:
            return
        fleet, directory = self._made.settings.fleet, self._made.directory
        if self._listened:
            self._screen.note(f"The service listens at {fleet}.")
            return
        self._screen.note(
            f"Nothing listens at {fleet} on this machine, so no site can connect. In another terminal, start the "
            f"service: `privet coordinator serve -C {directory}`"
        )


def _open(directory: Path, passphrase_file: Path | None) -> Coordinator:
    from privet.server.consortium.coordinator import open_coordinator

    return open_coordinator(directory, read_passphrase(passphrase_file), ask_passphrase)
