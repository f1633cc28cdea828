"""A study as two people steer it in a browser: every party a process, and a site lost while a round runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from privet.server.consortium.coordinator import encrypt_root, open_coordinator
from privet.server.rounds.state import RunDirectory
from privet.simulations.deploy import Deployment, SitePlan, free_ports
from tests.support.browser import Browser, browsing, look_at
from tests.support.console import served
from tests.support.forks import Forks
from tests.system.test_deploy import SITES, start_of, study_of

PASSPHRASE = "correct horse battery"
ROUNDS, SECONDS = 6, 180


def enrol(made: Deployment, browser: Browser, home: str, name: str) -> None:
    """Invite a site and approve it, in the coordinator's console; the site's operator uses commands."""
    browser.open(home + "/")
    browser.fill("#site", name)
    browser.follow("form[action='/invite'] button", SECONDS)
    found = re.search(r"privet1\.\S+", browser.text())
    assert found is not None, browser.text()
    asked = made.privet("site", "join", found.group(), made.folder / name, "--wait", 0)
    words = next(line.removeprefix("words").strip() for line in asked.splitlines() if line.startswith("words"))
    browser.open(home + "/sites")
    form = f"form[action='/sites/{name}/approve']"
    browser.fill(f"{form} [name=words]", words)
    browser.fill(f"{form} [name=passphrase]", PASSPHRASE)
    browser.follow(f"{form} button", SECONDS)
    made.privet("site", "join", found.group(), made.folder / name)


def approve(made: Deployment, browser: Browser, link: str) -> None:
    """Approve the one proposed study in a site's console, as its approver."""
    browser.open(link)
    browser.until("document.querySelector('a.card')", SECONDS)
    assert "waits for your decision" in browser.text()
    browser.follow("a.card", SECONDS)
    browser.fill("#passphrase-approve", PASSPHRASE)
    browser.follow("form:has([value=approve]) .actions button", SECONDS)
    assert "this site takes part" in browser.text()


def says(browser: Browser, *texts: str) -> None:
    """Wait until the open page says this: it is told of changes by events, and nobody loads it again."""
    for text in texts:
        browser.until(f"document.body.innerText.includes({text!r})", SECONDS)


@pytest.mark.slow
def test_a_run_loses_a_site_goes_on_stops_is_continued_and_released_in_a_browser(
    bert: Path, tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))  # of the process that the console starts
    study = study_of(tmp_path, bert, "first", **{"training.rounds": ROUNDS})
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    made = Deployment(tmp_path / "consortium", starter=forks)
    made.folder.mkdir()
    try:
        made.found(free_ports(3))
        encrypt_root(open_coordinator(made.coordinator), PASSPHRASE.encode())
        with served("server.commands.console:coordinator", "-C", made.coordinator) as (_, link), browsing() as browser:
            home = link.split("/enter/")[0]
            browser.open(link)
            for name in SITES:
                enrol(made, browser, home, name)
            made.compare(SITES)
            for name in SITES:
                made.equip(name, SitePlan(study.parent / f"{name}.jsonl", 60), study)
            alpha = made.site("alpha")
            made.privet("site", "approver", alpha, "anna", "--passphrase-file", tmp_path / "passphrase")
            for name in SITES:
                made.start(name, "site", "serve", made.site(name))
            made.connected(3)
            run = made.coordinator / "runs" / "first"
            begun = ("--yes", "-C", made.coordinator, "--gather", 300, "--adapter", start_of(made, study))
            browser.open(home + "/")
            made.start("run", "coordinator", "run", study, "--name", "first", *begun)

            # Alpha counts signed approvals alone. The run waits for it, and the page says so.
            says(browser, "Waiting for 1: alpha", "since ")
            with served("client.commands.console:site", alpha) as (_, own):
                approve(made, browser, own)
                browser.open(home + "/run/first")
                says(browser, "round 1")
                # Gamma is lost while rounds run. The page names it, with the stage and since when.
                made.end("gamma", kill=True)
                says(browser, "Waiting for 1: gamma")
                assert re.search(r"round \d · .+ · since \d{4}-\d\d-\d\d \d\d:\d\d UTC \(\d+ s\)", browser.text())
                look_at(browser, home + "/run/first")
                look_at(browser, home + "/")
                lost = len(RunDirectory.open(run).load().statements)
                made.start("gamma", "site", "serve", made.site("gamma"))
                browser.open(home + "/run/first")
                browser.until(f"document.querySelector('.tile b').innerText.split(' / ')[0] > {lost}", SECONDS)

                # Its operator stops the run after a round, and continues it: another process plays it now.
                browser.follow("form[action$='/stop'] button", SECONDS)
                says(browser, "not running")
                assert made.programs["run"].wait(60) == 0
                stopped = len(RunDirectory.open(run).load().statements)
                assert lost < stopped < ROUNDS
                browser.follow("form[action$='/resume'] button", SECONDS)
                says(browser, "finished")
                assert (run / "release").is_dir()
                assert "ended after round" in (made.coordinator / "console/first.log").read_text()
                statements = RunDirectory.open(run).load().statements
                assert [each["round"] for each in statements] == [*range(1, ROUNDS + 1)]  # nothing was run twice
                aborted = [each for each in statements if each["type"] == "round-abort"]
                assert len(aborted) <= 1  # that in which gamma was lost, if it had answered nothing
                assert f"{ROUNDS - len(aborted)} / {ROUNDS}\nrounds closed" in browser.text()

                # What left is on the site's own page, round by round, with its proof.
                browser.open(own.split("/enter/")[0] + "/left")
                proven = "document.body.innerText.match(/✓ leaf \\d+, cosigned by this site/g).length"
                browser.until(f"{proven} >= {ROUNDS - 1}", SECONDS)
                assert f"{ROUNDS}\nrounds that left" in browser.text() or aborted
            assert browser.objections == []
    finally:
        made.end_all()
