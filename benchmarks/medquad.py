"""MedQuAD over its nine institutions: MiniLM with LoRA, federated against pooled and against each site alone.

One optimizer step per round: each site sends the gradient sum of its Poisson sample, the server steps with
FedAdam. Sites this different drift apart when they train alone for longer; one step at a time, federated
training takes the steps that pooled training takes. The same study at epsilon 8 per record, with noise added
at each site, shows what local differential privacy costs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, in_one_place, medquad_sites, require, write

from privet.client.rounds.worker import Worker
from privet.common.study.messages import Contribution, RoundOpen
from privet.server.rounds.state import RunDirectory
from privet.simulations.runs.simulate import prepare, run_simulation

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
ROUNDS = 40
SAMPLING_RATE = 1 / 27


def study(seed: int, rounds: int, privacy: dict[str, Any], aggregation: str) -> dict[str, Any]:
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
            "schedule": {"shape": "linear", "floor": 0.1}, "largest_count": 5000 if aggregation == "masked" else 15_000,
        },
        "privacy": privacy,
        "cohort": {"min_sites": 3 if aggregation == "masked" else 1},
        "secure_aggregation": {"mode": aggregation},
    }  # fmt: skip


Arm = tuple[dict[str, Any], str, dict[str, Any]]
"""Privacy table, mode of aggregation, and sites."""


def arms(bench: Bench) -> dict[str, Arm]:
    """Return the arms, longest first. All are tested on all sites' tests."""
    sites = medquad_sites(bench.quick)
    every = in_one_place(sites)
    none = {"mode": "none"}
    found: dict[str, Arm] = {
        "federated": (none, "masked", sites),
        "plain aggregation": (none, "plain", sites),
        "epsilon 8": (PRIVATE, "masked", sites),
        "pooled": (none, "plain", {"pooled": every}),
    }
    for name, files in sites.items():
        found[f"{name} alone"] = (none, "plain", {name: {"train": files["train"], "test": every["test"]}})
    return found


@contextmanager
def counting_training() -> Iterator[list[float]]:
    """Collect the seconds of each training of a site in this process."""
    seconds: list[float] = []
    train = Worker._contribution

    def timed(worker: Worker, opened: RoundOpen) -> Contribution:
        started = time.perf_counter()
        contribution = train(worker, opened)
        seconds.append(time.perf_counter() - started)
        return contribution

    with patch.object(Worker, "_contribution", timed):
        yield seconds


def run_arm(task: tuple[str, dict[str, Any], str]) -> tuple[str, dict[str, Any]]:
    """Run one arm, on one thread, and return its summary, with the seconds of its rounds in and outside training."""
    name, document, folder = task
    path = Path(folder) / name.replace(" ", "-")
    with counting_training() as training:
        summary = run_simulation(prepare(write(path.with_suffix(".toml"), document), path))
    rounds = sum(statement["seconds"] for statement in RunDirectory.open(path).load().statements)
    return name, summary | {"training_seconds": sum(training), "other_seconds": rounds - sum(training)}


def main() -> None:
    """Run all arms, two at a time, and print the checks."""
    bench = start("medquad", __doc__)
    require(MEDQUAD)
    rounds = 4 if bench.quick else ROUNDS
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tasks = []
        for name, (privacy, aggregation, sites) in arms(bench).items():
            document = study(bench.seed, rounds, privacy, aggregation)
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
    masked, plain = results["federated"], results["plain aggregation"]
    lost = abs(scores["plain aggregation"] - scores["federated"])
    added = (
        100 * (masked["other_seconds"] - plain["other_seconds"]) / (plain["training_seconds"] + plain["other_seconds"])
    )
    checks = [
        Check("accuracy, federated, non-private", scores["federated"], "%", "", None),
        Check("accuracy, pooled, non-private", scores["pooled"], "%", "", None),
        Check("accuracy, mean of the sites alone, non-private", mean_alone, "%", "", None),
        Check("pooled minus federated", behind, "points", "<= 2", behind <= 2 if full else None),
        Check("federated minus mean of the sites alone", ahead, "points", ">= 20", ahead >= 20 if full else None),
        Check("masked against plain aggregation", lost, "points", "<= 0.2", lost <= 0.2 if full else None),
        Check("time that masking adds to a round", added, "%", "< 3", added < 3 if full else None),
        Check("accuracy, federated, epsilon 8 per record", scores["epsilon 8"], "%", "", None),
        Check("non-private minus epsilon 8", scores["federated"] - scores["epsilon 8"], "points", "reported", None),
    ]
    bench.finish(checks, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
