"""A coordinator's console: its runs and sites as they are, and what an operator does there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from privet.client.network.enrolment import prepare_request
from privet.common.clock import now
from privet.common.pki.token import Token
from privet.common.web.app import Console
from privet.common.web.sessions import Role
from privet.server.console import reading
from privet.server.console.reading import Head, People, Run, Site, alerts
from privet.server.console.view import CoordinatorView
from privet.server.consortium.coordinator import encrypt_root, open_coordinator
from privet.server.consortium.membership import Listed
from privet.server.network.nodes import CLOCK_SECONDS
from privet.server.network.service import link_of
from privet.server.rounds.wait import Wait
from tests.client.test_adapters import play, study_of
from tests.client.test_candidates import GATE, said_by
from tests.support.browser import browsing, look_at
from tests.support.console import HOST, Visitor, opened_here, served
from tests.support.consortium_world import make_coordinator, running
from tests.support.pages import ROOT
from tests.support.site_world import ready
from tests.support.synthetic import start_adapter

WORLD = ROOT / "tests/compat/data/world.tar.xz"
PASSPHRASE = "correct horse battery"
HEAVY = {"numpy", "flwr", "grpc", "sqlalchemy", "scipy", "torch", "transformers", "peft", "safetensors", "google"}
"""Libraries that take more memory than the rest of a console."""
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


def test_a_run_of_many_rounds_and_sites_is_read_in_pages(home: Path) -> None:
    rounds = home / "runs/first/rounds"
    statement = json.loads((rounds / "0002.json").read_text())
    for number in range(3, 121):
        failures = {f"site-{each:03}": f"{HOSTILE} {'x' * 900}" for each in range(40)} if number == 120 else {}
        changed = statement | {"round": number, "failures": failures}
        changed |= {"type": "round-abort", "reason": HOSTILE} if number % 2 else {}
        (rounds / f"{number:04d}.json").write_text(json.dumps(changed))
    visitor = visit(home)
    assert "61 of 2 rounds closed, 59 aborted" in visitor.get("/").text
    page, last = visitor.get("/run/first"), visitor.get("/run/first?page=3")
    assert len(page.content) < 60_000
    assert re.findall(r'class="n" data-name="Round">(\d+)', page.text)[:2] == ["120", "119"]
    assert "and 37 more sites" in page.text
    assert f"{'x' * 900}" not in page.text
    assert "<img" not in page.text
    assert "1 to 50 of 120" in page.text
    assert '<a href="?page=2" rel="next">' in page.text
    assert 'rel="prev"' not in page.text
    assert re.findall(r'class="n" data-name="Round">(\d+)', last.text) == [str(number) for number in range(20, 0, -1)]
    assert 'rel="next"' not in last.text
    for odd in ("0", "-1", "99999999999", "x", "²"):
        assert visitor.get(f"/run/first?page={odd}").status_code == 200
    # A statement is read once, and again when it has changed.
    (rounds / "0120.json").write_text(json.dumps(statement | {"round": 120, "type": "round-abort", "reason": "late"}))
    assert "60 of 2 rounds closed, 60 aborted" in visitor.get("/").text


def test_many_sites_are_listed_in_pages_and_found_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Listed(f"site-{number:04}", "member", 0, "", "", None) for number in range(1000)]
    monkeypatch.setattr(People, "_members", lambda _: (tuple(listed), {}))
    visitor = visit(home)
    page = visitor.get("/sites").text
    assert len(page.encode()) < 60_000
    assert page.count('scope="row"') == 100
    assert "1 to 100 of 1000" in page
    found = visitor.get("/sites?search=SITE-0%0A9&page=1").text
    assert "0 of 1000 have this in their name" in found
    found = visitor.get("/sites?search=-09").text
    assert "100 of 1000 have this in their name" in found
    assert 'value="-09"' in found
    assert "page=2" not in found
    found = visitor.get("/sites?search=site-0&page=2").text
    assert '<a href="?search=site-0&amp;page=3" rel="next">' in found
    assert "<img" not in visitor.get(f"/sites?search={HOSTILE}").text


def test_a_coordinators_console_loads_neither_numpy_nor_flower_for_any_page(home: Path) -> None:
    waiting(home, os.getpid())
    code = (
        "import sys; from pathlib import Path; import privet.server.commands.console, privet.common.web.serving;"
        "from privet.common.web.app import Asked, Console; from privet.common.web.sessions import Role, Session;"
        "from privet.common.web.pages import page; from privet.common.web.texts import Texts;"
        "from privet.server.console.view import CoordinatorView; view = CoordinatorView(Path(sys.argv[1])).view();"
        "asked = Asked(Session(Role.APPROVER, 0, 0), Texts('de'), {'run': 'first'});"
        "shown = [each(asked) for each in view.pages.values()]; view.look();"
        "[page(view.templates, each.template, asked.texts, asked.session, each.values) for each in shown];"
        f"print(*sorted({HEAVY!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def member(name: str, **changes: Any) -> Site:
    return replace(Site(name, "member", 0, "", online=True, days=5, seen=1e9), **changes)


def test_alerts_name_what_an_operator_has_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, at = [10**12, 10**12], datetime.fromtimestamp(1e9, UTC)
    monkeypatch.setattr(reading, "disk_usage", lambda _: SimpleNamespace(total=space[0], free=space[1]))

    def found(*sites: Site, head: Head | None = None, serving: bool = True) -> list[str]:
        return [each.kind for each in alerts(sites, head, tmp_path, at, serving=serving)]

    well, head = [member("a"), member("b")], Head(9, "", 9, ("a", "b"), 2)
    assert found(*well, head=head) == []
    assert found() == []
    away = member("c", online=False, seen=1e9 - 3600)
    assert found(*well, away, head=head) == []  # for an hour: it is in the list of sites, and no alert
    assert found(*well, replace(away, seen=1e9 - 90_000)) == ["away"]
    assert found(*well, replace(away, seen=None)) == ["never"]
    assert found(*well, replace(away, seen=None, since=int(1e9) - 3600)) == []  # it has joined just now
    assert found(*well, replace(away, state="revoked", seen=None, late=True)) == []
    assert found(well[0], away, head=head) == ["quorum"]
    assert found(*well, head=replace(head, witnesses=("a",))) == ["cosigned"]
    assert found(well[0], away, head=head, serving=False) == ["service"]  # and so no quorum
    assert found(serving=False) == []
    assert found(member("a", late=True), member("b", late=True, days=-1)) == ["certificate", "ended"]
    space[1] = 10**9
    assert found() == ["disk"]
    page = visit(make_coordinator(tmp_path / "c").directory).get("/").text
    assert "The disk has 1 GB of 1e+03 GB left" in page


def test_a_site_that_is_away_was_seen_until_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = [True]
    monkeypatch.setattr(reading, "listens", lambda _: serving[0])
    with running(tmp_path) as world:
        world.found("berlin", "lyon")
        made = world.coordinator
        link = link_of(made.directory)
        nodes = [link.register(row.keys.node.encode("ascii")) for row in made.members.rows()]
        page = visit(made.directory).get("/sites").text
        assert page.count("never connected") == 2
        assert f"within {CLOCK_SECONDS} s of this machine" in page
        state = link._state
        assert state.activate_node(nodes[0], 30.0)
        sites = People(made).sites(now(), serving=True)
        assert [each.online for each in sites] == [False, True]
        assert len(People(made).connected()) == 1
        # Without the service nobody is connected, whatever its table says until a minute has passed.
        serving[0] = False
        assert People(made).connected() == frozenset()
        assert "does not run on this machine, so no site is connected" in visit(made.directory).get("/").text
        serving[0] = True
        assert state.deactivate_node(nodes[0])
        seen = [each.seen for each in People(made).sites(now(), serving=True) if each.seen is not None]
        assert seen == [pytest.approx(time.time(), abs=60)]
        assert "last seen" in visit(made.directory).get("/sites").text
        # A new certificate of seven days is no fault; one that should have been renewed is.
        assert not any(each.late for each in sites)
        assert all(each.late for each in People(made).sites(now() + timedelta(days=6.5), serving=True))


def test_a_candidate_shows_what_its_gate_lacks(tmp_path: Path) -> None:
    with ready(tmp_path) as world:
        made = world.coordinator
        play(world, "flu", start_adapter(0), study_of("flu", gate=GATE))
        visitor = visit(made.directory)
        status = {"withdrawn": None, "waiting": None, "ended": True, "closed": 2, "gated": True, "released": False}
        for change, state in (
            ({}, "waiting"),
            ({"released": True}, "finished"),
            ({"gated": False, "closed": 0}, "finished"),  # without a result: there is nothing to release
            ({"gated": False}, "stopped"),  # before its release, which `resume` makes
            ({"gated": False, "waiting": Wait("train")}, "running"),
        ):
            assert Run("flu", status | change).state == state
        page = visitor.get("/run/flu").text
        assert "0 of 2 needed signatures" in page
        assert "signatures: 0 sites have signed, 2 are needed" in page
        for site in ("berlin", "lyon"):
            world.service(site).review(said_by(world, site, "flu"))
        page = visitor.get("/run/flu").text  # told by the reviews that wait for the log
        assert "2 of 2 needed signatures: berlin, lyon" in page
        assert "privet gate decide flu" in page


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


@pytest.mark.slow
def test_a_run_that_loses_a_site_is_stopped_and_continued_in_a_browser(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On recorded files: what the process of the run would write is written here."""
    continued: list[str] = []

    def resume(_: Path, run: str) -> None:
        continued.append(run)
        waiting(home, os.getpid(), round=3, answered=["alpha", "beta"], missing={})

    monkeypatch.setattr("privet.server.console.view.resume", resume)
    waiting(home, os.getpid(), missing={"beta": "", "gamma": ""}, answered=["alpha"])
    with opened_here(CoordinatorView(home).view()) as link, browsing() as browser:
        browser.open(link)
        browser.until("document.querySelector('a.card')")
        browser.open(link.split("/enter/")[0] + "/run/second")
        assert "Waiting for 2: beta, gamma" in browser.text()
        waiting(home, os.getpid(), missing={"gamma": "the connection was lost"}, answered=["alpha", "beta"])
        browser.until("document.body.innerText.includes('gamma: the connection was lost')")  # told by an event
        browser.follow("form[action$='/stop'] button")
        assert "It stops after its current round" in browser.text()
        for name in ("waiting.json", "stop"):  # the process has aborted the round, and ended
            (home / "runs/second" / name).unlink()
        browser.until("document.querySelector('form[action$=\"/resume\"]')")
        assert "not running" in browser.text()
        browser.follow("form[action$='/resume'] button")
        assert continued == ["second"]
        assert "Every site has answered; computing" in browser.text()
        assert browser.objections == []
