"""The gain from several processes: rounds over the same hundred sites by one process, and by up to four.

MiniLM with LoRA on generated notes, masked, epsilon 8. Each process uses its share of the cores; on a GPU all use the
same one, whose time a single process spends mostly in launching kernels. A round's time is the median of all but the
first, in which processes read their sites' data. Both arms run twice, in turn.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from simulate import alone, study
from studies import write


def timed(asked: dict[str, Any]) -> dict[str, Any]:
    """Run a simulation with some number of workers, and return the seconds of its rounds and of the whole."""
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.runs.simulate import prepare, run_simulation

    with TemporaryDirectory() as folder:
        file = write(Path(folder) / "study.toml", asked["document"])
        summary = run_simulation(prepare(file, Path(folder) / "run"), workers=asked["workers"])
        statements = RunDirectory.open(Path(folder) / "run").load().statements
    return {
        "rounds": [statement["seconds"] for statement in statements],
        "seconds": summary["seconds"],
        "adapter": summary["adapter_digest"],
    }


def main() -> None:
    """Time all numbers of workers, and print the checks."""
    bench: Bench = start("simulate_workers", __doc__)
    sites, patients, rounds = (12, 144, 2) if bench.quick else (100, 1200, 3)
    document = study(bench.seed, sites, patients, rounds, {"local_steps": 4, "sampling_rate": 0.25})
    document["simulation"]["resources"] = {"precision": "auto"}
    counts = (1, min(4, os.cpu_count() or 1))
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(1 if bench.quick else 2):
        for count in counts:
            found[count].append(alone(timed, {"document": document, "workers": count}))
            bench.say(f"{count} processes: rounds of {found[count][-1]['rounds']} s")
    seconds = {count: statistics.median(s for run in runs for s in run["rounds"][1:]) for count, runs in found.items()}
    one, several = (seconds[count] for count in counts)
    checks = [
        Check(f"a round over {sites} sites in one process", one, "s", "", None),
        Check(f"rounds in {counts[1]} processes against one", one / several, "x", "> 1", one > several),
    ]
    bench.finish(checks, {"runs": json.loads(json.dumps(found))})


if __name__ == "__main__":
    main()
