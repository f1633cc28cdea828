"""`privet site doctor --network`: each thing that stands between a site and its coordinator is told by its name."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from privet.client.checks import Check
from privet.client.commands import enrolment
from privet.client.network.consortium import request_membership
from privet.client.network.enrolment import prepare_request
from privet.client.network.reach import reach
from privet.common.errors import ProtocolError
from privet.common.pki.addresses import PORTS, port_lines, split_address
from privet.common.pki.certificates import Authority, create_authority, issue
from privet.common.pki.tls import load_pair, tls_context
from privet.common.pki.token import Token
from privet.server.commands.enrolment import init
from privet.server.consortium.coordinator import open_coordinator
from privet.server.consortium.service import serve_consortium
from privet.simulations.deploy import free_ports
from tests.support.consortium_world import World, run, running

NOW = datetime.now(UTC)
AUTHORITY = create_authority("north", NOW - timedelta(days=1))
OTHER = create_authority("inspector", NOW - timedelta(days=1))


@contextmanager
def fleet(
    host: str = "127.0.0.1", authority: Authority = AUTHORITY, status: int = 200, newest: ssl.TLSVersion | None = None
) -> Iterator[str]:
    """Serve `GET /health` over TLS, and yield the address."""
    key = ec.generate_private_key(ec.SECP256R1())
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, None, "http/1.1")
    load_pair(context, issue(authority, key.public_key(), host, "service", NOW, 7), key)
    if newest is not None:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, newest

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                with context.wrap_socket(self.request, server_side=True) as secure:
                    if secure.recv(1000):
                        secure.sendall(f"HTTP/1.1 {status} so\r\nContent-Length: 0\r\n\r\n".encode())
            except OSError:
                pass

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (socketserver.ThreadingTCPServer,), {"address_family": family, "daemon_threads": True})
    with kind((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"[{host}]:{server.server_address[1]}" if ":" in host else f"{host}:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def proxy(answer: str = "200 OK") -> Iterator[str]:
    """Serve an HTTP proxy that tunnels, or refuses with a status."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode()
            while self.rfile.readline().strip():
                pass
            self.wfile.write(f"HTTP/1.1 {answer}\r\n\r\n".encode())
            if not answer.startswith("200"):
                return
            port = int(line.split()[1].rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), 5) as out:
                threading.Thread(target=pass_on, args=(out, self.connection), daemon=True).start()
                pass_on(self.connection, out)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def pass_on(read: socket.socket, write: socket.socket) -> None:
    try:
        while data := read.recv(4096):
            write.sendall(data)
        write.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def steps(address: str, seconds: float = 2.0) -> dict[str, Check]:
    found = reach({"fleet": address}, AUTHORITY.certificate, None, seconds)
    return {check.name.removeprefix("fleet port: "): check for check in found}


def failing(address: str, seconds: float = 2.0) -> Check:
    """Return the one step that fails, which is the last."""
    found = list(steps(address, seconds).values())
    assert [check.ok for check in found[:-1]] == [True] * (len(found) - 1)
    assert not found[-1].ok
    return found[-1]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_all_is_well(host: str) -> None:
    with fleet(host) as address:
        found = steps(address)
    assert list(found) == ["name", "connection", "TLS 1.3", "answer"]
    assert all(check.ok for check in found.values()), found
    assert "DNS is not asked" in found["name"].text
    assert found["TLS 1.3"].text.startswith("TLSv1.3")


def test_each_fault_is_its_own_step() -> None:
    (port,) = free_ports(1)
    refused = failing(f"127.0.0.1:{port}")
    assert (refused.name, "refuses connections" in refused.text) == ("fleet port: connection", True)
    assert "for the firewall team: allow this machine TCP connections out to" in refused.hint
    assert f"127.0.0.1 port {port}, without inspecting TLS" in refused.hint
    unknown = failing("coordinator.invalid:9445")
    assert (unknown.name, "DNS does not know coordinator.invalid" in unknown.text) == ("fleet port: name", True)
    with fleet(authority=OTHER) as address:
        inspected = failing(address)
    assert inspected.name == "fleet port: TLS 1.3"
    assert "issued by 'CN=inspector" in inspected.text
    with fleet(newest=ssl.TLSVersion.TLSv1_2) as address:
        assert "does not speak TLS 1.3" in failing(address).text
    with fleet("127.0.0.1", status=503) as address:
        assert "expected status 200, found 503" in failing(address).text


def test_a_firewall_that_drops_is_told_from_one_that_rejects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        slow = failing(f"127.0.0.1:{silent.getsockname()[1]}", 0.2)
    assert (slow.name, "no answer within" in slow.text) == ("fleet port: TLS 1.3", True)


def test_a_proxy_is_named_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet() as address, proxy() as through:
        monkeypatch.setattr("privet.client.network.proxies._is_loopback", lambda host: False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{through}")
        found = steps(address)
        assert all(check.ok for check in found.values()), found
        assert list(found) == ["name", "connection", "proxy", "TLS 1.3", "answer"]
        assert through in found["connection"].text
        assert not any("secret" in check.text + check.hint for check in found.values())
        monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
        assert "expected the form http://HOST:PORT" in failing(address).text
    for answer, said in (("403 Forbidden", "does not tunnel"), ("407 Who", "wants a name and password")):
        with proxy(answer) as through:
            monkeypatch.setenv("HTTPS_PROXY", f"http://{through}")
            refused = failing("coordinator.example.org:9445")
        assert refused.name == "fleet port: proxy"
        assert said in refused.text
        assert f"let the proxy {through} tunnel (CONNECT)" in refused.hint


def test_this_machine_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    with fleet() as address:
        assert "directly" in steps(address)["connection"].text


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("consortium")) as world:
        world.enrol("berlin")
        yield world


def test_the_command_checks_all_three_ports(world: World) -> None:
    home = world.folder / "berlin"
    (closed,) = free_ports(1)
    site = home / "site.toml"
    site.write_text(site.read_text().replace("127.0.0.1:9445", f"127.0.0.1:{closed}"))
    result = run(enrolment.doctor, home, "--network", "--json")
    found = {check["name"]: check["ok"] for check in json.loads(result.output)["checks"]}
    assert result.exit_code == 1
    assert {name.partition(":")[0] for name in found} == {name for name, _ in PORTS.values()}
    assert [name for name, ok in found.items() if not ok] == ["fleet port: connection"]
    assert found["members' port: answer"]
    assert "for the firewall team" in run(enrolment.doctor, home, "--network").output


def test_before_a_site_has_joined_the_token_is_enough(world: World, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(world.invite("oslo").text)
    result = run(enrolment.doctor, f"@{tmp_path / 'token'}", "--network")
    assert result.exit_code == 0
    assert re.findall(r"enrolment port: (\w+(?: 1\.3)?)", result.output) == ["name", "connection", "TLS 1.3"]
    (closed,) = free_ports(1)
    token = Token.make("oslo", f"127.0.0.1:{closed}", world.coordinator.root)
    with pytest.raises(ProtocolError, match="cannot be reached") as caught:
        run(enrolment.join, token.text, tmp_path / "oslo")
    assert "privet site doctor @TOKEN --network" in caught.value.hint


def test_a_site_joins_at_an_ipv6_address(tmp_path: Path) -> None:
    assert (
        run(init, tmp_path / "c", "--name=north", "--address=[::1]:9443", "--no-passphrase").output.count("[::1]") == 3
    )
    made = open_coordinator(tmp_path / "c")
    assert made.settings.origin == "1/north"
    with serve_consortium(made, lambda: datetime.now(UTC), ("[::1]:0", "[::1]:0")) as serving:
        token = made.invite("oslo", datetime.now(UTC))
        token = replace(token, address=f"[::1]:{serving.joining}")
        assert Token.parse(token.text) == token
        asked = prepare_request(tmp_path / "oslo", token)
        assert request_membership(token, asked).state == "pending"
        checks = list(reach({"enrolment": token.address}, made.root, None))
    assert [check.ok for check in checks] == [True] * 3


def test_ports_are_said_in_one_way() -> None:
    lines = port_lines("a:1", "[::1]:2", "c:3")
    assert [line.split("  ")[0] for line in lines] == ["members' port", "enrolment port", "fleet port"]
    assert [split_address(address) for address in ("a:1", "[::1]:2")] == [("a", 1), ("::1", 2)]
    deployment = Path("docs/deployment.md").read_text()
    assert all(name in deployment for name, _ in PORTS.values())
