"""The way to the consortium service: TLS 1.3 or nothing, to the named host alone, also through a proxy."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from privet.client.network import consortium
from privet.client.network.fleet import FleetLink, UnreachableError, connected
from privet.client.network.proxies import proxy_for, through
from privet.client.network.tunnel import tunnel
from privet.common.errors import ProtocolError, StateError
from privet.common.pki.certificates import Authority, create_authority, issue
from privet.common.pki.enrolment import Nothing, Status
from privet.common.pki.tls import load_pair, tls_context
from tests.support.fleet_world import LARGEST, World

NOW = datetime.now(UTC)
AUTHORITY = create_authority("north", NOW - timedelta(days=1))


@contextmanager
def serving(host: str = "127.0.0.1", newest: ssl.TLSVersion | None = None) -> Iterator[int]:
    """Serve TLS that echoes, and yield its port."""
    key = ec.generate_private_key(ec.SECP256R1())
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, None)
    load_pair(context, issue(AUTHORITY, key.public_key(), host, "service", NOW, 7), key)
    if newest is not None:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, newest

    def echo() -> None:
        with suppress(OSError):
            plain, _ = listening.accept()
            with plain, context.wrap_socket(plain, server_side=True) as found:
                found.sendall(found.recv(100))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
    thread.join(5)


def echoed(address: str, authority: Authority = AUTHORITY) -> bytes:
    context = tls_context(ssl.PROTOCOL_TLS_CLIENT, authority.certificate)
    with tunnel(address, context, 5) as way, socket.socket(socket.AF_UNIX) as inside:
        inside.settimeout(5)
        inside.connect(way.removeprefix("unix:"))
        inside.sendall(b"hello")
        return inside.recv(100)


def test_bytes_go_both_ways() -> None:
    with serving() as port:
        assert echoed(f"127.0.0.1:{port}") == b"hello"


def test_a_server_of_an_older_tls_another_root_or_another_host_gets_nothing() -> None:
    with (
        serving(newest=ssl.TLSVersion.TLSv1_2) as port,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        echoed(f"127.0.0.1:{port}")
    with serving() as port, pytest.raises(ssl.SSLCertVerificationError):
        echoed(f"127.0.0.1:{port}", create_authority("north", NOW))
    with serving("10.0.0.1") as port, pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        echoed(f"127.0.0.1:{port}")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = threading.active_count()
    with serving() as port:
        echoed(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match="refused"):
        echoed(f"127.0.0.1:{port}")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= before


def test_a_proxy_that_the_environment_names_is_asked_to_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def proxy(target: int) -> None:
        caller, _ = listening.accept()
        asked.append(caller.recv(4096))
        with socket.create_connection(("127.0.0.1", target)) as behind, caller:
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

            def back() -> None:
                with suppress(OSError):
                    while data := behind.recv(4096):
                        caller.sendall(data)

            threading.Thread(target=back, daemon=True).start()
            with suppress(OSError):
                while data := caller.recv(4096):
                    behind.sendall(data)

    with serving("coordinator.example") as port, socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=proxy, args=(port,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert echoed("coordinator.example:9443") == b"hello"
    assert asked[0].startswith(b"CONNECT coordinator.example:9443 ")
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in asked[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_this_machine_is_reached_directly(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "")
    assert proxy_for(host) is None
    assert through(host) == ""


def test_a_service_on_this_machine_answers_whatever_proxy_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with serving() as port:
        assert echoed(f"127.0.0.1:{port}") == b"hello"


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for variable, url in (("https_proxy", "http://user:secret@127.0.0.1:9"), ("all_proxy", "user:secret@127.0.0.1:9")):
        with monkeypatch.context() as only:
            only.setenv(variable, url)
            assert str(proxy_for("coordinator.example")) == "127.0.0.1:9"
            assert "secret" not in repr(proxy_for("coordinator.example"))
            trusting = tls_context(ssl.PROTOCOL_TLS_CLIENT, AUTHORITY.certificate)
            with pytest.raises(ProtocolError, match=r"through the proxy 127\.0\.0\.1:9 ") as caught:
                consortium._call("coordinator.example:9443", trusting, "/any", Nothing(), Status)
        assert "secret" not in str(caught.value)
        assert "NO_PROXY" in caught.value.hint
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(StateError, match="expected the form http"):
        proxy_for("coordinator.example")
    monkeypatch.setenv("no_proxy", "coordinator.example")
    assert proxy_for("coordinator.example") is None


def test_the_fleet_port_of_this_machine_is_reached_directly_and_another_through_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    world = World(tmp_path)
    key = world.node_key()
    with world.server() as server, connected(world.connection(server.port, key)) as link:
        link.deactivate(link.activate())
    link = FleetLink("coordinator.example:9443", world.authority.root(), key, LARGEST)
    with connected(link), pytest.raises(UnreachableError, match=r"through the proxy 127\.0\.0\.1:9 ") as caught:
        link.activate()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("https_proxy", "nonsense://127.0.0.1:9")
    with pytest.raises(StateError, match="proxy"):
        FleetLink("coordinator.example:9443", world.authority.root(), key, LARGEST)
