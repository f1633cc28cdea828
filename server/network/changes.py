"""Whether an SQLite database has changed, asked cheaply enough to be asked a hundred times a second."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


class Changes:
    """Watches one database for what other connections, of this process or another one, have committed.

    Asking takes some microseconds, where the smallest query through Flower's link state takes a millisecond. For one
    thread at a time.
    """

    def __init__(self, database: Path) -> None:
        # Reads alone: a watcher that is given a wrong path must not make a database there.
        self._connection = sqlite3.connect(
            f"{database.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False, isolation_level=None
        )
        self._version: int | None = None

    def seen(self) -> bool:
        """Return whether something was committed since the last call; true at the first.

        Raises:
            sqlite3.Error: The database cannot be read.
        """
        # "PRAGMA data_version" of SQLite: the number changes when another connection has committed.
        with closing(self._connection.execute("PRAGMA data_version")) as found:
            version = int(found.fetchone()[0])
        changed, self._version = version != self._version, version
        return changed
