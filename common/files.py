"""Files that survive a crash: they are replaced as a whole, and are on disk before the next step.

New content is first written to a staging file beside the target, then renamed over it. The staging file has a fixed
name and a lock: writers, of one process or of several, wait for each other, and the next writer removes a staging file
that a killed process left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from privet.common.errors import StateError

Step = Callable[[str], None]
"""Called with the name of each step of a write. Tests stop the process in it."""
_LISTED = 5
MAKES = {
    "study": "`privet new FILES` makes a study from data files",
    "site": "`privet site setup SITE` writes it once the site has joined with `privet site join @TOKEN DIRECTORY`",
    "policy": "`privet site policy SITE --init` writes a first one",
    "coordinator": "go to the coordinator's directory, or name it with -C; `privet coordinator init` makes one",
}
"""What makes a file of each kind, for the hint where it is missing."""


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: after a crash it holds either the old bytes or the new ones.

    Args:
        path: The file.
        data: Its content.
        mode: Permissions of the file, before the process's umask is applied.
    """
    with _staged(path, mode) as (staging, descriptor):
        _write(descriptor, data)
        # The bytes must be on disk before the name: after a crash the name would otherwise lead to an empty file.
        os.fsync(descriptor)
        staging.replace(path)
    # The rename itself is durable only when the directory is.
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically, without waiting for the disk. A crash of the machine may lose it.

    For files of simulations, which can be computed again.
    """
    with _staged(path, 0o666) as (staging, descriptor):
        _write(descriptor, data)
        staging.replace(path)


@contextmanager
def _staged(path: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """Open the staging file of a path for one writer at a time. It is deleted if the block fails."""
    staging = path.with_name(f".{path.name}.partial")
    while (descriptor := _taken(staging, mode)) is None:
        pass
    try:
        yield staging, descriptor
    finally:
        # After a successful rename the staging name is gone, or is the next writer's file, which must stay.
        if _lies_at(descriptor, staging):
            staging.unlink()
        os.close(descriptor)


def _taken(staging: Path, mode: int) -> int | None:
    """Create a staging file and lock it. None: another writer had it, or a killed one left it; try again."""
    fresh, descriptor = True, -1
    try:
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        fresh = False
        with suppress(FileNotFoundError):  # its writer finished in between
            descriptor = os.open(staging, os.O_WRONLY | os.O_NOFOLLOW)
    if descriptor < 0:
        return None
    keep = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # While this process waited for the lock, the file may have been renamed or removed: then the lock is on a
        # file that the name no longer leads to, and protects nothing.
        own = _lies_at(descriptor, staging)
        keep = own and fresh
        if own and not fresh:  # its writer was killed; the file may have other permissions, so it is not reused
            staging.unlink()
    finally:  # also if the file system has no locks, or Ctrl-C ends the wait
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
    """Make the file names in a directory durable."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist yet, such as a private key. By default only its owner may read it.

    The file is durable on return.

    Raises:
        StateError: `path` exists already, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except FileExistsError:
        raise StateError(
            f"the file {path} exists already", "choose another file; an existing file is never overwritten"
        ) from None
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror})",
            "check that the directory exists, that you may write to it and that the disk is not full",
        ) from None


def make_directory(path: Path) -> None:
    """Make a directory, and those above it. One that is there stays as it is.

    Raises:
        StateError: It cannot be made, for example because a file has this name or one above it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"the directory {path} cannot be made ({error.strerror})",
            "choose a path in a directory that you may write to",
        ) from None


def require_free(path: Path, hint: str) -> None:
    """Raise `StateError` with this hint unless `path` does not exist or is an empty directory, which is removed."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        raise StateError(f"{path} exists already", hint)


@contextmanager
def staged(path: Path, hint: str) -> Iterator[Path]:
    """Build a directory beside `path` and move it there when the block ends without error: complete, or not at all.

    Args:
        path: The directory to make.
        hint: What to do where it exists already.

    Raises:
        StateError: It exists already, or the directory above it cannot be made.
    """
    require_free(path, hint)
    make_directory(path.parent)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_files(directory: Path) -> None:
    """Make the files in a directory durable, and their names."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_directory(directory)


def no_directory(path: Path) -> str:
    """Return why `path` is no directory, in words; empty if it is one."""
    if path.is_dir():
        return ""
    return "it is a file" if path.exists() else "it does not exist"


def why_not(path: Path, names: Sequence[str], error: Exception) -> str:
    """Return why a directory does not hold some files that can be read, after reading them failed with an error."""
    if why := no_directory(path):
        return why
    if missing := [name for name in names if not (path / name).is_file()]:
        return f"there is no {' and no '.join(missing)} in it"
    return f"{' or '.join(names)} cannot be read ({type(error).__name__})"


def beside(path: Path, name: str) -> str:
    """Return the end of a hint: the directories beside a path that hold a file of a name; empty if there are none."""
    return _listing("beside it", path.parent, name, path)


def inside(path: Path, name: str) -> str:
    """Return the end of a hint: the directories in one, or in its `runs`, that hold a file of a name; empty if none."""
    return _listing("in it", path, name) or _listing("in it", path / "runs", name)


def _listing(where: str, folder: Path, name: str, but: Path | None = None) -> str:
    try:
        found = sorted(str(each.parent) for each in folder.glob(f"*/{name}") if each.parent != but)
    except OSError:
        return ""
    return f"; {where}: {', '.join(found[:_LISTED])}" if found else ""


def close_to(name: str, names: Sequence[str]) -> str:
    """Return the one of some names that a name may be a misspelling of, whatever the case; empty if none is."""
    folded = {each.casefold(): each for each in names}
    found = get_close_matches(name.casefold(), list(folded), n=1)
    return folded[found[0]] if found else ""


def most_like(path: Path, *, folders: bool = False) -> str:
    """Return the end of a hint: what is there beside a missing path and has a name like it; empty if nothing has.

    Args:
        path: What is missing.
        folders: Whether it may be a directory.
    """
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.is_file() or (folders and each.is_dir()))
    except OSError:
        return ""
    found = close_to(path.name, names)
    return f"; did you mean {path.with_name(found)}?" if found else ""
