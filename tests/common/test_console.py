"""The foundation of every console: who gets in, what is refused, what is escaped, and what every answer carries."""

from __future__ import annotations

import asyncio
import re
import socket
import string
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from privet.common.errors import StateError
from privet.common.web import serving
from privet.common.web.app import Asked, Console, Shown, View
from privet.common.web.events import Watcher, stamps
from privet.common.web.guard import HEADERS, MOST_BYTES, MOST_PATH, POLICY
from privet.common.web.pages import bars, epsilon, size
from privet.common.web.sessions import COOKIE, IDLE_SECONDS, LINK_SECONDS, WHOLE_SECONDS, Bucket, Role, Sessions
from privet.common.web.texts import LANGUAGES, catalogue, preferred
from tests.support.console import HOST, Visitor
from tests.support.pages import ROOT

SCRIPT = "<script>alert(1)</script>\u202e\x1b[2J"


class Time:
    """A clock that tests turn."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def done() -> list[dict[str, str]]:
    """The forms that an action received."""
    return []


@pytest.fixture
def console(tmp_path: Path, done: list[dict[str, str]]) -> Console:
    """A console with one page, which shows a hostile text, one that fails, and one action."""
    (tmp_path / "own.html").write_text(
        '{% extends "base.html" %}{% block main %}<p title="{{ text }}">{{ text }}</p>'
        '<input name="token" value="{{ token }}">{% endblock %}'
    )

    def act(asked: Asked) -> Shown:
        done.append(dict(asked.form))
        return Shown(to="/")

    def wrong(asked: Asked) -> Shown:
        raise StateError(SCRIPT, SCRIPT)

    def broken(asked: Asked) -> Shown:
        raise RuntimeError("a secret")

    pages = {"/": lambda asked: Shown("own.html", {"text": SCRIPT}), "/wrong": wrong, "/broken": broken}
    return Console(View(tmp_path, pages, {"/act": act}, lambda: 0), {HOST}, Time())


# Entering


def test_a_link_works_once_and_the_cookie_belongs_to_this_host_alone(console: Console) -> None:
    link = console.sessions.link(Role.VIEWER)
    visitor = Visitor(console, cookie="none")
    entered = visitor.get(f"/enter/{link}", Cookie="", Sec_Fetch_Site="none")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    assert cookie.startswith(COOKIE.lower())
    assert {"path=/", "secure", "httponly", "samesite=strict"} <= {part.strip() for part in cookie.split(";")}
    assert "domain" not in cookie
    assert visitor.get(f"/enter/{link}", Cookie="").status_code == 403
    assert visitor.get("/enter/guessed", Cookie="").status_code == 403
    looked_at = f"/enter/{console.sessions.link(Role.VIEWER)}"
    assert visitor.client.head(looked_at).status_code == 405  # a preview of the link does not use it up
    assert visitor.get(looked_at, Cookie="").status_code == 303


def test_links_and_sessions_end() -> None:
    clock = Time()
    sessions = Sessions(clock)
    late = sessions.link(Role.APPROVER)
    clock.now += LINK_SECONDS
    assert sessions.enter(late) is None
    idle = str(sessions.enter(sessions.link(Role.APPROVER)))
    clock.now += IDLE_SECONDS
    assert sessions.of(idle) is None
    busy, began = str(sessions.enter(sessions.link(Role.APPROVER))), clock.now
    while clock.now < began + WHOLE_SECONDS - IDLE_SECONDS / 2:
        assert sessions.of(busy) is not None
        clock.now += IDLE_SECONDS / 2
    clock.now += IDLE_SECONDS / 2
    assert sessions.of(busy) is None
    open_page = str(sessions.enter(sessions.link(Role.VIEWER)))
    clock.now += IDLE_SECONDS - 1
    assert sessions.of(open_page, touch=False) is not None
    clock.now += 1
    assert sessions.of(open_page) is None  # a page that only listens does not keep its session


def test_a_forged_session_sees_nothing_and_does_nothing(console: Console, done: list[dict[str, str]]) -> None:
    real = Visitor(console)
    token = real.token()
    for cookie in ("guessed", "", real.cookie[:-1], real.cookie + "A", "x" * 300):
        forged = Visitor(console, cookie=cookie or " ")
        assert forged.get("/").status_code == 401
        assert forged.get("/events").status_code == 401
        assert forged.post("/act", f"token={token}").status_code == 401
    assert done == []


def test_a_page_that_refreshes_itself_does_not_keep_its_session(console: Console) -> None:
    visitor = Visitor(console)
    session = console.sessions.of(visitor.cookie)
    assert session is not None
    session.used = began = session.used - 60
    assert visitor.get("/", X_Refresh="1").status_code == 200
    assert session.used == began
    visitor.get("/")
    assert session.used > began


def test_who_leaves_is_out(console: Console) -> None:
    visitor = Visitor(console)
    assert visitor.post("/leave", {}).status_code == 200
    assert visitor.get("/").status_code == 401


def test_a_viewer_looks_and_an_approver_acts(console: Console, done: list[dict[str, str]]) -> None:
    assert Visitor(console, Role.VIEWER).post("/act", {"a": "1"}).status_code == 403
    assert done == []
    assert Visitor(console).post("/act", {"a": "1"}).status_code == 303
    assert done == [{"a": "1"}]


# Requests of other pages


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "same-site", "Origin": f"http://{HOST}"},
        {"Sec_Fetch_Site": "none", "Origin": ""},
        {"Sec_Fetch_Site": "", "Origin": ""},
        {"Sec_Fetch_Site": "", "Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "", "Origin": "null"},
        {"Origin": "http://privet-test.localhost:4001"},
        {"Origin": f"https://{HOST}"},
        {"Origin": "http://["},  # which nobody can take apart
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/json"},
    ],
)
def test_another_page_sends_no_form(console: Console, done: list[dict[str, str]], headers: dict[str, str]) -> None:
    visitor = Visitor(console)
    assert visitor.post("/act", {"a": "1"}, **headers).status_code in (403, 415)
    assert done == []
    assert visitor.post("/act", {"a": "1"}).status_code == 303  # the same form, from its own page


def test_a_form_needs_the_token_of_its_own_session(console: Console, done: list[dict[str, str]]) -> None:
    visitor, other = Visitor(console), Visitor(console)
    for form in ("a=1", "token=", f"token={other.token()}", f"token={visitor.token()}&token={visitor.token()}", "%"):
        assert visitor.post("/act", form).status_code == 403
    assert visitor.get("/act").status_code == 405
    assert done == []


def test_another_page_reads_nothing(console: Console) -> None:
    for site in ("cross-site", "same-site", "nonsense"):
        assert Visitor(console).get("/", Sec_Fetch_Site=site).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example:4000", "127.0.0.1:4000", "privet-test.localhost", f"{HOST}.evil.example", f"{HOST}, {HOST}"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(console: Console, host: str) -> None:
    found = Visitor(console).get("/", Host=host)
    assert found.status_code == 421
    assert "token" not in found.text


# What every answer carries


def test_every_answer_carries_every_header(console: Console) -> None:
    visitor = Visitor(console)
    answers = [visitor.get(path) for path in ("/", "/wrong", "/broken", "/none", "/static/console.js", "/enter/x")]
    answers += [visitor.get("/", Host="evil.example"), visitor.get("/", Cookie=""), visitor.post("/act", {"a": "1"})]
    answers += [visitor.client.put("/act"), visitor.get("/" + "a" * MOST_PATH), visitor.post("/act", "a" * 20_000)]
    assert [each.status_code for each in answers] == [200, 409, 500, 404, 200, 403, 421, 401, 303, 405, 414, 413]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "default-src 'none'" in POLICY
    assert "frame-ancestors 'none'" in POLICY
    assert "unsafe" not in POLICY


def test_a_path_never_becomes_one_of_a_file(console: Console) -> None:
    for path in (
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/",
    ):
        assert Visitor(console).get(path).status_code == 404


def test_text_of_others_is_shown_and_never_runs(console: Console) -> None:
    for path in ("/", "/wrong"):
        page = Visitor(console).get(path).text
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert not set("\u202e\x1b") & set(page)


def test_an_error_says_where_and_never_what(console: Console, caplog: pytest.LogCaptureFixture) -> None:
    page = Visitor(console).get("/broken")
    assert page.status_code == 500
    assert "secret" not in page.text + caplog.text
    assert "RuntimeError in test_console.py" in caplog.text


# Too much, and too slow


def test_requests_and_links_are_limited(console: Console) -> None:
    visitor, stranger = Visitor(console), Visitor(console, cookie="none")
    link = console.sessions.link(Role.VIEWER)
    assert {visitor.get(f"/enter/{n}").status_code for n in range(12)} == {403, 429}
    assert visitor.get(f"/enter/{link}").status_code == 303  # guesses keep nobody out who has a link
    assert {stranger.get("/").status_code for _ in range(300)} == {401, 429}
    assert {stranger.get("/", Sec_Fetch_Site="cross-site").status_code for _ in range(300)} == {403}
    found = [visitor.get("/static/console.css").status_code for _ in range(300)]
    assert (found[0], found[-1]) == (200, 429)
    bucket, clock = None, Time()
    bucket = Bucket(2, 1, clock)
    assert [bucket.take(), bucket.take(), bucket.take()] == [True, True, False]
    clock.now += 1
    assert [bucket.take(), bucket.take()] == [True, False]


@pytest.fixture
def port(console: Console, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The console on a real port, with little patience."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr("privet.common.web.app.FORM_SECONDS", 0.3)
    opened = serving.listen(0)
    server = uvicorn.Server(
        uvicorn.Config(console.app, log_config=None, lifespan="off", http=serving.PromptProtocol, ws="none")
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[opened])), daemon=True)
    thread.start()
    yield opened.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def exchange(port: int, *parts: bytes) -> tuple[bytes, float]:
    """Send bytes, and return what comes until the other side closes, and how long that took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        for part in parts:
            line.sendall(part)
        found = b""
        while more := line.recv(65536):
            found += more
    return found, time.monotonic() - began


def test_slow_and_oversize_requests_end(console: Console, port: int) -> None:
    visitor = Visitor(console)
    head = (
        f"POST /act HTTP/1.1\r\nHost: {HOST}\r\nCookie: {COOKIE}={visitor.cookie}\r\nOrigin: http://{HOST}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n"
    ).encode()
    assert exchange(port)[0] == b""  # says nothing
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: ")[0] == b""  # never ends its head
    found, seconds = exchange(port, head + b"Content-Length: 100\r\n\r\na=1")  # never ends its form
    assert found.startswith(b"HTTP/1.1 408")
    assert seconds < 5
    assert exchange(port, head + b"Content-Length: 16385\r\n\r\n")[0].startswith(b"HTTP/1.1 413")
    assert exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")[0].startswith(b"HTTP/1.1 411")
    assert MOST_BYTES == 16384
    fine, _ = exchange(port, f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert fine.count(b"HTTP/1.1") == 1  # one request a connection


def test_a_socket_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = serving.listen_at(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError, match="cannot be used as a socket"):
        serving.listen_at(path)  # in use
    first.close()
    serving.listen_at(path).close()  # left behind
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StateError):
        serving.listen_at(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


# Events


def test_a_change_of_a_file_is_told_once_and_a_session_that_ends_hears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.common.web.events.SECONDS", 0.02)
    monkeypatch.setattr("privet.common.web.events.PULSE", 0.3)
    file, looks, going = tmp_path / "state", [0], [True]

    def look() -> object:
        looks[0] += 1
        return stamps([file])

    async def listen() -> list[str]:
        watcher = Watcher(look)
        pages = [watcher.events(lambda: going[0]) for _ in range(5)]
        heard = [await anext(page) for page in pages]
        waiting = [asyncio.ensure_future(anext(page)) for page in pages]
        await asyncio.sleep(0.1)
        file.write_text("one")
        heard += await asyncio.gather(*waiting)
        heard += [await anext(pages[0])]
        going[0] = False
        assert [each async for each in pages[0]] == []
        return heard

    heard = asyncio.run(listen())
    assert heard[5:10] == ["event: changed\ndata: 1\n\n"] * 5
    assert heard[10] == ": still here\n\n"
    assert looks[0] < 60  # one watcher for all pages


# Texts


def test_every_language_has_every_text_with_the_same_places() -> None:
    def places(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    english = catalogue("en")
    for language in LANGUAGES:
        found = catalogue(language)
        assert found.keys() == english.keys()
        assert {key: places(text) for key, text in found.items()} == {key: places(t) for key, t in english.items()}
        assert all(text.strip() == text and text for text in found.values())


def test_templates_and_catalogue_name_the_same_texts() -> None:
    folders = ("common/web", "client/console", "server/console")
    files = [each for folder in folders for each in (ROOT / folder).rglob("*") if each.suffix in (".html", ".py")]
    text = "".join(each.read_text() for each in files)
    shown = set(re.findall(r"""\bt(?:exts)?\(["']([a-z]+\.[a-z_]+)["']""", text))
    messages = set(re.findall(r'"(message\.[a-z]+)"', text)) - {"message.html"}
    begun = ("nav.", *re.findall(r"""t\(["']([a-z]+\.)["'] ~""", text))
    known = set(catalogue("en"))
    assert (shown | messages | {f"{each}_text" for each in messages - {"message.failed"}}) - known == set()
    assert {key for key in known - shown - messages if not key.startswith((*begun, "message."))} == set()


def test_the_language_is_what_the_browser_asks_for_until_somebody_chooses(console: Console) -> None:
    assert [preferred(each) for each in ("de-CH,en;q=0.5", "fr, zh-TW;q=0.8", "", "x;q=a", "en;q=0.1,de")] == [
        "de", "zh", "en", "en", "de",
    ]  # fmt: skip
    visitor = Visitor(console)
    assert '<html lang="de">' in visitor.get("/", Accept_Language="de").text
    assert visitor.post("/language", {"language": "zh"}).status_code == 303
    assert '<html lang="zh">' in visitor.get("/", Accept_Language="de").text
    assert visitor.post("/language", {"language": "../en"}).status_code == 403


def test_numbers_have_units() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_400_000, 3 * 10**12)] == ["0 B", "999 B", "1.5 kB", "2.4 MB", "3e+03 GB"]
    assert [epsilon(each) for each in (None, 0.01234, 8.0, float("inf"))] == ["\u2013", "0.0123", "8", "\u221e"]
    assert [each["width"] for each in bars([("a", 6.0), ("b", 6.0)], 8.0)] == ["75.00", "25.00"]
    assert bars([("a", 1.0)], 0.0)[0]["width"] == "0.00"
