"""What sites gain by adapters of their own: MedQuAD at epsilon 8 per record, shared, personal and mixed, by site.

Two splits: the nine institutions, and thirty sites whose labels are skewed (Dirichlet, alpha 0.1). Each site trains the
federated adapter further on its own records, chooses on a fifth of them, and is measured on test records of its own.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from medquad import PRIVATE, ROUNDS, study
from studies import MEDQUAD, in_one_place, medquad_sites, require, write

from privet.simulations.runs.simulate import prepare, run_simulation

SKEWED = {"split": "dirichlet", "sites": 30, "concentration": 0.1, "least_units": 40}


def simulation(split: str, quick: bool) -> dict[str, Any]:
    """Return the simulation table of a split."""
    sites = medquad_sites(quick)
    table: dict[str, Any] = {"data": "files", "baselines": ["personal"], "evaluate_every": ROUNDS}
    if split == "institutions":
        return table | {"sites": sites}
    every = in_one_place(sites)
    return table | {"partition": SKEWED | every | ({"sites": 4} if quick else {})}


def run(split: str, seed: int, bench: Bench, folder: Path) -> dict[str, Any]:
    """Return what the sites of a split gain, by one seed; from the directory of kept results if it is there."""
    kept = None if bench.keep is None else bench.keep / f"{split}-{seed}.json"
    if kept is not None and kept.is_file():
        return dict(json.loads(kept.read_text()))
    document = study(seed, 4 if bench.quick else ROUNDS, PRIVATE, "masked")
    document["simulation"] = simulation(split, bench.quick)
    path = folder / f"{split}-{seed}"
    summary = run_simulation(prepare(write(path.with_suffix(".toml"), document), path))
    found: dict[str, Any] = summary["personal"] | {
        "federated": summary["federated"]["accuracy"],
        "epsilon": summary["epsilon"],
    }
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def checks_of(split: str, runs: list[dict[str, Any]], full: bool) -> list[Check]:
    """Return the figures of a split, as means over seeds."""

    def mean(which: str, field: str) -> float:
        return 100 * statistics.mean(float(each[which][field]) for each in runs)

    worst, before = mean("chosen", "worst_value"), mean("shared", "worst_value")
    gain = mean("chosen", "mean") - mean("shared", "mean")
    # The better of the two choices that a site has without mixing, less what it took.
    lost = 100 * max(
        max(site["shared"], site["trained"]) - site["chosen"] for each in runs for site in each["per_site"].values()
    )
    return [
        Check(f"worst site, shared adapter, {split}", before, "%", "", None),
        Check(f"worst site, personal adapters, {split}", worst, "%", ">= 75", worst >= 75 if full else None),
        Check(f"mean of the sites, personal less shared, {split}", gain, "points", ">= 0", gain >= 0 if full else None),
        Check(f"most that a site lost by its choice, {split}", lost, "points", "<= 1", lost <= 1 if full else None),
    ]


def main() -> None:
    """Run both splits with all seeds, and print the checks."""
    bench = start("personal", __doc__, seeds=3)
    require(MEDQUAD)
    checks, details = [], {}
    with TemporaryDirectory() as folder:
        for split in ("institutions", "skewed"):
            runs = [run(split, bench.seed + number, bench, Path(folder)) for number in range(bench.seeds)]
            checks += checks_of(split, runs, full=not bench.quick)
            details[split] = runs
            worst = ", ".join(f"{100 * each['chosen']['worst_value']:.1f} %" for each in runs)
            bench.say(f"{split}: {worst} at the worst site")
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
