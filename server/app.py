"""The Flower ServerApp: opens the run directory that the run configuration names and runs its study over the Grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privet.common.errors import StateError
from privet.server.log.journal import open_journal
from privet.server.log.keys import read_keys
from privet.server.network.grid import GridExchange
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import RunLog, Unlogged
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.timing import Timing

app = ServerApp()

LOG, PUBLIC = "log", "public"
"""Directories in a run directory that has a round log of its own: the log, and its published files."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or resume, the study in the run directory that `run` in the run configuration names."""
    config = context.run_config
    if not config.get("run"):
        raise StateError(
            "the run configuration has no key `run`: expected the path of a run directory",
            "create a run directory with `privet simulate STUDY`, then set `run` to its path",
        )
    timing = Timing(
        gathering=float(config.get("gather-timeout", Timing.gathering)),
        round=float(config.get("round-timeout", Timing.round)),
        step=float(config.get("step-timeout", Timing.step)),
    )
    run = RunDirectory.open(Path(str(config["run"])))
    directory = Path(str(config.get("log", run.path / LOG)))
    name = str(config.get("name", run.study.name))
    with opened_log(run, directory, name) as log:
        run_study(log, GridExchange(grid), timing=timing)


@contextmanager
def opened_log(run: RunDirectory, directory: Path, name: str) -> Iterator[RunLog | Unlogged]:
    """Open a run's place in the round log of a directory, under a name; `Unlogged` where there is no such directory.

    Raises:
        StateError, VerificationError: As `open_journal`.
    """
    if not directory.is_dir():
        yield Unlogged(run)
        return
    with open_journal(directory, read_keys(directory)) as journal:
        yield RunLog(journal, run, name, run.path / PUBLIC)
