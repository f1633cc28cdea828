"""The coordinator's service: the process that sites connect to.

One process serves the consortium (`server/consortium/service.py`) and Flower's fleet API
(`server/network/superlink.py`). It runs no study: a run is another process on the same directory
(`server/commands/service.py`), so that either can be stopped and started without the other. Once a second the service
does four things: it admits the members' nodes and removes all others, takes over rotated keys, writes decisions about
members to the round log if no run has it open, and renews its certificate when it is due. If one of these fails, it is
logged and tried again, less often each time. If a port is no longer served, or members cannot be read for minutes, the
process ends, so that it is started anew: a revoked site must not stay admitted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import Certificate
from prometheus_client import CollectorRegistry, Gauge

from privet.common.doors.files import check_limit, raise_limit
from privet.common.doors.metrics import MOST as METRICS
from privet.common.doors.metrics import MetricsServer
from privet.common.errors import PrivetError, StateError
from privet.common.files import write_durably
from privet.common.jsonlog import log_as_json, native_errors
from privet.common.pki.addresses import split_address
from privet.common.pki.certificates import issue, read_certificate, to_pem
from privet.common.refusals import Refusals
from privet.common.starting import settle
from privet.server.consortium.coordinator import Coordinator, Settings, log_members
from privet.server.consortium.registry import log_decisions, waits
from privet.server.consortium.service import (
    Clock,
    Consortium,
    files_needed,
    note_fault,
    note_native,
    serve_consortium,
    shares,
)
from privet.server.log.journal import open_journal
from privet.server.network.gate import Limits
from privet.server.network.link import Link
from privet.server.network.nodes import LINK
from privet.server.network.superlink import Endpoint, FleetServer

_CHAIN, _KEY = "flower/service.pem", "flower/service.key"
_DAYS = 7.0
_SECONDS = 1.0
# Seconds between attempts after one that failed, doubled each time; and how long the members may be out of reach.
_FIRST_WAIT, _LONGEST_WAIT, _BLIND = 1.0, 30.0, 300.0
_AGAIN = "see the application log, then start the service: `privet coordinator serve`"
_log = logging.getLogger("privet.coordinator")


@dataclass(frozen=True)
class Serving:
    """A running service.

    Attributes:
        made: The coordinator.
        link: The nodes, and the messages in transit.
        fleet: The server of the fleet API.
        consortium: The consortium service.
        clock: Returns the time.
        refusals: Logs refusals.
    """

    made: Coordinator
    link: Link
    fleet: FleetServer
    consortium: Consortium
    clock: Clock
    refusals: Refusals

    def tend(self) -> None:
        """Update nodes, round log and certificate from the members' file.

        Raises:
            StateError: A file cannot be read or written.
        """
        self.refusals.settle()
        admit_members(self.made, self.link)
        if self.made.follow_keys():
            _log.info("the keys of log and coordinator were rotated", extra={"event": "keys-rotated"})
        self._write_log()
        if self.made.outdated(_certificate(self.made), self.clock()):
            _certify(self.made, self.clock)
            self.fleet.renew_certificate()
            _log.info("key and certificate of the fleet API replaced", extra={"event": "certificate-renewed"})

    def check(self) -> None:
        """Check that all ports are served.

        Raises:
            StateError: One is not.
        """
        for name, alive in (
            ("the fleet API", self.fleet.alive),
            ("the consortium service", self.consortium.loop.alive),
        ):
            if not alive:
                raise StateError(f"{name} has stopped", _AGAIN)

    def _write_log(self) -> None:
        if not self.made.members.statements() and not waits(self.made):
            return
        try:
            with open_journal(self.made.log_directory, self.made.keys) as journal:
                log_members(self.made, journal)
                log_decisions(self.made, journal)
        except StateError:
            return  # a run has the log open, and writes the statements before its next round


@contextmanager
def serving(made: Coordinator, clock: Clock, refusals: Refusals | None = None) -> Iterator[Serving]:
    """Serve the network until the block ends.

    Raises:
        ProtocolError, StateError: An address cannot be listened on.
    """
    settings, refusals = made.settings, refusals or Refusals(_log)
    _certify(made, clock)
    link = Link(made.directory / LINK)
    admit_members(made, link)
    host, port = split_address(settings.fleet)
    endpoint = Endpoint(
        settings.bind or host,
        port,
        made.directory / _CHAIN,
        made.directory / _KEY,
        share=shares(settings).fleet,
    )
    bind = None
    if settings.bind:
        member, joining = (address.rpartition(":")[2] for address in (settings.address, settings.enrolment))
        bind = (f"{settings.bind}:{member}", f"{settings.bind}:{joining}")
    with (
        serve_consortium(made, clock, bind, refusals) as consortium,
        FleetServer(link, endpoint, refusals) as fleet,
    ):
        yield Serving(made, link, fleet, consortium, clock, refusals)


def check_files(settings: Settings, members: int, limit: int) -> None:
    """Check that the service may open the files that its connections with so many members can need.

    Args:
        settings: Say how many connections there may be.
        members: How many members there are.
        limit: Most files that this process may open; negative for no limit.

    Raises:
        StateError: It may not.
    """
    needed = files_needed(settings, members) + members * Limits().objects + METRICS
    check_limit(limit, needed, f"the connections of {members} members and of others")


def serve_until(
    made: Coordinator, clock: Clock, stop: threading.Event, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve the network until `stop` is set. Calls `ready` once all ports are open.

    Raises:
        StateError: The limit on open files is too low, a port is no longer served, or the members cannot be read.
        ProtocolError: As `serving`.
    """
    settle()
    limit = raise_limit()
    check_files(made.settings, len(made.members.members()), limit)
    refusals = Refusals(_log)
    with native_errors(partial(note_native, refusals)):
        log_as_json(partial(note_fault, refusals, "Flower"))
        with serving(made, clock, refusals) as service:
            ready()
            _tend_until(service, stop, limit)


def _tend_until(service: Serving, stop: threading.Event, limit: int) -> None:
    registry = CollectorRegistry()
    online = Gauge("privet_coordinator_nodes_online", "Nodes that are connected", registry=registry)
    members = Gauge("privet_coordinator_members", "Sites that are members", registry=registry)
    answers = Gauge(
        "privet_coordinator_fleet_answers", "Answers of the fleet API so far", ["status"], registry=registry
    )
    moved = Gauge("privet_coordinator_fleet_bytes", "Bytes of bodies so far", ["direction"], registry=registry)
    if service.made.settings.metrics_port:
        MetricsServer(service.made.settings.metrics_port, registry)

    counted = -1

    def work() -> None:
        nonlocal counted
        service.tend()
        count = len(service.made.members.members())
        if count != counted:  # new members may need more files than were needed at the start
            counted = count
            _warn_of_files(service.made.settings, count, limit)
        online.set(sum(node.online for node in service.link.nodes()))
        members.set(count)
        for status, number in dict(service.fleet.gate.answers).items():
            answers.labels(str(status)).set(number)
        for direction, size in service.fleet.gate.bytes.items():
            moved.labels(direction).set(size)

    tending = Tending(work)
    while not stop.wait(tending.wait):
        service.check()
        tending.attempt()


def _warn_of_files(settings: Settings, members: int, limit: int) -> None:
    try:
        check_files(settings, members, limit)
    except StateError as error:
        _log.error("%s; %s, then restart the service", error.message, error.hint, extra={"event": "files"})


class Tending:
    """Repeats the service's regular work, and goes on after an error.

    Attributes:
        wait: Seconds until the next attempt.
    """

    def __init__(self, work: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._work, self._clock = work, clock
        self._failing: float | None = None
        self.wait = _SECONDS

    def attempt(self) -> bool:
        """Do the work, and return whether it was done.

        Raises:
            StateError: It has failed for minutes.
        """
        try:
            self._work()
        except Exception as error:  # of any kind, since files or memory may run out anywhere: log it, and try again
            self._failed(error)
            return False
        self._failing, self.wait = None, _SECONDS
        return True

    def _failed(self, error: Exception) -> None:
        said = error.message if isinstance(error, PrivetError) else type(error).__name__
        self.wait = _FIRST_WAIT if self._failing is None else min(2 * self.wait, _LONGEST_WAIT)
        self._failing = self._clock() if self._failing is None else self._failing
        if self._clock() - self._failing > _BLIND:
            raise StateError(
                f"the service's regular work has failed for {_BLIND:.0f} s, so it may admit a revoked site: {said}",
                _AGAIN,
            ) from None
        extra = {"event": "work-failed", "reason": type(error).__name__}
        _log.error("regular work failed, next attempt in %.0f s: %s", self.wait, said, extra=extra)


def admit_members(made: Coordinator, link: Link) -> None:
    """Admit the members' nodes, and no others: a revoked site is refused at its next call."""
    wanted = {member.node.encode("ascii") for member in made.members.members()}
    for row in made.members.rows():
        node = row.keys.node.encode("ascii")
        if row.state == "revoked" and node not in wanted:
            link.unregister(node)
    for node in sorted(wanted):
        link.register(node)


def owners_of(made: Coordinator, link: Link) -> Mapping[int, str]:
    """Return which member each node belongs to."""
    return link.owners({member.node.encode("ascii"): member.site for member in made.members.members()})


def _certificate(made: Coordinator) -> Certificate:
    return read_certificate((made.directory / _CHAIN).read_bytes())


def _certify(made: Coordinator, clock: Clock) -> None:
    """Make a key and a certificate for the host name of the fleet API."""
    key = ec.generate_private_key(ec.SECP256R1())
    host = split_address(made.settings.fleet)[0]
    certificate = issue(made.authority, key.public_key(), host, "service", clock(), _DAYS)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_durably(made.directory / _KEY, private, 0o600)
    write_durably(made.directory / _CHAIN, to_pem(certificate).encode("ascii"))


def link_of(directory: Path) -> Link:
    """Open the link state in a coordinator's directory."""
    return Link(directory / LINK)
