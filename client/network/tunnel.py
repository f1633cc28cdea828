"""A way for gRPC to a server over TLS 1.3: gRPC itself would accept TLS 1.2, and gives no reason when TLS fails.

gRPC connects to a Unix socket in a directory that only this process's user can enter. From there the bytes go over one
TLS connection to the server. A proxy that the environment names is used; it must tunnel (`CONNECT`).
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from privet.client.network.proxies import proxy_for
from privet.common.pki.addresses import split_address

_PIECE = 2**16


@contextmanager
def tunnel(address: str, context: ssl.SSLContext, seconds: float) -> Iterator[str]:
    """Connect to a server, and yield gRPC's name of the way to it.

    Args:
        address: Host and port.
        context: The server's certificate must be for this host, and come from the root that the context trusts.
        seconds: Most seconds to connect.

    Raises:
        OSError: The server cannot be reached, or TLS fails (`ssl.SSLError`).
        StateError: As `proxy_for`.
    """
    host, port = split_address(address)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="tunnel")
    thread.start()
    try:
        with tempfile.TemporaryDirectory(prefix="privet-") as directory:
            plain = connect(host, port, seconds)
            way = _way(f"{directory}/way", plain, host, context)
            asyncio.run_coroutine_threadsafe(way, loop).result(seconds)
            yield f"unix:{directory}/way"
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop).result(seconds)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(seconds)
        loop.close()


async def _way(path: str, plain: socket.socket, host: str, context: ssl.SSLContext) -> None:
    try:
        outside = await asyncio.open_connection(sock=plain, ssl=context, server_hostname=host)
    except BaseException:
        plain.close()
        raise

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()  # one connection, since there is one behind it
        with suppress(asyncio.CancelledError):  # the caller is done
            await asyncio.gather(_copy(reader, outside[1]), _copy(outside[0], writer))
        writer.close()
        outside[1].close()

    server = await asyncio.start_unix_server(serve, path)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what is read until either side ends; the way ends with it."""
    with suppress(OSError):
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _end() -> None:
    """End what the loop still does."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Return a connection to a server, through the proxy that the environment names, if any. Raises as `tunnel`."""
    proxy = proxy_for(host)
    if proxy is None:
        return socket.create_connection((host, port), seconds)
    connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=seconds)
    headers = {}
    if proxy.user is not None:
        pair = f"{proxy.user}:{proxy.password}".encode()
        headers["Proxy-Authorization"] = f"Basic {b64encode(pair).decode('ascii')}"
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except http.client.HTTPException as error:
        raise OSError(f"the proxy does not answer as expected ({type(error).__name__})") from None
    return connection.sock
