"""What the processes of a broken consortium share: their faults, their part, and the file in which they note events."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.common.study.messages import Message

WAITS = (20.0, 20.0, 10.0)
"""Seconds that a coordinator waits for sites to come, to train, and to take a step: more than a busy machine takes."""


@dataclass(frozen=True)
class Fault:
    """What befalls a process.

    Attributes:
        action: Name in `faults.actions.ACTIONS`.
        target: Function around whose calls it is done, as "module:Class.function"; empty: once, before the start.
        moment: "before" the call or "after" it.
        count: At which call; 0 is at each.
        stage: Counts only calls made while this process asks for, or answers, this step of a round; empty: all.
        amount: What the action takes, such as seconds.
        seconds: How long it lasts; 0 is to the end.
        note: A site or a file that it is about.
    """

    action: str = "kill"
    target: str = ""
    moment: str = "before"
    count: int = 1
    stage: str = ""
    amount: float = 0.0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A process of a consortium.

    Attributes:
        folder: Of the consortium.
        name: The site, or "coordinator"; or "second", a coordinator that runs the study where another one does.
        directory: The site's directory, if it is not that of its name.
        seed: Of the sites' draws.
        faults: What befalls it.
        waits: Seconds that the coordinator waits for sites to come, to train, and to take a step.
    """

    folder: Path
    name: str
    seed: int
    faults: tuple[Fault, ...] = ()
    directory: str = ""
    waits: tuple[float, float, float] = WAITS


@dataclass
class Process:
    """What the wrappers of this process share.

    Attributes:
        part: Which one it is.
        stage: The step that is asked for, or answered.
        round: Its round.
        trained: How often each round was trained here.
        kept: Answers to be replayed, by step.
    """

    part: Part
    stage: str = ""
    round: int = 0
    trained: Counter[int] = field(default_factory=Counter)
    kept: dict[str, Message] = field(default_factory=dict)

    def note(self, what: str, **fields: object) -> None:
        """Note an event of this process."""
        note(self.part.folder, self.part.name, what, **fields)


def note(folder: Path, who: str, what: str, **fields: object) -> None:
    """Append a line to the events: whole, and in the kernel's hands before anything else is done."""
    line = {"t": time.monotonic(), "cpu": time.process_time(), "who": who, "pid": os.getpid(), "what": what, **fields}
    descriptor = os.open(events_file(folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def put(owner: Any, name: str, function: object) -> None:
    """Put a function in the place of another."""
    setattr(owner, name, function)


def events_file(folder: Path) -> Path:
    """Return where a consortium's processes note what happens."""
    return folder / "events.jsonl"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return what happened, in order."""
    file = events_file(folder)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
