"""The files that a run releases: the adapter, its card, lineage and privacy statement, and one signature over all.

The files are made from the run's state alone. The round log's `export` holds their digests, so that anyone who has the
adapter can trace every round that made it.

The text of the card is part of what is signed and logged: a change of its wording changes every later release.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from privet.common.audit.privacy_statement import privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import ADAPTER, CARD, KEY, LINEAGE, PRIVACY, SIGNATURE, STUDY, signed_statement
from privet.common.canonical import canonical_json, digest
from privet.common.log.agreement import RoundStatement
from privet.common.log.envelope import PAYLOAD_TYPE, pae
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory, RunState

_SEEN = {"masked": "nothing but sums: updates were masked", "plain": "the update of each site"}


def release_files(
    run: RunDirectory, state: RunState, name: str, signer: ec.EllipticCurvePrivateKey
) -> dict[str, bytes]:
    """Return the files of a release by name.

    Args:
        run: The run.
        state: Its last state, with at least one closed round.
        name: The run's name in the log.
        signer: P-256 key.
    """
    privacy = privacy_document(run.study, state.statements, simulated=run.simulated)
    lineage = lineage_of(run.study, name, state.statements)
    files = {
        ADAPTER: state.adapter.data,
        "adapter_config.json": run.peft_config.encode(),
        STUDY: canonical_json(run.study.document()),
        LINEAGE: canonical_json(lineage) + b"\n",
        f"{PRIVACY}.json": canonical_json(privacy) + b"\n",
        f"{PRIVACY}.md": privacy_markdown(privacy).encode(),
        CARD: model_card(run.study, lineage, privacy, state.statements).encode(),
        KEY: signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }
    return {**files, SIGNATURE: sign_files(files, run.study.name, signer)}


def lineage_of(study: Study, name: str, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    """Return the history of the adapter: from the base over each round to the released adapter."""
    rounds = [
        {
            "round": statement["round"],
            "type": statement["type"],
            "sites": len(statement["survivors"]),
            "adapter_before": statement["adapter_before"],
            "adapter_published": statement["adapter_published"],
        }
        for statement in statements
    ]
    return {
        "format": 1,
        "run": name,
        "base": {"name": study.model.base, "sha256": dict(study.model.sha256)},
        "study": study.digest,
        "rounds": rounds,
        "released": statements[-1]["adapter_published"],
    }


def sign_files(files: Mapping[str, bytes], name: str, signer: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign files as OpenSSF model signing 1.0 does: a Sigstore bundle with a DSSE envelope and a plain public key.

    Args:
        files: Content by name.
        name: Name of the model in the signature.
        signer: P-256 key; the specification has no Ed25519.
    """
    payload = signed_statement(files, name)
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


def model_card(
    study: Study, lineage: Mapping[str, Any], privacy: Mapping[str, Any], statements: Sequence[RoundStatement]
) -> str:
    """Return the card: the adapter, how it was made, its privacy cost for the people in the data, its unknowns."""
    closed = [statement for statement in statements if statement["type"] == "round-close"]
    sites = sorted({site for statement in closed for site in statement["survivors"]})
    metrics = next((statement["metrics"] for statement in reversed(closed) if statement["metrics"]), None)
    lines = [
        "---",
        f"base_model: {json.dumps(study.model.base)}",
        "library_name: peft",
        "tags: [lora, federated, differential-privacy]" if privacy["private"] else "tags: [lora, federated]",
        "---",
        f"# {study.name}",
        "",
        f"A LoRA adapter of rank {study.lora.rank} for {study.task.kind}"
        + (f" with {len(study.task.labels)} classes." if study.task.labels else "."),
        "",
        "## How it was made",
        "",
        f"* Base: `{study.model.base}`, weights pinned by SHA-256 in `{LINEAGE}`.",
        f"* Study: `{study.digest}`; run `{lineage['run']}`.",
        f"* {len(closed)} rounds closed of {study.training.rounds}, {len(statements) - len(closed)} aborted; "
        f"{len(sites)} sites took part; aggregation `{study.aggregation.method}`.",
        f"* The coordinator saw {_SEEN[study.secure_aggregation.mode]}.",
        f"* Released adapter: `{lineage['released']}`.",
        "",
        "## Privacy",
        "",
        _privacy_line(privacy),
        "",
        "## Measured",
        "",
        *(_metric_lines(metrics) if metrics else ["Nothing was validated at the sites during training."]),
        "",
        "## Not known",
        "",
        "* How well it does on data unlike the sites', and for groups that are rare there.",
        "* Whether its use is appropriate: it has no intended use beyond the study's, and is no medical device.",
        "* Whether sites trained as they say: the log shows who said what, not that it is true.",
        "",
        "## Checking it",
        "",
        f"`{SIGNATURE}` signs the files here (OpenSSF model signing). Their digests stand in the round log's `export`,",
        "and `privet audit verify` checks the whole history offline.",
    ]
    return "\n".join(lines) + "\n"


def _privacy_line(privacy: Mapping[str, Any]) -> str:
    if not privacy["private"]:
        return "None was promised: the adapter may reveal records of the sites."
    if privacy["simulated"]:
        return f"Simulated: the noise came from a public seed and protects nobody. See `{PRIVACY}.md`."
    cost = privacy["epsilon"]
    shared = privacy["trust"]["model"] == "distributed"
    against = ", against the coordinator together with some of the other sites" if shared else ""
    return (
        f"Differentially private for each {privacy['unit']['unit']} of each site{against}: epsilon {cost['run']:.4g} "
        f"at delta {cost['delta']:g}. `{PRIVACY}.md` says what that covers, and what it does not."
    )


def _metric_lines(metrics: Mapping[str, float]) -> list[str]:
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return ["Over all sites together, as noisy as they sent it:", "", "| metric | value |", "|---|---|", *rows]


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the digest of each file, as the log's `export` names them."""
    return {name: digest(data) for name, data in sorted(files.items())}
