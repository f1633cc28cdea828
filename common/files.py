"""Files that survive a crash: replaced whole, and on disk before the next step.

A file is written beside its place, under a name that its next writer knows: writers, of one process or of several,
wait for each other, and what a kill has left there is taken away by the next.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from privet.common.errors import StateError

Step = Callable[[str], None]
"""Called with the name of each step of a write; tests stop the process there."""


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: after a crash it holds the old bytes or the new ones.

    Args:
        path: The file.
        data: Its content.
        mode: Who may do what with it, less the process's mask.
    """
    with _staged(path, mode) as (staging, descriptor):
        _write(descriptor, data)
        os.fsync(descriptor)
        staging.replace(path)
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically, for what a crash of the machine may take: a simulation's."""
    with _staged(path, 0o666) as (staging, descriptor):
        _write(descriptor, data)
        staging.replace(path)


@contextmanager
def _staged(path: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """Open the one file in which a path's next content is written, for one writer at a time; deleted on failure."""
    staging = path.with_name(f".{path.name}.partial")
    while (descriptor := _taken(staging, mode)) is None:
        pass
    try:
        yield staging, descriptor
    finally:
        if _lies_at(descriptor, staging):  # something failed
            staging.unlink()
        os.close(descriptor)


def _taken(staging: Path, mode: int) -> int | None:
    """Create a file and lock it; None where another writer had it or a kill left it, and one has to try again."""
    fresh, descriptor = True, -1
    try:
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        fresh = False
        with suppress(FileNotFoundError):
            descriptor = os.open(staging, os.O_WRONLY | os.O_NOFOLLOW)
    if descriptor < 0:
        return None
    keep = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        own = _lies_at(descriptor, staging)
        keep = own and fresh
        if own and not fresh:  # whoever began it is no more; its mode may be another
            staging.unlink()
    finally:  # also where there are no locks, or Ctrl-C ends the wait for one
        if not keep:
            os.close(descriptor)
    return descriptor if keep else None


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(data)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist yet, such as a private key, readable by its owner alone. Durable on return.

    Raises:
        StateError: There is something at `path` already, or nothing can be written there.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except FileExistsError:
        raise StateError(f"{path} exists already", "a key is never overwritten; choose another file") from None
    except OSError as error:
        raise StateError(f"{path} cannot be written ({error.strerror})", "check the path and its permissions") from None
