"""Attack MiniLM adapters, and compare with unprotected baselines: membership, canaries, reconstruction, poisoning.

Records are MedQuAD questions (answers for membership and reconstruction) of one to three institutions. The studies are
small, and train far longer on each record than a study for a good model would; this makes attacks possible. The
settings of the audit were chosen so that the baseline without privacy fails it. The results are also printed as the
tables of docs/attacks.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, require

from privet.client.site import Resources
from privet.client.training.data import Records, load_records
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop
from privet.simulations.attacks.canaries import run_audit
from privet.simulations.attacks.membership import pool_of, run_membership
from privet.simulations.attacks.poisoning import deal_in_turn, run_poisoning
from privet.simulations.attacks.poisoning import poisoned_study as poisoned
from privet.simulations.attacks.reconstruction import draw, run_reconstruction
from privet.simulations.attacks.reconstruction import exposed_study as revealed

EPSILON = 8.0
SCORES = ("loss", "lira", "blind")
"""The scores of membership inference."""


def study(seed: int, name: str, *, column: str = "question", tokens: int = 16, **training: Any) -> Study:
    """Return a study of MedQuAD's question types."""
    rates = {"optimizer": "adamw", "learning_rate": 1e-2, "head_learning_rate": 5e-2}
    return Study.parse(
        {
            "name": name,
            "seed": seed,
            "model": MINILM,
            "task": {"kind": "text-classification", "labels": list(LABELS), "pooling": "mean"},
            "data": {"columns": {"text": column, "label": "question_type"}, "max_length": tokens},
            "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "layers": 1},
            "training": {**rates, **training},
            "aggregation": {"method": "ffa"},
            "privacy": {"mode": "local", "epsilon": EPSILON, "delta": 1e-5, "clip_norm": 1.0},
            "cohort": {"min_sites": 1},
            "secure_aggregation": {"mode": "plain"},
        }
    )


def read(chosen: Study, institution: str, part: str = "train") -> Records:
    """Return the records of an institution."""
    (file,) = (MEDQUAD / institution).glob(f"{part}.*")
    return load_records(file, chosen, training=part == "train")[0]


def canaries(bench: Bench, folder: Path) -> dict[str, Any]:
    """Audit epsilon 8, 3 and 1 with 1000 canaries in one institution's records."""
    rounds, count = (1, 100) if bench.quick else (6, 1000)
    chosen = study(bench.seed, "audit", rounds=rounds, local_steps=10, sampling_rate=0.25)
    workshop = Workshop(folder, Resources(threads=1))
    epsilons = (EPSILON,) if bench.quick else (EPSILON, 3.0, 1.0)
    return run_audit(workshop, chosen, {"cdc": read(chosen, "CDC")}, canaries=count, epsilons=epsilons, say=bench.say)


def reconstruction(bench: Bench, folder: Path) -> dict[str, Any]:
    """Recover answers of at most 40 tokens from updates of rank 64."""
    tokens, sites = (12, 3) if bench.quick else (40, 5)
    plain = study(bench.seed, "words", column="answer", tokens=tokens, rounds=2, local_steps=1, sampling_rate=1.0)
    chosen = revealed(plain, rank=16 if bench.quick else 64)
    secrets, others = draw(read(chosen, "CDC"), sites, bench.seed)
    workshop = Workshop(folder, Resources(threads=1, precision="fp32"))
    return run_reconstruction(workshop, chosen, secrets, others, epsilon=EPSILON, say=bench.say)


def membership(bench: Bench, folder: Path) -> dict[str, Any]:
    """Attack a study over two institutions."""
    rounds = 1 if bench.quick else 5
    # From so few words the model can learn little except by heart.
    chosen = study(
        bench.seed, "membership", column="answer", tokens=8, rounds=rounds, local_steps=10, sampling_rate=0.3
    )
    institutions = ("CDC",) if bench.quick else ("CDC", "NHLBI")
    sites = {name.lower(): read(chosen, name) for name in institutions}
    tests = {name.lower(): read(chosen, name, "test") for name in institutions}
    workshop = Workshop(folder, Resources(threads=1))
    released = workshop.run("run", chosen, sites).released
    return run_membership(workshop, chosen, pool_of(sites, tests), released, say=bench.say)


def poisoning(bench: Bench, folder: Path, malicious: int = 1) -> dict[str, Any]:
    """Attack a study with some malicious sites among 30."""
    plain = study(bench.seed, "poisoning", rounds=1 if bench.quick else 4, local_steps=2, sampling_rate=0.5)
    sites = 4 if bench.quick else 30
    chosen = poisoned(Study.parse({**plain.document(), "privacy": {"mode": "none"}}), sites)
    records = read(chosen, "CDC" if bench.quick else "NINDS")
    test = read(chosen, "CDC" if bench.quick else "NINDS", "test")
    workshop = Workshop(folder, Resources(threads=1))
    dealt = deal_in_turn(records, sites, bench.seed)
    return run_poisoning(workshop, chosen, dealt, test, malicious=malicious, say=bench.say)


def collusion(bench: Bench, folder: Path) -> dict[str, Any]:
    """Attack a study with a fifth of the sites, which collude."""
    return poisoning(bench, folder, malicious=1 if bench.quick else 6)


def checks_of(found: dict[str, dict[str, Any]], quick: bool) -> list[Check]:
    """Return the figures, with the targets where it is the full run."""
    checks = []
    for arm in found["canaries"]["arms"]:
        bound, claim = arm["audit"]["epsilon"], arm["claimed_epsilon"]
        met = bound > 3 if claim is None else bound <= claim
        target = "> 3" if claim is None else f"<= {claim:g}"
        checks.append(Check(f"audit, {arm['arm']}: epsilon at least", bound, "", target, None if quick else met))
    for arm in found["reconstruction"]["arms"]:
        open_ = arm["arm"].endswith("no protection")
        met, target = (arm["recovered"] == 1, "= 100") if open_ else (arm["at_chance"], "chance")
        checks.append(Check(f"tokens read, {arm['arm']}", 100 * arm["recovered"], "%", target, None if quick else met))
    for arm in found["membership"]["arms"]:
        for score in SCORES:
            told, where = arm[score], f"{arm['target']}, {arm['arm']}, {score}"
            checks.append(Check(f"AUC, {where}", told["auc"], "", "", None))
            for rate in told["rates"]:
                if rate["resolved"]:
                    low, high = (100 * end for end in rate["interval"])
                    name = f"TPR at {100 * rate['at']:g} % FPR, {where}"
                    checks.append(Check(name, 100 * rate["tpr"], f"% ({low:.1f} to {high:.1f})", "", None))
    for told in (found["poisoning"], found["collusion"]):
        for arm in told["arms"]:
            name = f"{told['malicious']} sites, {arm['attack']}, defence {arm['defence']}: succeeds"
            checks.append(Check(name, 100 * arm["success"], "%", "", None))
    return checks


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Return the results as the Markdown tables of docs/attacks.md."""
    audit, members, words = (found[name] for name in ("canaries", "membership", "reconstruction"))
    one, several = found["poisoning"], found["collusion"]
    audited = [
        {
            f"audit, {audit['canaries']} canaries": arm["arm"],
            "right guesses": f"{arm['audit']['right']} of {arm['audit']['guesses']}",
            "epsilon at least": f"{arm['audit']['epsilon']:.2f}",
            "promised": "nothing" if arm["claimed_epsilon"] is None else f"{arm['claimed_epsilon']:g}",
        }
        for arm in audit["arms"]
    ]
    guessed = [
        {
            f"membership, {members['scored']} records": arm["arm"],
            "target": arm["target"],
            "score": score,
            "AUC": area(arm[score]),
            "TPR at 1 % FPR": hits(arm[score]),
        }
        for arm in members["arms"]
        for score in SCORES
    ]
    recovered = [
        {
            f"reconstruction, rank {words['rank']}, records of at most {words['positions']} tokens": arm["arm"],
            "words read": percent(arm["recovered"], arm["interval"]),
            "records read whole": f"{arm['records_exact']} of {arm['records']}",
            "chance": f"{100 * arm['control']:.1f} %",
        }
        for arm in words["arms"]
    ]
    spoilt = [
        {
            f"poisoning, of {one['sites']} sites": alone["attack"],
            "defence": alone["defence"],
            **{
                f"{told['malicious']} malicious: {what}": f"{100 * arm[key]:.1f} %"
                for told, arm in ((one, alone), (several, together))
                for what, key in (("accuracy", "accuracy"), ("attack succeeds", "success"))
            },
        }
        for alone, together in zip(one["arms"], several["arms"], strict=True)
    ]
    return "\n\n".join(map(table, (audited, guessed, recovered, spoilt)))


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as a Markdown table."""
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def area(told: dict[str, Any]) -> str:
    """Return an area under the curve with its interval."""
    low, high = told["interval"]
    return f"{told['auc']:.3f} ({low:.3f} to {high:.3f})"


def hits(told: dict[str, Any]) -> str:
    """Return the true-positive rate at 1 % false positives with its interval, if there are enough negatives."""
    (rate,) = (rate for rate in told["rates"] if rate["at"] == 0.01)
    return percent(rate["tpr"], rate["interval"]) if rate["resolved"] else "too few records"


def percent(value: float, interval: Sequence[float]) -> str:
    """Return a fraction in percent with its interval."""
    low, high = interval
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


ATTACKS = {
    "poisoning": poisoning,
    "collusion": collusion,
    "canaries": canaries,
    "membership": membership,
    "reconstruction": reconstruction,
}
"""Longest first."""


def run_attack(task: tuple[str, Bench]) -> tuple[str, dict[str, Any]]:
    """Run one attack, on one thread, and return its result."""
    name, bench = task
    with TemporaryDirectory() as folder:
        return name, json.loads(json.dumps(ATTACKS[name](bench, Path(folder))))


def main() -> None:
    """Run all attacks, two at a time, and print the checks."""
    bench = start("attacks", __doc__)
    require(MEDQUAD)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = dict(pool.map(run_attack, [(name, bench) for name in ATTACKS]))
    bench.say(tables(found))
    bench.finish(checks_of(found, bench.quick), found)


if __name__ == "__main__":
    main()
