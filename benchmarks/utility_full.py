"""MedQuAD at full size: whole answers, adapters on every layer, three passes, noise of each site's own and in shares.

What `utility.py` and `distributed.py` show on two cores with answers cut at 32 tokens, on a GPU with 256, the longest
that MiniLM was trained on. Each arm is one simulation over the nine institutions, or over all their data in one place;
with noise in shares at epsilon 8, accuracy is the mean of three seeds of everything random, with its 95 % interval
(Student's t), elsewhere one seed's.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

import distributed
import torch
import utility
from arms import details, run_arms
from harness import Bench, Check, start
from studies import MEDQUAD, medquad_sites, require

ROUNDS = 81
Arm = distributed.Arm
# Points behind pooled training without privacy that sharing the noise may cost, as in `distributed.py`.
TARGETS = distributed.TARGETS


def study(arm: Arm, rounds: int) -> dict[str, Any]:
    """Return an arm's study as plain values, without its simulation table."""
    document = distributed.study(arm, rounds)
    document["name"] = "medquad-full"
    document["data"]["max_length"] = 256
    del document["lora"]["layers"]
    return document


def arms(bench: Bench) -> list[Arm]:
    """Return what is run."""
    if bench.quick:
        return [("distributed", 8.0, 0)]
    cells = [(8.0, seed) for seed in utility.SEEDS] + [(epsilon, 0) for epsilon in distributed.EPSILONS[1:]]
    return [("pooled", None, 0), ("local", None, 0)] + [
        (mode, *cell) for cell in cells for mode in ("distributed", "local") if mode == "distributed" or cell[1] == 0
    ]


def main() -> None:
    """Run all arms, several at a time, and print the table."""
    bench = start("utility_full", __doc__)
    require(MEDQUAD)
    if not bench.quick and not torch.cuda.is_available():
        bench.say("skipped: no CUDA device")
        return
    sites, rounds = medquad_sites(bench.quick), 1 if bench.quick else ROUNDS
    workers = max(2, min(7, (os.cpu_count() or 2) // 2))
    documents = {
        arm: study(arm, rounds) | distributed.table(arm, sites, physical_batch=256, precision="auto")
        for arm in arms(bench)
    }
    with TemporaryDirectory() as folder:
        results = run_arms(bench, documents, folder, workers)
    bench.finish(checks(results, bench.quick), details(results))


def checks(results: dict[Arm, dict[str, Any]], quick: bool) -> list[Check]:
    """Return the accuracies, and how far noise in shares is behind pooled training."""
    scores: dict[tuple[str, float | None], list[float]] = {}
    for (mode, epsilon, _), summary in sorted(results.items(), key=str):
        scores.setdefault((mode, epsilon), []).append(100 * summary["federated"]["accuracy"])
    found = []
    for (mode, epsilon), values in scores.items():
        mean, half = utility.cell(values)
        name = "non-private" if epsilon is None else f"epsilon {epsilon:g} per record"
        who = "federated" if (mode, epsilon) == ("local", None) else mode
        found.append(
            Check(f"accuracy at full size, {who}, {name}", mean, "%" if half is None else f"% +-{half:.1f}", "", None)
        )
    if not quick:
        pooled = utility.cell(scores["pooled", None])[0]
        for epsilon, most in TARGETS.items():
            behind = pooled - utility.cell(scores["distributed", epsilon])[0]
            name = f"behind pooled at full size, epsilon {epsilon:g}"
            found.append(Check(name, behind, "points", f"<= {most:g}", behind <= most))
    return found


if __name__ == "__main__":
    main()
