"""The coordinator's port to the network: Flower's fleet API behind the gate, over TLS, in a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from privet.common.doors.places import Place, Share
from privet.common.errors import StateError
from privet.common.refusals import Refusals
from privet.server.doors.door import Door, Manners, fault_handler, listen
from privet.server.network.gate import Gate, Limits, peer_of
from privet.server.network.link import Link

# Most bytes of a request's line and header fields together.
_HEADER_BYTES = 16 * 1024
_HEADER_SECONDS = 20.0
# Seconds that a piece of an answer may wait until the caller reads it.
_TAKEN_SECONDS = 60.0
_STARTING, _STOPPING = 20.0, 10.0


@dataclass(frozen=True)
class Endpoint:
    """Where the fleet API listens, and its certificate.

    Attributes:
        host: Address to bind to.
        port: 0 for any free port.
        certificate: PEM chain, the server's certificate first.
        key: Its private key, PEM.
        share: How many connections there may be; a node uses two.
        manners: How long callers may take until they have proved to be a member's node.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    share: Share = field(default_factory=Share)
    manners: Manners = field(default_factory=Manners)
    limits: Limits = field(default_factory=Limits)


class _Impatient(H11Protocol):
    """Closes connections whose header fields do not arrive, or whose answers are not read: uvicorn waits forever.

    Slow callers could otherwise hold all connections. It also logs refusals that happen before there is a request that
    the gate could refuse.
    """

    door: Door
    place: Place
    _patience: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    @property
    def _gate(self) -> Gate:
        gate = self.config.loaded_app
        if not isinstance(gate, Gate):
            raise TypeError("this protocol serves a gate")
        return gate

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # The time runs from connecting to the last header field, and for a later request from its first byte.
        partial = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not partial and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif partial and self._patience is None:
            self._patience = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._patience, self._taking):
            if timer is not None:
                timer.cancel()
        self.door.left(self.place)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(_TAKEN_SECONDS, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def send_400_response(self, msg: str) -> None:
        self._note("not an HTTP request, or its header fields are too large", len(self.conn.trailing_data[0]))
        super().send_400_response(msg)

    def _drop(self) -> None:
        self._note("the caller does not read the answer")
        self.transport.abort()

    def _give_up(self) -> None:
        self._note("the header fields did not arrive in time", len(self.conn.trailing_data[0]))
        self.transport.close()

    def _note(self, reason: str, size: int | None = None) -> None:
        self._gate.refusals.note(reason, peer_of(self.client), size=size)


class FleetServer:
    """Serves sites within a `with` block.

    It has only the key of its certificate, neither the round log's nor the authority's. Studies may run in another
    process on the same link state.
    """

    def __init__(self, link: Link, endpoint: Endpoint, refusals: Refusals | None = None) -> None:
        self._endpoint = endpoint
        self.gate = Gate(link, endpoint.limits, refusals, link.directory)
        self.door: Door | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._tls: ssl.SSLContext | None = None

    def __enter__(self) -> Self:
        """Start listening.

        Raises:
            StateError: The address is in use, or the certificate and its key do not match.
        """
        self._tls = self._context()
        try:
            listening = listen(self._endpoint.host, self._endpoint.port)
        except OSError as error:
            where = f"{self._endpoint.host}:{self._endpoint.port}"
            raise StateError(
                f"the fleet API cannot listen on {where} ({error.strerror})",
                "stop the program that uses the port, or change `fleet` in coordinator.toml; "
                "sites that have joined hold the old address: each has to correct `address` under [coordinator] "
                "in its site file",
            ) from None
        tls = self._tls
        self.door = Door(listening, lambda: tls, self._endpoint.share, self.gate.refusals, self._endpoint.manners)
        self.gate.places = self.door.places
        config = uvicorn.Config(
            self.gate,
            http=_Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
            # At the level "warning" it logs a line for each malformed request: an attacker could fill the disk.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config, self.door, self.gate.refusals)
        self._thread = threading.Thread(target=self._server.run, daemon=True, name="fleet")
        self._thread.start()
        if not self._server.ready.wait(_STARTING):
            raise StateError(f"the fleet API did not start within {_STARTING:.0f} s", "see the application log")
        logging.getLogger("privet.coordinator").info("serving sites", extra={"port": self.port})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening; running requests have two seconds to end."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            if self._server.loop is not None and self.alive:
                self._server.loop.call_soon_threadsafe(self.gate.close)
            self._thread.join(_STOPPING)

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return 0 if self.door is None else self.door.port

    @property
    def alive(self) -> bool:
        """Whether the serving thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def renew_certificate(self) -> None:
        """Read certificate and key again: new connections get the new certificate. Raises as entering does."""
        self._context()  # loads the pair on trial: a faulty one must not replace a good one
        if self._tls is not None:
            self._tls.load_cert_chain(self._endpoint.certificate, self._endpoint.key)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self._endpoint.certificate, self._endpoint.key)
        except OSError as error:  # ssl.SSLError is one
            raise StateError(
                f"{self._endpoint.certificate} and its key cannot be used for TLS ({type(error).__name__})",
                "provide a PEM certificate chain and the private key that belongs to it",
            ) from None
        return context


class _Server(uvicorn.Server):
    """Serves the connections of a door. Sets an event when it is ready, and leaves signals to the calling program."""

    def __init__(self, config: uvicorn.Config, door: Door, refusals: Refusals) -> None:
        super().__init__(config)
        self._door, self._refusals = door, refusals
        self._accepting: asyncio.Task[None] | None = None
        self.ready = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(fault_handler(self._refusals))
        await super().startup([])
        self._accepting = self.loop.create_task(self._door.serve(self._protocol))
        self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: on request, or when no connections are accepted any more."""
        over = self._accepting is None or self._accepting.done()
        return await super().on_tick(counter) or over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, then end what is being served."""
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown([])

    def _protocol(self, place: Place) -> _Impatient:
        protocol = _Impatient(self.config, self.server_state, self.lifespan.state)
        protocol.door, protocol.place = self._door, place
        return protocol
