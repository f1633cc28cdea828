"""Membership inference: tell from an adapter whether a record was in the training data.

Two attacks. Loss threshold (Yeom et al. 2018): a record of low loss counts as a member. LiRA, offline (Carlini et al.
2022, sections V and VI-C): shadow adapters are trained by the study on random halves of the records. They show how
confident an adapter is about a record that it has not seen; a higher confidence speaks for membership. The confidence
is log(p / (1 - p)) with p = exp(-loss). All records share one deviation, because there are few shadows.

Two targets. `game`: an adapter that the study trains on a random half, against the other half. Members and others
differ only in membership, so this target measures the attack. `released`: the adapter of the run itself, against its
test records. Training and test records may differ by themselves. The score `blind` shows that difference: it comes from
adapters that do not depend on membership in the target. If it is far from 1/2, the attack has learnt to recognise the
test file, not membership.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.release.separation import separation
from privet.client.training.data import Records, concatenate
from privet.common.errors import StudyError
from privet.common.privacy.noise import SeededRandomness, derive_seed
from privet.common.progress import Say
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, in_the_clear, without_privacy
from privet.simulations.attacks.labels import BASELINE, label

_Array = NDArray[np.float64]
Coins = NDArray[np.bool_]
# Smaller losses are raised to this value: p would round to 1, and the confidence to infinity.
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class CandidatePool:
    """All records of a run, site by site in order of their names.

    Attributes:
        sites: Records of each site.
        trained: For each record over all sites in order: whether the run trained on it.
    """

    sites: Mapping[str, Records]
    trained: Coins

    @property
    def records(self) -> Records:
        """All records, in the order of `trained`."""
        return concatenate([self.sites[site] for site in sorted(self.sites)])


def pool_of(train: Mapping[str, Records], test: Mapping[str, Records]) -> CandidatePool:
    """Join the training and test records of each site.

    Raises:
        StudyError: No site has test records.
    """
    if not any(len(records) for records in test.values()):
        raise StudyError(
            "membership attack: no site has test records; the attack needs them as non-members, "
            "that is, as records that were not trained on",
            "name `test` files in [simulation.partition] or [simulation.sites] of the study, and simulate it again",
        )
    sites, trained = {}, []
    for site in sorted(train):
        parts = [train[site], *([test[site]] if site in test else [])]
        # Equal identifiers in the training file and the test file are different units.
        sites[site] = concatenate(parts, distinct=True)
        trained += [True] * len(train[site]) + [False] * (len(sites[site]) - len(train[site]))
    return CandidatePool(sites, np.array(trained))


def halves(pool: CandidatePool, count: int, seed: int) -> list[Coins]:
    """Return for each of `count` random halves which records are in it, over all sites in order. Units stay whole.

    Halves come in pairs: the second holds the records that the first does not. Each record is therefore outside exactly
    half of them.
    """
    coins = []
    for number in range(-(-count // 2)):
        chosen: list[bool] = []
        for site in sorted(pool.sites):
            records = pool.sites[site]
            draws = SeededRandomness(seed, "shadow", number, site)
            rows = [False] * len(records)
            for _, indices in sorted(records.by_unit().items()):
                inside = bool(draws.uniform(1)[0] < 0.5)
                for index in indices:
                    rows[index] = inside
            chosen += rows
        coins += [np.array(chosen), ~np.array(chosen)]
    return coins[:count]


def records_inside(pool: CandidatePool, inside: Coins) -> dict[str, Records]:
    """Return the records of each site that are in a half."""
    found, start = {}, 0
    for site in sorted(pool.sites):
        records = pool.sites[site]
        found[site] = records.select([i for i in range(len(records)) if inside[start + i]])
        start += len(records)
    return found


def confidence(losses: Sequence[float] | _Array) -> _Array:
    """Return log(p / (1 - p)) with p = exp(-loss)."""
    values = np.maximum(np.asarray(losses, np.float64), _LEAST_LOSS)
    return np.asarray(-values - np.log(-np.expm1(-values)))


def likelihood_scores(target: _Array, shadows: _Array, seen: NDArray[np.bool_]) -> tuple[_Array, _Array]:
    """Return the offline LiRA score of each record, and the mean confidence of the shadows.

    Args:
        target: Confidence of the target in each record, [n].
        shadows: Confidence of each shadow, [k, n].
        seen: Whether a shadow was trained on the record, [k, n]. Each record is unseen by two shadows or more.

    Returns:
        (target - mean) / deviation over the shadows that have not seen the record, with one deviation for all records;
        and that mean, which does not depend on membership in the target.
    """
    outside = np.where(seen, np.nan, shadows)
    mean = np.nanmean(outside, axis=0)
    unseen = (~seen).sum(axis=0)
    variance = float(np.nansum((outside - mean) ** 2) / (unseen - 1).sum())
    return (target - mean) / max(variance**0.5, 1e-12), mean


def run_membership(
    workshop: Workshop,
    study: Study,
    pool: CandidatePool,
    released: Adapter,
    *,
    shadows: int = 4,
    most: int = 2000,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Attack the adapter of a run and its study, and the baseline without privacy.

    Args:
        workshop: Runs the studies.
        study: The study of the run.
        pool: The records of the run.
        released: The adapter that the run released.
        shadows: Number of shadow adapters for each study, even and at least 4. The target of the game is one
            adapter more.
        most: Largest number of records to score; they are drawn at random.
        say: Receives a line for each adapter and each result.

    Raises:
        StudyError: The number of shadows is odd or below 4.
        PrivetError: A round failed.
    """
    if shadows < 4 or shadows % 2:
        raise StudyError(
            f"--shadows: expected an even number of 4 or more, got {shadows}",
            "give --shadows an even number, or leave it out",
        )
    chosen = np.sort(np.argsort(SeededRandomness(study.seed, "scored").uniform(len(pool.trained)))[:most])
    records = pool.records.select([int(index) for index in chosen])
    arms = {f"epsilon {study.privacy.epsilon:g}": study} if study.private else {}
    results = []
    for name, arm in {BASELINE: without_privacy(study), **arms}.items():
        # The first half is left out: it is the complement of the target's half, so it would reveal membership.
        coins = halves(pool, shadows + 2, study.seed)[1:]
        losses = []
        for number, inside in enumerate(coins):
            # An attacker who trains shadows knows the study and its first adapter, but not the batches and noise of the
            # target: each adapter draws from a seed of its own.
            seed = derive_seed(study.seed, "shadow", number)
            # Without masks: the sum is the same, except for its rounding.
            trail = workshop.run(f"{name} {number}", in_the_clear(arm), records_inside(pool, inside), seed=seed)
            losses.append(workshop.losses(arm, trail.released, records))
            say(f"{label(name)}: adapter {number + 1} of {len(coins)} trained")
        values, seen = confidence(np.array(losses)), np.array([inside[chosen] for inside in coins])
        found = {"game": _compare(values[0], values[1:], seen[1:], seen[0])}
        if arm == study:
            own = confidence(workshop.losses(study, released, records))
            found["released"] = _compare(own, values[1:], seen[1:], pool.trained[chosen])
        for target, told in found.items():
            results.append({"arm": name, "target": target, **told})
            say(
                f"{label(name)}, target {target}: AUC "
                + ", ".join(f"{score} {one['auc']:.3f}" for score, one in told.items())
            )
    return {
        "attack": "membership",
        "study": study.name,
        "study_digest": study.digest,
        "seed": study.seed,
        "shadows": shadows,
        "scored": len(records),
        "arms": results,
    }


def _compare(target: _Array, shadows: _Array, seen: NDArray[np.bool_], member: Coins) -> dict[str, Any]:
    scores, blind = likelihood_scores(target, shadows, seen)
    found = {"loss": target, "lira": scores, "blind": blind}
    return {name: asdict(separation(values[member], values[~member])) for name, values in found.items()}
