"""The lock of the process that serves a site: one at a time. Its file holds the digest of the site file as it was read.

The process reads the site file when it starts, and not again, so a later change counts only after a restart.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privet.client.site import SiteConfig
from privet.common.canonical import canonical_json, digest
from privet.common.errors import StateError


@contextmanager
def exclusive(path: Path, content: str = "") -> Iterator[None]:
    """Hold a lock file until the block or the process ends.

    Args:
        path: The file.
        content: What it holds meanwhile.

    Raises:
        StateError: Another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(
                f"another process serves this site: it holds the lock {path}",
                "stop the other `privet site serve` of this site first",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, content.encode())
        yield
    finally:
        os.close(descriptor)


def is_served(config: SiteConfig) -> bool:
    """Return whether a process serves this site now: it has read the site file, and does not read it again."""
    try:
        check_unserved(config)
    except StateError:
        return True
    return False


def check_unserved(config: SiteConfig) -> None:
    """Check that no process serves this site now. Raises `StateError` as `exclusive`."""
    lock = lock_of(config)
    if lock is not None and lock.exists():
        with exclusive(lock):
            pass


def serves_former(config: SiteConfig) -> bool:
    """Return whether a process serves this site with another site file than this one."""
    lock = lock_of(config)
    if lock is None or not is_served(config):
        return False
    # A process of an earlier version leaves the file empty: what it has read is not known.
    return lock.read_text(encoding="ascii") not in ("", content_of(config))


def lock_of(config: SiteConfig) -> Path | None:
    """Return the lock file of the process that serves a site; None for a site without a coordinator."""
    return None if config.coordinator is None else config.coordinator.key.with_suffix(".lock")


def content_of(config: SiteConfig) -> str:
    """Return the digest of what a site file says, comments and spelling apart."""
    values = json.loads(json.dumps(config.model_dump(), default=_spelt))
    return digest(canonical_json(values))


def _spelt(value: object) -> str:
    return str(value.resolve() if isinstance(value, Path) else value)
