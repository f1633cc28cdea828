"""The coordinator's view: its pages, and the actions of an operator. Membership needs the root key's passphrase."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from privet.common.clock import now
from privet.common.errors import PrivetError, StateError
from privet.common.study.sections import NAME_PATTERN
from privet.common.web.app import Asked, Shown, View
from privet.common.web.events import stamps
from privet.common.web.paging import piece
from privet.common.web.sessions import Bucket
from privet.server.console import reading
from privet.server.console.reading import Gates, People, Round, Run, Runs, alerts
from privet.server.consortium.coordinator import Coordinator, log_due, open_coordinator
from privet.server.network.nodes import CLOCK_SECONDS
from privet.server.rounds.folder import RunFolder, run_paths

_TRIES, _TRY_RATE = 5, 1 / 60
_FEW = 12
"""Sites that the first page lists."""
_SITES, _ROUNDS = 100, 50
"""Rows of a page."""
_TEMPLATES = Path(__file__).with_name("templates")


class CoordinatorView:
    """What the console of a coordinator shows.

    Args:
        directory: The coordinator's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = open_coordinator(directory)
        self._runs, self._people, self._gates = Runs(self._made), People(self._made), Gates(self._made)
        self._tries = Bucket(_TRIES, _TRY_RATE, time.monotonic)
        self._starting = threading.Lock()
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        # A second for a thousand sites and thousands of rounds, before anybody waits for a page.
        self._people.connected()
        self._runs.all()

    def view(self) -> View:
        """Return its routes."""
        return View(
            _TEMPLATES,
            {"/": self._first, "/sites": self._sites, "/run/{run}": self._run},
            {
                "/invite": self._invite,
                "/sites/{site}/approve": self._approve,
                "/run/{run}/stop": self._stop,
                "/run/{run}/resume": self._resume,
            },
            self._look,
        )

    def _look(self) -> object:
        made = self._made
        files = [made.directory / "members.db", made.directory / "members.db-wal"]
        for path in run_paths(made.directory):
            files += [path, path / "rounds", path / "state.safetensors", path / "waiting.json", path / "stop"]
        return stamps(files), self._people.connected()

    def _common(self, active: str) -> dict[str, Any]:
        settings = self._made.settings
        return {"consortium": settings.name, "active": active, "place": str(self._directory), "since": reading.since}

    # Pages

    def _first(self, asked: Asked) -> Shown:
        return self._overview(asked)

    def _overview(self, asked: Asked, wrong: str = "", token: tuple[str, str] | None = None) -> Shown:
        made = self._made
        time, head, serving = now(), self._people.head(), self._people.serving
        found = self._people.sites(time, serving=serving)
        values = {
            "alerts": alerts(found, head, made.directory, time, serving=serving),
            "runs": self._runs.all(),
            "sites": [each for each in found if each.attention][:_FEW],
            "members": sum(each.state == "member" for each in found),
            "online": sum(each.online for each in found),
            "asking": sum(each.state == "pending" for each in found),
            "founded": made.members.founded(),
            "head": head,
            "waiting": len(made.members.statements()),
            "guarded": made.guarded,
            "wrong": wrong,
            "invited": token,
            "words": made.charter.words,
        }
        return Shown("overview.html", {**self._common("overview"), **values}, 409 if wrong else 200)

    def _sites(self, asked: Asked) -> Shown:
        found = self._people.sites(now(), serving=self._people.serving)
        values = {
            "listed": piece(found, asked.query, _SITES, lambda each: each.name),
            "guarded": self._made.guarded,
            "clock": CLOCK_SECONDS,
        }
        return Shown("sites.html", {**self._common("sites"), **values})

    def _run(self, asked: Asked) -> Shown:
        run = self._found(asked)
        numbers = [] if run.folder is None else list(run.folder.rounds())
        listed = piece(numbers, asked.query, _ROUNDS)
        rounds: list[Round] = [] if run.folder is None else [reading.round_of(run.folder, each) for each in listed.rows]
        longest = max((each.seconds for each in rounds), default=0.0)
        values = {
            "run": run,
            "study": None if run.folder is None else run.folder.study,
            "rounds": rounds,
            "listed": listed,
            "widths": {each.number: f"{100 * each.seconds / longest:.1f}" for each in rounds if longest},
            "gate": self._gates.all(now()).get(run.name) if run.status.get("gated") else None,
        }
        return Shown("run.html", {**self._common("overview"), **values})

    def _found(self, asked: Asked) -> Run:
        found = self._runs.named(asked.path["run"])
        if found is None:
            raise StateError("this coordinator has no such run", "`privet coordinator status` lists all runs")
        return found

    # Actions

    def _invite(self, asked: Asked) -> Shown:
        site = asked.form.get("site", "").strip()
        try:
            if not re.fullmatch(NAME_PATTERN, site):
                raise StateError("the site's name: expected 1 to 63 lower-case letters, digits and dashes", "")
            token = self._made.invite(site, now()).text
        except PrivetError as error:
            return self._overview(asked, error.message)
        # Shown once, and kept nowhere: not by this process, nor by the browser, which stores no page.
        return self._overview(asked, token=(site, token))

    def _approve(self, asked: Asked) -> Shown:
        try:
            made = self._unlocked(asked.form.get("passphrase", ""))
            made.approve(asked.path["site"], asked.form.get("words", ""), now())
        except PrivetError as error:
            return self._overview(asked, error.message)
        log_due(made)  # while a run has the log open, the statement waits for it, as it does on the command line
        return Shown(to="/sites")

    def _unlocked(self, passphrase: str) -> Coordinator:
        """Return the coordinator with its root's key. A session alone never has it."""
        if not self._made.guarded:
            raise StateError(
                "the root's key has no passphrase, so only the command line approves sites",
                "give it one with `privet coordinator rotate --passphrase`",
            )
        if not self._tries.take():
            raise StateError("too many passphrases were tried", "wait a minute")
        made = open_coordinator(self._directory, passphrase.strip().encode() or b"\0")
        _ = made.authority  # reads the key
        self._tries.give_back()
        return made

    def _stop(self, asked: Asked) -> Shown:
        run = self._found(asked)
        RunFolder.open(self._made.directory / "runs" / run.name).ask_to_stop()
        return Shown(to=f"/run/{run.name}")

    def _resume(self, asked: Asked) -> Shown:
        run = self._found(asked)
        if run.state != "stopped":
            raise StateError(f"run {run.name} cannot be continued: it is {run.state}", "look at its page")
        with self._starting:  # it is stopped until the process has begun: who asks again starts no second one
            before = self._started.get(run.name)
            if before is not None and before.poll() is None:
                raise StateError(f"run {run.name} is being continued already", "look at its page")
            self._started[run.name] = resume(self._directory, run.name)
        return Shown(to=f"/run/{run.name}")


def resume(directory: Path, run: str) -> subprocess.Popen[bytes]:
    """Start `privet coordinator resume` for a run, and return its process, which a console's end does not end.

    What it prints is added to `console/RUN.log` in the coordinator's directory.
    """
    folder = directory / "console"
    folder.mkdir(mode=0o700, exist_ok=True)
    # -P: it imports nothing from the present directory.
    command = [sys.executable, "-P", "-m", "privet", "coordinator", "resume", run, "-C", str(directory.resolve())]
    descriptor = os.open(folder / f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
