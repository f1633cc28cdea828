"""`privet console coordinator`: the console of a coordinator."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from privet.common.options import HERE, Directory
from privet.common.progress import doing
from privet.common.web.commands import ConsolePort, ConsoleSocket, HostName, ViewOnly, serve_console


@doing("Opening the console of {directory}")
def coordinator(
    directory: Directory = HERE,
    port: ConsolePort = 0,
    socket: ConsoleSocket = None,
    host: HostName = None,
    view_only: ViewOnly = False,
) -> None:
    """Open this coordinator's console in a browser: its sites, its runs and whom they wait for, and its round log.

    It listens on this machine alone, and prints a link that works once, within 10 minutes. To approve a site in it,
    type the words that the site's operator reads out, and the passphrase of the root's key. Whatever it shows or does
    is on the command line as well, and a console that ends changes nothing. Stop it with Ctrl-C.
    """
    serve_console(partial(_view, directory), port, socket, host, view_only=view_only)


def _view(directory: Path) -> object:
    from privet.server.console.view import CoordinatorView

    return CoordinatorView(directory).view()
