"""Signed statements: DSSE v1 envelopes with one Ed25519 signature, and commitments to values outside the log.

An envelope is canonical JSON (RFC 8785) in one form::

    {"payload":"<base64>","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"<hex>","sig":"<base64>"}]}

where `keyid` is the signer's public key in hexadecimal. As DSSE demands, it only selects a key: the verifier names
the keys that count. An author with a hybrid key signs twice::

    "signatures":[{"keyid":"<hex>","sig":"<base64>"},{"keyid":"mldsa65:<SHA-256 of the key>","sig":"<base64>"}]

The second key is too long to repeat; the log has it since its owner joined. Whoever has one signs twice, and whoever
has none once: a signature that was added or taken away is refused.

Decoding accepts exactly the bytes that encoding writes, so nobody but the signer can vary a byte of an envelope. With
Ed25519 alone a statement and a key have one envelope. With ML-DSA-65 they have as many as the signer makes, so what is
compared are payloads.
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
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log import mldsa
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.mldsa import Use
from privet.common.log.note import decode_base64, encode_base64, is_weak
from privet.common.log.statements import Statement
from privet.common.log.tiles import MAX_LEAF_BYTES

PAYLOAD_TYPE = "application/vnd.in-toto+json"
SALT_BYTES = 32
MAX_STATEMENT_BYTES = (MAX_LEAF_BYTES - 4_800) // 4 * 3
"""A statement of so many bytes fits a leaf, with both signatures."""

_FORM = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/]+={0,2})","payloadType":"' + re.escape(PAYLOAD_TYPE.encode()) + rb'",'
    rb'"signatures":\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{86}==)"\}'
    rb'(?:,\{"keyid":"mldsa65:([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{4412})"\})?\]\}'
)
_COMMITMENT = b"privet-commitment/1\x00"


@dataclass(frozen=True)
class SecondSignature:
    """The signature with ML-DSA-65.

    Attributes:
        key: SHA-256 of the signer's ML-DSA-65 public key, 32 bytes.
        signature: Over the pre-authentication encoding, 3,309 bytes.
    """

    key: bytes
    signature: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload and the signatures of its author over it.

    Attributes:
        payload: The statement's bytes.
        key: The signer's Ed25519 public key, 32 bytes.
        signature: Ed25519 over the pre-authentication encoding, 64 bytes.
        second: The signature with ML-DSA-65; None of an author without such a key.
    """

    payload: bytes
    key: bytes
    signature: bytes
    second: SecondSignature | None = None

    def encode(self) -> bytes:
        """Return the envelope's bytes.

        Raises:
            ProtocolError: The envelope is too long for a leaf of the log.
        """
        signatures = f'{{"keyid":"{self.key.hex()}","sig":"{encode_base64(self.signature)}"}}'
        if self.second is not None:
            signatures += (
                f',{{"keyid":"mldsa65:{self.second.key.hex()}","sig":"{encode_base64(self.second.signature)}"}}'
            )
        data = (
            f'{{"payload":"{encode_base64(self.payload)}","payloadType":"{PAYLOAD_TYPE}","signatures":[{signatures}]}}'
        ).encode("ascii")
        _check_size(data)
        return data

    @classmethod
    def decode(cls, data: bytes) -> Envelope:
        """Take an envelope apart without verifying it.

        Raises:
            ProtocolError: It is not a canonical envelope with one signature of each kind, or of Ed25519 alone.
        """
        _check_size(data)
        match = _FORM.fullmatch(data)
        if not match:
            raise ProtocolError(
                "a leaf must be a signed envelope (DSSE) in canonical form with one Ed25519 signature, and one with "
                "ML-DSA-65 if its author has such a key, found other bytes",
                "get the leaf again; if it stays so, do not trust the log",
            )
        payload, key, signature, pq, second = match.groups()
        return cls(
            decode_base64(payload, "envelope: payload"),
            bytes.fromhex(key.decode("ascii")),
            decode_base64(signature, "envelope: signature"),
            None
            if pq is None
            else SecondSignature(bytes.fromhex(pq.decode("ascii")), decode_base64(second, "envelope: signature")),
        )

    def check(self, pq: bytes) -> None:
        """Check the signatures under the envelope's own key and the author's other key.

        The caller must check that the envelope's key counts.

        Args:
            pq: ML-DSA-65 public key of the owner of the envelope's key; empty if the owner has none.

        Raises:
            VerificationError: A signature does not match, one is missing or one too many, or the Ed25519 key is one
                under which anything matches.
        """
        self.check_first()
        who, message = f"a statement by key {self.key.hex()[:16]}", pae(PAYLOAD_TYPE, self.payload)
        if (self.second is None) == bool(pq):
            expected = "with Ed25519 and with ML-DSA-65, found one" if pq else "with Ed25519 alone, found two"
            raise VerificationError(
                f"{who}: by its author's keys in the log, expected signatures {expected}",
                "do not trust the statement: a signature was taken away, or added",
            )
        if self.second is None:
            return
        named = hashlib.sha256(pq).digest() == self.second.key
        if not (named and mldsa.verifies(pq, self.second.signature, message, Use.STATEMENT)):
            raise VerificationError(
                f"the ML-DSA-65 signature of {who} does not match" + ("" if named else ": it is of another key"),
                "do not trust the statement: it or its signature was changed",
            )

    def check_first(self) -> None:
        """Check the Ed25519 signature alone, as `check` does; only to read who must have signed with ML-DSA-65."""
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


def sign_envelope(statement: Statement, key: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None = None) -> bytes:
    """Sign a statement and return its envelope's bytes, ready to be a leaf. With `pq`, sign with ML-DSA-65 as well.

    Raises:
        ProtocolError: The envelope would be longer than 65 535 bytes.
    """
    payload = encode_statement(statement)
    message, second = pae(PAYLOAD_TYPE, payload), None
    if pq is not None:
        name = hashlib.sha256(mldsa.public_of(pq)).digest()
        second = SecondSignature(name, mldsa.sign(pq, message, Use.STATEMENT))
    return Envelope(payload, key.public_key().public_bytes_raw(), key.sign(message), second).encode()


def verify_envelope(data: bytes, keys: Container[bytes], pq: bytes = b"") -> tuple[bytes, Statement]:
    """Verify an envelope and return the signer's public key and the statement.

    Each signature is checked before the payload is parsed, so nothing unauthenticated reaches the parser.

    Args:
        data: The envelope.
        keys: Public keys of the signers whose statements count.
        pq: ML-DSA-65 public key of these signers; empty if they have none.

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
    envelope.check(pq)
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
