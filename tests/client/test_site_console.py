"""A site's console: what it shows of a real consortium, what an approver signs in it, and what nobody can do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from privet.client.checks import Check
from privet.client.commands import policy as commands
from privet.client.commands.doctor import LOCAL, examine
from privet.client.console.reading import Consulting, Said
from privet.client.console.view import SiteView
from privet.client.policy.consent import approved, check_policy, record_approval
from privet.client.policy.decisions import Decision, admitted, decide, decisions, make_approver
from privet.client.rounds.history import _keep, kept_leaves
from privet.client.rounds.logbook import COPY
from privet.client.site import load_site
from privet.common.clock import now
from privet.common.errors import PolicyError, ProtocolError, StateError
from privet.common.web.app import Console
from privet.common.web.sessions import Role
from tests.support.browser import browsing, look_at
from tests.support.console import HOST, Remote, Visitor, opened_here, served
from tests.support.consortium_world import World, run, running
from tests.support.finished import finished_site
from tests.support.pages import ROOT
from tests.support.proposed_world import EXAMPLE, begin, changed, settle

PASSPHRASE = "correct horse battery"
HOSTILE = "<img src=x onerror=alert(1)>'\"`</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of two with three runs; berlin is set up, and has two approvers."""
    with running(tmp_path_factory.mktemp("consortium")) as world:
        world.found("berlin", "lyon")
        world.compare("berlin", "lyon")
        home = settle(world)
        begin(world, "old", changed(EXAMPLE, epsilon=1.0), ended=True)
        begin(world, "greedy", changed(EXAMPLE, epsilon=20.0), logged=False)
        begin(world, "triage", EXAMPLE)
        (world.folder / "passphrase").write_text(PASSPHRASE)
        for name in ("anna", "bela"):
            run(commands.approver, home / "site.toml", name, "--passphrase-file", world.folder / "passphrase")
        yield world


@pytest.fixture
def file(world: World) -> Iterator[Path]:
    """The site file of berlin, where nothing is decided."""
    home = world.folder / "berlin"
    policy = (home / "policy.toml").read_text()
    yield home / "site.toml"
    (home / "policy.toml").write_text(policy)
    for name in ("approvals", "approvals.signed"):
        (home / "state" / name).unlink(missing_ok=True)


def visit(file: Path, role: Role = Role.APPROVER, said: Said | None = None) -> Visitor:
    ask = Consulting(file) if said is None else lambda: said
    view = SiteView(file, ask, lambda: examine(file, now, only=LOCAL))
    return Visitor(Console(view.view(), {HOST}), role)


def path_of(digest: str = EXAMPLE.digest) -> str:
    return f"/study/{digest.removeprefix('sha256:')}"


def form(decision: str = "approve", by: str = "anna", passphrase: str = PASSPHRASE, **fields: str) -> dict[str, str]:
    return {"decision": decision, "by": by, "passphrase": passphrase, "reason": "", "until": "", **fields}


# Decisions


def test_an_approval_counts_only_if_an_approver_signed_it(file: Path) -> None:
    site = load_site(file)
    with pytest.raises(StateError, match="needs the signature"):
        record_approval(site, EXAMPLE, now())
    with pytest.raises(StateError, match="needs the signature"):
        run(commands.approve, file, EXAMPLE.digest, "--yes")
    # What was written by hand, or approved before there were approvers, counts no more.
    (file.parent / "state/approvals").write_text(f"{EXAMPLE.digest} 2026-01-01T00:00:00+00:00 triage\n")
    assert approved(site) == frozenset()
    with pytest.raises(PolicyError, match="has not approved"):
        check_policy(site, EXAMPLE, dict)
    decide(site, EXAMPLE, "anna", PASSPHRASE.encode(), "approve", now=now())
    assert approved(site) == {EXAMPLE.digest}
    check_policy(site, EXAMPLE, dict)


def test_the_command_line_signs_as_the_console_does(file: Path, world: World) -> None:
    secret = ("--passphrase-file", world.folder / "passphrase")
    done = run(commands.approve, file, EXAMPLE.digest, "--yes", "--as=anna", "--until=2099-01-31", *secret)
    assert "approved" in done.output
    done = run(commands.refuse, file, EXAMPLE.digest, "--as=bela", "--reason=not  now", *secret)
    assert "refused" in done.output
    first, second = decisions(load_site(file))
    assert (first.by, first.until) == ("anna", int(datetime(2099, 2, 1, tzinfo=UTC).timestamp()))
    assert (second.by, second.decision, second.reason) == ("bela", "refuse", "not now")
    assert approved(load_site(file)) == frozenset()
    with pytest.raises(StateError, match="9999-12-31 is too late"):
        run(commands.approve, file, EXAMPLE.digest, "--yes", "--as=anna", "--until=9999-12-31", *secret)
    with pytest.raises(StateError, match="names approvers, so a decision needs the signature"):
        run(commands.refuse, file, EXAMPLE.digest, "--reason=no")


def test_who_decides_what_until_when() -> None:
    def said(by: str, decision: str, time: int, until: int | None = None) -> Decision:
        return Decision.model_validate(
            {"site": "north", "study": EXAMPLE.digest, "name": "a", "by": by, "decision": decision}
            | {"reason": "", "time": time, "until": until}
        )

    at, yes = datetime.fromtimestamp(100, UTC), frozenset({EXAMPLE.digest})
    anna, bela = said("anna", "approve", 1), said("bela", "approve", 2)
    assert admitted([anna], 1, at) == yes
    assert admitted([anna], 2, at) == admitted([anna, said("anna", "approve", 3)], 2, at) == frozenset()
    assert admitted([anna, bela], 2, at) == yes
    assert admitted([anna, bela, said("bela", "refuse", 3)], 1, at) == frozenset()
    assert admitted([said("bela", "refuse", 3), anna, bela], 1, at) == frozenset()  # by their times, not their order
    assert admitted([anna, said("bela", "refuse", 3), said("bela", "approve", 4)], 2, at) == yes
    assert admitted([said("anna", "approve", 1, until=100)], 1, at) == frozenset()
    assert admitted([said("anna", "approve", 1, until=101)], 1, at) == yes


def test_a_decision_that_was_changed_or_is_anothers_stops_the_site(file: Path) -> None:
    site = load_site(file)
    decide(site, EXAMPLE, "anna", PASSPHRASE.encode(), "approve", now=now())
    path = file.parent / "state/approvals.signed"
    whole = path.read_bytes()
    for broken in (
        whole[:-10] + b"\n",
        whole.replace(b'"sig":"A', b'"sig":"B'),
        whole + b"{}\n",
        whole[:40] + b"A" + whole[41:],
    ):
        if broken != whole:
            path.write_bytes(broken)
            with pytest.raises(StateError, match="is not a signed decision"):
                approved(site)
    path.write_bytes(whole)
    path.chmod(0o622)
    with pytest.raises(StateError, match="other users"):
        approved(site)
    path.chmod(0o600)
    # A key signs in its own name alone, for its own site alone, and only while the site file names it.
    key = site.approvers["anna"]
    assert approved(site.model_copy(update={"approvers": {"anna": site.approvers["bela"]}})) == frozenset()
    assert approved(site.model_copy(update={"approvers": {"bela": key}})) == frozenset()
    assert approved(site.model_copy(update={"name": "lyon"})) == frozenset()
    assert approved(site) == {EXAMPLE.digest}


def test_the_last_word_of_an_approver_counts_whatever_clocks_said(file: Path) -> None:
    site, secret, at = load_site(file), PASSPHRASE.encode(), now()
    decide(site, EXAMPLE, "anna", secret, "approve", now=at + timedelta(days=3650))
    decide(site, EXAMPLE, "anna", secret, "refuse", reason="not now", now=at)
    assert approved(site) == frozenset()
    # Nor does the order of the lines count, which whoever can write the file may change.
    path = file.parent / "state/approvals.signed"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + first)
    assert approved(site) == frozenset()
    path.unlink()
    for decision in ("approve", "refuse"):
        decide(site, EXAMPLE, "bela", secret, decision, reason="in one second", now=at)
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    assert approved(site) == frozenset()


def test_a_key_without_an_approver_is_not_overwritten_and_the_hint_says_how_to_go_on(file: Path, world: World) -> None:
    make_approver(load_site(file), "carl", PASSPHRASE.encode())  # and the command is killed
    with pytest.raises(StateError, match="names no approver carl") as caught:
        run(commands.approver, file, "carl", "--passphrase-file", world.folder / "passphrase")
    left = file.parent / "state/approvers/carl.pem"
    assert f"remove {left}" in caught.value.hint
    left.unlink()


def test_a_key_is_encrypted_and_opens_with_its_passphrase_alone(file: Path) -> None:
    key = file.parent / "state/approvers/anna.pem"
    line, pem = key.read_bytes().split(b"\n", 1)
    assert line.startswith(b"scrypt-65536-8-1 ")  # no guess is cheap for a process that reads the file
    assert b"ENCRYPTED" in pem
    with pytest.raises(ValueError, match=r"password|deserialize"):  # one time in 256, what a wrong key gives has a form
        load_pem_private_key(pem, PASSPHRASE.encode())
    assert key.stat().st_mode & 0o777 == 0o600
    for passphrase in (b"", b"correct horse", b"x" * 500):
        with pytest.raises(StateError, match="does not open the key of approver anna"):
            decide(load_site(file), EXAMPLE, "anna", passphrase, "approve", now=now())
    with pytest.raises(StateError, match="no approver"):
        decide(load_site(file), EXAMPLE, "../anna", PASSPHRASE.encode(), "approve", now=now())
    with pytest.raises(StateError, match="approver anna already"):
        run(commands.approver, file, "anna", "--passphrase-file", file)
    assert decisions(load_site(file)) == ()


def test_two_people_where_the_policy_asks_for_two(file: Path) -> None:
    policy = file.parent / "policy.toml"
    policy.write_text(policy.read_text().replace('approval = "person"', 'persons = 2\napproval = "person"'))
    visitor = visit(file)
    assert "Signatures needed: 2" in visitor.get(path_of()).text
    assert visitor.post(f"{path_of()}/decide", form()).status_code == 303
    assert visitor.post(f"{path_of()}/decide", form()).status_code == 303  # the same person again
    with pytest.raises(PolicyError):
        check_policy(load_site(file), EXAMPLE, dict)
    assert visitor.post(f"{path_of()}/decide", form(by="bela")).status_code == 303
    check_policy(load_site(file), EXAMPLE, dict)
    without = load_site(file).model_copy(update={"approvers": {}})
    assert approved(without, 2) == frozenset()


# Pages


def test_the_inbox_says_what_waits_and_why_something_is_refused(file: Path) -> None:
    page = visit(file).get("/").text
    assert [page.index(each) for each in ("waits for your decision", "refused", "ended")] == sorted(
        page.index(each) for each in ("waits for your decision", "refused", "ended")
    )
    assert "privacy.max_epsilon" in page
    assert "not in the round log yet" in page


def test_a_study_is_shown_with_cost_verdict_and_what_is_new(file: Path) -> None:
    decide(load_site(file), changed(EXAMPLE, epsilon=1.0), "anna", PASSPHRASE.encode(), "approve", now=now())
    visitor = visit(file)
    page = visitor.get(path_of()).text
    assert "from the columns specialty (label), note (text)" in page
    assert "would be left for all later studies" in page
    assert "rules are kept" in page
    assert re.search(r"privacy.epsilon</th>.*?1.0.*?8.0", page, re.DOTALL)  # against the last approved study
    greedy = changed(EXAMPLE, epsilon=20.0).digest
    page = visitor.get(path_of(greedy)).text
    assert "This site refuses the study now" in page
    assert "E_EPSILON" in page
    assert 'value="approve"' not in page
    assert 'value="refuse"' in page
    assert visitor.get("/study/sha256:1").status_code == visitor.get(f"/study/{'0' * 64}").status_code == 409


def test_without_the_coordinator_or_a_study_the_page_says_so(file: Path) -> None:
    def silent() -> Said:
        raise ProtocolError("it does not answer", "")

    view = SiteView(file, silent, lambda: (Check("data", False, HOSTILE, "mend it"),))
    visitor = Visitor(Console(view.view(), {HOST}))
    page = visitor.get("/").text
    assert 'The coordinator does not answer now. <span lang="en">it does not answer' in page
    assert "No study is proposed" in page
    assert "<img" not in visitor.get("/checks").text


def test_approving_checks_what_the_command_checks_and_signs(file: Path) -> None:
    visitor, decide_at = visit(file), f"{path_of()}/decide"
    for wrong, said in (
        (form("approve", "anna", "guess"), "does not open"),
        (form(by="carl"), "no approver"),
        (form("refuse"), "needs a reason"),
        (form(until="2001-01-01"), "end before it begins"),
        (form(until="soon"), "expected a date"),
    ):
        answer = visitor.post(decide_at, wrong)
        assert answer.status_code == 409
        assert said in answer.text
        assert PASSPHRASE not in answer.text
    assert "too many passphrases" in visitor.post(decide_at, form()).text
    assert decisions(load_site(file)) == ()
    visitor = visit(file)
    greedy = path_of(changed(EXAMPLE, epsilon=20.0).digest)
    assert "the policy refuses it: E_EPSILON" in visitor.post(f"{greedy}/decide", form()).text
    assert decisions(load_site(file)) == ()
    tomorrow = (now() + timedelta(days=1)).date().isoformat()
    assert visitor.post(decide_at, form(reason=HOSTILE, until=tomorrow)).status_code == 303
    (made,) = decisions(load_site(file))
    assert (made.by, made.decision, made.study, made.reason) == ("anna", "approve", EXAMPLE.digest, HOSTILE)
    page = visitor.get(path_of()).text
    assert "this site takes part" in page
    assert "<img" not in page
    assert visit(file, Role.VIEWER).post(decide_at, form("refuse", reason="no")).status_code == 403
    assert len(decisions(load_site(file))) == 1


def test_a_site_without_approvers_signs_nothing_in_the_console(file: Path) -> None:
    text = file.read_text()
    bare = text[: text.index("[approvers]")]
    try:
        file.write_text(bare)
        visitor = visit(file)
        assert f"privet site approve {file} triage" in visitor.get(path_of()).text
        assert "no approver" in visitor.post(f"{path_of()}/decide", form()).text
        assert approved(load_site(file)) == frozenset()
    finally:
        file.write_text(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site that took part in rounds of a deployed study, with its copy of the round log."""
    return finished_site(tmp_path_factory.mktemp("finished"))


def test_what_left_is_shown_with_its_proof_in_the_log(finished: Path) -> None:
    visitor = visit(finished, said=Said((), 0, ()))
    page = visitor.get("/left").text
    rounds = re.findall(r"<tr><th scope=\"row\"", page)
    assert len(rounds) == 4
    proven = re.compile("✓ leaf [0-9]+, cosigned by this site")
    assert len(proven.findall(page)) == 4
    assert "4</b><span>rounds that left" in page
    budget = visitor.get("/budget").text
    assert "<polyline" in budget
    assert "limit for the dataset" in budget
    # A copy that lags behind is completed by the leaves that the coordinator sends. What was changed proves nothing.
    copy = finished.parent / "state/log" / COPY
    leaves, data = tuple(kept_leaves(copy)), copy.read_bytes()
    try:
        _keep(copy, leaves[:9], 0)
        assert proven.findall(visit(finished, said=Said()).get("/left").text) == []
        assert len(proven.findall(visit(finished, said=Said((), 9, leaves[9:])).get("/left").text)) == 4
        assert len(proven.findall(visit(finished, said=Said((), 5, leaves[5:])).get("/left").text)) == 4
        forged = (*leaves[9:-1], leaves[9])
        assert proven.findall(visit(finished, said=Said((), 9, forged)).get("/left").text) == []
        assert proven.findall(visit(finished, said=Said((), 9, (b"{}", b""))).get("/left").text) == []
        copy.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        assert proven.findall(visit(finished, said=Said()).get("/left").text) == []
    finally:
        copy.write_bytes(data)


def test_nothing_of_a_record_is_shown(finished: Path) -> None:
    visitor = visit(finished, said=Said((), 0, ()))
    text = (finished.parent / "data/train.csv").read_text().splitlines()[1]
    words = set(re.findall("[A-Za-z]{6,}", text))
    for path in ("/", "/left", "/budget", "/privacy", "/checks"):
        page = visitor.get(path).text
        assert page
        assert not {word for word in words if word in page} - {"specialty"}


# In a browser, with a console of its own process


@pytest.mark.slow
def test_an_approver_reads_signs_by_keyboard_and_sees_what_changes(file: Path, tmp_path: Path, world: World) -> None:
    with served("client.commands.console:site", file) as (_, link), browsing() as browser:
        home = link.split("/enter/")[0]
        browser.open(link)
        browser.until("document.querySelector('a.card')")
        assert "waits for your decision" in browser.text()
        for page in ("/", "/left", "/budget", "/privacy", "/checks", path_of()):
            look_at(browser, home + page)
        # A text of the study's people cannot be chosen freely; that of another approver can.
        decide(load_site(file), EXAMPLE, "bela", PASSPHRASE.encode(), "refuse", reason=HOSTILE, now=now())
        browser.until("document.body.innerText.includes('onerror=alert')")  # told by an event, without a reload
        decide(load_site(file), EXAMPLE, "bela", PASSPHRASE.encode(), "approve", now=now() + timedelta(seconds=1))
        browser.open(home + path_of())
        browser.run("document.querySelector('#by-approve').focus()")
        browser.press("Tab", 9)
        browser.call("Input.insertText", text=PASSPHRASE)
        browser.leave()
        browser.press("Enter", 13)
        browser.arrived()
        browser.until("document.body.innerText.includes('this site takes part')")
        assert {each.by for each in decisions(load_site(file))} == {"anna", "bela"}
        browser.open(link)
        assert "This link does not work" in browser.text()
        look_at(browser, home + "/nothing")
        assert browser.objections == [each for each in browser.objections if "404" in each or "403" in each]
        strangers = [each for each in browser.asked if not each.startswith((home, "data:image/svg"))]
        assert set(strangers) <= {"about:blank"}
        # Idle, it is small; and a frame of another page stays empty.
        browser.open(home + "/")
        assert browser.run("document.cookie") == ""


@pytest.mark.slow
def test_a_console_that_is_killed_while_it_signs_leaves_whole_decisions(file: Path) -> None:
    code = (
        "import sys; from privet.client.site import load_site; from privet.client.policy.decisions import decide; "
        "from privet.common.clock import now; from pathlib import Path; "
        "from privet.common.study.study import load_study; site = load_site(Path(sys.argv[1])); "
        "study = load_study(Path('simulations/studies/deploy.toml')); print('ready', flush=True)\n"
        "while True:\n decide(site, study, 'anna', sys.argv[2].encode(), 'approve', now=now())\n"
        " print('signed', flush=True)"
    )
    for wait in (0.05, 0.13, 0.29):
        before = len(decisions(load_site(file)))
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file), PASSPHRASE], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        told = process.communicate()[0].count("signed")
        assert len(decisions(load_site(file))) - before in (told, told + 1)  # each is whole; what was told is kept


@pytest.mark.slow
def test_a_site_refuses_and_two_people_approve_in_a_browser(file: Path) -> None:
    policy = file.parent / "policy.toml"
    policy.write_text(policy.read_text().replace('approval = "person"', 'persons = 2\napproval = "person"'))
    with opened_here(SiteView(file, Consulting(file), lambda: ()).view()) as link, browsing() as browser:
        home = link.split("/enter/")[0]
        browser.open(link)
        browser.until("document.querySelector('a.card')")

        def sign(decision: str, by: str, says: str) -> None:
            browser.open(home + path_of())
            browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            browser.run(f"document.querySelector('#by-{decision}').value = '{by}'")
            browser.fill(f"#passphrase-{decision}", PASSPHRASE)
            if decision == "refuse":
                browser.fill("#reason", HOSTILE)
            browser.follow(f"form:has([value={decision}]) .actions button")
            assert says in browser.text()

        sign("approve", "anna", "Signatures needed: 2")
        with pytest.raises(PolicyError):
            check_policy(load_site(file), EXAMPLE, dict)
        sign("approve", "bela", "this site takes part")
        check_policy(load_site(file), EXAMPLE, dict)
        time.sleep(1)  # decisions are ordered by their second
        sign("refuse", "bela", "onerror=alert")
        assert approved(load_site(file), 2) == frozenset()
        look_at(browser, home + "/privacy")
        assert re.search(r"refused\s+bela\s+<img src=x onerror=alert", browser.text())
        assert browser.objections == []


@pytest.mark.slow
def test_a_console_that_is_killed_in_the_middle_of_an_approval_loses_and_half_signs_nothing(file: Path) -> None:
    lock = file.parent / "state/approvals.lock"
    lock.unlink(missing_ok=True)
    with served("client.commands.console:site", file) as (process, link):
        remote = Remote(link)
        sent = {"token": remote.token(), **form()}
        thread = threading.Thread(target=_ask_in_vain, args=(remote, f"{path_of()}/decide", sent))
        thread.start()
        ends = time.monotonic() + 30
        while not lock.exists() and time.monotonic() < ends:  # the key has signed, and the file is about to change
            time.sleep(0.0005)
        process.kill()
        thread.join(30)
    made = len(decisions(load_site(file)))  # every line is whole
    assert made in (0, 1)
    visitor = visit(file)
    assert ("this site takes part" in visitor.get(path_of()).text) == bool(made)
    assert visitor.post(f"{path_of()}/decide", form()).status_code == 303
    assert len(decisions(load_site(file))) == made + 1
    assert approved(load_site(file)) == {EXAMPLE.digest}


def _ask_in_vain(remote: Remote, path: str, sent: dict[str, str]) -> None:
    with suppress(OSError, HTTPException):
        remote.ask("POST", path, sent)
