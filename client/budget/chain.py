"""The file under the ledger: rows in SQLite that are only ever appended, each chained to the one before.

Row n holds canonical JSON and head(n) = SHA-256(head(n-1) || JSON), so a row that was changed, moved or removed shows.
Whoever can write the file can also write a whole new chain, or put an old copy back: that shows only against a head
kept elsewhere. An *anchor* is a small file, best on another disk, that holds the last head.

With a write-ahead log and synchronous=FULL, a transaction that has returned is on the disk. Other code must leave the
file alone while it is open: closing any other handle to it would drop SQLite's locks.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, StateError, VerificationError
from privet.common.files import sync_directory, write_durably

_APPLICATION, _VERSION = 0x70767431, 1
_BUSY_SECONDS = 30.0
_RESTORE = "restore the newest copy of the ledger; never begin a second one for the same data"
# Between machines, SQLite's locks do not hold.
_NETWORK = re.compile(
    r"9p|afs|beegfs|ceph|cifs|davfs|gfs2|glusterfs|gpfs|lustre|ncpfs|nfs|nfs4|ocfs2|orangefs|pvfs2|smb3|smbfs"
    r"|fuse\.(ceph-fuse|gcsfuse|glusterfs|rclone|s3fs|sshfs)"
)
_HINTS = {
    "SQLITE_BUSY": "nothing may be sent; another process has held the ledger for 30 s: find it, then repeat",
    "SQLITE_FULL": "nothing may be sent; free disk space, then repeat",
    "SQLITE_IOERR": "nothing may be sent; check disk space and the disk, then repeat",
    "SQLITE_NOTADB": "check the path",
}
Head = tuple[int, str]
"""Number and digest of a row: they stand for all rows up to it."""


class Chain:
    """An open file, shared by the threads of one process; other processes open it themselves.

    `tables` is its owner's SQL. It makes the table `entries (sequence, content, head)`, AUTOINCREMENT so that a missing
    end shows, and all else that the owner needs; `verify` checks that the file has exactly that.
    """

    def __init__(self, database: sqlite3.Connection, path: Path | None, tables: str) -> None:
        self.name = "in memory" if path is None else path.name
        self._database = database
        self._path = path
        self._tables = tables
        self._anchor: Path | None = None
        self._anchored: Head | None = None
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, tables: str, anchor: Path | None = None) -> Chain:
        """Create a file that its owner alone can read, complete or not at all, and open it.

        Raises:
            StateError: There is something at `path` or `anchor`, or the file system is not a local one.
        """
        _check_local(path)
        if anchor is not None:
            _check_new_anchor(path, anchor)
        with _state_errors(path.name):
            with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as staging:
                _make(Path(staging, path.name), tables)
                try:
                    os.link(Path(staging, path.name), path)  # unlike a rename, never over another file
                except FileExistsError:
                    raise StateError(f"{path} exists already", "open it: a ledger is created once") from None
            sync_directory(path.parent)
        chain = cls.open(path, tables)
        if anchor is not None:
            chain.start_anchor(anchor)
        return chain

    @classmethod
    def open(cls, path: Path, tables: str, anchor: Path | None = None) -> Chain:
        """Open and verify an existing file, and hold it against its anchor.

        Raises:
            StateError: There is no file or no anchor, it cannot be read, or other users have rights on it.
            VerificationError: A row was changed, or the file is behind its anchor.
        """
        if not path.is_file():
            raise StateError(f"there is no ledger at {path}", "check the path; only a new site creates a ledger")
        _check_local(path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise StateError(f"other users have rights on the ledger {path}", f"chmod 600 {path}")
        with _state_errors(path.name):
            chain = cls(_connect(_address(path)), path, tables)
        try:
            chain._check_format()
            chain.verify()
            if anchor is not None:
                chain.check_anchor(*_read_anchor(anchor))
                chain._anchor = anchor
                chain.keep_anchor()  # which a crash may have left behind
        except PrivetError:
            chain.close()
            raise
        return chain

    @classmethod
    def in_memory(cls, tables: str) -> Chain:
        """Return a chain that does not outlive its process."""
        database = _connect(":memory:")
        _fill(database, tables)
        return cls(database, None, tables)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # --- rows ------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Do all of the block or nothing, durably; one thread and process at a time.

        Raises:
            StateError: SQLite or the disk failed. The block may have taken effect, and then did so completely.
        """
        with self._lock, _state_errors(self.name):
            self._database.execute(begin)
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """See one state of the file throughout the block. No other process waits for it.

        Raises:
            StateError: SQLite or the disk failed.
        """
        with self.transaction("BEGIN") as database:
            yield database

    def append(self, content: Mapping[str, Any]) -> int:
        """Append a row, within a transaction, and return its number. The time is added, for readers alone."""
        return _append(self._database, content)

    def query(self, sql: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the rows that a SELECT finds, within a transaction. It names its values."""
        return self._database.execute(sql, values).fetchall()

    def last(self) -> Head:
        """Return the last row's number and digest, within a transaction."""
        return _last(self._database)

    def verify(self) -> None:
        """Check every row, that none is missing, and that tables and indexes are as they were made.

        Raises:
            VerificationError: They are not; the message names the first bad row.
        """
        head, expected = "", 1
        with self.reading() as database:
            # Bytes, as a changed text may be no text at all.
            rows = database.execute("SELECT sequence, CAST(content AS BLOB), head FROM entries ORDER BY sequence")
            for sequence, content, stored in rows:
                if sequence != expected:
                    raise self.wrong(f"row {expected} is missing")
                head = digest(head.encode() + content)
                if head != stored:
                    raise self.wrong(f"row {sequence} is not what was written")
                expected += 1
            ever = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
            if ever != (expected - 1,):
                raise self.wrong(f"row {expected} is missing")
            if _schema(database) != _schema(Chain.in_memory(self._tables)._database):
                raise self.wrong("its tables or triggers were changed")
            if database.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                raise self.wrong("its indexes do not fit its rows")

    def wrong(self, what: str) -> VerificationError:
        """Return the error that says what is wrong with this file."""
        return VerificationError(f"ledger {self.name}: {what}", _RESTORE)

    def _check_format(self) -> None:
        with _state_errors(self.name):
            application, version, mode = (
                self._database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "journal_mode")
            )
        if application != _APPLICATION:
            raise StateError(f"{self.name} is not a ledger", "check the path; if it was one, " + _RESTORE)
        if version != _VERSION or mode != "wal":
            raise StateError(
                f"ledger {self.name}: expected version {_VERSION} in mode wal, found version {version} in mode {mode}",
                "use the version of privet that wrote it",
            )

    # --- the anchor ------------------------------------------------------------------------------------------

    def start_anchor(self, anchor: Path) -> None:
        """Begin to keep the last head in a new file.

        Raises:
            StateError: It exists, it is beside the ledger, or it cannot be written.
        """
        _check_new_anchor(self._path, anchor)
        self._anchor = anchor
        self.keep_anchor()

    def check_anchor(self, sequence: int, head: str) -> None:
        """Check that a head seen elsewhere is still part of the chain.

        Raises:
            VerificationError: It is not: the file was rolled back, rewritten or replaced.
        """
        with self.reading() as database:
            row = database.execute("SELECT head FROM entries WHERE sequence = ?", (sequence,)).fetchone()
            last, _ = self.last()
        if row is None:
            raise self.wrong(f"it ends at row {last}, but row {sequence} was seen elsewhere: an old or new file")
        if row[0] != head:
            raise self.wrong(f"row {sequence} was seen elsewhere as {head}, here it is {row[0]}: another file")

    def keep_anchor(self) -> None:
        """Put the last head in the anchor, if there is one, durably: to be called before anything leaves the site.

        Under SQLite's write lock, so that a slower process never puts an older head after a newer one.

        Raises:
            StateError: The anchor cannot be written.
        """
        if self._anchor is None:
            return
        with self.transaction():
            head = self.last()
            if head != self._anchored:
                write_durably(self._anchor, canonical_json({"sequence": head[0], "head": head[1]}) + b"\n")
                self._anchored = head


def is_network(path: Path, mounts: str) -> bool:
    """Tell whether an absolute path lies on a network file system, by the text of /proc/mounts; best effort."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, where, found, *_ = line.split(" ")
        where = where.replace("\\040", " ")
        if path.is_relative_to(where) and len(where) >= len(best):  # a later mount hides an earlier one
            best, kind = where, found
    return _NETWORK.fullmatch(kind) is not None


def _check_local(path: Path) -> None:
    table = Path("/proc/mounts")
    if table.is_file() and is_network(path.resolve(), table.read_text(encoding="utf-8", errors="replace")):
        raise StateError(f"{path} is on a network file system, where locks do not hold", "use a local disk")


def _check_new_anchor(path: Path | None, anchor: Path) -> None:
    if path is None or anchor.resolve().parent == path.resolve().parent:
        raise StateError(f"the anchor {anchor} must be in another directory than the ledger: a backup takes both")
    if not anchor.parent.is_dir():
        raise StateError(f"there is no directory for the anchor {anchor}")
    if anchor.exists():
        raise StateError(f"there is an anchor at {anchor}, so there was a ledger before", _RESTORE)


def _make(path: Path, tables: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    database = _connect(_address(path))
    database.execute("PRAGMA journal_mode = WAL")
    _fill(database, tables)
    database.close()


def _address(path: Path) -> str:
    """Return the address by which SQLite opens a file and never creates one."""
    return f"{path.absolute().as_uri()}?mode=rw"


def _connect(where: str) -> sqlite3.Connection:
    uri = where != ":memory:"
    database = sqlite3.connect(where, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)
    # fullfsync: where fsync does not reach the disk (macOS). recursive_triggers: so that REPLACE counts as DELETE.
    for setting in ("synchronous = FULL", "fullfsync = ON", "foreign_keys = ON", "recursive_triggers = ON"):
        database.execute(f"PRAGMA {setting}")
    return database


def _fill(database: sqlite3.Connection, tables: str) -> None:
    """Write the tables and the first row, whose nonce makes every ledger's heads its own."""
    numbers = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
    database.executescript(f"BEGIN; {tables} {numbers}")
    _append(database, {"kind": "genesis", "version": _VERSION, "nonce": secrets.token_hex(16)})
    database.execute("COMMIT")


def _append(database: sqlite3.Connection, content: Mapping[str, Any]) -> int:
    sequence, head = _last(database)
    text = canonical_json({**content, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    row = (sequence + 1, text.decode(), digest(head.encode() + text))
    database.execute("INSERT INTO entries (sequence, content, head) VALUES (?, ?, ?)", row)
    return sequence + 1


def _last(database: sqlite3.Connection) -> Head:
    row = database.execute("SELECT sequence, head FROM entries ORDER BY sequence DESC LIMIT 1").fetchone()
    return (0, "") if row is None else (int(row[0]), str(row[1]))


def _schema(database: sqlite3.Connection) -> list[tuple[str, str]]:
    return database.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


def _read_anchor(anchor: Path) -> Head:
    try:
        document = json.loads(anchor.read_bytes())
        return int(document["sequence"]), str(document["head"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"the anchor {anchor} cannot be read ({type(error).__name__})",
            "restore it; `start_anchor` begins one, for a ledger that never had one",
        ) from None


@contextmanager
def _state_errors(name: str) -> Iterator[None]:
    """Turn what SQLite and the disk raise into `StateError`, without their texts."""
    try:
        yield
    except sqlite3.Error as error:
        code = str(getattr(error, "sqlite_errorname", type(error).__name__))
        hint = next((text for prefix, text in _HINTS.items() if code.startswith(prefix)), "nothing may be sent")
        raise StateError(f"ledger {name}: the step did not complete ({code})", hint) from None
    except OSError as error:
        raise StateError(
            f"ledger {name}: {error.strerror}", "nothing may be sent; check the disk, then repeat"
        ) from None
    except OverflowError:
        raise StateError(f"ledger {name}: a payload must be below 1 GB", "nothing may be sent") from None
