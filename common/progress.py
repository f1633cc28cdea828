"""What a command says to the person who waits: its first line, its progress, and its last lines."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

Say = Callable[[str], None]
"""Receives one line of progress, without a line end, for the person who waits."""
Tell = Callable[[str, int, int | None], None]
"""Receives what is being done, how much of it is done, and how much there is; None if that is not known."""

Doing = str | Callable[..., str]
"""A sentence with the command's parameters in braces, or a function of the parameters that returns one.

An empty sentence is not printed: the command is about to refuse its parameters."""

_Command = TypeVar("_Command", bound=Callable[..., Any])
_KEPT = "doing"
_BETWEEN = 30.0
"""Seconds between two lines about the same work, where there is no terminal to draw a bar on."""
_REMEMBERED = 600.0
"""Seconds over which the speed of work is averaged: a round may take minutes."""


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun: `1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Return a text on one line, without characters that steer a terminal: it may be another organisation's.

    Control characters, ends of lines, and marks that turn the direction of writing become question marks.
    """
    return "".join(each if each.isprintable() else "?" for each in text)


def on_one_line(text: str) -> str:
    """Return a text of several lines as one printable line: `a:` and its items become `a: b; c`."""
    first, *others = [line.strip() for line in text.split("\n") if line.strip()] or [""]
    return printable(first + (" " if first.endswith(":") else "; ") * bool(others) + "; ".join(others))


def silent(what: str, done: int = 0, total: int | None = None) -> None:
    """Tell nobody."""


def doing(sentence: Doing) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command its first line.

    The line is printed on standard error before the command runs, and so before it imports a library that takes
    seconds. A command that prints one JSON object (`--json`) does not print it.
    """

    def given(command: _Command) -> _Command:
        command.__dict__[_KEPT] = sentence
        return command

    return given


def first_line(command: Callable[..., Any] | None, parameters: Mapping[str, Any]) -> str | None:
    """Return the first line of a command that is called with these parameters; None if it has none to print."""
    sentence: Doing | None = getattr(command, _KEPT, None)
    if sentence is None or parameters.get("as_json"):
        return None
    shown = {name: _shown(value) for name, value in parameters.items()}
    line = sentence.format(**shown) if isinstance(sentence, str) else sentence(**shown)
    return f"{line} …" if line else None


def _shown(value: Any) -> Any:
    """Return a parameter as text; None stays None."""
    if isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value)
    return str(value) if isinstance(value, Path) else value


def closing(result: str, following: str, *, err: bool = False) -> str:
    """Return the last two lines of a command, for a terminal folded: its result in one sentence, and what to do next.

    Args:
        result: What came out.
        following: What to do next.
        err: Whether it goes to standard error.
    """
    return folded(f"{result}\nnext: {following}", err=err)


def folded(text: str, hang: int = 0, *, err: bool = False) -> str:
    """Return a text with lines that end between words, for a terminal; the text itself where it goes elsewhere.

    A command between backquotes stays in one piece, so that it can be copied.

    Args:
        text: The text, of one or several lines.
        hang: Number of blanks before the continuation of a line.
        err: Whether it goes to standard error.
    """
    if not (sys.stderr if err else sys.stdout).isatty():
        return text
    width = max(shutil.get_terminal_size().columns, hang + 40)
    whole = re.sub("`[^`]*`", lambda found: found.group().replace(" ", "\0"), text)
    lines = [
        textwrap.wrap(
            line, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False, tabsize=1
        )
        or [""]
        for line in whole.split("\n")
    ]
    return "\n".join("\n".join(line) for line in lines).replace("\0", " ")


_AT_COORDINATOR = re.compile(r"\bprivet (?:coordinator|registry) (?!init\b)[a-z]+[^`\n,;]*")
"""A command of a coordinator that takes its directory, up to the end of the line, of the quotation or of the clause."""


def in_directory(text: str, directory: Path) -> str:
    """Return a text in which each command of a coordinator names its directory, if that is not the present one.

    Args:
        text: A hint, or lines about what to do next.
        directory: The coordinator's directory, as it was given.
    """
    if directory == Path():
        return text

    def named(found: re.Match[str]) -> str:
        command = found.group()
        return command if re.search(r" (-C|--directory)\b", command) else f"{command} -C {shlex.quote(str(directory))}"

    return _AT_COORDINATOR.sub(named, text)


_AT_SITE = re.compile(r"(\bprivet (?:site|gate|console|data|scan|evaluate|predict)\b[^`\n]*?[ =])SITE\b")
"""A command up to the word that stands for a site file."""


def at_site(text: str, file: Path) -> str:
    """Return a text in which each command about a site names this site's file, where a placeholder stands."""
    return _AT_SITE.sub(lambda found: f"{found[1]}{shlex.quote(str(file))}", text)


def duration(seconds: float) -> str:
    """Return a length of time in words, rounded: `40 s`, `3 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def ticking(seconds: float, work: Callable[[], object], name: str) -> Iterator[None]:
    """Do something regularly, in a thread of this name, while the block runs; for the first time after `seconds`."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            work()

    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def lasting(between: float = _BETWEEN) -> Iterator[None]:
    """Say on standard error every half minute that work without stages goes on, while the block runs.

    Args:
        between: Seconds between two lines.
    """
    began = time.monotonic()

    def work() -> None:
        sys.stderr.write(f"still at it after {duration(time.monotonic() - began)} …\n")
        sys.stderr.flush()

    with ticking(between, work, "lasting"):
        yield


class Stages:
    """The stages of long work, on standard error.

    A terminal gets a bar with the time left. Elsewhere, each stage gets a line when it begins, and one every half
    minute with the time left.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, quiet=quiet)
        self._drawn = self._console.is_terminal and not quiet
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._drawn,
            speed_estimate_period=_REMEMBERED,
        )
        self._stage: str | None = None
        self._bar: Any = None
        self._began = self._said = 0.0
        self._first = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line above the bars."""
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=not self._drawn)

    def tell(self, what: str, done: int = 0, total: int | None = None, where: str = "") -> None:
        """Show how much of a stage is done.

        Args:
            what: The stage. A new one ends the one before.
            done: How much of it is done.
            total: How much there is; None if that is not known.
            where: Which part of it is being done.
        """
        now, shown = time.monotonic(), f"{what}: {where}" if where else what
        if what != self._stage:
            if self._bar is not None:
                self._progress.remove_task(self._bar)
            self._stage, self._began, self._said, self._first = what, now, now, done
            self._bar = self._progress.add_task(shown, total=total, completed=done)
            if not self._drawn:
                self.line(f"{what} …")
            return
        self._progress.update(self._bar, description=shown, completed=done, total=total)
        if self._drawn or now - self._said < _BETWEEN or done == total:
            return
        self._said = now
        share = f", {100 * done // total} %" if total else ""
        if total and done > self._first:
            share += f", about {duration((now - self._began) * (total - done) / (done - self._first))} left"
        self.line(f"{shown}{share} …")
