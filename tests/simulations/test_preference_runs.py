"""Preference tuning from files to a tuned model: it learns what is preferred, with and without privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from privet.simulations.runs.simulate import prepare, run_simulation
from tests.simulations.test_simulate import MASKED, SITES, _toml
from tests.support.tiny import pair_rows, private, tiny_document, write_rows

STEP = {"rounds": 3, "local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "sampling_rate": 1.0}
SERVER = {"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "tau": 1e-6, "largest_count": 100}


def summary_of(folder: Path, base: Path, overrides: dict[str, Any], **simulation: Any) -> dict[str, Any]:
    """Simulate a study of pairs over three tiny sites."""
    sites = {}
    for number, name in enumerate(SITES):
        train = write_rows(folder / f"{name}.jsonl", pair_rows(30, seed=number))
        test = write_rows(folder / f"{name}-test.jsonl", pair_rows(12, seed=100 + number))
        sites[name] = {"train": [train.name], "test": [test.name]}
    document = tiny_document(base, {"task.kind": "preference", "training.rounds": 3, **MASKED, **overrides})
    lines: list[str] = []
    _toml({**document, "simulation": {"data": "files", "sites": sites, **simulation}}, "", lines)
    (folder / "study.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run_simulation(prepare(folder / "study.toml", folder / "run"))


def test_training_raises_the_preference_accuracy(llama: Path, tmp_path: Path) -> None:
    found = summary_of(tmp_path, llama, {})
    assert (found["metric"], found["epsilon"]) == ("accuracy", None)
    assert found["accuracy"]["before"] == 0.5
    assert found["accuracy"]["federated"] >= 0.9
    assert found["federated"]["margin"] > 1
    assert found["federated"]["loss"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_so_does_training_with_privacy(llama: Path, tmp_path: Path, mode: str) -> None:
    shared = {"training": STEP, "aggregation": SERVER} if mode == "distributed" else {"training.sampling_rate": 1.0}
    found = summary_of(tmp_path, llama, {"privacy": private(mode=mode, clip_norm=0.5), **shared})
    assert found["accuracy"]["federated"] >= 0.8
    assert 0 < found["epsilon"] <= 8


@pytest.mark.slow
def test_validation_baselines_and_answers_take_pairs(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    found = summary_of(tmp_path, llama, {"data.validation_fraction": 0.2}, answers=2, baselines=["local", "pooled"])
    assert found["accuracy"]["pooled"] >= 0.9
    assert set(found["accuracy"]["local"]) == set(SITES)
    assert "rouge_l" in found["federated"]
