"""The lock of the process that serves a site: one at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privet.client.site import SiteConfig
from privet.common.errors import StateError


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file until the block or the process ends.

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
        yield
    finally:
        os.close(descriptor)


def is_served(config: SiteConfig) -> bool:
    """Return whether a process serves this site now: it has read the site file, and does not read it again."""
    if config.coordinator is None or not config.coordinator.key.with_suffix(".lock").exists():
        return False
    try:
        with exclusive(config.coordinator.key.with_suffix(".lock")):
            return False
    except StateError:
        return True
