"""A bad network: a TCP proxy between a site and its coordinator that flips bits and cuts connections, for a while."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BLOCK = 1 << 14


class Proxy:
    """Forwards connections to a port of the loopback interface. The first few are damaged, each at one byte.

    Attributes:
        port: The port on which it listens.
        hits: Number of bits flipped and connections cut.
    """

    def __init__(self, target: int, seed: int, most: int = 6) -> None:
        self._target, self._most, self._random = target, most, random.Random(seed)  # noqa: S311 - chooses cases
        self._connections = 0
        self.hits = 0
        self.port = 0

    async def serve(self, ready: threading.Event) -> None:
        """Listen until cancelled."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        # The damage lies behind the handshake, so that it hits messages: by turns of the coordinator and of the site.
        bad, turn = self._connections < self._most, self._connections % 2
        places = [self._random.randrange(1_500, 20_000) if bad and way == turn else 0 for way in range(2)]
        cuts = self._random.random() < 0.5
        self._connections += 1
        await asyncio.gather(
            self._pump(reader, far_writer, places[0], cuts), self._pump(far_reader, writer, places[1], cuts)
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: int, cuts: bool) -> None:
        """Forward one direction. Flip a bit at byte number `place`, or cut the connection there; 0 damages nothing."""
        seen = 0
        try:
            while data := await reader.read(_BLOCK):
                at = place - seen
                if 0 < at <= len(data):
                    self.hits += 1
                    if cuts:
                        writer.write(data[: at - 1])
                        break
                    data = data[: at - 1] + bytes([data[at - 1] ^ 1]) + data[at:]
                seen += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@contextmanager
def bad_network(target: int, seed: int) -> Iterator[Proxy]:
    """Run a proxy in a thread until the block ends."""
    proxy, ready, loop = Proxy(target, seed), threading.Event(), asyncio.new_event_loop()

    def work() -> None:
        asyncio.set_event_loop(loop)
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(proxy.serve(ready))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(_cancel_all, loop)
        thread.join(5)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
