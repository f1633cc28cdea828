"""A consortium for tests: real keys, real certificates and real gRPC servers on loopback, with a clock to turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer
from click.testing import Result
from typer.testing import CliRunner

from privet.client.network.consortium import ConsortiumClient, request_membership
from privet.client.network.enrolment import Enrolment, accept_membership, confirm, keep_terms, prepare_request
from privet.common.errors import PrivetError
from privet.common.log.envelope import sign_envelope
from privet.common.log.note import Signature, witness_lines
from privet.common.log.statements import StatedFloor, Statement
from privet.common.pki.keyfile import MLDSA_KEY, read_key, read_mldsa_key
from privet.common.pki.token import Token
from privet.common.refusals import Refusals
from privet.server.consortium.coordinator import Coordinator, Settings, create, log_members, open_coordinator
from privet.server.consortium.service import serve_consortium
from privet.server.log.journal import open_journal


@dataclass
class Clock:
    """The time of both ends; it goes on, and may be moved."""

    ahead: timedelta = field(default=timedelta())

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@dataclass(frozen=True)
class World:
    """A running consortium."""

    folder: Path
    coordinator: Coordinator
    clock: Clock
    refusals: Refusals

    def invite(self, site: str) -> Token:
        return self.coordinator.invite(site, self.clock())

    def enrol(self, site: str) -> ConsortiumClient:
        """Take a site through all of it, and return its access to the service."""
        token, directory = self.invite(site), self.folder / site
        asked = prepare_request(directory, token)
        request_membership(token, asked)
        self.coordinator.approve(site, asked.keys.fingerprint, self.clock())
        accept_membership(directory, request_membership(token, asked), self.clock())
        return self.service(site)

    def found(self, *sites: str) -> None:
        """Enrol these sites, and found the consortium with them."""
        for site in sites:
            self.enrol(site)
        self.coordinator.members.found(StatedFloor(), datetime.now(UTC))
        self.log_members()

    def log_members(self) -> None:
        """Write into the round log what was decided about members since the last time."""
        with open_journal(self.coordinator.log_directory, self.coordinator.keys) as journal:
            log_members(self.coordinator, journal)

    def compare(self, *sites: str) -> None:
        """Let these sites confirm the charter and each other, by the words that each side has of its own keys."""
        own = {site: Enrolment(self.folder / site).asked.keys.words for site in sites}
        for site in sites:
            keep_terms(self.folder / site, self.service(site).roster())
            confirm(self.folder / site, None, self.coordinator.charter.words)
            for other, words in own.items():
                confirm(self.folder / site, other, words)

    def service(self, site: str) -> ConsortiumClient:
        return ConsortiumClient(Enrolment(self.folder / site), self.clock)


def make_coordinator(folder: Path, ports: tuple[int, int] = (9443, 9444), colluding: int = 0) -> Coordinator:
    settings = Settings(
        name="north",
        origin="example.org/north",
        address=f"127.0.0.1:{ports[0]}",
        enrolment=f"127.0.0.1:{ports[1]}",
        fleet="127.0.0.1:9445",
        colluding=colluding,
    )
    create(folder, settings, None, datetime.now(UTC))
    return open_coordinator(folder)


@contextmanager
def running(folder: Path) -> Iterator[World]:
    """Run a consortium on free ports of this machine."""
    clock, refusals = Clock(), Refusals(logging.getLogger("privet.consortium"))
    made = make_coordinator(folder / "coordinator")
    with serve_consortium(made, clock, ("127.0.0.1:0", "127.0.0.1:0"), refusals) as serving:
        settings = made.settings.model_copy(
            update={"address": f"127.0.0.1:{serving.members}", "enrolment": f"127.0.0.1:{serving.joining}"}
        )
        consortium = replace(made.members.consortium, address=settings.address, enrolment=settings.enrolment)
        made.members.consortium = consortium
        yield World(folder, replace(made, settings=settings), clock, refusals)


def run(command: object, *arguments: object, answers: str = "") -> Result:
    """Run one command as its own program, and type answers; errors that `main` would print are raised."""
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, [str(each) for each in arguments], input=answers)
    if isinstance(result.exception, PrivetError):
        raise result.exception
    return result


def leaf_of_site(directory: Path, statement: Statement) -> bytes:
    """Return a leaf that a site signs, with the keys in its directory."""
    keys = directory / "keys"
    return sign_envelope(
        statement, read_key(keys / "identity.pem", "identity"), read_mldsa_key(keys / MLDSA_KEY, "mldsa")
    )


def lines_of_site(directory: Path, name: str, text: str, time: int = 1) -> tuple[Signature, ...]:
    """Return a site's lines on a checkpoint, whatever its witness would say."""
    keys = directory / "keys"
    return witness_lines(
        text, name, read_key(keys / "witness.pem", "witness"), time, read_mldsa_key(keys / MLDSA_KEY, "mldsa")
    )
