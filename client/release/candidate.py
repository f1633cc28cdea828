"""A site's own test of a candidate: canaries that it planted, membership of its records, repeated runs of words.

Figures about records stay at the site. Figures about canaries depend on no record, given the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.release import memorisation
from privet.client.release.opened import Release, mounted
from privet.client.release.scoring import Watch, continuations_of, silent
from privet.client.release.separation import clopper_pearson, separation
from privet.client.site import SiteConfig
from privet.client.training.canaries import Planting
from privet.client.training.counts import finite_loss
from privet.client.training.data import concatenate, load_files
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.loading import load_data
from privet.client.training.model import initial_adapter
from privet.client.training.preference import judge
from privet.common.errors import StateError
from privet.common.log.gate import UNCLAIMED_DELTA
from privet.common.log.statements import CanaryCounts, Tested
from privet.common.privacy.noise import SecretRandomness
from privet.common.privacy.one_run import audit
from privet.common.study.adapter import Adapter
from privet.common.study.sections import GateSection
from privet.common.study.study import Study

MOST = 2_000
"""Most records of each kind that are scored, drawn at random."""
OPENINGS = 64
"""Most training answers that the candidate continues."""
_LEAST = 20
"""Fewest records on each side of a figure."""
_Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The result of a test.

    Attributes:
        tested: The conditions that it covered, ascending.
        failed: Those that the candidate fails, ascending.
        canaries: What the canaries show; None where none were planted.
        figures: All figures by condition. They stay at the site.
    """

    tested: tuple[Tested, ...]
    failed: tuple[Tested, ...]
    canaries: CanaryCounts | None
    figures: Mapping[str, Any]


def outcome_of(
    release: Release, site: SiteConfig, split_key: bytes, planting: Planting | None, watch: Watch = silent
) -> Outcome:
    """Test a candidate against the gate of its study, on a site's own records.

    Args:
        release: The candidate.
        site: The site, with its training and test files.
        split_key: Decides which units were held out from training.
        planting: The canaries that the site has planted; None if none.
        watch: Receives progress.

    Raises:
        StateError: The study has no gate, or the site has too few records for a figure.
        StudyError, DataError: The files do not fit the study, or the base cannot be opened.
        VerificationError: The base is not the study's.
    """
    study, gate = release.study, release.study.gate
    if gate is None:
        raise StateError(f"the study {study.name} has no gate, so its adapter is no candidate", "test nothing")
    figures: dict[str, Any] = {}
    failed: list[Tested] = []
    counts = None
    with mounted(release, site.resources) as host:
        start = initial_adapter(study, host)
        test = _Test(host, study, start, release.adapter, site.resources.physical_batch, watch)
        if gate.canaries is not None and planting is not None:
            counts, figures["canary"] = test.canaries(planting)
            if figures["canary"]["epsilon"] > (gate.epsilon or study.privacy.epsilon or 0.0):
                failed.append("canary")
        if gate.membership is not None or gate.repeated is not None:
            figures |= test.records(site, split_key, gate)
        if gate.membership is not None and figures["membership"]["upper"] > gate.membership:
            failed.append("membership")
        if gate.repeated is not None and figures["repeated"]["upper"] > gate.repeated:
            failed.append("repeated")
        host.mount(release.adapter)
    tested: list[Tested] = sorted(figures)  # type: ignore[arg-type]
    return Outcome(tuple(tested), tuple(sorted(failed)), counts, figures)


@dataclass(frozen=True)
class _Test:
    host: ModelHost
    study: Study
    start: Adapter
    candidate: Adapter
    most: int
    watch: Watch

    def canaries(self, planting: Planting) -> tuple[CanaryCounts, dict[str, Any]]:
        records, coins = planting.records(self.study, self.host.tokenizer), planting.coins()
        features = encode_records(self.study, self.host.tokenizer, records)
        before, after = (self._losses(each, features, "scoring canaries") for each in (self.start, self.candidate))
        delta = self.study.privacy.delta if self.study.privacy.delta is not None else UNCLAIMED_DELTA
        found = audit(before - after, coins, delta)
        return CanaryCounts(planted=found.canaries, guesses=found.guesses, right=found.right), asdict(found)

    def records(self, site: SiteConfig, split_key: bytes, gate: GateSection) -> dict[str, Any]:
        trained = load_data(site, self.study, self.host, split_key, distinct=False).training.features
        found: dict[str, Any] = {}
        if gate.membership is not None:
            found["membership"] = self._membership(site, trained)
        if gate.repeated is not None:
            found["repeated"] = self._repeated(trained)
        return found

    def _membership(self, site: SiteConfig, trained: Sequence[Feature]) -> dict[str, Any]:
        if not site.test:
            raise StateError(
                f"the site file of {site.name} names no test files: membership is told between records that were "
                "trained on and others",
                "name files of other records as `test` in the site file",
            )
        others = concatenate(load_files(site, self.study, training=False)[0])
        unseen = encode_records(self.study, self.host.tokenizer, others, blank=True)
        known = {feature.ids for feature in trained}
        inside, outside = _drawn(trained), _drawn([each for each in unseen if each.ids not in known])
        _check_enough("membership", min(len(inside), len(outside)))
        before, after = (
            [self._losses(each, part, "scoring records") for part in (inside, outside)]
            for each in (self.start, self.candidate)
        )
        # A record of low loss counts as a member (Yeom et al. 2018); or one whose loss training has lowered.
        attacks = {
            "loss": separation(-after[0], -after[1]),
            "lowered": separation(before[0] - after[0], before[1] - after[1]),
        }
        upper = max(each.interval[1] for each in attacks.values())
        return {"upper": upper, **{name: asdict(each) for name, each in attacks.items()}}

    def _repeated(self, trained: Sequence[Feature]) -> dict[str, Any]:
        heads = memorisation.openings(_drawn(trained), self.host.tokenizer, OPENINGS, 0)
        _check_enough("repeated", len(heads))
        longest = []
        for adapter in (self.start, self.candidate):
            self.host.mount(adapter)
            texts = continuations_of(
                self.host, [each.head for each in heads], memorisation.CONTINUED, self.most, None, "continuing answers",
                self.watch,
            )  # fmt: skip
            longest.append(memorisation.run_sums(heads, [[text] for text in texts])[1])
        count = memorisation.newly(longest[0], longest[1], memorisation.RUNS[0])
        return {"answers": len(heads), "repeated": count, "upper": clopper_pearson(count, len(heads))[1]}

    def _losses(self, adapter: Adapter, features: Sequence[Feature], what: str) -> _Scores:
        self.watch(what, 0, len(features))
        self.host.mount(adapter)
        return np.array([finite_loss(each) for each in judge(self.host, features)], np.float64)


def _drawn(features: Sequence[Feature]) -> list[Feature]:
    """Return at most `MOST` records, drawn at random."""
    order = np.argsort(SecretRandomness().uniform(len(features)))[:MOST]
    return [features[index] for index in order]


def _check_enough(condition: str, count: int) -> None:
    if count < _LEAST:
        raise StateError(
            f"{condition}: expected at least {_LEAST} records on each side of the figure, found {count}",
            "test it at a site with more records, or ask the coordinator's operator for a study without this condition",
        )
