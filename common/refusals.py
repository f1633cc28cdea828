"""Log entries about the requests that a service refuses: enough to see an attack, too few to fill a disk.

An entry names the reason, the peer and the size. Callers must not pass any content of the request. A minute holds at
most 10 entries for one reason and peer, and 200 in all. The next entry says how many were left out; `settle`, called
from time to time, says it where no next entry comes. Peers beyond the number that is remembered are counted as one.

Members and strangers have separate limits, and members are counted by name. Otherwise an attacker from outside could
use up the limit, and the requests of a member would go unrecorded.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SECONDS = 60.0
"""Length of the window over which entries are counted."""
BURST, MOST = 10, 200
_PAIRS = 64
_OTHERS = "others"


@dataclass
class _Window:
    began: float
    written: int = 0
    suppressed: int = 0


class Refusals:
    """Writes entries about refusals to one logger. Threads may share it."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[bool, str, str], _Window] = {}
        self._all = {inside: _Window(clock()) for inside in (False, True)}

    def note(
        self, reason: str, peer: str, *, member: str = "", size: int | None = None, key: str = "", detail: str = ""
    ) -> None:
        """Write an entry about a refusal, or only count it.

        Args:
            reason: Why the request is refused: one of a few fixed texts, since entries are counted by it.
            peer: Who sent it, as far as known: an address, or the name of a site.
            member: Name of the member, or of its key, if the peer proved that it is one. Entries are counted by it.
            size: Bytes that were sent or announced.
            key: Fingerprint of the key that the peer named; the peer need not own it.
            detail: A longer text; it must not quote the request.
        """
        now = self._clock()
        with self._lock:
            self._settle(now)
            inside = bool(member)
            counted = (inside, reason, member or peer)
            # A peer can change its address at will, so the number of windows, and thus memory, is bounded.
            if counted not in self._windows and sum(each[0] == inside for each in self._windows) >= _PAIRS:
                counted = (inside, reason, _OTHERS)
            window = self._windows.setdefault(counted, _Window(now))
            if window.written >= BURST or self._all[inside].written >= MOST:
                window.suppressed += 1
                return
            window.written += 1
            self._all[inside].written += 1
            peer = _OTHERS if counted[2] == _OTHERS else peer
            extra = {"event": "refused", "reason": reason, "peer": peer, "bytes": size, "key": key or None}
        self._logger.warning("refused: %s", detail or reason, extra=extra)

    def settle(self) -> None:
        """Write how many entries were left out in the windows that have ended."""
        with self._lock:
            self._settle(self._clock())

    def _settle(self, now: float) -> None:
        over = [counted for counted, window in self._windows.items() if now - window.began >= SECONDS]
        for counted in over:
            window, (_, reason, who) = self._windows.pop(counted), counted
            if window.suppressed:
                extra = {"event": "refused", "reason": reason, "peer": who, "suppressed": window.suppressed}
                self._logger.warning("refused %d times more: %s", window.suppressed, reason, extra=extra)
        for inside, window in self._all.items():
            if now - window.began >= SECONDS:
                self._all[inside] = _Window(now)


class Sparing(logging.Filter):
    """A filter for messages that others can trigger: it lets 10 entries of one kind through in a minute.

    The next entry of that kind says how many were left out. A kind is a message before its values are inserted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._lock = clock, threading.Lock()
        self._windows: dict[str, _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the entry is written."""
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault(str(record.msg), _Window(now))
            if now - window.began >= SECONDS:
                if window.suppressed:
                    record.suppressed = window.suppressed
                window = self._windows[str(record.msg)] = _Window(now)
            if window.written >= BURST:
                window.suppressed += 1
                return False
            window.written += 1
        return True


@contextmanager
def sparing(logger: logging.Logger) -> Iterator[None]:
    """Limit what a logger writes, as `Sparing` does, until the block ends."""
    spared = Sparing()
    logger.addFilter(spared)
    try:
        yield
    finally:
        logger.removeFilter(spared)


def short_digest(public_key: bytes) -> str:
    """Return the short name of a key in log entries: the first 64 bits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]
