"""Studies at a coordinator: begin, run, resume and withdraw them, and stop them between rounds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from privet.common.audit.release import ADAPTER
from privet.common.clock import now
from privet.common.doors.metrics import MetricsServer
from privet.common.errors import PrivetError, StateError, StudyError
from privet.common.log.agreement import RoundStatement
from privet.common.log.encoding import one_line, shown
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.sections import NAME_PATTERN
from privet.common.study.study import Study
from privet.common.study.terms import check_permit
from privet.server.consortium.candidates import log_reviews
from privet.server.consortium.coordinator import Coordinator, log_members
from privet.server.consortium.registry import check_in_use, log_decisions
from privet.server.log.journal import Journal, open_journal
from privet.server.network.deployed import run_over_flower
from privet.server.network.nodes import listens
from privet.server.network.service import admit_members, link_of, owners_of
from privet.server.rounds.folder import STOP
from privet.server.rounds.quality import quality
from privet.server.rounds.rounds import Observer, given_up
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from privet.server.rounds.wait import CONSENT, Wait

_CONFIG = "adapter_config.json"
# Seconds between two notes of what a stage waits for, while it waits for more than a few sites.
_NOTED, _FEW = 0.5, 50
_UNSERVED = "not reachable, as the coordinator's service is not running"


class StoppedError(PrivetError):
    """A run stopped after a whole round, because its operator asked for it."""

    exit_code = 0


class WithdrawnError(StateError):
    """A run was given up by its operator, so it does not go on."""


class RunMetrics:
    """The metrics of a run, for Prometheus on loopback."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rounds = Counter("privet_run_rounds", "Rounds by how they ended", ["end"], registry=self.registry)
        self._seconds = Histogram(
            "privet_run_round_seconds", "Duration of rounds", buckets=(1, 10, 60, 600, 3600), registry=self.registry
        )
        self._dropouts = Counter("privet_run_dropouts", "Sites that dropped out", ["site"], registry=self.registry)
        self._epsilon = Gauge("privet_run_epsilon", "Epsilon spent in this run", ["site"], registry=self.registry)

    def closed(self, statement: RoundStatement) -> None:
        """Count a closed or aborted round."""
        self._rounds.labels(statement["type"]).inc()
        self._seconds.observe(statement["seconds"])
        for site in statement["failures"]:
            self._dropouts.labels(site).inc()
        for site, spent in (statement["privacy"] or {}).get("epsilon", {}).items():
            self._epsilon.labels(site).set(spent)


@dataclass(frozen=True)
class StudyRun:
    """A study's run at a coordinator."""

    made: Coordinator
    directory: RunDirectory
    tell: Callable[[Wait], None] = field(default=lambda wait: None)
    """Receives what the run waits for."""

    @property
    def name(self) -> str:
        """Its name, which is also its name in the round log."""
        return self.directory.path.name

    def play(self, timing: Timing, say: Callable[[str], None], metrics_port: int = 0) -> RunState:
        """Run or resume it until it ends.

        Raises:
            As `run_over_flower`; StoppedError: Its operator asked it to stop. WithdrawnError: It was given up.
        """
        link = link_of(self.made.directory)
        metrics = RunMetrics()
        if metrics_port:
            MetricsServer(metrics_port, metrics.registry)
        # A request to stop from an earlier process must not stop this one after its first round.
        (self.directory.path / STOP).unlink(missing_ok=True)
        with open_journal(self.made.log_directory, self.made.keys) as journal:
            self.check_going()  # it may have been withdrawn while this process waited for the log
            public = self.made.directory / "public"
            log = RunLog(journal, self.directory, self.name, public, lambda: self._keep_in_step(journal))
            self._keep_in_step(journal)
            admit_members(self.made, link)
            owners = partial(owners_of, self.made, link)
            try:
                observe, tell = self._observer(metrics, say), self._noting()
                return run_over_flower(log, link, observe, timing, owners, tell, self._check_stop)
            finally:
                left = log.left if self.name in journal.history.runs else None
                self.directory.note_wait(None, 0 if left is None else left.round)

    def _noting(self) -> Callable[[Wait], None]:
        """Return what shows for whom the run waits, also to `privet coordinator status`."""
        noted = "", 0, 0.0

        def tell(wait: Wait) -> None:
            nonlocal noted
            now = time.monotonic()
            if wait.stage == CONSENT and not listens(self.made.settings):  # the link state learns of it a minute late
                wait = replace(wait, missing={name: why or _UNSERVED for name, why in wait.missing.items()})
            # Each note is a file, and a cohort of thousands answers within seconds. The last few are always noted.
            if noted[:2] != (wait.stage, wait.round) or len(wait.missing) <= _FEW or now - noted[2] >= _NOTED:
                noted = wait.stage, wait.round, now
                self.directory.note_wait(wait)
            self.tell(wait)

        return tell

    def _keep_in_step(self, journal: Journal) -> None:
        log_members(self.made, journal)
        log_decisions(self.made, journal)
        log_reviews(self.made, journal)
        if journal.history.genesis is not None:
            # Before anybody consents, a site can compare the study that it is asked to approve with the log.
            journal.sign_head()

    def _observer(self, metrics: RunMetrics, say: Callable[[str], None]) -> Observer:
        def closed(statement: RoundStatement, adapter: Adapter) -> None:
            metrics.closed(statement)
            say(line_of(statement, self.directory.study.rounds))
            self._check_stop()

        return closed

    def _check_stop(self) -> None:
        """Raise `StoppedError` if the run's operator asked it to stop. No round is under way."""
        if not self.directory.stopping:
            return
        number, ended = self.directory.standing()
        if ended:
            raise StoppedError(
                f"run {self.name} stopped after its last round, before its release",
                f"make the release with `privet coordinator resume {self.name}`",
            )
        raise StoppedError(
            f"run {self.name} stopped {f'after round {number}' if number else 'before its first round'}",
            f"continue it with `privet coordinator resume {self.name}`",
        )

    def check_going(self) -> None:
        """Check that the run was not given up. Raises `WithdrawnError` if it was."""
        withdrawn = self.directory.withdrawn
        if withdrawn is not None:
            raise WithdrawnError(
                f"run {self.name} was withdrawn: {withdrawn}", "begin a new one with `privet coordinator run STUDY`"
            )

    def stop(self) -> None:
        """Ask the process that runs it to stop after the current round. Raises `StateError` if the run has ended."""
        self.directory.ask_to_stop()


def free_name(made: Coordinator, name: str) -> str:
    """Return the name of a new run: the one asked for, with a number if runs of that name were withdrawn.

    The round log has each name once, also that of a withdrawn run.

    Raises:
        StudyError: It is no name of a run, which is also a directory and a name in the round log.
        StateError: A run of this name exists, and was not withdrawn.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise StudyError(
            f"--name: expected 1 to 63 lower-case letters, digits and dashes, found {name!r}",
            "choose such a name, for example --name flu-2",
        )
    number, chosen = 1, name
    while (path := made.directory / "runs" / chosen).is_dir() and any(path.iterdir()):
        found = RunDirectory.open(path)
        if found.withdrawn is None and found.load().stopped:
            raise StateError(
                f"run {chosen} exists already, and has ended",
                f"choose another name for this study, such as `privet coordinator run STUDY --name {chosen}-2`",
            )
        if found.withdrawn is None:
            raise StateError(
                f"run {chosen} exists already",
                _taken(chosen),
            )
        number += 1
        chosen = f"{name}-{number}"
    return chosen


def _taken(name: str) -> str:
    return (
        f"choose another --name, continue it with `privet coordinator resume {name}`, or give it up with "
        f"`privet coordinator withdraw {name} --reason TEXT`"
    )


def check_new(made: Coordinator, study: Study, file: Path = Path("study.toml")) -> None:
    """Check that no other run is of this very study: sites release each round of a study once.

    A run that was withdrawn before its first round does not count.

    Args:
        made: The coordinator.
        study: The study.
        file: Its file, for the hint.

    Raises:
        StateError: There is one.
        RefusedError: The study's permit has expired.
    """
    check_permit(study, now())
    for path in sorted((made.directory / "runs").glob("*/study.json")):
        run, name = RunDirectory.open(path.parent), path.parent.name
        if run.study.digest != study.digest:
            continue
        if run.withdrawn is None and not run.standing()[1]:
            raise StateError(
                f"run {name} is of this very study, and has not ended",
                f"continue it with `privet coordinator resume {name}`, or give it up with `privet coordinator withdraw "
                f"{name} --reason TEXT`",
            )
        if run.withdrawn is None or run.withdrawn_begun:
            withdrawn = "" if run.withdrawn is None else ", which was withdrawn"
            raise StateError(
                f"this very study was run before, as {name}{withdrawn}; sites release each round of a study once, so "
                "they would refuse it",
                f"make the same study with another seed: {_again(made, study, file)}. The sites approve it anew",
            )


def _again(made: Coordinator, study: Study, file: Path) -> str:
    """Return the command that makes a study again under a name that no run has, with a seed of its own."""
    number = 2
    while (
        (made.directory / "runs" / (name := f"{study.name[:58]}-{number}")).exists()
        or (out := file.with_name(f"{name}.toml")).exists()
    ):  # fmt: skip
        number += 1
    seed = (study.seed + number - 1) % 2**53
    return f"`privet new --from {quote(str(file))} --seed {seed} --name {name} --out {quote(str(out))}`"


def begin(
    made: Coordinator, study: Study, adapter: Path, name: str, say: Callable[[str], None] = lambda text: None
) -> StudyRun:
    """Create the directory of a run, from an adapter that `privet adapter` made for the study, or from a release.

    Args:
        made: The coordinator.
        study: The study.
        adapter: Directory of the adapter.
        name: The run's name.
        say: Receives a note about the adapter.

    Raises:
        StateError: The adapter cannot be read, is retired or revoked, or a directory of this name exists.
        ProtocolError: The adapter file is not a valid adapter.
    """
    try:
        data = (adapter / ADAPTER).read_bytes()
        config = (adapter / _CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "make one with `privet adapter STUDY DIRECTORY`, on a machine that has the base model"
        raise StateError(
            f"{adapter} has no adapter: {ADAPTER} or {_CONFIG} cannot be read ({type(error).__name__})", hint
        ) from None
    start = Adapter.read(read_layout(data), data)
    start.check_finite("the adapter to start from")
    check_in_use(made, start.digest, say)
    # Another command may have taken the name since it was found to be free.
    return StudyRun(made, RunDirectory.create(made.directory / "runs" / name, study, start, config, _taken(name)))


def reopen_study(made: Coordinator, name: str) -> StudyRun:
    """Return a run. Raises `StateError` if there is none of this name, and `WithdrawnError` if it was withdrawn."""
    if not re.fullmatch(NAME_PATTERN, name) or not (made.directory / "runs" / name).is_dir():
        names = sorted(path.name for path in (made.directory / "runs").glob("*") if path.is_dir())
        raise StateError(
            f"this coordinator has no run {name}; its runs are: {', '.join(names) or 'none yet'}",
            "name one of its runs, or begin one with `privet coordinator run STUDY`",
        )
    run = StudyRun(made, RunDirectory.open(made.directory / "runs" / name))
    run.check_going()
    return run


def withdraw(run: StudyRun, reason: str) -> bool:
    """Give up a run for good, and return whether a round had to be aborted for it.

    No statement of a new kind is needed. A round that may have reached sites is aborted in the log, with the reason;
    what it cost stays charged. The log keeps the run without an end, as it keeps one that nobody resumes.

    Raises:
        StateError: The run has ended, another process plays it or has the round log open, or log and state differ.
    """
    said, aborted_one, begun = f"the coordinator withdrew the run: {one_line(reason)}", False, False
    busy = f"stop it with `privet coordinator stop {run.name}`, wait until it has ended, and run this command again"
    with run.directory.locked(busy), open_journal(run.made.log_directory, run.made.keys) as journal:
        state = run.directory.load()
        if state.stopped:
            raise StateError(
                f"run {run.name} has ended, so it cannot be withdrawn",
                "begin another run with `privet coordinator run STUDY`",
            )
        log = RunLog(journal, run.directory, run.name, run.made.directory / "public")
        if run.name in journal.history.runs:
            open_before = log.left is not None
            log.settle(state, partial(given_up, run.directory.study, reason=said))
            aborted_one = open_before and log.left is None
            # All but one that is still open, which waited for cosignatures. The state counts no aborted plain round.
            begun = len(log.entry.rounds) > (log.left is not None)
            journal.sign_head()
        # Last: until here, the run can be resumed.
        run.directory.withdraw(one_line(reason), begun=begun)
    return aborted_one


def end_rounds(made: Coordinator, journal: Journal) -> None:
    """Abort the rounds that the log has open, so that its keys can be rotated. Their runs can be resumed.

    Whoever holds the log's lock knows that no process plays a run. A round that waits for cosignatures is aborted, too:
    sites may be unable to give any before the keys are rotated.

    Raises:
        StateError: A run's directory is missing, in use, or does not fit the log.
    """
    for name, run in list(journal.history.runs.items()):
        if run.open is None:
            continue
        directory = RunDirectory.open(made.directory / "runs" / name)
        with directory.locked():
            log = RunLog(journal, directory, name, made.directory / "public")
            give_up = partial(given_up, directory.study, reason="the keys of log and coordinator are rotated")
            state = log.settle(directory.load(), give_up)
            if log.left is not None:
                log.give_up(state, give_up)
            directory.note_wait(None)


def line_of(statement: RoundStatement, rounds: int | None = None) -> str:
    """Return one line of text about a round, and one for each missing site, with its own reason.

    With the study's number of `rounds`, an aborted round also says how many are left.
    """
    number, seconds = statement["round"], statement["seconds"]
    if statement["type"] == "round-abort":
        reason = "\n  ".join(shown(line.strip()) for line in statement["reason"].splitlines())
        left = "" if rounds is None else f"\n  {_left(number, rounds)}"
        return f"round {number}: aborted after {seconds:.0f} s: {reason}{left}"
    spent = max(((statement["privacy"] or {}).get("epsilon") or {}).values(), default=None)
    cost = "" if spent is None else f", epsilon so far at most {spent:.3f}"
    lost = len(statement["failures"])
    missing = f", {lost} missing" if lost else ""
    why = "".join(f"\n  {site}: {shown(reason)}" for site, reason in sorted(statement["failures"].items()))
    measured = quality(statement.get("metrics"))
    before = f"; before it, {measured}" if measured else ""
    return f"round {number}: {len(statement['survivors'])} sites in {seconds:.0f} s{missing}{cost}{before}{why}"


def _left(number: int, rounds: int) -> str:
    """Return a sentence about what an aborted round leaves of the study."""
    left = rounds - number
    count = f"{left} {'is' if left == 1 else 'are'} left" if left else "none is left"
    return f"Number {number} is spent: no site runs it again. Of the study's {rounds} rounds, {count}."
