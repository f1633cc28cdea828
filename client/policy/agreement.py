"""What a site agrees to when a person approves a study: in sentences, for that person.

Nothing here decides. The policy and the ledger do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privet.client.budget.accounts import Limit
from privet.client.policy.rules import PASSING, PERSONAL, base_digest, opening_threshold
from privet.client.site import SiteConfig
from privet.common.errors import Finding
from privet.common.masking.groups import smallest_sum
from privet.common.masking.parameters import suite_of
from privet.common.study.counts import cells_of, most_records
from privet.common.study.study import Study
from privet.common.study.terms import gate_text, purpose_text, terms_text

LATER = PASSING | PERSONAL
"""Findings that do not speak against an approval: they pass with it, or with time."""

_METRICS = {
    "validation": "noisy sums of loss and accuracy on held-out units",
    "statistics": "noisy counts of records",
    "evaluate": "noisy counts of what an adapter gets right",
}
"""What a study may ask to release besides updates, by its name in a policy."""


@dataclass(frozen=True)
class Price:
    """What a study costs a dataset.

    Attributes:
        dataset: Its name.
        limit: What it may spend.
        counted: Epsilon that counts against the limit now.
        after: Epsilon that would count after the study.
        needed: Least limit that admits the study; None where none does.
    """

    dataset: str
    limit: Limit
    counted: float
    after: float
    needed: float | None


def agreement(
    site: SiteConfig, study: Study, who: str, price: Price | None, lacking: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return what a site agrees to with a study, as pairs of a heading and a sentence or more.

    Args:
        site: The site file.
        study: The study.
        who: Who proposes it.
        price: What it costs the site's dataset; None where it costs no privacy, or no limit is set.
        lacking: Columns of the study that the site's files do not have.
    """
    return [
        ("who asks", who),
        ("study", f"{study.name}, {study.digest}"),
        *([("purpose", purpose_text(study))] if study.purpose is not None else []),
        ("task", _task(study, lacking)),
        ("base", _base(site, study)),
        ("training", _training(site, study)),
        ("protects", _protection(study)),
        ("costs", _cost(study, price)),
        ("hidden among", _hidden(study)),
        ("leaves", _leaves(site, study)),
        ("for how long", _duration(site, study)),
        *([("adapter", terms_text(study))] if study.release is not None else []),
        *([("gate", gate_text(study))] if study.gate is not None else []),
    ]


def advice(site: SiteConfig, findings: Sequence[Finding], file: str, study: str) -> list[str]:
    """Return, for each finding that speaks against a study, what the site's people would change to admit it.

    Args:
        site: The site file, read.
        findings: What the policy finds.
        file: The site file's path, for commands.
        study: The study as the command names it.
    """
    policy = "the policy file" if site.policy is None else site.policy
    lines = []
    for each in findings:
        if each.code == "E_NO_POLICY":
            lines.append(f"write a first policy: `privet site setup {file}`")
        elif each.code == "E_BASE":
            lines.append(f"admit this base: `privet site policy {file} --admit-base {study}`")
        elif each.code == "E_METRICS":
            lines.append(
                f"admit {_METRICS[each.asked]} besides updates: `privet site policy {file} --admit {each.asked}`"
            )
        elif each.code == "E_UNIT_COLUMN":
            lines.append(
                f"name the column of patients, if it is that of the study: `privet site setup {file} --patient-column "
                "COLUMN`; otherwise ask the coordinator for a study that names yours"
            )
        elif each.code == "E_UNITS" and site.declared_count is None:
            lines.append(f"declare a count: `privet site setup {file} --declared-count NUMBER`")
        elif each.code == "E_LARGEST_COUNT":
            lines.append(
                f"this site declares {site.declared_count} units, the study has room for {each.asked}: ask the "
                f"coordinator for a study with largest_count = {site.declared_count} or more under [aggregation]"
            )
        elif each.code == "E_SIMULATION":
            lines.append("no site can admit this: ask the coordinator for a study without settings of a simulation")
        elif each.code == "E_PERMIT":
            lines.append("no site can admit this: ask the coordinator for a study with a permit that holds")
        elif each.code == "E_RANK":
            most = each.allowed.removeprefix("at most ")
            lines.append(
                f"{each.rule} in {policy}: the study asks {each.asked}, allowed is {each.allowed}; or ask the "
                f"coordinator for a study with `site_ranks = {{ {site.name} = {most} }}` under [lora], with "
                "aggregation method ffa"
            )
        elif each.code in PASSING:
            lines.append(f"wait: this passes with time; or change {each.rule} in {policy}")
        elif each.code not in LATER:
            where = "the site file" if each.rule.startswith("floor.") else policy
            lines.append(f"{each.rule} in {where}: the study asks {each.asked}, allowed is {each.allowed}")
    return lines


def _task(study: Study, lacking: Sequence[str]) -> str:
    labels = f" with {len(study.task.labels)} labels" if study.task.labels else ""
    columns = ", ".join(f"{column} ({role})" for role, column in sorted(study.data.columns.items()))
    unit = f"; units are the values of the column {study.data.unit}" if study.data.unit is not None else ""
    absent = f" Your files LACK the columns {', '.join(lacking)}." if lacking else ""
    return f"{study.task.kind}{labels}, from the columns {columns} of your data{unit}.{absent}"


def _base(site: SiteConfig, study: Study) -> str:
    name, path = study.model.base, site.resources.bases.get(study.model.base)
    here = f"mapped to {path} in the site file"
    if path is None and name.startswith("package:"):
        here = "an installed package"
    elif path is None:
        here = f"not mapped in the site file; `privet site setup SITE --base {name}=PATH` names its directory"
    few = "" if study.model.quantisation is None else f", its linear layers in {study.model.quantisation}"
    return f"{name}, {len(study.model.sha256)} pinned files ({base_digest(study)}){few}; {here}."


def _counting(study: Study) -> str:
    """Return what a study that trains nothing counts."""
    cells = list(cells_of(study).titles.values())
    most = most_records(study)
    rows = f", of each patient at most {most} records, drawn at random" if study.privacy.unit == "patient" else ""
    if study.evaluation is None:
        return f"NOTHING is trained. One round counts, over all your records{rows}: {'; '.join(cells)}."
    which = "training" if study.evaluation.files == "train" else "test"
    what = "the base alone" if study.evaluation.adapter == "base" else f"the adapter {study.evaluation.adapter}"
    return f"NOTHING is trained. One round measures {what} on all your {which} files, and counts: {'; '.join(cells)}."


def _training(site: SiteConfig, study: Study) -> str:
    if study.counts:
        return _counting(study)
    training = study.training
    full = f", and in full {', '.join(study.lora.modules_to_save)}" if study.lora.modules_to_save else ""
    adapter = f"an adapter of rank {study.lora.ranks[1]} on {', '.join(study.lora.targets)}{full}"
    if study.rank_at(site.name) < study.lora.ranks[1]:
        adapter += f", of which this site trains and sends the first {study.rank_at(site.name)} columns of each B alone"
    head = " Round 1 sums the features of each class over all your units; the head starts from these sums."
    rounds, steps = "round" if training.rounds == 1 else "rounds", "step" if training.steps == 1 else "steps"
    if not training.rounds:
        return f"the head of {adapter}, in 1 round without training.{head}"
    return (
        f"{adapter}, in {training.rounds} {rounds} of {training.steps} {steps}. Each step draws about "
        f"{training.sampling_rate:.2%} of your units.{head if training.starts_head else ''}"
    )


def _protection(study: Study) -> str:
    if not study.private:
        return "NOBODY: the study has no differential privacy. Updates may contain what records say."
    promise = study.privacy.promise
    text = (
        f"each {study.privacy.unit}, with epsilon {promise.epsilon:g} and delta {promise.delta:g} over the whole "
        f"study, by clipping to norm {promise.clip_norm:g} and adding noise at this site before anything leaves."
    )
    if study.distributed:
        alone = study.privacy.epsilon_alone
        own = "promises nothing by itself" if alone is None else f"has epsilon {alone:g} by itself"
        text += f" Sites share the noise: the epsilon holds if the other sites add theirs. Your share {own}."
    if study.privacy.band is not None:
        text += (
            f" Noise is correlated over {study.privacy.band} steps: a site that is corrupt in any step counts as "
            "corrupt in all, and this site keeps the noise of its last steps, sealed, beside its ledger."
        )
    return text


def _cost(study: Study, price: Price | None) -> str:
    if price is None:
        unit = study.privacy.unit
        return f"unknown: the site file sets no limit for each {unit}." if study.private else "no budget is counted."
    limit = price.limit
    if price.after <= limit.epsilon:
        rest = f"With this study it would be {price.after:.3g}; {limit.epsilon - price.after:.3g} would be left"
    elif price.needed is None:
        rest = "This study does not fit, and no larger limit admits it"
    else:
        rest = f"This study does not fit: the least limit that admits it is {price.needed:g}"
    return (
        f"dataset {price.dataset} has spent epsilon {price.counted:.3g} of {limit.epsilon:g} (each {limit.unit}, delta "
        f"{limit.delta:g}). {rest}. Nothing is given back."
    )


def _hidden(study: Study) -> str:
    if study.secure_aggregation.mode != "masked":
        return "NOTHING: the study does not mask updates, so the coordinator sees this site's update."
    return (
        f"the updates of at least {smallest_sum(study)} sites: the coordinator sees only their sum. It takes the "
        f"shares of {opening_threshold(study)} sites to open a round. This holds if up to "
        f"{study.secure_aggregation.corrupt} of them collude with the coordinator. Key agreement: "
        f"{suite_of(study).value}."
    )


def _leaves(site: SiteConfig, study: Study) -> str:
    sums = ", the sums of loss and accuracy on held-out units" if study.data.validation_fraction else ""
    noisy = "noisy " if study.private else ""
    masked = "masked " if study.secure_aggregation.mode == "masked" else ""
    count = "a count" if site.declared_count is None else f"the count {site.declared_count}"
    what = (
        f"the {noisy}{masked}counts named above" if study.counts else f"one {noisy}{masked}update of the adapter{sums}"
    )
    return (
        f"{'once' if study.counts else 'in each round'} {what}, and signed statements for the round log. The "
        f"consent declares {count} in the clear. No record and no id leaves."
    )


def _duration(site: SiteConfig, study: Study) -> str:
    rounds = study.rounds
    many = "" if rounds == 1 else "s"
    back = f"delete its line in {site.approvals or 'the file of approvals'}"
    if site.approvers:
        back = "an approver refuses it: `privet site refuse SITE STUDY`"
    return (
        f"the approval is for exactly this study, which has {rounds} round{many}. To take it back, {back}. "
        "What has left by then stays with the consortium: adapters and "
        "round log are kept."
    )
