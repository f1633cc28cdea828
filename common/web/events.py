"""Tells open pages that files have changed: one watcher a console, whatever the number of pages.

It compares names, sizes and times of a few files once in a second, and only while a page listens. An event says that
something changed and nothing else; the page asks for itself again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

from privet.common.errors import PrivetError

SECONDS, PULSE = 1.0, 15.0
"""Between two looks at the files; and between two signs of life on a connection."""
MOST = 16
"""Most pages that listen at a time."""
_MOST_FILES = 4096

Look = Callable[[], object]
"""Returns something that is equal as long as nothing has changed."""


def stamps(files: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of the files that exist."""
    seen = []
    for path in islice(files, _MOST_FILES):
        with contextlib.suppress(OSError):
            status = path.stat()
            seen.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(seen)


class Watcher:
    """Waits for changes.

    Args:
        look: Looks at the files, in a thread of its own.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._changed = asyncio.Condition()
        self._version, self.listening = 0, 0
        self._task: asyncio.Task[None] | None = None

    async def events(self, going: Callable[[], bool]) -> AsyncIterator[str]:
        """Yield server-sent events (HTML, section 9.2) until `going` says that the session has ended."""
        self.listening += 1
        seen = self._version
        try:
            # Watched before the reader is told that it listens: the page then asks for itself, and misses nothing.
            last = await self._seen()
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._watch(last))
            yield "retry: 5000\n\n"
            while going():
                async with self._changed:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait_for(partial(self._moved, seen)), PULSE)
                told, seen = self._version != seen, self._version
                yield f"event: changed\ndata: {seen}\n\n" if told else ": still here\n\n"
        finally:
            self.listening -= 1

    def _moved(self, seen: int) -> bool:
        return self._version != seen

    async def _watch(self, last: object) -> None:
        while self.listening:
            await asyncio.sleep(SECONDS)
            found = await self._seen()
            if found != last:
                last = found
                async with self._changed:
                    self._version += 1
                    self._changed.notify_all()

    async def _seen(self) -> object:
        try:
            return await asyncio.to_thread(self._look)
        except (PrivetError, OSError):  # the page says what is wrong, when it is asked for
            return None
