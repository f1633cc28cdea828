"""The memory of a witness (Merkle): every checkpoint that it cosigned, in one SQLite file with an index by size.

A checkpoint is recognised years later, and neither finding nor adding one takes longer because there are many. With a
rollback journal and synchronous=EXTRA, a transaction that has returned is on the disk, and reading leaves no file.

Earlier versions kept a file for each checkpoint in the directory `cosigned`. It is taken over once, and removed: an
earlier version then finds no checkpoint and cosigns nothing, instead of going on from an old one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from privet.common.errors import StateError
from privet.common.files import sync_directory

FILE, OLD = "cosigned.db", "cosigned"
_TABLE = "CREATE TABLE cosigned (size INTEGER PRIMARY KEY, note BLOB NOT NULL) STRICT"
_SECONDS = 30.0


class Rows:
    """The checkpoints, within one transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def newest(self) -> bytes | None:
        """Return the note of the largest checkpoint; None where there is none."""
        return self._one("SELECT note FROM cosigned ORDER BY size DESC LIMIT 1")

    def at(self, size: int) -> bytes | None:
        """Return the note of the checkpoint of this size; None where none was cosigned."""
        return self._one("SELECT note FROM cosigned WHERE size = ?", size)

    def keep(self, size: int, note: bytes) -> None:
        """Store a checkpoint's note. It is durable once the transaction has ended."""
        self._database.execute("INSERT OR REPLACE INTO cosigned (size, note) VALUES (?, ?)", (size, note))

    def notes(self) -> list[bytes]:
        """Return all notes, ascending by size."""
        return [row[0] for row in self._database.execute("SELECT note FROM cosigned ORDER BY size")]

    def _one(self, query: str, *values: int) -> bytes | None:
        row = self._database.execute(query, values).fetchone()
        return None if row is None else bytes(row[0])


class Memory:
    """The memory of the witness in a directory. Threads share it; other processes open the file themselves.

    Args:
        directory: The witness's directory.
        durable: Whether a transaction's end waits for the disk.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self._directory = directory
        self._durable = durable
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._opened: tuple[int, int, int] | None = None

    def create(self, note: bytes) -> None:
        """Make the file, with the checkpoint of the empty tree. Raises as `rows`."""
        with _errors(self._directory):
            _make(self._directory, {0: note}, self._durable)

    @contextmanager
    def rows(self, *, write: bool = False) -> Iterator[Rows]:
        """Give the block the checkpoints in one transaction, one thread at a time.

        Args:
            write: Whether the block may store checkpoints. It then waits for other processes.

        Raises:
            StateError: The file is missing, or cannot be read or written.
        """
        with self._lock, _errors(self._directory):
            database = self._connection()
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield Rows(database)
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    def _connection(self) -> sqlite3.Connection:
        """Return the open file. It is opened anew if its name leads to another file by now, or after a fork."""
        if (self._directory / OLD).is_dir():
            _take_over(self._directory, self._durable)
        found = (self._directory / FILE).stat()
        now = (os.getpid(), found.st_dev, found.st_ino)
        if self._database is None or now != self._opened:
            self._database, self._opened = _connected(self._directory / FILE, self._durable), now
        return self._database


def _take_over(directory: Path, durable: bool) -> None:
    """Put the files of an earlier version into the memory, then remove them."""
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / OLD).is_dir():  # another process may have done it meanwhile
            _import(directory, durable)


def _import(directory: Path, durable: bool) -> None:
    files = {int(file.name): file.read_bytes() for file in (directory / OLD).iterdir() if file.name.isdecimal()}
    if (directory / FILE).exists():  # a crash left both, or an earlier version was started once more
        with closing(_connected(directory / FILE, durable)) as database, database:
            database.executemany("INSERT OR IGNORE INTO cosigned (size, note) VALUES (?, ?)", sorted(files.items()))
    elif files:
        _make(directory, files, durable)
    else:
        return  # it was emptied, and is not taken for that of a new witness
    shutil.rmtree(directory / OLD)


def _make(directory: Path, notes: dict[int, bytes], durable: bool) -> None:
    """Make the file with these notes, completely or not at all."""
    with TemporaryDirectory(prefix=f".{FILE}.", dir=directory) as staging:
        path = Path(staging, FILE)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(_connected(path, durable)) as database:
            database.executescript(f"BEGIN; {_TABLE};")
            database.executemany("INSERT INTO cosigned (size, note) VALUES (?, ?)", sorted(notes.items()))
            database.execute("COMMIT")
        os.link(path, directory / FILE)  # unlike a rename, it never replaces a file
    if durable:
        sync_directory(directory)


def _connected(path: Path, durable: bool) -> sqlite3.Connection:
    # mode=rw: opening never makes a file. A witness that has lost its memory must not begin a new one.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    database = sqlite3.connect(uri, timeout=_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
    for setting in ("journal_mode = DELETE", f"synchronous = {'EXTRA' if durable else 'OFF'}", "fullfsync = ON"):
        database.execute(f"PRAGMA {setting}")
    return database


@contextmanager
def _errors(directory: Path) -> Iterator[None]:
    """Convert errors of SQLite and the disk to `StateError`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "sqlite_errorname", None) or getattr(error, "strerror", None) or type(error).__name__
        raise StateError(
            f"the witness's directory {directory} cannot be read or written ({why})",
            "check the disk and the permissions of the directory. If its files are lost, restore the newest copy from "
            "a backup; a new witness would vouch for a history that it has not seen",
        ) from None
