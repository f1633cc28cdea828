"""What the coordinator's console shows, read from the coordinator's directory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from shutil import disk_usage
from typing import Any

from privet.common.errors import PrivetError, ProtocolError
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.note import parse_note
from privet.common.pki.certificates import life_of
from privet.common.web.events import stamps
from privet.common.web.pages import moment, size
from privet.server.consortium.candidates import Candidate, candidates
from privet.server.consortium.coordinator import Coordinator
from privet.server.consortium.membership import Row
from privet.server.log.logfile import LogFile
from privet.server.log.roundlog import log_file
from privet.server.network.link import Link, RegisteredNode
from privet.server.network.service import LINK, link_of
from privet.server.overview import run_paths, run_status
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.watch import Wait, details

_log = logging.getLogger("privet.console")
_LATE = 6
"""A certificate with less than this fraction of its life left is shown as a fault: a site renews its own with a quarter
left at the latest."""
_AWAY_SECONDS = 86_400.0
"""A site that was not seen for so long is an alert. One that is away for less is listed alone."""
_FREE_SHARE, _FREE_BYTES = 20, 2 * 10**9
"""Free space below both the disk's size over the one and the other is an alert: updates of a round need it."""
_GATE_SECONDS = 60.0
_MOST_ROUNDS = 100


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


def _site(row: Row, nodes: Mapping[str, RegisteredNode], now: datetime) -> Site:
    name, days, late, node = row.keys.site, None, False, nodes.get(row.keys.site)
    if row.certificate is not None and row.state == "member":
        left = row.certificate.not_valid_after_utc - now
        days, late = left.days, left < life_of(row.certificate) / _LATE
    online = row.state == "member" and node is not None and node.online
    seen = None if node is None or node.until is None else min(node.until, now.timestamp())
    return Site(name, row.state, row.since, row.reason, online, days, late, seen)


@dataclass(frozen=True)
class Alert:
    """Something that an operator should look at now.

    Attributes:
        kind: `certificate`, `ended`, `away`, `never`, `quorum`, `cosigned` or `disk`.
        values: The places of its text.
    """

    kind: str
    values: Mapping[str, object]


def alerts(sites: Sequence[Site], head: Head | None, place: Path, now: datetime) -> list[Alert]:
    """Return what an operator should look at now.

    Args:
        sites: All sites.
        head: The head of the round log; None while it is empty.
        place: The coordinator's directory.
        now: The present time.
    """
    members, found = [each for each in sites if each.state == "member"], list[Alert]()
    online = sum(each.online for each in members)
    if head is not None and online < head.needed:
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
        status: As `run_status`; empty where the run cannot be read.
        error: Why it cannot be read; None if it can.
    """

    name: str
    status: Mapping[str, Any]
    error: PrivetError | None = None

    @property
    def state(self) -> str:
        """One of `failed`, `withdrawn`, `finished`, `waiting` at its gate, `running`, `stopped`."""
        if self.error is not None:
            return "failed"
        if self.status["withdrawn"] is not None:
            return "withdrawn"
        if self.status["ended"]:
            return "waiting" if self.status.get("gated") and not self.status["released"] else "finished"
        return "running" if self.status["waiting"] else "stopped"

    @property
    def wait(self) -> Wait | None:
        """What it waits for."""
        found = self.status.get("waiting")
        return None if found is None else Wait(**{**found, "answered": tuple(found["answered"])})

    @property
    def reasons(self) -> list[str]:
        """A sentence for each site that it waits for and that gave a reason."""
        return [] if self.wait is None else [line.strip() for line in details(self.wait)]


@dataclass
class Runs:
    """The runs of a coordinator. The state of a run is read again when its files have changed."""

    made: Coordinator
    _known: dict[Path, tuple[object, RunDirectory | None, Run]] = field(default_factory=dict)

    def all(self) -> list[Run]:
        """Return all runs: those that are played now first, then the newest."""
        found = [(path.stat().st_mtime, self._read(path)) for path in run_paths(self.made)]
        order = ("running", "stopped", "waiting", "failed", "finished", "withdrawn")
        return [run for _, run in sorted(found, key=lambda each: (order.index(each[1].state), -each[0]))]

    def named(self, name: str) -> Run | None:
        """Return a run; None if there is none of this name."""
        return next((self._read(path) for path in run_paths(self.made) if path.name == name), None)

    def _read(self, path: Path) -> Run:
        files = ("study.json", "state.safetensors", "waiting.json", "withdrawn.json", "release")
        seen = stamps(path / name for name in files)
        known, directory, run = self._known.get(path, (None, None, None))
        # Whether a process plays it can change without a file: one that was killed leaves its note.
        playing = directory is not None and directory.waiting is not None
        if run is None or known != (seen, playing):
            try:
                directory = RunDirectory.open(path)
                run = Run(path.name, run_status(path))
            except PrivetError as error:
                run = Run(path.name, {}, error)
            self._known[path] = (seen, bool(run.status.get("waiting"))), directory, run
        return run


def rounds(made: Coordinator, name: str) -> list[Mapping[str, Any]]:
    """Return the statements about the last 100 rounds of a run, newest first. Raises as `RunDirectory.load`."""
    statements = RunDirectory.open(made.directory / "runs" / name).load().statements
    return list(reversed(statements[-_MOST_ROUNDS:]))


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


def head(made: Coordinator) -> Head | None:
    """Return the head of the round log; None while it is empty."""
    log = LogFile(made.log_directory)
    data = log.checkpoint()
    try:
        policy = made.members.policy()
    except ProtocolError:  # more members than a policy of the log can have
        policy = None
    if not data or policy is None:
        return None
    note = parse_note(data)
    checkpoint, names = Checkpoint.parse(note.text), {key.name for key in policy.witnesses}
    signed = sorted({each.name for each in note.signatures} & names)
    return Head(checkpoint.size, checkpoint.root.hex(), log.size(), tuple(signed), policy.needed)


@dataclass
class People:
    """The sites of a coordinator, and which are connected. The members' file and the log are read when they change."""

    made: Coordinator
    _link: Link | None = None
    _known: tuple[object, tuple[Row, ...], Head | None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def nodes(self) -> Mapping[str, RegisteredNode]:
        """Return the members' nodes by the member's name; none while the service has not started yet."""
        with self._lock:
            # Never made here: the service makes it when it first starts, and two at once would disturb each other.
            if self._link is None and not (self.made.directory / LINK).exists():
                return {}
            if self._link is None:  # opening takes a tenth of a second, as it checks the tables
                try:
                    self._link = link_of(self.made.directory)
                except Exception as error:  # of the database's library, while the service is making the tables
                    _log.warning("connections are not known yet (%s)", type(error).__name__)
                    return {}
            keys = {row.keys.node.encode("ascii"): row.keys.site for row in self._rows() if row.state == "member"}
            owners = self._link.owners(keys)
            return {owners[node.id]: node for node in self._link.nodes() if node.id in owners}

    def connected(self) -> frozenset[str]:
        """Return the names of the members that are connected now."""
        return frozenset(name for name, node in self.nodes().items() if node.online)

    def sites(self, now: datetime) -> list[Site]:
        """Return all sites: those that ask first, then those that are away, then the others, each by name."""
        nodes = self.nodes()
        found = [_site(row, nodes, now) for row in self._rows()]
        order = {"pending": 0, "member": 1, "revoked": 3}
        return sorted(found, key=lambda each: (order[each.state] + each.online, each.name))

    def head(self) -> Head | None:
        """Return the head of the round log; None while it is empty."""
        self._rows()
        return None if self._known is None else self._known[2]

    def _rows(self) -> tuple[Row, ...]:
        files = [self.made.directory / "members.db", log_file(self.made.log_directory)]
        seen = stamps([*files, *(file.with_name(f"{file.name}-wal") for file in files)])
        if self._known is None or self._known[0] != seen:
            self._known = seen, self.made.members.rows(), head(self.made)
        return self._known[1]


def since(began: float) -> float:
    """Return the seconds since a time."""
    return max(time.time() - began, 0.0)
