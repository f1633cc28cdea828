"""What the coordinator's console shows, read from the coordinator's directory."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

from privet.common.errors import PrivetError
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.note import parse_note
from privet.common.web.events import stamps
from privet.common.web.pages import moment, size
from privet.server.consortium.coordinator import Coordinator
from privet.server.consortium.membership import Listed, next_quorum
from privet.server.log.logfile import LogFile
from privet.server.log.roundlog import log_file
from privet.server.network.nodes import LINK, RegisteredNode, flowers_key, listens, registered_in
from privet.server.rounds.folder import STATE, RunFolder, run_paths, spent
from privet.server.rounds.quality import quality
from privet.server.rounds.wait import Wait, details

if TYPE_CHECKING:
    from privet.server.consortium.candidates import Candidate

_log = logging.getLogger("privet.console")
_LATE = 6
"""A certificate with less than this fraction of its life left is shown as a fault: a site renews its own with a quarter
left at the latest."""
_AWAY_SECONDS = 86_400.0
"""A site that was not seen for so long is an alert. One that is away for less is listed alone."""
_FREE_SHARE, _FREE_BYTES = 20, 2 * 10**9
"""Free space below both the disk's size over the one and the other is an alert: updates of a round need it."""
_GATE_SECONDS = 60.0
_FEW, _SHORT = 3, 200
"""Sites that failed in a round which are named, and characters of a reason that are shown."""


@dataclass(frozen=True)
class Site:
    """A site, for a page.

    Attributes:
        name: Its name.
        state: `pending`, `member` or `revoked`.
        since: When it entered this state, in Unix seconds.
        reason: Why it was revoked.
        online: Whether it is connected now.
        days: Days until its certificate ends; None without one.
        late: Whether its certificate should have been renewed.
        seen: When it was connected last, in Unix seconds; None if it never was.
    """

    name: str
    state: str
    since: int
    reason: str
    online: bool
    days: int | None
    late: bool = False
    seen: float | None = None

    @property
    def attention(self) -> bool:
        """Whether somebody should look after it."""
        away = self.state == "member" and not self.online
        return self.state == "pending" or away or self.late


def _site(listed: Listed, node: RegisteredNode | None, serving: bool, now: datetime) -> Site:
    days, late = None, False
    if listed.certificate is not None and listed.state == "member":
        begins, ends = listed.certificate
        days, late = (ends - now).days, ends - now < (ends - begins) / _LATE
    online = serving and listed.state == "member" and node is not None and node.online
    seen = None if node is None or node.until is None else min(node.until, now.timestamp())
    return Site(listed.site, listed.state, listed.since, listed.reason, online, days, late, seen)


@dataclass(frozen=True)
class Alert:
    """Something that an operator should look at now.

    Attributes:
        kind: `service`, `certificate`, `ended`, `away`, `never`, `quorum`, `cosigned` or `disk`.
        values: The places of its text.
    """

    kind: str
    values: Mapping[str, object]


def alerts(sites: Sequence[Site], head: Head | None, place: Path, now: datetime, *, serving: bool) -> list[Alert]:
    """Return what an operator should look at now.

    Args:
        sites: All sites.
        head: The head of the round log; None while it is empty.
        place: The coordinator's directory.
        now: The present time.
        serving: Whether the coordinator's service runs.
    """
    members, found = [each for each in sites if each.state == "member"], list[Alert]()
    online = sum(each.online for each in members)
    if not serving and members:
        found.append(Alert("service", {}))
    elif head is not None and online < head.needed:
        found.append(Alert("quorum", {"online": online, "needed": head.needed}))
    if head is not None and len(head.witnesses) < head.needed:
        found.append(Alert("cosigned", {"count": len(head.witnesses), "needed": head.needed}))
    disk = disk_usage(place)
    if disk.free < min(disk.total / _FREE_SHARE, _FREE_BYTES):
        found.append(Alert("disk", {"free": size(disk.free), "total": size(disk.total)}))
    for each in members:
        if each.late and each.days is not None:
            found.append(Alert("ended" if each.days < 0 else "certificate", {"site": each.name, "days": each.days}))
        last = each.since if each.seen is None else each.seen
        if not each.online and now.timestamp() - last > _AWAY_SECONDS:
            found.append(Alert("never" if each.seen is None else "away", {"site": each.name, "time": moment(last)}))
    return found


@dataclass
class Gates:
    """The candidates of a coordinator at their gates. The log is replayed when it has changed, or a review came."""

    made: Coordinator
    _known: tuple[object, Mapping[str, Candidate]] | None = None

    def all(self, now: datetime) -> Mapping[str, Candidate]:
        """Return the candidates by run. Raises as `candidates`."""
        from privet.server.consortium.candidates import candidates  # the log's writer, which loads NumPy

        files = [log_file(self.made.log_directory), self.made.directory / "reviews"]
        seen = stamps([*files, files[0].with_name(f"{files[0].name}-wal")]), now.timestamp() // _GATE_SECONDS
        if self._known is None or self._known[0] != seen:
            self._known = seen, {each.run: each for each in candidates(self.made, now)}
        return self._known[1]


@dataclass(frozen=True)
class Run:
    """A run, for a page.

    Attributes:
        name: Its name.
        status: As `Course.status`; empty where the run cannot be read.
        folder: Its directory; None where the run cannot be read.
        error: Why it cannot be read; None if it can.
    """

    name: str
    status: Mapping[str, Any]
    folder: RunFolder | None = None
    error: PrivetError | None = None

    @property
    def state(self) -> str:
        """One of `failed`, `withdrawn`, `finished`, `waiting` at its gate, `running`, `stopped`."""
        if self.error is not None:
            return "failed"
        if self.status["withdrawn"] is not None:
            return "withdrawn"
        if self.status["waiting"]:  # also after its last round, until the release is written
            return "running"
        if not self.status["ended"]:
            return "stopped"
        if self.status["released"] or not self.status["closed"]:
            return "finished"
        return "waiting" if self.status["gated"] else "stopped"  # before its release

    @property
    def wait(self) -> Wait | None:
        """What it waits for."""
        return self.status.get("waiting")

    @property
    def reasons(self) -> list[str]:
        """A sentence for each site that it waits for and that gave a reason."""
        return [] if self.wait is None else [_cut(line.strip()) for line in details(self.wait)]


@dataclass
class Course:
    """A run as it was read last: its published rounds, each read once, and whether it has ended.

    Attributes:
        folder: Its directory.
        epsilon: What the site that spent most had spent after the newest round; None without privacy.
    """

    folder: RunFolder
    epsilon: float | None = None
    _kinds: dict[int, tuple[object, str]] = field(default_factory=dict)
    _state: tuple[object, bool] | None = None

    def status(self) -> dict[str, Any]:
        """Return the status of the run, as `privet.server.overview.run_status`, as far as pages show it.

        Raises:
            PrivetError: A file of the run cannot be read.
        """
        folder, seen = self.folder, stamps([self.folder.path / STATE])
        if self._state is None or self._state[0] != seen:
            self._state = seen, folder.standing(sealed=True)[1]
        self._read()
        kinds, wait = [kind for _, kind in self._kinds.values()], folder.waiting
        return {
            "rounds": folder.study.rounds,
            "closed": kinds.count("round-close"),
            "aborted": kinds.count("round-abort"),
            "ended": self._state[1],
            "withdrawn": folder.withdrawn,
            "waiting": wait,
            "stopping": folder.stopping,
            "epsilon": self.epsilon,
            "gated": folder.study.gate is not None,
            "released": (folder.path / "release").is_dir(),
        }

    def _read(self) -> None:
        published = self.folder.rounds()
        newest = next(iter(published), None)
        for number, seen in published.items():
            known = self._kinds.get(number)
            if known is None or known[0] != seen:
                statement = self.folder.statement(number)
                self._kinds[number] = seen, str(statement["type"])
                if number == newest:
                    self.epsilon = spent(statement)


@dataclass
class Runs:
    """The runs of a coordinator. What is read of a file is read again when the file has changed."""

    made: Coordinator
    _known: dict[Path, tuple[object, Course]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> list[Run]:
        """Return all runs: those that are played now first, then the newest."""
        found = [(path.stat().st_mtime, self._read(path)) for path in run_paths(self.made.directory)]
        order = ("running", "stopped", "waiting", "failed", "finished", "withdrawn")
        return [run for _, run in sorted(found, key=lambda each: (order.index(each[1].state), -each[0]))]

    def named(self, name: str) -> Run | None:
        """Return a run; None if there is none of this name."""
        return next((self._read(path) for path in run_paths(self.made.directory) if path.name == name), None)

    def _read(self, path: Path) -> Run:
        seen = stamps([path / "study.json"])
        try:
            with self._lock:  # two pages that read one run at a time would count its rounds twice
                known = self._known.get(path)
                if known is None or known[0] != seen:
                    known = self._known[path] = seen, Course(RunFolder.open(path))
                return Run(path.name, known[1].status(), known[1].folder)
        except PrivetError as error:
            return Run(path.name, {}, None, error)


@dataclass(frozen=True)
class Round:
    """A round of a run, for a page.

    Attributes:
        number: Its number.
        seconds: How long it took.
        sites: How many sites' updates are in its sum.
        aborted: Why it was aborted; empty if it was closed.
        failures: The first sites that failed, each with the reason.
        more: How many others failed.
        epsilon: What the site that spent most had spent after it; None without privacy.
        quality: What the sites measured together, as text.
    """

    number: int
    seconds: float
    sites: int
    aborted: str
    failures: Mapping[str, str]
    more: int
    epsilon: float | None
    quality: str


def round_of(folder: RunFolder, number: int) -> Round:
    """Return a round for a page. Raises as `RunFolder.statement`."""
    statement = folder.statement(number)
    failures: Mapping[str, str] = statement["failures"]
    return Round(
        number=number,
        seconds=statement["seconds"],
        sites=len(statement["survivors"]),
        aborted=_cut(statement["reason"]) if statement["type"] == "round-abort" else "",
        failures={site: _cut(failures[site]) for site in sorted(failures)[:_FEW]},
        more=max(len(failures) - _FEW, 0),
        epsilon=spent(statement),
        quality=quality(statement.get("metrics")),
    )


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}\u2026"


@dataclass(frozen=True)
class Head:
    """The head of the round log.

    Attributes:
        size: Leaves under the newest checkpoint.
        root: Its root hash, in hexadecimal.
        leaves: All leaves.
        witnesses: Names of the sites that cosigned it.
        needed: How many have to.
    """

    size: int
    root: str
    leaves: int
    witnesses: tuple[str, ...]
    needed: int


def head(made: Coordinator, members: Sequence[str]) -> Head | None:
    """Return the head of the round log; None while it is empty.

    Args:
        made: The coordinator.
        members: The names of the members, who are its witnesses.
    """
    log = LogFile(made.log_directory)
    data, signed = log.head()
    if not data or not members:
        return None
    checkpoint = Checkpoint.parse(parse_note(data).text)
    names = tuple(sorted(set(signed) & set(members)))
    needed = next_quorum(len(members), made.settings.colluding)
    return Head(checkpoint.size, checkpoint.root.hex(), log.size(), names, needed)


@dataclass
class People:
    """The sites of a coordinator, and which are connected. The members' file and the log are read when they change."""

    made: Coordinator
    _listed: tuple[object, tuple[Listed, ...], Mapping[bytes, str]] | None = None
    _head: tuple[object, Head | None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def serving(self) -> bool:
        """Whether the coordinator's service runs, as far as this machine can tell. Without it, nobody is connected."""
        return listens(self.made.settings)

    def nodes(self) -> Mapping[str, RegisteredNode]:
        """Return the members' nodes by the member's name; none while the service has not started yet."""
        database = self.made.directory / LINK
        if not database.exists():
            return {}
        owners = self._members()[1]
        try:
            return {owners[node.public_key]: node for node in registered_in(database) if node.public_key in owners}
        except sqlite3.Error as error:  # the service is making the tables
            _log.warning("connections are not known yet (%s)", type(error).__name__)
            return {}

    def connected(self) -> frozenset[str]:
        """Return the names of the members that are connected now."""
        return frozenset(name for name, node in self.nodes().items() if node.online) if self.serving else frozenset()

    def sites(self, now: datetime, *, serving: bool) -> list[Site]:
        """Return all sites: those that ask first, then those that are away, then the others, each by name."""
        nodes = self.nodes()
        found = [_site(each, nodes.get(each.site), serving, now) for each in self._members()[0]]
        order = {"pending": 0, "member": 1, "revoked": 3}
        return sorted(found, key=lambda each: (order[each.state] + each.online, each.name))

    def head(self) -> Head | None:
        """Return the head of the round log; None while it is empty."""
        names = [each.site for each in self._members()[0] if each.state == "member"]
        seen = self._seen(log_file(self.made.log_directory)), names
        if self._head is None or self._head[0] != seen:
            self._head = seen, head(self.made, names)
        return self._head[1]

    def _members(self) -> tuple[tuple[Listed, ...], Mapping[bytes, str]]:
        """Return the sites, and the names of the members by their nodes' keys."""
        with self._lock:
            seen = self._seen(self.made.members.path)
            if self._listed is None or self._listed[0] != seen:
                listed = self.made.members.listed()
                owners = {
                    flowers_key(each.node.encode("ascii")): each.site for each in listed if each.state == "member"
                }
                self._listed = seen, listed, owners
            return self._listed[1:]

    @staticmethod
    def _seen(file: Path) -> object:
        return stamps([file, file.with_name(f"{file.name}-wal")])


def since(began: float) -> float:
    """Return the seconds since a time."""
    return max(time.time() - began, 0.0)
