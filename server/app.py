"""The Flower ServerApp: opens the run directory it is told of and runs the study in it over Flower's Grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privet.common.errors import StateError
from privet.server.log.journal import open_journal, read_keys
from privet.server.network.grid import GridExchange
from privet.server.rounds.rounds import Timing, run_study
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory

app = ServerApp()

LOG, PUBLIC = "log", "public"
"""In a run directory that has a round log of its own: the log, and its published files."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or resume, the study of the run directory that `run` in the run configuration names."""
    config = context.run_config
    if not config.get("run"):
        raise StateError("the run configuration names no run directory", "create one with `privet simulate`")
    timing = Timing(
        gathering=float(config.get("gather-timeout", Timing.gathering)),
        round=float(config.get("round-timeout", Timing.round)),
        step=float(config.get("step-timeout", Timing.step)),
    )
    run = RunDirectory.open(Path(str(config["run"])))
    log = Path(str(config.get("log", run.path / LOG)))
    name = str(config.get("name", run.study.name))
    with opened_record(run, log, name) as record:
        run_study(run, GridExchange(grid), timing=timing, record=record)


@contextmanager
def opened_record(run: RunDirectory, log: Path, name: str) -> Iterator[RunLog | None]:
    """Open a run's place in the round log, under a name; None where there is no log.

    Raises:
        StateError, VerificationError: As `open_journal`.
    """
    if not log.is_dir():
        yield None
        return
    with open_journal(log, read_keys(log)) as journal:
        yield RunLog(journal, run, name, run.path / PUBLIC)
