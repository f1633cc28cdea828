"""The round log, read-only: answer the consortium service's questions while another process writes the log.

The round log has one writer, which keeps it open (`server/log/roundlog.py`). A reader opens the same file read-only for
each question, and sees what was committed. It checks nothing: the site that asks verifies the answer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from privet.common.errors import ProtocolError, StateError
from privet.common.log.merkle import HashProof, prove_consistency, prove_inclusion
from privet.common.log.note import parse_note
from privet.server.log.roundlog import log_file, with_cosignatures


@dataclass(frozen=True)
class LogFile:
    """The directory of a round log, for reading."""

    directory: Path

    def size(self) -> int:
        """Return the number of leaves."""
        with self._open() as database:
            return _size(database)

    def checkpoint(self) -> bytes:
        """Return the newest signed checkpoint, with the cosignatures it has so far; empty if there is no checkpoint."""
        with self._open() as database:
            found = database.execute("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1").fetchone()
            if found is None:
                return b""
            rows = database.execute("SELECT line FROM cosignatures WHERE size = ? ORDER BY witness", (found[0],))
            return with_cosignatures(parse_note(found[1]), [lines for (lines,) in rows])

    def head(self) -> tuple[bytes, tuple[str, ...]]:
        """Return the newest checkpoint with its log's signature alone, and who cosigned it, by name.

        Of 1,000 witnesses the cosignatures take 5 MB. Without a checkpoint, both are empty.
        """
        with self._open() as database:
            found = database.execute("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1").fetchone()
            if found is None:
                return b"", ()
            rows = database.execute("SELECT witness FROM cosignatures WHERE size = ? ORDER BY witness", (found[0],))
            return found[1], tuple(name for (name,) in rows)

    def leaves(self, first: int, count: int, most_bytes: int) -> list[bytes]:
        """Return leaves from `first` on: at most `count`, and at most `most_bytes` in total (but one at least)."""
        leaves: list[bytes] = []
        with self._open() as database:
            query = "SELECT data FROM leaves WHERE number >= ? ORDER BY number LIMIT ?"
            for (leaf,) in database.execute(query, (first, count)):
                most_bytes -= len(leaf)
                if most_bytes < 0 and leaves:
                    break
                leaves.append(leaf)
        return leaves

    def consistency(self, old: int, new: int) -> HashProof:
        """Prove that the log of `new` leaves extends that of `old`.

        Raises:
            ProtocolError: The log has fewer leaves.
        """
        with self._open() as database:
            _check(old <= new <= _size(database), f"a proof from {old} to {new} leaves")
            return prove_consistency(old, new, lambda places: _read(database, places))

    def inclusion(self, index: int, size: int) -> HashProof:
        """Prove that a leaf is in the tree of the first `size`.

        Raises:
            ProtocolError: The log has fewer leaves.
        """
        with self._open() as database:
            _check(index < size <= _size(database), f"a proof for leaf {index} of {size}")
            return prove_inclusion(index, size, lambda places: _read(database, places))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            address = f"{log_file(self.directory).resolve().as_uri()}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as database:
                # One snapshot for one question: the writer may commit between two of its queries.
                database.execute("BEGIN")
                yield database
        except sqlite3.Error as error:
            raise StateError(
                f"round log: {self.directory} cannot be read ({type(error).__name__})",
                "check that the directory exists and that this user may read it",
            ) from None


def _size(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT coalesce(max(number) + 1, 0) FROM leaves").fetchone()[0])


def _read(database: sqlite3.Connection, places: Sequence[int]) -> list[bytes]:
    return [database.execute("SELECT hash FROM hashes WHERE place = ?", (place,)).fetchone()[0] for place in places]


def _check(held: bool, asked: str) -> None:
    if not held:
        raise ProtocolError(
            f"the site asks for {asked}, but the coordinator's round log has fewer leaves",
            "if several sites report this, the coordinator uses an old backup of the log: restore the newest",
        )
