"""The gate in front of Flower's fleet calls: it checks every request from the network before Flower handles it.

Requests are compared, not interpreted: a path is one of the few allowed, byte for byte, or it does not exist, so
there is nothing to normalise. The sender of a request is checked before its body is read. The answer to Flower's other
paths is the same as to a path that does not exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tempfile
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from privet.common.doors.places import Places
from privet.common.flower.bundles import TAKE
from privet.common.refusals import Refusals, short_digest
from privet.server.network.link import (
    MEDIA_TYPE,
    PULL,
    PULL_OBJECT,
    PUSH_OBJECT,
    STORING,
    USED,
    Objection,
    SignedHeaders,
    signed_headers,
)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_log = logging.getLogger("privet.coordinator")
# Seconds to remember a used signature: a timestamp may be 300 s ahead and is accepted until it is 300 s old; 30 s more
# as a margin.
_FRESH = 630.0
# Seconds between two looks for waiting messages.
_LOOK = 0.01
# At most, after queries that failed.
_LOOK_LATER = 2.0
# Bytes of one piece: of an answer, the next piece is sent after this one was read; of a body, one piece must arrive
# within `body_seconds`.
_PIECE = 2**18
# Bodies in files that are loaded at the same time, once they are there in whole.
_LOADED = 2
QUOTA = "the node's quota is used up"
"""Why an object is refused whose node stores too much already."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    body: int = 512 * 2**20
    """Most bytes of an object: an update, or the adapter of a large model."""
    small_body: int = 2**20
    """Most bytes of any other request."""
    headers: int = 40
    """Most header fields; their bytes are limited where the connection is read."""
    body_seconds: float = 60.0
    """Most seconds between two pieces of a body."""
    hold_seconds: float = 10.0
    """Most seconds that a request for messages waits for one."""
    bodies: int = 8
    """Most large bodies that are read into memory at the same time; more are read into files."""
    objects: int = 2
    """Most objects that one node sends or fetches at a time: two, as one may be on a connection that is lost."""


class Desk(Protocol):
    """Admits nodes, answers their calls, and knows whose messages wait (`privet.server.network.link.Link`)."""

    def admits(self, signed: SignedHeaders) -> int | Objection:
        """Return the registered node that signed this, or the reason why the request is not admitted."""

    def call(self, path: str, body: bytes, node: int) -> tuple[int, bytes]:
        """Answer a call of an admitted node: status and body."""

    def waiting(self) -> frozenset[int]:
        """Return the nodes for which a message is waiting."""

    def changed(self) -> bool:
        """Return whether there may be new messages since the last call; called often, so it has to be quick."""

    def has_room(self, node: int, size: int) -> bool:
        """Whether a node may store so many bytes more."""


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The gate's answer to a request that it refuses.

    Attributes:
        status: HTTP status.
        told: Text for the caller.
        reason: Text for the application log.
        size: Bytes that were announced or sent.
        signed: The request's claims about its sender.
    """

    def __init__(
        self, status: int, told: str, reason: str = "", size: int | None = None, signed: SignedHeaders | None = None
    ) -> None:
        super().__init__(told)
        self.status, self.told, self.reason, self.size, self.signed = status, told, reason or told, size, signed


# Answers of Flower that are normal for a site: its run is over (403), or it is online already (412).
_USUAL = frozenset({200, 403, 412})
_INSIDE = {400: "the call is malformed", 401: "the call is in another node's name"}


class Gate:
    """An ASGI app. Counts its answers by status and the bytes of bodies, and logs each refusal."""

    def __init__(
        self,
        desk: Desk,
        limits: Limits = Limits(),
        refusals: Refusals | None = None,
        directory: Path | None = None,
    ) -> None:
        """Prepare a gate.

        Args:
            desk: Answers the calls.
            limits: Limits of one request.
            refusals: Logs refusals.
            directory: For bodies that find no room in memory; None: the system's directory for temporary files.
        """
        self._desk, self._limits, self._directory = desk, limits, directory
        self.refusals = refusals or Refusals(_log)
        self._paths = {path.encode("ascii"): path for path in USED}
        self._seen: OrderedDict[bytes, float] = OrderedDict()
        self._bodies = asyncio.Semaphore(limits.bodies)
        self._loading = asyncio.Semaphore(_LOADED)
        self._incoming: Counter[int] = Counter()
        self._turns: defaultdict[int, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(limits.objects))
        self._waiters: set[tuple[int, asyncio.Event]] = set()
        self._new = False
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self.places: Places | None = None
        self.answers: dict[int, int] = {}
        self.bytes = {"received": 0, "sent": 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # neither lifespan events nor websockets are served

        async def counted(event: Event) -> None:
            if event["type"] == "http.response.start":
                self.answers[event["status"]] = self.answers.get(event["status"], 0) + 1
            self.bytes["sent"] += len(event.get("body", b""))
            await send(event)

        member = ""
        try:
            if scope["raw_path"] == b"/health":
                await self._health(scope, counted)
                return
            # Cheapest first: headers, then the sender, then replay. The body is read last, so an outsider cannot make
            # the coordinator store or parse anything.
            path, size, signed = self._check(scope)
            node = await self._admit(signed)
            member = short_digest(signed.public_key)
            self._once(signed)
            if self.places is not None:
                self.places.belongs(scope.get("client"), f"{node:x}")
            async with self._turn(path, node):
                status, body = await self._reply(path, size, receive, node)
                if status not in _USUAL:
                    self._note(scope, Refused(status, "", _INSIDE.get(status, "the call failed"), size, signed), member)
                await _answer(counted, status, body, MEDIA_TYPE)
        except Refused as refused:
            self._note(scope, refused, member)
            await _say(counted, refused.status, {"detail": refused.told})

    def _note(self, scope: Scope, refused: Refused, member: str) -> None:
        key = member if refused.signed is None else short_digest(refused.signed.public_key)
        self.refusals.note(refused.reason, peer_of(scope.get("client")), member=member, size=refused.size, key=key)

    def _check(self, scope: Scope) -> tuple[str, int, SignedHeaders]:
        """Check what needs neither the body nor the link state; return path, body size, and signed headers."""
        path = self._paths.get(scope["raw_path"])
        if path is None or scope["query_string"]:
            raise Refused(404, "Not Found", "there is no such path")
        if scope["method"] != "POST":
            raise Refused(405, "Method Not Allowed", "there is no such method")
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        if len(headers) > self._limits.headers:
            raise Refused(431, "too many header fields", size=sum(len(name) + len(value) for name, value in headers))
        named = dict(headers)
        if named.get(b"content-type") != MEDIA_TYPE or b"content-encoding" in named or b"upgrade" in named:
            raise Refused(415, "not plain protobuf", "the body is not plain protobuf")
        # A body of unknown length could not be limited before it is read; two lengths could be read in two ways.
        length = named.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 12 or b"transfer-encoding" in named:
            raise Refused(411, "the length of the body is missing")
        if int(length) > (self._limits.body if path == PUSH_OBJECT else self._limits.small_body):
            raise Refused(413, "the body is too large", size=int(length))
        signed = signed_headers(headers)
        if signed is None:
            raise Refused(401, "not signed by a node", "the request is not signed")
        return path, int(length), signed

    async def _admit(self, signed: SignedHeaders) -> int:
        """Admit registered nodes only."""
        node = await asyncio.to_thread(self._desk.admits, signed)
        if isinstance(node, Objection):
            raise Refused(401, "not signed by a node", node.value, signed=signed)
        return node

    def _once(self, signed: SignedHeaders) -> None:
        """Accept each signature of a registered node once.

        Flower's signature covers only a time, neither path nor body, and is valid for minutes: without this check, a
        copied one could be sent again with another body. An ECDSA signature can be turned into another valid one, so
        the pair of key and time is remembered. Only registered nodes can fill this memory.
        """
        current = time.monotonic()
        while self._seen and next(iter(self._seen.values())) < current - _FRESH:
            self._seen.popitem(last=False)
        used = hashlib.sha256(signed.public_key + signed.timestamp.encode("ascii")).digest()
        if used in self._seen:
            raise Refused(401, "this request was made before", signed=signed)
        self._seen[used] = current

    def _turn(self, path: str, node: int) -> AbstractAsyncContextManager[object]:
        """Limit how many objects a node sends or fetches at a time: many large ones would exhaust the memory."""
        return self._turns[node] if path == PULL_OBJECT or path in STORING else nullcontext()

    async def _reply(self, path: str, size: int, receive: Receive, node: int) -> tuple[int, bytes]:
        if path in STORING:
            return await self._store(path, size, receive, node)
        asked = await self._body(receive, size)
        if path in (PULL, TAKE):
            await self._hold(node)
        return await self._call(path, asked, node)

    async def _store(self, path: str, size: int, receive: Receive, node: int) -> tuple[int, bytes]:
        """Store objects, if the node's quota has room for them: counted before they are read, and while they are."""
        if not await self._fits(node, self._incoming[node] + size):
            raise Refused(413, QUOTA, size=size)
        self._incoming[node] += size
        try:
            if size <= self._limits.small_body:
                return await self._call(path, await self._body(receive, size), node)
            if not self._bodies.locked():
                async with self._bodies:
                    return await self._call(PUSH_OBJECT, await self._body(receive, size), node)
            return await self._store_by_file(size, receive, node)
        finally:
            self._incoming[node] -= size
            if not self._incoming[node]:
                del self._incoming[node]

    async def _store_by_file(self, size: int, receive: Receive, node: int) -> tuple[int, bytes]:
        """Store an object while others fill the memory for bodies: nodes that send slowly make no other node wait."""
        try:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                await self._read(receive, size, file.write)
                async with self._loading:
                    file.seek(0)
                    return await self._call(PUSH_OBJECT, file.read(), node)
        except OSError as error:
            raise Refused(500, "failed", f"the body cannot be stored: {type(error).__name__}", size=size) from None

    async def _fits(self, node: int, size: int) -> bool:
        try:
            return await asyncio.to_thread(self._desk.has_room, node, size)
        except Exception as error:  # of any kind: the caller learns nothing about it
            raise Refused(500, "failed", f"the call failed: {type(error).__name__}") from None

    async def _call(self, path: str, body: bytes, node: int) -> tuple[int, bytes]:
        try:
            return await asyncio.to_thread(self._desk.call, path, body, node)
        except Exception as error:  # of any kind: the caller learns nothing about it
            raise Refused(500, "failed", f"the call failed: {type(error).__name__}") from None

    async def _body(self, receive: Receive, size: int) -> bytes:
        parts: list[bytes] = []
        await self._read(receive, size, parts.append)
        return b"".join(parts)

    async def _read(self, receive: Receive, size: int, take: Callable[[bytes], object]) -> None:
        got, started = 0, time.monotonic()
        while got < size:
            # A minimum rate, not only a limit for each piece: a body sent byte by byte would block a turn for hours.
            if (time.monotonic() - started) / self._limits.body_seconds > 1 + got / _PIECE:
                raise Refused(408, "the body arrives too slowly", size=got)
            try:
                event = await asyncio.wait_for(receive(), self._limits.body_seconds)
            except TimeoutError:
                raise Refused(408, "the body did not arrive in time", size=got) from None
            if event["type"] != "http.request":
                raise Refused(400, "the connection closed before the whole body arrived", size=got)
            part: bytes = event.get("body", b"")
            take(part)
            got += len(part)
            if not event.get("more_body"):
                break
        if got != size:
            raise Refused(400, "the body does not have the announced length", size=got)
        self.bytes["received"] += got

    async def _hold(self, node: int) -> None:
        """Wait until there may be a message for the node that asks, for `hold_seconds` at most."""
        if self._closing:
            return
        waiter = (node, asyncio.Event())
        self._waiters.add(waiter)
        self._new = True
        # One task queries for all nodes that wait: a query for each would load the database with the number of sites.
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        try:
            await asyncio.wait_for(waiter[1].wait(), self._limits.hold_seconds)
        except TimeoutError:
            pass  # Flower answers that there is no message
        finally:
            self._waiters.discard(waiter)

    def close(self) -> None:
        """Answer all requests that wait for messages. Call it in the event loop that serves."""
        self._closing = True
        for _, event in self._waiters:
            event.set()

    async def _look(self) -> None:
        """Wake the nodes for which a message is waiting, as long as any node waits.

        The query is made only after a change, or for a node that came since: nothing else can have made an answer.
        """
        wait, ready = _LOOK, frozenset[int]()
        while self._waiters:
            try:
                if self._desk.changed() or self._new or wait > _LOOK:
                    self._new = False
                    ready = await asyncio.to_thread(self._desk.waiting)
                wait = _LOOK
            except Exception as error:  # of any kind: nodes that wait would not be answered any more
                ready, wait = frozenset(), min(2 * wait, _LOOK_LATER)
                said = f"the link state cannot be read: {type(error).__name__}"
                self.refusals.note("the link state cannot be read", "coordinator", detail=said)
            for node, event in self._waiters:
                if node in ready:
                    event.set()
            await asyncio.sleep(wait)

    async def _health(self, scope: Scope, send: Send) -> None:
        """Answer whether the link state can be read, which every call needs."""
        if scope["method"] not in ("GET", "HEAD") or scope["query_string"]:
            raise Refused(405, "Method Not Allowed", "there is no such method")
        try:
            await asyncio.to_thread(self._desk.waiting)
        except Exception as error:  # of any kind: the service is not healthy
            await _say(send, 503, {"status": "failing", "reason": type(error).__name__})
            return
        await _say(send, 200, {"status": "ok"})


def peer_of(client: Any) -> str:
    """Return the address of a connected client, as in the application log."""
    return str(client[0]) if client else "unknown"


async def _say(send: Send, status: int, document: MutableMapping[str, str]) -> None:
    await _answer(send, status, json.dumps(document).encode(), b"application/json")


async def _answer(send: Send, status: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode("ascii"))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    # In pieces: the server then waits until the caller has read them, so a slow reader is noticed.
    for start in range(0, len(body), _PIECE):
        await send({"type": "http.response.body", "body": body[start : start + _PIECE], "more_body": True})
    await send({"type": "http.response.body"})
