"""A coordinator's console: its runs and sites as they are, and what an operator does there."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privet.client.network.enrolment import prepare_request
from privet.common.pki.token import Token
from privet.common.web.app import Console
from privet.common.web.sessions import Role
from privet.server.console.view import CoordinatorView
from privet.server.consortium.coordinator import encrypt_root, open_coordinator
from tests.support.browser import browsing, look_at
from tests.support.console import HOST, Visitor, served
from tests.support.consortium_world import make_coordinator
from tests.support.pages import ROOT

WORLD = ROOT / "tests/compat/data/world.tar.xz"
PASSPHRASE = "correct horse battery"
HOSTILE = "<img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator that has played a run and interrupted another one; its root's key has a passphrase."""
    folder = tmp_path_factory.mktemp("world")
    with tarfile.open(WORLD) as archive:
        inside = [each for each in archive if each.name.startswith("world/consortium/coordinator")]
        archive.extractall(folder, inside, filter="tar")
    home = folder / "world/consortium/coordinator"
    encrypt_root(open_coordinator(home), PASSPHRASE.encode())
    return home


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "coordinator"))


def visit(home: Path, role: Role = Role.APPROVER) -> Visitor:
    return Visitor(Console(CoordinatorView(home).view(), {HOST}), role)


def waiting(home: Path, process: int, **changes: object) -> None:
    """Write what a run waits for, as the process that plays it does."""
    note = {"stage": "train", "round": 3, "needed": 0, "answered": ["alpha"], "since": time.time() - 200}
    note |= {"missing": {"beta": "", "gamma": HOSTILE}, "process": process, **changes}
    (home / "runs/second/waiting.json").write_text(json.dumps(note))


def ask(home: Path, text: str, folder: Path) -> str:
    """Ask to join with a token, and return the words that the site's operator reads out."""
    asked = prepare_request(folder, Token.parse(text))
    open_coordinator(home).members.ask(asked, datetime.now(UTC))
    return asked.keys.words


def token_in(page: str) -> str:
    found = re.search(r"<code>(privet1\.[^<]+)</code>", page)
    assert found is not None, page
    return found.group(1)


def test_the_first_page_says_who_is_waited_for_and_since_when(home: Path) -> None:
    waiting(home, os.getpid())
    visitor = visit(home)
    page = visitor.get("/").text
    assert page.index("second") < page.index("finished")  # what runs comes first
    assert "Waiting for 2: beta, gamma" in page
    assert "3 min" in page
    assert "<img" not in page
    assert "gamma: &lt;img" in page
    assert "25</b><span>leaves" in page
    assert "3; needed are 2. alpha, beta, gamma" in page
    # The process that plays the run is killed: its note stays, and the run is not shown as running.
    waiting(home, 2**22 + 1)
    assert "not running" in visitor.get("/").text
    assert "Waiting for" not in visitor.get("/").text


def test_a_run_shows_each_round_with_duration_cost_and_quality(home: Path) -> None:
    page = visit(home).get("/run/first").text
    rounds = re.findall(r'<th scope="row" class="n" data-name="Round">(\d+)', page)
    assert rounds == ["2", "1"]
    assert re.search(r"validation accuracy 33\.7 %, loss 1\.376", page)
    assert 'data-name="ε">5.6<' in page
    assert page.count("<rect") == 2
    assert visit(home).get("/run/none").status_code == 409
    assert visit(home).get("/run/..%2fkeys").status_code == 404


def test_a_run_that_cannot_be_read_hides_no_other(home: Path) -> None:
    visitor = visit(home)
    assert "cannot be read" not in visitor.get("/").text
    (home / "runs/second/state.safetensors").write_bytes(b"broken")
    page = visitor.get("/").text
    assert "cannot be read" in page
    assert "finished" in page
    assert "restore the newest backup" in visitor.get("/run/second").text


def test_an_invitation_is_shown_once_and_a_site_is_approved_by_words_and_passphrase(home: Path, tmp_path: Path) -> None:
    visitor = visit(home)
    assert "expected 1 to 63" in visitor.post("/invite", {"site": "../oslo"}).text
    invited = visitor.post("/invite", {"site": "oslo"})
    token = token_in(invited.text)
    assert "data-events" not in invited.text  # a page that is loaded again would invite again
    assert token not in visitor.get("/").text
    assert open_coordinator(home).charter.words in invited.text
    words = ask(home, token, tmp_path / "oslo")
    page = visitor.get("/").text
    assert "asks to join" in page
    assert words not in page  # an operator who copies them has compared nothing
    for form, said in (
        ({"words": words, "passphrase": "guess"}, "does not open the root&#39;s key"),
        ({"words": words, "passphrase": ""}, "does not open the root&#39;s key"),
        ({"words": " ".join(reversed(words.split())), "passphrase": PASSPHRASE}, "oslo"),
        ({"passphrase": PASSPHRASE}, "oslo"),
    ):
        answer = visitor.post("/sites/oslo/approve", form)
        assert answer.status_code == 409
        assert said in answer.text
        assert PASSPHRASE not in answer.text
    states = {row.keys.site: row.state for row in open_coordinator(home).members.rows()}
    assert states["oslo"] == "pending"
    assert (
        visit(home, Role.VIEWER).post("/sites/oslo/approve", {"words": words, "passphrase": PASSPHRASE}).status_code
        == 403
    )
    assert visitor.post("/sites/oslo/approve", {"words": words, "passphrase": PASSPHRASE}).status_code == 303
    states = {row.keys.site: row.state for row in open_coordinator(home).members.rows()}
    assert states["oslo"] == "member"
    assert open_coordinator(home).members.statements() == ()  # it is in the round log
    guesses = [visitor.post("/sites/oslo/approve", {"words": words, "passphrase": "x"}).text for _ in range(4)]
    assert ["too many passphrases" in each for each in guesses] == [False, False, False, True]


def test_a_root_without_passphrase_approves_nobody_in_the_console(tmp_path: Path) -> None:
    made = make_coordinator(tmp_path / "c")
    visitor = visit(tmp_path / "c")
    words = ask(made.directory, token_in(visitor.post("/invite", {"site": "oslo"}).text), tmp_path / "oslo")
    assert "privet coordinator approve oslo" in visitor.get("/").text
    assert "has no passphrase" in visitor.post("/sites/oslo/approve", {"words": words, "passphrase": "x"}).text
    assert [row.state for row in made.members.rows()] == ["pending"]
    assert "not founded yet" in visitor.get("/").text


def test_a_run_is_stopped_and_continued_by_a_process_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, object]]] = []

    class Begun:
        def __init__(self, command: list[str], **settings: object) -> None:
            started.append((command, settings))

        def poll(self) -> None: ...

    monkeypatch.setattr("privet.server.console.view.subprocess.Popen", Begun)
    waiting(home, os.getpid())
    visitor = visit(home)
    assert "cannot be continued" in visitor.post("/run/second/resume", {}).text
    assert visitor.post("/run/second/stop", {}).status_code == 303
    assert (home / "runs/second/stop").exists()
    assert "stops after its current round" in visitor.get("/run/second").text
    assert "nothing to stop" in visitor.post("/run/first/stop", {}).text
    (home / "runs/second/waiting.json").unlink()
    assert started == []
    assert visitor.post("/run/second/resume", {}).status_code == 303
    assert "is being continued already" in visitor.post("/run/second/resume", {}).text
    ((command, settings),) = started
    assert command[2:] == ["-m", "privet", "coordinator", "resume", "second", "-C", str(home)]
    assert settings["start_new_session"]  # a console that ends does not end it
    assert (home / "console/second.log").stat().st_mode & 0o777 == 0o600
    for path in ("/run/second/stop", "/run/second/resume", "/invite"):
        assert visit(home, Role.VIEWER).post(path, {"site": "oslo"}).status_code == 403


@pytest.mark.slow
def test_an_operator_invites_approves_and_stops_in_a_browser(home: Path, tmp_path: Path) -> None:
    waiting(home, os.getpid())
    with served("server.commands.console:coordinator", "-C", home) as (_, link), browsing() as browser:
        place = link.split("/enter/")[0]
        browser.open(link)
        browser.fill("#site", "oslo")
        browser.follow("form[action='/invite'] button")
        words = ask(home, token_in(str(browser.run("document.body.innerHTML"))), tmp_path / "oslo")
        for page in ("/", "/sites", "/run/second", "/run/first"):
            look_at(browser, place + page)
        browser.open(place + "/")
        waiting(home, os.getpid(), round=4, answered=[])
        browser.until("document.body.innerText.includes('round 4')")  # told by an event
        browser.fill("[name=words]", words)
        browser.fill("[name=passphrase]", PASSPHRASE)
        browser.follow("form[action='/sites/oslo/approve'] button")
        assert "oslo" in browser.text()
        assert {row.keys.site: row.state for row in open_coordinator(home).members.rows()}["oslo"] == "member"
        browser.open(place + "/run/second")
        browser.follow("form[action='/run/second/stop'] button")
        assert "It stops after its current round" in browser.text()
        assert (home / "runs/second/stop").exists()
        assert browser.objections == []
        # What the page's policy forbids is noticed, and does not run.
        browser.run(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        browser.until("true")
        assert browser.run("window.ran") is None
        assert any("Content Security Policy" in each for each in browser.objections)
