"""Studies at a coordinator: begun, run, resumed, stopped between rounds, and looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from privet.common.audit.release import ADAPTER
from privet.common.errors import PrivetError, StateError
from privet.common.log.agreement import RoundStatement
from privet.common.log.encoding import one_line
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study
from privet.server.consortium.coordinator import Coordinator, log_members
from privet.server.log.journal import Journal, open_journal
from privet.server.network.deployed import run_over_flower
from privet.server.network.service import admit_members, link_of
from privet.server.rounds.rounds import Observer, Timing
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState

_CONFIG, _STOP = "adapter_config.json", "stop"


class StoppedError(PrivetError):
    """A run was asked to stop, and has after a whole round."""

    exit_code = 0


class RunMetrics:
    """What a run counts, for Prometheus on loopback."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rounds = Counter("privet_run_rounds", "Rounds by how they ended", ["end"], registry=self.registry)
        self._seconds = Histogram(
            "privet_run_round_seconds", "Duration of rounds", buckets=(1, 10, 60, 600, 3600), registry=self.registry
        )
        self._dropouts = Counter("privet_run_dropouts", "Sites that dropped out", ["site"], registry=self.registry)
        self._epsilon = Gauge("privet_run_epsilon", "Epsilon spent in this run", ["site"], registry=self.registry)

    def closed(self, statement: RoundStatement) -> None:
        """Count a round."""
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
        """Its name, in the log too."""
        return self.directory.path.name

    def play(self, timing: Timing, say: Callable[[str], None], metrics_port: int = 0) -> RunState:
        """Run or resume it until it ends. Raises as `run_study`; `StoppedError` if it was asked to stop."""
        link = link_of(self.made.directory)
        metrics = RunMetrics()
        if metrics_port:
            start_http_server(metrics_port, "127.0.0.1", metrics.registry)
        (self.directory.path / _STOP).unlink(missing_ok=True)
        with open_journal(self.made.log_directory, self.made.keys) as journal:
            public = self.made.directory / "public"
            record = RunLog(journal, self.directory, self.name, public, lambda: self._keep_in_step(journal))
            self._keep_in_step(journal)
            admit_members(self.made, link)
            return run_over_flower(self.directory, link, self._observer(metrics, say), timing, record)

    def _keep_in_step(self, journal: Journal) -> None:
        log_members(self.made, journal)

    def _observer(self, metrics: RunMetrics, say: Callable[[str], None]) -> Observer:
        def closed(statement: RoundStatement, adapter: Adapter) -> None:
            metrics.closed(statement)
            say(line_of(statement))
            if (self.directory.path / _STOP).exists():
                raise StoppedError(
                    f"run {self.name} was stopped after round {statement['round']}", "go on with `coordinator resume`"
                )

        return closed

    def stop(self) -> None:
        """Ask the process that runs it to stop after the round that it is in."""
        (self.directory.path / _STOP).touch()


def begin(made: Coordinator, study: Study, adapter: Path, name: str) -> StudyRun:
    """Make a run's directory, from an adapter that `privet adapter` made for the study.

    Raises:
        StateError: There is a run of this name, or the adapter cannot be read.
        ProtocolError: The adapter is none.
    """
    try:
        data = (adapter / ADAPTER).read_bytes()
        config = (adapter / _CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "make it with `privet adapter STUDY DIRECTORY`, where the base is at hand"
        raise StateError(f"no adapter in {adapter} ({type(error).__name__})", hint) from None
    start = Adapter.read(read_layout(data), data)
    start.check_finite("the adapter to start from")
    return StudyRun(made, RunDirectory.create(made.directory / "runs" / name, study, start, config))


def reopen_study(made: Coordinator, name: str) -> StudyRun:
    """Return a run that was begun before. Raises `StateError` where there is none."""
    return StudyRun(made, RunDirectory.open(made.directory / "runs" / name))


def line_of(statement: RoundStatement) -> str:
    """Return one line on a round, for people, and one for each site that is missing, in its own words."""
    number, seconds = statement["round"], statement["seconds"]
    if statement["type"] == "round-abort":
        reason = "\n  ".join(one_line(line.strip()) for line in statement["reason"].splitlines())
        return f"round {number}: came to nothing after {seconds:.0f} s: {reason}"
    spent = max(((statement["privacy"] or {}).get("epsilon") or {}).values(), default=None)
    cost = "" if spent is None else f", epsilon so far {spent:.3f}"
    lost = len(statement["failures"])
    missing = f", {lost} missing" if lost else ""
    why = "".join(f"\n  {site}: {one_line(reason)}" for site, reason in sorted(statement["failures"].items()))
    return f"round {number}: {len(statement['survivors'])} sites in {seconds:.0f} s{missing}{cost}{why}"
