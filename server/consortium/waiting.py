"""Statements that wait in files until they are in the round log.

A process that plays a run holds the log. Who has something to say meanwhile keeps it in a file, which is durable, and
the process that opens the log next says it there. There is no database that could differ from the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from privet.common.errors import PrivetError, StateError
from privet.common.files import write_durably
from privet.server.log.journal import Journal

_T = TypeVar("_T")


@dataclass(frozen=True)
class Waiting(Generic[_T]):
    """The statements of one kind that wait.

    Attributes:
        folder: Their directory. It is made with the first of them.
        read: Returns the statement in the bytes of a file; it raises `PrivetError` or `ValidationError` for others.
        mend: What to do about a file that cannot be read: the hint of the error.
    """

    folder: Path
    read: Callable[[bytes], _T]
    mend: str

    def keep(self, name: str, data: bytes) -> None:
        """Keep a statement under a name, which orders it among the others. Durable on return."""
        self.folder.mkdir(exist_ok=True)
        write_durably(self.folder / f"{name}.json", data)

    def holds(self, name: str, data: bytes) -> bool:
        """Return whether these very bytes wait under a name."""
        path = self.folder / f"{name}.json"
        return path.exists() and path.read_bytes() == data

    def any(self) -> bool:
        """Return whether a statement is not known to be in the log."""
        return any(self.folder.glob("*.json"))

    def all(self) -> list[tuple[Path, _T]]:
        """Return the statements that are not known to be in the log, each with its file, in the order of their names.

        Raises:
            StateError: A file cannot be read.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append((path, self.read(path.read_bytes())))
            except FileNotFoundError:  # another process has logged it in between
                continue
            except (OSError, ValidationError, PrivetError) as error:
                why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
                raise StateError(f"{path} cannot be read ({why})", self.mend) from None
        return found

    def settle(self, journal: Journal, say: Callable[[_T], bool], order: Callable[[_T], int] = lambda each: 0) -> int:
        """Say in the log what waits, and return how many statements that were.

        Args:
            journal: The round log.
            say: Says one statement in the log, unless it is there already: a crash may have come between the log's
                write and the removal of the file. It returns False where the log does not take it any more; the file is
                put aside then, as `.late`.
            order: Statements of a lower number are said first.

        Raises:
            StateError: The log or a file cannot be read or written.
        """
        waiting = sorted(self.all(), key=lambda each: order(each[1]))
        for path, statement in waiting:
            if not say(statement):
                path.rename(path.with_suffix(".late"))
        if waiting:
            journal.sign_head()
        for path, _ in waiting:
            path.unlink(missing_ok=True)
        return len(waiting)
