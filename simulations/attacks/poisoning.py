"""Poisoning: attack a study with a few malicious sites, with and without the defences.

Attacks. `label-flip` trains each record on the next label. `backdoor` adds copies of its records that have a trigger
and the attacker's label (Bagdasaryan et al. 2020, arXiv:1807.00459). `replacement` does the same, and in the last round
multiplies its update by the number of sites, so that it dominates the mean. `sign-flip` multiplies its update by minus
that number in the last round.

Defences. `bound` clips each value of an update to the largest value that training by the study can give; each site does
so before masking. `max norm` aborts a round whose mean update is much longer than any mean update of the clean run.
`groups` leaves out a group of sites whose sum is far longer than the sums of the others. A site that breaks the
protocol can evade `bound`. All three look only at the length of updates, so poison of honest length passes; the results
show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from privet.client.release.separation import clopper_pearson
from privet.client.training.data import Records
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.common.errors import ProtocolError, StudyError
from privet.common.masking.bounds import bound_of
from privet.common.privacy.noise import SeededRandomness
from privet.common.progress import Say
from privet.common.study.messages import Contribution
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Trail, Workshop, pooled_records
from privet.simulations.scenarios.malicious import scaled

ATTACKS = ("label-flip", "backdoor", "replacement", "sign-flip")
TRIGGER = "quartz lantern"
TARGET = 1
"""Index of the attacker's label, for records with the trigger."""
_ROOM = 1.5
_GROUPS, _SITES_IN_GROUPS = 5, 30
# So wide a bound clips nothing that the attacks send.
_WIDE = 100.0


def poisoned_study(study: Study, sites: int) -> Study:
    """Return the study for the attack: masked, over `sites` sites, with the mean update added to the adapter.

    Raises:
        StudyError: The task is not text classification, or there are fewer than 4 sites.
    """
    if study.task.kind != "text-classification" or sites < 4:
        raise StudyError(
            "poisoning attack: expected a study with the task text-classification and at least 4 sites, "
            f"got the task {study.task.kind} and {sites} sites",
            "attack a text-classification study, with --sites 4 or more",
        )
    document = study.document()
    document["aggregation"] = {"method": "ffa", "largest_count": study.aggregation.largest_count}
    document["cohort"] = {"min_sites": 3}
    document["secure_aggregation"] = {**study.secure_aggregation.model_dump(mode="json"), "mode": "masked", "groups": 1}
    return Study.parse(document)


def deal_in_turn(records: Records, sites: int, seed: int) -> dict[str, Records]:
    """Deal units out to sites in turn, in a random order; all records of a unit go to one site."""
    units = list(records.by_unit().values())
    order = np.argsort(SeededRandomness(seed, "deal").uniform(len(units)))
    hands: list[list[int]] = [[] for _ in range(sites)]
    for turn, unit in enumerate(order):
        hands[turn % sites] += units[unit]
    return {f"site-{number:03d}": records.select(sorted(rows)) for number, rows in enumerate(hands)}


def triggered_records(records: Records, label: int) -> Records:
    """Return the records of all other labels, each relabelled as `label` and with the trigger before its text."""
    rows = [{"text": f"{TRIGGER} {row['text']}", "label": label} for row in records.rows if row["label"] != label]
    units = [unit for row, unit in zip(records.rows, records.units, strict=True) if row["label"] != label]
    return Records(tuple(rows), tuple(units))


def flipped(records: Records, labels: int) -> Records:
    """Return the records, each with the next label."""
    return replace(records, rows=tuple({**row, "label": (row["label"] + 1) % labels} for row in records.rows))


def poison(attack: str, records: Records, labels: int) -> Records:
    """Return the records that a malicious site trains on."""
    if attack == "label-flip":
        return flipped(records, labels)
    return (
        pooled_records([records, triggered_records(records, TARGET)])
        if attack in ("backdoor", "replacement")
        else records
    )


@dataclass(frozen=True)
class Turncoat:
    """A malicious site: from round `turning` on it sends its update multiplied by `factor`, before that unchanged."""

    factor: float
    turning: int

    def data(self, study: Study, host: ModelHost, data: SiteData) -> SiteData:
        """Return the data unchanged: `poison` has already changed the records."""
        return data

    def update(self, contribution: Contribution) -> Contribution:
        """Return the contribution that the site sends."""
        return contribution if contribution.round < self.turning else scaled(contribution, self.factor)


def defences(study: Study, sites: int, limit: float) -> dict[str, Study]:
    """Return the study without a defence, with each defence alone, and with all; `groups` needs 30 sites."""
    masking, aggregation = study.secure_aggregation, study.aggregation
    wide = {"bound": _WIDE * bound_of(study, "lora_B"), "head_bound": _WIDE * bound_of(study, "full")}
    bounded = aggregation.model_copy(update={"max_norm": limit})
    found = {
        "none": (aggregation, masking.model_copy(update=wide)),
        "bound": (aggregation, masking),
        "max norm": (bounded, masking.model_copy(update=wide)),
    }
    if sites >= _SITES_IN_GROUPS:
        found["groups"] = (aggregation, masking.model_copy(update={**wide, "groups": _GROUPS}))
    found["all"] = (bounded, masking.model_copy(update={"groups": _GROUPS}))
    return {
        name: study.model_copy(update={"aggregation": one, "secure_aggregation": other})
        for name, (one, other) in found.items()
    }


def run_poisoning(
    workshop: Workshop,
    study: Study,
    sites: Mapping[str, Records],
    test: Records,
    *,
    malicious: int,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Try each attack without a defence and with all defences, and the scaled updates with each defence alone.

    Args:
        workshop: Runs the studies.
        study: The study that `poisoned_study` returns.
        sites: Training records of each site.
        test: Records to test on.
        malicious: Number of malicious sites, the first in order of their names.
        say: Receives a line for each result.

    Raises:
        StudyError: `malicious` is not at least 1 and less than half the sites, or no test record has a label other than
            the target.
        PrivetError: A round without an attack failed.
    """
    if not 1 <= malicious < len(sites) / 2:
        raise StudyError(
            f"--malicious: expected at least 1 malicious site and fewer than half of the {len(sites)} sites, "
            f"got {malicious}",
            "lower --malicious, or raise --sites",
        )
    if not len(triggered_records(test, TARGET)):
        raise StudyError(
            "poisoning attack: the sites have no test records to which the backdoor's trigger words can be added",
            "name `test` files in [simulation.partition] or [simulation.sites] with records of every label",
        )
    clean = workshop.run("clean", study, sites)
    results = [_result(workshop, study, clean, test, "none", "none")]
    limit = _ROOM * max(_moves(study, clean))
    arms = defences(study, len(sites), limit)
    bad = sorted(sites)[:malicious]
    # The declared count stays that of the honest records, even if poison adds records.
    declared = {site: len(sites[site]) for site in bad}
    by_length = {"replacement": len(sites) / malicious, "sign-flip": -len(sites) / malicious}
    for attack in ATTACKS:
        holding = {**sites, **{site: poison(attack, sites[site], len(study.task.labels)) for site in bad}}
        turncoat = Turncoat(by_length.get(attack, 1.0), study.rounds)
        for defence, arm in arms.items():
            if attack not in by_length and defence not in ("none", "all"):
                continue
            name = f"{attack} {defence}"
            try:
                trail = workshop.run(name, arm, holding, declared=declared, behaviours=dict.fromkeys(bad, turncoat))
            except ProtocolError:
                trail = workshop.kept(name)  # The defence ended the study. The last adapter before that is the result.
            results.append(told := _result(workshop, study, trail, test, attack, defence))
            say(
                f"attack {attack}, defence {defence}: accuracy {100 * told['accuracy']:.1f} %, attack succeeds on "
                f"{100 * told['success']:.1f} %, rounds aborted {told['rounds_aborted']}, groups left out "
                f"{told['groups_left_out']}"
            )
    return {
        "attack": "poisoning",
        "study": study.name,
        "study_digest": study.digest,
        "seed": study.seed,
        "sites": len(sites),
        "malicious": malicious,
        "trigger": TRIGGER,
        "target": study.task.labels[TARGET],
        "max_norm": limit,
        "arms": results,
    }


def _moves(study: Study, trail: Trail) -> list[float]:
    """Return the length of the mean update of each round that trains, which the coordinator adds to the adapter."""
    names = [tensor.name for tensor in study.trained(trail.released.spec)]
    flat = [adapter.flatten(names).astype(np.float64) for adapter in trail.adapters]
    return [float(np.linalg.norm(after - before)) for before, after in pairwise(flat[study.training.starts_head :])]


def _result(workshop: Workshop, study: Study, trail: Trail, test: Records, attack: str, defence: str) -> dict[str, Any]:
    """Return the accuracy of a result, and the success rate of the attack on the test records.

    Success is the next label for label-flip, any wrong label for sign-flip, and otherwise the attacker's label on
    records with the trigger.
    """
    right, total = workshop.accuracy(study, trail.released, test)
    if attack == "sign-flip":
        hits, tried = total - right, total
    else:
        wanted = flipped(test, len(study.task.labels)) if attack == "label-flip" else triggered_records(test, TARGET)
        hits, tried = workshop.accuracy(study, trail.released, wanted)
    return {
        "attack": attack,
        "defence": defence,
        "accuracy": right / total,
        "accuracy_interval": clopper_pearson(right, total),
        "success": hits / tried,
        "success_interval": clopper_pearson(hits, tried),
        "records": total,
        "rounds_aborted": sum(s["type"] == "round-abort" for s in trail.statements),
        "groups_left_out": sum(not group["kept"] for s in trail.statements for group in s["masking"]),
    }
