"""A port that accepts connections by itself, so that each is counted before anything is read from it.

asyncio's own servers accept every connection and count none. `Door` accepts one at a time, gives it a place
(`privet.common.doors.places`), and lets TLS and the protocol begin only then. A connection whose caller has not proved
to be a member within `patience` seconds is closed, whatever it does meanwhile: whether it is silent, has sent a part of
a TLS handshake, or sends a byte now and then.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from privet.common.doors.places import Place, Places, Share
from privet.common.refusals import Refusals

CROWDED = "too many connections"
LATE = "the caller did not prove to be a member in time"
FAILED = "the connection cannot be served"
HANDSHAKE = "the TLS handshake failed"
_log = logging.getLogger("privet.doors")
_BACKLOG = 1024
# Errors of `accept` that mean that no more files can be opened.
_SPENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE = 0.05
# What OpenSSL says of a handshake, and the reason that is logged for it.
_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "the certificate is not acceptable",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no certificate",
    "UNSUPPORTED_PROTOCOL": "a version before TLS 1.3",
    "HTTP_REQUEST": "plain HTTP",
    "WRONG_VERSION_NUMBER": "not TLS",
}
_VERIFIED = frozenset(
    {"certificate has expired", "certificate is not yet valid", "unable to get local issuer certificate"}
)

Serve = Callable[[Place], asyncio.BaseProtocol]
"""Returns the protocol of a new connection; the protocol calls `Door.left` when the connection is lost."""


@dataclass(frozen=True)
class Manners:
    """How long a port waits for its callers.

    Attributes:
        handshake: Seconds for the TLS handshake.
        patience: Seconds from connecting until the caller has proved to be a member; then the connection is closed.
    """

    handshake: float = 10.0
    patience: float = 30.0


class Door:
    """Accepts the connections of one listening socket, within one event loop."""

    def __init__(
        self,
        listening: socket.socket,
        tls: Callable[[], ssl.SSLContext],
        share: Share,
        refusals: Refusals,
        manners: Manners = Manners(),
    ) -> None:
        """Prepare; nothing is accepted yet.

        Args:
            listening: A socket that listens. It is closed when `serve` ends.
            tls: Returns the context for a new connection.
            share: How many connections there may be.
            refusals: Logs the connections that are closed.
            manners: How long callers may take.
        """
        self._listening, self._tls, self._manners = listening, tls, manners
        self._refusals, self._port = refusals, int(listening.getsockname()[1])
        self.places = Places(share, lambda place: refusals.note(CROWDED, place.peer[0], member=place.member))
        self._welcomes: set[asyncio.Task[None]] = set()
        self._timers: dict[Place, asyncio.TimerHandle] = {}

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return self._port

    async def serve(self, protocol: Serve) -> None:
        """Accept connections until the task is cancelled."""
        loop = asyncio.get_running_loop()
        self._listening.setblocking(False)
        try:
            while True:
                try:
                    accepted, peer = await loop.sock_accept(self._listening)
                except OSError as error:
                    await self._refresh(error)
                    continue
                self._welcome(loop, accepted, (str(peer[0]), int(peer[1])), protocol)
                # `sock_accept` returns at once while connections wait: a flood would leave no time for anything else.
                await asyncio.sleep(0)
        finally:
            self._listening.close()
            for task in list(self._welcomes):
                task.cancel()

    async def _refresh(self, error: OSError) -> None:
        """Go on after `accept` failed: without files, close a stranger's connection."""
        if error.errno in _SPENT:
            _log.error("no more files can be opened; a connection is closed", extra={"event": "files"})
            self.places.close_oldest()
        await asyncio.sleep(_PAUSE)

    def _welcome(
        self, loop: asyncio.AbstractEventLoop, accepted: socket.socket, peer: tuple[str, int], protocol: Serve
    ) -> None:
        accepted.setblocking(False)
        place = self.places.enter(peer, accepted.close)
        task = loop.create_task(self._begin(accepted, place, protocol))
        place.close = task.cancel
        self._timers[place] = loop.call_later(self._manners.patience, self._late, place)
        self._welcomes.add(task)
        task.add_done_callback(partial(self._welcomed, accepted, place))

    def _welcomed(self, accepted: socket.socket, place: Place, task: asyncio.Task[None]) -> None:
        self._welcomes.discard(task)
        if place.gone or task.cancelled():
            place.close = _nothing
        if task.cancelled():  # the place was given to another one, maybe before the task had begun
            self._gone(accepted, place)

    async def _begin(self, accepted: socket.socket, place: Place, protocol: Serve) -> None:
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol(place),
                accepted,
                ssl=self._tls(),
                ssl_handshake_timeout=self._manners.handshake,
                ssl_shutdown_timeout=1.0,
            )
        except (OSError, RuntimeError) as error:  # ssl.SSLError is an OSError
            self._gone(accepted, place)
            self._refusals.note(reason_of(error), place.peer[0])
            # asyncio's waiter holds the error, and its traceback the waiter: a cycle with the buffers of TLS, 256 KiB,
            # that would stay until the next full collection.
            error.__traceback__ = None
        except Exception as error:  # of any kind: other connections must be served
            self._gone(accepted, place)
            self.failed(place, error)
        else:
            if place.gone:
                transport.abort()
            place.close = transport.abort

    def _gone(self, accepted: socket.socket, place: Place) -> None:
        self.left(place)
        # Later, so that a transport which has the socket takes leave of the event loop first.
        asyncio.get_running_loop().call_soon(accepted.close)

    def failed(self, place: Place, error: Exception) -> None:
        """Log that a connection cannot be served, for a reason on this side."""
        said = f"{FAILED}: {type(error).__name__}"
        self._refusals.note(FAILED, place.peer[0], member=place.member, detail=said)

    def close_all(self) -> None:
        """Close all connections."""
        for place in self.places.everybody():
            place.close()

    def left(self, place: Place) -> None:
        """Free the place of a connection that was lost."""
        timer = self._timers.pop(place, None)
        if timer is not None:
            timer.cancel()
        self.places.leave(place)

    def _late(self, place: Place) -> None:
        self._timers.pop(place, None)
        if not place.member and not place.gone:
            self._refusals.note(LATE, place.peer[0])
            place.close()


def _nothing() -> None:
    """Do nothing: the connection has ended."""


def reason_of(error: Exception) -> str:
    """Return why a handshake failed, as one of a few fixed texts."""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message in _VERIFIED:
        return f"{HANDSHAKE}: {error.verify_message}"
    said = _REASONS.get(getattr(error, "reason", None) or "")
    if said is None and isinstance(error, ConnectionAbortedError):
        said = "it did not end in time"
    if said is None and isinstance(error, ConnectionResetError):
        said = "the caller hung up before it ended, as a test of the network does"
    return HANDSHAKE if said is None else f"{HANDSHAKE}: {said}"


def listen(address: str, port: int) -> socket.socket:
    """Return a listening socket. An address with a colon is IPv6, without a bracket.

    Raises:
        OSError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)


class LoopThread:
    """An event loop in a thread of its own, for ports that are served beside other work."""

    def __init__(self, name: str, refusals: Refusals) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(fault_handler(refusals))
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loop runs and all that it serves is being served."""
        return self._thread.is_alive() and not any(task.done() for task in self._tasks)

    def start(self, work: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Begin work that runs until `stop`."""

        def begin() -> None:
            self._tasks += [self._loop.create_task(each()) for each in work]

        self._loop.call_soon_threadsafe(begin)

    def stop(self) -> None:
        """Cancel the work, and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end)
            self._thread.join(10)

    def _end(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_later(0.2, self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


def fault_handler(refusals: Refusals) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return an event loop's handler for errors that nobody caught: logged by type, since texts may quote a caller."""

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        said = str(context.get("message", "")) if error is None else type(error).__name__
        refusals.note("the event loop reports a fault", "unknown", detail=f"the event loop reports a fault: {said}")

    return report
