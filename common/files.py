"""Files that survive a crash: replaced whole, and on disk before the next step."""

from __future__ import annotations

import os
from pathlib import Path

from privet.common.errors import StateError


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: after a crash it holds the old bytes or the new ones.

    Args:
        path: The file.
        data: Its content.
        mode: Who may do what with it, less the process's mask.
    """
    staging = path.with_name(f".{path.name}.partial")
    with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically, for what a crash of the machine may take: a simulation's."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_bytes(data)
    staging.replace(path)


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
