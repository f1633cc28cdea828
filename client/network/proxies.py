"""The HTTP proxy that the environment names for a server, if any.

`HTTPS_PROXY` and `ALL_PROXY` name it, and `NO_PROXY` lists hosts that are reached directly. A server on this machine is
always reached directly.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from privet.common.errors import StateError

HINT = "if the proxy must not be used for this address, add the host to NO_PROXY"
"""What to do if a server cannot be reached through a proxy."""


@dataclass(frozen=True)
class Proxy:
    """A proxy, with the name and password that its address states."""

    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        """Return host and port alone: passwords belong into no message."""
        return f"{self.host}:{self.port}"


def proxy_for(host: str) -> Proxy | None:
    """Return the proxy for a server; None if it is reached directly.

    Raises:
        StateError: The environment names a proxy that is not an HTTP proxy, or no address.
    """
    host = host.strip("[]")
    if _is_loopback(host) or proxy_bypass(host):
        return None
    found = getproxies()
    url = found.get("https") or found.get("all") or ""
    if not url:
        return None
    hint = "set HTTPS_PROXY to http://HOST:PORT, or add the coordinator's host to NO_PROXY"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        name, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise StateError(f"the environment names a proxy for {host} whose address cannot be read", hint) from None
    if parts.scheme != "http" or not name:
        raise StateError(
            f"the environment names a proxy for {host}: expected the form http://HOST:PORT, found {parts.scheme}://",
            hint,
        )
    user = None if parts.username is None else unquote(parts.username)
    return Proxy(name, port, user, unquote(parts.password or ""))


def through(host: str) -> str:
    """Return, for the text of an error, through which proxy a server is reached; empty if directly."""
    try:
        proxy = proxy_for(host)
    except StateError as error:
        return f"; {error.message}"
    return "" if proxy is None else f", through the proxy {proxy} that the environment names"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)
