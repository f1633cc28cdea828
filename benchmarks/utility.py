"""The cost of local differential privacy in accuracy: MedQuAD, nine institutions, by aggregation, epsilon and unit.

A smaller study than `medquad.py`, so that twenty of them end within the hour on two cores: answers are cut at 32
tokens, adapters sit on the upper three layers, 27 rounds of one step make one pass. Every site adds its own noise;
updates are masked. At epsilon 8 each accuracy is the mean over three seeds of everything random, with its 95 %
interval (Student's t); elsewhere it is one seed. Settings were chosen on this public data.
"""

from __future__ import annotations

import statistics
from tempfile import TemporaryDirectory
from typing import Any

from arms import details, run_arms, simulation
from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, medquad_sites, require

ROUNDS = 27
SAMPLING_RATE = 1 / 27
DELTA = 1e-5
SEEDS = (0, 1, 2)
# Student's t for 95 % and two degrees of freedom.
T_TWO = 4.303
ADAPTIVE = {"optimizer": "fedadam", "learning_rate": 3e-3, "head_learning_rate": 1e-2, "tau": 1e-6}
# FedSVD changes the basis of B, which Adam's squared gradients cannot follow.
MOMENTUM = {"optimizer": "fedavgm", "learning_rate": 0.3, "head_learning_rate": 0.2, "momentum": 0.9}
SERVER: dict[str, dict[str, Any]] = {"ffa": ADAPTIVE, "fedavg": ADAPTIVE, "fedsvd": MOMENTUM}
Arm = tuple[str, str, float | None, int]
"""Aggregation, unit, epsilon (None: not private) and seed."""


def study(arm: Arm, rounds: int) -> dict[str, Any]:
    """Return an arm's study as plain values, without its simulation table."""
    method, unit, epsilon, seed = arm
    privacy: dict[str, Any] = {"mode": "none"}
    if epsilon is not None:
        privacy = {"mode": "local", "unit": unit, "epsilon": epsilon, "delta": DELTA, "clip_norm": 1.0}
    return {
        "name": "medquad-small",
        "seed": seed,
        "model": MINILM,
        "task": {"kind": "text-classification", "labels": list(LABELS), "pooling": "mean"},
        "data": {"columns": {"text": "answer", "label": "question_type"}, "unit": "document", "max_length": 32},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "layers": 3},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": SAMPLING_RATE,
            "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": method, **SERVER[method], "schedule": {"shape": "linear", "floor": 0.1}, "largest_count": 5000,
        },
        "privacy": privacy,
    }  # fmt: skip


def arms(bench: Bench) -> list[Arm]:
    """Return what is run."""
    if bench.quick:
        return [("ffa", "record", None, 0), ("ffa", "record", 8.0, 0)]
    methods = ("ffa", "fedsvd", "fedavg")
    found: list[Arm] = [(method, "record", 8.0, seed) for method in methods for seed in SEEDS]
    found += [(method, "record", epsilon, 0) for method in methods for epsilon in (None, 3.0, 1.0)]
    return found + [("fedsvd", "patient", epsilon, 0) for epsilon in (8.0, 3.0)]


def cell(scores: list[float]) -> tuple[float, float | None]:
    """Return the mean of some scores, and half the width of its 95 % interval if there are three."""
    half = T_TWO * statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) == len(SEEDS) else None
    return statistics.mean(scores), half


def main() -> None:
    """Run all arms, two at a time, and print the table."""
    bench = start("utility", __doc__)
    require(MEDQUAD)
    table, rounds = simulation(medquad_sites(bench.quick)), 4 if bench.quick else ROUNDS
    with TemporaryDirectory() as folder:
        results = run_arms(bench, {arm: study(arm, rounds) | table for arm in arms(bench)}, folder)
    found: dict[str, list[float]] = {}
    for (method, unit, epsilon, _), summary in sorted(results.items(), key=lambda item: str(item[0])):
        promise = "non-private" if epsilon is None else f"epsilon {epsilon:g} per {unit.replace('patient', 'document')}"
        found.setdefault(f"accuracy, {method}, {promise}", []).append(100 * summary["federated"]["accuracy"])
    checks = []
    for name, scores in found.items():
        mean, half = cell(scores)
        checks.append(Check(name, mean, "%" if half is None else f"% +-{half:.1f}", "", None))
    lost = cell(found["accuracy, ffa, non-private"])[0] - cell(found["accuracy, ffa, epsilon 8 per record"])[0]
    checks.append(
        Check("lost at epsilon 8 per record, ffa", lost, "points", "<= 5", None if bench.quick else lost <= 5)
    )
    bench.finish(checks, details(results))


if __name__ == "__main__":
    main()
