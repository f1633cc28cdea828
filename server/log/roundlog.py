"""The round log, stored: leaves, tree, checkpoints and cosignatures in one SQLite file, published as static files.

::

    append      adds leaves and their hashes in the tree, in one transaction, durable on return
    checkpoint  signs the head of the tree and stores it before anyone sees it; one for each size, permanently
    cosign      verifies and stores a witness's signature on it
    publish     writes tiles and bundles, then `checkpoint`, once a quorum has cosigned

Each step needs the one before it, and each may be repeated: after a crash at any point the log is intact and can be
continued. A write that fails changes nothing. After it, the log accepts no write until it is opened again, which
verifies it.

The file has one writer. Opening it recomputes the whole tree from the leaves and checks every checkpoint. This module
reads no statement; where the log's keys were rotated, the history says which key counts for which size (`follow`).
"""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.errors import PrivetError, ProtocolError, StateError, TooFewSitesError, VerificationError
from privet.common.files import Step, sync_directory, write_durably
from privet.common.log.checkpoint import Checkpoint, LeafProof, LogAt, Policy, accept_checkpoint, open_checkpoint
from privet.common.log.merkle import (
    Frontier,
    HashProof,
    leaf_hash,
    prove_consistency,
    prove_inclusion,
    root,
    stored_count,
)
from privet.common.log.note import (
    ED25519,
    MAX_SIGNERS,
    Note,
    NoteKey,
    Signature,
    encode_lines,
    log_lines,
    parse_lines,
    parse_note,
    public_of,
    verify_note,
)
from privet.common.log.tiles import WIDTH, Tile, bundle_bytes, check_leaf, tile_bytes, tiles

CHECKPOINT = "checkpoint"

_FILE, _LOCK = "log.sqlite", ".lock"
# Seconds to wait for the lock: the service holds it for a moment when it logs who joined.
_PATIENCE = 2.0
_APPLICATION = 0x70767432
_TABLES = {
    "leaves": "number INTEGER PRIMARY KEY, data BLOB NOT NULL",
    "hashes": "place INTEGER PRIMARY KEY, hash BLOB NOT NULL",
    "checkpoints": "size INTEGER PRIMARY KEY, note BLOB NOT NULL",
    "cosignatures": "size INTEGER NOT NULL, witness TEXT NOT NULL, line TEXT NOT NULL, PRIMARY KEY (size, witness)",
}
_RESTORE = "restore the newest backup; never start a new log in its place: the witnesses would refuse it"


def log_file(directory: Path) -> Path:
    """Return the path of the log's file in a directory."""
    return directory / _FILE


def create_log(directory: Path) -> None:
    """Create an empty log, complete or not at all.

    Raises:
        StateError: The directory has a log already, or cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory), _storage_errors(directory):
        if (directory / _FILE).exists():
            raise StateError(f"{directory} has a round log already", "use it, or choose another directory")
        # Built under another name: a file that is there is complete.
        staging = directory / f".{_FILE}.partial"
        for suffix in ("", "-journal", "-wal", "-shm"):  # left by a creation that was interrupted
            staging.with_name(staging.name + suffix).unlink(missing_ok=True)
        with closing(_connect(staging)) as database:
            for name, columns in _TABLES.items():
                database.execute(f"CREATE TABLE {name} ({columns}) STRICT")
                # Against a mistake in this program, not against an attacker: witnesses find what an attacker changes.
                for verb in ("UPDATE", "DELETE"):
                    database.execute(
                        f"CREATE TRIGGER {name}_{verb} BEFORE {verb} ON {name} "
                        "BEGIN SELECT raise(ABORT, 'the log only grows'); END"
                    )
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
        staging.rename(directory / _FILE)
        sync_directory(directory)


@contextmanager
def open_log(
    directory: Path,
    origin: str,
    key: Ed25519PrivateKey,
    step: Step = lambda name: None,
    *,
    pq: MLDSA65PrivateKey | None = None,
    one_key: bool = True,
) -> Iterator[RoundLog]:
    """Open a log, lock it for this process, and verify it.

    Args:
        directory: Where `create_log` made it.
        origin: The log's name.
        key: Signs checkpoints.
        step: Called with the name of each step.
        pq: Signs checkpoints with ML-DSA-65 as well; None where the log's key is Ed25519 alone.
        one_key: Whether this key signed all checkpoints. If not, `RoundLog.follow` checks who signed them.

    Raises:
        StateError: There is no log, another process has locked it, or it cannot be read.
        VerificationError: Its hashes or checkpoints do not follow from its leaves.
    """
    if not (directory / _FILE).is_file():
        raise StateError(
            f"{directory} has no round log",
            "check the path; `privet coordinator init` creates a log with the consortium",
        )
    with _locked(directory):
        with _storage_errors(directory):
            database = _connect(directory / _FILE)
        with closing(database):
            log = RoundLog(directory, database, (origin, key, pq), step)
            log.verify()
            if one_key:
                log.follow(lambda size: log.public)
            yield log


class RoundLog:
    """An open round log; `open_log` makes it. Belongs to the thread that opened it."""

    def __init__(
        self,
        directory: Path,
        database: sqlite3.Connection,
        signer: tuple[str, Ed25519PrivateKey, MLDSA65PrivateKey | None],
        step: Step,
    ) -> None:
        self.directory = directory
        self.step = step
        self._db = database
        self._origin, self._key, self._pq = signer
        self._frontier = Frontier()
        self._failed = False
        self._log_at: LogAt = lambda size: self.public

    @property
    def public(self) -> NoteKey:
        """The key that verifies the checkpoints."""
        return public_of(self._origin, ED25519, self._key, self._pq)

    def follow(self, log_at: LogAt) -> None:
        """Take over which key of the log counts for which size, and check all checkpoints by it.

        Args:
            log_at: The history's answer. It is asked again for each checkpoint that is signed later.

        Raises:
            VerificationError: A checkpoint is signed with another key.
        """
        for (note,) in list(self._rows("SELECT note FROM checkpoints ORDER BY size")):
            open_checkpoint(note, log_at)
        self._log_at = log_at

    def sign_with(self, key: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None) -> None:
        """Sign checkpoints with other keys from now on."""
        self._key, self._pq = key, pq

    @property
    def size(self) -> int:
        """The number of leaves."""
        return self._frontier.size

    def leaves(self, first: int = 0) -> Iterator[bytes]:
        """Yield the leaves from number `first` on."""
        for (leaf,) in self._rows("SELECT data FROM leaves WHERE number >= ? ORDER BY number", first):
            yield leaf

    def root_at(self, size: int) -> bytes:
        """Return the root of the tree of the first `size` leaves."""
        self._check_size(size)
        return root(size, self._read)

    # Append

    def append(self, leaves: Sequence[bytes]) -> range:
        """Add leaves: all of them, durable on return, or none. One call is one write to the disk.

        Returns:
            Their numbers.

        Raises:
            ProtocolError: A leaf is empty or longer than 65 535 bytes.
            StateError: They could not be written.
        """
        # Computed on copies: if the transaction fails, the frontier in memory is still that of the file.
        frontier, hashes = self._frontier, list[bytes]()
        for leaf in leaves:
            check_leaf(leaf)
            frontier, gained = frontier.append(leaf_hash(leaf))
            hashes += gained
        numbers = range(self.size, frontier.size)
        places = range(stored_count(self.size), stored_count(frontier.size))
        with self._transaction("append"):
            self._db.executemany("INSERT INTO leaves VALUES (?, ?)", zip(numbers, leaves, strict=True))
            self.step("append:half")
            self._db.executemany("INSERT INTO hashes VALUES (?, ?)", zip(places, hashes, strict=True))
        self._frontier = frontier
        return numbers

    # Checkpoints

    def checkpoint(self) -> bytes:
        """Return the signed head of the tree, with the cosignatures it has so far.

        Signed and stored at the first call for a size; from then on it is the only checkpoint of that size.

        Raises:
            ProtocolError: The log is empty.
            StateError: It could not be written.
        """
        if self.size == 0:
            raise ProtocolError("an empty round log has no checkpoint", "run `privet coordinator found`")
        if self._stored(self.size) is None:
            if self._log_at(self.size) != self.public:
                raise StateError(
                    "the round log's key was rotated, and this process still uses the former key",
                    "start the command again",
                )
            text = Checkpoint(self._origin, self.size, self._frontier.root).text
            note = Note(text, log_lines(text, self._origin, self._key, self._pq))
            # Stored before it leaves this process: two signed heads of one size would look like a forked log.
            with self._transaction("checkpoint"):
                self._db.execute("INSERT INTO checkpoints VALUES (?, ?)", (self.size, note.encode()))
        return self.note(self.size)

    def note(self, size: int) -> bytes:
        """Return the checkpoint of this size with the cosignatures it has so far.

        Raises:
            ProtocolError: No checkpoint of this size was signed.
        """
        note = self._stored(size)
        if note is None:
            raise ProtocolError(f"the round log has not signed a checkpoint of {size} leaves", "report this as a bug")
        rows = self._rows("SELECT line FROM cosignatures WHERE size = ? ORDER BY witness", size)
        return with_cosignatures(note, [lines for (lines,) in rows])

    def cosign(self, size: int, signatures: Sequence[Signature], policy: Policy) -> int:
        """Store witnesses' cosignatures on a checkpoint; return how many it still needs.

        Args:
            size: Of the checkpoint.
            signatures: The lines of witnesses: two of each with a hybrid key.
            policy: Whose cosignatures count.

        Raises:
            ProtocolError: There is no such checkpoint, or a signature is not of a witness of the policy. Nothing is
                stored.
            VerificationError: A signature is not a cosignature on this checkpoint. Nothing is stored.
            StateError: The cosignatures could not be written.
        """
        note = self._stored(size)
        if note is None:
            raise ProtocolError(f"the round log has not signed a checkpoint of {size} leaves", "report this as a bug")
        signers: dict[str, list[Signature]] = {}
        for signature in signatures:
            signers.setdefault(signature.name, []).append(signature)
        for name, lines in signers.items():
            found = verify_note(Note(note.text, tuple(lines)), policy.witnesses)
            # No line besides: it would be stored, and shown to all, unverified.
            if not found or len(lines) != len(found[0].ids):
                raise ProtocolError(
                    f"a cosignature has the name {name}, which is not a witness of this round log, or lacks "
                    "the second line of a hybrid key",
                    "accept cosignatures of members only: list them with `privet coordinator members`",
                )
        rows = [(size, name, encode_lines(lines)) for name, lines in signers.items()]
        with self._transaction("cosign"):
            self._db.executemany("INSERT OR IGNORE INTO cosignatures VALUES (?, ?, ?)", rows)
        return max(0, policy.needed - len(verify_note(parse_note(self.note(size)), policy.witnesses)))

    def accepted(self, policy: Policy) -> bytes | None:
        """Return the newest checkpoint that a quorum has cosigned; None if there is none.

        An earlier one may be signed with an earlier key than the policy's.
        """
        for (size,) in list(self._rows("SELECT size FROM checkpoints ORDER BY size DESC")):
            note = self.note(size)
            try:
                accept_checkpoint(note, replace(policy, log=self._log_at(size)))
            except TooFewSitesError:
                continue
            return note
        return None

    def accepted_size(self, policy: Policy) -> int:
        """Return the number of leaves under the newest checkpoint that a quorum has cosigned."""
        note = self.accepted(policy)
        return self._head(note).size if note else 0

    def _head(self, note: bytes) -> Checkpoint:
        return open_checkpoint(note, self._log_at)[0]

    # Proofs

    def prove_consistency(self, old: int, new: int) -> HashProof:
        """Prove to a witness that the log of `new` leaves extends the log of `old` leaves."""
        self._check_size(new)
        return prove_consistency(old, new, self._read)

    def prove_leaf(self, index: int, policy: Policy) -> LeafProof:
        """Prove that a leaf is in the log, under the newest accepted checkpoint.

        Raises:
            TooFewSitesError: No accepted checkpoint covers the leaf yet.
        """
        note = self.accepted(policy)
        size = self._head(note).size if note else 0
        if note is None or index >= size:
            raise TooFewSitesError(
                f"leaf {index} of the round log is not cosigned yet: no checkpoint over it has the {policy.needed} "
                "cosignatures that the log's policy demands",
                "wait until more sites are online and cosign the log",
            )
        return LeafProof(index, prove_inclusion(index, size, self._read), note)

    # Publish

    def publish(self, directory: Path, policy: Policy) -> Checkpoint:
        """Write the log as static files up to the newest accepted checkpoint, which is written last.

        Existing files are kept: a file's name determines its content. A partial file is deleted once the full one and a
        checkpoint over it are written.

        Raises:
            TooFewSitesError: No checkpoint has its quorum yet.
            StateError: The directory cannot be written, or has a newer or a different log.
        """
        note = self.accepted(policy)
        if note is None:
            raise TooFewSitesError(
                f"the round log cannot be published: no checkpoint has the {policy.needed} cosignatures that its "
                "policy demands",
                "wait until more sites are online and cosign the log",
            )
        checkpoint = self._head(note)
        with _storage_errors(directory):
            _make(directory)
            self._check_published(directory, checkpoint)
            for tile in tiles(checkpoint.size):
                path = directory / tile.path
                if not path.exists():
                    self.step("publish:file")
                    _make(path.parent)
                    write_durably(path, self._content(tile))
            # Last: a reader that sees this checkpoint finds every file under it.
            self.step("publish:tiles")
            write_durably(directory / CHECKPOINT, note)
            # Only now: until here a reader with the old checkpoint needed the partial files.
            self.step("publish:checkpoint")
            for tile in tiles(checkpoint.size):
                if tile.width == WIDTH:
                    shutil.rmtree(directory / f"{tile.path}.p", ignore_errors=True)
        return checkpoint

    def _check_published(self, directory: Path, new: Checkpoint) -> None:
        """Refuse to publish over a log that this one does not extend: this one may be an old backup."""
        file = directory / CHECKPOINT
        if not file.exists():
            return
        try:
            old = self._head(file.read_bytes())
            same = old.size <= new.size and root(old.size, self._read) == old.root
        except PrivetError as error:
            raise StateError(
                f"{file} is not a checkpoint of this round log: {error.message}",
                "check the directory; to publish this log, choose one without another log",
            ) from None
        if not same:
            raise StateError(
                f"{file} was published from {old.size} leaves, but this round log of {new.size} leaves does not "
                "continue them",
                "find the newest backup of the log: this one is older, or was continued separately",
            )

    def _content(self, tile: Tile) -> bytes:
        if tile.level is not None:
            return tile_bytes(tile, self._read)
        first = tile.number * WIDTH
        rows = self._rows("SELECT data FROM leaves WHERE number BETWEEN ? AND ?", first, first + tile.width - 1)
        return bundle_bytes(leaf for (leaf,) in rows)

    # Storage

    def verify(self) -> None:
        """Recompute the tree from the leaves and compare it with the stored hashes and checkpoints.

        Raises:
            StateError: The file cannot be read.
            VerificationError: A leaf, hash or checkpoint was changed or is missing.
        """
        with _storage_errors(self.directory):
            if self._db.execute("PRAGMA application_id").fetchone() != (_APPLICATION,):
                raise StateError(f"{self.directory / _FILE} is not a round log", _RESTORE)
            frontier = Frontier()
            stored = self._db.execute("SELECT place, hash FROM hashes ORDER BY place")
            heads = dict(self._db.execute("SELECT size, note FROM checkpoints").fetchall())
            place = 0
            for number, leaf in self._db.execute("SELECT number, data FROM leaves ORDER BY number"):
                frontier, gained = frontier.append(leaf_hash(leaf))
                expected = list(enumerate(gained, place))
                place += len(gained)
                if number != frontier.size - 1 or stored.fetchmany(len(gained)) != expected:
                    raise VerificationError(
                        f"round log: leaf {frontier.size - 1} was changed, or is missing, in {_FILE}", _RESTORE
                    )
                if frontier.size in heads:
                    self._check_head(heads.pop(frontier.size), frontier)
            # Hashes or checkpoints without leaves: the end of the log was cut off.
            if stored.fetchone() is not None or heads:
                raise VerificationError(
                    f"round log: the leaves from number {frontier.size} on are missing in {_FILE}", _RESTORE
                )
        self._frontier = frontier

    def _check_head(self, note: bytes, frontier: Frontier) -> None:
        expected = Checkpoint(self._origin, frontier.size, frontier.root)
        if Checkpoint.parse(parse_note(note).text) != expected:  # `follow` checks who signed it
            raise VerificationError(
                f"round log: {_FILE} has a checkpoint of {frontier.size} leaves that was not made from these leaves",
                _RESTORE,
            )

    def _stored(self, size: int) -> Note | None:
        rows = list(self._rows("SELECT note FROM checkpoints WHERE size = ?", size))
        return parse_note(rows[0][0]) if rows else None

    def _check_size(self, size: int) -> None:
        if size > self.size:
            raise ProtocolError(
                f"a proof was requested for {size} leaves of the round log, but the log has {self.size}",
                "if a site has cosigned more leaves, this log is an old backup: restore the newest",
            )

    def _read(self, places: Sequence[int]) -> list[bytes]:
        found = [list(self._rows("SELECT hash FROM hashes WHERE place = ?", place)) for place in places]
        return [rows[0][0] for rows in found]

    def _rows(self, query: str, *values: int) -> Iterator[tuple[Any, ...]]:
        with _storage_errors(self.directory):
            yield from self._db.execute(query, values)

    @contextmanager
    def _transaction(self, name: str) -> Iterator[None]:
        """Write all or nothing, durably. After a failure no write is accepted until the log is opened again."""
        if self._failed:
            raise StateError(
                "the round log accepts no more writes in this process, because an earlier write failed",
                "start the command again: it verifies the log first",
            )
        self.step(f"{name}:begin")
        # Set before the write and cleared after it: a failed COMMIT leaves open whether the write is on the disk.
        self._failed = True
        with _storage_errors(self.directory):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self.step(f"{name}:written")
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        self._failed = False
        self.step(f"{name}:committed")


def with_cosignatures(note: Note, rows: Sequence[str]) -> bytes:
    """Return a checkpoint with the stored cosignatures of its witnesses, as many as a note has room for."""
    lines = [line for row in rows[: MAX_SIGNERS - 1] for line in parse_lines(row)]
    return Note(note.text, (*note.signatures, *lines)).encode()


def lean(note: bytes, log: NoteKey, witnesses: Sequence[NoteKey], most: int) -> bytes:
    """Return a checkpoint with the signature of its log and at most `most` of its cosignatures, and nothing else.

    Args:
        note: The checkpoint's note.
        log: The log's key for its size.
        witnesses: Whose cosignatures count.
        most: Number of cosigners.

    Raises:
        ProtocolError, VerificationError: It is no note, or a cosignature does not match.
    """
    whole = parse_note(note)
    keys = (log, *verify_note(whole, witnesses)[:most])
    kept = {(key.name, key_id) for key in keys for key_id in key.ids}
    return Note(whole.text, tuple(each for each in whole.signatures if (each.name, each.key_id) in kept)).encode()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    # With FULL a commit is on the disk when it returns (sqlite.org/pragma.html, synchronous).
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {pragma}")
    return database


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE
    with (directory / _LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    hint = "wait until the other process ends, or stop it"
                    raise StateError(f"another process has locked the round log in {directory}", hint) from None
                time.sleep(_PATIENCE / 40)
        yield


@contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StateError(
            f"round log: {directory} cannot be read or written ({error})",
            "check the disk, its free space and the permissions, then start the command again",
        ) from None


def _make(directory: Path) -> None:
    """Make a directory and its parents, durably."""
    if not directory.exists():
        _make(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
