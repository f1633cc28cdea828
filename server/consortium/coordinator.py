"""A coordinator's directory: its authority, its keys, its members and its log.

::

    coordinator.toml   name, addresses, how many sites may lie together
    ca/                root.pem and root.key; the key is encrypted where a passphrase was given
    keys/              log.pem signs checkpoints, coordinator.pem statements, release.pem released files
    members.db         invitations, members, certificates (server/consortium/members.py)
    log/               the round log (server/log/roundlog.py)
    public/            what may be published: root.pem, log.vkey, log.policy, and the log's files
    runs/              one directory per run of a study
    flower/            link.db: connected nodes and messages under way; certificate and key of the fleet API; when the
                       service was last told to replace its keys

The log is empty until `found`: its first leaf, the genesis, names the members approved by then and the quorum that
they make. Sites that are approved later join by a statement each.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509 import Certificate
from pydantic import Field

from privet.common.errors import RefusedError, StateError
from privet.common.files import sync_directory, write_durably, write_new
from privet.common.pki.certificates import (
    Authority,
    Token,
    create_authority,
    due_for_renewal,
    issue,
    issued_at,
    read_certificate,
    read_request,
    to_pem,
)
from privet.common.pki.enrolment import Address, JoinReply, JoinRequest, ReturnRequest, SiteKeys
from privet.common.pki.keyfile import public_key, read_key, read_release_key
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Name, Section
from privet.server.consortium.members import Members
from privet.server.consortium.membership import Consortium, Row
from privet.server.log.journal import COORDINATOR_KEY, LOG_KEY, RELEASE_KEY, Journal, Keys, write_keys
from privet.server.log.roundlog import create_log

_ROTATED = "flower/rotated"


class Settings(Section):
    """The file `coordinator.toml`."""

    name: Name
    """Of the consortium."""
    origin: Annotated[str, Field(pattern=r"^[a-z0-9.-]+(/[a-z0-9-]+)*$")]
    """The log's name, for good."""
    address: Address
    """Host and port at which members reach the service, with mutual TLS."""
    enrolment: Address
    """Host and port at which sites join."""
    fleet: Address
    """Host and port at which sites' nodes connect for studies."""
    bind: str = ""
    """Address to listen on where it is not the one that sites are told, such as 0.0.0.0; empty: that one."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1 for Prometheus metrics of the service; 0 for none."""
    colluding: Annotated[int, Field(ge=0)] = 0
    """Sites that may lie together with the coordinator (docs/round-log.md, section 2)."""
    certificate_days: Annotated[float, Field(gt=0, le=30)] = 7
    """Life of a site's certificate."""


@dataclass(frozen=True)
class Coordinator:
    """An open directory, with its keys."""

    directory: Path
    settings: Settings
    authority: Authority
    keys: Keys
    members: Members

    @property
    def log_directory(self) -> Path:
        """Where the log is."""
        return self.directory / "log"

    def rotate(self, now: datetime) -> None:
        """Have the service replace its keys and certificates, also while it runs. Durable on return.

        Raises:
            StateError: It cannot be noted.
        """
        try:
            write_durably(self.directory / _ROTATED, f"{int(now.timestamp())}\n".encode())
        except OSError as error:
            raise StateError(f"{self.directory} cannot be written ({error.strerror})", "check the disk") from None

    def outdated(self, certificate: Certificate, now: datetime) -> bool:
        """Whether a certificate of the service has to be replaced: by its age, or as it was issued before a rotation.

        One from a time to come is replaced as well: the clock was set back, and no rotation would seem later.

        Raises:
            StateError: It cannot be read when that was.
        """
        try:
            rotated = float((self.directory / _ROTATED).read_text())
        except FileNotFoundError:
            rotated = 0.0
        except (OSError, ValueError) as error:
            hint = "delete it, then rotate again"
            raise StateError(f"{self.directory / _ROTATED} cannot be read ({type(error).__name__})", hint) from None
        issued, present = issued_at(certificate).timestamp(), now.timestamp()
        return due_for_renewal(certificate, now) or issued > present or issued <= rotated <= present

    def certify(self, keys: SiteKeys, now: datetime) -> Certificate:
        """Issue a site's certificate, for the name that its invitation gave."""
        key = read_request(keys.request)
        return issue(self.authority, key, keys.site, "site", now, self.settings.certificate_days)

    def invite(self, site: str, now: datetime) -> Token:
        """Invite a site. Raises as `Members.invite`."""
        token = Token.make(site, self.settings.enrolment, self.authority.certificate)
        self.members.invite(site, token.secret, now)
        return token

    def approve(self, site: str, told: str, now: datetime) -> Row:
        """Make a site a member. Raises as `Members.approve`."""
        return self.members.approve(site, told, lambda keys: self.certify(keys, now), now)

    def answer(self, request: JoinRequest, now: datetime) -> JoinReply:
        """Answer a request to join, come over the network or in a file. Raises as `Members.ask`."""
        row = self.members.ask(request, now)
        if row.certificate is None:
            return JoinReply(state="pending", fingerprint=row.keys.fingerprint)
        return JoinReply(
            state="member",
            fingerprint=row.keys.fingerprint,
            certificate=to_pem(row.certificate),
            terms=self.members.terms(),
        )

    def renew(self, site: str, request: str, now: datetime, over: Certificate | None = None) -> Certificate:
        """Issue a member a new certificate for the key in a request, over the one that it calls with.

        Raises:
            ProtocolError: The request is none.
            RefusedError: The site is no member, or the certificate that it calls with was replaced.
        """
        days = self.settings.certificate_days
        certificate = issue(self.authority, read_request(request), site, "site", now, days)
        self.members.renew(site, certificate, now, over)
        return certificate

    def readmit(self, asked: ReturnRequest, now: datetime) -> Certificate:
        """Issue a new certificate to a member whose old one does not count any longer, by its identity key.

        Raises:
            As `renew`.
        """
        keys = {member.site: member.identity for member in self.members.members()}
        if asked.site not in keys or not asked.proves(keys[asked.site]):
            raise RefusedError(f"{asked.site} is no member, or this was not signed by its identity key")
        if not asked.is_fresh(now):
            raise RefusedError("the request is not of now by the service's clock", "set the site's clock, best by NTP")
        return self.renew(asked.site, asked.request, now)


def create(directory: Path, settings: Settings, passphrase: bytes | None, now: datetime) -> Certificate:
    """Create a coordinator's directory, and return the root of its authority.

    Raises:
        StateError: The directory is in use, or cannot be written.
    """
    if directory.exists() and any(directory.iterdir()):
        raise StateError(f"{directory} is not empty", "a consortium is created once; choose a new directory")
    for part in ("", "ca", "keys", "public", "runs", "flower"):
        (directory / part).mkdir(mode=0o755 if part == "public" else 0o700, parents=True, exist_ok=True)
    authority = create_authority(settings.name, now)
    hidden = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    write_new(directory / "ca/root.key", authority.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
    (directory / "ca/root.pem").write_text(to_pem(authority.certificate))
    log, statements = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = Keys(settings.origin, log, statements, ec.generate_private_key(ec.SECP256R1()))
    write_keys(directory / "keys", keys)
    create_log(directory / "log")
    Members.create(directory / "members.db", _consortium(settings, keys))
    (directory / "public/root.pem").write_text(to_pem(authority.certificate))
    (directory / "public/log.vkey").write_text(keys.public.text + "\n")
    # Written last: without it the directory is no coordinator's.
    lines = [
        f"{key} = {value!r}" if isinstance(value, int | float) else f'{key} = "{value}"' for key, value in settings
    ]
    (directory / "coordinator.toml").write_text("\n".join(lines) + "\n")
    sync_directory(directory)
    return authority.certificate


def open_coordinator(directory: Path, passphrase: bytes | None = None) -> Coordinator:
    """Open a coordinator's directory.

    Raises:
        StudyError: `coordinator.toml` is missing or not valid.
        StateError: A key is missing, cannot be read, or others may read it; or the passphrase is not the root's.
    """
    settings = validate(
        Settings, read_toml(directory / "coordinator.toml", what="coordinator"), what="coordinator.toml"
    )
    root = read_certificate((directory / "ca/root.pem").read_bytes())
    ca = _read_root(directory / "ca/root.key", passphrase)
    if ca.public_key() != root.public_key():
        raise StateError(f"{directory}/ca: key and certificate do not belong together", "restore both from a backup")
    log, statements = (read_key(directory / "keys" / name, "coordinator") for name in (LOG_KEY, COORDINATOR_KEY))
    keys = Keys(settings.origin, log, statements, read_release_key(directory / "keys" / RELEASE_KEY))
    members = Members(directory / "members.db", _consortium(settings, keys))
    return Coordinator(directory, settings, Authority(root, ca), keys, members)


def log_members(made: Coordinator, journal: Journal) -> int:
    """Write to the log what it does not say yet of the members, and publish its policy. Returns how many statements.

    What a crash left in the log and not marked is found there again.

    Raises:
        StateError: The log or the members' file could not be written.
        VerificationError: A statement cannot stand there.
    """
    due = made.members.statements()
    for _, statement in due:
        if not journal.holds(statement):
            journal.say(statement)
    journal.flush()
    for number, _ in due:
        made.members.mark_logged(number)
    policy = made.members.policy()
    if policy is not None:
        write_durably(made.directory / "public/log.policy", policy.text.encode())
    return len(due)


def _read_root(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise StateError(f"{path}: others on this machine may read this private key", f"chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), passphrase)
    except (OSError, ValueError, TypeError) as error:
        hint = "check the path; if the key is encrypted, give its passphrase"
        raise StateError(f"{path} is not a private key that can be read ({type(error).__name__})", hint) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"{path} is not a P-256 key", "restore it from a backup")
    return key


def _consortium(settings: Settings, keys: Keys) -> Consortium:
    return Consortium(
        name=settings.name,
        log=keys.public,
        coordinator=public_key(keys.coordinator),
        colluding=settings.colluding,
        address=settings.address,
        enrolment=settings.enrolment,
        fleet=settings.fleet,
    )
