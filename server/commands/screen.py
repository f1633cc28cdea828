"""What a coordinator's command shows while it waits: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer

from privet.common.progress import folded, ticking
from privet.server.rounds.wait import CONSENT, Wait, details, sentence

# Seconds: between two looks; until a stage is worth a plain line; and until a plain line is repeated.
_TICK, _SETTLED, _REPEATED = 0.5, 2.0, 60.0


class Screen:
    """Shows what a run waits for. Every method may be called from any thread."""

    def __init__(
        self, out: TextIO | None = None, clock: Callable[[], float] = time.time, *, terminal: bool | None = None
    ) -> None:
        """Write to `out` (default: standard error), which is a terminal or not."""
        self._out = sys.stderr if out is None else out
        self._live = self._out.isatty() if terminal is None else terminal
        self._clock, self._lock = clock, threading.RLock()
        self._wait: Wait | None = None
        self._changed, self._shown = 0.0, -_REPEATED

    def tell(self, wait: Wait) -> None:
        """Show what is waited for from now on."""
        with self._lock:
            news = wait.stage == CONSENT and (self._wait is None or details(wait) != details(self._wait))
            self._wait, self._changed, self._shown = wait, self._clock(), -_REPEATED
            if news:
                self._write([sentence(wait, self._clock()), *details(wait)])
            self.tick()

    def say(self, line: str) -> None:
        """Print a line of result on standard output. What was waited for is over."""
        with self._lock:
            self._clear()
            self._wait = None
            typer.echo(folded(line, 4))

    def tick(self) -> None:
        """Bring the live line up to date, or print a plain line if one is due."""
        with self._lock:
            if self._wait is None:
                return
            now = self._clock()
            if self._live:
                width = max(shutil.get_terminal_size().columns - 1, 20)
                line = sentence(self._wait, now)
                self._put("\r" + (line if len(line) <= width else line[: width - 1] + "…") + "\x1b[K")
            elif now - self._changed >= _SETTLED and now - self._shown >= _REPEATED:
                self._write([sentence(self._wait, now), *details(self._wait)])

    def note(self, text: str) -> None:
        """Print a line about something else than what is waited for, which is shown again after it."""
        with self._lock:
            self._clear()
            self._put(folded(text, err=True) + "\n")

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Call `tick` regularly while the block runs."""
        try:
            with ticking(_TICK, self.tick, "screen"):
                yield
        finally:
            with self._lock:
                self._clear()
                self._wait = None

    def _write(self, lines: Sequence[str]) -> None:
        self._clear()
        self._shown = self._clock()
        self._put("\n".join(folded(line, 4, err=True) for line in lines) + "\n")

    def _clear(self) -> None:
        if self._live:
            self._put("\r\x1b[K")

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
