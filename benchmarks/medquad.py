"""MedQuAD over its nine institutions: MiniLM with LoRA, federated against pooled and against each site alone.

One optimizer step per round: each site sends the gradient sum of its Poisson sample, the server steps with
FedAdam. Sites this different drift apart when they train alone for longer; one step at a time, federated
training takes the steps that pooled training takes. The same study at epsilon 8 per record, with noise added
at each site, shows what local differential privacy costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, medquad_sites, require, write

from privet.simulations.simulate import RoundReport, prepare, run_simulation

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
ROUNDS = 54
SAMPLING_RATE = 1 / 27


def study(seed: int, rounds: int, privacy: dict[str, Any]) -> dict[str, Any]:
    """Return the study as plain values, without its simulation table."""
    return {
        "name": "medquad",
        "seed": seed,
        "model": MINILM,
        "task": {"kind": "text-classification", "labels": list(LABELS), "pooling": "mean"},
        "data": {"columns": {"text": "answer", "label": "question_type"}, "max_length": 64},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": SAMPLING_RATE,
            "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": "ffa", "optimizer": "fedadam", "learning_rate": 3e-3, "head_learning_rate": 3e-2, "tau": 1e-6,
            "schedule": {"shape": "linear", "floor": 0.1},
        },
        "privacy": privacy,
        "secure_aggregation": {"mode": "plain"},
    }  # fmt: skip


def run(bench: Bench, directory: Path, name: str, document: dict[str, Any], baselines: list[str]) -> dict[str, Any]:
    """Run one study and return its summary."""
    sites = medquad_sites()
    if bench.quick:
        sites = {site: sites[site] for site in ("cdc", "nhlbi", "seniorhealth")}
    simulation = {"data": "files", "baselines": baselines, "evaluate_every": 9, "test_records": 100, "sites": sites}
    simulated = prepare(write(directory / f"{name}.toml", {**document, "simulation": simulation}), directory / name)

    def watch(report: RoundReport) -> None:
        if report.metrics is not None:
            epsilon = "" if report.epsilon is None else f"   epsilon {report.epsilon:.2f}"
            bench.say(f"{name}: round {report.round}   accuracy {report.metrics['accuracy']:.3f}{epsilon}")

    return run_simulation(simulated, watch)


def main() -> None:
    """Run the studies and print the checks."""
    bench = start("medquad", __doc__)
    require(MEDQUAD)
    rounds = 4 if bench.quick else ROUNDS
    with TemporaryDirectory() as name:
        directory = Path(name)
        open_study = study(bench.seed, rounds, {"mode": "none"})
        plain = run(bench, directory, "non-private", open_study, ["local", "pooled"])
        private = run(bench, directory, "epsilon-8", study(bench.seed, rounds, PRIVATE), [])
    scores = {key: 100 * plain["accuracy"][key] for key in ("federated", "pooled", "local_mean", "before")}
    behind, ahead = scores["pooled"] - scores["federated"], scores["federated"] - scores["local_mean"]
    at_8 = 100 * private["accuracy"]["federated"]
    full = not bench.quick
    checks = [
        Check("accuracy, federated, non-private", scores["federated"], "%", "", None),
        Check("accuracy, pooled, non-private", scores["pooled"], "%", "", None),
        Check("accuracy, mean of the sites alone, non-private", scores["local_mean"], "%", "", None),
        Check("pooled minus federated", behind, "points", "<= 2", behind <= 2 if full else None),
        Check("federated minus mean of the sites alone", ahead, "points", ">= 20", ahead >= 20 if full else None),
        Check("accuracy, federated, epsilon 8 per record", at_8, "%", "", None),
        Check("non-private minus epsilon 8", scores["federated"] - at_8, "points", "reported", None),
    ]
    bench.finish(checks, json.loads(json.dumps({"non-private": plain, "epsilon-8": private})))


if __name__ == "__main__":
    main()
