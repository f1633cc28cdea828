"""One console: entering, leaving, the language, the style sheet and the script, events, and the routes of its view."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from privet.common.errors import PrivetError
from privet.common.web.events import MOST, Look, Watcher
from privet.common.web.guard import Guard, TooLongError
from privet.common.web.pages import environment, page
from privet.common.web.sessions import COOKIE, Bucket, Clock, Role, Session, Sessions
from privet.common.web.texts import LANGUAGES, Texts, preferred

_log = logging.getLogger("privet.console")
_STATIC = {"console.css": "text/css", "console.js": "text/javascript"}
_FOLDER = Path(__file__).parent
FORM_SECONDS = 5.0
"""Within which a form has to arrive."""
_MOST_FIELDS, _PAGE_BURST, _PAGE_RATE, _LINK_BURST, _LINK_RATE = 32, 240, 40.0, 10, 0.2

Form = Mapping[str, str]
"""The fields of a form."""


@dataclass(frozen=True)
class Asked:
    """A request of somebody who has entered.

    Attributes:
        session: Whose.
        texts: The texts of its language.
        path: The parts of the path that the route names.
        query: What stands behind the path of a page.
        form: The fields that were sent; empty for a page.
    """

    session: Session
    texts: Texts
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    form: Form = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """What a route answers with: a template and its values, or another place to go to.

    Attributes:
        template: Name of the template.
        values: What it shows.
        status: Of the answer.
        to: Where to go instead; empty: nowhere.
    """

    template: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200
    to: str = ""


Answer = Callable[[Asked], Shown]
"""Answers a request. It may read files and wait for the network: it runs in a thread of its own."""


@dataclass(frozen=True)
class View:
    """What one console shows.

    Attributes:
        templates: Folder of its templates.
        pages: Answers by path, for all who have entered.
        actions: Answers to forms by path, for approvers.
        look: Looks at what the pages show; an open page is told when it changes.
    """

    templates: Path
    pages: Mapping[str, Answer]
    actions: Mapping[str, Answer]
    look: Look


class Console:
    """The application of one console.

    Args:
        view: What it shows.
        hosts: The names, with port, by which browsers know it.
        clock: Returns seconds that never go back.
    """

    def __init__(self, view: View, hosts: Collection[str], clock: Clock = time.monotonic) -> None:
        self.view, self.sessions, self.watcher = view, Sessions(clock), Watcher(view.look)
        environment(view.templates)
        self._guesses = Bucket(_LINK_BURST, _LINK_RATE, clock)
        self._known, self._strangers = (Bucket(_PAGE_BURST, _PAGE_RATE, clock) for _ in range(2))
        routes = [
            Route("/enter/{secret}", self._enter),
            Route("/leave", self._leave, methods=["POST"]),
            Route("/language", self._language, methods=["POST"]),
            Route("/static/{name}", self._static),
            Route("/events", self._events),
            *(Route(path, self._page(answer)) for path, answer in view.pages.items()),
            *(Route(path, self._action(answer), methods=["POST"]) for path, answer in view.actions.items()),
        ]
        inner = Starlette(routes=routes, exception_handlers={HTTPException: self._failed, Exception: self._broken})
        self.app: ASGIApp = Guard(inner, hosts, self._bucket)

    def _bucket(self, scope: Scope) -> Bucket:
        # Another user of this machine can send requests without a session, and must not use up those of a session.
        cookie = Request(scope).cookies.get(COOKIE)
        return self._strangers if self.sessions.of(cookie, touch=False) is None else self._known

    # Entering and leaving

    async def _enter(self, request: Request) -> Response:
        value = self.sessions.enter(request.path_params["secret"])
        if value is None:
            # Guesses are counted alone, so that they keep nobody out who has a link.
            status, text = (403, "message.link") if self._guesses.take() else (429, "message.busy")
            return self._message(request, None, status, text)
        answer = RedirectResponse("/", 303)
        # Lax would be sent along a link on another page; Strict is not.
        answer.set_cookie(COOKIE, value, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    async def _leave(self, request: Request) -> Response:
        if await self._sent(request) is None:
            return self._message(request, self._session(request), 403, "message.form")
        self.sessions.leave(request.cookies.get(COOKIE))
        answer = self._message(request, None, 200, "message.left")
        answer.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    async def _language(self, request: Request) -> Response:
        form, session = await self._sent(request), self._session(request)
        if form is None or session is None or form.get("language") not in LANGUAGES:
            return self._message(request, session, 403, "message.form")
        session.language = form["language"]
        return RedirectResponse("/", 303)

    # Pages and actions

    def _page(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return self._message(request, None, 401, "message.out")
            asked = Asked(session, self._texts(request), request.path_params, request.query_params)
            return await self._answered(answer, asked, live=True)

        return respond

    def _action(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return self._message(request, None, 401, "message.out")
            form = await self._sent(request)
            if form is None:
                return self._message(request, session, 403, "message.form")
            if session.role is not Role.APPROVER:
                return self._message(request, session, 403, "message.viewer")
            asked = Asked(session, self._texts(request), request.path_params, form=form)
            return await self._answered(answer, asked, live=False)

        return respond

    async def _answered(self, answer: Answer, asked: Asked, *, live: bool) -> Response:
        try:
            shown = await run_in_threadpool(answer, asked)
        except PrivetError as error:
            values = {"title": asked.texts("message.failed"), "text": error.message, "hint": error.hint}
            return page(self.view.templates, "message.html", asked.texts, asked.session, values, 409)
        if shown.to:
            return RedirectResponse(shown.to, 303)
        return page(
            self.view.templates, shown.template, asked.texts, asked.session, shown.values, shown.status, live=live
        )

    async def _sent(self, request: Request) -> Form | None:
        """Return the fields of a form of this very session; None if it is none."""
        session = self._session(request)
        try:
            async with asyncio.timeout(FORM_SECONDS):
                text = (await request.body()).decode("utf-8")
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, max_num_fields=_MOST_FIELDS)
        except TooLongError:
            raise HTTPException(413) from None
        except TimeoutError:
            raise HTTPException(408) from None
        except (ValueError, ClientDisconnect):
            return None
        form = dict(pairs)
        if session is None or len(form) != len(pairs) or not _same(form.pop("token", ""), session.token):
            return None
        return form

    # Files and events

    async def _static(self, request: Request) -> Response:
        kind = _STATIC.get(request.path_params["name"])  # of a list: a path never becomes one of a file
        if kind is None:
            raise HTTPException(404)
        return Response((_FOLDER / "static" / request.path_params["name"]).read_bytes(), media_type=kind)

    async def _events(self, request: Request) -> Response:
        cookie = request.cookies.get(COOKIE)
        if self.sessions.of(cookie, touch=False) is None:
            return PlainTextResponse("", 401)
        if self.watcher.listening >= MOST:
            return PlainTextResponse("", 503)
        going = lambda: self.sessions.of(cookie, touch=False) is not None  # noqa: E731
        return StreamingResponse(self.watcher.events(going), media_type="text/event-stream")

    # Messages

    def _session(self, request: Request) -> Session | None:
        # A page that asks for itself again, as something changed, is nobody's doing.
        return self.sessions.of(request.cookies.get(COOKIE), touch="x-refresh" not in request.headers)

    def _texts(self, request: Request) -> Texts:
        session = self.sessions.of(request.cookies.get(COOKIE), touch=False)
        chosen = "" if session is None else session.language
        return Texts(chosen or preferred(request.headers.get("accept-language", "")))

    def _message(self, request: Request, session: Session | None, status: int, key: str) -> Response:
        texts = self._texts(request)
        values = {"title": texts(key), "text": texts(f"{key}_text"), "hint": ""}
        return page(self.view.templates, "message.html", texts, session, values, status)

    async def _failed(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        key = {404: "message.missing", 405: "message.missing"}.get(status, "message.refused")
        return self._message(request, self._session(request), status, key)

    async def _broken(self, request: Request, error: Exception) -> Response:
        # Its text may quote what a page or a form held; where it was raised is enough to find it.
        last = traceback.extract_tb(error.__traceback__)[-1]
        _log.error("a page failed: %s in %s, line %s", type(error).__name__, Path(last.filename).name, last.lineno)
        return self._message(request, None, 500, "message.broken")


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
