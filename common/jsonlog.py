"""The application log: one JSON object a line, on stderr. It never holds a record or a secret."""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

_KEPT = ("node", "port", "run", "round", "site", "event", "reason", "peer", "bytes", "key", "suppressed")
_LONGEST = 2000


class JsonFormatter(logging.Formatter):
    """Writes time, level, logger, message and a few known extra fields. Control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line. Of an exception only the type is written: its text and its frames may hold data."""
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST],
        }
        document |= {name: found for name in _KEPT if (found := getattr(record, name, None)) is not None}
        if record.exc_info is not None and record.exc_info[0] is not None:
            document["exception"] = record.exc_info[0].__name__
        return json.dumps(document, default=str)


def log_as_json(faults: Callable[[str], None] | None = None) -> None:
    """Send all logs to stderr as JSON: those of privet from level INFO, those of libraries from WARNING.

    Args:
        faults: Receives Flower's reports instead of the log. At a coordinator, Flower reports each request that it
            rejects. Only the fixed text is passed on: the values in it may come from a node.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("privet").setLevel(logging.INFO)
    # Flower writes to a handler of its own, in colours, and reports each request.
    flower = logging.getLogger("flwr")
    flower.handlers[:] = []
    flower.propagate = True
    flower.setLevel(logging.WARNING)
    if faults is not None:
        flower.addFilter(partial(_hand_over, faults))


def _hand_over(faults: Callable[[str], None], record: logging.LogRecord) -> bool:
    faults(str(record.msg))
    return False


@contextmanager
def native_errors(take: Callable[[str], None]) -> Iterator[None]:
    """Pass each line that native libraries write to file descriptor 2 to `take`, instead of to standard error.

    gRPC writes a line for each connection that it refuses, so a peer could fill the log. What Python itself writes
    still goes to the original standard error. Create log handlers inside the block.

    If lines arrive faster than `take` handles them, some are lost. If the process crashes, the last lines of the
    library are lost too, but the stack of each thread goes to the original standard error.
    """
    outside, kept = os.dup(2), sys.stderr
    reading, writing = os.pipe()
    # A library that blocks in a write may hold Python's global lock, which the reading thread needs: a deadlock. So a
    # full pipe drops lines.
    os.set_blocking(writing, False)
    os.dup2(writing, 2)
    os.close(writing)
    crashing = not faulthandler.is_enabled()
    if crashing:
        faulthandler.enable(outside)

    def read() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                take(line.rstrip("\n"))

    taking = threading.Thread(target=read, daemon=True)
    taking.start()
    # Log handlers may outlive the block, so this stream is never closed.
    sys.stderr = io.TextIOWrapper(io.FileIO(outside, "w", closefd=False), "utf-8", "replace", line_buffering=True)
    try:
        yield
    finally:
        if crashing:
            faulthandler.disable()
        sys.stderr = kept
        os.dup2(outside, 2)  # ends what the thread reads
        taking.join(1)
