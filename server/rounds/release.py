"""The files that a run releases: the adapter, its card, lineage and privacy statement, and one signature over all.

The files are made from the run's state alone. The round log's `export` holds their digests, so that anyone who has the
adapter can trace every round that made it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from privet.common.audit.card import lineage_of, model_card
from privet.common.audit.counts import COUNTS, counts_document
from privet.common.audit.privacy_statement import privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import (
    ADAPTER,
    CARD,
    CONFIG,
    EGRESS,
    KEY,
    LINEAGE,
    PRIVACY,
    SIGNATURE,
    STUDY,
    file_digests,
    signed_statement,
)
from privet.common.canonical import canonical_json, digest
from privet.common.log.envelope import PAYLOAD_TYPE, pae
from privet.server.rounds.state import RunDirectory, RunState


def release_files(
    run: RunDirectory, state: RunState, name: str, signer: ec.EllipticCurvePrivateKey, egress: bytes | None = None
) -> dict[str, bytes]:
    """Return the files of a release by name.

    Args:
        run: The run.
        state: Its last state, with at least one closed round.
        name: The run's name in the log.
        signer: P-256 key.
        egress: Where the study has a gate: the leaf that accepts the adapter.
    """
    privacy = privacy_document(run.study, state.statements, simulated=run.simulated)
    lineage = lineage_of(run.study, name, state.statements)
    files = {
        ADAPTER: state.adapter.data,
        CONFIG: run.peft_config.encode(),
        STUDY: canonical_json(run.study.document()),
        LINEAGE: canonical_json(lineage) + b"\n",
        f"{PRIVACY}.json": canonical_json(privacy) + b"\n",
        f"{PRIVACY}.md": privacy_markdown(privacy).encode(),
        CARD: model_card(run.study, lineage, privacy, state.statements).encode(),
        **({COUNTS: canonical_json(counts_document(run.study, state.statements)) + b"\n"} if run.study.counts else {}),
        **({} if egress is None else {EGRESS: egress}),
        KEY: signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }
    return {**files, SIGNATURE: sign_files(files, run.study.name, signer)}


def sign_files(files: Mapping[str, bytes], name: str, signer: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign files as OpenSSF model signing 1.0 does: a Sigstore bundle with a DSSE envelope and a plain public key.

    Args:
        files: Content by name.
        name: Name of the model in the signature.
        signer: P-256 key; the specification has no Ed25519.
    """
    payload = signed_statement(file_digests(files), name)
    signature = signer.sign(pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    public = signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    document = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(public).hexdigest()}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the digest of each file, as the log's `export` names them."""
    return {name: digest(data) for name, data in sorted(files.items())}
