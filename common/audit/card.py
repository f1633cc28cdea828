"""The model card and the lineage of an adapter: what made it, its privacy cost, what was measured, what is not known.

The text of the card is part of what a release signs and logs: a change of its wording changes every later release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from privet.common.audit.counts import COUNTS, count_rows, counts_document
from privet.common.audit.release import LINEAGE, PRIVACY, SIGNATURE
from privet.common.log.agreement import RoundStatement
from privet.common.study.study import Study
from privet.common.study.terms import terms_text

_SEEN = {"masked": "nothing but sums: updates were masked", "plain": "the update of each site"}


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
    few = study.model.quantisation
    return {
        "format": 1,
        "run": name,
        "base": {
            "name": study.model.base,
            "sha256": dict(study.model.sha256),
            **({} if few is None else {"quantisation": few, "quantised": study.model.quantised}),
        },
        "study": study.digest,
        "rounds": rounds,
        "released": statements[-1]["adapter_published"],
    }


def model_card(
    study: Study, lineage: Mapping[str, Any], privacy: Mapping[str, Any], statements: Sequence[RoundStatement]
) -> str:
    """Return the card: the adapter, how it was made, its privacy cost for the people in the data, its unknowns."""
    closed = [statement for statement in statements if statement["type"] == "round-close"]
    sites = sorted({site for statement in closed for site in statement["survivors"]})
    metrics = next((statement["metrics"] for statement in reversed(closed) if statement["metrics"]), None)
    if study.counts:
        return _card_of_counts(study, lineage, privacy, statements)
    few = study.model.quantisation
    lines = [
        "---",
        f"base_model: {json.dumps(study.model.base)}",
        "library_name: peft",
        "tags: [lora, federated, differential-privacy]" if privacy["private"] else "tags: [lora, federated]",
        "---",
        f"# {study.name}",
        "",
        f"A LoRA adapter of rank {study.lora.ranks_text} for {study.task.kind}"
        + (f" with {len(study.task.labels)} classes." if study.task.labels else "."),
        "",
        "## How it was made",
        "",
        f"* Base: `{study.model.base}`, weights pinned by SHA-256 in `{LINEAGE}`.",
        *(
            []
            if few is None
            else [f"* The base's linear layers were kept in {few}. Over others, it computes less well."]
        ),
        f"* Study: `{study.digest}`; run `{lineage['run']}`.",
        f"* {len(closed)} rounds closed of {study.rounds}, {len(statements) - len(closed)} aborted; "
        f"{len(sites)} sites took part; aggregation `{study.aggregation.method}`.",
        f"* The coordinator saw {_SEEN[study.secure_aggregation.mode]}.",
        f"* Released adapter: `{lineage['released']}`.",
        "",
        "## Privacy",
        "",
        _privacy_line(privacy),
        "",
        *(["## Terms", "", terms_text(study), ""] if study.release is not None else []),
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


def _card_of_counts(
    study: Study, lineage: Mapping[str, Any], privacy: Mapping[str, Any], statements: Sequence[RoundStatement]
) -> str:
    """Return the card of a study that trained nothing: its result, and its privacy cost."""
    document = counts_document(study, statements)
    what = "Counts of records" if study.kind == "statistics" else "A measurement of an adapter"
    said = "The adapter beside is empty." if study.kind == "statistics" else "The adapter beside is the one measured."
    rows = [f"| {title} | {value} | {interval} |" for title, value, interval in count_rows(document)]
    lines = [
        f"# {study.name}",
        "",
        f"{what} over {document['sites']} sites together. Nothing was trained. {said}",
        "",
        f"* Study: `{study.digest}`; run `{lineage['run']}`.",
        f"* The coordinator saw {_SEEN[study.secure_aggregation.mode]}.",
        "",
        "## Privacy",
        "",
        _privacy_line(privacy),
        "",
        "## Result",
        "",
        f"`{COUNTS}` holds it. Intervals of {document['confidence']:.0%} cover the noise of the sites.",
        "",
        "| what | value | interval |",
        "|---|---|---|",
        *rows,
        "",
        "## Checking it",
        "",
        f"`{SIGNATURE}` signs the files here (OpenSSF model signing). Their digests stand in the round log's `export`,",
        "and `privet audit verify` computes the result again from the round log's sums.",
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
