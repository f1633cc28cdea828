"""The keys, certificate and directory of a site, and how the site becomes a member of a consortium.

::

    DIRECTORY/
      site.toml            the site file; written once, and completed by the operator
      policy.toml          the site's policy; written by `privet site policy --init`
      keys/                0700: identity.pem, witness.pem, mldsa65.pem, which signs beside these two, tls.pem (key and
                           certificate), node (OpenSSH), node.pub
      consortium/          root.pem and request.json, the site's request to join; roster.json, what the coordinator says
                           of the members; trusted.json, the keys that people confirmed (`privet.client.trust`);
                           log.policy, which follows from these and from the log
      state/               its ledger, its approvals, and the checkpoints that it cosigned

Keys are made at the site and stay there. The root certificate comes from the invitation token; no other is trusted.
What the coordinator says about members is a claim until their words were compared.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509 import Certificate

from privet.client.site import ASKED, JOINED, check_member, load_site
from privet.client.trust import TRUSTED, Trusted, changing, read_trusted, write_trusted
from privet.common.errors import ProtocolError, StateError, StudyError, VerificationError
from privet.common.files import write_durably, write_new
from privet.common.log import mldsa
from privet.common.log.note import COSIGNATURE, NoteKey, public_of
from privet.common.pki.certificates import key_bytes, problems, read_certificate, request, to_pem
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import JoinReply, JoinRequest, SiteKeys, Terms
from privet.common.pki.keyfile import MLDSA_KEY, make_key, public_key, read_key, read_mldsa_key, write_key
from privet.common.pki.token import Token

TLS = "keys/tls.pem"
ROOT = "consortium/root.pem"
"""Path in a site's directory: the consortium's root certificate, from the invitation token."""
_SITE = """\
# `privet site setup site.toml` asks for what is missing here, and writes it; all other lines stay as they are.
name = "{site}"
train = ["data/train.csv"]          # your files: CSV, JSON Lines or Parquet
# declared_count = 1200             # a round number near your number of units; it is public
# patient_column = "patient_id"     # the column that identifies patients; studies of patients must name it
# patient_ids = "number"            # 101, "0101" and 101.0 are one; "text": case is ignored; "case": it matters
dataset = "notes"                   # the lasting name of your data
ledger = "state/ledger.db"          # `privet site init site.toml` creates it, once
ledger_key = "keys/ledger.key"      # encrypts the updates in the ledger; it needs no backup
# anchor = "/mnt/other-disk/ledger-head.json"
# anchor_same_disk = true           # accept an anchor on the ledger's disk: one backup may then restore both
policy = "policy.toml"              # `privet site policy site.toml --init` writes a first one
approvals = "state/approvals"       # `privet site approve` adds to it
identity = "keys/identity.pem"
mldsa = "keys/mldsa65.pem"          # signs beside identity and log.key, for when Ed25519 is broken
trusted = "consortium/trusted.json" # `privet site trust site.toml NAME` adds to it, after a telephone call

[coordinator]
address = "{fleet}"
root = "consortium/root.pem"
key = "keys/node"
# metrics_port = 9464               # on 127.0.0.1

[log]
state = "state/log"
key = "keys/witness.pem"

# [limit]                           # what your dataset may spend in its lifetime
# unit = "patient"
# epsilon = 6.0
# delta = 1e-6
"""


@dataclass(frozen=True)
class Enrolment:
    """A site's directory."""

    directory: Path

    @property
    def root(self) -> Certificate:
        """The consortium's root certificate. Raises as `read_certificate`, and StateError if it is missing."""
        return read_certificate(self._read(ROOT))

    @property
    def certificate(self) -> Certificate:
        """The site's certificate. Raises as `root`."""
        return read_certificate(self.tls)

    @property
    def asked(self) -> JoinRequest:
        """The request with which the site joined: its name and public keys. Raises as `root`."""
        return JoinRequest.decode(self._read(ASKED))

    @property
    def terms(self) -> Terms:
        """The members and addresses of the site's consortium. Raises as `root`."""
        return Terms.decode(self._read(JOINED))

    @property
    def tls(self) -> bytes:
        """Key and certificate for TLS (PEM), in one file, so that one write replaces both."""
        return self._read(TLS)

    def keep_certificate(self, certificate: Certificate, key: bytes) -> None:
        """Replace key and certificate for TLS in one write. Anything in `key` (PEM) besides the key is ignored."""
        private = load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_durably(self.directory / "keys/tls.pem", private + to_pem(certificate).encode("ascii"), 0o600)

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            if name == JOINED:
                check_member(self.directory)
            hint = f"join with `privet site join @TOKEN {self.directory}`, or restore the file from a backup"
            if name == TLS:
                hint = f"get another one with `privet site renew SITE --force`; or {hint}"
            raise StateError(f"{self.directory / name} cannot be read ({error.strerror})", hint) from None


def prepare_request(directory: Path, token: Token) -> JoinRequest:
    """Make a site's keys and its request to join. If the request exists already, return it again.

    If a token expires before the site is a member, a new token makes a new request with the same keys.

    Raises:
        StateError: The directory belongs to another site or to a member, or it cannot be written.
    """
    kept = directory / ASKED
    if kept.exists():
        found = JoinRequest.decode(kept.read_bytes())
        if found.secret == token.secret.hex():
            if not (directory / ROOT).exists():  # the token holds the root certificate
                write_durably(directory / ROOT, to_pem(token.certificate).encode("ascii"))
            return found
        if found.keys.site != token.site or (directory / JOINED).exists():
            raise StateError(
                f"{directory} belongs to site {found.keys.site} already",
                "join in a new, empty directory: `privet site join @TOKEN DIRECTORY`",
            )
        second = own_mldsa(directory) if NoteKey.parse(found.keys.witness).pq else None
        asked = JoinRequest.make(token.secret, found.keys, _own_key(directory / "keys/identity.pem"), second)
        write_durably(directory / ROOT, to_pem(token.certificate).encode("ascii"))
        keep_request(directory, asked)
        return asked
    for part in ("keys", "consortium", "state"):
        (directory / part).mkdir(mode=0o700, parents=True, exist_ok=True)
    identity, witness = (_own_key(directory / f"keys/{name}.pem") for name in ("identity", "witness"))
    pq = own_mldsa(directory)
    tls, node = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    # These two leave the site only with the request. Until it is written, what a crash left of them can be replaced.
    write_durably(directory / "keys/tls.pem", key_pem(tls), 0o600)
    hidden = node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_durably(directory / "keys/node", hidden, 0o600)
    public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_durably(directory / "keys/node.pub", public + b"\n", 0o600)
    write_durably(directory / ROOT, to_pem(token.certificate).encode("ascii"))
    keys = SiteKeys(
        site=token.site,
        identity=public_key(identity),
        witness=public_of(token.site, COSIGNATURE, witness, pq).text,
        node=public.decode("ascii"),
        request=request(tls),
    )
    made = JoinRequest.make(token.secret, keys, identity, pq)
    # Last: a request on disk means that all keys are there. It holds the token, so only its owner may read it.
    write_new(kept, made.encode())
    return made


def accept_membership(directory: Path, reply: JoinReply, now: datetime) -> Certificate:
    """Check the certificate and the roster of a new member, and complete the site's directory. It may be repeated.

    Raises:
        VerificationError: The keys are not those that this site sent, or the certificate is not acceptable.
        ProtocolError: The site is not a member yet.
    """
    enrolment = Enrolment(directory)
    asked = enrolment.asked
    # An attacker between site and coordinator could have replaced the keys in the request by its own.
    if reply.fingerprint != asked.keys.fingerprint:
        raise VerificationError(
            f"the coordinator received other public keys for site {asked.keys.site} than this site sent: the "
            "fingerprint in its reply differs",
            "warn the coordinator's operator: the keys were replaced on the way. Then join with a new token",
        )
    if reply.terms is None:
        raise ProtocolError(
            f"site {asked.keys.site} is not a member yet",
            "run the command again after the coordinator's operator has approved the site",
        )
    certificate = read_certificate(reply.certificate)
    check_certificate(certificate, enrolment.root, asked.keys.site, enrolment.tls, now)
    if asked.keys not in reply.terms.members:
        raise VerificationError(
            f"the coordinator's roster (list of members) holds other public keys for site {asked.keys.site} than this "
            "site sent",
            "do not take part in studies; warn the coordinator's operator",
        )
    enrolment.keep_certificate(certificate, enrolment.tls)
    keep_terms(directory, reply.terms)
    if not (directory / TRUSTED).exists():
        write_trusted(directory / TRUSTED, Trusted(members=(asked.keys,)))
    if not (directory / "site.toml").exists():
        new_site_file(directory / "site.toml", asked.keys.site, reply.terms)
    return certificate


def new_site_file(file: Path, site: str, terms: Terms) -> None:
    """Write a first site file, to be completed. Raises as `write_new`."""
    write_new(file, _SITE.format(site=site, fleet=terms.fleet).encode())


def keep_terms(directory: Path, terms: Terms) -> None:
    """Store the list of members as the coordinator states it. Nobody is trusted because of it.

    Raises:
        StateError: It cannot be written.
    """
    try:
        write_durably(directory / JOINED, terms.encode())
    except OSError as error:
        raise StateError(
            f"{directory / JOINED} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None


def confirm(directory: Path, name: str | None, told: str) -> Trusted:
    """Confirm the consortium's charter, or a member's keys, by words that the other side's operator read out.

    Args:
        directory: The site's directory, with the roster that the coordinator stated.
        name: The member; None for the charter.
        told: The words.

    Returns:
        All that is confirmed now.

    Raises:
        VerificationError: The words are others: nothing is changed.
        ProtocolError: The coordinator names no such member, or states no charter.
        StateError: A file cannot be read or written.
    """
    enrolment = Enrolment(directory)
    terms, file = enrolment.terms, directory / TRUSTED
    with changing(file):
        trusted = read_trusted(file)
        if name is None:
            trusted = trusted.with_charter(Charter.claimed(terms, enrolment.root), told)
        else:
            trusted = trusted.with_member(member_of(terms, name), told)
        write_trusted(file, trusted)
    return trusted


def migrate_site(file: Path) -> Path:
    """Change a site file of an earlier version to trust confirmed keys alone; return the path of the old one.

    Raises:
        ProtocolError: The site has not joined, or its file is of this version.
        StudyError: The file is not as an earlier version wrote it, so that it has to be changed by hand.
        StateError: A file cannot be read or written.
    """
    directory, kept = file.parent, file.with_name(f"{file.name}.before-trust")
    asked = Enrolment(directory).asked
    if load_site(file).trusted is not None:
        raise ProtocolError(f"{file} trusts confirmed keys already", "confirm more with `privet site trust SITE NAME`")
    data, mode = file.read_bytes(), stat.S_IMODE(file.stat().st_mode)
    text = data.decode("utf-8")
    if not (kept.is_file() and kept.read_bytes() == data):  # a migration that was interrupted has left its copy
        write_new(kept, data)
    lines, table = [f'trusted = "{TRUSTED}"'], ""
    for line in text.splitlines():
        begins = line.split("#")[0].strip()
        if begins.startswith("["):
            table = begins
        old = table == "[peers]" or (table == "[log]" and begins.partition("=")[0].strip() in ("policy", "coordinator"))
        lines += [] if old else [line]
    if not any(line.startswith("ledger_key") for line in lines):
        lines.insert(1, 'ledger_key = "keys/ledger.key"')
    write_durably(file, ("\n".join(lines) + "\n").encode(), mode)
    try:
        if load_site(file).trusted is None:
            raise StudyError("the site file has no `trusted`", "")
    except StudyError as error:
        write_durably(file, data, mode)
        kept.unlink()
        raise StudyError(
            f"{file} is not written as `privet site join` writes it, and cannot be changed by this command: "
            f"{error.message}",
            f'remove [peers], log.policy and log.coordinator by hand, and add trusted = "{TRUSTED}" at the top',
        ) from None
    if not (directory / TRUSTED).exists():
        write_trusted(directory / TRUSTED, Trusted(members=(asked.keys,)))
    return kept


def keep_request(directory: Path, asked: JoinRequest) -> None:
    """Store the request that names this site's keys. It holds the token, so only its owner may read it.

    Raises:
        StateError: It cannot be written.
    """
    file = directory / ASKED
    try:
        write_durably(file, asked.encode(), 0o600)
    except OSError as error:
        raise StateError(
            f"{file} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None


def member_of(terms: Terms, name: str) -> SiteKeys:
    """Return a member's keys as the coordinator states them.

    Raises:
        ProtocolError: It names no such member.
    """
    for keys in terms.members:
        if keys.site == name:
            return keys
    raise ProtocolError(
        f"the coordinator names no member {name[:64]!r}", "list the members with `privet site roster SITE`"
    )


def check_certificate(certificate: Certificate, root: Certificate, site: str, key: bytes, now: datetime) -> None:
    """Check that a site can use a certificate.

    Raises:
        VerificationError: It cannot; the message lists every reason.
    """
    why = list(problems(certificate, root, "site", now, site))
    private = load_pem_private_key(key, None)
    public, own = certificate.public_key(), private.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(own, ec.EllipticCurvePublicKey):
        why.append("it is not for a P-256 key")
    elif key_bytes(public) != key_bytes(own):
        why.append("it is for another key than this site's")
    if why:
        hint = "get another one with `privet site renew SITE --force`, or join again with a new token"
        raise VerificationError(f"the certificate of site {site} cannot be used: {'; '.join(why)}", hint)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, PKCS 8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _own_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a file. Make the file if it does not exist."""
    return read_key(path, path.stem) if path.exists() else make_key(path)


def own_mldsa(directory: Path) -> MLDSA65PrivateKey:
    """Return the ML-DSA-65 key of a site's directory. Make the file if it does not exist."""
    path = directory / "keys" / MLDSA_KEY
    return read_mldsa_key(path, path.stem) if path.exists() else write_key(path, mldsa.new_key())
