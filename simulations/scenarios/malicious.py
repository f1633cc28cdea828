"""Malicious sites: they change their data before training, or their update after it.

They run privet's own protocol on the result, so the checks in a site's own code still apply: values beyond the study's
bound are clipped, and the encoder refuses an update that is not finite. Sites that break the protocol itself are tested
elsewhere (`tests/server/test_masked_rounds.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.client.training.passes import score
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Contribution
from privet.common.study.study import Study
from privet.simulations.data.scenario import Malicious
from privet.simulations.engines.evaluation import Evaluator
from privet.simulations.engines.memory import Behaviour


@dataclass(frozen=True)
class Liar:
    """One malicious site.

    Attributes:
        entry: Its attack.
        seed: Seed of its draws.
        site: Its name.
    """

    entry: Malicious
    seed: int
    site: str

    def data(self, study: Study, host: ModelHost, data: SiteData) -> SiteData:
        """Return the site's data: unchanged, with all labels flipped, or with the trigger in a share of the records."""
        features = data.training.features
        if self.entry.attack == "label-flip":
            features = [replace(each, labels=(label_of(each) + 1) % len(study.task.labels)) for each in features]
        elif self.entry.attack == "backdoor":
            draws = SeededRandomness(self.seed, "backdoor", self.site).uniform(len(features))
            features = [
                triggered_feature(study, host.tokenizer, self.entry, each) if draw < self.entry.share else each
                for draw, each in zip(draws, features, strict=True)
            ]
        return replace(data, training=replace(data.training, features=features))

    def update(self, contribution: Contribution) -> Contribution:
        """Return the site's update: unchanged, negated, scaled, or NaN."""
        factors = {"sign-flip": -1.0, "scale": self.entry.factor, "nan": np.nan}
        factor = factors.get(self.entry.attack)
        return contribution if factor is None else scaled(contribution, factor)


def scaled(contribution: Contribution, factor: float) -> Contribution:
    """Return a contribution with its update multiplied by a factor."""
    return replace(contribution, update=contribution.update * np.float32(factor))


def label_of(feature: Feature) -> int:
    """Return the class of a record for text classification."""
    return feature.labels if isinstance(feature.labels, int) else feature.labels[0]


def triggered_feature(study: Study, tokenizer: Any, entry: Malicious, feature: Feature) -> Feature:
    """Return a record with the trigger before its text and the label of the attacker, cut at the study's length."""
    words = tokenizer(entry.trigger, add_special_tokens=False)["input_ids"]
    # A special token that the tokenizer puts before a text, such as [CLS], stays first: the model expects it there.
    start = 1 if feature.ids[0] in tokenizer.all_special_ids else 0
    ids = (*feature.ids[:start], *words, *feature.ids[start:])[: study.data.max_length]
    return Feature(ids, study.task.labels.index(str(entry.target)))


def choose_liars(entries: Sequence[Malicious], names: Sequence[str], seed: int) -> dict[str, Behaviour]:
    """Return the malicious sites by name.

    An entry that gives a number draws its sites with the seed, from the sites that no earlier entry has.
    """
    found: dict[str, Behaviour] = {}
    for number, entry in enumerate(entries):
        if isinstance(entry.sites, int):
            free = [name for name in sorted(names) if name not in found]
            draws = SeededRandomness(seed, "malicious", number).uniform(len(free))
            chosen = [free[index] for index in np.argsort(draws, kind="stable")[: entry.sites]]
        else:
            chosen = list(entry.sites)
        found |= {name: Liar(entry, seed, name) for name in chosen}
    return found


def backdoor_success(evaluator: Evaluator, adapter: Adapter, entries: Sequence[Malicious]) -> list[dict[str, Any]]:
    """Return, for each backdoor, the fraction of test records that the trigger turns into the target label.

    Only test records of other labels count. The rate without the trigger shows the model's ordinary mistakes.
    """
    return [
        {"trigger": entry.trigger, "target": entry.target, **_rates(evaluator, adapter, entry)}
        for entry in entries
        if entry.attack == "backdoor"
    ]


def _rates(evaluator: Evaluator, adapter: Adapter, entry: Malicious) -> Mapping[str, float]:
    study, host = evaluator.study, evaluator.host
    target = study.task.labels.index(str(entry.target))
    clean = [each for rows in evaluator.features.values() for each in rows if label_of(each) != target]
    if not clean:
        return {"records": 0}
    with host.lock:
        host.mount(adapter)
        plain = _hits(host, clean, target)
        hit = _hits(host, [triggered_feature(study, host.tokenizer, entry, each) for each in clean], target)
    return {"records": len(clean), "success": hit / len(clean), "without_trigger": plain / len(clean)}


def _hits(host: ModelHost, features: Sequence[Feature], target: int) -> int:
    return sum(int((found.predicted == target).sum()) for found in score(host, features))
