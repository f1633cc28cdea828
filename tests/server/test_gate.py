"""What the network can reach of the coordinator: the fleet calls of registered nodes, and a health check."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import sign_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privet.common.errors import StateError
from privet.common.flower.bundles import GIVE, TAKE
from privet.server.network.gate import QUOTA, Event, Gate, Limits
from privet.server.network.link import (
    MEDIA_TYPE,
    PULL,
    PULL_OBJECT,
    PUSH_OBJECT,
    USED,
    Objection,
    SignedHeaders,
    signed_headers,
)
from privet.server.network.superlink import FleetServer
from tests.support.fleet_world import World, public_line, public_pem

KEY = ec.generate_private_key(ec.SECP384R1())
SMALL = Limits(body=3000, small_body=500, body_seconds=0.2, hold_seconds=0.1)


class Inside:
    """The desk behind the gate: remembers what came through. Admits everybody who signs at all, or nobody."""

    def __init__(self, admitting: bool = True, failing: bool = False) -> None:
        self.admitting, self.failing = admitting, failing
        self.ready: set[int] = set()
        self.left = 2**30
        self.bodies: list[bytes] = []

    def admits(self, signed: SignedHeaders) -> int | Objection:
        return 7 if self.admitting else Objection.UNKNOWN

    def call(self, path: str, body: bytes, node: int) -> tuple[int, bytes]:
        self.bodies.append(body)
        if self.failing:
            raise OSError("patient 17")
        return 200, b"in"

    def has_room(self, node: int, size: int) -> bool:
        return size <= self.left

    def changed(self) -> bool:
        return True

    def waiting(self) -> frozenset[int]:
        if self.failing:
            raise OSError("the disk is gone")
        return frozenset(self.ready)


def signed(key: ec.EllipticCurvePrivateKey = KEY, at: datetime | None = None) -> list[tuple[bytes, bytes]]:
    timestamp = (at or datetime.now(UTC)).isoformat()
    signature = sign_message(key, timestamp.encode("ascii"))
    return [
        (b"flwr-public-key", b64encode(public_pem(key))),
        (b"flwr-timestamp", timestamp.encode("ascii")),
        (b"flwr-signature", b64encode(signature)),
    ]


def request(
    path: bytes = PULL.encode(),
    body: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    **scope: Any,
) -> tuple[dict[str, Any], list[Event]]:
    lengths = [(b"content-type", MEDIA_TYPE), (b"content-length", str(len(body)).encode())]
    whole = {
        "type": "http",
        "method": "POST",
        "raw_path": path,
        "path": path.decode("latin-1"),
        "query_string": b"",
        "headers": (lengths + signed()) if headers is None else headers,
    }
    return {**whole, **scope}, [{"type": "http.request", "body": body, "more_body": False}]


def through(gate: Gate, scope: dict[str, Any], events: list[Event]) -> int:
    """Return the status that a request gets."""
    answers: list[Event] = []

    async def receive() -> Event:
        if not events:
            await asyncio.sleep(30)
        return events.pop(0)

    async def send(event: Event) -> None:
        answers.append(event)

    async def run() -> None:
        gate._bodies = asyncio.Semaphore(gate._limits.bodies)
        await gate(scope, receive, send)

    asyncio.run(run())
    return int(answers[0]["status"])


def test_the_calls_of_a_site_come_through_and_no_others() -> None:
    for path in sorted(USED):
        inside = Inside()
        assert through(Gate(inside, SMALL), *request(path.encode(), b"abc")) == 200
        assert inside.bodies == [b"abc"]
    assert not {path for path in USED if "fab" in path or "register-node" in path or "/fleet/" not in path} - {
        TAKE,
        GIVE,
    }


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%252e%252e/control/start-run",
        "/v1/fleet/..\\control\\start-run",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/pull%2dmessages",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages\x00",
        "/v1/fleet/",
        "/docs",
        "/openapi.json",
        "/health/../v1/control/start-run",
        "/",
        "",
        "http://127.0.0.1/v1/fleet/pull-messages",
    ],
)
def test_any_other_path_does_not_exist(path: str) -> None:
    inside = Inside()
    assert through(Gate(inside, SMALL), *request(path.encode("latin-1"))) == 404
    assert inside.bodies == []


@given(st.binary(max_size=60))
def test_no_path_comes_through_that_is_not_listed(path: bytes) -> None:
    inside = Inside()
    for raw in (path, b"/v1/fleet/" + path, PULL.encode() + path):
        if raw.decode("latin-1") not in USED and raw != b"/health":
            assert through(Gate(inside, SMALL), *request(raw)) == 404
    assert inside.bodies == []


def with_headers(*more: tuple[bytes, bytes], without: tuple[bytes, ...] = ()) -> list[tuple[bytes, bytes]]:
    plain = [(b"content-type", MEDIA_TYPE), (b"content-length", b"0"), *signed()]
    return [(name, value) for name, value in plain if name not in without] + list(more)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (with_headers(without=(b"flwr-signature",)), 401),
        (with_headers(without=(b"flwr-public-key",)), 401),
        (with_headers(*signed()), 401),  # each twice: two readers could take different ones
        (with_headers((b"flwr-timestamp", b"\xff"), without=(b"flwr-timestamp",)), 401),
        (with_headers((b"flwr-signature", b"****"), without=(b"flwr-signature",)), 401),
        (with_headers(without=(b"content-length",)), 411),
        (with_headers((b"content-length", b"-1"), without=(b"content-length",)), 411),
        (with_headers((b"content-length", b"1" * 13), without=(b"content-length",)), 411),
        (with_headers((b"transfer-encoding", b"chunked")), 411),
        (with_headers((b"content-encoding", b"gzip")), 415),
        (with_headers((b"upgrade", b"websocket")), 415),
        (with_headers((b"content-type", b"application/json"), without=(b"content-type",)), 415),
        (with_headers(*[(b"x-%d" % i, b"") for i in range(60)]), 431),
    ],
)
def test_headers_that_no_site_sends_are_refused(headers: list[tuple[bytes, bytes]], status: int) -> None:
    inside = Inside()
    assert through(Gate(inside, SMALL), *request(headers=headers)) == status
    assert inside.bodies == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "CONNECT", "OPTIONS"])
def test_methods_that_no_site_uses_are_refused(method: str) -> None:
    assert through(Gate(Inside(), SMALL), *request(method=method)) == 405
    assert through(Gate(Inside(), SMALL), *request(query_string=b"a=b")) == 404


def test_bodies_are_capped_by_what_the_call_needs() -> None:
    gate = Gate(Inside(), SMALL)
    assert through(gate, *request(body=b"x" * 500)) == 200
    assert through(gate, *request(body=b"x" * 501)) == 413
    assert through(gate, *request(PUSH_OBJECT.encode(), b"x" * 3000)) == 200
    assert through(gate, *request(PUSH_OBJECT.encode(), b"x" * 3001)) == 413
    assert gate.answers == {200: 2, 413: 2}


def test_a_body_is_as_long_as_announced_and_arrives_in_time() -> None:
    for events, status in (
        ([{"type": "http.request", "body": b"ab", "more_body": False}], 400),
        ([{"type": "http.request", "body": b"abcd", "more_body": False}], 400),
        ([{"type": "http.request", "body": b"ab", "more_body": True}], 408),
        ([{"type": "http.disconnect"}], 400),
    ):
        inside = Inside()
        scope, _ = request(body=b"abc")
        assert through(Gate(inside, SMALL), scope, list(events)) == status
        assert inside.bodies == []


def test_a_body_that_trickles_is_given_up() -> None:
    async def run() -> tuple[int, int]:
        gate, answers, sent = Gate(Inside(), SMALL), [], 0
        kind = [(b"content-type", MEDIA_TYPE), (b"content-length", b"3000")]
        scope = request(PUSH_OBJECT.encode(), headers=[*kind, *signed(KEY)])[0]

        async def trickle() -> Event:
            nonlocal sent
            sent += 1
            await asyncio.sleep(0.05)  # well before the next piece is given up
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(event: Event) -> None:
            answers.append(event)

        await asyncio.wait_for(gate(scope, trickle, send), 5)
        return answers[0]["status"], sent

    status, sent = asyncio.run(run())
    assert status == 408
    assert sent < 10


def test_a_node_that_sends_slowly_keeps_no_other_node_out() -> None:
    class Two(Inside):
        def admits(self, signed: SignedHeaders) -> int | Objection:
            return 7 if signed.public_key == public_pem(KEY) else 8

    async def run() -> list[Event]:
        gate, answers, scopes = Gate(Two(), replace(SMALL, bodies=3, body_seconds=30.0)), [], []
        for key in (KEY, KEY, KEY, ec.generate_private_key(ec.SECP384R1())):
            await asyncio.sleep(0.001)  # signatures are told apart by their time
            kind = [(b"content-type", MEDIA_TYPE), (b"content-length", b"3000")]
            scopes.append(request(PUSH_OBJECT.encode(), headers=[*kind, *signed(key)])[0])

        async def never() -> Event:
            await asyncio.sleep(30)
            raise AssertionError

        async def at_once() -> Event:
            return {"type": "http.request", "body": b"x" * 3000, "more_body": False}

        async def send(event: Event) -> None:
            answers.append(event)

        slow = [asyncio.create_task(gate(scope, never, send)) for scope in scopes[:3]]
        await asyncio.sleep(0.2)
        await asyncio.wait_for(gate(scopes[3], at_once, send), 5)
        for task in slow:
            task.cancel()
        return answers

    assert asyncio.run(run())[0]["status"] == 200


def test_bodies_that_come_slowly_leave_room_for_those_of_other_nodes() -> None:
    # Nodes in league, each with as many as it may send: together they take all memory for bodies.
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(5)]

    class Five(Inside):
        def admits(self, signed: SignedHeaders) -> int | Objection:
            return 1 + [public_pem(key) for key in keys].index(signed.public_key)

    async def run() -> tuple[list[Event], list[bytes]]:
        inside = Five()
        gate, answers = Gate(inside, replace(SMALL, bodies=8, body_seconds=30.0)), list[Event]()
        kind = [(b"content-type", MEDIA_TYPE), (b"content-length", b"3000")]

        async def never() -> Event:
            await asyncio.sleep(30)
            raise AssertionError

        async def send(event: Event) -> None:
            answers.append(event)

        slow = []
        for key in keys[:4] * 2:
            await asyncio.sleep(0.001)  # signatures are told apart by their time
            scope = request(PUSH_OBJECT.encode(), headers=[*kind, *signed(key)])[0]
            slow.append(asyncio.create_task(gate(scope, never, send)))
        await asyncio.sleep(0.3)
        assert gate._bodies.locked()
        scope, events = request(PUSH_OBJECT.encode(), b"x" * 3000, headers=[*kind, *signed(keys[4])])

        async def at_once() -> Event:
            return events[0]

        await asyncio.wait_for(gate(scope, at_once, send), 2)
        for task in slow:
            task.cancel()
        return answers, inside.bodies

    answers, bodies = asyncio.run(run())
    assert answers[0]["status"] == 200
    assert bodies == [b"x" * 3000]


def test_an_object_beyond_the_nodes_quota_is_refused_before_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    inside = Inside()
    inside.left = 2999
    scope, _ = request(PUSH_OBJECT.encode(), b"x" * 3000)
    gate = Gate(inside, SMALL)
    assert through(gate, scope, []) == 413  # the body never comes
    assert QUOTA in caplog.text
    assert through(gate, *request(PUSH_OBJECT.encode(), b"x" * 2999)) == 200
    assert not gate._incoming


def test_a_node_that_does_not_take_what_it_fetches_is_given_no_more() -> None:
    async def run() -> int:
        inside = Inside()
        gate, sent = Gate(inside, SMALL), asyncio.Event()
        scopes = []
        for _ in range(4):
            await asyncio.sleep(0.001)
            scopes.append(request(PULL_OBJECT.encode())[0])

        async def receive() -> Event:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(event: Event) -> None:
            if event["type"] == "http.response.body" and not event.get("more_body"):
                await sent.wait()  # the connection takes no more

        asked = [asyncio.create_task(gate(scope, receive, send)) for scope in scopes]
        await asyncio.sleep(0.2)
        called = len(inside.bodies)
        sent.set()
        await asyncio.gather(*asked)
        assert len(inside.bodies) == 4
        return called

    assert asyncio.run(run()) == 2


def test_a_stranger_is_turned_away_before_the_body_is_read() -> None:
    scope, _ = request(PUSH_OBJECT.encode(), b"x" * 3000)
    started = time.monotonic()
    assert through(Gate(Inside(admitting=False), SMALL), scope, []) == 401  # a body never comes
    assert time.monotonic() - started < 5


def test_a_request_is_let_in_once_whatever_it_is_repeated_for() -> None:
    gate, headers = Gate(Inside(), SMALL), with_headers()
    assert through(gate, *request(headers=headers)) == 200
    assert through(gate, *request(headers=headers)) == 401
    assert through(gate, *request(PUSH_OBJECT.encode(), headers=headers)) == 401
    # An ECDSA signature can be changed into another valid one for the same key and text.
    changed = [(name, b64encode(b"another") if name == b"flwr-signature" else value) for name, value in headers]
    assert through(gate, *request(headers=changed)) == 401
    assert through(gate, *request()) == 200


def test_strangers_do_not_fill_the_memory_of_repeated_requests() -> None:
    gate = Gate(Inside(admitting=False), SMALL)
    for _ in range(5):
        assert through(gate, *request()) == 401
    assert len(gate._seen) == 0


def test_who_asks_for_messages_waits_until_one_is_there() -> None:
    inside = Inside()
    gate = Gate(inside, Limits(hold_seconds=0.4))
    started = time.monotonic()
    assert through(gate, *request()) == 200
    assert time.monotonic() - started >= 0.4
    inside.ready = {8}
    assert through(gate, *request()) == 200
    assert time.monotonic() - started >= 0.8
    inside.ready = {7}
    started = time.monotonic()
    assert through(Gate(inside, Limits(hold_seconds=60)), *request()) == 200
    assert time.monotonic() - started < 30  # on a machine with much else to do, too


def test_health_tells_the_truth() -> None:
    inside = Inside()
    gate = Gate(inside, SMALL)
    assert through(gate, *request(b"/health", method="GET", headers=[])) == 200
    inside.failing = True
    assert through(gate, *request(b"/health", method="GET", headers=[])) == 503
    assert through(gate, *request(b"/health", headers=[])) == 405


def test_a_failure_inside_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert through(Gate(Inside(failing=True), Limits(hold_seconds=0.0)), *request(PUSH_OBJECT.encode())) == 500
    assert "17" not in caplog.text


@given(st.lists(st.tuples(st.sampled_from([n for n, _ in signed()]), st.binary(max_size=80)), max_size=5))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_signed_headers_are_read_or_not_and_never_raise(headers: list[tuple[bytes, bytes]]) -> None:
    found = signed_headers(headers)
    assert found is None or isinstance(found, SignedHeaders)


# Who is admitted, by the real link state


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("gate"))


def test_a_registered_node_is_admitted_by_a_fresh_signature_of_its_own(world: World) -> None:
    key, stranger = world.node_key(), world.node_key(register=False)

    def admitted(headers: list[tuple[bytes, bytes]]) -> bool:
        found = signed_headers(headers)
        assert found is not None
        return isinstance(world.link.admits(found), int)

    assert admitted(signed(key))
    assert not admitted(signed(stranger))
    assert not admitted(signed(key, datetime.now(UTC) - timedelta(seconds=400)))
    assert not admitted(signed(key, datetime.now(UTC) + timedelta(seconds=301)))
    mixed = [*signed(key)[:1], *signed(stranger)[1:]]
    assert not admitted(mixed)
    for timestamp in (b"now", b"2026-01-01", b"", b"9" * 500):
        assert not admitted([signed(key)[0], (b"flwr-timestamp", timestamp), signed(key)[2]])
    garbled = [(b"flwr-public-key", b64encode(b"no key")), *signed(key)[1:]]
    assert not admitted(garbled)


def test_only_keys_on_the_curve_are_registered(world: World) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    for key in (b"", b"no key", public_line(other), public_pem(ec.generate_private_key(ec.SECP384R1()))):
        with pytest.raises(StateError, match="OpenSSH public key on the curve P-384"):
            world.link.register(key)


# Over the wire


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[FleetServer]:
    with world.server() as found:
        yield found


def wire(world: World, port: int, data: bytes, seconds: float = 10.0) -> bytes:
    """Send bytes over TLS and return what comes back until the other side is done."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=world.authority.root().decode())
    with (
        socket.create_connection(("127.0.0.1", port), timeout=seconds) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        try:
            connection.sendall(data)
            found = b""
            while b"\r\n\r\n" not in found and (part := connection.recv(65536)):
                found += part
        except OSError:
            return b"closed"
    return found


def status_of(answer: bytes) -> str:
    return answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/") else "closed"


@pytest.mark.parametrize(
    "line",
    [
        b"POST /v1/control/start-run",
        b"POST /v1/control/register-node",
        b"POST /v1/runtime/acquire-task",
        b"POST /v1/runtime/pull-messages",
        b"POST /v1/fleet/../control/start-run",
        b"POST /v1/fleet/%2e%2e/control/start-run",
        b"GET /docs",
        b"GET /openapi.json",
    ],
)
def test_the_control_and_runtime_apis_do_not_exist(world: World, server: FleetServer, line: bytes) -> None:
    head = line + b" HTTP/1.1\r\nhost: x\r\ncontent-type: " + MEDIA_TYPE + b"\r\ncontent-length: 0\r\n\r\n"
    assert status_of(wire(world, server.port, head)) == "404"


def test_they_do_not_exist_behind_the_gate_either(world: World) -> None:
    # There is nothing for a gap in the gate to lead to.
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/get-fab"):
        with pytest.raises(KeyError):
            world.link.call(path, b"", 7)


def test_a_node_acts_for_itself_alone(world: World) -> None:
    own, other = world.node_key(), world.node_key()
    number, another = (world.link.register(public_line(key)) for key in (own, other))
    message = MessageProto(metadata=MetadataProto(src_node_id=another))
    requests: dict[str, Any] = {
        "activate-node": ActivateNodeRequest(public_key=public_pem(other), heartbeat_interval=30),
        "deactivate-node": DeactivateNodeRequest(node_id=another),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=Node(node_id=another), heartbeat_interval=30),
        "pull-messages": PullMessagesRequest(node=Node(node_id=another)),
        "push-messages": PushMessagesRequest(node=Node(node_id=number), messages_list=[message]),
        "pull-object": PullObjectRequest(node=Node(node_id=another)),
        "push-object": PushObjectRequest(node=Node(node_id=another)),
        "confirm-message-received": ConfirmMessageReceivedRequest(node=Node(node_id=another)),
    }
    for path, foreign in requests.items():
        assert world.link.call("/v1/fleet/" + path, foreign.SerializeToString(), number) == (401, b"")
    assert world.link.nodes()[-1].online is False


@given(st.sampled_from(sorted(USED)), st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_a_call_of_any_bytes_is_refused(world: World, path: str, body: bytes) -> None:
    assert world.link.call(path, body, 7)[0] in (400, 401)


def test_a_header_bomb_is_cut_off(world: World, server: FleetServer) -> None:
    bomb = b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-a: " + b"a" * 2_000_000 + b"\r\n\r\n"
    assert status_of(wire(world, server.port, bomb)) in ("400", "431", "closed")
    many = b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100_000 + b"\r\n"
    assert status_of(wire(world, server.port, many)) in ("400", "431", "closed")
    assert status_of(wire(world, server.port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")) == "200"


def test_an_unregistered_node_reaches_nothing(world: World, server: FleetServer) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    body = ActivateNodeRequest(public_key=public_pem(stranger), heartbeat_interval=30).SerializeToString()
    for path in USED:
        head = b"POST " + path.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-type: " + MEDIA_TYPE + b"\r\n"
        head += b"".join(name + b": " + value + b"\r\n" for name, value in signed(stranger))
        answer = wire(world, server.port, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert status_of(answer) == "401"


def test_old_tls_is_refused(world: World, server: FleetServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=world.authority.root().decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(plain, server_hostname="127.0.0.1"),
    ):
        pass


def test_plain_http_gets_nothing(server: FleetServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        with suppress(OSError):  # cut off
            assert not plain.recv(100).startswith(b"HTTP/")


def test_header_fields_that_do_not_arrive_are_not_waited_for(
    world: World, server: FleetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.server.network.superlink._HEADER_SECONDS", 0.3)
    started = time.monotonic()
    assert wire(world, server.port, b"GET /health HTTP/1.1\r\nhost: ") in (b"", b"closed")
    assert wire(world, server.port, b"") in (b"", b"closed")
    assert time.monotonic() - started < 8


def test_the_port_cannot_be_taken_twice(world: World, server: FleetServer, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot listen"), world.server(server.port):
        pass
    (world.folder / "server.key").write_text("no key")
    with pytest.raises(StateError, match="cannot be used"), world.server():
        pass
    world.authority.server(world.folder)
