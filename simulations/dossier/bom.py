"""Bills of materials of a run in CycloneDX 1.6 JSON: the coordinator's software, and the model.

Written here and not by a library: a dossier needs few fields, and a site or an auditor needs nothing installed for it.
The tests validate both against the schema with `cyclonedx-python-lib`. The same run gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from privet.common.audit.privacy_text import rounded_up
from privet.common.canonical import canonical_json
from privet.common.log.statements import AdapterState, Export, RoundClose, RunOpen
from privet.common.study.terms import terms_text
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.parts import every_attack
from privet.simulations.dossier.words import day_of

SBOM, MLBOM = "sbom.cdx.json", "ml-bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "privet.dossier")
_KINDS = {
    "text-classification": "classification of texts",
    "token-classification": "classification of words",
    "causal-lm": "answers to prompts",
    "preference": "answers that are preferred",
}


def sbom(evidence: Evidence) -> dict[str, Any]:
    """Return the bill of the software with which the coordinator opened the run, as the log names it by digest."""
    software = json.loads(evidence.files["software.json"])
    versions: Mapping[str, str] = software["versions"]
    own = versions.get("privet", "unknown")
    root = {
        "type": "application",
        "bom-ref": f"pkg:pypi/privet@{own}",
        "name": "privet",
        "version": own,
        "purl": f"pkg:pypi/privet@{own}",
        "components": [
            {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(value)]}
            for name, value in sorted(software["sources"].items())
        ],
    }
    libraries = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
        }
        for name, version in sorted(versions.items())
        if name != "privet"
    ]
    refs = [each["bom-ref"] for each in libraries]
    return {
        **_head(evidence, "sbom", root),
        "components": libraries,
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": refs}, *({"ref": ref} for ref in refs)],
        "properties": [
            _property("simulated", str(evidence.simulated).lower()),
            _property("software", evidence.all(RunOpen)[-1][1].software),
            _property("gap", "the software at the sites, and packages that the listed ones need: in their own bills"),
        ],
    }


def ml_bom(evidence: Evidence) -> dict[str, Any]:
    """Return the bill of the model: the adapter, its base, and the sites' data as far as the log shows it."""
    study = evidence.study
    exports = evidence.all(Export)
    adapter = exports[-1][1].adapter if exports else None
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"run:{evidence.run}",
        "name": study.name,
        "version": evidence.run,
        "description": "The result of a study that trains nothing."
        if study.counts
        else f"A LoRA adapter of rank {study.lora.ranks_text} for {study.task.kind}.",
        **({} if adapter is None else {"hashes": [_sha256(adapter.removeprefix("sha256:"))]}),
        "modelCard": _card(evidence),
        "properties": _properties(evidence),
    }
    base = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": study.model.base,
        "version": study.model.revision,
        "components": [
            {"type": "file", "bom-ref": f"base:{name}", "name": name, "hashes": [_sha256(value)]}
            for name, value in sorted(study.model.sha256.items())
        ],
    }
    sites = sorted({site for _, each in evidence.all(RoundClose) for site in each.survivors})
    columns = ", ".join(sorted(set(study.data.columns.values())))
    data = [
        {
            "type": "data",
            "bom-ref": f"data:{site}",
            "name": f"records of {site}",
            "description": f"Records that stay at {site}. Columns: {columns}. The log has no count of them.",
            "data": [
                {
                    "type": "dataset",
                    "name": f"records of {site}",
                    "classification": "simulated"
                    if evidence.simulated
                    else "personal data, unless the site says otherwise",
                    "governance": {"custodians": [{"organization": {"name": site}}]},
                }
            ],
        }
        for site in sites
    ]
    return {
        **_head(evidence, "ml-bom", model),
        "components": [base, *data],
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": ["base", *(f"data:{site}" for site in sites)]},
            {"ref": "base"},
            *({"ref": f"data:{site}"} for site in sites),
        ],
    }


def _card(evidence: Evidence) -> dict[str, Any]:
    study = evidence.study
    sites = sorted({site for _, each in evidence.all(RoundClose) for site in each.survivors})
    parameters: dict[str, Any] = {
        "task": _KINDS[study.task.kind],
        "datasets": [{"ref": f"data:{site}"} for site in sites],
        "inputs": [{"format": column} for column in sorted(set(study.data.columns.values()))],
    }
    if not study.counts:
        parameters["approach"] = {"type": "supervised"}
        parameters["modelArchitecture"] = f"LoRA adapter on {', '.join(study.lora.targets)} of {study.model.base}"
    metrics = next((each.metrics for _, each in reversed(evidence.all(RoundClose)) if each.metrics), None)
    considerations: dict[str, Any] = {
        "technicalLimitations": [each.text for each in every_attack(evidence)]
        + [f"{name}: {text}" for name, text in evidence.privacy.get("not_covered", {}).items()]
    }
    if study.purpose is not None:
        considerations["useCases"] = [study.purpose.text]
    found: dict[str, Any] = {"modelParameters": parameters, "considerations": considerations}
    if metrics and not study.counts:
        found["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": name.replace("_", " "), "value": f"{value:.6g}"} for name, value in sorted(metrics.items())
            ]
        }
    return found


def _properties(evidence: Evidence) -> list[dict[str, str]]:
    study, log = evidence.study, evidence.log
    found = {
        "study": study.digest,
        "status": _status(evidence),
        "log": f"{log.origin} {log.size} {log.root}",
        "simulated": str(evidence.simulated).lower(),
        "privacy.mode": study.privacy.mode,
        "secure-aggregation": study.secure_aggregation.mode,
    }
    if study.private:
        costs = evidence.privacy["epsilon"]
        found |= {
            "privacy.unit": study.privacy.unit,
            "privacy.delta": f"{costs['delta']:g}",
            "privacy.epsilon.promised": f"{costs['target']:g}",
            "privacy.epsilon.spent": rounded_up(costs["run"]),
        }
        if evidence.simulated:
            found["privacy.epsilon.note"] = "simulated: protects nobody"
    if study.release is not None:
        found["release"] = terms_text(study)
    if study.purpose is not None and study.purpose.permit is not None:
        found |= {f"permit.{name}": value for name, value in study.purpose.permit.model_dump().items()}
    return [_property(name, value) for name, value in sorted(found.items())]


def _status(evidence: Evidence) -> str:
    """Return what the adapter of the run is: a candidate is listed as one, and never as a model that is out."""
    if evidence.all(Export):
        states = evidence.all(AdapterState)
        return "released" if not states else f"released, then {states[-1][1].state}"
    ended = any(each.ended for _, each in evidence.all(RoundClose))
    return "candidate, not released" if ended and evidence.study.gate is not None else "not released"


def _head(evidence: Evidence, kind: str, component: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that both bills share. Their time is that of the last leaf about the run, not the clock's."""
    time = max(each.time for _, each in evidence.told)
    told = canonical_json(
        {"kind": kind, "run": evidence.run, "root": evidence.log.root, "study": evidence.study.digest}
    )
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, told.decode())}",
        "version": 1,
        "metadata": {
            "timestamp": f"{day_of(time)}T{datetime.fromtimestamp(min(time, 253_402_300_799), UTC):%H:%M:%S}Z",
            "component": dict(component),
        },
    }


def _sha256(value: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": value}


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": f"privet:{name}", "value": value}
