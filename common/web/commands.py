"""What the commands of the consoles share: their options, the link that they print, and serving."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from privet.common.errors import StudyError
from privet.common.progress import folded

ConsolePort = Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")]
ConsoleSocket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="Listen on this Unix socket instead, which only you can open; forward it with "
        "`ssh -L 8443:/path/to/socket HOST`, and name the forwarded port with --port.",
    ),
]
HostName = Annotated[
    str | None,
    typer.Option(
        "--host",
        help="Name of this machine in the link, for a browser that does not know names under `localhost`: 127.0.0.1 or "
        "localhost.  [default: a new name under localhost each time]",
    ),
]
ViewOnly = Annotated[bool, typer.Option("--view-only", help="Print a link for looking only.")]
_LOCAL = ("127.0.0.1", "localhost")


def serve_console(make: Callable[[], Any], port: int, path: Path | None, host: str | None, *, view_only: bool) -> None:
    """Serve a view until the process is told to stop, and print links to it.

    Args:
        make: Returns the view.
        port: Port of loopback; with a socket, the port that is forwarded to it.
        path: A Unix socket to listen on instead.
        host: Name in the links; None: a new one.
        view_only: Whether links are for looking only.

    Raises:
        StudyError: A package is missing. StateError: Port or socket cannot be used.
    """
    try:
        from privet.common.web.app import Console
        from privet.common.web.serving import PromptProtocol, listen, listen_at, run
        from privet.common.web.sessions import Role
    except ModuleNotFoundError as error:
        raise StudyError(f"the console needs the package {error.name}", "run pip install 'privet[console]'") from None
    if host is not None and host not in _LOCAL:
        raise StudyError(f"--host: expected 127.0.0.1 or localhost, found {host!r}", "leave the option out")
    if path is not None and not port:
        raise StudyError("--socket: expected --port beside it", "name the port that you forward to the socket")
    opened = listen(port) if path is None else listen_at(path)
    shown = port if path is not None else opened.getsockname()[1]
    # A name of its own: browsers keep cookies by name and not by port, so another server of this machine never gets
    # this console's cookie, and a page that guesses ports does not know where to send a request.
    name = host or f"privet-{secrets.token_hex(8)}.localhost"
    console = Console(make(), {f"{name}:{shown}"})
    role = Role.VIEWER if view_only else Role.APPROVER

    def link() -> str:
        return f"http://{name}:{shown}/enter/{console.sessions.link(role)}"

    def ready() -> None:
        if path is not None:
            typer.echo(f"socket   {path}")
        typer.echo(f"link     {link()}")
        typer.echo(folded("It works once, within 10 minutes, for whoever has it. Enter prints another one."))
        sys.stdout.flush()
        if sys.stdin.isatty():
            threading.Thread(target=_more, args=(link,), daemon=True).start()

    run(console.app, opened, ready, timeout_keep_alive=5, timeout_graceful_shutdown=1, http=PromptProtocol)


def _more(link: Callable[[], str]) -> None:
    for _ in sys.stdin:
        typer.echo(f"link     {link()}")
