"""Structured logs: one JSON object a line, on stderr. Loggers of ours say what happened, never a record or a secret."""

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
    """Writes time, level, logger, message and the few extra fields that are known; control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line. An exception is named by its type alone: its text and its frames may hold data."""
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
    """Send all logs to stderr as JSON: ours from INFO on, those of libraries from WARNING on.

    Args:
        faults: Takes what Flower reports in place of the log: at a coordinator a line for each request that it does
            not like. It is handed Flower's own words, without the values in them, which may be a node's.
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
    """Hand over what libraries write to standard error past Python, line by line, instead of letting it through.

    gRPC writes a line for each connection that it refuses, as often as one tries. What Python writes goes where it
    went; handlers of logs have to be made inside the block. What comes faster than it is taken is lost: a library that
    waited to write, with Python's lock in its hands, would wait for ever. Where the process crashes, the last lines of
    the library are lost too, but the stack of each thread goes where standard error went.
    """
    outside, kept = os.dup(2), sys.stderr
    reading, writing = os.pipe()
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
    # Handlers may outlive the block, so this stays open.
    sys.stderr = io.TextIOWrapper(io.FileIO(outside, "w", closefd=False), "utf-8", "replace", line_buffering=True)
    try:
        yield
    finally:
        if crashing:
            faulthandler.disable()
        sys.stderr = kept
        os.dup2(outside, 2)  # ends what the thread reads
        taking.join(1)
