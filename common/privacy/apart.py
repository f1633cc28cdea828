"""Accounting in a process of its own, for a process that has to stay small.

The libraries that compose privacy losses take 100 MB, for as long as the process lives that has loaded them. A console
needs a few epsilons when a ledger changes. It has them computed by this module, run as a program, which ends when it
was not asked for a while. Numbers pass as JSON, which keeps every float to its last bit: the results are the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from privet.common.errors import StateError

IDLE_SECONDS = 10.0
"""After how long without a question the process ends."""
P = ParamSpec("P")
T = TypeVar("T")


class Accountant:
    """The process that computes, which is started when it is asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._end: threading.Timer | None = None

    def ask(self, function: str, arguments: Sequence[Any]) -> Any:
        """Return what a function of `privet.common.privacy.accounting` returns.

        Raises:
            StateError: The process failed.
        """
        with self._lock:
            if self._end is not None:
                self._end.cancel()
            process = self._process = self._process or _started()
            try:
                if process.stdin is None or process.stdout is None:
                    raise ValueError
                process.stdin.write(json.dumps([function, *arguments]) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
            except (OSError, ValueError):
                self._stop()
                raise StateError(
                    "the process that computes epsilon ended before it answered", "open the page again"
                ) from None
            self._end = threading.Timer(IDLE_SECONDS, self.rest)
            self._end.daemon = True
            self._end.start()
            return answer

    def rest(self) -> None:
        """End the process; the next question starts another one."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes its pipes, and waits for it


def _started() -> subprocess.Popen[str]:
    # -P: it imports nothing from the present directory.
    command = [sys.executable, "-P", "-m", "privet.common.privacy.apart"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


_accountant: Accountant | None = None


def compute_apart() -> Accountant:
    """Have this process's accounting done by another one from now on."""
    global _accountant
    _accountant = _accountant or Accountant()
    return _accountant


def able(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of numbers be computed by the other process, where there is to be one."""

    @wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> T:
        if _accountant is None:
            return function(*arguments, **named)
        found: T = _accountant.ask(function.__name__, [*arguments, *named.values()])
        return found

    return computed


def main() -> None:
    """Answer questions, one a line, until the input ends."""
    from privet.common.privacy import accounting

    functions = {each: getattr(accounting, each) for each in ("_epsilon", "_divergences", "_calibrated")}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(functions[name](*map(_hashable, arguments))) + "\n")
        sys.stdout.flush()


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
