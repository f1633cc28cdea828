"""Membership inference: can one tell from an adapter whether a record was trained on?

Two attacks. Loss threshold (Yeom et al. 2018): a record of low loss was. LiRA, offline (Carlini et al. 2022, section
V and VI-C): shadow adapters, trained by the study on random halves of the records, tell how confident an adapter is
about this very record when it has not seen it; a confidence above that speaks for membership. The confidence is
log(p / (1 - p)) with p = exp(-loss), and all records share one deviation, as there are few shadows.

Two targets. `game`: an adapter that the study trains on a random half, against the other half: members and others
differ in nothing but membership, which is what an attack has to be measured on. `released`: the adapter of the run
itself, against its test records. Those may differ by themselves, so the same score of adapters that saw neither
stands beside it, as `blind`: where that is far from 1/2, the attack has learnt who is in the test file, no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.training.data import Records, concatenate
from privet.common.errors import StudyError
from privet.common.privacy.noise import SeededRandomness, derive_seed
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, in_the_clear, without_privacy
from privet.simulations.attacks.statistics import separation
from privet.simulations.progress import Say

_Array = NDArray[np.float64]
Coins = NDArray[np.bool_]
# A loss below this is one: p would round to 1, and the confidence to infinity.
_LEAST_LOSS = 1e-12


@dataclass(frozen=True)
class CandidatePool:
    """All records of the run, site by site in name order.

    Attributes:
        sites: Each site's records.
        trained: Whether the run itself trained on a record, over all sites in order.
    """

    sites: Mapping[str, Records]
    trained: Coins

    @property
    def records(self) -> Records:
        """All records, in the order of `trained`."""
        return concatenate([self.sites[site] for site in sorted(self.sites)])


def pool_of(train: Mapping[str, Records], test: Mapping[str, Records]) -> CandidatePool:
    """Join each site's training and test records.

    Raises:
        StudyError: No site has test records.
    """
    if not any(len(records) for records in test.values()):
        raise StudyError("membership: no site has test records, who are the non-members", "give sites a `test` file")
    sites, trained = {}, []
    for site in sorted(train):
        parts = [train[site], *([test[site]] if site in test else [])]
        # A patient of the training file is not the one of that name in the test file.
        sites[site] = concatenate(parts, distinct=True)
        trained += [True] * len(train[site]) + [False] * (len(sites[site]) - len(train[site]))
    return CandidatePool(sites, np.array(trained))


def halves(pool: CandidatePool, count: int, seed: int) -> list[Coins]:
    """Return who is in each of `count` random halves, over all sites in order; all records of a unit go together.

    Halves come in pairs, the second holding what the first does not: so each record is outside exactly half of them.
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
    """Return each site's records that are inside."""
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
    """Return the offline LiRA score of each record, and what shadows alone say of it.

    Args:
        target: The target's confidence in each record, [n].
        shadows: Each shadow's, [k, n].
        seen: Whether a shadow was trained on the record, [k, n]; each record is unseen by two shadows or more.

    Returns:
        (target - mean) / deviation over the shadows that have not seen the record, with the deviation of all records
        together; and that mean, which says nothing about membership in the target.
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
    """Attack a run's adapter and its study, and the same study without privacy.

    Args:
        workshop: Where to run.
        study: The run's.
        pool: Its records.
        released: The adapter that it released.
        shadows: Shadow adapters of each arm, an even number of at least 4; the target of the game is one more.
        most: Records that are scored at most, drawn at random.
        say: Receives a line per adapter.

    Raises:
        StudyError: The number of shadows is odd or below 4.
        PrivetError: As the study's rounds raise it.
    """
    if shadows < 4 or shadows % 2:
        raise StudyError(f"shadows: expected an even number of at least 4, got {shadows}")
    chosen = np.sort(np.argsort(SeededRandomness(study.seed, "scored").uniform(len(pool.trained)))[:most])
    records = pool.records.select([int(index) for index in chosen])
    arms = {f"epsilon {study.privacy.epsilon:g}": study} if study.private else {}
    results = []
    for name, arm in {"no privacy": without_privacy(study), **arms}.items():
        coins = halves(pool, shadows + 2, study.seed)[1:]  # the first is its target's complement
        losses = []
        for number, inside in enumerate(coins):
            # Who trains shadows knows the study, its first adapter too, but not the batches and noise of the target.
            seed = derive_seed(study.seed, "shadow", number)
            trail = workshop.run(f"{name} {number}", in_the_clear(arm), records_inside(pool, inside), seed=seed)
            losses.append(workshop.losses(arm, trail.released, records))
            say(f"{name}: adapter {number + 1} of {len(coins)} trained")
        values, seen = confidence(np.array(losses)), np.array([inside[chosen] for inside in coins])
        found = {"game": _compare(values[0], values[1:], seen[1:], seen[0])}
        if arm == study:
            own = confidence(workshop.losses(study, released, records))
            found["released"] = _compare(own, values[1:], seen[1:], pool.trained[chosen])
        for target, told in found.items():
            results.append({"arm": name, "target": target, **told})
            say(f"{name}, {target}: AUC " + ", ".join(f"{score} {one['auc']:.3f}" for score, one in told.items()))
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
