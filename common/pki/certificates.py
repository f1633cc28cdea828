"""The consortium's certificates: one root, short-lived certificates for sites and the service, and invitation tokens.

Guarantees. The issuer chooses the name in a certificate. A request holds only a key, and the proof that the requester
has it. A site's certificate does not work for a server, nor the other way round. A certificate is accepted only if the
list of `problems` is empty. Each problem is a sentence, since gRPC itself reports no reason. A certificate is withdrawn
by its short life, and by the list that the service consults for each call.

Time and keys are arguments. All keys for TLS are P-256, which every TLS 1.3 library supports.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privet.common.errors import ProtocolError

CertificateRole = Literal["site", "service"]
MAX_DAYS = 30
_ROOT_YEARS = 10
SKEW = timedelta(minutes=5)
"""Largest difference between the clocks of two machines."""
_DIGITS, _GROUP = 60, 5
SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_USES = {"site": ExtendedKeyUsageOID.CLIENT_AUTH, "service": ExtendedKeyUsageOID.SERVER_AUTH}
_LONGEST_REQUEST = 4096


@dataclass(frozen=True)
class Authority:
    """The consortium's root with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def create_authority(consortium: str, now: datetime) -> Authority:
    """Make a consortium's root: P-256, valid for ten years. It can sign end certificates, but no other authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(f"{consortium} root")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=365 * _ROOT_YEARS))
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Authority(builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)


def issue(
    authority: Authority, key: ec.EllipticCurvePublicKey, name: str, role: CertificateRole, now: datetime, days: float
) -> x509.Certificate:
    """Issue a certificate to a site by its name, or to the service by its host.

    Args:
        authority: The consortium's root.
        key: Public key that the certificate is for.
        name: The site's name from its invitation, or the host name or IP address of the service.
        role: The use of the certificate: by a site, or by the service.
        now: The current time. The certificate is valid from five minutes before, as clocks differ.
        days: Days for which it is valid, above 0 and at most 30.

    Raises:
        ProtocolError: `days` is out of range.
    """
    # Short lives are the main way to withdraw a certificate, so no caller can choose a long one.
    if not 0 < days <= MAX_DAYS:
        raise ProtocolError(
            f"a certificate must be valid for more than 0 and at most {MAX_DAYS} days, found {days:g} days"
        )
    issuer = authority.certificate.subject
    builder = _builder(_named(name), issuer, key, now, now + timedelta(days=days))
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USES[role]]), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name, role)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def request(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a certificate signing request (PEM). It holds no name: the issuer chooses the name."""
    signed = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return signed.public_bytes(Encoding.PEM).decode("ascii")


def read_request(pem: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate signing request. Everything else in the request is ignored.

    Raises:
        ProtocolError: It is not a request, its key is not P-256, or its signature is not that of the key.
    """
    try:
        if len(pem) > _LONGEST_REQUEST:
            raise ValueError("too long")
        found = x509.load_pem_x509_csr(pem.encode("ascii"))
        key, signed = found.public_key(), found.is_signature_valid
    except (ValueError, TypeError, InvalidSignature):
        raise ProtocolError(
            "certificate request: expected a certificate signing request in PEM format",
            "make a new request at the site: `privet site join TOKEN`",
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or not signed:
        raise ProtocolError(
            "certificate request: expected a P-256 key, and a signature made with that key",
            "make a new request at the site: `privet site join TOKEN`",
        )
    return key


# --- checking certificates -------------------------------------------------------------------------------------


def read_certificate(pem: str | bytes) -> x509.Certificate:
    """Read one certificate.

    Raises:
        ProtocolError: It is not a certificate in PEM.
    """
    try:
        return x509.load_pem_x509_certificate(pem.encode("ascii") if isinstance(pem, str) else pem)
    except ValueError:
        raise ProtocolError("certificate: expected an X.509 certificate in PEM format") from None


def to_pem(certificate: x509.Certificate) -> str:
    """Return a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def problems(
    certificate: x509.Certificate, root: x509.Certificate, role: CertificateRole, now: datetime, name: str | None = None
) -> tuple[str, ...]:
    """Return the reasons why a certificate is not acceptable, one sentence each; empty if it is acceptable.

    Args:
        certificate: The certificate to check.
        root: Root certificate of the consortium.
        role: The use that it must be for.
        now: The time by this machine's clock.
        name: The name that it must be for; None: any name.
    """
    found = []
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        found.append(f"it expired at {end:%Y-%m-%d %H:%M} UTC; this machine's clock says {now:%Y-%m-%d %H:%M}")
    if now < start:
        found.append(
            f"it is not valid before {start:%Y-%m-%d %H:%M} UTC; this machine's clock says {now:%Y-%m-%d %H:%M}: "
            "check the clock"
        )
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        found.append(f"it is not signed by the consortium's root, whose fingerprint is {fingerprint(root_bytes(root))}")
    if _extended_uses(certificate) != [_USES[role]]:
        what = "a client certificate, as sites have" if role == "site" else "a server certificate"
        found.append(f"it is not for this use: expected {what}")
    if name is not None and name_of(certificate, role) != name:
        found.append(f"it is for {name_of(certificate, role) or 'no name'}, expected {name}")
    return tuple(found)


def name_of(certificate: x509.Certificate, role: CertificateRole) -> str | None:
    """Return the one name that a certificate has for this role; None if it has none or several."""
    try:
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return None
    if len(names) != 1:
        return None
    value = names[0].value
    if role == "service":
        return str(value) if isinstance(names[0], x509.DNSName | x509.IPAddress) else None
    site = str(value).removeprefix(_URI)
    known = isinstance(names[0], x509.UniformResourceIdentifier) and str(value).startswith(_URI)
    return site if known and SITE_NAME.fullmatch(site) else None


def issued_at(certificate: x509.Certificate) -> datetime:
    """Return when a certificate of the consortium was issued."""
    return certificate.not_valid_before_utc + SKEW


def life_of(certificate: x509.Certificate) -> timedelta:
    """Return the whole time for which a certificate is valid."""
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc


def renewal_of(certificate: x509.Certificate) -> datetime:
    """Return the time at which two thirds of a certificate's life are over."""
    return certificate.not_valid_before_utc + life_of(certificate) * 2 / 3


def due_for_renewal(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether two thirds of a certificate's life are over."""
    return now >= renewal_of(certificate)


# --- fingerprints ----------------------------------------------------------------------------------------------


def fingerprint(data: bytes) -> str:
    """Return a fingerprint that two people can compare by telephone: 60 decimal digits, 199 bits of SHA-256."""
    number = int.from_bytes(hashlib.sha256(b"privet-fingerprint/1\x00" + data).digest(), "big") % 10**_DIGITS
    digits = f"{number:0{_DIGITS}d}"
    return " ".join(digits[start : start + _GROUP] for start in range(0, _DIGITS, _GROUP))


def same_fingerprint(told: str, expected: str) -> bool:
    """Return whether a typed fingerprint is the expected one. All digits must match; separators do not matter."""
    return hmac.compare_digest(re.sub(r"[ .,-]", "", told).encode(), expected.replace(" ", "").encode())


def root_bytes(root: x509.Certificate) -> bytes:
    """Return the bytes whose fingerprint is the root's: the certificate (DER)."""
    return root.public_bytes(Encoding.DER)


def key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


# --- building --------------------------------------------------------------------------------------------------

_URI = "urn:privet:site:"


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start.astimezone(UTC) - SKEW)
        .not_valid_after(end.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _alternative(name: str, role: CertificateRole) -> x509.GeneralName:
    if role == "site":
        return x509.UniformResourceIdentifier(_URI + name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _extended_uses(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []
