"""The one-run audit: measure a lower bound on the epsilon of a study with planted records.

Canaries are records that resemble no other record: random words of the model's own vocabulary with random labels. A
fair coin decides for each canary whether it enters the records of one site. The study then trains as usual. The score
of a canary is the amount by which training lowered its loss. `one_run` turns right guesses into a lower bound on
epsilon. A baseline without privacy is audited as well: if its bound is also low, the attack is weak and proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from privet.client.release.separation import separation
from privet.client.training.canaries import flip_coins, make_canaries, vocabulary
from privet.client.training.data import Records
from privet.common.privacy.noise import SeededRandomness
from privet.common.privacy.one_run import audit
from privet.common.progress import Say
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, at_epsilon, pooled_records, without_privacy
from privet.simulations.attacks.labels import BASELINE, label


def arms_of(study: Study, epsilons: Sequence[float]) -> dict[str, Study]:
    """Return the studies to audit, by name: the baseline without privacy, and one at each epsilon.

    Without `epsilons`, the second is at the study's own epsilon.
    """
    own = (study.privacy.promise.epsilon,) if study.private else ()
    # A canary in the validation part would count as included without being trained on.
    plain = study.model_copy(update={"data": study.data.model_copy(update={"validation_fraction": 0.0})})
    plain = plain.model_copy(update={"training": study.training.model_copy(update={"patience": None})})
    arms = {BASELINE: without_privacy(plain)}
    return arms | {f"epsilon {epsilon:g}": at_epsilon(plain, epsilon) for epsilon in (epsilons or own)}


def run_audit(
    workshop: Workshop,
    study: Study,
    sites: Mapping[str, Records],
    *,
    canaries: int = 1000,
    epsilons: Sequence[float] = (),
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Audit a study in one run for each epsilon and for the baseline, and return the result as JSON values.

    Args:
        workshop: Runs the studies.
        study: The study to audit; its seed decides canaries and coins.
        sites: Training records of each site. The first site in order of names gets the canaries.
        canaries: Number of canaries, m.
        epsilons: Values of epsilon to audit; if empty, the study's own.
        say: Receives a line for each result.

    Raises:
        PrivetError: A round failed, or there are too few words or canaries.
    """
    victim = min(sites)
    words = vocabulary(workshop.host(study).tokenizer)
    records = make_canaries(study, words, canaries, SeededRandomness(study.seed, "canaries"))
    coins = flip_coins(canaries, SeededRandomness(study.seed, "coins"))
    chosen = records.select([index for index, coin in enumerate(coins) if coin])
    holding = {**sites, victim: pooled_records([sites[victim], chosen])}
    # The declared count is public, so it must not depend on the coins: the guesses may use everything that is released.
    declared = {victim: len(sites[victim]) + canaries // 2}
    found = []
    for name, arm in arms_of(study, epsilons).items():
        trail = workshop.run(name.replace(" ", "-"), arm, holding, declared=declared)
        before, after = (np.array(workshop.losses(arm, a, records)) for a in (trail.adapters[0], trail.released))
        scores = before - after
        delta = arm.privacy.promise.delta if arm.private else (study.privacy.delta or 1e-5)
        result = audit(scores, coins, delta)
        told = separation(scores[np.array(coins)], scores[~np.array(coins)])
        claimed = arm.privacy.epsilon
        found.append(
            {
                "arm": name,
                "claimed_epsilon": claimed,
                "audit": asdict(result),
                "auc": told.auc,
                "auc_interval": told.interval,
                "holds": None if claimed is None else result.epsilon <= claimed,
            }
        )
        say(
            f"{label(name)}: {result.right} of {result.guesses} guesses right, "
            f"epsilon at least {result.epsilon:.2f} at 95 % confidence"
        )
    return {
        "attack": "canaries",
        "study": study.name,
        "study_digest": study.digest,
        "seed": study.seed,
        "canaries": canaries,
        "included": sum(coins),
        "site": victim,
        "records": len(sites[victim]),
        "arms": found,
    }
