"""Work that is repeated beside other work, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(name: str, work: Callable[[], float]) -> Iterator[None]:
    """Repeat work in a thread until the block ends.

    Args:
        name: Of the thread.
        work: Returns the seconds until it is due again. It never raises.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(work()):
            pass

    threading.Thread(target=run, daemon=True, name=name).start()
    try:
        yield
    finally:
        ended.set()
