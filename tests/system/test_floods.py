"""Floods: each port is filled beyond its limit, in five ways, while a member is served within two seconds.

The coordinator is a process of its own that may open 1,024 files.
"""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from privet.client.network.consortium import request_membership
from privet.client.network.enrolment import prepare_request
from privet.client.network.fleet import FleetLink
from privet.common.doors.files import raise_limit
from privet.common.doors.metrics import MOST as METRICS
from privet.common.pki.certificates import to_pem
from privet.common.pki.enrolment import ENROLMENT, SERVICE, JoinRequest
from privet.common.pki.keyfile import read_node_key
from privet.common.pki.token import Token
from privet.common.refusals import Refusals
from privet.server.consortium.coordinator import Settings, create, open_coordinator
from privet.server.network.link import PULL, PUSH_OBJECT
from privet.simulations.deploy import free_ports
from tests.server.test_gate import signed
from tests.server.test_refusals import head
from tests.support.consortium_world import Clock, World
from tests.support.fleet_world import LARGEST, until

PORTS = ("fleet", "members", "joining", "metrics")
KINDS = ("silence", "partial-tls", "idle", "partial-headers", "slow-body")
LIMITS = {"fleet": 128, "members": 64, "joining": 64, "metrics": METRICS}
MORE, WITHIN, FILES = 100, 2.0, 1024
SITES = ("berlin", "genf", "lyon", "oslo", "riga")
SERVE = """
import resource, sys, threading
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
from privet.common.clock import now
from privet.server.consortium.coordinator import open_coordinator
from privet.server.network.service import serve_until
serve_until(open_coordinator(Path(sys.argv[1])), now, threading.Event())
"""


@dataclass
class Flooded:
    """A coordinator's process, its members, and the connections that are held open."""

    world: World
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    token: Token
    asked: JoinRequest
    log: Path
    usual: int = 0

    def files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def memory(self) -> int:
        """Return the process's resident memory, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) // 1024

    def node(self, site: str) -> EllipticCurvePrivateKey:
        return read_node_key(self.world.folder / site / "keys/node")

    def root(self) -> bytes:
        return to_pem(self.world.coordinator.authority.certificate).encode()

    def tls(self, port: str, site: str = "") -> ssl.SSLContext:
        """Return a caller's context, with a member's certificate if a site is named."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if port != "fleet":
            context.set_alpn_protocols(["h2"])
        if site:
            own = self.world.service(site).enrolment
            pair = self.world.folder / f"{site}.pem"
            pair.write_bytes(to_pem(own.certificate).encode() + own.tls)
            context.load_cert_chain(pair)
        return context

    def hold(self, stack: ExitStack, port: str, kind: str, source: str, site: str = "") -> None:
        """Open one hostile connection, and keep it."""
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", self.ports[port]), 5, (source, 0)))
        if kind == "silence":
            return
        if kind == "partial-tls":
            plain.sendall(b"GET /metr" if port == "metrics" else client_hello()[:200])
            return
        held = plain
        if port != "metrics":
            held = stack.enter_context(self.tls(port, site).wrap_socket(plain))
        if kind != "idle":
            held.sendall(self.part(port, kind, site))

    def part(self, port: str, kind: str, site: str) -> bytes:
        if port == "metrics":
            return b"GET /metrics HTTP/1.1\r\nhost: " + (b"x\r\ncontent-length: 9\r\n" if kind == "slow-body" else b"")
        if port == "fleet":
            path, length = (PUSH_OBJECT, 2**20) if site else (PULL, 9)
            whole = head(path, length, signed(self.node(site)) if site else [])
            return whole + b"x" if kind == "slow-body" else whole[:40]
        block = grpc_headers(f"/{SERVICE}/Status" if port == "members" else f"/{ENROLMENT}/Join")
        start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
        if kind == "partial-headers":
            return start + frame(1, 4, 1, block)[:30]
        return start + frame(1, 4, 1, block) + frame(0, 0, 1, b"\x00\x00\x00\x00\x09x")

    def serve_a_member(self, port: str, site: str = "berlin") -> float:
        """Make a member's call at a port and return how long it took, in seconds."""
        started = time.monotonic()
        if port == "members":
            assert self.world.service(site).status().site == site
        elif port == "joining":
            assert request_membership(self.token, self.asked).state == "pending"
        elif port == "metrics":
            connection = http.client.HTTPConnection("127.0.0.1", self.ports["metrics"], timeout=5)
            connection.request("GET", "/metrics")
            assert b"privet_coordinator_members" in connection.getresponse().read()
            connection.close()
        else:
            link = FleetLink(f"127.0.0.1:{self.ports['fleet']}", self.root(), self.node(site), LARGEST)
            try:
                node = link.activate()
                assert link.beat()
                link.deactivate(node)
            finally:
                link.close()
        return time.monotonic() - started


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """Return an HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def grpc_headers(path: str) -> bytes:
    """Return a gRPC call's header block, in literal fields without indexing (RFC 7541, section 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    raise_limit()  # this process holds the other ends
    folder = tmp_path_factory.mktemp("floods")
    ports = dict(zip(PORTS, free_ports(4), strict=True))
    settings = Settings(
        name="north",
        origin="example.org/north",
        address=f"127.0.0.1:{ports['members']}",
        enrolment=f"127.0.0.1:{ports['joining']}",
        fleet=f"127.0.0.1:{ports['fleet']}",
        metrics_port=ports["metrics"],
    )
    create(folder / "coordinator", settings, None, datetime.now(UTC))
    world = World(folder, open_coordinator(folder / "coordinator"), Clock(), Refusals(logging.getLogger("none")))
    log = folder / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-c", SERVE, str(folder / "coordinator"), str(FILES)]
        process = subprocess.Popen(command, stderr=file, stdout=file)
    try:
        until(lambda: "serving sites" in log.read_text(), 30)
        for site in SITES:
            world.enrol(site)
        token = world.invite("parma")
        found = Flooded(world, process, ports, token, prepare_request(folder / "parma", token), log)
        until(lambda: all(served(found, port) for port in PORTS), 20)
        found.usual = found.memory()
        yield found
    finally:
        process.kill()
        process.wait()


def served(flooded: Flooded, port: str) -> bool:
    with suppress(Exception):
        flooded.serve_a_member(port)
        return True
    return False


def sources(count: int, many: bool) -> Iterator[str]:
    """Yield addresses for so many connections: one, or a different one for every second connection."""
    for number in range(count):
        yield f"127.{1 + number // 400}.{number // 2 % 200 + 1}.7" if many else "127.0.0.1"


def flood(flooded: Flooded, port: str, kind: str, many: bool) -> None:
    before = flooded.files()
    with ExitStack() as stack:
        for source in sources(LIMITS[port] + MORE, many):
            with suppress(OSError):  # the oldest were disconnected, maybe while they send
                flooded.hold(stack, port, kind, source)
        if kind in ("silence", "partial-tls") and port != "metrics":
            held = LIMITS[port] if many else 16
            until(lambda: flooded.files() >= before + held - 8, 5)  # the flood is one
        assert flooded.process.poll() is None
        assert flooded.serve_a_member(port) < WITHIN
        for other in PORTS:
            assert flooded.serve_a_member(other) < WITHIN
        assert flooded.files() < FILES
        assert flooded.memory() < flooded.usual + 100
    until(lambda: flooded.files() <= before + 8, 15)


def test_a_member_is_served_while_outsiders_hold_silent_connections_open(flooded: Flooded) -> None:
    flood(flooded, "fleet", "silence", many=True)
    flood(flooded, "members", "silence", many=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("port", PORTS)
def test_a_member_is_served_while_a_port_is_flooded(flooded: Flooded, port: str, kind: str) -> None:
    # In turn from one address, the member's own, and from many.
    flood(flooded, port, kind, many=(PORTS.index(port) + KINDS.index(kind)) % 2 == 0)


@pytest.mark.parametrize("port", ["members", "joining"])
def test_one_connection_with_many_calls_takes_no_place_of_others(flooded: Flooded, port: str) -> None:
    # It never confirms the settings that limit its calls at a time.
    path = f"/{SERVICE}/Status" if port == "members" else f"/{ENROLMENT}/Join"
    calls = b"".join(frame(1, 4, 2 * number + 1, grpc_headers(path)) for number in range(2000))
    with ExitStack() as stack:
        for _ in range(3):
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", flooded.ports[port]), 5))
            held = stack.enter_context(flooded.tls(port, "lyon").wrap_socket(plain))
            with suppress(OSError):  # it is cut off
                held.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + calls)
        assert flooded.serve_a_member(port) < WITHIN


@pytest.mark.parametrize("port", ["fleet", "members"])
def test_four_members_in_league_keep_no_other_member_out(flooded: Flooded, port: str) -> None:
    before = flooded.files()
    with ExitStack() as stack:
        for site in SITES[1:]:
            for kind in ("slow-body", "idle"):
                for _ in range(20):
                    with suppress(OSError):
                        flooded.hold(stack, port, kind, "127.0.0.1", site)
        assert flooded.serve_a_member(port) < WITHIN
    until(lambda: flooded.files() <= before + 8, 15)


@pytest.mark.parametrize("port", ["fleet", "members", "joining"])
def test_no_port_speaks_tls_1_2(flooded: Flooded, port: str) -> None:
    context = flooded.tls(port, "berlin")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", flooded.ports[port]), 5) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(plain),
    ):
        pass


def test_a_coordinator_without_files_for_its_connections_says_so_and_does_not_start(
    flooded: Flooded,
) -> None:
    command = [sys.executable, "-c", SERVE, str(flooded.world.folder / "coordinator"), "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "this process may open 300 files" in done.stderr
