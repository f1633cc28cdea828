"""Structured logs: one JSON object a line, on stderr. Loggers of ours say what happened, never a record or a secret."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_KEPT = ("node", "port", "run", "round", "site")
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
        document |= {name: getattr(record, name) for name in _KEPT if hasattr(record, name)}
        if record.exc_info is not None and record.exc_info[0] is not None:
            document["exception"] = record.exc_info[0].__name__
        return json.dumps(document, default=str)


def log_as_json() -> None:
    """Send all logs to stderr as JSON: ours from INFO on, those of libraries from WARNING on."""
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
