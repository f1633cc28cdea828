"""What a service writes down of the requests that it refuses: enough to see an attack, too little to fill a disk.

An entry says why, who, and how large; what was sent is the caller's to keep out of it. Of one reason and one peer a
minute holds ten entries, and of all together 200; the entry that follows says how many were left out. Peers that are
too many to remember are counted as one. `settle`, called now and then, states what was left out in the minutes before.

Members have these numbers to themselves, each under its own name: nobody from outside can make so much noise that what
a member does is not written down.
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
"""How long entries are counted together."""
BURST, MOST = 10, 200
_PAIRS = 64
_OTHERS = "others"


@dataclass
class _Window:
    began: float
    written: int = 0
    suppressed: int = 0


class Refusals:
    """Entries about refusals, on one logger. Threads may share it."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[bool, str, str], _Window] = {}
        self._all = {inside: _Window(clock()) for inside in (False, True)}

    def note(
        self, reason: str, peer: str, *, member: str = "", size: int | None = None, key: str = "", detail: str = ""
    ) -> None:
        """Write down a refusal, or count it.

        Args:
            reason: Why, in words of ours: one of a few, as entries are counted by it.
            peer: Who, as far as it is known: an address, or the name of a site.
            member: Which member it is, where it has proved that: its name, or its key's. Entries are counted by it.
            size: Bytes that were sent or announced.
            key: Fingerprint of the key that the peer named, which need not be its own.
            detail: More, in words of ours.
        """
        now = self._clock()
        with self._lock:
            self._settle(now)
            inside = bool(member)
            counted = (inside, reason, member or peer)
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
        """State what was left out in the minutes that are over."""
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
    """For what somebody else can make a logger say: lets through ten entries of one kind a minute.

    The next of that kind states how many were left out. Kinds are messages as the code has them, without values.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._lock = clock, threading.Lock()
        self._windows: dict[str, _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether an entry is written."""
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
    """Let a logger write sparingly until the block ends."""
    spared = Sparing()
    logger.addFilter(spared)
    try:
        yield
    finally:
        logger.removeFilter(spared)


def short_digest(public_key: bytes) -> str:
    """Return what an entry names a key by: the first 64 bits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]
