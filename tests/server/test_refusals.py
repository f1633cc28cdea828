"""Each attack on a coordinator or a site is refused, and leaves an entry in a log that it cannot fill."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Message
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from privet.client.network.fleet import connected
from privet.common.doors.places import Share
from privet.common.errors import ProtocolError
from privet.common.flower.records import pack
from privet.common.jsonlog import JsonFormatter, log_as_json, native_errors
from privet.common.pki.certificates import create_authority, to_pem
from privet.common.pki.enrolment import ENROLMENT, MAX_MESSAGE_BYTES, SERVICE, Nothing
from privet.common.refusals import BURST, MOST, SECONDS, Refusals, _Window, short_digest
from privet.common.study.messages import Secured
from privet.server.consortium import service
from privet.server.consortium.service import note_fault
from privet.server.doors.door import CROWDED, HANDSHAKE, LATE, Manners
from privet.server.network.link import MEDIA_TYPE, PULL, PULL_OBJECT, PUSH_OBJECT
from privet.server.network.superlink import Endpoint, FleetServer
from tests.server.test_consortium import raw, site_pair
from tests.server.test_gate import signed, status_of, wire
from tests.support import consortium_world
from tests.support.fleet_world import World, public_line, public_pem, until

Entry = dict[str, Any]


class Written:
    """A log in memory, line by line as it would be on disk."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonFormatter())

    @classmethod
    @contextmanager
    def of(cls, logger: str) -> Iterator[Written]:
        """Write what a logger says, until the block ends."""
        found = cls()
        logging.getLogger(logger).addHandler(found.handler)
        try:
            yield found
        finally:
            logging.getLogger(logger).removeHandler(found.handler)

    @property
    def entries(self) -> list[Entry]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def last(self) -> Entry:
        """Return the last entry, which may be written just after the other side has its answer."""
        self.wait(1)
        return self.entries[-1]

    def wait(self, count: int) -> None:
        """Wait until so many entries are there."""
        deadline = time.monotonic() + 10
        while len(self.entries) < count:
            assert time.monotonic() < deadline, f"{len(self.entries)} entries were written, expected {count}"
            time.sleep(0.01)

    def clear(self) -> None:
        self.stream.seek(0)
        self.stream.truncate()


@pytest.fixture
def written() -> Iterator[Written]:
    with Written.of("privet") as found:
        yield found


# --- how much is written ---------------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def quiet(clock: Time) -> tuple[Refusals, Written]:
    """Return refusals with a log of their own."""
    logger, found = logging.Logger("refusals"), Written()
    logger.addHandler(found.handler)
    return Refusals(logger, clock), found


def test_an_entry_says_why_who_and_how_large() -> None:
    refusals, found = quiet(Time())
    refusals.note("the body is too large", "192.0.2.7", size=12, key=short_digest(b"key"))
    (entry,) = found.entries
    assert entry | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "refusals",
        "message": "refused: the body is too large",
        "event": "refused",
        "reason": "the body is too large",
        "peer": "192.0.2.7",
        "bytes": 12,
        "key": "2c70e12b7a0646f9",
    }


def test_of_many_a_few_are_written_and_the_others_counted() -> None:
    clock = Time()
    refusals, found = quiet(clock)
    for _ in range(1000):
        refusals.note("replay", "192.0.2.7")
    refusals.note("replay", "192.0.2.8")  # another peer's are not hidden by it
    refusals.note("malformed", "192.0.2.7")
    assert [entry["peer"] for entry in found.entries] == ["192.0.2.7"] * BURST + ["192.0.2.8", "192.0.2.7"]
    clock.now = SECONDS
    refusals.settle()
    last = found.entries[-1]
    assert (last["reason"], last["peer"], last["suppressed"]) == ("replay", "192.0.2.7", 1000 - BURST)
    refusals.settle()
    refusals.note("replay", "192.0.2.7")
    assert "suppressed" not in found.entries[-1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 500), st.floats(0, 10)), max_size=600))
def test_nothing_is_lost_and_the_disk_is_not_filled(attack: list[tuple[int, int, float]]) -> None:
    clock = Time()
    refusals, found = quiet(clock)
    for reason, peer, later in attack:
        clock.now += later
        refusals.note(f"reason {reason}", f"peer {peer}")
    clock.now += SECONDS + 1
    refusals.settle()
    plain = [entry for entry in found.entries if "suppressed" not in entry]
    assert len(plain) + sum(entry.get("suppressed", 0) for entry in found.entries) == len(attack)
    assert len(plain) <= MOST * (clock.now // SECONDS + 1)
    assert len(refusals._windows) == 0


def test_an_attack_by_many_peers_is_bounded_too() -> None:
    refusals, found = quiet(Time())
    for number in range(20_000):
        refusals.note(f"reason {number % 3}", f"peer {number}")
    assert len(found.entries) <= MOST
    assert len(refusals._windows) <= 70


def shout(refusals: Refusals) -> None:
    """Use up what outsiders' entries may take in a minute, and all that is remembered of them."""
    for number in range(5000):
        refusals.note(f"reason {number % 50}", f"peer {number}")


def test_however_loud_outsiders_are_what_a_member_does_is_written_down() -> None:
    clock = Time()
    refusals, found = quiet(clock)
    shout(refusals)
    found.clear()
    refusals.note("replay", "192.0.2.7", member="berlin")
    assert [entry["reason"] for entry in found.entries] == ["replay"]
    for number in range(100):
        refusals.note("replay", f"192.0.2.{number}", member="berlin")  # one member, wherever it calls from
    refusals.note("replay", "192.0.2.7", member="lyon")
    assert len(found.entries) == BURST + 1
    found.clear()
    clock.now = SECONDS
    refusals.settle()
    assert {"reason": "replay", "peer": "berlin", "suppressed": 101 - BURST}.items() <= found.entries[-1].items()


# --- at the gate -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def server(fleet: World, written: Written) -> Iterator[FleetServer]:
    with fleet.server() as found:
        written.clear()
        yield found


def post(
    world: World,
    port: int,
    path: str,
    body: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    length: int | None = None,
) -> str:
    """Send a request as it is and return the status of the answer."""
    announced = len(body) if length is None else length
    return status_of(wire(world, port, head(path, announced, headers or []) + body))


def head(path: str, length: int, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return what comes before a request's body."""
    first = b"POST " + path.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-type: " + MEDIA_TYPE + b"\r\n"
    fields = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return first + fields + b"content-length: %d\r\n\r\n" % length


def test_a_node_that_is_not_registered(fleet: World, server: FleetServer, written: Written) -> None:
    stranger = fleet.node_key(register=False)
    assert post(fleet, server.port, PULL, b"", signed(stranger)) == "401"
    entry = written.last()
    assert (entry["event"], entry["reason"], entry["peer"]) == ("refused", "the node is not registered", "127.0.0.1")
    assert entry["key"] == short_digest(public_pem(stranger))


def test_a_node_that_was_revoked(fleet: World, server: FleetServer, written: Written) -> None:
    key = fleet.node_key()
    fleet.link.unregister(public_line(key))
    assert post(fleet, server.port, PULL, b"", signed(key)) == "401"
    assert written.last()["reason"] == "the node was removed"


def test_signatures_that_are_forged_stale_or_missing(fleet: World, server: FleetServer, written: Written) -> None:
    key = fleet.node_key()
    forged = [*signed(key)[:2], signed(fleet.node_key(register=False))[2]]
    for headers, reason in (
        (forged, "the signature does not verify"),
        (signed(key, datetime.now(UTC) - timedelta(seconds=310)), "the signature is not of this time"),
        (signed(key, datetime.now(UTC) + timedelta(seconds=310)), "the signature is not of this time"),
        ([], "the request is not signed"),
    ):
        assert post(fleet, server.port, PULL, b"", headers) == "401"
        assert written.last()["reason"] == reason
        written.clear()


def test_a_clock_may_be_off_by_minutes_but_no_request_is_good_twice(
    fleet: World, server: FleetServer, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = fleet.node_key()
    body = PullMessagesRequest(node=Node(node_id=fleet.link.register(public_line(key)))).SerializeToString()
    for seconds in (-290, 290):
        captured = signed(key, datetime.now(UTC) + timedelta(seconds=seconds))
        assert post(fleet, server.port, PULL, body, captured) == "200"
    # The last is good for almost ten minutes more, and is remembered for as long.
    forward = time.monotonic() + 589
    monkeypatch.setattr("privet.server.network.gate.time.monotonic", lambda: forward)
    assert post(fleet, server.port, PULL, body, captured) == "401"
    assert written.last()["reason"] == "this request was made before"


def test_a_request_that_is_repeated(fleet: World, server: FleetServer, written: Written) -> None:
    key = fleet.node_key()
    number, captured = fleet.link.register(public_line(key)), signed(key)
    body = PullMessagesRequest(node=Node(node_id=number)).SerializeToString()
    assert post(fleet, server.port, PULL, body, captured) == "200"
    assert not written.entries
    assert post(fleet, server.port, PUSH_OBJECT, body, captured) == "401"
    entry = written.last()
    assert (entry["reason"], entry["key"]) == ("this request was made before", short_digest(public_pem(key)))


def test_members_and_outsiders_are_told_apart(fleet: World, server: FleetServer, written: Written) -> None:
    key, other = fleet.node_key(), fleet.node_key()
    fleet.link.unregister(public_line(other))
    once = signed(key)
    assert post(fleet, server.port, PULL, b"\xff" * 9, once) == "400"
    shout(server.gate.refusals)
    written.clear()
    forged = [*signed(key)[:2], signed(other)[2]]  # a member's key, as anybody may name it
    for headers in ([], forged, signed(other), signed(fleet.node_key(register=False))):
        assert post(fleet, server.port, PULL, b"", headers) == "401"
    assert wire(fleet, server.port, b"\x00 no HTTP\r\n\r\n")
    assert not written.entries
    assert post(fleet, server.port, PULL, b"\xff" * 9, once) == "401"
    assert post(fleet, server.port, PULL, b"\xff" * 9, signed(key)) == "400"
    written.wait(2)
    assert [entry["reason"] for entry in written.entries] == ["this request was made before", "the call is malformed"]


def test_a_node_that_acts_for_another(fleet: World, server: FleetServer, written: Written) -> None:
    key, other = fleet.node_key(), fleet.node_key()
    body = PullMessagesRequest(node=Node(node_id=fleet.link.register(public_line(other)))).SerializeToString()
    assert post(fleet, server.port, PULL, body, signed(key)) == "401"
    assert written.last()["reason"] == "the call is in another node's name"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",  # a run submitted without rights
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",  # a rogue client on the runtime API
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/start-run",  # a path that leads elsewhere
        "/v1/fleet/%2e%2e/control/start-run",
    ],
)
def test_a_path_that_there_is_not(fleet: World, server: FleetServer, written: Written, path: str) -> None:
    assert post(fleet, server.port, path, b"", signed(fleet.node_key())) == "404"
    entry = written.last()
    assert entry["reason"] == "there is no such path"
    assert path not in json.dumps(entry)  # what was sent is not written down


def test_messages_that_are_too_large_or_malformed(fleet: World, server: FleetServer, written: Written) -> None:
    key = fleet.node_key()
    assert post(fleet, server.port, PUSH_OBJECT, b"", signed(key), length=2**39) == "413"
    entry = written.last()
    assert (entry["reason"], entry["bytes"]) == ("the body is too large", 2**39)
    written.clear()
    assert post(fleet, server.port, PULL, b"\xff" * 9, signed(key)) == "400"
    assert (written.last()["reason"], written.last()["bytes"]) == ("the call is malformed", 9)


def test_header_bombs(fleet: World, server: FleetServer, written: Written) -> None:
    bomb = b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 1_000_000 + b"\r\n\r\n"
    assert status_of(wire(fleet, server.port, bomb)) in ("400", "closed")
    assert "header fields are too large" in written.last()["reason"]
    written.clear()
    many = [(b"x-%d" % number, b"") for number in range(60)]
    assert post(fleet, server.port, PULL, b"", many) == "431"
    assert written.last()["reason"] == "too many header fields"


def test_header_fields_that_never_come(
    fleet: World, server: FleetServer, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.server.network.superlink._HEADER_SECONDS", 0.1)
    assert wire(fleet, server.port, b"GET /health HTTP/1.1\r\nhost: ") in (b"", b"closed")
    assert written.last()["reason"] == "the header fields did not arrive in time"


def test_an_answer_that_is_not_taken_is_given_up(
    fleet: World, server: FleetServer, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A node fetches one object at a time, so a connection that has died would keep it waiting.
    monkeypatch.setattr("privet.server.network.superlink._TAKEN_SECONDS", 0.3)
    key = fleet.node_key()
    with ExitStack() as stack:
        grid = stack.enter_context(fleet.link.run())
        link = stack.enter_context(connected(fleet.connection(server.port, key)))
        node, asked = link.activate(), Secured("study", 1, "nonce", bytes(32 * 2**20))
        assert all(grid.push_messages([Message(pack(asked), node, "train.secured", ttl=60.0)]))
        received = link.receive()
        assert received is not None
        name = received.tree.children[0].children[0].object_id
        body = PullObjectRequest(node=Node(node_id=node), run_id=received.run, object_id=name).SerializeToString()
        context = ssl.create_default_context(cadata=fleet.authority.root().decode())
        dead = stack.enter_context(
            context.wrap_socket(socket.create_connection(("127.0.0.1", server.port)), server_hostname="127.0.0.1")
        )
        dead.sendall(head(PULL_OBJECT, len(body), signed(key)) + body)
        assert dead.recv(1)  # the answer has begun, before a fetch that ends takes the object away
        assert link.fetch(received) == asked
        assert written.last()["reason"] == "the caller does not read the answer"  # while the connection is open


def test_handshakes_that_fail_or_do_not_end(fleet: World, server: FleetServer, written: Written) -> None:
    older = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    older.check_hostname, older.verify_mode, older.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", server.port), 5) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        older.wrap_socket(plain),
    ):
        pass
    assert written.last()["reason"] == f"{HANDSHAKE}: a version before TLS 1.3"
    written.clear()
    with socket.create_connection(("127.0.0.1", server.port), 5):
        pass
    assert written.last()["reason"] == f"{HANDSHAKE}: the caller hung up before it ended, as a test of the network does"
    written.clear()
    with socket.create_connection(("127.0.0.1", server.port), 5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert written.last()["reason"] == f"{HANDSHAKE}: plain HTTP"
    assert written.last()["peer"] == "127.0.0.1"


def test_a_caller_that_does_not_prove_to_be_a_member_is_disconnected_whatever_it_sends(
    fleet: World, written: Written
) -> None:
    endpoint = Endpoint("127.0.0.1", 0, fleet.chain, fleet.key, manners=Manners(patience=0.5))
    key = fleet.node_key()
    with FleetServer(fleet.link, endpoint) as impatient, connected(fleet.connection(impatient.port, key)) as link:
        link.activate()
        context = ssl.create_default_context(cadata=fleet.authority.root().decode())
        with (
            socket.create_connection(("127.0.0.1", impatient.port), 5) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as trickling,
        ):
            sent = 0
            with suppress(OSError):  # reset, closed or broken, as it happens
                for letter in "GET /health HTTP/1.1\r\nhost: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx":
                    trickling.sendall(letter.encode())
                    sent += 1
                    time.sleep(0.1)
            assert sent < 30
            assert written.last()["reason"] == LATE
        assert link.beat()  # a member's connection stays
        assert impatient.door is not None
        assert [place.member != "" for place in impatient.door.places.everybody()] == [True]


def test_an_attack_on_the_port_leaves_a_few_lines(fleet: World, server: FleetServer, written: Written) -> None:
    for _ in range(20):
        with suppress(OSError):
            wire(fleet, server.port, b"\x00 no HTTP\r\n\r\n")
    assert len(written.entries) == BURST


def test_each_attack_in_the_documentation_has_its_tests() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "deployment.md").read_text(encoding="utf-8")
    table = re.search(r"\| attack \|.*?\n\n", text, re.DOTALL)
    assert table is not None
    named = set(re.findall(r"`([a-z0-9_]{12,})`", table[0]))
    assert len(named) > 20
    files = sorted((root / "tests").rglob("test_*.py"))
    written = "".join(file.read_text(encoding="utf-8") for file in files)
    assert {name for name in named if f"def test_{name}(" not in written} == set()


# --- at the consortium service ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[consortium_world.World]:
    with consortium_world.running(tmp_path_factory.mktemp("consortium")) as found:
        found.enrol("berlin")
        yield found


@pytest.fixture(autouse=True)
def afresh(request: pytest.FixtureRequest, written: Written) -> None:
    """Forget what other tests were refused."""
    if "world" in request.fixturenames:
        found: consortium_world.World = request.getfixturevalue("world")
        found.refusals._windows.clear()
        found.refusals._all = {inside: _Window(time.monotonic()) for inside in (False, True)}
        written.clear()


def refused(world: consortium_world.World, method: str, body: bytes = b"{}", port: str = "", **more: Any) -> str:
    """Call the service and return the status that refuses."""
    try:
        raw(world, method, body, port=port, **more)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_certificates_of_nobody_that_is_a_member(world: consortium_world.World, written: Written) -> None:
    assert refused(world, f"/{SERVICE}/Status", pair=site_pair(world, "nobody")) == "PERMISSION_DENIED"
    entry = written.last()
    assert (entry["event"], entry["reason"], entry["peer"]) == ("refused", "the caller is not authorised", "127.0.0.1")
    written.clear()
    service = world.enrol("parma")
    world.coordinator.members.revoke("parma", "left", world.clock())
    with pytest.raises(Exception, match="is not a member"):
        service.status()
    assert "is not a member" in written.last()["message"]


def test_what_members_and_outsiders_ask_of_the_service_is_told_apart(
    world: consortium_world.World, written: Written
) -> None:
    service = world.enrol("riga")
    pair = service.enrolment.tls, to_pem(service.enrolment.certificate).encode()
    world.coordinator.members.revoke("riga", "left", world.clock())
    shout(world.refusals)
    written.clear()
    joining = world.coordinator.settings.enrolment
    assert refused(world, f"/{ENROLMENT}/Join", b"no message", joining) == "INVALID_ARGUMENT"
    assert refused(world, f"/{ENROLMENT}/StartRun", port=joining) == "UNIMPLEMENTED"
    assert not written.entries
    assert refused(world, f"/{SERVICE}/Status", pair=pair) == "PERMISSION_DENIED"
    assert refused(world, f"/{SERVICE}/StartRun", pair=pair) == "UNIMPLEMENTED"
    written.wait(2)
    assert [entry["reason"] for entry in written.entries] == ["the caller is not authorised", "there is no such method"]


def test_certificates_that_tls_refuses(world: consortium_world.World, written: Written) -> None:
    now = world.clock()
    foreign = site_pair(world, "berlin", authority=create_authority("north", now))
    expired = site_pair(world, "berlin", now=now - timedelta(days=3))
    for pair, said in (
        (foreign, "unable to get local issuer certificate"),
        (expired, "certificate has expired"),
        (None, "no certificate"),
    ):
        assert refused(world, f"/{SERVICE}/Status", Nothing().encode(), pair=pair) == "UNAVAILABLE"
        entry = written.last()
        assert (entry["event"], entry["peer"]) == ("refused", "127.0.0.1")
        assert said in entry["reason"]
        written.clear()
        world.refusals._windows.clear()


def test_what_libraries_write_past_python_is_taken_and_what_python_writes_is_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []
    with native_errors(lines.append):
        os.write(2, b"from C\nand \xff\n")
        sys.stderr.write("from Python\n")
    os.write(2, b"after\n")
    assert [line for line in lines if "INFO" not in line] == ["from C", "and \ufffd"]
    assert capfd.readouterr().err == "from Python\nafter\n"


_FLOOD = """
import ctypes, os
from privet.common.jsonlog import native_errors
lines, line = [], b"x" * 99 + bytes([10])
with native_errors(lines.append):
    # As C code writes that was called without giving up Python's lock: nobody else can read meanwhile.
    ctypes.PyDLL(None).write(2, line * 10_000, 10_000 * len(line))
assert lines[:1] == ["x" * 99], lines[:1]
with native_errors(lines.append):
    ctypes.PyDLL(None).write(2, b"Check failed", 12)
    os.abort()
"""


def test_a_library_that_writes_much_or_crashes_hangs_nothing_and_shows_where() -> None:
    ended = subprocess.run([sys.executable, "-c", _FLOOD], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == -signal.SIGABRT, ended.stderr
    assert "Fatal Python error: Aborted" in ended.stderr
    assert 'File "<string>", line 11 in <module>' in ended.stderr


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Put back what `log_as_json` changes."""
    loggers = [logging.getLogger(name) for name in ("", "flwr", "privet")]
    before = [(each, each.level, list(each.handlers), list(each.filters), each.propagate) for each in loggers]
    yield
    for each, level, handlers, filters, propagate in before:
        each.setLevel(level)
        each.handlers, each.filters, each.propagate = handlers, filters, propagate


@pytest.mark.usefixtures("logging_as_before")
def test_what_flower_says_of_a_nodes_requests_fills_no_disk_and_quotes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A member's node may answer what nobody asked: Flower accepts the call, and reports an error each time.
    log_as_json(partial(note_fault, Refusals(logging.getLogger("privet.coordinator")), "Flower"))
    for number in range(50):
        logging.getLogger("flwr").error("Invalid run ID for Message: %s", f"secret {number}")
    found = capsys.readouterr().err
    assert [json.loads(line)["reason"] for line in found.splitlines()] == ["Flower reports a fault"] * BURST
    assert "Invalid run ID" in found
    assert "secret" not in found


def test_a_token_that_is_not_valid_is_written_down_and_its_secret_is_not(
    world: consortium_world.World, written: Written
) -> None:
    joining = world.coordinator.settings.enrolment
    secret = "ab" * 32
    body = b'{"secret":"' + secret.encode() + b'","keys":1}'
    assert refused(world, f"/{ENROLMENT}/Join", body, joining) == "INVALID_ARGUMENT"
    assert written.last()["reason"] == "the message is malformed"
    assert secret not in written.stream.getvalue()
    with pytest.raises(ProtocolError) as caught:
        Nothing.decode(b'{"' + secret.encode() + b'":1}')
    assert secret not in str(caught.value)


@pytest.mark.parametrize("method", [f"/{SERVICE}/StartRun", f"/{ENROLMENT}/Approve", "/flwr.proto.Control/StartRun"])
def test_methods_that_there_are_not(world: consortium_world.World, written: Written, method: str) -> None:
    assert refused(world, method, port=world.coordinator.settings.enrolment) == "UNIMPLEMENTED"
    assert written.last()["reason"] == "there is no such method"
    assert method not in written.stream.getvalue()


def test_large_messages_and_header_bombs(world: consortium_world.World, written: Written) -> None:
    joining = world.coordinator.settings.enrolment
    assert refused(world, f"/{ENROLMENT}/Join", b"x" * (MAX_MESSAGE_BYTES + 1), joining) == "RESOURCE_EXHAUSTED"
    assert "too large" in written.last()["message"]
    for size in (20_000, 1_000_000):
        written.clear()
        metadata = [("bomb", "x" * size)]
        assert refused(world, f"/{ENROLMENT}/Join", port=joining, metadata=metadata) == "RESOURCE_EXHAUSTED"
        assert "too large" in written.last()["message"]


@pytest.mark.parametrize("encrypted", [False, True])
def test_connections_that_say_nothing_are_limited_and_closed(
    tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    few = Share(strangers=5, address=5)
    monkeypatch.setattr(service, "shares", lambda settings: service.Shares(few, few, few))
    monkeypatch.setattr(service, "MANNERS", Manners(handshake=0.5, patience=0.5))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with consortium_world.running(tmp_path) as own, ExitStack() as stack:
        host, _, port = own.coordinator.settings.enrolment.rpartition(":")
        for _ in range(5):
            opened = stack.enter_context(socket.create_connection((host, int(port))))
            if encrypted:
                stack.enter_context(context.wrap_socket(opened))
        own.enrol("berlin")  # the oldest gives way
        assert CROWDED in {entry["reason"] for entry in written.entries}
        reasons = {LATE} if encrypted else {LATE, f"{HANDSHAKE}: it did not end in time"}
        until(lambda: bool(reasons & {entry["reason"] for entry in written.entries}))


def test_calls_that_say_nothing_are_given_up(
    world: consortium_world.World, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many as the service has threads: they would keep every other site from joining.
    monkeypatch.setattr("privet.server.consortium.service._PATIENCE", 0.3)
    end = threading.Event()

    def silence() -> Iterator[bytes]:
        end.wait(20)
        yield from ()

    root = world.coordinator.authority.certificate
    credentials = grpc.ssl_channel_credentials(to_pem(root).encode())
    with grpc.secure_channel(world.coordinator.settings.enrolment, credentials) as channel:
        calls = [channel.stream_unary(f"/{ENROLMENT}/Join").future(silence()) for _ in range(64)]
        with pytest.raises(grpc.RpcError):
            calls[-1].result(10)
        until(lambda: any("did not arrive" in entry["message"] for entry in written.entries))
        end.set()
    assert world.enrol("oslo").status().site == "oslo"
    assert refused(world, f"/{ENROLMENT}/Join", port=world.coordinator.settings.enrolment) == "INVALID_ARGUMENT"
