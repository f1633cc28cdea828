"""Which nodes are connected, read from the tables of Flower's link state without Flower, whose libraries take 90 MB.

For whoever only looks, such as a console. `tests/server/test_nodes.py` compares this with Flower's own answer, and
fails when the table moves.
"""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from privet.common.errors import StateError
from privet.common.pki.addresses import split_address
from privet.server.consortium.coordinator import Settings

LINK = "flower/link.db"
"""The link state, in a coordinator's directory."""
CLOCK_SECONDS = 300
"""How far the clock of a node that is let in may be from this machine's."""
_NODES = "SELECT node_id, public_key, status, online_until FROM node WHERE status <> 'unregistered'"


@dataclass(frozen=True)
class RegisteredNode:
    """A registered node.

    Attributes:
        id: Its id.
        public_key: As Flower keeps it.
        online: Whether it is connected.
        until: Until when it counts as connected, in Unix seconds; None if it never was. Of one that is not, the time
            when it went, or when it would have had to call again.
    """

    id: int
    public_key: bytes
    online: bool
    until: float | None = None


def registered_in(database: Path) -> Sequence[RegisteredNode]:
    """Return the nodes in a link state, by id, as `Link.nodes` does. Writes nothing.

    Raises:
        sqlite3.Error: It cannot be read, or does not have its tables yet.
    """
    address, present = f"{database.resolve().as_uri()}?mode=ro", time.time()
    with closing(sqlite3.connect(address, uri=True)) as opened:
        rows = opened.execute(_NODES).fetchall()
    found = [
        # SQLite's integers have a sign; Flower marks a node as gone when somebody next asks it.
        RegisteredNode(number % 2**64, key, status == "online" and (until or 0) > present, until or None)
        for number, key, status, until in rows
    ]
    return sorted(found, key=lambda node: node.id)


def flowers_key(public_key: bytes) -> bytes:
    """Return a node's public key (OpenSSH, as in a site's request to join) as Flower keeps it.

    Raises:
        StateError: It is no such key.
    """
    try:
        key = load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StateError(
            "node key: expected an OpenSSH public key on the curve P-384",
            "use the node key in the site's request to join",
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def listens(settings: Settings) -> bool:
    """Whether something listens where sites connect for studies, or it is another machine that does. Sends nothing."""
    host, port = split_address(settings.fleet)
    try:
        family, kind, *_, address = socket.getaddrinfo(settings.bind or host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:  # it is in use, or is an address of another machine, such as a gateway
        return True
    return False
