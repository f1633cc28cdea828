"""Rounds of one worker that fail, or are killed, at any call of a function of privet; and how often they drew."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from privet.client.budget import accounts
from privet.client.budget.releases import open_ledger
from privet.client.rounds.worker import Worker
from privet.common.errors import PrivetError
from privet.common.privacy.noise import Randomness
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from tests.support.tiny import random_adapter, worker_of

_SOURCE = f"{os.sep}privet{os.sep}"
Point = tuple[str, int]
"""A function of privet, and how often it had been called."""


class BrokenError(Exception):
    """What breaks a round here."""


@dataclass
class Attempts:
    """What came of asking for one round several times.

    Attributes:
        drew: For each attempt, whether it drew a variate.
        sent: The bytes that were returned.
        errors: Names of the errors that were raised.
    """

    drew: list[bool] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def calls(each: Callable[[Point], None]) -> Iterator[None]:
    """Call `each` at every call of a function of privet, before its first line. What it raises, the call raises."""
    seen: dict[str, int] = {}

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and _SOURCE in code.co_filename:
            name = f"{code.co_filename.rpartition(_SOURCE)[2]}:{code.co_qualname}"
            seen[name] = seen.get(name, 0) + 1
            each((name, seen[name]))

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def asked(study: Study, worker: Worker, number: int, cohort: Sequence[str]) -> RoundOpen:
    """Return the message that opens a round to a cohort."""
    adapter = random_adapter(worker.open(study)[1].spec, scale=0.1)
    return RoundOpen(study.document(), number, "1" * 32, adapter.digest, tuple(cohort), adapter.data, declared=30)


_OPENING = ContextVar("_OPENING", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave out the draws of the block: a model that is opened is tried with texts that are drawn."""
    token = _OPENING.set(True)
    try:
        yield
    finally:
        _OPENING.reset(token)


@contextmanager
def counted_draws() -> Iterator[list[str]]:
    """Give a list that holds the name of each draw of the block."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("words", "uniform", "lattice_normal"):
            original = getattr(Randomness, name)

            def draw(self: Randomness, count: int, name: str = name, original: Any = original) -> Any:
                if not _OPENING.get():
                    found.append(name)
                return original(self, count)

            patch.setattr(Randomness, name, draw)
        yield found


def attempt(worker: Worker, opened: RoundOpen, found: Attempts, each: Callable[[Point], None] | None = None) -> None:
    """Ask for a round once, and add to `found` what came of it."""
    with counted_draws() as drawn:
        try:
            if each is None:
                sent = worker._contribution(opened)
            else:
                with calls(each):
                    sent = worker._contribution(opened)
            found.sent.append(sent.update.tobytes() + sent.metrics.tobytes())
        except (PrivetError, BrokenError) as error:
            found.errors.append(type(error).__name__)
    found.drew.append(bool(drawn))


def path_of(worker: Worker, opened: RoundOpen) -> list[Point]:
    """Run a round, and return the first and the last call of every function on its way, in order."""
    order: list[Point] = []
    attempt(worker, opened, Attempts(), order.append)
    first: dict[str, Point] = {}
    last: dict[str, Point] = {}
    for point in order:
        first.setdefault(point[0], point)
        last[point[0]] = point
    chosen = {*first.values(), *last.values()}
    return [point for point in order if point in chosen]


def failing_at(point: Point) -> Callable[[Point], None]:
    """Return what raises at a call."""

    def each(found: Point) -> None:
        if found == point:
            raise BrokenError

    return each


def begun(worker: Worker, number: int) -> int:
    """Return how often a round began, by the site's ledger."""
    ledger = open_ledger(worker.site.config)
    with ledger._chain.reading() as database:
        (found,) = database.execute(
            "SELECT count(*) FROM entries WHERE kind = 'begin' AND round = ?", (number,)
        ).fetchone()
    ledger.verify()
    ledger.close()
    return int(found)


def killed_at(file: Path, document: Mapping[str, Any], cohort: Sequence[str], number: int, point: Point) -> None:
    """Run a round in this process, and kill the process at a call. It notes in a file that it drew."""
    vars(accounts)["epsilon"] = _free
    study, note = Study.parse(dict(document)), file.with_suffix(f".{number}.drew")
    worker = worker_of(file)
    opened = asked(study, worker, number, cohort)
    original = Randomness.words

    def words(self: Randomness, count: int) -> Any:
        note.touch()
        return original(self, count)

    Randomness.words = words  # type: ignore[method-assign]

    def each(found: Point) -> None:
        if found == point:
            os.kill(os.getpid(), signal.SIGKILL)

    attempt(worker, opened, Attempts(), each)


def _free(events: Any, delta: float, accountant: str = "prv") -> float:
    """Stand in for the accountant, where a test is not about the limit."""
    return 0.0
