"""The hash chain of the ledger (budget): an SQLite file of append-only rows, each chained to the one before.

Row n holds canonical JSON and head(n) = SHA-256(head(n-1) || JSON). So verification finds a row that was changed, moved
or removed. An attacker who can write the file can also write a whole new chain, or restore an old copy. Only a head
kept elsewhere reveals that. An *anchor* is a small file, best on another disk, that holds the last head.

With a write-ahead log and synchronous=FULL, a transaction that has returned is on the disk. Other code of this process
must not open the file meanwhile: closing any other handle to it would drop SQLite's locks.
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

_APPLICATION = 0x70767431
_PLAIN, _SEALED = 1, 2  # file formats: a file begins as 1, and is 2 from its first sealed payload on
_BUSY_SECONDS = 30.0
_RESTORE = "restore the newest copy of the ledger; never create a second one for the same data"
# File systems on which SQLite's locks do not hold between machines.
_NETWORK = re.compile(
    r"9p|afs|beegfs|ceph|cifs|davfs|gfs2|glusterfs|gpfs|lustre|ncpfs|nfs|nfs4|ocfs2|orangefs|pvfs2|smb3|smbfs"
    r"|fuse\.(ceph-fuse|gcsfuse|glusterfs|rclone|s3fs|sshfs)"
)
_HINTS = {
    "SQLITE_BUSY": "find the process that has held the ledger for 30 s, then repeat; nothing is sent meanwhile",
    "SQLITE_FULL": "free disk space, then repeat; the site sends nothing meanwhile",
    "SQLITE_IOERR": "check disk space and the disk, then repeat; the site sends nothing meanwhile",
    "SQLITE_NOTADB": "correct `ledger` in the site file if it names another file; otherwise restore the ledger from a "
    "backup",
}
_CHECK_DISK = "check the disk, then repeat; the site sends nothing meanwhile"
LOST_ANCHOR = (
    "mount its disk, or restore the anchor from a backup. If it is lost, and you are sure that the ledger is no old "
    "copy, start another: `privet site init SITE --anchor`"
)
"""What to do where a ledger has an anchor that cannot be read."""
Head = tuple[int, str]
"""Number and head of a row. They commit to all rows up to it."""


class Chain:
    """An open chain, shared by the threads of one process. Other processes open the file themselves.

    `tables` is the SQL of its owner. It creates the table `entries (sequence, content, head)` and the owner's other
    tables. `sequence` is AUTOINCREMENT, so that SQLite remembers the last row and a missing end is found. `verify`
    checks that the file has exactly these tables.
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
        """Create a file that only its owner can read, and open it. The file is created completely or not at all.

        Raises:
            StateError: `path` or `anchor` exists already, or the file system is not a local one.
        """
        _check_local(path)
        if anchor is not None:
            _check_new_anchor(path, anchor)
        with _state_errors(path.name):
            # A crash leaves a temporary directory behind, and never half a ledger under its final name.
            with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as staging:
                _make(Path(staging, path.name), tables)
                try:
                    os.link(Path(staging, path.name), path)  # unlike a rename, it never replaces a file
                except FileExistsError:
                    raise StateError(
                        f"ledger {path} exists already",
                        "keep it: a ledger is created once and never replaced. For another dataset, set another path "
                        "in `ledger` in the site file",
                    ) from None
            sync_directory(path.parent)
        chain = cls.open(path, tables)
        if anchor is not None:
            chain.start_anchor(anchor)
        return chain

    @classmethod
    def open(cls, path: Path, tables: str, anchor: Path | None = None) -> Chain:
        """Open an existing file, verify it, and compare it with its anchor.

        Raises:
            StateError: File or anchor is missing or cannot be read, or other users have rights on the file.
            VerificationError: A row was changed, or the file is behind its anchor.
        """
        if not path.is_file():
            raise StateError(
                f"there is no ledger at {path}",
                "check `ledger` in the site file; on a new site, create it with `privet site init SITE`",
            )
        _check_local(path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise StateError(
                f"other users of this machine can read or write the ledger {path}", f"run `chmod 600 {path}`"
            )
        with _state_errors(path.name):
            chain = cls(_connect(_address(path)), path, tables)
        try:
            chain._check_format()
            chain.verify()
            if anchor is not None:
                chain.check_anchor(*_read_anchor(anchor))
                chain._anchor = anchor
                chain.keep_anchor()  # a crash between a commit and its anchor leaves the anchor one step behind
        except PrivetError:
            chain.close()
            raise
        return chain

    @classmethod
    def in_memory(cls, tables: str) -> Chain:
        """Return a chain in memory, which ends with the process."""
        database = _connect(":memory:")
        _fill(database, tables)
        return cls(database, None, tables)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # --- rows ------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Run the block as one durable transaction, one thread and one process at a time.

        Raises:
            StateError: SQLite or the disk failed. The block took effect completely or not at all.
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
        """Give the block one consistent state of the file. Other processes do not wait for it.

        Raises:
            StateError: SQLite or the disk failed.
        """
        with self.transaction("BEGIN") as database:
            yield database

    def append(self, content: Mapping[str, Any]) -> int:
        """Append a row, within a transaction, and return its number. The time is added, for human readers only."""
        return _append(self._database, content)

    def query(self, sql: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the rows of a SELECT with named values, within a transaction."""
        return self._database.execute(sql, values).fetchall()

    def last(self) -> Head:
        """Return the last row's number and head, within a transaction."""
        return _last(self._database)

    @property
    def sealed(self) -> bool:
        """Whether the file holds, or ever held, a sealed payload. Call it within a transaction."""
        return bool(self._database.execute("PRAGMA user_version").fetchone()[0] == _SEALED)

    def mark_sealed(self) -> None:
        """Note, within a transaction, that the file holds sealed payloads. Versions that know none then refuse it."""
        self._database.execute(f"PRAGMA user_version = {_SEALED}")

    def verify(self) -> None:
        """Check that every row is unchanged, that none is missing, and that tables and indexes are unchanged.

        Raises:
            VerificationError: Something was changed; the message names the first bad row.
        """
        head, expected = "", 1
        with self.reading() as database:
            # As bytes, because a changed text may not be valid UTF-8.
            rows = database.execute("SELECT sequence, CAST(content AS BLOB), head FROM entries ORDER BY sequence")
            for sequence, content, stored in rows:
                if sequence != expected:
                    raise self.wrong(f"row {expected} is missing")
                head = digest(head.encode() + content)
                if head != stored:
                    raise self.wrong(f"row {sequence} was changed")
                expected += 1
            # The chain cannot show that its end was cut off; SQLite's counter of rows ever inserted can.
            ever = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
            if ever != (expected - 1,):
                raise self.wrong(f"row {expected} is missing")
            # A trigger or view of an attacker's could change what the next transaction does.
            if _schema(database) != _schema(Chain.in_memory(self._tables)._database):
                raise self.wrong("its tables or triggers were changed")
            if database.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                raise self.wrong("its indexes do not match its rows")

    def wrong(self, what: str) -> VerificationError:
        """Return the error for a defect of this file."""
        return VerificationError(f"ledger {self.name}: {what}", _RESTORE)

    def _check_format(self) -> None:
        with _state_errors(self.name):
            application, version, mode = (
                self._database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "journal_mode")
            )
        if application != _APPLICATION:
            raise StateError(
                f"the file {self.name} is not a ledger",
                "check `ledger` in the site file; if the file was a ledger, " + _RESTORE,
            )
        if version not in (_PLAIN, _SEALED) or mode != "wal":
            raise StateError(
                f"ledger {self.name}: expected file format {_PLAIN} or {_SEALED} with SQLite's journal mode wal, found "
                f"format {version} with mode {mode}",
                "install the version of privet that wrote the ledger",
            )

    # --- the anchor ------------------------------------------------------------------------------------------

    def start_anchor(self, anchor: Path) -> None:
        """Start to keep the last head in a new file.

        Raises:
            StateError: The file exists, is in the ledger's directory, or cannot be written.
        """
        _check_new_anchor(self._path, anchor)
        # The head that the old anchor holds has not been written to this one.
        self._anchor, self._anchored = anchor, None
        self.keep_anchor()

    def check_anchor(self, sequence: int, head: str) -> None:
        """Check that a head recorded elsewhere is still part of the chain.

        Raises:
            VerificationError: It is not: the file was rolled back, rewritten or replaced.
        """
        with self.reading():
            self._check_holds(sequence, head)

    def _check_holds(self, sequence: int, head: str) -> None:
        """Do what `check_anchor` does, within a transaction."""
        row = self._database.execute("SELECT head FROM entries WHERE sequence = ?", (sequence,)).fetchone()
        last, _ = self.last()
        if row is None:
            raise self.wrong(
                f"it ends at row {last}, but row {sequence} is on record elsewhere: an old copy was restored, or the "
                "file was replaced"
            )
        if row[0] != head:
            raise self.wrong(
                f"row {sequence} is on record elsewhere with head {head}, found {row[0]}: the file was rewritten or "
                "replaced"
            )

    def keep_anchor(self) -> None:
        """Write the last head to the anchor, if there is one, durably. Call it before anything leaves the site.

        It holds SQLite's write lock, so that a slower process never writes an older head over a newer one.

        Raises:
            StateError: The anchor cannot be written.
            VerificationError: The file no longer holds the last head that this process has written to the anchor.
        """
        if self._anchor is None:
            return
        # After the commit, never before: an anchor ahead of the file would look like a rollback and refuse the ledger.
        with self.transaction():
            head = self.last()
            if head != self._anchored:
                # An old copy that was put back while the process runs: writing its head would hide that.
                if self._anchored is not None and self._anchored[0]:
                    self._check_holds(*self._anchored)
                write_durably(self._anchor, canonical_json({"sequence": head[0], "head": head[1]}) + b"\n")
                self._anchored = head


def is_network(path: Path, mounts: str) -> bool:
    """Return whether an absolute path is on a network file system, by the text of /proc/mounts. Best effort."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, where, found, *_ = line.split(" ")
        where = where.replace("\\040", " ")
        if path.is_relative_to(where) and len(where) >= len(best):  # a later mount hides an earlier one
            best, kind = where, found
    return _NETWORK.fullmatch(kind) is not None


def on_one_disk(path: Path, anchor: Path) -> bool:
    """Return whether two files are, or would be, on one file system. Their directories exist. Raises OSError."""
    return path.parent.stat().st_dev == anchor.parent.stat().st_dev


def _check_local(path: Path) -> None:
    table = Path("/proc/mounts")
    if table.is_file() and is_network(path.resolve(), table.read_text(encoding="utf-8", errors="replace")):
        raise StateError(
            f"the ledger {path} is on a network file system, where file locks are not reliable",
            "set `ledger` in the site file to a path on a local disk",
        )


def _check_new_anchor(path: Path | None, anchor: Path) -> None:
    if path is None or anchor.resolve().parent == path.resolve().parent:
        raise StateError(
            f"the anchor {anchor} is in the ledger's directory; restored together from one backup, it could not reveal "
            "an old ledger",
            "set `anchor` in the site file to a path on another disk",
        )
    if not anchor.parent.is_dir():
        raise StateError(f"the directory of the anchor {anchor} does not exist", f"run `mkdir -p {anchor.parent}`")
    if anchor.exists():
        raise StateError(
            f"the anchor {anchor} exists already, so there was a ledger before, or it is another site's",
            f"{_RESTORE}. If the file is another site's, name another: `privet site setup SITE --anchor PATH`",
        )


def _make(path: Path, tables: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    database = _connect(_address(path))
    database.execute("PRAGMA journal_mode = WAL")
    _fill(database, tables)
    database.close()


def _address(path: Path) -> str:
    """Return the address with which SQLite opens a file and never creates one."""
    return f"{path.absolute().as_uri()}?mode=rw"


def _connect(where: str) -> sqlite3.Connection:
    uri = where != ":memory:"
    database = sqlite3.connect(where, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)
    # fullfsync: on macOS, fsync alone does not reach the disk. recursive_triggers: REPLACE then fires DELETE triggers.
    # The last two: what was deleted stays neither in free pages nor in the write-ahead log.
    for setting in (
        "synchronous = FULL",
        "fullfsync = ON",
        "foreign_keys = ON",
        "recursive_triggers = ON",
        "secure_delete = ON",
        "journal_size_limit = 0",
    ):
        database.execute(f"PRAGMA {setting}")
    return database


def _fill(database: sqlite3.Connection, tables: str) -> None:
    """Write the tables and the first row. Its nonce makes the heads of every ledger unique."""
    numbers = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_PLAIN};"
    database.executescript(f"BEGIN; {tables} {numbers}")
    _append(database, {"kind": "genesis", "version": _PLAIN, "nonce": secrets.token_hex(16)})
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
            LOST_ANCHOR,
        ) from None


@contextmanager
def _state_errors(name: str) -> Iterator[None]:
    """Convert errors of SQLite and the disk to `StateError`, without their texts, which may quote rows."""
    try:
        yield
    except sqlite3.Error as error:
        code = str(getattr(error, "sqlite_errorname", type(error).__name__))
        hint = next((text for prefix, text in _HINTS.items() if code.startswith(prefix)), _CHECK_DISK)
        raise StateError(f"ledger {name}: the database transaction did not complete ({code})", hint) from None
    except OSError as error:
        raise StateError(f"ledger {name} cannot be read or written ({error.strerror})", _CHECK_DISK) from None
    except OverflowError:
        raise StateError(
            f"ledger {name}: expected an update of less than 1 GB, found a larger one",
            "train a smaller adapter: lower lora.rank in the study",
        ) from None
