"""What lies between a site and its coordinator: DNS, proxy, firewall, TLS, one step after the other, for each port.

A site's IT reads the result, so a step that fails comes with a sentence for whoever runs firewall and proxy.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509 import Certificate

from privet.client.checks import Check
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.proxies import Proxy, proxy_for
from privet.client.network.tunnel import connect
from privet.common.errors import PrivetError
from privet.common.log.encoding import one_line
from privet.common.pki.addresses import PORTS, split_address
from privet.common.pki.tls import tls_context

_SECONDS = 10.0


@dataclass(frozen=True)
class Way:
    """The way to one port of the coordinator.

    Attributes:
        name: Name of the port.
        host, port: Where the site connects to.
        proxy: Through which proxy; None if directly.
    """

    name: str
    host: str
    port: int
    proxy: Proxy | None

    @property
    def first(self) -> tuple[str, int]:
        """Host and port of the first connection: the proxy's, or the coordinator's."""
        return (self.host, self.port) if self.proxy is None else (self.proxy.host, self.proxy.port)

    @property
    def request(self) -> str:
        """The sentence for whoever runs firewall and proxy."""
        end = f"{self.host} port {self.port}"
        if self.proxy is None:
            return f"for the firewall team: allow this machine TCP connections out to {end}, without inspecting TLS"
        return (
            f"for the firewall team: let the proxy {self.proxy} tunnel (CONNECT) from this machine to {end}, without "
            "inspecting TLS; or name a direct way: add the host to NO_PROXY, and allow TCP out to it"
        )


def reach(
    addresses: Mapping[str, str], root: Certificate, member: ConsortiumClient | None, seconds: float = _SECONDS
) -> Iterator[Check]:
    """Yield a check for each step to each port; a port's steps end with the first that fails.

    Args:
        addresses: Host and port by key, as in `common.pki.addresses.PORTS`.
        root: The root certificate that the coordinator's must come from.
        member: Calls the members' port; None where the site is no member yet.
        seconds: Most seconds for a step.
    """
    for key, (name, _) in PORTS.items():
        if key not in addresses:
            continue
        host, port = split_address(addresses[key])
        try:
            way = Way(name, host, port, proxy_for(host))
        except PrivetError as error:
            yield Check(f"{name}: proxy", False, error.message, error.hint)
            continue
        yield from _steps(way, key, root, member, seconds)


def _steps(way: Way, key: str, root: Certificate, member: ConsortiumClient | None, seconds: float) -> Iterator[Check]:
    name = way.name
    steps: list[tuple[str, Callable[[], str]]] = [
        ("name", lambda: _resolve(way)),
        ("connection", lambda: _connect(way, seconds)),
    ]
    if way.proxy is not None:
        steps.append(("proxy", lambda: _tunnel(way, seconds)))
    steps.append(("TLS 1.3", lambda: _secure(way, _context(key, root, member), seconds)))
    if key == "fleet":
        steps.append(("answer", lambda: _healthy(way, root, seconds)))
    if key == "address" and member is not None:
        steps.append(("answer", lambda: _known(member)))
    for step, do in steps:
        try:
            yield Check(f"{name}: {step}", True, do())
        except PrivetError as error:
            yield Check(f"{name}: {step}", False, error.message, error.hint or way.request)
            return
        except (OSError, http.client.HTTPException) as error:
            yield Check(f"{name}: {step}", False, _reason(error, way, seconds), way.request)
            return


def _resolve(way: Way) -> str:
    host, port = way.first
    try:
        ipaddress.ip_address(host)
    except ValueError:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        return f"{host} is {', '.join(found)}"
    return f"{host} is an address, so DNS is not asked"


def _connect(way: Way, seconds: float) -> str:
    host, port = way.first
    with socket.create_connection((host, port), seconds) as found:
        peer = found.getpeername()
    what = f"the proxy {way.proxy} that the environment names" if way.proxy is not None else "directly"
    return f"TCP to {peer[0]} port {peer[1]}, {what}"


def _tunnel(way: Way, seconds: float) -> str:
    with connect(way.host, way.port, seconds):
        return f"the proxy {way.proxy} tunnels to {way.host} port {way.port}"


def _context(key: str, root: Certificate, member: ConsortiumClient | None) -> ssl.SSLContext:
    if key == "address" and member is not None:
        return member.context()
    return tls_context(ssl.PROTOCOL_TLS_CLIENT, root, "http/1.1" if key == "fleet" else "h2")


def _secure(way: Way, context: ssl.SSLContext, seconds: float) -> str:
    with (
        connect(way.host, way.port, seconds) as plain,
        context.wrap_socket(plain, server_hostname=way.host) as secure,
    ):
        return f"{secure.version()}, with a certificate from the pinned root"


def _healthy(way: Way, root: Certificate, seconds: float) -> str:
    context = tls_context(ssl.PROTOCOL_TLS_CLIENT, root, "http/1.1")
    connection = http.client.HTTPSConnection(way.host, way.port, timeout=seconds, context=context)
    with connect(way.host, way.port, seconds) as plain:
        connection.sock = context.wrap_socket(plain, server_hostname=way.host)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
    if status != http.HTTPStatus.OK:
        raise OSError(f"GET /health: expected status 200, found {status}")
    return "GET /health: status 200"


def _known(member: ConsortiumClient) -> str:
    return f"the service knows this site as {member.status().site}"


def _reason(error: OSError | http.client.HTTPException, way: Way, seconds: float) -> str:
    """Return why a step failed, in words that name what stands in the way."""
    host, port = way.first
    if isinstance(error, socket.gaierror):
        return f"DNS does not know {host} ({error.strerror})"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"not the coordinator's certificate ({error.verify_message}){_inspected(way, seconds)}"
    if isinstance(error, ssl.SSLError):
        return f"the other side does not speak TLS 1.3 with this site ({error.reason or 'no reason given'})"
    if isinstance(error, TimeoutError):
        return f"{host} port {port}: no answer within {seconds:.0f} s: a firewall on the way drops the packets"
    if isinstance(error, ConnectionRefusedError):
        return f"{host} port {port} refuses connections: the service does not run, or a firewall rejects them"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return f"{host} port {port}: the connection was cut: something on the way does not let it pass"
    if "Tunnel connection failed" in str(error):
        status = one_line(str(error).partition(":")[2].strip())
        more = "; it wants a name and password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT" if "407" in status else ""
        return f"the proxy {way.proxy} does not tunnel to {way.host} port {way.port}: {status}{more}"
    return one_line(error.strerror if isinstance(error, OSError) and error.strerror else str(error))


def _inspected(way: Way, seconds: float) -> str:
    """Return whose certificate it is: a proxy that inspects TLS puts in its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # to name it; nothing is sent
    try:
        with (
            connect(way.host, way.port, seconds) as plain,
            context.wrap_socket(plain, server_hostname=way.host) as secure,
        ):
            data = secure.getpeercert(binary_form=True)
        issuer = x509.load_der_x509_certificate(data or b"").issuer.rfc4514_string()
    except (OSError, ValueError):
        return ""
    return f". It was issued by {one_line(issuer)[:100]!r}. A device that inspects TLS puts in its own certificate"
