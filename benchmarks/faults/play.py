"""Playing a study in a broken consortium: processes, a supervisor that starts again what died, and the end."""

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
    """Return where processes are forked from: one that has loaded everything, and has no thread and no file of ours."""
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload(["faults.warm"])
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ |= {STUDY: str(template), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    try:
        first = context.Process(target=nap)  # it starts, in this environment, what all others are forked from
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def nap() -> None:
    """Do nothing."""


@dataclass
class Stage:
    """The processes of a consortium while its study is played.

    Attributes:
        world: The consortium.
        context: Starts them.
        parts: What each process is to be, by name.
        running: Those that run.
        exits: Which ended by themselves, and how.
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

    def revive(self, name: str) -> None:
        """Start a process that died again, without its faults; its operator makes room for it."""
        if sum(each == name for each, _ in self.exits) > _MOST_STARTS:
            raise RuntimeError(f"{name} ended {_MOST_STARTS} times: see {self.world.folder}/{name}.log")
        directory = self.world.folder / name
        (directory / FILLER).unlink(missing_ok=True)
        for hidden in directory.glob(f"*/*{HIDDEN}"):
            hidden.rename(hidden.with_name(hidden.name.removesuffix(HIDDEN)))
        self.start(replace(self.parts[name], faults=()))


Script = Callable[[Stage, Sequence[Mapping[str, Any]]], None]
"""Called again and again with the events so far, to do to a consortium what no process does to itself."""


def nothing(stage: Stage, events: Sequence[Mapping[str, Any]]) -> None:
    """Leave everything to the processes."""


@contextmanager
def staged(stage: Stage) -> Iterator[Stage]:
    """Kill everything at the end."""
    try:
        yield stage
    finally:
        for name in list(stage.running):
            stage.end(name)


def play(
    stage: Stage,
    parts: Sequence[Part],
    script: Script = nothing,
    until: Callable[[], bool] = lambda: False,
    most: float = _LONGEST,
) -> bool:
    """Play a study to its end, or until something holds, starting again whatever dies; return whether that came.

    Raises:
        RuntimeError: A process kept dying.
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
    """Return a consortium's processes with their faults."""
    names = (COORDINATOR, *world.kind.names)
    return [Part(world.folder, name, world.seed, tuple(faults.get(name, ())), waits=waits) for name in names]
