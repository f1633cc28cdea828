"""The one-time token with which an invited site joins: a secret, an address, and the root certificate to trust."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, StudyError
from privet.common.pki.addresses import ADDRESS_PATTERN
from privet.common.pki.certificates import SITE_NAME, root_bytes

TOKEN_LIFE = timedelta(hours=24)
_TOKEN = "privet1."  # noqa: S105 - the prefix that tells a token's kind
_ADDRESS = re.compile(ADDRESS_PATTERN, re.ASCII)


# --- tokens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """An invitation token: it lets one site join once.

    Attributes:
        site: The name that the site will have.
        address: Host and port of the enrolment service.
        root: Root certificate of the consortium (DER), the only one that the site trusts from here on.
        secret: 32 random bytes. The coordinator keeps only their hash.
    """

    site: str
    address: str
    root: bytes
    secret: bytes

    @property
    def text(self) -> str:
        """The token as one word. It is secret: whoever has it can ask to join under the site's name."""
        root = urlsafe_b64encode(self.root).decode("ascii")
        values = {"site": self.site, "address": self.address, "root": root, "secret": self.secret.hex()}
        return _TOKEN + urlsafe_b64encode(canonical_json(values)).decode("ascii").rstrip("=")

    @property
    def certificate(self) -> x509.Certificate:
        """The root certificate."""
        return x509.load_der_x509_certificate(self.root)

    @classmethod
    def make(cls, site: str, address: str, root: x509.Certificate) -> Token:
        """Make an invitation with a fresh secret.

        Raises:
            StudyError: The name is not a valid site name.
        """
        if not SITE_NAME.fullmatch(site):
            raise StudyError(
                f"site: expected a name of 1 to 63 lower-case letters, digits and dashes, found {site[:64]!r}",
                "choose such a name, for example st-anne",
            )
        return cls(site, address, root_bytes(root), secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token.

        Raises:
            ProtocolError: It is not a token, or a part is missing. The message does not quote it: a token is secret.
        """
        try:
            encoded = text.strip().removeprefix(_TOKEN)
            values = json.loads(urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
            root, secret = urlsafe_b64decode(values["root"]), bytes.fromhex(values["secret"])
            token = cls(str(values["site"]), str(values["address"]), root, secret)
            x509.load_der_x509_certificate(root)
            fits = SITE_NAME.fullmatch(token.site) and _ADDRESS.fullmatch(token.address) and len(secret) == 32
            # A token has one form. Comparing with it also finds surplus characters and changed bits.
            whole = bool(fits) and token.text == text.strip()
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ProtocolError(
                "the invitation token is incomplete or has a wrong character",
                "copy all of the token, as one line; a token in a file is named as @FILE",
            ) from None
        return token


def hash_of(secret: bytes) -> str:
    """Return the hash of a token's secret, which the coordinator stores.

    A secret of 256 random bits cannot be found from its hash, so the hash needs no salt.
    """
    return hashlib.sha256(b"privet-token/1\x00" + secret).hexdigest()
