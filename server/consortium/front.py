"""The ports of the consortium service: they accept, end TLS, and pass what callers send to gRPC.

gRPC accepts every connection, counts it only after its TLS handshake, and accepts TLS 1.2. So it listens on a Unix
socket that only this process's user can open, and a door (`privet.server.doors.door`) stands before it. gRPC sees no
certificate then. Each connection to it has a name of its own, by which the service looks up who calls: `Front.caller`.
Whatever else connects to the socket has no such name, and is nobody.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import cast

from cryptography.x509 import Certificate, load_der_x509_certificate

from privet.common.doors.places import Place
from privet.server.doors.door import Door

_HIGH = 2**18

Judge = Callable[[Certificate], str]
"""Returns the name of the member that a certificate belongs to now; empty if it belongs to none."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection.

    Attributes:
        address: Its address, without the port.
        certificate: The certificate that it proved to own; None on a port that asks for none.
    """

    address: str
    certificate: Certificate | None


class Front:
    """The connections between a door and one gRPC server."""

    def __init__(self, directory: Path, name: str, judge: Judge | None = None) -> None:
        """Prepare; nothing is served yet.

        Args:
            directory: Directory for sockets; nobody else may enter it.
            name: Name of the gRPC server's socket.
            judge: For members: tells whom a certificate belongs to.
        """
        self.judge = judge
        self._directory, self._socket = directory, directory / name
        self._prefix, self._numbers = name, count()
        self._peers: dict[str, Peer] = {}

    @property
    def address(self) -> str:
        """Where the gRPC server listens, in gRPC's spelling."""
        return f"unix:{self._socket}"

    def caller(self, peer: str) -> Peer | None:
        """Return who calls, by gRPC's name of the connection; None for a connection that is not from here."""
        return self._peers.get(peer.rpartition("/")[2])

    async def serve(self, door: Door) -> None:
        """Serve a door's connections until the task is cancelled."""
        try:
            await door.serve(lambda place: _Outside(self, door, place))
        finally:
            door.close_all()

    async def connect(self, inside: _Inside, peer: Peer) -> str:
        """Connect to the gRPC server, and return the connection's name. Raises OSError."""
        own = self._directory / f"{self._prefix}.{next(self._numbers)}"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.bind(str(own))
            self._peers[own.name] = peer
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, str(self._socket))
            await loop.create_unix_connection(lambda: inside, sock=connection)
        except BaseException:
            self.forget(own.name)
            connection.close()
            raise
        finally:
            own.unlink(missing_ok=True)  # the connection keeps its name
        return own.name

    def forget(self, name: str) -> None:
        """Forget a connection that has ended."""
        self._peers.pop(name, None)


class _Half(asyncio.Protocol):
    """One side of a connection: what it reads, the other side writes, no faster than its reader takes it."""

    transport: asyncio.Transport | None = None
    other: _Half | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(_HIGH)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        other, self.other = self.other, None
        if other is not None and other.transport is not None:
            other.transport.close()


class _Inside(_Half):
    """The side of gRPC."""


class _Outside(_Half):
    """The side of the network, behind TLS."""

    def __init__(self, front: Front, door: Door, place: Place) -> None:
        self._front, self._door, self._place = front, door, place
        self._name = ""
        self._joining: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        outside = cast("asyncio.Transport", transport)
        outside.pause_reading()
        self._joining = asyncio.get_running_loop().create_task(self._join(outside))

    async def _join(self, outside: asyncio.Transport) -> None:
        try:
            certificate = _certificate(outside)
            if certificate is not None and self._front.judge is not None:
                member = await asyncio.to_thread(self._front.judge, certificate)
                if member:
                    self._door.places.belongs(self._place.peer, member)
            inside = _Inside()
            inside.other = self
            self._name = await self._front.connect(inside, Peer(self._place.peer[0], certificate))
            self.other = inside
            outside.resume_reading()
        except Exception as error:  # of any kind: the caller is disconnected
            self._door.failed(self._place, error)
            outside.abort()
            return
        if self._place.gone or outside.is_closing():
            outside.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._joining is not None and not self._joining.done():
            self._joining.cancel()
        self._front.forget(self._name)
        self._door.left(self._place)
        super().connection_lost(exc)


def _certificate(transport: asyncio.Transport) -> Certificate | None:
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    presented = tls.getpeercert(binary_form=True) if tls is not None else None
    return None if presented is None else load_der_x509_certificate(presented)
