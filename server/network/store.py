"""Flower's object store, with large objects in files beside its database.

SQLite writes an update of 64 MB twice, waits for the disk, and blocks all other users meanwhile. Here the database has
the data about each object, and a mark in place of a large object's bytes. The reader of a file checks its digest
(`privet.common.flower.objects.put_together`, at the coordinator and at a site). A file that a power failure has
damaged, or that is missing, therefore counts as a message that did not arrive.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.server.superlink.linkstate import LinkState, SqlLinkState
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.config_loader import get_federation_manager

from privet.common.flower.bundles import INLINE

LARGE = INLINE
"""An object of at least this many bytes is stored in a file."""
_OLD = 3600.0
_NAME = re.compile("[0-9a-f]{64}")
# No object begins like this: `validate_object_content` requires the name of a kind.
_MARK = b"\x00in a file"
_CHILDREN = "SELECT child_id FROM object_children WHERE parent_id = :id"
_UNREFER = f"UPDATE objects SET ref_count = ref_count - 1 WHERE ref_count > 0 AND object_id IN ({_CHILDREN})"  # noqa: S608 - no value
# The database deletes the object's links, to its children and of its parents, with it.
_EVICT = "DELETE FROM objects WHERE object_id = :id"


class FileObjectStore(SqlObjectStore):
    """Raises the errors of Flower's own store; they stay within the adapter."""

    def __init__(self, database: Path) -> None:
        super().__init__(str(database), verify=False)  # `put` verifies, before anything is written
        self._directory = database.with_name(f"{database.name}.objects")
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object that was announced.

        Raises:
            ValueError: Its digest is not its id, or it is not an object.
            NoObjectInStoreError: It was not announced.
        """
        if get_object_id(object_content) != object_id:
            raise ValueError("the digest of the object is not its id")
        validate_object_content(object_content)
        if len(object_content) < LARGE:
            super().put(object_id, object_content)
            return
        # Under another name first, so that a reader never sees half a file; then the mark, so that the database never
        # names a file that is not there.
        partial = self._file(object_id).with_suffix(f".{os.urandom(8).hex()}")
        try:
            partial.write_bytes(object_content)
            partial.replace(self._file(object_id))
        finally:
            partial.unlink(missing_ok=True)
        super().put(object_id, _MARK)

    def store_all(self, run_id: int, tree: Any, contents: Mapping[str, bytes]) -> None:
        """Announce a message's objects and store them. Call it within a transaction.

        An object that a node announced before with false children gives way. Otherwise a node that expects a message
        to come, since parts of messages repeat, could make it undeliverable to everybody.

        Args:
            run_id: The run.
            tree: The objects, as Flower names them.
            contents: Their bytes, by digest.

        Raises:
            ValueError: The tree does not fit the contents, or a part has another digest.
        """
        try:
            new = self.preregister(run_id, tree)
        except ValueError:
            self._evict_false(tree, contents)
            new = self.preregister(run_id, tree)
        for name in new:
            self.put(name, contents[name])

    def _evict_false(self, tree: Any, contents: Mapping[str, bytes]) -> None:
        """Delete the objects that are stored with other children than their contents have."""
        for part in iterate_object_tree(tree):
            name, content = part.object_id, contents[part.object_id]
            announced = {child.object_id for child in part.children}
            if name not in self or {row["child_id"] for row in self.query(_CHILDREN, {"id": name})} == announced:
                continue
            if get_object_id(content) != name or set(get_object_children_ids_from_object_content(content)) != announced:
                raise ValueError("the announced parts of an object are not those of its content")
            self.query(_UNREFER, {"id": name})
            self.query(_EVICT, {"id": name})

    def get(self, object_id: str) -> bytes | None:
        """Return an object; empty bytes if it has not arrived, None if it was not announced or is lost."""
        content: bytes | None = super().get(object_id)
        if content != _MARK:
            return content
        try:
            return self._file(object_id).read_bytes()
        except FileNotFoundError:
            return None

    def size(self, object_id: str) -> int:
        """Return the size in bytes of an object in a file; 0 for any other object, which is small."""
        try:
            return self._file(object_id).stat().st_size
        except FileNotFoundError:
            return 0

    def delete(self, object_id: str) -> None:
        """Delete an object and its file, unless the database still has the object."""
        super().delete(object_id)
        # The id comes from a node, so it could be a path to any file.
        if _NAME.fullmatch(object_id) and object_id not in self:
            self._file(object_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete old files that belong to no object: interrupted writes leave them behind."""
        for file in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another process has deleted it
                if time.time() - file.stat().st_mtime > _OLD and file.name not in self:
                    file.unlink()

    def _file(self, object_id: str) -> Path:
        return self._directory / object_id


def open_state(database: Path) -> LinkState:
    """Open a link state in one SQLite file, with a directory for its large objects beside it."""
    store = FileObjectStore(database)
    store.initialize()
    state = SqlLinkState(str(database), get_federation_manager(), store)
    state.initialize()
    return state
