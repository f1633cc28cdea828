"""A site's side of Flower's deployment engine: one connection of a resident process to the fleet API.

Flower's own SuperNode fetches the coordinator's bundle and starts a process for each message. This module uses the same
protocol with Flower's own client, and never requests a bundle. The site opens all connections, to one address, over TLS
with one pinned root. `tests/system/test_fleet.py` fails when the Flower internals used here change.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from privet.client.network.proxies import proxy_for, through
from privet.common.errors import ProtocolError, StateError
from privet.common.flower.bundles import GIVE, INLINE, TAKE, Bundle
from privet.common.flower.objects import Objects, part_names, put_together, take_apart
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import Message as Spoken

HEARTBEAT = HEARTBEAT_DEFAULT_INTERVAL / 3
"""Seconds between two heartbeats. The coordinator counts a node that sends none for 60 s as gone."""

_TIMEOUT = 60.0
_OVER = 403  # Flower's status for a run that has ended
_TOO_LARGE = 413
_ABSENT = 404
_UNKNOWN = (401, 412)  # Flower's statuses for a key that is not registered, and for one that is online already
_T = TypeVar("_T")


class UnreachableError(Exception):
    """The coordinator did not answer, or its answer cannot be read. The call may be repeated."""


class UntrustedError(UnreachableError):
    """The server is not the coordinator of the pinned root, or gave an answer that a coordinator never gives."""


class NotAdmittedError(Exception):
    """The coordinator does not accept this node: it is not registered, or an earlier connection still counts."""


class TooLargeError(Exception):
    """The answer is larger than the coordinator accepts."""


class _NoSuchCallError(UnreachableError):
    """The coordinator does not know this call."""


class RunOverError(Exception):
    """The run that the message belongs to has ended."""


Direction = Literal["sent", "received"]
Moved = Callable[[Direction, int], None]
"""Counts the bytes of a request's or an answer's body."""


@dataclass(frozen=True)
class Received:
    """A message that Flower announced: its header and the digests of its parts."""

    header: Any
    tree: Any
    contents: Mapping[str, bytes] = field(default_factory=dict)
    """Parts that came with it, by digest. They are not checked yet, and not written to disk."""

    def to_bytes(self) -> bytes:
        """Return it in Flower's own encoding."""
        whole = PullMessagesResponse(messages_list=[message_to_proto(self.header)], message_object_trees=[self.tree])
        return bytes(whole.SerializeToString())

    @classmethod
    def from_bytes(cls, data: bytes) -> Received:
        """Read the output of `to_bytes`.

        Raises:
            StateError: The bytes are not such an output.
        """
        try:
            found = _announced(PullMessagesResponse.FromString(data))
        except (DecodeError, UnreachableError):
            found = None
        if found is None:
            raise StateError(
                "the `.state` file beside the node key is damaged: the coordinator's message that it stores cannot be "
                "read",
                "delete this file: the round then continues without this site",
            )
        return found

    @property
    def run(self) -> int:
        """The run that the message belongs to."""
        return int(self.header.metadata.run_id)


@dataclass(frozen=True)
class Reply:
    """An answer that can be sent several times with the same bytes."""

    header: Any
    objects: Objects


class FleetLink:
    """One node's connection. Every call raises `UnreachableError` where the coordinator does not answer."""

    def __init__(
        self,
        address: str,
        root: bytes,
        key: EllipticCurvePrivateKey,
        largest: int,
        moved: Moved = lambda direction, size: None,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            address: Host and port of the coordinator's fleet API.
            root: The root certificate (PEM) that the coordinator's chain must end in.
            key: The node's private key on P-384.
            largest: Largest accepted answer of the coordinator, in bytes.
            moved: Called with the size of each request's body, and of each answer's body that is read.

        Raises:
            StateError: The environment names a proxy that cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=root.decode("ascii"))
        self._public_key = public_key_to_bytes(key.public_key())
        signer = NodeAuthHttpInterceptor(key, key.public_key())
        self._proxied = through(host := address.rpartition(":")[0])
        try:
            self._client = FleetHttpClient(
                f"https://{address}", interceptors=[signer], verify=context, timeout=_TIMEOUT
            )
        except (ImportError, ValueError) as error:  # httpx reads all proxies of the environment
            raise StateError(
                f"the environment names a proxy that cannot be used ({type(error).__name__})",
                "set HTTPS_PROXY and ALL_PROXY to http://HOST:PORT, or unset them",
            ) from None
        if proxy_for(host) is None:
            self._client._client._mounts = {}
        # Flower's client follows redirects. A malicious coordinator could redirect a site's requests to servers inside
        # the hospital's network.
        self._client._client.follow_redirects = False
        self._client._client.event_hooks = {
            "request": [lambda request: moved("sent", len(request.content))],
            "response": [_limited(largest, moved)],
        }
        self._node: Node | None = None
        self._bundles = True

    def close(self) -> None:
        """Close the connection."""
        self._client._client.close()

    def activate(self, before: int | None = None) -> int:
        """Sign on and return the node's id.

        Args:
            before: The id of an earlier connection. If the coordinator still counts it, this connection continues it
                with a heartbeat. The coordinator would refuse a new one for a minute, and would count this node as
                lost when the old one ended.

        Raises:
            NotAdmittedError: The node is not registered, or an earlier connection of it still counts.
        """
        self._bundles = True  # the coordinator may have a newer version since
        if before is not None:
            self._node = Node(node_id=before)
            with suppress(NotAdmittedError):  # the key may have another id now: then activate anew
                if self.beat():
                    return before
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        return int(self._node.node_id)

    def deactivate(self, node: int) -> None:
        """Sign off."""
        self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=node))

    def beat(self) -> bool:
        """Send a heartbeat, and return whether the coordinator still knows this node."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        return bool(self._call(self._client.SendNodeHeartbeat, request).success)

    def receive(self) -> Received | None:
        """Return the next message for this node, or None. The coordinator may delay its answer while it has none."""
        request = PullMessagesRequest(node=self._node)
        bundle = self._bundle(TAKE, request)
        if bundle is None:
            return _announced(self._call(self._client.PullMessages, request))
        response = PullMessagesResponse()
        try:
            response.ParseFromString(bundle.pieces[0])
        except (DecodeError, IndexError):
            raise UnreachableError("the coordinator's answer cannot be read") from None
        received = _announced(response)
        if received is None:
            return None
        try:
            names = part_names(received.tree)
        except ProtocolError:  # `fetch` says so
            return received
        contents = {name: part for name, part in zip(names, bundle.pieces[1:], strict=False) if part}
        return replace(received, contents=contents)

    def fetch(self, received: Received) -> Spoken:
        """Fetch the parts of a message and read it.

        Raises:
            ProtocolError: It is not a message of privet.
            RunOverError: Its run has ended.
        """
        contents = dict(received.contents)
        for name in part_names(received.tree):
            if name in contents:
                continue
            request = PullObjectRequest(node=self._node, run_id=received.run, object_id=name)
            found = self._call(self._client.PullObject, request)
            if not found.object_found:
                raise RunOverError
            if not found.object_available:
                raise UnreachableError("a part of the message has not reached the coordinator yet")
            contents[name] = found.object_content
        message = put_together(received.tree.object_id, contents)
        if not message.has_content():
            raise ProtocolError(
                "the coordinator's message has no content",
                "run the same version of privet at the site and the coordinator",
            )
        return unpack(message.content)

    def send(self, reply: Reply) -> bool:
        """Send an answer, and return whether the message that it answers is confirmed by it.

        It may be sent again with the same bytes.

        Raises:
            RunOverError: The run has ended, so the coordinator does not wait for the answer.
            TooLargeError: The answer is larger than the coordinator accepts.
        """
        push = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(reply.header)],
            message_object_trees=[reply.objects.tree],
            clientapp_runtime_list=[0.0],
        )
        contents = reply.objects.contents
        if all(len(content) < INLINE for content in contents.values()):
            pieces = [push.SerializeToString(), *(contents[name] for name in part_names(reply.objects.tree))]
            if self._bundle(GIVE, Bundle(pieces)) is not None:
                return True
        accepted = self._call(self._client.PushMessages, push)
        for name in accepted.objects_to_push:
            if name in contents:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=reply.header.metadata.run_id,
                    object_id=name,
                    object_content=contents[name],
                    session_id=accepted.session_id,
                )
                if not self._call(self._client.PushObject, part).stored:
                    raise UnreachableError("the coordinator could not store a part of the answer")
        return False

    def confirm(self, received: Received) -> None:
        """Tell the coordinator that it may delete the message. Raises as `send`."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=received.run, message_object_id=received.tree.object_id
        )
        self._call(self._client.ConfirmMessageReceived, request)

    def _bundle(self, path: str, request: Any) -> Bundle | None:
        """Make a call of privet's own; None if the coordinator is an earlier version, which does not know it."""
        if not self._bundles:
            return None
        kind: Any = Bundle

        def call(sent: Any) -> Bundle:
            found: Any = self._client._unary_unary(path=path, rpc_method=path, request=sent, response_type=kind)
            return cast(Bundle, found)

        try:
            return self._call(call, request)
        except _NoSuchCallError:
            self._bundles = False
            return None

    def _call(self, method: Callable[[Any], _T], request: Any) -> _T:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == _OVER:
                raise RunOverError from None
            if status == _TOO_LARGE:
                raise TooLargeError from None
            if status == _ABSENT:
                raise _NoSuchCallError(f"HTTP status {status}") from None
            if status in _UNKNOWN:
                raise NotAdmittedError(f"HTTP status {status}") from None
            kind = UntrustedError if error.response.is_redirect else UnreachableError
            raise kind(f"HTTP status {status}") from None
        except _UnfitAnswer as error:
            raise UntrustedError(str(error)) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            # The text names hosts and certificates, and no data. It is cut, as a server can make it long.
            text = f"{type(error).__name__}: {error}"[:200] + self._proxied
            raise (UntrustedError if "CERTIFICATE_VERIFY_FAILED" in text else UnreachableError)(text) from None


@contextmanager
def connected(link: FleetLink) -> Iterator[FleetLink]:
    """Close a connection when the block ends, also by an error."""
    try:
        yield link
    finally:
        link.close()


def reply_to(received: Received, answer: Spoken) -> Reply:
    """Prepare an answer for sending."""
    message = Message(pack(answer), reply_to=received.header)
    objects = take_apart(message)
    return Reply(remove_content_from_message(message), objects)


def _announced(response: Any) -> Received | None:
    if not response.messages_list or not response.message_object_trees:
        return None
    try:
        header = message_from_proto(response.messages_list[0])
        # A time to live without end, or NaN, would keep this node at one message for ever.
        if not 0 < header.metadata.ttl < math.inf:
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UnreachableError("an announced message cannot be read") from None
    return Received(header, response.message_object_trees[0])


class _UnfitAnswer(httpx.RemoteProtocolError):
    """An answer that is refused before its body is read."""


def _limited(largest: int, moved: Moved) -> Callable[[httpx.Response], None]:
    def check(response: httpx.Response) -> None:
        """Refuse an answer, before its body is read, that is or may be larger than this site accepts."""
        length = response.headers.get("content-length", "")
        # A compressed answer may be small on the wire and fill the memory, so none is accepted.
        if not length.isdecimal() or int(length) > largest or "content-encoding" in response.headers:
            raise _UnfitAnswer(
                f"the coordinator's answer: expected an uncompressed one of at most {largest} bytes that declares its "
                "length"
            )
        moved("received", int(length))

    return check
