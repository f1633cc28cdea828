"""The coordinator's side of Flower's deployment engine, in this process: its link state, its fleet calls and a grid.

Flower's SuperLink serves three APIs on one port, two of them without authentication, and starts other processes that
run the code it receives. This module uses only its state and the handlers of its fleet API: the control and runtime
APIs do not exist. Two processes may open one state, one that serves sites and one that runs a study: they communicate
through SQLite. `tests/system/test_fleet.py` fails when the internals used here move.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TIMESTAMP_HEADER,
    Status,
    SubStatus,
)
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink.servicer.fleet import fleet_handlers as handlers
from google.protobuf.message import DecodeError

from privet.common.errors import ProtocolError, StateError
from privet.common.flower.bundles import GIVE, TAKE, Bundle
from privet.common.flower.objects import MOST_PARTS, part_names, put_together, take_apart
from privet.server.network.changes import Changes
from privet.server.network.nodes import CLOCK_SECONDS, RegisteredNode, flowers_key
from privet.server.network.store import FileObjectStore, open_state

_log = logging.getLogger("privet.coordinator")
FLEET = "/v1/fleet/"
MEDIA_TYPE = PROTOBUF_MEDIA_TYPE.encode("ascii")
PULL, PUSH = FLEET + "pull-messages", FLEET + "push-messages"
PULL_OBJECT, PUSH_OBJECT = FLEET + "pull-object", FLEET + "push-object"
_Handler = Callable[[Any, LinkState], Any]
# The calls that a privet site makes, each with Flower's own handler. Flower's other calls would fetch a bundle of code
# or register a node; they do not exist here.
_CALLS: Mapping[str, tuple[type[Any], _Handler]] = {
    FLEET + "activate-node": (ActivateNodeRequest, lambda r, s: handlers.activate_node(request=r, state=s)),
    FLEET + "deactivate-node": (DeactivateNodeRequest, lambda r, s: handlers.deactivate_node(request=r, state=s)),
    FLEET + "send-node-heartbeat": (
        SendNodeHeartbeatRequest,
        lambda r, s: handlers.send_node_heartbeat(request=r, state=s),
    ),
    PULL: (PullMessagesRequest, lambda r, s: handlers.pull_messages(request=r, state=s, store=s.object_store)),
    PUSH: (PushMessagesRequest, lambda r, s: handlers.push_messages(request=r, state=s)),
    PULL_OBJECT: (PullObjectRequest, lambda r, s: handlers.pull_object(request=r, state=s)),
    PUSH_OBJECT: (PushObjectRequest, lambda r, s: handlers.push_object(request=r, state=s)),
    FLEET + "confirm-message-received": (
        ConfirmMessageReceivedRequest,
        lambda r, s: handlers.confirm_message_received(request=r, state=s, store=s.object_store),
    ),
}
USED = frozenset({*_CALLS, TAKE, GIVE})
"""The paths of all calls."""
STORING = frozenset({PUSH_OBJECT, GIVE})
"""The paths of calls that store objects."""

_HEARTBEAT = HEARTBEAT_DEFAULT_INTERVAL / 3
_WHOLE = "SELECT 1 FROM objects WHERE object_id = :id AND is_available = 1"
_ANSWERED = "SELECT 1 FROM message_res WHERE run_id = :run AND delivered_at = '' LIMIT 1"
_WAITING = (
    "SELECT message_id, dst_node_id, delivered_at FROM message_ins WHERE delivered_at = '' "
    "OR message_id NOT IN (SELECT reply_to_message_id FROM message_res)"
)
# Messages that a node was given and did not answer; at its next call for messages they are lost.
_LOST = (
    "SELECT message_id FROM message_ins WHERE dst_node_id = :node AND delivered_at != '' "
    "AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)"
)
_AGAIN = "UPDATE message_ins SET delivered_at = '' WHERE message_id = :id"
_MOST_TIMES = 3
LARGEST = 2**29
"""Most bytes of an answer, unless the caller gives the limit of its study."""
ANSWERS = 3
"""A node may store so many answers at a time: one that is being taken, one that is late, and one that is sent again."""
_LARGEST_KEY = "largest"
_COUNT_SECONDS = 10.0
# The objects of a node's answers, and their size in the database. `UNION` keeps each object once.
_STORED = (
    "WITH RECURSIVE part(id) AS (SELECT message_id FROM message_res WHERE src_node_id = :node "
    "UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id) "
    "SELECT object_id, LENGTH(content) AS size FROM objects JOIN part ON object_id = part.id"
)
# The objects of a message.
_PARTS = (
    "WITH RECURSIVE part(id) AS (SELECT :id "
    "UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id) "
    "SELECT object_id, is_available FROM objects JOIN part ON object_id = part.id LIMIT :most"
)
_FOR_ANOTHER = "SELECT 1 FROM message_ins WHERE message_id = :id AND dst_node_id != :node"
_ADDRESSED = (
    "WITH RECURSIVE part(id) AS (SELECT message_id FROM message_ins WHERE dst_node_id = :node "
    "UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id) SELECT 1 FROM part WHERE id = :id"
)
# Messages, and answers of other nodes, among the objects of a message.
_NAMED = ", ".join(f":name{number}" for number in range(MOST_PARTS))
_OTHERS = (
    f"SELECT 1 FROM message_ins WHERE message_id IN ({_NAMED}) UNION ALL "  # noqa: S608 - names of parameters
    f"SELECT 1 FROM message_res WHERE message_id IN ({_NAMED}) AND src_node_id != :node LIMIT 1"
)
_OVER = 403  # Flower's status for a run that has ended
_REMOVED = "SELECT 1 FROM node WHERE public_key = :key LIMIT 1"


@dataclass(frozen=True)
class SignedHeaders:
    """The claims in the headers of a node's request, not verified yet."""

    public_key: bytes
    timestamp: str
    signature: bytes


class Objection(StrEnum):
    """Why a request is not admitted. The application log names the reason; the caller is not told."""

    UNKNOWN = "the node is not registered"
    REMOVED = "the node was removed"
    STALE = "the signature is not of this time"
    FORGED = "the signature does not verify"


class Link:
    """Flower's link state in an SQLite file: the nodes that may connect, and the messages under way."""

    def __init__(self, database: Path) -> None:
        self.directory = database.parent
        """Where large objects may be kept for a moment."""
        self._state = open_state(database)
        self._database = database
        self._changes = Changes(database)
        self._quota = 0
        self._counting = threading.Lock()
        self._counted: dict[int, tuple[float, int]] = {}
        self._given: Counter[str] = Counter()

    def register(self, public_key: bytes) -> int:
        """Admit a node by its public key (OpenSSH, as in a site's request to join) and return its id.

        Raises:
            StateError: It is not such a key, or was admitted and removed before: Flower never admits it again.
        """
        public_key = flowers_key(public_key)
        known = self._state.get_node_id_by_public_key(public_key)
        if known is not None:
            return known
        try:
            return self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, HEARTBEAT_DEFAULT_INTERVAL)
        except ValueError:
            hint = "run `privet coordinator invite SITE`; the site then joins with new keys: `privet site join TOKEN`"
            raise StateError(
                "the site's node key belonged to a removed site, and cannot be admitted again", hint
            ) from None

    def owners(self, names: Mapping[bytes, str]) -> Mapping[int, str]:
        """Return the names of the nodes' owners by node.

        Args:
            names: Names by public key (OpenSSH).
        """
        owned = {flowers_key(key): name for key, name in names.items()}
        return {node.id: owned[node.public_key] for node in self.nodes() if node.public_key in owned}

    def unregister(self, public_key: bytes) -> None:
        """Remove a node: all its later calls are refused. Does nothing for a key that is not registered."""
        public_key = flowers_key(public_key)
        node = self._state.get_node_id_by_public_key(public_key)
        if node is not None:
            self._state.delete_node(NOOP_FLWR_AID, node)

    def nodes(self) -> Sequence[RegisteredNode]:
        """Return the registered nodes, by id."""
        found = self._state.get_node_info(owner_aids=[NOOP_FLWR_AID])
        registered = [info for info in found if info.status != NodeStatus.UNREGISTERED]
        nodes = [
            RegisteredNode(info.node_id, info.public_key, info.status == NodeStatus.ONLINE, info.online_until or None)
            for info in registered
        ]
        return sorted(nodes, key=lambda node: node.id)

    def waiting(self) -> frozenset[int]:
        """Return the nodes for which a message is waiting: one quick query, so that it can be called often.

        A message that was given to a node and is not answered is among them: a node that asks has lost it on the way.
        """
        return frozenset(
            int64_to_uint64(row["dst_node_id"])
            for row in _sql(self._state).query(_WAITING)
            if not row["delivered_at"] or self._given[row["message_id"]] < _MOST_TIMES - 1
        )

    def changed(self) -> bool:
        """Return whether anything in the link state changed since the last call. Much cheaper than a query."""
        return self._changes.seen()

    def has_room(self, node: int, size: int) -> bool:
        """Whether a node may store so many bytes more, beside what it stores now.

        Its quota is for all its answers together: `ANSWERS` times the largest answer of each running study.
        """
        with self._counting:
            counted, stored = self._counted.get(node, (-math.inf, 0))
            # What a node stores only falls by itself, so a count that grows with each object is never too low. It is
            # compared with the database when it is old, or when an object would not fit.
            if time.monotonic() - counted > _COUNT_SECONDS or stored + size > self._quota:
                running = self._state.get_run_info(statuses=["running"])
                self._quota = ANSWERS * sum(int(run.override_config.get(_LARGEST_KEY, LARGEST)) for run in running)
                counted, stored = time.monotonic(), sum(self._stored(node))
            fits = stored + size <= self._quota
            self._counted[node] = counted, stored + size if fits else stored
            return fits

    def _stored(self, node: int) -> Iterator[int]:
        """Yield the bytes of each object in a node's answers that the run has not taken yet."""
        store = self._state.object_store
        for row in _sql(self._state).query(_STORED, {"node": uint64_to_int64(node)}):
            yield int(row["size"])
            if isinstance(store, FileObjectStore):
                yield store.size(row["object_id"])

    def admits(self, signed: SignedHeaders) -> int | Objection:
        """Return the registered node that signed this timestamp recently, or why the request is not admitted.

        Checks what Flower's own middleware checks, with two differences: `call` makes the checks against the body, and
        a node's clock may be as far ahead as behind.
        """
        try:
            age = (now() - datetime.fromisoformat(signed.timestamp)).total_seconds()
            if abs(age) >= CLOCK_SECONDS:
                return Objection.STALE
            node = self._state.get_node_id_by_public_key(signed.public_key)
            if node is None:
                removed = _sql(self._state).query(_REMOVED, {"key": signed.public_key})
                return Objection.REMOVED if removed else Objection.UNKNOWN
            key, timestamp = bytes_to_public_key(signed.public_key), signed.timestamp.encode("ascii")
            return node if verify_signature(key, timestamp, signed.signature) else Objection.FORGED
        except (ValueError, TypeError):
            return Objection.FORGED

    def call(self, path: str, body: bytes, node: int) -> tuple[int, bytes]:
        """Answer one call of an admitted node: the HTTP status, and Flower's answer if the status is 200.

        A node acts for itself only: the id or key of another node in the request, or another sender in a message, is
        401.
        """
        if path == GIVE:
            return self._store_answer(body, node)
        kind, handler = _CALLS[PULL if path == TAKE else path]
        try:
            request = kind.FromString(body)
        except DecodeError:
            return 400, b""
        if not self._own(request, node):
            return 401, b""
        if isinstance(request, PushMessagesRequest) and not (
            _is_one_of_ours(request) and self._is_new(request.message_object_trees[0], node)
        ):
            return 400, b""
        # Flower gives, and deletes, any object to whoever names it.
        if isinstance(request, ConfirmMessageReceivedRequest) and self._is_of_another(request.message_object_id, node):
            return 401, b""
        if isinstance(request, PullObjectRequest) and not self._is_addressed(request.object_id, node):
            return 200, bytes(PullObjectResponse().SerializeToString())
        try:
            if path == TAKE:
                return 200, self._next_message(request, node)
            if path == PULL:
                self._give_again(node)
            return 200, bytes(handler(request, self._state).SerializeToString())
        except FlowerError as error:
            known = API_ERROR_MAP.get(error.code)
            return (500 if known is None else known.http_status_code), b""
        except (ValueError, IndexError):  # a request without a message, or with a false digest
            return 400, b""

    def _next_message(self, request: PullMessagesRequest, node: int) -> bytes:
        """Return a node's next message with its small parts, in the order of `part_names`; empty for a large one."""
        store = self._state.object_store
        with _sql(self._state).session():
            self._give_again(node)
            announced = handlers.pull_messages(request=request, state=self._state, store=store)
            pieces = [announced.SerializeToString()]
            for tree in announced.message_object_trees:
                for name in part_names(tree):
                    large = isinstance(store, FileObjectStore) and store.size(name)
                    pieces.append(b"" if large else store.get(name) or b"")
        return Bundle(pieces).SerializeToString()

    def _store_answer(self, body: bytes, node: int) -> tuple[int, bytes]:
        """Store an answer with all its parts, and delete the message that it answers: all of it, or nothing."""
        bundle = Bundle()
        try:
            bundle.ParseFromString(body)
            push = PushMessagesRequest.FromString(bundle.pieces[0])
        except (DecodeError, IndexError):
            return 400, b""
        if not self._own(push, node):
            return 401, b""
        if not _is_one_of_ours(push):
            return 400, b""
        tree = push.message_object_trees[0]
        names, parts = part_names(tree), bundle.pieces[1:]
        if len(names) != len(parts) or not self._is_new(tree, node):
            return 400, b""
        contents = dict(zip(names, parts, strict=True))
        try:
            answer = message_from_proto(push.messages_list[0])
            run = answer.metadata.run_id
            known = self._state.get_run_status({run}).get(run)
            if known is None or known.status != Status.RUNNING:
                return _OVER, b""
            with _sql(self._state).session():
                if self._state.store_message_res(answer) is not None:
                    # In one transaction no session of Flower's is needed, which would tell what is still to come.
                    _store_of(self._state).store_all(run, tree, contents)
                    self._state.object_store.delete(answer.metadata.reply_to_message_id)
        except (ValueError, TypeError, LookupError, AttributeError):  # no message, or a part with another digest
            return 400, b""
        return 200, b""

    def _give_again(self, node: int) -> None:
        """Deliver messages again that a node was given and did not receive: Flower marks them before they arrive.

        A node works on one message at a time. A message that it has not answered when it asks for the next one was lost
        on the way, or the node failed on it; therefore a message is delivered a few times only.
        """
        for row in _sql(self._state).query(_LOST, {"node": uint64_to_int64(node)}):
            self._given[row["message_id"]] += 1
            if self._given[row["message_id"]] < _MOST_TIMES:
                _sql(self._state).query(_AGAIN, {"id": row["message_id"]})

    def _is_of_another(self, message: str, node: int) -> bool:
        """Whether a message that waits for its answer is for another node."""
        return bool(_sql(self._state).query(_FOR_ANOTHER, {"id": message, "node": uint64_to_int64(node)}))

    def _is_addressed(self, name: str, node: int) -> bool:
        """Whether an object is part of a message for this node."""
        return bool(_sql(self._state).query(_ADDRESSED, {"id": name, "node": uint64_to_int64(node)}))

    def _is_new(self, tree: Any, node: int) -> bool:
        """Whether no object of an answer is a message of the coordinator, or another node's answer.

        Objects are deleted with the answer, so a node could delete what belongs to others by naming it as its own.
        """
        names = part_names(tree)
        wanted = {f"name{number}": names[min(number, len(names) - 1)] for number in range(MOST_PARTS)}
        return not _sql(self._state).query(_OTHERS, {**wanted, "node": uint64_to_int64(node)})

    def _own(self, request: Any, node: int) -> bool:
        if isinstance(request, ActivateNodeRequest):
            return self._state.get_node_id_by_public_key(request.public_key) == node
        named = request.node_id if isinstance(request, DeactivateNodeRequest) else request.node.node_id
        if named != node:
            return False
        # Flower takes the sender of an answer from the message itself, so a site could answer for another one.
        messages = request.messages_list if isinstance(request, PushMessagesRequest) else ()
        return all(message.metadata.src_node_id == node for message in messages)

    @contextmanager
    def run(self, largest: int = LARGEST) -> Iterator[LinkGrid]:
        """Open a Flower run and yield its grid. Deletes what earlier runs left behind.

        If this process dies, the run ends by itself within a minute.

        Args:
            largest: Most bytes that an answer may have; a larger one is not read, and counts as malformed.
        """
        for old in self._state.get_run_info(statuses=["finished"]):
            self._state.cleanup_run(old.run_id)
        self._sweep()
        # The process that serves the sites derives their quotas from it.
        told: dict[str, bool | float | int | str] = {_LARGEST_KEY: largest}
        run = self._state.create_run(
            None, None, None, told, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self._state.get_run_info(run_ids=[run])[0].primary_task_id
        if task is None or self._state.claim_task(task) is None or not self._state.activate_task(task):
            raise StateError(
                "Flower did not start the run", "check that no other program uses the coordinator's flower/link.db"
            )
        ended, outcome = threading.Event(), SubStatus.FAILED
        beats = threading.Thread(target=self._beat, args=(task, ended), daemon=True, name="run-heartbeat")
        beats.start()
        try:
            yield LinkGrid(self._state, Changes(self._database), run, task, largest)
            outcome = SubStatus.COMPLETED
        finally:
            ended.set()
            beats.join()
            self._state.finish_task(task, outcome, "")
            self._state.cleanup_run(run)

    def _sweep(self) -> None:
        store = self._state.object_store
        if isinstance(store, FileObjectStore):
            store.sweep()

    def _beat(self, task: int, ended: threading.Event) -> None:
        while not ended.wait(_HEARTBEAT):
            try:
                self._state.acknowledge_task_heartbeat(task)
            except Exception as error:  # of any kind: without heartbeats the run would end, and nobody would know why
                _log.error("the run's heartbeat failed, next attempt in %.0f s: %s", _HEARTBEAT, type(error).__name__)


class LinkGrid(Grid):
    """Flower's Grid for one run, directly on the link state: no HTTP, no token, no other process."""

    def __init__(self, state: LinkState, changes: Changes, run: int, task: int, largest: int) -> None:
        # Flower's messages read these; `push_messages` overrides them, because a process may have two runs.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, SUPERLINK_NODE_ID
        self._state, self._run, self._task, self._largest = state, run, task, largest
        self._changes = changes
        self._asked: frozenset[str] | None = None
        self._arriving: dict[str, Message] = {}
        self._look_at = 0.0

    def set_run(self, run: Any) -> None:
        """Do nothing: the run is known already."""

    @property
    def run(self) -> Any:
        """Flower's record of the run."""
        return self._state.get_run_info(run_ids=[self._run])[0]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message made by Flower's own constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are online."""
        return sorted(self._state.get_nodes(self._run))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages, each with all its parts in one step; the id of a message that cannot be stored is empty."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        metadata = message.metadata.__dict__
        metadata["_run_id"], metadata["_src_task_id"] = self._run, self._task
        objects = take_apart(message)
        # One transaction: a node that sees the message finds its parts.
        with _sql(self._state).session():
            if self._state.store_message_ins(remove_content_from_message(message)) is None:
                return ""
            _store_of(self._state).store_all(self._run, objects.tree, objects.contents)
        return str(message.metadata.message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the answers to these messages that have arrived completely; each is read when it is yielded.

        Flower itself answers for a node that is gone and for a message that has expired. These answers are queried once
        a second only, because that takes many queries, and whether a site has answered takes one. Without any change
        since the last call, for the same messages, there is nothing new, which takes no query at all.
        """
        asked, thorough = frozenset(message_ids), time.monotonic() >= self._look_at
        if not (self._changes.seen() or thorough or asked != self._asked):
            return
        self._asked = None  # until all answers that are there have been read: the caller may leave this iteration
        if thorough or self._any_answer():
            for reply in self._state.get_message_res(message_ids=set(asked), run_id=self._run):
                self._arriving[reply.metadata.message_id] = reply
        if thorough:
            self._look_at = time.monotonic() + 1.0
        here = [each for each in self._arriving.items() if thorough or self._whole(each[0])]
        for identity, reply in here:
            contents = self._contents(identity)
            if contents is not None:
                yield self._taken(identity, reply, contents)
        self._asked = asked

    def _any_answer(self) -> bool:
        return bool(_sql(self._state).query(_ANSWERED, {"run": uint64_to_int64(self._run)}))

    def _whole(self, identity: str) -> bool:
        """Whether an object has arrived. A site sends the root of a reply last."""
        return bool(_sql(self._state).query(_WHOLE, {"id": identity}))

    def _contents(self, identity: str) -> Mapping[str, bytes] | None:
        """Return the parts of a reply; None while a part is missing, and an empty mapping if one will never arrive."""
        parts = _sql(self._state).query(_PARTS, {"id": identity, "most": MOST_PARTS + 1})
        if not 0 < len(parts) <= MOST_PARTS:
            return {}
        # Nothing is read before all parts are there: a poll every few milliseconds must not read megabytes each time.
        for part in parts:
            if not part["is_available"]:
                return {} if self._state.get_object(self._run, part["object_id"]) is None else None
        # Before reading: an answer larger than the study needs could exhaust the memory.
        names = [part["object_id"] for part in parts]
        if sum(map(self._size, names)) > self._largest:
            return {}
        contents = {name: self._state.object_store.get(name) for name in names}
        return {} if not all(contents.values()) else {name: content or b"" for name, content in contents.items()}

    def _size(self, name: str) -> int:
        store = self._state.object_store
        return store.size(name) if isinstance(store, FileObjectStore) else 0

    def _taken(self, identity: str, reply: Message, contents: Mapping[str, bytes]) -> Message:
        del self._arriving[identity]
        self._state.delete_messages({reply.metadata.reply_to_message_id})
        self._state.object_store.delete(identity)
        if reply.has_error() or not contents:
            return reply  # Flower's own error, or an empty record, which no reader accepts as an answer
        try:
            whole = put_together(identity, contents)
        except ProtocolError:
            return reply
        # Trust the header, which the link state checked, and not the metadata that the site put inside the reply.
        whole.metadata.__dict__.update(reply.metadata.__dict__)
        return whole

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not implemented: Flower's own loop sleeps for seconds between polls; `GridExchange` polls instead."""
        raise NotImplementedError("use GridExchange")


def signed_headers(headers: Sequence[tuple[bytes, bytes]]) -> SignedHeaders | None:
    """Return the claims in the headers (names in lower case); None unless each of the three occurs exactly once."""
    wanted = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    found = [[value for name, value in headers if name == wish.encode("ascii")] for wish in wanted]
    if any(len(values) != 1 for values in found):
        return None
    try:
        key, timestamp, signature = (values[0] for values in found)
        return SignedHeaders(
            b64decode(key, validate=True), timestamp.decode("ascii"), b64decode(signature, validate=True)
        )
    except ValueError:
        return None


def _is_one_of_ours(push: PushMessagesRequest) -> bool:
    """Whether one message is announced, under its own name and with as few parts as privet's messages have.

    Flower stores every announced object, and accepts any number of trees of any size for one answer. A site could fill
    the coordinator's disk with it. And it stores a NaN for a time, which SQLite reads as NULL: all later queries for
    answers of the run would fail.
    """
    if len(push.messages_list) != 1 or len(push.message_object_trees) != 1:
        return False
    tree, metadata = push.message_object_trees[0], push.messages_list[0].metadata
    if not (math.isfinite(metadata.created_at) and math.isfinite(metadata.ttl)):
        return False
    try:
        part_names(tree)
    except ProtocolError:
        return False
    return bool(tree.object_id == metadata.message_id)


def _store_of(state: LinkState) -> FileObjectStore:
    """Return the state's object store with the type that `open_state` gave it."""
    return cast(FileObjectStore, state.object_store)


def _sql(state: LinkState) -> Any:
    """Return the state with the type that it has for an SQLite file; Flower's abstract state has no sessions."""
    return state
