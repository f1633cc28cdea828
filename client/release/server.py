"""Serve the endpoint of `privet.client.release.served` on loopback, until stopped."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from privet.client.release.served import Endpoint
from privet.common.errors import StateError
from privet.common.web.serving import LOOPBACK, run

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
    address = f"http://{LOOPBACK}:{opened.getsockname()[1]}/v1"
    run(endpoint.app, opened, lambda: ready(address), timeout_keep_alive=30, timeout_graceful_shutdown=5)
