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
"""Seconds that a coordinator waits for sites to connect, to train, and to answer a step: enough on a busy machine."""


@dataclass(frozen=True)
class Fault:
    """A fault of a process.

    Attributes:
        action: Name in `faults.actions.ACTIONS`.
        target: Function at whose calls the fault happens, as "module:Class.function". Empty: once, before the start.
        moment: "before" the call or "after" it.
        count: Number of the call at which it happens; 0 is every call.
        stage: Step of a round. Only calls count that the process makes while it asks for, or answers, this step.
            Empty: all calls count.
        amount: Parameter of the action, such as seconds.
        seconds: Duration; 0 is until the end.
        note: The site or the file of the action.
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
        folder: Folder of the consortium.
        name: Name of the site; "coordinator"; or "second", another coordinator that runs the study at the same time.
        seed: Seed of the sites' draws.
        faults: Faults of this process.
        directory: Directory of the site, if it differs from the name.
        waits: Seconds that the coordinator waits for sites to connect, to train, and to answer another step.
    """

    folder: Path
    name: str
    seed: int
    faults: tuple[Fault, ...] = ()
    directory: str = ""
    waits: tuple[float, float, float] = WAITS


@dataclass
class Process:
    """State that the wrappers of this process share.

    Attributes:
        part: The process.
        stage: The step that it asks for, or answers, now.
        round: The round of that step.
        trained: By round: how often it was trained here.
        kept: By step: the answer to replay.
    """

    part: Part
    stage: str = ""
    round: int = 0
    trained: Counter[int] = field(default_factory=Counter)
    kept: dict[str, Message] = field(default_factory=dict)

    def note(self, what: str, **fields: object) -> None:
        """Append an event of this process to the events file."""
        note(self.part.folder, self.part.name, what, **fields)


def note(folder: Path, who: str, what: str, **fields: object) -> None:
    """Append a line to the events file in one write, so that a kill right afterwards cannot lose or cut it."""
    line = {"t": time.monotonic(), "cpu": time.process_time(), "who": who, "pid": os.getpid(), "what": what, **fields}
    descriptor = os.open(events_file(folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def put(owner: Any, name: str, function: object) -> None:
    """Replace a function of a module or class."""
    setattr(owner, name, function)


def events_file(folder: Path) -> Path:
    """Return the events file of a consortium."""
    return folder / "events.jsonl"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events, in order."""
    file = events_file(folder)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
