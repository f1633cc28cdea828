"""A message with its parts in one request: what is stored, what is refused, and who still speaks the longer way."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message as FlowerMessage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import SqlLinkState
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from privet.client.network.fleet import Received, Reply, TooLargeError, connected, reply_to
from privet.common.flower.bundles import GIVE, INLINE, TAKE, Bundle
from privet.common.flower.objects import part_names
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import Secured
from privet.server.network import gate, link
from privet.server.network.changes import Changes
from privet.server.network.gate import QUOTA, Limits
from privet.server.network.link import PUSH, LinkGrid
from tests.support.fleet_world import World, public_line, until

ASKED = Secured("study", 1, "nonce", b"asked")


def test_a_bundle_says_what_was_put_in() -> None:
    bundle = Bundle()
    bundle.ParseFromString(Bundle([b"a", b"", b"bc"]).SerializeToString())
    assert bundle.pieces == (b"a", b"", b"bc")


@given(st.binary(max_size=40))
def test_any_bytes_are_one_bundle_or_none(data: bytes) -> None:
    bundle = Bundle()
    try:
        bundle.ParseFromString(data)
    except DecodeError:
        return
    assert bundle.SerializeToString() == data


def test_a_bundle_has_few_pieces() -> None:
    with pytest.raises(DecodeError):
        Bundle().ParseFromString(bytes(4 * 1000))


@dataclass
class Asked:
    """A node that was asked something, at the link state without a network between."""

    world: World
    grid: LinkGrid
    number: int
    message: str

    def take(self) -> tuple[PullMessagesResponse, tuple[bytes, ...]]:
        """Take the next message as a bundle: what was announced, and its parts."""
        request = PullMessagesRequest(node=Node(node_id=self.number))
        status, body = self.world.link.call(TAKE, request.SerializeToString(), self.number)
        assert status == 200
        bundle, announced = Bundle(), PullMessagesResponse()
        bundle.ParseFromString(body)
        announced.ParseFromString(bundle.pieces[0])
        return announced, bundle.pieces[1:]

    def reply(self, body: bytes = b"answer") -> Reply:
        (asked,) = self.world.link._state.get_message_ins(self.number, 1)
        return reply_to(Received(asked, None), Secured("study", 1, "nonce", body))

    def push(self, reply: Reply, node: int | None = None) -> PushMessagesRequest:
        return PushMessagesRequest(
            node=Node(node_id=self.number if node is None else node),
            messages_list=[message_to_proto(reply.header)],
            message_object_trees=[reply.objects.tree],
        )

    def give(self, push: PushMessagesRequest, *parts: bytes) -> int:
        bundle = Bundle([push.SerializeToString(), *parts])
        return self.world.link.call(GIVE, bundle.SerializeToString(), self.number)[0]

    def answers(self) -> list[Any]:
        return list(self.grid.pull_messages([self.message]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def asked(world: World) -> Iterator[Asked]:
    number = world.link.register(public_line(world.node_key()))
    world.link._state.activate_node(number, 30.0)
    with world.link.run() as grid:
        (identity,) = grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
        yield Asked(world, grid, number, identity)


def parts_of(reply: Reply) -> list[bytes]:
    return [reply.objects.contents[name] for name in part_names(reply.objects.tree)]


def test_a_message_is_taken_with_its_parts(asked: Asked) -> None:
    announced, parts = asked.take()
    names = part_names(announced.message_object_trees[0])
    assert {name: asked.world.link._state.object_store.get(name) for name in names} == dict(
        zip(names, parts, strict=True)
    )
    assert asked.take()[1] == parts  # not answered, so it was lost on the way


def test_an_answer_is_stored_whole_and_confirms_the_message(asked: Asked) -> None:
    reply = asked.reply()
    for _ in range(2):  # the answer to the first call was lost
        assert asked.give(asked.push(reply), *parts_of(reply)) == 200
        assert asked.message not in asked.world.link._state.object_store
    (answer,) = asked.answers()
    assert unpack(answer.content) == Secured("study", 1, "nonce", b"answer")
    assert asked.give(asked.push(reply), *parts_of(reply)) == 200
    assert asked.answers() == []


def test_what_is_refused_leaves_nothing_behind(asked: Asked) -> None:
    reply, other = asked.reply(), asked.world.link.register(public_line(asked.world.node_key()))
    parts = parts_of(reply)
    for expected, push, pieces in (
        (400, asked.push(reply), [parts[0] + b"x", *parts[1:]]),  # another digest
        (400, asked.push(reply), [*parts[:2], b"\x00" * len(parts[2])]),
        (400, asked.push(reply), [b"", *parts[1:]]),
        (400, asked.push(reply), parts[:2]),
        (400, asked.push(reply), [*parts, b"more"]),
        (400, PushMessagesRequest(node=Node(node_id=asked.number)), parts),
        (401, asked.push(reply, node=other), parts),
        (401, asked.push(reply, node=0), parts),
    ):
        assert asked.give(push, *pieces) == expected
        assert asked.answers() == []
    for body in (b"", b"\x00", b"\x00\x00\x00\x09", b"\xff" * 50):
        assert asked.world.link.call(GIVE, body, asked.number)[0] in (400, 401)
    assert asked.give(asked.push(reply), *parts) == 200
    assert len(asked.answers()) == 1


@pytest.mark.parametrize("path", [GIVE, PUSH])
@pytest.mark.parametrize("field", ["ttl", "created_at"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_of_no_time_is_refused_and_stops_no_run(asked: Asked, path: str, field: str, value: float) -> None:
    reply = asked.reply()
    push = asked.push(reply)
    setattr(push.messages_list[0].metadata, field, value)
    body = push if path == PUSH else Bundle([push.SerializeToString(), *parts_of(reply)])
    assert asked.world.link.call(path, body.SerializeToString(), asked.number)[0] == 400
    assert asked.answers() == []
    assert asked.give(asked.push(reply), *parts_of(reply)) == 200
    assert len(asked.answers()) == 1


def test_a_part_that_was_announced_with_false_children_makes_no_message_undeliverable(asked: Asked) -> None:
    announced, parts = asked.take()
    leaf = part_names(announced.message_object_trees[0])[0]
    store = asked.world.link._state.object_store
    store.delete(asked.message)  # as if the node had confirmed it
    assert leaf not in store
    push = asked.push(reply_to(Received(message_from_proto(announced.messages_list[0]), None), ASKED))
    root = push.message_object_trees[0].object_id
    false = ObjectTree(object_id=leaf, children=[ObjectTree(object_id="0" * 64)])
    push.message_object_trees[0].CopyFrom(ObjectTree(object_id=root, children=[false]))
    assert asked.world.link.call(PUSH, push.SerializeToString(), asked.number)[0] == 200
    assert leaf in store
    other = asked.world.link.register(public_line(asked.world.node_key()))
    asked.world.link._state.activate_node(other, 30.0)
    (message,) = asked.grid.push_messages([FlowerMessage(pack(ASKED), other, "train.secured", ttl=60.0)])
    assert Asked(asked.world, asked.grid, other, message).take()[1] == (*parts[:2], store.get(message))
    store.delete(root)  # the false announcement goes, and what the message needs stays
    assert store.get(leaf) == parts[0]


def test_a_bundle_cannot_replace_a_part_by_false_ones(asked: Asked) -> None:
    announced, _ = asked.take()
    store, tree = asked.world.link._state.object_store, announced.message_object_trees[0]
    leaf = part_names(tree)[0]
    reply = reply_to(Received(message_from_proto(announced.messages_list[0]), None), ASKED)
    push, parts = asked.push(reply), parts_of(reply)
    false = ObjectTree(object_id=leaf, children=[ObjectTree(object_id="0" * 64)])
    push.message_object_trees[0].CopyFrom(
        ObjectTree(object_id=push.message_object_trees[0].object_id, children=[false])
    )
    for pieces in (parts, [b"x", parts[0], parts[2]], [b"x", b"y", parts[2]]):
        assert asked.give(push, *pieces) == 400
    assert store.get_object_tree(asked.message) == tree
    assert asked.answers() == []


def test_what_is_for_one_node_is_neither_given_to_another_nor_deleted_by_it(asked: Asked) -> None:
    announced, parts = asked.take()
    other = asked.world.link.register(public_line(asked.world.node_key()))
    run, tree = announced.messages_list[0].metadata.run_id, announced.message_object_trees[0]
    for node, found in ((other, False), (asked.number, True)):
        for name, part in zip(part_names(tree), parts, strict=True):
            pull = PullObjectRequest(node=Node(node_id=node), run_id=run, object_id=name)
            status, body = asked.world.link.call(link.PULL_OBJECT, pull.SerializeToString(), node)
            answer = PullObjectResponse.FromString(body)
            assert (status, answer.object_found, answer.object_content == part) == (200, found, found)
    for node, status in ((other, 401), (asked.number, 200), (asked.number, 200)):
        confirm = ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=run, message_object_id=tree.object_id
        ).SerializeToString()
        assert asked.world.link.call(f"{link.FLEET}confirm-message-received", confirm, node)[0] == status
        assert (asked.message in asked.world.link._state.object_store) is (node == other)


@pytest.mark.parametrize("inside", [False, True])
def test_an_answer_names_no_message_as_its_own_part(asked: Asked, inside: bool) -> None:
    other = asked.world.link.register(public_line(asked.world.node_key()))
    asked.world.link._state.activate_node(other, 30.0)
    (victim,) = asked.grid.push_messages([FlowerMessage(pack(ASKED), other, "train.secured", ttl=60.0)])
    store, push = asked.world.link._state.object_store, asked.push(asked.reply())
    tree = store.get_object_tree(victim)
    if inside:
        push.message_object_trees[0].CopyFrom(ObjectTree(object_id=push.message_object_trees[0].object_id))
        push.message_object_trees[0].children.append(ObjectTree(object_id=victim))
    else:
        push.message_object_trees[0].CopyFrom(tree)
        push.messages_list[0].metadata.message_id = victim
    assert asked.world.link.call(PUSH, push.SerializeToString(), asked.number)[0] == 400
    assert asked.answers() == []
    assert len(Asked(asked.world, asked.grid, other, victim).take()[1]) == 3


def test_a_bundle_is_answered_in_the_nodes_own_name_alone(asked: Asked) -> None:
    other = asked.world.link.register(public_line(asked.world.node_key()))
    request = PullMessagesRequest(node=Node(node_id=asked.number)).SerializeToString()
    assert asked.world.link.call(TAKE, request, other) == (401, b"")
    reply = asked.reply()
    reply.header.metadata.__dict__["_src_node_id"] = asked.number
    bundle = Bundle([asked.push(reply, node=other).SerializeToString(), *parts_of(reply)])
    assert asked.world.link.call(GIVE, bundle.SerializeToString(), other)[0] == 401
    assert asked.answers() == []


def test_no_query_is_made_while_nothing_has_changed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    reply, queries, query = asked.reply(), list[Any](), SqlLinkState.query

    def counted(state: SqlLinkState, *told: Any) -> list[dict[str, Any]]:
        queries.append(told)
        return query(state, *told)

    assert asked.answers() == []
    asked.grid._look_at = 1e12  # the look of each second is not what is tested
    monkeypatch.setattr(SqlLinkState, "query", counted)
    assert asked.answers() == asked.answers() == []
    assert queries == []
    asked.give(asked.push(reply), *parts_of(reply))
    assert len(asked.answers()) == 1
    assert queries


def test_an_iteration_that_is_left_loses_no_answer(world: World) -> None:
    numbers = [world.link.register(public_line(world.node_key())) for _ in range(2)]
    with world.link.run() as grid:
        identities = []
        for number in numbers:
            world.link._state.activate_node(number, 30.0)
            (identity,) = grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
            identities.append(identity)
            node = Asked(world, grid, number, identity)
            reply = node.reply()
            node.give(node.push(reply), *parts_of(reply))
        first = next(iter(grid.pull_messages(identities)))
        grid._look_at = 1e12
        (second,) = grid.pull_messages(identities)
        assert {each.metadata.reply_to_message_id for each in (first, second)} == set(identities)


def test_a_change_is_what_another_connection_committed(tmp_path: Path) -> None:
    file = tmp_path / "a database.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (x)")
        changes = Changes(file)
        assert [changes.seen() for _ in range(3)] == [True, False, False]
        database.execute("INSERT INTO t VALUES (1)")
        assert not changes.seen()  # not committed yet
        database.commit()
        assert [changes.seen() for _ in range(2)] == [True, False]
    with pytest.raises(sqlite3.Error):
        Changes(tmp_path / "none.db").seen()
    assert not (tmp_path / "none.db").exists()


@pytest.mark.slow
def test_an_exchange_takes_two_requests_and_an_older_coordinator_is_understood(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(size: int) -> list[str]:
        with world.server() as server, world.link.run() as grid:
            moved: list[str] = []
            with connected(world.connection(server.port, world.node_key())) as node:
                post = node._client._unary_unary

                def counted(path: str, **call: Any) -> Any:
                    moved.append(path)
                    return post(path=path, **call)

                monkeypatch.setattr(node._client, "_unary_unary", counted)
                number = node.activate()
                grid.push_messages([FlowerMessage(pack(ASKED), number, "train.secured", ttl=60.0)])
                received = node.receive()
                assert received is not None
                assert node.fetch(received) == ASKED
                answer = Secured("study", 1, "nonce", bytes(size))
                if not node.send(reply_to(received, answer)):
                    node.confirm(received)
                (found,) = grid.pull_messages([received.tree.object_id])
                assert unpack(found.content) == answer
            return [path.rpartition("/")[2] for path in moved[1:]]

    assert exchange(10) == ["take", "give"]
    assert exchange(INLINE)[:1] == ["take"]
    older = frozenset(path for path in link.USED if path not in (TAKE, GIVE))
    monkeypatch.setattr(gate, "USED", older)
    assert exchange(10)[:2] == ["take", "pull-messages"]


@pytest.mark.slow
def test_a_bundle_counts_against_the_nodes_quota(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with (
        world.server() as server,
        world.link.run(largest=1000) as grid,
        connected(world.connection(server.port, world.node_key())) as node,
    ):
        grid.push_messages([FlowerMessage(pack(ASKED), node.activate(), "train.secured", ttl=60.0)])
        received = node.receive()
        assert received is not None
        with pytest.raises(TooLargeError):
            node.send(reply_to(received, Secured("study", 1, "nonce", bytes(5000))))
        until(lambda: QUOTA in caplog.text)


@pytest.mark.slow
def test_a_message_lost_on_the_way_is_given_again_without_a_wait_and_not_for_ever(world: World) -> None:
    with (
        world.server(limits=Limits(hold_seconds=2.0)) as server,
        world.link.run() as grid,
        connected(world.connection(server.port, world.node_key())) as node,
    ):
        grid.push_messages([FlowerMessage(pack(ASKED), node.activate(), "train.secured", ttl=60.0)])
        started = time.monotonic()
        for _ in range(3):  # a node that asks once more has not received what it was given
            received = node.receive()
            assert received is not None
            assert node.fetch(received) == ASKED
        assert time.monotonic() - started < 1.9
        assert node.receive() is None
        assert time.monotonic() - started >= 2.0
