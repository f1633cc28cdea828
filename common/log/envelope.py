"""Signed statements: DSSE v1 envelopes with one Ed25519 signature, and commitments to values outside the log.

An envelope is canonical JSON (RFC 8785) in one form::

    {"payload":"<base64>","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"<hex>","sig":"<base64>"}]}

where `keyid` is the signer's public key in hexadecimal. As DSSE demands, it only selects a key: the verifier names
the keys that count. Decoding accepts exactly the bytes that encoding writes, so a statement and a key have one
envelope, of which no byte can be varied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.note import decode_base64, encode_base64, is_weak
from privet.common.log.statements import Statement
from privet.common.log.tiles import MAX_LEAF_BYTES

PAYLOAD_TYPE = "application/vnd.in-toto+json"
SALT_BYTES = 32

_FORM = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/]+={0,2})","payloadType":"' + re.escape(PAYLOAD_TYPE.encode()) + rb'",'
    rb'"signatures":\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{86}==)"\}\]\}'
)
_COMMITMENT = b"privet-commitment/1\x00"


@dataclass(frozen=True)
class Envelope:
    """A payload and one signature over it.

    Attributes:
        payload: The statement's bytes.
        key: The signer's Ed25519 public key, 32 bytes.
        signature: Ed25519 over the pre-authentication encoding, 64 bytes.
    """

    payload: bytes
    key: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Return the envelope's bytes.

        Raises:
            ProtocolError: The envelope is too long for a leaf of the log.
        """
        data = (
            f'{{"payload":"{encode_base64(self.payload)}","payloadType":"{PAYLOAD_TYPE}",'
            f'"signatures":[{{"keyid":"{self.key.hex()}","sig":"{encode_base64(self.signature)}"}}]}}'
        ).encode("ascii")
        _check_size(data)
        return data

    @classmethod
    def decode(cls, data: bytes) -> Envelope:
        """Take an envelope apart without verifying it.

        Raises:
            ProtocolError: It is not a canonical envelope with one signature.
        """
        _check_size(data)
        match = _FORM.fullmatch(data)
        if not match:
            raise ProtocolError(
                "a leaf must be a signed envelope (DSSE) in canonical form with one Ed25519 signature, found other "
                "bytes",
                "get the leaf again; if it stays so, do not trust the log",
            )
        payload, key, signature = match.groups()
        return cls(
            decode_base64(payload, "envelope: payload"),
            bytes.fromhex(key.decode("ascii")),
            decode_base64(signature, "envelope: signature"),
        )

    def check(self) -> None:
        """Check the signature under the envelope's own key. The caller must check that this key counts.

        Raises:
            VerificationError: The signature does not match, or the key is one under which anything does.
        """
        if is_weak(self.key):
            raise VerificationError(
                f"the key {self.key.hex()[:16]} of a statement is a weak one: it signs everything",
                "do not trust the statement; its author must join again with new keys",
            )
        try:
            _public(self.key).verify(self.signature, pae(PAYLOAD_TYPE, self.payload))
        except (InvalidSignature, ValueError):
            raise VerificationError(
                f"the signature of a statement by key {self.key.hex()[:16]} does not match",
                "do not trust the statement: it or its signature was changed",
            ) from None


@lru_cache(maxsize=4096)
def _public(key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(key)


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (DSSE v1 protocol, section Signature Definition)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign_envelope(statement: Statement, key: Ed25519PrivateKey) -> bytes:
    """Sign a statement and return its envelope's bytes, ready to be a leaf.

    Raises:
        ProtocolError: The envelope would be longer than 65 535 bytes.
    """
    payload = encode_statement(statement)
    signature = key.sign(pae(PAYLOAD_TYPE, payload))
    return Envelope(payload, key.public_key().public_bytes_raw(), signature).encode()


def verify_envelope(data: bytes, keys: Container[bytes]) -> tuple[bytes, Statement]:
    """Verify an envelope and return the signer's public key and the statement.

    The signature is checked before the payload is parsed, so nothing unauthenticated reaches the parser.

    Args:
        data: The envelope.
        keys: Public keys of the signers whose statements count.

    Raises:
        ProtocolError: It is not a canonical envelope of a statement.
        VerificationError: The key is not one of `keys`, or the signature does not match.
    """
    envelope = Envelope.decode(data)
    if envelope.key not in keys:
        raise VerificationError(
            f"a statement is signed with key {envelope.key.hex()[:16]}, which is not a key of a member",
            "do not trust the statement; ask the coordinator whose key it is",
        )
    envelope.check()
    return envelope.key, parse_statement(envelope.payload)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_LEAF_BYTES:
        raise ProtocolError(
            f"a signed statement of the round log may have at most {MAX_LEAF_BYTES} bytes, got {len(data)}",
            "write a digest to the log, and keep the content outside it",
        )


def commit(name: str, value: Any, salt: bytes) -> str:
    """Commit to a value that stays out of the log: SHA-256 over a salt and the canonical JSON of name and value.

    The commitment binds the site to the value, and hides it from everyone who does not know the salt, even if only
    few values are possible. Draw a fresh salt for each commitment, and keep it. To open a commitment, compute it again.

    Args:
        name: Name of the value. The same value under another name has another commitment.
        value: Any JSON value.
        salt: 32 secret random bytes.

    Returns:
        ``sha256:<hex>``.

    Raises:
        ProtocolError: The salt has another length, or JSON cannot hold the value exactly.
    """
    if len(salt) != SALT_BYTES:
        raise ProtocolError(
            f"commitment: expected a salt (secret random bytes) of {SALT_BYTES} bytes, got {len(salt)}",
            "report this as a bug",
        )
    try:
        content = canonical_json({"name": name, "value": value})
    except ValueError as error:  # its text is left out: it may quote the value, which is secret
        raise ProtocolError(
            f"commitment {name}: the value cannot be written as canonical JSON ({type(error).__name__})",
            "report this as a bug",
        ) from None
    return "sha256:" + hashlib.sha256(_COMMITMENT + salt + content).hexdigest()
