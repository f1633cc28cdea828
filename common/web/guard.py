"""What every request passes before a console reads it, and what every answer carries.

The guard stands around the whole application, so that no route can forget it, and no error page lacks a header.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from privet.common.web.sessions import Bucket

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""The Content-Security-Policy: no inline script or style runs, and a page fetches from its own console alone."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # With no-referrer, browsers would send forms with `Origin: null`, as from a page that nobody can name.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-store",
    # One request a connection: the time that a request may take is then the time of its connection.
    "Connection": "close",
}
MOST_BYTES, MOST_PATH = 16 * 1024, 512
"""Most bytes of a form, and of a path with its query."""


class Guard:
    """Refuses requests that no page of this console sends.

    Args:
        app: The application.
        hosts: The names, with port, by which browsers know this console.
        bucket: Says for a request how many of its kind are answered.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], bucket: Callable[[Scope], Bucket]) -> None:
        self._app, self._hosts, self._bucket = app, frozenset(hosts), bucket
        self._origins = frozenset(f"http://{host}" for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = self._objection(scope)
        if refused is None:
            await self._app(scope, _limited(receive), guarded)
        else:
            await PlainTextResponse(f"{refused[1]}\n", refused[0])(scope, receive, guarded)

    def _objection(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        # A name that an attacker's DNS points at this machine is none of ours: that is what rebinding needs.
        if headers.getlist("host") not in [[host] for host in self._hosts]:
            return 421, "This console has another address. Open the link that its terminal printed."
        if len(scope["raw_path"]) + len(scope["query_string"]) > MOST_PATH:
            return 414, "The address is too long."
        # No HEAD: whatever previews links would use up the one that lets in.
        if scope["method"] not in ("GET", "POST"):
            return 405, "This console knows GET and POST."
        # A header that comes twice could be read in two ways.
        sites = headers.getlist("sec-fetch-site")
        if sites not in ([], ["same-origin"], ["none"]):
            return 403, "Another page asked for this. Open the console by its own link."
        if scope["method"] == "POST":
            refused = self._posted(headers, sites)
            if refused is not None:
                return refused
        # Last: what is refused anyway uses up nothing of what is answered.
        return None if self._bucket(scope).take() else (429, "Too many requests. Try again in a few seconds.")

    def _posted(self, headers: Headers, sites: list[str]) -> tuple[int, str] | None:
        """Return what is wrong with a form, as far as its headers tell."""
        origins = headers.getlist("origin")
        # Current browsers send both. One that sends neither could not be told from a foreign page's form.
        if (sites, origins) == ([], []) or sites == ["none"]:
            return 403, "The browser does not say which page sent this form."
        if origins and (len(origins) > 1 or origins[0] not in self._origins):
            return 403, "Another page sent this form."
        if headers.get("content-type", "").split(";")[0].strip() != "application/x-www-form-urlencoded":
            return 415, "This console reads forms alone."
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "The form does not say how long it is."
        return (413, "The form is too long.") if len(length) > 9 or int(length) > MOST_BYTES else None


class TooLongError(Exception):
    """A request's body is longer than it may be."""


def _limited(receive: Receive) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MOST_BYTES:
            raise TooLongError
        return message

    return limited
