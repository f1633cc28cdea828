"""A console as tests ask it: requests as a browser of its user sends them, and as others do."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import urlencode

import uvicorn
from httpx2 import Response
from starlette.testclient import TestClient

from privet.common.web import serving
from privet.common.web.app import Console, View
from privet.common.web.sessions import COOKIE, Role

HOST = "privet-test.localhost:4000"


@dataclass
class Visitor:
    """A browser that has entered a console."""

    console: Console
    role: Role = Role.APPROVER
    cookie: str = ""
    client: TestClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = TestClient(
            self.console.app, base_url=f"http://{HOST}", raise_server_exceptions=False, follow_redirects=False
        )
        if not self.cookie:
            self.cookie = str(self.console.sessions.enter(self.console.sessions.link(self.role)))

    def get(self, path: str, **headers: str) -> Response:
        """Ask for a page, as its user's browser does."""
        sent = {"Cookie": f"{COOKIE}={self.cookie}", "Sec-Fetch-Site": "same-origin"} | _named(headers)
        return self.client.get(path, headers={name: value for name, value in sent.items() if value})

    def post(self, path: str, form: dict[str, str] | str, **headers: str) -> Response:
        """Send a form, as its user's browser does. The token of the page `/` is added to fields."""
        body = form if isinstance(form, str) else urlencode({"token": self.token(), **form})
        sent = {
            "Cookie": f"{COOKIE}={self.cookie}",
            "Sec-Fetch-Site": "same-origin",
            "Origin": f"http://{HOST}",
            "Content-Type": "application/x-www-form-urlencoded",
        } | _named(headers)
        return self.client.post(path, content=body, headers={name: value for name, value in sent.items() if value})

    def token(self) -> str:
        """Return the token of this session's forms."""
        found = re.search('name="token" value="([^"]+)"', self.get("/").text)
        assert found is not None
        return found.group(1)


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-").title(): value for name, value in headers.items()}


@contextmanager
def served(command: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command of a console as its user does; yield its process and the link that it prints.

    Args:
        command: `client.commands.console:site`, for example.
        arguments: What stands behind the command.
    """
    code = f"import typer; from privet.{command.replace(':', ' import ')} as command; typer.run(command)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield process, next(line.split()[1] for line in process.stdout if line.startswith("link"))
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def opened_here(view: View) -> Iterator[str]:
    """Serve a view from a thread of this process, so that a test can replace what it calls; yield a link to it."""
    listening = serving.listen(0)
    host = f"privet-test.localhost:{listening.getsockname()[1]}"
    console = Console(view, {host})
    server = uvicorn.Server(uvicorn.Config(console.app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield f"http://{host}/enter/{console.sessions.link(Role.APPROVER)}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)


class Remote:
    """A browser of its user, as far as forms go, for the console of another process.

    Args:
        link: The link that the console printed.
    """

    def __init__(self, link: str) -> None:
        self._host = link.split("/")[2]
        self._cookie = ""
        answer = self.ask("GET", f"/enter/{link.rsplit('/', 1)[1]}")
        self._cookie = answer.headers["set-cookie"].split(";")[0]

    def ask(self, method: str, path: str, form: dict[str, str] | None = None) -> HTTPResponse:
        """Send a request, and return the answer.

        Raises:
            OSError, HTTPException: The console has ended meanwhile.
        """
        line = HTTPConnection("127.0.0.1", int(self._host.split(":")[1]), timeout=30)
        sent = {"Host": self._host, "Sec-Fetch-Site": "same-origin", "Cookie": self._cookie}
        sent |= {} if form is None else {"Content-Type": "application/x-www-form-urlencoded"}
        sent |= {} if form is None else {"Origin": f"http://{self._host}"}
        line.request(method, path, None if form is None else urlencode(form), sent)
        return line.getresponse()

    def token(self) -> str:
        """Return the token of this session's forms."""
        found = re.search(b'name="token" value="([^"]+)"', self.ask("GET", "/").read())
        assert found is not None
        return found.group(1).decode()
