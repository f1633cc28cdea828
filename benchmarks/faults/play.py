"""Run a study in a consortium under faults, with a supervisor that restarts processes that died."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from faults.actions import FILLER, HIDDEN
from faults.child import run
from faults.process import Fault, Part, read_events
from faults.warm import STUDY
from faults.world import World

COORDINATOR = "coordinator"
_LONGEST = 150.0
_MOST_STARTS = 6


def forks(template: Path) -> ForkServerContext:
    """Return the context that forks processes from one that has loaded all libraries, without our threads and files."""
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload(["faults.warm"])
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ |= {STUDY: str(template), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    try:
        # The first process starts the server from which all others are forked; the server keeps this environment.
        first = context.Process(target=nap)
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def nap() -> None:
    """Do nothing: the body of the first process."""


@dataclass
class Stage:
    """The processes of a consortium while its study runs.

    Attributes:
        world: The consortium.
        context: Starts processes.
        parts: By name: the part of each process.
        running: By name: the running processes.
        exits: Name and exit code of each process that ended by itself.
    """

    world: World
    context: ForkServerContext
    parts: dict[str, Part] = field(default_factory=dict)
    running: dict[str, BaseProcess] = field(default_factory=dict)
    exits: list[tuple[str, int]] = field(default_factory=list)

    def start(self, part: Part) -> None:
        """Start a process."""
        self.parts[part.name] = part
        process = self.context.Process(target=run, args=(part,), daemon=True)
        process.start()
        self.running[part.name] = process

    def end(self, name: str) -> None:
        """Kill a process, and do not start it again."""
        process = self.running.pop(name, None)
        if process is not None:
            process.kill()
            process.join()

    def look(self, seconds: float) -> list[tuple[str, int]]:
        """Wait a little for processes to end, and return those that did, with their exit codes."""
        wait([process.sentinel for process in self.running.values()], seconds)
        found = []
        for name, process in list(self.running.items()):
            if not process.is_alive():
                process.join()
                del self.running[name]
                found.append((name, int(process.exitcode or 0)))
        self.exits += found
        return found

    def free(self, name: str) -> None:
        """Free a disk that a fault has filled. Whoever filled it may have been killed before it did so."""
        (self.world.folder / name / FILLER).unlink(missing_ok=True)

    def revive(self, name: str) -> None:
        """Restart a process that died, without its faults. Free its disk and restore hidden files, as operators do."""
        if sum(each == name for each, _ in self.exits) > _MOST_STARTS:
            raise RuntimeError(f"{name} ended more than {_MOST_STARTS} times: read {self.world.folder}/{name}.log")
        directory = self.world.folder / name
        self.free(name)
        for hidden in directory.glob(f"*/*{HIDDEN}"):
            hidden.rename(hidden.with_name(hidden.name.removesuffix(HIDDEN)))
        self.start(replace(self.parts[name], faults=()))


Script = Callable[[Stage, Sequence[Mapping[str, Any]]], None]
"""Called repeatedly with the events so far; injects faults that no process can inject into itself."""


def nothing(stage: Stage, events: Sequence[Mapping[str, Any]]) -> None:
    """Inject no fault from outside."""


@contextmanager
def staged(stage: Stage) -> Iterator[Stage]:
    """Kill all processes when the block ends."""
    try:
        yield stage
    finally:
        for name in list(stage.running):
            stage.end(name)
        for name in stage.parts:
            stage.free(name)


def play(
    stage: Stage,
    parts: Sequence[Part],
    script: Script = nothing,
    until: Callable[[], bool] = lambda: False,
    most: float = _LONGEST,
) -> bool:
    """Run a study to its end or until a condition holds, and restart processes that die.

    Returns:
        Whether the study ended, or the condition held, in time.

    Raises:
        RuntimeError: A process died again and again.
    """
    deadline = time.monotonic() + most
    with staged(stage):
        for part in parts:
            stage.start(part)
        while time.monotonic() < deadline:
            for name, code in stage.look(0.05):
                if name == COORDINATOR and code == 0:
                    return True
                if name in (COORDINATOR, *stage.world.kind.names):
                    stage.revive(name)
            if until():
                return True
            if script is not nothing:
                script(stage, read_events(stage.world.folder))
        return False


def parts_of(world: World, faults: Mapping[str, Sequence[Fault]], waits: tuple[float, float, float]) -> list[Part]:
    """Return the processes of a consortium with their faults."""
    names = (COORDINATOR, *world.kind.names)
    return [Part(world.folder, name, world.seed, tuple(faults.get(name, ())), waits=waits) for name in names]
