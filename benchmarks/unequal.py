"""Sites of unequal rank, and weights that favour small sites: MedQuAD, 1,000 answers over its nine institutions.

Ranks: the three smallest sites train 2 columns of B, the next three 4, the others 8; beside all sites at rank 8, and an
adapter of rank 2. Without privacy, and at epsilon 8 per record with shared noise. Weights: the declared count, its
root, and equal ones; without privacy, and at epsilon 8 with noise of each site's own. For each: accuracy over all test
records, and at the worst site.

`--only TEXT` runs the arms whose names contain it. `--seeds N` repeats them with N seeds. `--keep DIR` keeps each arm's
summary there, and a later run with the same settings takes it from there.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import small_consortia
from harness import Bench, Check, kept, start
from studies import MEDQUAD, require, write

from privet.simulations.runs.simulate import prepare, run_simulation

SMALL, MIDDLE = ("cdc", "nhlbi", "cancergov"), ("seniorhealth", "mplus-health-topics", "ninds")
MIXED = {**dict.fromkeys(SMALL, 2), **dict.fromkeys(MIDDLE, 4)}
LOCAL = {"privacy": {"mode": "local"}}
ARMS: dict[str, tuple[float | None, dict[str, dict[str, Any]]]] = {
    f"{name}, {small_consortia.promise(epsilon)}": (epsilon, changes if epsilon is None else {**local, **changes})
    for epsilon in (None, 8.0)
    for name, changes, local in (
        ("ranks all 8", {}, {}),
        ("ranks mixed", {"lora": {"site_ranks": MIXED}}, {}),
        ("ranks all 2", {"lora": {"rank": 2, "alpha": 4}}, {}),
        ("weights by count", {}, LOCAL),
        ("weights by root", {"aggregation": {"weight_power": 0.5}}, LOCAL),
        ("weights equal", {"aggregation": {"weighting": "equal"}}, LOCAL),
    )
}
"""Epsilon and changes of a study, by section. A further arm is a further line."""


def document_of(name: str, seed: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return an arm's study with its simulation table. An adapter of rank 2 has the scale alpha / rank of rank 8."""
    epsilon, changes = ARMS[name]
    arm = small_consortia.Arm("medquad", "as it is", epsilon, seed)
    document = small_consortia.medquad(arm, folder)
    for section, values in changes.items():
        document[section] = {**document[section], **values}
    if quick:
        document["training"]["rounds"] = 2
        document["data"]["max_length"] = 16
    return document


def run_arm(name: str, seed: int, keep: Path | None, quick: bool) -> tuple[str, int, dict[str, Any]]:
    """Run one arm, or take it as it was kept."""
    with TemporaryDirectory() as folder:
        document = document_of(name, seed, Path(folder), quick=quick)
        settings = {key: each for key, each in document.items() if key != "simulation"}

        def run() -> dict[str, Any]:
            summary: dict[str, Any] = run_simulation(
                prepare(write(Path(folder) / "study.toml", document), Path(folder) / "run")
            )
            return summary

        stem = f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
        return name, seed, kept(keep, stem, settings, run)


def scores(summary: dict[str, Any]) -> tuple[float, float]:
    """Return the accuracy over all test records, and that of the worst site, in %."""
    sites = [each["accuracy"] for each in summary["federated_per_site"].values()]
    return 100 * summary["federated"]["accuracy"], 100 * min(sites)


def main() -> None:
    """Run the arms, two at a time, and print the checks."""
    bench: Bench = start("unequal", __doc__, seeds=3)
    require(MEDQUAD)
    chosen = [name for name in ARMS if bench.only in name]
    seeds = range(bench.seed, bench.seed + bench.seeds)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = [pool.submit(run_arm, name, seed, bench.keep, bench.quick) for seed in seeds for name in chosen]
        for future in as_completed(running):
            name, seed, summary = future.result()
            found[name].append(summary)
            accuracy, worst = scores(summary)
            bench.say(f"seed {seed}  {name:<32} accuracy {accuracy:.1f} %, worst site {worst:.1f} %")
    checks = []
    for name, summaries in found.items():
        accuracy, worst = (statistics.mean(each) for each in zip(*map(scores, summaries), strict=True))
        checks += [
            Check(f"accuracy, {name}", accuracy, "%", "", None),
            Check(f"worst site, {name}", worst, "%", "", None),
        ]
    bench.finish(checks, found)


if __name__ == "__main__":
    main()
