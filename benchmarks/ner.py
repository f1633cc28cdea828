"""NCBI disease, split over four sites: named entities, entity-level F1 with exact spans.

Without privacy, and at epsilon 8 per sentence: with noise of each site's own, and with noise that the sites share.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import DATA, Check, start
from studies import MINILM, require, write

from privet.simulations.runs.simulate import prepare, run_simulation

NCBI = DATA / "ncbi_disease"
SITES = 4


def split(directory: Path, limit: int | None) -> dict[str, dict[str, list[str]]]:
    """Deal the training sentences to four sites in turn; the test is evaluated as a whole, at the first site."""
    rows = (NCBI / "train.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    table = {}
    for number in range(SITES):
        path = directory / f"train-{number}.jsonl"
        path.write_text("\n".join(rows[number::SITES]) + "\n", encoding="utf-8")
        table[f"site-{number}"] = {"train": [str(path)], "test": [str(NCBI / "test.jsonl")] if number == 0 else []}
    return table


def main() -> None:
    """Run the study with and without privacy and print the checks."""
    bench = start("ner", __doc__)
    require(NCBI)
    rounds = 6 if bench.quick else 96
    results = {}
    with TemporaryDirectory() as name:
        directory = Path(name)
        sites = split(directory, 800 if bench.quick else None)
        for label, privacy in {
            "non-private": {"mode": "none"},
            "epsilon 8": {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
            "epsilon 8, shared noise": {"mode": "distributed", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        }.items():
            document = {
                "name": "ncbi-disease",
                "seed": bench.seed,
                "model": MINILM,
                "task": {"kind": "token-classification", "labels": ["O", "B-Disease", "I-Disease"]},
                "data": {"columns": {"tokens": "tokens", "tags": "tags"}, "max_length": 96},
                "lora": {"rank": 16, "alpha": 32, "targets": ["query", "key", "value", "dense"],
                         "start": "inputs"},
                "training": {
                    "rounds": rounds, "local_steps": 1, "sampling_rate": 1 / 32,
                    "optimizer": "sgd", "learning_rate": 1.0,
                },
                "aggregation": {
                    "method": "ffa", "optimizer": "fedadam", "learning_rate": 5e-3, "head_learning_rate": 1e-2,
                    "tau": 1e-6, "schedule": {"shape": "linear", "floor": 0.1},
                },
                "privacy": privacy,
                "simulation": {"data": "files", "evaluate_every": 24, "test_records": 300, "sites": sites},
            }  # fmt: skip
            simulated = prepare(write(directory / f"{label}.toml", document), directory / label)
            results[label] = run_simulation(
                simulated, lambda report: bench.say(f"{report}") if report.metrics is not None else None
            )
    scores = {label: result["f1"] for label, result in results.items()}
    shared = scores["epsilon 8, shared noise"]["federated"]
    gain = scores["non-private"]["federated"] - scores["non-private"]["before"]
    checks = [
        Check("entity F1 before training", scores["non-private"]["before"], "", "", None),
        Check("entity F1, federated, non-private", scores["non-private"]["federated"], "", "moves", gain > 0.05),
        Check("entity F1, federated, epsilon 8 per sentence", scores["epsilon 8"]["federated"], "", "", None),
        Check("the same with shared noise", shared, "", ">= 0.6", None if bench.quick else shared >= 0.6),
    ]
    bench.finish(checks, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
