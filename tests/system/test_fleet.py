"""The deployment transport end to end on loopback: a real link state and fleet API over TLS, resident nodes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError, get_object_id
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient
from hypothesis import given
from hypothesis import strategies as st

from privet.client.network.fleet import (
    NotAdmittedError,
    Received,
    TooLargeError,
    UnreachableError,
    UntrustedError,
    connected,
    reply_to,
)
from privet.client.network.node import Connection, NodeState
from privet.common.errors import ProtocolError, StateError
from privet.common.flower.bundles import GIVE, TAKE
from privet.common.flower.objects import Objects, deflate, part_names, put_together, take_apart
from privet.common.flower.records import pack, unpack
from privet.common.masking.vector import segments_of
from privet.common.secagg.quantize import Layout
from privet.common.study.adapter import AdapterSpec, TensorSpec
from privet.common.study.messages import Failure, Message, Secured
from privet.server.network.deployed import largest_answer, run_over_flower
from privet.server.network.gate import QUOTA
from privet.server.network.grid import GridExchange
from privet.server.network.link import _CALLS, ANSWERS, PUSH, PUSH_OBJECT, USED, LinkGrid
from privet.server.network.store import LARGE, FileObjectStore
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.timing import Timing
from tests.server.test_refusals import Written
from tests.support.fleet_world import Authority, Tally, World, node, online, public_line, until
from tests.support.memory_grid import MemoryGrid
from tests.support.synthetic import NAMES, PEFT_CONFIG, Site, optima, quadratic, start_adapter, study_of, towards

pytestmark = pytest.mark.slow
ASKED = Secured("study", 1, "nonce", b"asked")


def echo(asked: Message) -> Message:
    return Secured("study", 1, "nonce", b"answer to " + asked.body) if isinstance(asked, Secured) else asked


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def port(world: World) -> Iterator[int]:
    with world.server() as server:
        yield server.port


def ask(world: World, body: bytes = b"asked", count: int = 1, timeout: float = 20.0) -> dict[int, Message]:
    with world.link.run() as grid:
        exchange = GridExchange(grid, 0.02)
        until(lambda: len(exchange.nodes()) >= count)
        asked = {number: Secured("study", 1, "nonce", body) for number in exchange.nodes()}
        return dict(exchange.ask(asked, timeout=timeout))


def test_a_message_goes_there_and_back(world: World, port: int, tmp_path: Path) -> None:
    key = world.node_key()
    with node(world, port, key, echo, tmp_path / "a.state") as tally:
        for size in (0, 3 * 2**20):
            (answer,) = ask(world, b"x" * size).values()
            assert answer == Secured("study", 1, "nonce", b"answer to " + b"x" * size)
    assert tally.kinds == ["train.secured"] * 2
    assert online(world) == []  # it signed off


def test_a_study_over_the_network_gives_what_it_gives_in_memory(world: World, port: int, tmp_path: Path) -> None:
    study = study_of()
    sites = [Site(NAMES[i], towards(x), weight=10 * (i + 1)) for i, x in enumerate(optima(study, 3))]

    run = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    with ExitStack() as stack:
        for site in sites:
            reply = site.reply
            stack.enter_context(
                node(world, port, world.node_key(), lambda asked, r=reply: r(asked), tmp_path / f"{site.name}.state")  # type: ignore[misc]
            )
        until(lambda: len(online(world)) == 3)
        state = run_over_flower(Unlogged(run), world.link, timing=Timing(30, 30, 30))
    direct = RunDirectory.create(tmp_path / "direct", study, start_adapter(), PEFT_CONFIG)
    assert state.adapter.digest == run_study(Unlogged(direct), quadratic(study)).adapter.digest
    assert state.stopped


def test_an_unregistered_node_is_not_admitted(world: World, port: int) -> None:
    with connected(world.connection(port, world.node_key(register=False))) as link, pytest.raises(NotAdmittedError):
        link.activate()


def test_a_removed_node_is_cut_off_at_once_and_its_key_is_never_taken_again(world: World, port: int) -> None:
    key = world.node_key()
    with connected(world.connection(port, key)) as link:
        link.activate()
        assert link.beat()
        world.link.unregister(public_line(key))
        for call in (link.beat, link.receive, link.activate):
            with pytest.raises(NotAdmittedError):
                call()
    with pytest.raises(StateError, match="belonged to a removed site"):
        world.link.register(public_line(key))


def test_a_node_trusts_one_root(world: World, port: int) -> None:
    with (
        connected(world.connection(port, world.node_key(), Authority().root())) as link,
        pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        link.activate()


def test_a_site_writes_down_that_somebody_else_answers_in_the_coordinators_place(
    world: World, port: int, tmp_path: Path
) -> None:
    with (
        Written.of("privet.site") as written,
        connected(world.connection(port, world.node_key(), Authority().root())) as link,
    ):
        runner = Connection(link, lambda read: read(), NodeState(tmp_path / "a.state"), Tally())
        thread = threading.Thread(target=runner.serve, daemon=True)
        thread.start()
        entry = written.last()
        runner.stop.set()
        thread.join(10)
    assert (entry["event"], entry["reason"]) == ("refused", "the coordinator is not to be trusted")
    assert "CERTIFICATE_VERIFY_FAILED" in entry["message"]


def test_a_node_refuses_an_expired_certificate(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.chain, world.key = world.authority.server(tmp_path, days=-1)
    with (
        world.server() as server,
        connected(world.connection(server.port, world.node_key())) as link,
        pytest.raises(UnreachableError, match="expired"),
    ):
        link.activate()


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.authority.server(tmp_path, days=-1)
    with world.server() as server:
        world.authority.server(tmp_path)
        server.renew_certificate()
        with connected(world.connection(server.port, world.node_key())) as link:
            link.activate()


def test_the_coordinator_comes_back_and_the_round_goes_on(world: World, tmp_path: Path) -> None:
    # The process that serves sites stops while a site works; the one that runs the study notices nothing.
    entered, leave = threading.Event(), threading.Event()

    def slow(asked: Message) -> Message:
        entered.set()
        assert leave.wait(30)
        return echo(asked)

    server = world.server()
    with server:
        port = server.port
        runner = node(world, port, world.node_key(), slow, tmp_path / "a.state")
        tally = runner.__enter__()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(ask(world, timeout=40)))
        asking.start()
        assert entered.wait(20)
    leave.set()
    until(lambda: tally.retries > 0)
    with world.server(port):
        asking.join(30)
        runner.__exit__(None, None, None)
    assert list(answers.values()) == [echo(ASKED)]


def test_a_site_that_died_over_a_message_takes_it_up_again_at_once(world: World, port: int, tmp_path: Path) -> None:
    key, note = world.node_key(), tmp_path / "a.state"
    with world.link.run() as grid:
        exchange = GridExchange(grid, 0.02)
        # As a process that is killed: it took the message, wrote its note and was gone, still signed on.
        with connected(world.connection(port, key)) as link:
            number = link.activate()
            answers: dict[int, Message] = {}
            asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=40)))
            asking.start()
            received = link.receive()
            while received is None:
                received = link.receive()
            NodeState(note).write(number, received, 1)
        started = time.monotonic()
        with node(world, port, key, echo, note):
            asking.join(30)
        assert answers == {number: echo(ASKED)}
        assert time.monotonic() - started < 25  # Flower's own wait for a lost node is 60 seconds


def test_a_message_that_kills_the_site_twice_is_refused_then(world: World, port: int, tmp_path: Path) -> None:
    key, note, asked = world.node_key(), tmp_path / "a.state", []
    with world.link.run() as grid, connected(world.connection(port, key)) as link:
        exchange = GridExchange(grid, 0.02)
        number = link.activate()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=40)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        NodeState(note).write(number, received, 2)
        with node(world, port, key, lambda message: asked.append(message) or echo(message), note):  # type: ignore[func-returns-value]
            asking.join(30)
    assert asked == []
    assert isinstance(answers[number], Failure)


def test_a_message_that_was_lost_on_the_way_is_given_again(world: World, port: int, tmp_path: Path) -> None:
    key = world.node_key()
    with connected(world.connection(port, key)) as link, world.link.run() as grid:
        number = link.activate()
        asked = GridExchange(grid, 0.01).ask({number: Secured("study", 1, "nonce", b"x")}, timeout=20)
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(dict, asked)
            first = None
            while first is None:
                first = link.receive()
            # Its announcement was cut off: the node knows nothing of it, and asks for the next.
            again = link.receive()
            assert again is not None
            assert again.header.metadata.message_id == first.header.metadata.message_id
            link.send(reply_to(again, Secured("study", 1, "nonce", b"y")))
            assert answered.result(20) == {number: Secured("study", 1, "nonce", b"y")}
            assert link.receive() is None


def test_a_message_that_a_node_gives_up_is_not_given_for_ever(world: World, port: int) -> None:
    key = world.node_key()
    with connected(world.connection(port, key)) as link, world.link.run() as grid:
        number = link.activate()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(dict, GridExchange(grid, 0.01).ask({number: Secured("study", 1, "nonce", b"x")}, timeout=4))
            until(lambda: number in world.link.waiting())
            assert [link.receive() is not None for _ in range(5)] == [True, True, True, False, False]


def test_a_repeated_answer_is_stored_once_and_is_the_same(world: World, port: int) -> None:
    with world.link.run() as grid, connected(world.connection(port, world.node_key())) as link:
        exchange = GridExchange(grid, 0.02)
        number = link.activate()
        answers: list[tuple[int, Message]] = []
        asking = threading.Thread(target=lambda: answers.extend(exchange.ask({number: ASKED}, timeout=20)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        reply = reply_to(received, echo(link.fetch(received)))
        for _ in range(3):
            link.send(reply)
        asking.join(20)
        link.send(reply)
    assert answers == [(number, echo(ASKED))]


def test_an_answer_in_the_name_of_another_node_is_not_taken(world: World, port: int) -> None:
    with (
        world.link.run() as grid,
        connected(world.connection(port, world.node_key())) as link,
        connected(world.connection(port, world.node_key())) as rogue,
    ):
        exchange = GridExchange(grid, 0.02)
        number, other = link.activate(), rogue.activate()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=20)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        assert rogue.receive() is None
        false = reply_to(received, Failure("Rogue", "", ""))
        with pytest.raises(NotAdmittedError):
            rogue.send(false)  # in the other's name, from this one's connection
        false.header.metadata.__dict__["_src_node_id"] = other
        rogue.send(false)  # Flower does not store it
        link.send(reply_to(received, echo(link.fetch(received))))
        asking.join(20)
    assert answers == {number: echo(ASKED)}


def test_two_runs_on_one_state_do_not_mix(world: World, port: int, tmp_path: Path) -> None:
    with (
        node(world, port, world.node_key(), echo, tmp_path / "a.state"),
        world.link.run() as first,
        world.link.run() as second,
    ):
        until(lambda: len(online(world)) == 1)
        (number,) = online(world)
        for grid, body in ((first, b"1"), (second, b"2"), (first, b"3")):
            asked = {number: Secured("study", 1, "nonce", body)}
            assert dict(GridExchange(grid, 0.02).ask(asked, timeout=20)) == {number: echo(asked[number])}


def test_what_a_run_leaves_is_deleted(world: World, port: int, tmp_path: Path) -> None:
    with node(world, port, world.node_key(), echo, tmp_path / "a.state"):
        ask(world, b"x" * 2**20)
    objects = world.link._state.object_store
    assert len(objects) == 0


# Large objects


def objects_of(blob: bytes) -> tuple[str, str, Objects]:
    """Return the objects of a message, with the digests of its root and of its record."""
    parts = take_apart(FlowerMessage(pack(Secured("s", 1, "n", blob)), reply_to=received_of(ASKED).header))
    return parts.tree.object_id, parts.tree.children[0].children[0].object_id, parts


def files_of(world: World) -> list[str]:
    return sorted(file.name for file in (world.folder / "link.db.objects").iterdir())


def test_large_objects_lie_in_files_for_as_long_as_they_are_needed(world: World) -> None:
    store = world.link._state.object_store
    root, record, parts = objects_of(bytes(LARGE))
    store.preregister(1, parts.tree)
    assert store.get(record) == b""
    for name, content in parts.contents.items():
        store.put(name, content)
        store.put(name, content)
        assert store.get(name) == content
    assert files_of(world) == [record]
    assert (world.folder / "link.db.objects").stat().st_mode & 0o077 == 0
    assert (world.folder / "link.db").stat().st_size < LARGE * 2
    store.delete(root)
    assert store.get(record) is None
    assert files_of(world) == []


def test_an_object_is_what_its_digest_says_and_stands_for_no_file(world: World) -> None:
    store = world.link._state.object_store
    _, record, parts = objects_of(bytes(LARGE))
    store.preregister(1, parts.tree)
    mark = b"\x00in a file"
    with pytest.raises(ValueError, match="digest"):
        store.put(record, parts.contents[record] + b"x")
    forged = hashlib.sha256(mark).hexdigest()
    store.preregister(1, ObjectTree(object_id=forged))
    with pytest.raises(UnexpectedObjectContentError):
        store.put(forged, mark)
    with pytest.raises(ValueError, match="Invalid object ID"):
        store.preregister(1, ObjectTree(object_id="../../" + forged[6:]))
    with pytest.raises(NoObjectInStoreError):
        store.put(*next(iter(objects_of(b"x" * LARGE)[2].contents.items())))
    assert files_of(world) in ([], [objects_of(b"x" * LARGE)[1]])


def test_a_node_deletes_no_file_by_calling_it_an_object(world: World) -> None:
    key, victim = world.node_key(), world.folder / "victim"
    number = world.link.register(public_line(key))
    victim.write_text("here")
    with world.link.run() as grid:
        for name in ("../victim", str(victim), "link.db", "..", ".", "", "0" * 64):
            request = ConfirmMessageReceivedRequest(
                node=FlowerNode(node_id=number), run_id=grid.run.run_id, message_object_id=name
            )
            path = "/v1/fleet/confirm-message-received"
            assert world.link.call(path, request.SerializeToString(), number)[0] == 200
    assert victim.read_text() == "here"


def test_a_node_stores_no_more_than_one_answer_has_parts(world: World) -> None:
    # An answer is announced once or again, and what was announced may be sent: up to 512 MB for each object.
    number = world.link.register(public_line(world.node_key()))
    world.link._state.activate_node(number, 30.0)
    with world.link.run() as grid:
        grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
        (asked,) = world.link._state.get_message_ins(number, 1)
        reply = reply_to(Received(asked, ObjectTree()), ASKED)
        header, tree = message_to_proto(reply.header), reply.objects.tree
        wide = ObjectTree(object_id=tree.object_id, children=[ObjectTree(object_id=f"{n:064x}") for n in range(3)])
        for headers, trees in (
            ([header], [wide]),
            ([header], [ObjectTree(object_id="0" * 64)]),
            ([header, header], [tree, tree]),
            ([header], []),
            ([header], [tree]),
        ):
            push = PushMessagesRequest(
                node=FlowerNode(node_id=number), messages_list=headers, message_object_trees=trees
            )
            status, _ = world.link.call(PUSH, push.SerializeToString(), number)
            assert status == (200 if trees == [tree] else 400)
        assert "0" * 64 not in world.link._state.object_store


def test_parts_of_an_answer_are_not_read_while_one_is_withheld(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    number = world.link.register(public_line(world.node_key()))
    world.link._state.activate_node(number, 30.0)
    with world.link.run() as grid:
        (identity,) = grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
        (asked,) = world.link._state.get_message_ins(number, 1)
        content = RecordDict({"a": ConfigRecord({"x": bytes(LARGE)})})
        message = FlowerMessage(content, reply_to=asked)
        parts = take_apart(message)
        header = message_to_proto(remove_content_from_message(message))
        sender = FlowerNode(node_id=number)
        push = PushMessagesRequest(node=sender, messages_list=[header], message_object_trees=[parts.tree])
        session = PushMessagesResponse.FromString(world.link.call(PUSH, push.SerializeToString(), number)[1]).session_id
        record, withheld, root = part_names(parts.tree)

        def send(name: str) -> None:
            part = PushObjectRequest(
                node=sender,
                run_id=grid.run.run_id,
                object_id=name,
                object_content=parts.contents[name],
                session_id=session,
            )
            assert world.link.call(PUSH_OBJECT, part.SerializeToString(), number)[0] == 200

        send(record)
        send(root)
        read = watch(monkeypatch)
        for _ in range(3):
            assert list(grid.pull_messages([identity])) == []
        assert read.keys() <= {withheld}
        send(withheld)
        (whole,) = grid.pull_messages([identity])
        assert whole.content == content


def answered_by(world: World, port: int, grid: LinkGrid, body: bytes, stack: ExitStack) -> str:
    """Have a new node answer a message, and return the message's id."""
    link = stack.enter_context(connected(world.connection(port, world.node_key())))
    (identity,) = grid.push_messages([FlowerMessage(pack(ASKED), link.activate(), "train.secured", ttl=60.0)])
    received = link.receive()
    assert received is not None
    link.send(reply_to(received, Secured("study", 1, "nonce", body)))
    return identity


def test_a_node_stores_no_more_than_its_quota_over_all_messages_and_takes_nothing_from_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    # 512 MB for each part of an answer to each message: a member could fill the coordinator's disk.
    with world.server() as server, world.link.run(largest=LARGE) as grid, ExitStack() as stack:
        link = stack.enter_context(connected(world.connection(server.port, world.node_key())))
        number = link.activate()
        asked = list[str]()

        def answer() -> None:
            asked.extend(grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)]))
            found = link.receive()
            assert found is not None
            link.send(reply_to(found, Secured("study", 1, "nonce", bytes([len(asked)]) * (LARGE - 2000))))

        for _ in range(ANSWERS):
            answer()
        with pytest.raises(TooLargeError):
            answer()
        assert QUOTA in caplog.text
        answered_by(world, server.port, grid, bytes(LARGE), stack)  # another node is served
        assert len(list(grid.pull_messages(asked))) == ANSWERS
        answer()  # what the run has taken does not count


def test_an_answer_larger_than_its_study_needs_is_not_read(
    world: World, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A site may send 512 MB for each part of an answer; all of it would be in the coordinator's memory at once.
    with world.link.run(largest=2 * LARGE) as grid, ExitStack() as stack:
        large, fitting = (answered_by(world, port, grid, bytes(size), stack) for size in (2 * LARGE + 1, LARGE))
        read = watch(monkeypatch)
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages([large, fitting])}
        assert not replies[large].has_content() or replies[large].content == RecordDict()
        assert unpack(replies[fitting].content) == Secured("study", 1, "nonce", bytes(LARGE))
        assert max(read.values()) < 2 * LARGE
        assert files_of(world) == []


@pytest.mark.parametrize("sites", [3, 2**16])
def test_what_a_study_needs_is_not_too_large(sites: int) -> None:
    spec = AdapterSpec.of([TensorSpec("b", (3000, 1000), "lora_B"), TensorSpec("head", (3000,), "full")])
    layout = Layout(segments_of(study_of(), spec), 24, sites)
    assert layout.lanes == (1 if sites > 2**8 else 2)
    assert 8 * layout.words < largest_answer(spec)


def test_of_answers_that_come_together_one_is_in_memory_at_a_time(
    world: World, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.link.run() as grid, ExitStack() as stack:
        asked = [answered_by(world, port, grid, bytes([number]) * LARGE, stack) for number in range(3)]
        read = watch(monkeypatch)
        for count, _ in enumerate(grid.pull_messages(asked), 1):
            assert sum(size >= LARGE for size in read.values()) == count
        assert count == 3


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the objects that are read from now on, and their sizes."""
    read, get = dict[str, int](), FileObjectStore.get

    def watched(store: FileObjectStore, name: str) -> bytes | None:
        content = get(store, name)
        read[name] = len(content or b"")
        return content

    monkeypatch.setattr(FileObjectStore, "get", watched)
    return read


def test_a_file_that_goes_while_files_are_swept_away_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileObjectStore(world.folder / "link.db")
    gone = world.folder / "link.db.objects" / ("0" * 64)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([gone]))
    store.sweep()


def test_what_was_cut_short_is_swept_away_later(world: World) -> None:
    folder = world.folder / "link.db.objects"
    for name in ("0" * 64, "1" * 64 + ".part"):
        (folder / name).write_bytes(b"x")
    with world.link.run():
        assert len(files_of(world)) == 2  # another process may be writing them
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    with world.link.run():
        assert files_of(world) == []


@pytest.mark.parametrize("lost", [True, False])
def test_a_file_that_is_lost_or_spoilt_is_an_answer_that_did_not_arrive(world: World, port: int, lost: bool) -> None:
    with world.link.run() as grid, connected(world.connection(port, world.node_key())) as link:
        number = link.activate()
        (identity,) = grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
        received = link.receive()
        assert received is not None
        link.send(reply_to(received, Secured("study", 1, "nonce", bytes(LARGE))))
        (file,) = (world.folder / "link.db.objects").iterdir()
        file.unlink() if lost else file.write_bytes(bytes(10))
        (reply,) = grid.pull_messages([identity])
    assert not reply.has_content() or reply.content == RecordDict()


def test_an_answer_that_the_coordinator_cannot_store_is_sent_again(
    world: World, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failed = FileObjectStore.put, list[str]()

    def full(store: FileObjectStore, name: str, content: bytes) -> None:
        if len(content) >= LARGE and not failed:
            failed.append(name)
            raise OSError(28, "No space left on device")
        put(store, name, content)

    monkeypatch.setattr(FileObjectStore, "put", full)
    with node(world, port, world.node_key(), lambda asked: Secured("s", 1, "n", bytes(LARGE)), tmp_path / "a.state"):
        (answer,) = ask(world).values()
    assert answer == Secured("s", 1, "n", bytes(LARGE))
    assert failed


def test_a_note_that_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    note = tmp_path / "a.state"
    for text in ("", "[]", "{}", '{"node": 1, "message": "AAAA"}', '{"node": "x"}', json.dumps({"node": 1})[:-1]):
        note.write_text(text)
        with pytest.raises(StateError):
            NodeState(note).read()


def test_a_coordinator_cannot_send_a_site_elsewhere(world: World, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flower's client follows redirects; a site's requests would then go into the site's own network.
    with connected(world.connection(port, world.node_key())) as link:
        sent: list[str] = []

        def handler(request: httpx.Request) -> httpx.Response:
            sent.append(str(request.url))
            return httpx.Response(307, headers={"location": "http://10.0.0.1/admin", "content-length": "0"})

        monkeypatch.setattr(link._client._client, "_transport_for_url", lambda url: httpx.MockTransport(handler))
        with pytest.raises(UntrustedError):
            link.activate()
    assert len(sent) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": str(2**40)},
        {"content-length": "x"},
        {"transfer-encoding": "chunked"},
        {"content-length": "10", "content-encoding": "gzip"},
    ],
)
def test_an_answer_that_is_too_large_is_not_read(
    world: World, port: int, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError("it was read")

    with connected(world.connection(port, world.node_key())) as link:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, stream=Endless()))
        monkeypatch.setattr(link._client._client, "_transport_for_url", lambda url: transport)
        with pytest.raises(UntrustedError, match="expected an uncompressed one of at most"):
            link.activate()


def test_nothing_but_what_privet_sends_is_put_together() -> None:
    message = FlowerMessage(pack(ASKED), reply_to=received_of(ASKED).header)
    whole = take_apart(message)
    root = whole.tree.object_id
    assert unpack(put_together(root, whole.contents).content) == ASKED
    array = FlowerMessage(RecordDict({"a": ArrayRecord([np.zeros(2)])}), reply_to=received_of(ASKED).header)
    for other in (array, FlowerMessage(RecordDict({"a": MetricRecord({"b": 1})}), reply_to=received_of(ASKED).header)):
        parts = take_apart(other)
        with pytest.raises(ProtocolError, match=r"of a kind that privet does not send|at most 3 parts"):
            put_together(parts.tree.object_id, {n: parts.contents[n] for n in part_names(parts.tree)})
    for name, content in whole.contents.items():
        with pytest.raises(ProtocolError):
            put_together(root, {**whole.contents, name: content + b"x"})
        with pytest.raises(ProtocolError):
            put_together(root, {n: c for n, c in whole.contents.items() if n != name})
    record = whole.tree.children[0].object_id
    with pytest.raises(ProtocolError, match="cannot be joined to a whole message"):
        put_together(record, whole.contents)


_VALUES = st.one_of(st.binary(max_size=300), st.text(st.characters(exclude_categories=["Cs"]), max_size=200))


@given(st.dictionaries(st.text("abc.\u00e4", min_size=1, max_size=150), _VALUES, max_size=5))
def test_a_record_is_written_as_flower_writes_it(values: dict[str, str | bytes]) -> None:
    record = ConfigRecord(dict(values))
    assert deflate(record) == record.deflate()
    assert deflate(ConfigRecord({**values, "n": 1})) is None
    content = RecordDict({"a": record})
    message = FlowerMessage(content, reply_to=received_of(ASKED).header)
    parts = take_apart(message)
    assert {get_object_id(content) for content in parts.contents.values()} == parts.contents.keys()
    assert set(part_names(parts.tree)) == parts.contents.keys()
    assert parts.tree.object_id == get_object_id(message.deflate())
    assert put_together(parts.tree.object_id, parts.contents).content == content


def test_a_large_record_is_written_as_flower_writes_it() -> None:
    record = ConfigRecord({"kind": "secured", "blob.body": bytes(2**21 + 5)})
    assert deflate(record) == record.deflate()


@given(st.binary(max_size=200))
def test_a_part_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    name = hashlib.sha256(content).hexdigest()
    with pytest.raises(ProtocolError):
        put_together(name, {name: content})


def received_of(asked: Message) -> Received:
    """Return a message as a node sees it announced, made without a server."""
    MemoryGrid(ClientApp(), {})  # sets the identity that Flower's messages need
    message = FlowerMessage(pack(asked), 7, "train.secured", ttl=60.0)
    return Received(message, take_apart(message).tree)


def test_a_received_message_survives_being_written_down() -> None:
    received = received_of(ASKED)
    again = Received.from_bytes(received.to_bytes())
    assert (again.run, again.tree) == (received.run, received.tree)
    assert again.header.metadata.message_id == received.header.metadata.message_id


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 413, 500, 503])
def test_no_status_of_a_coordinator_ends_the_process(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    # Flower's own loop would end it, by a signal to itself.
    link = world.connection(9, world.node_key(register=False))
    transport = httpx.MockTransport(lambda request: httpx.Response(status, headers={"content-length": "0"}))
    monkeypatch.setattr(link._client._client, "_transport_for_url", lambda url: transport)
    tally = Tally()
    runner = Connection(link, lambda read: read(), NodeState(tmp_path / "a.state"), tally)
    thread = threading.Thread(target=runner.serve, daemon=True)
    thread.start()
    until(lambda: tally.retries >= 1)
    runner.stop.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
def test_a_message_without_a_sensible_time_to_live_is_not_taken(ttl: float) -> None:
    received = received_of(ASKED)
    received.header.metadata.ttl = ttl
    with pytest.raises(StateError):
        Received.from_bytes(received.to_bytes())


# Flower's internals


def test_flowers_fleet_api_has_the_calls_that_a_site_makes_and_no_new_ones() -> None:
    own = [f for f in vars(fleet_handlers).values() if getattr(f, "__module__", "") == fleet_handlers.__name__]
    names = {"/v1/fleet/" + f.__name__.replace("_", "-") for f in own if inspect.isfunction(f)}
    names = {name for name in names if not name.startswith("/v1/fleet/-")}
    flowers = USED - {TAKE, GIVE}
    assert names >= flowers, "Flower's fleet calls have other names now: read its changes, then server/network/link.py"
    ours = {"/v1/fleet/" + name for name in ("get-fab", "get-run", "register-node", "unregister-node")}
    assert names - flowers == ours, "Flower has a new fleet call: decide whether sites need it"
    routed = {(method, path) for method, path in PROTOBUF_REQUEST_TYPES if path in USED}
    assert routed == {("POST", path) for path in flowers}
    for path in flowers:
        assert PROTOBUF_REQUEST_TYPES["POST", path] is _CALLS[path][0]


def test_the_link_state_and_the_client_have_what_the_adapter_uses() -> None:
    for owner, names in {
        SqlLinkState: (
            "create_node delete_node get_node_id_by_public_key get_node_info get_nodes create_run get_run_info "
            "claim_task activate_task acknowledge_task_heartbeat finish_task cleanup_run start_session store_object "
            "store_message_and_object_tree get_message_res get_object delete_messages session query object_store"
        ),
        SqlObjectStore: "put get delete preregister get_object_tree initialize __contains__",
        FleetHttpClient: (
            "ActivateNode DeactivateNode SendNodeHeartbeat PullMessages PushMessages PullObject PushObject "
            "ConfirmMessageReceived"
        ),
    }.items():
        missing = [name for name in names.split() if not hasattr(owner, name)]
        assert missing == [], (
            f"Flower's {owner.__name__} lost {missing}: see server/network/link.py, client/network/fleet.py"
        )
    client = FleetHttpClient("https://127.0.0.1:1")
    assert isinstance(client._client, httpx.Client), "the adapter closes it, stops its redirects and caps its answers"


def test_the_link_state_still_says_what_waits_for_whom(world: World) -> None:
    key = world.node_key()
    number = world.link.register(public_line(key))
    world.link._state.activate_node(number, 30.0)
    assert world.link.waiting() == frozenset()
    with world.link.run() as grid:
        message = FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)
        assert all(grid.push_messages([message]))
        assert world.link.waiting() == {number}
    assert world.link.waiting() == frozenset()
