"""NCBI disease, split over four sites: named entities, entity-level F1 with exact spans.

The head reads all layers of the base (`task.head_reads`), a sentence encoder. Without privacy; at epsilon 8 per
sentence with noise that the sites share, and with noise of each site's own; and with shared noise and a head that reads
the last layer alone. One step a round with a quarter of the sentences: under noise, few steps with many records learn
more than many with few.

Arms run two at a time, each on one thread. `--seeds N` repeats them with N seeds. `--only TEXT` runs the arms whose
names contain it. `--keep DIR` keeps each arm's summary there, and a later run with the same settings takes it from
there: an arm takes an hour.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import DATA, Check, kept, start
from studies import MINILM, require, write

from privet.simulations.runs.simulate import prepare, run_simulation

NCBI = DATA / "ncbi_disease"
SITES, ROUNDS, RATE = 4, 96, 0.25
LABELS = ["O", "B-Disease", "I-Disease"]
NONE = {"mode": "none"}
# Head and adapter are clipped apart: the head would take most of a common norm.
PRIVATE = {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "head_clip_share": 0.3}
SHARED = {**PRIVATE, "mode": "distributed", "dropouts": 0, "dropout_fraction": 0}
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "epsilon 8, shared noise": (SHARED, True),
    "non-private": (NONE, True),
    "epsilon 8, noise of each site's own": ({**PRIVATE, "mode": "local"}, True),
    "epsilon 8, shared noise, last layer alone": (SHARED, False),
}
"""Privacy of each arm, and whether its head reads all layers."""


def split(directory: Path, limit: int | None) -> dict[str, dict[str, list[str]]]:
    """Deal the training sentences to four sites in turn; the test is evaluated as a whole, at the first site."""

    def some(part: str, number: int, step: int) -> list[str]:
        rows = (NCBI / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
        path = directory / f"{part}-{number}.jsonl"
        path.write_text("\n".join(rows[number::step]) + "\n", encoding="utf-8")
        return [str(path)]

    return {
        f"site-{number}": {"train": some("train", number, SITES), "test": some("test", 0, 1) if number == 0 else []}
        for number in range(SITES)
    }


def study(privacy: Mapping[str, Any], every_layer: bool, seed: int, rounds: int) -> dict[str, Any]:
    """Return an arm's study, without its simulation table."""
    return {
        "name": "ncbi-disease",
        "seed": seed,
        "model": MINILM,
        "task": {
            "kind": "token-classification", "labels": LABELS, **({"head_reads": "all-layers"} if every_layer else {}),
        },
        "data": {"columns": {"tokens": "tokens", "tags": "tags"}, "max_length": 96},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "key", "value", "dense"], "start": "inputs"},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": RATE, "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": "ffa", "optimizer": "fedadam", "learning_rate": 2e-3, "head_learning_rate": 2e-2, "tau": 1e-6,
            "schedule": {"shape": "linear", "floor": 0.1},
        },
        "privacy": dict(privacy),
    }  # fmt: skip


def run_arm(name: str, seed: int, folder: str, keep: Path | None, quick: bool) -> tuple[str, int, dict[str, Any]]:
    """Run one arm, or take it as it was kept."""
    privacy, every_layer = ARMS[name]
    document = study(privacy, every_layer, seed, 6 if quick else ROUNDS)
    place = Path(folder) / f"{name}, {seed}".replace(", ", "-").replace(" ", "-").replace("'", "")

    def run() -> dict[str, Any]:
        place.mkdir()
        table = {"data": "files", "evaluate_every": 1000, "resources": {"threads": 1}}
        table["sites"] = split(place, 200 if quick else None)
        whole = {**document, "simulation": table}
        summary: dict[str, Any] = run_simulation(prepare(write(place / "study.toml", whole), place / "run"))
        return summary

    settings = {key: value for key, value in document.items() if key != "model"}
    return name, seed, kept(keep, place.name, settings, run)


def main() -> None:
    """Run the arms and print the checks."""
    bench = start("ner", __doc__, seeds=1)
    require(NCBI)
    names = [name for name in list(ARMS)[: 2 if bench.quick else None] if bench.only in name]
    results: dict[str, dict[int, dict[str, Any]]] = {}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        seeds = range(bench.seed, bench.seed + bench.seeds)
        running = [
            pool.submit(run_arm, name, seed, folder, bench.keep, bench.quick) for seed in seeds for name in names
        ]
        for future in as_completed(running):
            name, seed, summary = future.result()
            results.setdefault(name, {})[seed] = summary
            found = summary["federated"]
            bench.say(
                f"seed {seed}  {name:<44} F1 {found['f1']:.3f}   precision {found['precision']:.3f}   "
                f"recall {found['recall']:.3f}   {summary['seconds']:.0f} s"
            )
    checks = []
    for name in names:
        scores = [summary["f1"]["federated"] for _, summary in sorted(results[name].items())]
        goal = name == "epsilon 8, shared noise"
        value = statistics.mean(scores)
        met = value >= 0.6 if goal and not bench.quick else None
        checks.append(Check(f"entity F1, federated, {name}", value, "", ">= 0.6" if goal else "", met))
    details = {f"{name}, seed {seed}": found for name, some in results.items() for seed, found in some.items()}
    bench.finish(checks, json.loads(json.dumps(details)))


if __name__ == "__main__":
    main()
