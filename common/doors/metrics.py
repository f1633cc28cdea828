"""A port for Prometheus on 127.0.0.1: GET /metrics, without TLS.

The server of `prometheus_client` opens a thread and a file for each connection, without end. Here a few are served at a
time, the oldest gives way to a newcomer, and a caller that is silent is disconnected.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from http.server import ThreadingHTTPServer
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

from privet.common.doors.places import Places, Share
from privet.common.errors import StateError

MOST = 16
"""Most connections at a time."""
_SECONDS = 5.0


class MetricsServer(ThreadingHTTPServer):
    """Serves metrics until `close`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, registry: CollectorRegistry) -> None:
        """Listen, and serve in a thread.

        Args:
            port: Port on 127.0.0.1; 0 for any free one.
            registry: The metrics.

        Raises:
            StateError: The port is in use.
        """
        handler = type("Handler", (MetricsHandler.factory(registry),), {"timeout": _SECONDS})
        try:
            super().__init__(("127.0.0.1", port), handler)
        except OSError as error:
            raise StateError(
                f"metrics cannot be served on 127.0.0.1:{port} ({error.strerror})",
                "stop the program that uses the port, or change `metrics_port`",
            ) from None
        self.places = Places(Share(strangers=MOST, address=MOST))
        Thread(target=self.serve_forever, daemon=True, name="metrics").start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in a thread of its own."""
        place = self.places.enter(client_address, lambda: _end(request))
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.leave(place)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing: callers could fill the log."""

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
