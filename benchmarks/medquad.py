"""MedQuAD over its nine institutions: MiniLM with LoRA, federated against pooled and against each site alone.

One optimizer step per round: each site sends the gradient sum of its Poisson sample, the server steps with
FedAdam. Sites this different drift apart when they train alone for longer; one step at a time, federated
training takes the steps that pooled training takes. The same study at epsilon 8 per record, with noise added
at each site, shows what local differential privacy costs.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, medquad_sites, require, write

from privet.simulations.simulate import prepare, run_simulation

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
ROUNDS = 40
SAMPLING_RATE = 1 / 27


def study(seed: int, rounds: int, privacy: dict[str, Any]) -> dict[str, Any]:
    """Return the study as plain values, without its simulation table."""
    return {
        "name": "medquad",
        "seed": seed,
        "model": MINILM,
        "task": {"kind": "text-classification", "labels": list(LABELS), "pooling": "mean"},
        "data": {"columns": {"text": "answer", "label": "question_type"}, "max_length": 64},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "layers": 3},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": SAMPLING_RATE,
            "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": "ffa", "optimizer": "fedadam", "learning_rate": 3e-3, "head_learning_rate": 1e-2, "tau": 1e-6,
            "schedule": {"shape": "linear", "floor": 0.1},
        },
        "privacy": privacy,
        "cohort": {"min_sites": 1},
        "secure_aggregation": {"mode": "plain"},
    }  # fmt: skip


def arms(bench: Bench) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return each arm's privacy table and sites, longest first. All arms are tested on all sites' tests."""
    sites = medquad_sites()
    if bench.quick:
        sites = {site: sites[site] for site in ("cdc", "nhlbi", "seniorhealth")}
    every = {part: [file for files in sites.values() for file in files[part]] for part in ("train", "test")}
    none = {"mode": "none"}
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    found |= {"federated": (none, sites), "epsilon 8": (PRIVATE, sites), "pooled": (none, {"pooled": every})}
    for name, files in sites.items():
        found[f"{name} alone"] = (none, {name: {"train": files["train"], "test": every["test"]}})
    return found


def run_arm(task: tuple[str, dict[str, Any], str]) -> tuple[str, dict[str, Any]]:
    """Run one arm, on one thread, and return its summary."""
    name, document, folder = task
    path = Path(folder) / name.replace(" ", "-")
    return name, run_simulation(prepare(write(path.with_suffix(".toml"), document), path))


def main() -> None:
    """Run all arms, two at a time, and print the checks."""
    bench = start("medquad", __doc__)
    require(MEDQUAD)
    rounds = 4 if bench.quick else ROUNDS
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tasks = []
        for name, (privacy, sites) in arms(bench).items():
            document = study(bench.seed, rounds, privacy)
            document["simulation"] = {"data": "files", "evaluate_every": 10, "test_records": 100, "sites": sites}
            document["simulation"]["resources"] = {"threads": 1}
            tasks.append((name, document, folder))
        results = {}
        for future in as_completed([pool.submit(run_arm, task) for task in tasks]):
            name, summary = future.result()
            results[name] = summary
            accuracy = summary["federated"]["accuracy"]
            bench.say(f"{name:<28} accuracy {accuracy:.3f}   {summary['seconds']:.0f} s")
    scores = {name: 100 * summary["federated"]["accuracy"] for name, summary in results.items()}
    alone = [score for name, score in scores.items() if name.endswith(" alone")]
    mean_alone = sum(alone) / len(alone)
    behind, ahead = scores["pooled"] - scores["federated"], scores["federated"] - mean_alone
    full = not bench.quick
    checks = [
        Check("accuracy, federated, non-private", scores["federated"], "%", "", None),
        Check("accuracy, pooled, non-private", scores["pooled"], "%", "", None),
        Check("accuracy, mean of the sites alone, non-private", mean_alone, "%", "", None),
        Check("pooled minus federated", behind, "points", "<= 2", behind <= 2 if full else None),
        Check("federated minus mean of the sites alone", ahead, "points", ">= 20", ahead >= 20 if full else None),
        Check("accuracy, federated, epsilon 8 per record", scores["epsilon 8"], "%", "", None),
        Check("non-private minus epsilon 8", scores["federated"] - scores["epsilon 8"], "points", "reported", None),
    ]
    bench.finish(checks, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
