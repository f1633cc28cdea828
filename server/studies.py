"""Studies at a coordinator: begin, run, resume, and stop them between rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from privet.common.audit.release import ADAPTER
from privet.common.doors.metrics import MetricsServer
from privet.common.errors import PrivetError, StateError
from privet.common.log.agreement import RoundStatement
from privet.common.log.encoding import one_line
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study
from privet.server.consortium.coordinator import Coordinator, log_members
from privet.server.log.journal import Journal, open_journal
from privet.server.network.deployed import run_over_flower
from privet.server.network.service import admit_members, link_of, owners_of
from privet.server.rounds.rounds import Observer
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing

_CONFIG, _STOP = "adapter_config.json", "stop"


class StoppedError(PrivetError):
    """A run stopped after a whole round, because its operator asked for it."""

    exit_code = 0


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

    @property
    def name(self) -> str:
        """Its name, which is also its name in the round log."""
        return self.directory.path.name

    def play(self, timing: Timing, say: Callable[[str], None], metrics_port: int = 0) -> RunState:
        """Run or resume it until it ends. Raises as `run_study`; `StoppedError` if its operator asked it to stop."""
        link = link_of(self.made.directory)
        metrics = RunMetrics()
        if metrics_port:
            MetricsServer(metrics_port, metrics.registry)
        # A request to stop from an earlier process must not stop this one after its first round.
        (self.directory.path / _STOP).unlink(missing_ok=True)
        with open_journal(self.made.log_directory, self.made.keys) as journal:
            public = self.made.directory / "public"
            log = RunLog(journal, self.directory, self.name, public, lambda: self._keep_in_step(journal))
            self._keep_in_step(journal)
            admit_members(self.made, link)
            owners = partial(owners_of, self.made, link)
            return run_over_flower(log, link, self._observer(metrics, say), timing, owners)

    def _keep_in_step(self, journal: Journal) -> None:
        log_members(self.made, journal)
        if journal.history.genesis is not None:
            # Before anybody consents, a site can compare the study that it is asked to approve with the log.
            journal.sign_head()

    def _observer(self, metrics: RunMetrics, say: Callable[[str], None]) -> Observer:
        def closed(statement: RoundStatement, adapter: Adapter) -> None:
            metrics.closed(statement)
            say(line_of(statement))
            if (self.directory.path / _STOP).exists():
                raise StoppedError(
                    f"run {self.name} stopped after round {statement['round']}",
                    f"continue it with `privet coordinator resume {self.name}`",
                )

        return closed

    def stop(self) -> None:
        """Ask the process that runs it to stop after the current round."""
        (self.directory.path / _STOP).touch()


def begin(made: Coordinator, study: Study, adapter: Path, name: str) -> StudyRun:
    """Create the directory of a run, from an adapter that `privet adapter` made for the study.

    Raises:
        StateError: A run of this name exists, or the adapter cannot be read.
        ProtocolError: The adapter file is not a valid adapter.
    """
    path = made.directory / "runs" / name
    if path.is_dir() and any(path.iterdir()):
        raise StateError(
            f"run {name} exists already", f"choose another --name, or continue it: `privet coordinator resume {name}`"
        )
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
    return StudyRun(made, RunDirectory.create(path, study, start, config))


def reopen_study(made: Coordinator, name: str) -> StudyRun:
    """Return an existing run. Raises `StateError` if there is no run of this name."""
    return StudyRun(made, RunDirectory.open(made.directory / "runs" / name))


def line_of(statement: RoundStatement) -> str:
    """Return one line of text about a round, and one for each missing site, with its own reason."""
    number, seconds = statement["round"], statement["seconds"]
    if statement["type"] == "round-abort":
        reason = "\n  ".join(one_line(line.strip()) for line in statement["reason"].splitlines())
        return f"round {number}: aborted after {seconds:.0f} s: {reason}"
    spent = max(((statement["privacy"] or {}).get("epsilon") or {}).values(), default=None)
    cost = "" if spent is None else f", epsilon so far {spent:.3f}"
    lost = len(statement["failures"])
    missing = f", {lost} missing" if lost else ""
    why = "".join(f"\n  {site}: {one_line(reason)}" for site, reason in sorted(statement["failures"].items()))
    return f"round {number}: {len(statement['survivors'])} sites in {seconds:.0f} s{missing}{cost}{why}"
