"""A coordinator's directory: its authority, its keys, its members and its log.

::

    coordinator.toml   name, addresses, how many sites may collude
    ca/                root.pem and root.key; the key is encrypted unless `--no-passphrase` was given. Only what issues
                       certificates opens it: `serve`, `approve` and `rotate --passphrase`
    keys/              log.pem signs checkpoints, coordinator.pem statements, mldsa65.pem both of them as well,
                       release.pem released files; former.txt has the public keys that a rotation has replaced
                       (server/consortium/rotation.py)
    members.db         invitations, members, certificates (server/consortium/members.py)
    log/               the round log (server/log/roundlog.py)
    public/            files to publish: root.pem, log.vkey, log.policy, and the log's files
    runs/              one directory per run of a study
    flower/            link.db: connected nodes and messages in transit; certificate and key of the fleet API; the time
                       of the last `rotate`

The log is empty until `found`: its first leaf, the genesis, has the members approved by then and their quorum. Each
site that is approved later is added by a statement of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

from privet.common.errors import ProtocolError, RefusedError, StateError, StudyError
from privet.common.files import make_directory, sync_directory, write_durably, write_new
from privet.common.log import mldsa
from privet.common.pki.certificates import (
    Authority,
    create_authority,
    due_for_renewal,
    issue,
    issued_at,
    read_certificate,
    read_request,
    to_pem,
)
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import Address, JoinReply, JoinRequest, KeysRequest, ReturnRequest, SiteKeys
from privet.common.pki.keyfile import KEPT, MLDSA_KEY, public_key, read_key, read_mldsa_key
from privet.common.pki.token import Token
from privet.common.retention import RetentionSection
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Name, Section
from privet.server.consortium.members import Members
from privet.server.consortium.membership import Consortium, Row
from privet.server.log.keys import COORDINATOR_KEY, LOG_KEY, Keys, read_keys_of, write_keys
from privet.server.log.roundlog import create_log

if TYPE_CHECKING:
    from privet.server.log.journal import Journal  # it loads NumPy, and a console opens a coordinator

KEYS, FORMER, NEXT = "keys", "former.txt", "next"
_ROTATED, _ROOT_KEY = "flower/rotated", "ca/root.key"


class Settings(Section):
    """The file `coordinator.toml`."""

    name: Name
    """Name of the consortium."""
    origin: Annotated[str, Field(pattern=r"^[a-z0-9.-]+(/[a-z0-9-]+)*$")]
    """Name of the round log; it cannot be changed."""
    address: Address
    """Host and port at which members reach the service, with mutual TLS."""
    enrolment: Address
    """Host and port at which sites enrol."""
    fleet: Address
    """Host and port at which sites' nodes connect for studies."""
    bind: str = ""
    """Address to listen on, such as 0.0.0.0; empty: the host in the addresses above."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1 for Prometheus metrics of the service; 0 for none."""
    colluding: Annotated[int, Field(ge=0)] = 0
    """Number of sites that may collude with the coordinator (docs/round-log.md, section 2)."""
    connections: Annotated[int, Field(ge=8, le=65536)] = 128
    """Connections of callers that have not proved to be members, at the fleet port; half as many at each other port."""
    connections_per_address: Annotated[int, Field(ge=4, le=65536)] = 32
    """Of these, those from one address (IPv6: from one /64 network); half as many at each other port."""
    certificate_days: Annotated[float, Field(gt=0, le=30)] = 7
    """Lifetime of a site's certificate, in days."""
    retention: RetentionSection | None = None
    """How long this coordinator keeps what (`privet coordinator retention`)."""


@dataclass(frozen=True)
class Coordinator:
    """An open coordinator's directory, with its keys.

    Attributes:
        root: The root certificate.
        unlock: Returns the root's key. It may ask a person for the passphrase.
    """

    directory: Path
    settings: Settings
    root: Certificate
    unlock: Callable[[], ec.EllipticCurvePrivateKey]
    members: Members

    @property
    def keys(self) -> Keys:
        """The keys of log, statements and releases, as the files hold them now: a rotation may have replaced them.

        Raises:
            StateError: A key is missing, cannot be read, or is readable by other users.
        """
        return read_keys_of(self.directory / KEYS, self.settings.origin)

    def follow_keys(self) -> bool:
        """Name the present keys to sites from now on; return whether they were rotated. Raises as `keys`."""
        own = self.members.consortium
        # First those of a rotation that is under way, as they move to the place of the present ones.
        former = read_reserved(self.directory / KEYS)
        keys = self.keys
        named = replace(own, log=keys.public, coordinator=public_key(keys.coordinator), former=former)
        self.members.consortium = named
        return (named.log, named.coordinator) != (own.log, own.coordinator)

    @cached_property
    def authority(self) -> Authority:
        """The root with its key, which is read on first use.

        Raises:
            StateError: The key cannot be read, or the passphrase is missing or wrong.
        """
        return Authority(self.root, self.unlock())

    @property
    def guarded(self) -> bool:
        """Whether the root's key is encrypted under a passphrase."""
        return b"ENCRYPTED" in (self.directory / _ROOT_KEY).read_bytes()

    @property
    def log_directory(self) -> Path:
        """Directory of the round log."""
        return self.directory / "log"

    @property
    def charter(self) -> Charter:
        """What the members of this consortium trust, and compare by its words."""
        own = self.members.consortium
        return Charter.make(own.name, self.root, own.log.text, own.coordinator, own.colluding)

    def rotate(self, now: datetime) -> None:
        """Ask the service to replace its keys and certificates, also while it runs. Durable on return.

        Raises:
            StateError: The request cannot be written.
        """
        try:
            write_durably(self.directory / _ROTATED, f"{int(now.timestamp())}\n".encode())
        except OSError as error:
            raise StateError(
                f"{self.directory / _ROTATED} cannot be written ({error.strerror})",
                "check the disk space and the permissions, then repeat the command",
            ) from None

    def outdated(self, certificate: Certificate, now: datetime) -> bool:
        """Whether a certificate of the service must be replaced: because of its age, or because of a later rotation.

        A certificate from the future is replaced too: the clock was set back, and every rotation would seem older.

        Raises:
            StateError: The time of the last rotation cannot be read.
        """
        try:
            rotated = float((self.directory / _ROTATED).read_text())
        except FileNotFoundError:
            rotated = 0.0
        except (OSError, ValueError) as error:
            hint = "delete the file, then run `privet coordinator rotate`"
            raise StateError(f"{self.directory / _ROTATED} cannot be read ({type(error).__name__})", hint) from None
        issued, present = issued_at(certificate).timestamp(), now.timestamp()
        return due_for_renewal(certificate, now) or issued > present or issued <= rotated <= present

    def certify(self, keys: SiteKeys, now: datetime) -> Certificate:
        """Issue a site's certificate, for the name in its invitation."""
        key = read_request(keys.request)
        return issue(self.authority, key, keys.site, "site", now, self.settings.certificate_days)

    def invite(self, site: str, now: datetime) -> Token:
        """Invite a site. Raises as `invite_all`."""
        return self.invite_all((site,), now)[site]

    def invite_all(self, sites: Sequence[str], now: datetime) -> dict[str, Token]:
        """Invite sites, all or none, and return their tokens by name.

        Raises:
            StudyError: A name is given twice, or is no name of a site.
            RefusedError: One of them is a member.
        """
        twice = {site for site in sites if sites.count(site) > 1}
        if twice:
            raise StudyError(f"the site {min(twice)} is named twice", "name each site once")
        tokens = {site: Token.make(site, self.settings.enrolment, self.root) for site in sites}
        self.members.invite({site: token.secret for site, token in tokens.items()}, now)
        return tokens

    def approve(self, site: str, told: str, now: datetime) -> Row:
        """Make a site a member. Raises as `Members.approve` and `authority`."""
        _ = self.authority  # before a transaction that would wait for a person
        return self.members.approve(site, told, lambda keys: self.certify(keys, now), now)

    def answer(self, request: JoinRequest, now: datetime) -> JoinReply:
        """Answer a request to join, from the network or from a file. Raises as `Members.ask`."""
        return self._reply(self.members.ask(request, now))

    def renew_keys(self, site: str, asked: KeysRequest, now: datetime) -> JoinReply:
        """Answer a member that asks to have an ML-DSA-65 key. Raises as `Members.ask_renewal`."""
        return self._reply(self.members.ask_renewal(site, asked, now))

    def _reply(self, row: Row) -> JoinReply:
        if row.certificate is None:
            return JoinReply(state="pending", fingerprint=row.keys.fingerprint)
        return JoinReply(
            state="member",
            fingerprint=row.keys.fingerprint,
            certificate=to_pem(row.certificate),
            terms=self.members.terms(),
        )

    def renew(self, site: str, request: str, now: datetime, over: Certificate | None = None) -> Certificate:
        """Issue a member a new certificate for the key in a request, to replace the one that it calls with.

        Raises:
            ProtocolError: The request is not a valid certificate request.
            RefusedError: The site is not a member, or the certificate that it calls with was replaced.
        """
        days = self.settings.certificate_days
        certificate = issue(self.authority, read_request(request), site, "site", now, days)
        self.members.renew(site, certificate, now, over)
        return certificate

    def readmit(self, asked: ReturnRequest, now: datetime) -> Certificate:
        """Issue a new certificate to a member whose old one is not valid any longer, authenticated by its identity key.

        Raises:
            As `renew`.
        """
        keys = {member.site: member.identity for member in self.members.members()}
        if asked.site not in keys or not asked.proves(keys[asked.site]):
            self.members.check_not_revoked(asked.site, lambda revoked: asked.proves(revoked.identity))
            raise RefusedError(
                f"site {asked.site} is not a member, or the request for a new certificate was not signed with its "
                "identity key",
                "use the site's own keys; otherwise ask the coordinator for an invitation to join again",
            )
        # Without a time limit, a copied request could be sent again later, and withdraw the certificates issued since.
        if not asked.is_fresh(now):
            raise RefusedError(
                "the time in the request for a new certificate differs by over 5 minutes from the coordinator's clock",
                "set the site's clock, for example by NTP",
            )
        return self.renew(asked.site, asked.request, now)


def require_new(directory: Path) -> None:
    """Raise `StateError` unless a directory for a coordinator is missing or empty."""
    if directory.exists() and any(directory.iterdir()):
        raise StateError(f"{directory} is not empty", "choose a new directory; a consortium is created once")


def create(directory: Path, settings: Settings, passphrase: bytes | None, now: datetime) -> Certificate:
    """Create a coordinator's directory, and return the root certificate of its authority.

    Raises:
        StateError: The directory is not empty, or cannot be written.
    """
    require_new(directory)
    make_directory(directory)
    for part in ("", "ca", "keys", "public", "runs", "flower"):
        (directory / part).mkdir(mode=0o755 if part == "public" else 0o700, parents=True, exist_ok=True)
    authority = create_authority(settings.name, now)
    write_new(directory / _ROOT_KEY, _key_pem(authority.key, passphrase))
    (directory / "ca/root.pem").write_text(to_pem(authority.certificate))
    keys = new_keys(settings.origin)
    write_keys(directory / KEYS, keys)
    create_log(directory / "log")
    Members.create(directory / "members.db", _consortium(settings, keys))
    (directory / "public/root.pem").write_text(to_pem(authority.certificate))
    (directory / "public/log.vkey").write_text(keys.public.text + "\n")
    # Written last: a directory without it was not created completely, and no command opens it.
    lines = [
        f"{key} = {value!r}" if isinstance(value, int | float) else f'{key} = "{value}"'
        for key, value in settings
        if value is not None
    ]
    (directory / "coordinator.toml").write_text("\n".join(lines) + "\n")
    sync_directory(directory)
    return authority.certificate


def encrypt_root(made: Coordinator, passphrase: bytes) -> None:
    """Encrypt the root's key under another passphrase. Durable on return.

    Raises:
        StateError: The key cannot be read or written, or the present passphrase is missing or wrong.
    """
    pem = _key_pem(made.authority.key, passphrase)
    try:
        write_durably(made.directory / _ROOT_KEY, pem, 0o600)
    except OSError as error:
        raise StateError(
            f"{made.directory / _ROOT_KEY} cannot be written ({error.strerror})",
            "check the disk space and the permissions, then repeat the command",
        ) from None


def open_coordinator(
    directory: Path, passphrase: bytes | None = None, ask: Callable[[], bytes] | None = None
) -> Coordinator:
    """Open a coordinator's directory. The root's key is read when it is needed, which most commands do not.

    Args:
        directory: The directory.
        passphrase: Of the root's key; None if none is known.
        ask: Returns the passphrase, from a person; called if the key is encrypted and no passphrase is known.

    Raises:
        StudyError: `coordinator.toml` is missing or not valid.
        StateError: A key is missing, cannot be read, or is readable by other users.
    """
    settings = validate(
        Settings, read_toml(directory / "coordinator.toml", what="coordinator"), what="coordinator.toml"
    )
    root = _read_certificate(directory / "ca/root.pem")
    file = directory / _ROOT_KEY
    _check_private(file)

    def unlock() -> ec.EllipticCurvePrivateKey:
        known = passphrase
        if known is None and ask is not None and b"ENCRYPTED" in file.read_bytes():
            known = ask()
        key = _read_root(file, known)
        if key.public_key() != root.public_key():
            raise StateError(f"{directory}/ca: root.key and root.pem do not match", "restore both from a backup")
        return key

    reserved = read_reserved(directory / KEYS)
    own = _consortium(settings, read_keys_of(directory / KEYS, settings.origin), reserved)
    return Coordinator(directory, settings, root, unlock, Members(directory / "members.db", own))


def new_keys(origin: str) -> Keys:
    """Make the keys of log, statements and releases.

    Raises:
        StateError: The installed library has no ML-DSA-65.
    """
    log, statements, release = (
        Ed25519PrivateKey.generate(),
        Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
    )
    return Keys(origin, log, statements, release, mldsa.new_key())


def read_reserved(directory: Path) -> frozenset[str]:
    """Return the public keys before and after the present ones, in hexadecimal. No site may join with one.

    While a rotation is under way, the round log may name the new keys already, and any member could claim one.

    Raises:
        StateError: A file cannot be read.
    """
    found = set[str]()
    following = directory / NEXT
    for name in (LOG_KEY, COORDINATOR_KEY, MLDSA_KEY):
        path = following / name
        try:
            if name == MLDSA_KEY:
                found.add(mldsa.public_of(read_mldsa_key(path, "coordinator")).hex())
            else:
                found.add(public_key(read_key(path, "coordinator")))
        except StateError:
            if path.exists():  # otherwise no rotation is under way, or the key has just become the present one
                raise
    try:
        return frozenset(found | {*(directory / FORMER).read_text(encoding="ascii").split()})
    except FileNotFoundError:
        return frozenset(found)
    except (OSError, ValueError) as error:
        raise StateError(
            f"{directory / FORMER} cannot be read ({type(error).__name__})", "restore the file from a backup"
        ) from None


def log_members(made: Coordinator, journal: Journal) -> int:
    """Log the decisions about members that are not in the round log yet, and publish its policy. Returns how many.

    Raises:
        StateError: The log or the members' file could not be written.
        VerificationError: The log's history does not allow a statement.
    """
    due = made.members.statements()
    for _, statement in due:
        # It is in the log already if a crash came between the log's write and the mark in the members' file.
        if not journal.holds(statement):
            journal.say(statement)
    # Log first, mark second: in the other order a crash would lose the statement.
    if due:
        journal.sign_head()
    for number, _ in due:
        made.members.mark_logged(number)
    policy = made.members.policy()
    if policy is not None:
        write_durably(made.directory / "public/log.policy", policy.text.encode())
    return len(due)


def log_due(made: Coordinator) -> tuple[int, StateError | None]:
    """Log the decisions about members that are due, as `log_members`.

    Returns:
        How many were due, and why they wait, if they do: another process has the log open.
    """
    from privet.server.log.journal import open_journal

    due = len(made.members.statements())
    if not due:
        return 0, None
    try:
        with open_journal(made.log_directory, made.keys) as journal:
            return log_members(made, journal), None
    except StateError as error:
        return due, error


def _key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    hidden = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


def _check_private(path: Path) -> None:
    try:
        if path.stat().st_mode & 0o077:
            raise StateError(
                f"{path}: other users of this machine can read this private key", f"run `chmod 600 {path}`"
            )
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror})", "restore the file from a backup") from None


def _read_certificate(path: Path) -> Certificate:
    try:
        return read_certificate(path.read_bytes())
    except (OSError, ProtocolError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no certificate"
        raise StateError(f"the root certificate {path} cannot be read ({why})", KEPT) from None


def _read_root(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), passphrase)
    except (OSError, ValueError, TypeError) as error:
        if passphrase is not None and isinstance(error, ValueError):
            raise StateError(
                f"the passphrase does not open the root's key {path}, or the file is damaged",
                "name the file of the right passphrase with --passphrase-file",
            ) from None
        hint = "if the key is encrypted, and in no other case, name the file of its passphrase with --passphrase-file"
        raise StateError(f"{path} cannot be read as a private key ({type(error).__name__})", hint) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"{path} is not a P-256 key", "restore it from a backup")
    return key


def _consortium(settings: Settings, keys: Keys, former: frozenset[str] = frozenset()) -> Consortium:
    return Consortium(
        name=settings.name,
        log=keys.public,
        coordinator=public_key(keys.coordinator),
        colluding=settings.colluding,
        address=settings.address,
        enrolment=settings.enrolment,
        fleet=settings.fleet,
        former=former,
    )
