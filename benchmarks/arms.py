"""Simulate a study over the institutions of MedQuAD with several settings, several simulations at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from harness import Bench
from studies import write

from privet.simulations.runs.simulate import prepare, run_simulation

Arm = TypeVar("Arm", bound=tuple[Any, ...])
"""The settings that identify an arm."""


def run_arms(bench: Bench, documents: Mapping[Arm, dict[str, Any]], folder: str, workers: int = 2) -> dict[Arm, Any]:
    """Simulate the study of each arm, several at a time, and return the summaries.

    Args:
        bench: Prints a line for each arm.
        documents: By arm: the study as plain values, with its simulation table.
        folder: Directory of the runs.
        workers: Number of processes.
    """
    results: dict[Arm, Any] = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(_run, named(arm), document, folder): arm for arm, document in documents.items()}
        for future in as_completed(running):
            arm, summary = running[future], future.result()
            results[arm] = summary
            bench.say(f"{arm!s:<36} accuracy {summary['federated']['accuracy']:.4f}   {summary['seconds']:.0f} s")
    return results


def _run(name: str, document: dict[str, Any], folder: str) -> dict[str, Any]:
    path = Path(folder) / name
    summary: dict[str, Any] = run_simulation(prepare(write(path.with_suffix(".toml"), document), path))
    return summary


def named(arm: tuple[Any, ...]) -> str:
    """Return the settings of an arm as one name."""
    return "-".join(map(str, arm))


def details(results: Mapping[Arm, Any]) -> dict[str, Any]:
    """Return the summaries as plain JSON values, by name."""
    return {named(arm): json.loads(json.dumps(summary)) for arm, summary in results.items()}


def simulation(sites: Mapping[str, Any], **resources: Any) -> dict[str, Any]:
    """Return a simulation table over files of sites, with a test only after the last round."""
    table = {"data": "files", "evaluate_every": 1000, "sites": dict(sites), "resources": {"threads": 1, **resources}}
    return {"simulation": table}
