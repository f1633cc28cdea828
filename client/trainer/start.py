"""The trainer's process: `python -I -m privet.client.trainer.start [FOLDER IDLE NAMED]`.

Without arguments it speaks through its standard input and output, with them through a job's directory, whose key has
the name `NAMED`. It confines itself before it loads a library that starts threads, and before it reads anything but its
own code.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from privet.client.trainer.confinement import Confined, confine
from privet.client.trainer.mailbox import MailboxEnd
from privet.client.trainer.pipe import PipeEnd, stripped
from privet.client.trainer.places import unguarded
from privet.client.trainer.wire import VERSION, Packet, pack, unpack
from privet.common.errors import PrivetError

_LOOKED = 2.0


class End(Protocol):
    """The trainer's end of a channel."""

    def receive(self) -> bytes | None:
        """Return the next request; None if there will be none."""

    def send(self, body: bytes) -> None:
        """Answer the last request."""


def serve(end: End, home: Path, begun: Callable[[], None] = lambda: None) -> None:
    """Answer requests until there are no more. The first one says what this process may read.

    Args:
        end: Where they come from.
        home: The directory that this process may write.
        begun: Called once it is confined.
    """
    data = end.receive()
    if data is None:
        return
    asked = unpack(data)
    confined = confine(map(str, asked.head["read"]), [str(home)])
    begun()
    answer = pack(Packet("done", _said(confined)))
    end.send(answer)
    # Only now: these libraries start threads, and a thread that runs already would not be confined.
    from privet.client.trainer.work import Work

    work = Work()
    while (data := end.receive()) is not None:
        packet = unpack(data)
        if packet.kind != "confine":
            end.send(work.answer(packet))
        elif packet.head == asked.head:  # another process of the site
            end.send(answer)
        else:  # what was taken from this process cannot be given back
            return


def _said(confined: Confined) -> dict[str, bool | str]:
    limits = {"network": confined.network, "files": confined.files, "signals": confined.signals}
    return {**limits, "version": VERSION}


def _follow(parent: int) -> None:
    """End with the parent, also in the middle of a step."""
    while os.getppid() == parent:
        time.sleep(_LOOKED)
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Be a trainer. Return the exit code."""
    parent, home = os.getppid(), Path(arguments[0] if arguments else ".").absolute()
    environment = stripped(os.environ, home)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("tmp", "cache"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    os.umask(0o077)
    try:
        if arguments:
            if unguarded(home.parent) is not None:  # it could be another directory in a moment, with code in its caches
                return 1
            serve(MailboxEnd(home, float(arguments[1]), arguments[2]), home)
            return 0
        pipes = PipeEnd(os.dup(0), os.dup(1))
        for number in (0, 1):  # a library that prints would break a message
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        serve(pipes, home, threading.Thread(target=_follow, args=(parent,), daemon=True).start)
    except PrivetError:  # its text is for the other end, which has none here
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
