"""Addresses of a coordinator, and what each of its three ports is for. All texts about ports are made here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ADDRESS_PATTERN = r"^[A-Za-z0-9.-]{1,253}:[0-9]{1,5}$|^\[[0-9a-fA-F:]{2,45}\]:[0-9]{1,5}$"
"""Host and port. The host is a name, an IPv4 address, or an IPv6 address in brackets."""

PORTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "address": ("members' port", "mutual TLS 1.3 over TCP: members, round log, renewal of certificates"),
        "enrolment": ("enrolment port", "TLS 1.3 over TCP: joining, and returning with an expired certificate"),
        "fleet": ("fleet port", "TLS 1.3 over TCP: the messages of studies"),
    }
)
"""By their key in `coordinator.toml` and in the terms of a member: name and use. Sites connect out to all three."""


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of an address. An IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def port_lines(address: str, enrolment: str, fleet: str) -> list[str]:
    """Return a line for each port: its name, its address and its use."""
    found = {"address": address, "enrolment": enrolment, "fleet": fleet}
    return [f"{name:<15} {found[key]:<28} {use}" for key, (name, use) in PORTS.items()]
