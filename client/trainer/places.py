"""Directories of trainers: made, guarded against others, and deleted whatever a trainer has put there."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from privet.common.errors import StateError


def unguarded(directory: Path) -> Path | None:
    """Return the first directory, from this one up, that others may change or that is a link; None if there is none.

    Of a link, where it leads to may be well guarded, and where it leads to next may not.

    Raises:
        OSError: One cannot be looked at.
    """
    for path in (directory, *directory.parents):
        found = path.lstat()
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if others or stat.S_ISLNK(found.st_mode) or found.st_uid not in (0, os.getuid()):
            return path
    return None


def require_guarded(directory: Path) -> None:
    """Check a directory of jobs, and the way to it.

    Raises:
        StateError: It is `unguarded`.
        OSError: As `unguarded`.
    """
    found = unguarded(directory)
    if found is not None:
        raise StateError(
            f"the directory {found}, in which the trainer's jobs lie, belongs to somebody else, is a link or can be "
            "changed by others, who could have a job read other files",
            "name a directory in this user's home, without links, as `directory` under [resources.slurm] in the site "
            f"file; where {found} is this user's and no link, `chmod go-w {found}` is enough",
        )


def make_private(directory: Path) -> None:
    """Have a directory of this user alone at a path, in place of whatever else is there.

    Raises:
        OSError: It cannot be made.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        discard(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def discard(path: Path) -> None:
    """Delete a file, or a directory with all that is in it, as far as that can be done. Never raises.

    A trainer may have nested directories deeper than Python's own function goes, and than a path is long; `rm` takes
    them one by one. It follows no links.
    """
    program = shutil.which("rm", path=os.defpath)
    if program is not None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run([program, "-rf", "--", str(path)], capture_output=True, check=False, timeout=600)
    if os.path.lexists(path):
        with suppress(OSError, RecursionError):
            shutil.rmtree(path, ignore_errors=True)
