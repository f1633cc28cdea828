"""`privet console site`: the console of a site."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from privet.common.clock import now
from privet.common.options import SiteFile
from privet.common.progress import doing
from privet.common.web.commands import ConsolePort, ConsoleSocket, HostName, ViewOnly, serve_console


@doing("Opening the console of {site}")
def site(
    site: SiteFile,
    port: ConsolePort = 0,
    socket: ConsoleSocket = None,
    host: HostName = None,
    view_only: ViewOnly = False,
) -> None:
    """Open this site's console in a browser: what is proposed, what left, what it cost, and what is wrong.

    It listens on this machine alone, and prints a link that works once, within 10 minutes. To approve a study in it, an
    approver types the passphrase of their key, as for `privet site approve SITE STUDY --as NAME`. Whatever it shows or
    does is on the command line as well, and a console that ends changes nothing. Stop it with Ctrl-C.
    """
    from privet.client.site import load_site

    load_site(site)  # before anything is served
    serve_console(partial(_view, site), port, socket, host, view_only=view_only)


def _view(file: Path) -> object:
    from privet.client.commands.doctor import LOCAL, examine
    from privet.client.console.reading import Consulting
    from privet.client.console.view import SiteView
    from privet.common.privacy.apart import compute_apart

    compute_apart()  # the libraries would take more memory than all the rest
    # Those of `privet site doctor` that load no model.
    checks = LOCAL | {"certificate", "connection", "clock", "log"}
    return SiteView(file, Consulting(file), lambda: examine(file, now, only=checks)).view()
