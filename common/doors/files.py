"""The limit on open files: raised when a process starts, and compared with what its connections may need."""

from __future__ import annotations

import resource

from privet.common.errors import StateError

SPARE = 256
"""Files kept in reserve: databases, logs, libraries, and connections that are being closed."""


def raise_limit() -> int:
    """Raise this process's limit on open files as far as it may, and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
        except (ValueError, OSError):  # some systems state a hard limit that they do not grant
            return soft
    return soft


def check_limit(limit: int, needed: int, reason: str) -> None:
    """Check that a process may open the files that it can need.

    Args:
        limit: Most files that it may open; negative for no limit.
        needed: Files for its connections, without the reserve.
        reason: What needs them.

    Raises:
        StateError: It may not.
    """
    if 0 <= limit < needed + SPARE:
        raise StateError(
            f"this process may open {limit} files; {needed + SPARE} are needed: {needed} for {reason}, and {SPARE} in "
            "reserve",
            "set LimitNOFILE=65536 in the systemd unit, or run `ulimit -n 65536` in the shell before the command",
        )
