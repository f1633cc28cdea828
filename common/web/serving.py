"""Serve an application on loopback or on a Unix socket until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from privet.common.errors import StateError

LOOPBACK = "127.0.0.1"
HEAD_SECONDS = 10.0
"""Within which a request's head has to arrive."""


class PromptProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request does not arrive in time. It expects one request on each."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of a new connection."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def listen(port: int) -> socket.socket:
    """Listen on a port of loopback; 0 takes a free one.

    Raises:
        StateError: The port is taken.
    """
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((LOOPBACK, port))
        opened.listen(64)
    except OSError as error:
        opened.close()
        raise StateError(
            f"port {port} on {LOOPBACK} cannot be used ({error.strerror})", "choose another with --port"
        ) from None
    return opened


def listen_at(path: Path) -> socket.socket:
    """Listen on a Unix socket that only this user may open. One that an earlier process left behind is replaced.

    Raises:
        StateError: Something else is there, or the path cannot be used.
    """
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # no moment in which others could open it
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode) and opened.connect_ex(str(path)):
            path.unlink()
            opened.close()
            opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.bind(str(path))
        opened.listen(64)
    except OSError as error:
        opened.close()
        raise StateError(f"{path} cannot be used as a socket ({error.strerror})", "choose another --socket") from None
    finally:
        os.umask(before)
    return opened


def run(app: Any, opened: socket.socket, ready: Callable[[], None], **settings: Any) -> None:
    """Answer requests until SIGINT or SIGTERM, in the main thread.

    Args:
        app: What answers.
        opened: A listening socket.
        ready: Called before the first answer.
        settings: Further settings of uvicorn.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=64,
        server_header=False,
        proxy_headers=False,  # no proxy stands before it, so nobody says where a request comes from
        ws="none",
        **settings,
    )
    # Its errors would quote what a request held.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
    # uvicorn raises the signal again once it has stopped. By default it would end the process, and what follows here.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    ready()
    asyncio.run(uvicorn.Server(config).serve(sockets=[opened]))
