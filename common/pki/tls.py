"""TLS contexts from keys that are in memory: TLS 1.3 alone, and one root that is trusted."""

from __future__ import annotations

import secrets
import ssl
import tempfile

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509 import Certificate

from privet.common.pki.certificates import to_pem


def tls_context(side: int, root: Certificate | None, alpn: str = "h2") -> ssl.SSLContext:
    """Return a context that refuses everything before TLS 1.3.

    Args:
        side: `ssl.PROTOCOL_TLS_CLIENT` or `ssl.PROTOCOL_TLS_SERVER`.
        root: The root that the other side's certificate must come from; None: a server that asks for no certificate.
        alpn: The one application protocol.
    """
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([alpn])
    if root is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=to_pem(root))
    return context


def load_pair(context: ssl.SSLContext, certificate: Certificate, key: EllipticCurvePrivateKey) -> None:
    """Give a context its own certificate and key.

    OpenSSL reads keys from files only. This one is encrypted for the moment that it is in a file, with a secret that
    is nowhere else.
    """
    secret = secrets.token_bytes(32).hex()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret.encode()))
    with tempfile.NamedTemporaryFile(prefix="privet-") as file:
        file.write(to_pem(certificate).encode("ascii") + private)
        file.flush()
        context.load_cert_chain(file.name, password=secret)
