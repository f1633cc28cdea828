"""A console as tests ask it: requests as a browser of its user sends them, and as others do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlencode

from httpx2 import Response
from starlette.testclient import TestClient

from privet.common.web.app import Console
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
