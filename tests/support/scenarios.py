"""Small scenarios for tests: a pool of tiny records, dealt out to a few sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.simulations.runs.toml import to_toml
from tests.support.tiny import class_rows, tiny_document, write_rows

MEASURED = ("seconds", "training_seconds", "peak_memory_mb")
"""The measured fields of a summary. All others follow from the study file."""
MASKED = {"secure_aggregation.mode": "masked", "cohort.min_sites": 3}


def scenario_file(
    folder: Path,
    base: Path,
    simulation: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    partition: Mapping[str, Any] | None = None,
) -> Path:
    """Write a study over a pool of 90 training and 30 test records, five sites and masked unless overridden."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", class_rows(90, seed=1))
    write_rows(folder / "test.jsonl", class_rows(30, seed=2))
    section = {"split": "iid", "sites": 5, "train": ["train.jsonl"], "test": ["test.jsonl"], **(partition or {})}
    document = tiny_document(base, {**MASKED, **(overrides or {})})
    document["simulation"] = {
        "data": "files",
        "partition": section,
        "resources": {"device": "cpu", "precision": "fp32", "threads": 1},
        **(simulation or {}),
    }
    path = folder / "study.toml"
    path.write_text(to_toml(document), encoding="utf-8")
    return path
