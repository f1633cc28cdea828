"""Flower's object store, but that large objects lie in files beside its database.

SQLite writes an update of 64 MB twice, waits for the disk, and keeps everybody else waiting meanwhile. Here the
database holds everything that is said of an object, and in place of a large one's bytes a mark. A file is read back
by whoever checks its digest (`privet.common.flower.objects.put_together`, at the coordinator and at a site), so one
that a power cut has spoilt is a message that did not arrive, as is one that is missing.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from flwr.server.superlink.linkstate import LinkState, SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.config_loader import get_federation_manager

LARGE = 2**18
"""Bytes from which on an object lies in a file."""
_OLD = 3600.0
_NAME = re.compile("[0-9a-f]{64}")
# No object begins like this: `validate_object_content` demands the name of a kind.
_MARK = b"\x00in a file"


class FileObjectStore(SqlObjectStore):
    """Raises as Flower's own store does; its errors stay within the adapter."""

    def __init__(self, database: Path) -> None:
        super().__init__(str(database), verify=False)  # `put` verifies, before anything is written
        self._directory = database.with_name(f"{database.name}.objects")
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object that was announced.

        Raises:
            ValueError: It does not have the digest that it is named by, or is no object.
            NoObjectInStoreError: It was not announced.
        """
        if get_object_id(object_content) != object_id:
            raise ValueError("the object does not have the digest that it is named by")
        validate_object_content(object_content)
        if len(object_content) < LARGE:
            super().put(object_id, object_content)
            return
        partial = self._file(object_id).with_suffix(f".{os.urandom(8).hex()}")
        try:
            partial.write_bytes(object_content)
            partial.replace(self._file(object_id))
        finally:
            partial.unlink(missing_ok=True)
        super().put(object_id, _MARK)

    def get(self, object_id: str) -> bytes | None:
        """Return an object; nothing where it has not arrived, None where it was not announced or is lost."""
        content: bytes | None = super().get(object_id)
        if content != _MARK:
            return content
        try:
            return self._file(object_id).read_bytes()
        except FileNotFoundError:
            return None

    def size(self, object_id: str) -> int:
        """Return the bytes of an object that lies in a file; 0 of any other, which is small."""
        try:
            return self._file(object_id).stat().st_size
        except FileNotFoundError:
            return 0

    def delete(self, object_id: str) -> None:
        """Delete an object and what belongs to it alone."""
        super().delete(object_id)
        # A node says which, and may say anything.
        if _NAME.fullmatch(object_id) and object_id not in self:
            self._file(object_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete old files of no object: what was cut short has left them."""
        for file in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another process has deleted it
                if time.time() - file.stat().st_mtime > _OLD and file.name not in self:
                    file.unlink()

    def _file(self, object_id: str) -> Path:
        return self._directory / object_id


def open_state(database: Path) -> LinkState:
    """Open a link state in one SQLite file, with the directory of its large objects beside it."""
    store = FileObjectStore(database)
    store.initialize()
    state = SqlLinkState(str(database), get_federation_manager(), store)
    state.initialize()
    return state
