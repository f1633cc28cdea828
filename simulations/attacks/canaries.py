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

from privet.client.training.data import Records
from privet.common.errors import StudyError
from privet.common.privacy.noise import SeededRandomness
from privet.common.progress import Say
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, at_epsilon, pooled_records, without_privacy
from privet.simulations.attacks.labels import BASELINE, label
from privet.common.privacy.one_run import audit
from privet.client.release.separation import separation

CANARY_WORDS = 6
_SHORTEST = 3


def vocabulary(tokenizer: Any) -> list[str]:
    """Return the words that are one token each: `_SHORTEST` or more lower-case ASCII letters, sorted.

    Raises:
        StudyError: There are too few words for canaries.
    """
    words = {tokenizer.decode([number]).strip() for number in range(len(tokenizer))}
    found = sorted(w for w in words if len(w) >= _SHORTEST and w.isascii() and w.isalpha() and w.islower())
    if len(found) < 2 * CANARY_WORDS:
        raise StudyError(
            f"the base model's tokenizer: expected at least {2 * CANARY_WORDS} lower-case words of one token each, "
            f"from which canaries are made; found {len(found)}",
            "pin a base model with an English vocabulary in the study's [model] table",
        )
    return found


def make_canaries(study: Study, words: Sequence[str], count: int, seed: int) -> Records:
    """Return `count` distinct records of random words with random labels, tags or answers."""
    draws = SeededRandomness(seed, "canaries")

    def text() -> list[str]:
        return [words[int(x * len(words))] for x in draws.uniform(CANARY_WORDS)]

    def pick(options: int, size: int) -> list[int]:
        return [int(x * options) for x in draws.uniform(size)]

    rows: list[dict[str, Any]] = []
    for number in range(count):
        # The number keeps records distinct even if the vocabulary is small.
        body = [*text(), str(number)]
        if study.task.kind == "text-classification":
            rows.append({"text": " ".join(body), "label": pick(len(study.task.labels), 1)[0]})
        elif study.task.kind == "token-classification":
            rows.append({"tokens": body, "tags": pick(len(study.task.labels), len(body))})
        elif study.task.kind == "preference":
            rows.append({"prompt": " ".join(body), "chosen": " ".join(text()), "rejected": " ".join(text())})
        else:
            rows.append({"prompt": " ".join(body), "answer": " ".join(text())})
    return Records(tuple(rows), tuple(f"canary-{number}" for number in range(count)))


def flip_coins(count: int, seed: int) -> list[bool]:
    """Return for each canary whether it is included."""
    return [bool(x < 0.5) for x in SeededRandomness(seed, "coins").uniform(count)]


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
    records = make_canaries(study, vocabulary(workshop.host(study).tokenizer), canaries, study.seed)
    coins = flip_coins(canaries, study.seed)
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
