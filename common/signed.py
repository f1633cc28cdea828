"""JSON documents that one Ed25519 key signs, as DSSE envelopes, for files that are in no log."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privet.common.canonical import canonical_json
from privet.common.errors import VerificationError
from privet.common.log.envelope import pae


def sign_document(document: Mapping[str, Any], kind: str, key: Ed25519PrivateKey) -> bytes:
    """Return a document in a signed envelope (DSSE v1), as one line of canonical JSON.

    Args:
        document: Plain JSON values.
        kind: Its media type, which the signature covers.
        key: The signer's key.
    """
    payload = canonical_json(document)
    signature = {"keyid": key.public_key().public_bytes_raw().hex(), "sig": _text(key.sign(pae(kind, payload)))}
    return canonical_json({"payload": _text(payload), "payloadType": kind, "signatures": [signature]}) + b"\n"


def open_document(data: bytes, kind: str, public: bytes) -> dict[str, Any]:
    """Return the document in a signed envelope.

    Args:
        data: The envelope.
        kind: The media type that it must have.
        public: The signer's public key, 32 bytes.

    Raises:
        VerificationError: It is no document of this type that this key has signed.
    """
    try:
        envelope = json.loads(data)
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        found = base64.b64decode(signature["sig"], validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(found, pae(kind, payload))
        if envelope["payloadType"] != kind:
            raise ValueError
        return dict(json.loads(payload))
    except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
        raise VerificationError(
            f"this is no document of the type {kind} that the key {public.hex()[:16]} has signed",
            "ask its author for the file again, and compare the key with the one in the round log",
        ) from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
