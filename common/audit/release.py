"""The files of a release, and the statement that is signed over them.

The signature follows OpenSSF model signing 1.0: an in-toto statement with one resource for each file, in order of name.
Its subject is the SHA-256 over the digests of all files.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log.envelope import PAYLOAD_TYPE, pae

ADAPTER, CARD, LINEAGE, PRIVACY = "adapter_model.safetensors", "README.md", "lineage.json", "privacy_statement"
KEY, SIGNATURE = "release.pub", "model.sig"
CONFIG = "adapter_config.json"
"""As PEFT reads it."""
STUDY = "study.json"
"""Releases of earlier versions lack it."""
EGRESS = "egress_decision.json"
"""Where the study has a gate: the leaf of the log that accepts the adapter."""
FILES = frozenset({ADAPTER, CONFIG, STUDY, LINEAGE, f"{PRIVACY}.json", f"{PRIVACY}.md", CARD, KEY, SIGNATURE, EGRESS})
"""All files of a release. A site takes no other from its coordinator."""
_PREDICATE = "https://model_signing/signature/v1.0"


def file_digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file that a signature covers, in hexadecimal: all but the signature itself."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != SIGNATURE}


def signed_statement(digests: Mapping[str, str], name: str) -> bytes:
    """Return the in-toto statement about files in canonical JSON.

    Args:
        digests: As `file_digests` returns them.
        name: Name of the model in the signature.
    """
    ordered = sorted(digests.items())
    whole = hashlib.sha256(b"".join(bytes.fromhex(found) for _, found in ordered))
    document = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": whole.hexdigest()}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE],
            },
            "resources": [{"name": file, "algorithm": "sha256", "digest": found} for file, found in ordered],
        },
    }
    return canonical_json(document)


def verify_files(files: Mapping[str, bytes], name: str) -> None:
    """Check a release's signature with the public key among its files. Raises as `verify_digests`."""
    verify_digests(file_digests(files), files.get(KEY, b""), files.get(SIGNATURE, b""), name)


def verify_digests(digests: Mapping[str, str], public: bytes, signed: bytes, name: str) -> None:
    """Check a release's signature, without the files. The log holds the digest of the key file.

    Args:
        digests: As `file_digests` returns them.
        public: The file `KEY`.
        signed: The file `SIGNATURE`.
        name: Name of the model in the signature.

    Raises:
        ProtocolError: Key or signature cannot be read.
        VerificationError: The signature is of another key, or over other files.
    """
    try:
        key = load_pem_public_key(public)
        envelope = json.loads(signed)["dsseEnvelope"]
        payload, (signature,) = base64.b64decode(envelope["payload"], validate=True), envelope["signatures"]
        data = base64.b64decode(signature["sig"], validate=True)
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(
            f"release: {KEY} or {SIGNATURE} is missing or malformed ({type(error).__name__})",
            "get the release again from the coordinator",
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(
            f"release: {KEY} is not an elliptic-curve public key",
            "get the release again from the coordinator",
        )
    try:
        key.verify(data, pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise VerificationError(
            f"release: the signature in {SIGNATURE} was not made with the key in {KEY}",
            "do not use these files; get the release again from the coordinator",
        ) from None
    if payload != signed_statement(digests, name):
        raise VerificationError(
            f"release: a file was changed, added or removed after {SIGNATURE} was made",
            "do not use these files; get the release again from the coordinator",
        )
