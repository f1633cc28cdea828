"""A coordinator's port and sites' nodes on loopback, for tests: certificates, keys, servers and nodes in threads."""

from __future__ import annotations

import datetime
import ipaddress
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privet.client.network.fleet import FleetLink, connected
from privet.client.network.node import Answer, Connection, NodeState
from privet.common.study.messages import Message
from privet.server.network.gate import Limits
from privet.server.network.link import Link
from privet.server.network.superlink import Endpoint, FleetServer

DAY = datetime.timedelta(days=1)
LARGEST = 2**28


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def node_file(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_line(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    now = datetime.datetime.now(datetime.UTC)
    authority = subject == issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 9 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if authority:
        sign_only = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        )
        usage = x509.KeyUsage(key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False, **sign_only)
        builder = builder.add_extension(usage, critical=True)
    else:
        local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([local]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA256())


@dataclass(frozen=True)
class Authority:
    """A root certificate and the key that signs with it."""

    name: str = "root"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def root(self) -> bytes:
        return _certificate(self.name, self.key, self.name, self.key, 90).public_bytes(Encoding.PEM)

    def server(self, folder: Path, days: int = 7) -> tuple[Path, Path]:
        """Write a server certificate for 127.0.0.1 and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain, private = folder / "server.pem", folder / "server.key"
        chain.write_bytes(_certificate("server", key, self.name, self.key, days).public_bytes(Encoding.PEM))
        private.write_bytes(private_pem(key))
        return chain, private


class Tally:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.up = threading.Event()
        self.retries = 0

    def answered(self, kind: str, seconds: float) -> None:
        self.kinds.append(kind)

    def connected(self, up: bool) -> None:
        if up:
            self.up.set()
        else:
            self.up.clear()

    def retried(self) -> None:
        self.retries += 1


@lru_cache(maxsize=1)
def empty_state() -> bytes:
    """Return an empty link state; making one takes Flower seconds."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "link.db"
        Link(file)
        with sqlite3.connect(file) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return file.read_bytes()


@dataclass
class World:
    """One coordinator: its root, its link state, and the servers and nodes around it."""

    folder: Path
    authority: Authority = field(default_factory=Authority)

    def __post_init__(self) -> None:
        self.chain, self.key = self.authority.server(self.folder)
        (self.folder / "link.db").write_bytes(empty_state())
        self.link = Link(self.folder / "link.db")

    def server(self, port: int = 0, limits: Limits | None = None) -> FleetServer:
        return FleetServer(
            self.link, Endpoint("127.0.0.1", port, self.chain, self.key, limits=limits or Limits(hold_seconds=0.5))
        )

    def node_key(self, register: bool = True) -> ec.EllipticCurvePrivateKey:
        key = ec.generate_private_key(ec.SECP384R1())
        if register:
            self.link.register(public_line(key))
        return key

    def connection(self, port: int, key: ec.EllipticCurvePrivateKey, root: bytes | None = None) -> FleetLink:
        return FleetLink(f"127.0.0.1:{port}", root or self.authority.root(), key, LARGEST)


@contextmanager
def node(
    world: World, port: int, key: ec.EllipticCurvePrivateKey, answer: Callable[[Message], Message], note: Path
) -> Iterator[Tally]:
    """Run a node in a thread until the block ends."""
    tally = Tally()
    wrapped: Answer = lambda read: answer(read())  # noqa: E731
    with connected(world.connection(port, key)) as link:
        runner = Connection(link, wrapped, NodeState(note), tally)
        thread = threading.Thread(target=runner.serve, daemon=True)
        thread.start()
        try:
            yield tally
        finally:
            runner.stop.set()
            thread.join(20)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def online(world: World) -> Sequence[int]:
    return [found.id for found in world.link.nodes() if found.online]
