"""Serve the endpoint of `privet.client.release.served` on loopback, until stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from privet.client.release.served import Endpoint
from privet.common.errors import StateError

_LOOPBACK = "127.0.0.1"
_SHORTEST = 16


def read_token(file: Path) -> str:
    """Return the token in a file that only its owner may read.

    Raises:
        StateError: The file cannot be read, others may read it, or the token is shorter than 16 characters.
    """
    try:
        mode, token = file.stat().st_mode, file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"the token file {file} cannot be read ({type(error).__name__})",
            "write a random text into it, for example with openssl rand -hex 32",
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise StateError(f"the token file {file} can be read by other users", f"run chmod 600 {file}")
    if len(token) < _SHORTEST or any(character.isspace() for character in token):
        raise StateError(
            f"the token in {file}: expected one word of at least {_SHORTEST} characters",
            "write a random text into it, for example with openssl rand -hex 32",
        )
    return token


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def listen(port: int) -> socket.socket:
    """Listen on a port of loopback; 0 takes a free one.

    Raises:
        StateError: The port is taken.
    """
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((_LOOPBACK, port))
        opened.listen(64)
    except OSError as error:
        opened.close()
        raise StateError(
            f"port {port} on {_LOOPBACK} cannot be used ({error.strerror})", "choose another with --port"
        ) from None
    return opened


def serve(endpoint: Endpoint, opened: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM, in the main thread.

    Args:
        endpoint: What answers.
        opened: A listening socket.
        ready: Told the address once it answers.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("privet.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    config = uvicorn.Config(
        endpoint.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=64,
        server_header=False,
        ws="none",
    )
    # Its errors would quote what a request held.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
    # uvicorn raises the signal again once it has stopped. By default it would end the process, and what follows here.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    ready(f"http://{_LOOPBACK}:{opened.getsockname()[1]}/v1")
    asyncio.run(uvicorn.Server(config).serve(sockets=[opened]))
