"""Follow what becomes of received adapters while a site serves: a revoked one is refused soon after the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from privet.client.network.adapters import FOLDER, follow
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment
from privet.client.network.proposals import LogReader
from privet.client.release.received import RECEIVED
from privet.client.repeating import repeating
from privet.client.site import JOINED, SiteConfig
from privet.common.clock import now
from privet.common.errors import PrivetError

_log = logging.getLogger("privet.site")
SECONDS = 900.0
"""Between two looks at the round log."""


@dataclass
class Follower:
    """Looks at the round log, where this site has received an adapter.

    Attributes:
        file: The site file.
        config: Its content.
        clock: Returns the time.
    """

    file: Path
    config: SiteConfig
    clock: Callable[[], datetime] = now
    _seen: tuple[bytes, tuple[Path, ...]] = (b"", ())

    def __post_init__(self) -> None:
        self._reader = LogReader(self.config)

    def look(self) -> None:
        """Bring the received adapters up to the log, and log what changed. Never raises."""
        folder = self.file.parent / FOLDER
        held = tuple(sorted(folder.glob(f"*/{RECEIVED}")))
        if self.config.log is None or not held:
            return
        try:
            service = ConsortiumClient(Enrolment(self.file.parent), self.clock)
            head = service.checkpoint()
            # The log is read again only where it has grown, or was cosigned since; or where an adapter has arrived: it
            # may have been revoked while it was fetched.
            if (head, held) == self._seen:
                return
            log = self._reader.read(service, head)
            for each in () if log is None else follow(log.history, folder):
                extra = {"event": "adapter-state", "run": each.run, "state": each.state}
                _log.warning("the adapter of run %s is %s: %s", each.run, each.state, each.reason, extra=extra)
            self._seen = head, held
        except Exception as error:  # any error: the thread must go on. Only our own errors have texts safe to log
            said = error.message if isinstance(error, PrivetError) else type(error).__name__
            _log.warning("the states of received adapters are not known: %s", said, extra={"event": "adapters-unknown"})


@contextmanager
def following(file: Path, config: SiteConfig, seconds: float = SECONDS) -> Iterator[None]:
    """Follow received adapters in a thread, until the block ends, if the site has joined a consortium."""
    if not (file.parent / JOINED).exists():
        yield
        return
    follower = Follower(file, config)

    def work() -> float:
        follower.look()
        return seconds

    with repeating("adapters", work):
        yield
