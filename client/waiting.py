"""Until when an answer is awaited: what a site may spend on waiting while it answers a message."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_until: ContextVar[float | None] = ContextVar("answer_awaited_until", default=None)


@contextmanager
def awaited(until: float) -> Iterator[None]:
    """Say until when the answer that the block computes is awaited, on the clock of `time.monotonic`."""
    token = _until.set(until)
    try:
        yield
    finally:
        _until.reset(token)


def awaited_until(most: float) -> float:
    """Return until when the answer is awaited; in `most` seconds where nobody has said."""
    found = _until.get()
    return time.monotonic() + most if found is None else found
