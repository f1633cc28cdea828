"""What sites gain by adapters of their own: MedQuAD at epsilon 8 per record, by site.

Four adapters by site: the shared one, the one that the site trained further on its own records, the best mixture of
both, and the one that the site chose among them by a fifth of its records. All are measured on test records of the
site. Two splits: the nine institutions, and thirty sites whose labels are skewed (Dirichlet, alpha 0.1).

`--only TEXT` runs the parts whose names contain it, such as "institutions" or "seed 0". `--keep DIR` keeps each part's
run there: a later run with the same settings takes what is finished, and goes on with what was interrupted.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from harness import Bench, Check, start
from medquad import PRIVATE, ROUNDS, study
from studies import MEDQUAD, in_one_place, medquad_sites, require, write

from privet.client.training import personal
from privet.simulations.runs.personal import spread
from privet.simulations.runs.simulate import finished, prepare, reopen, run_simulation

SKEWED = {"split": "dirichlet", "sites": 30, "concentration": 0.1, "least_units": 40}
SPLITS = ("institutions", "skewed")
WHICH = ("shared", "trained", "mixed", "chosen")
# Of fewer test records, one is more than five points of accuracy: such a site is not the worst of a split.
LEAST_TESTS = 20
TARGET = 75.0

Part = tuple[str, int]
"""Name of a split, and seed."""


def name_of(part: Part) -> str:
    """Return a part's name, which `--only` looks at."""
    return f"{part[0]}, seed {part[1]}"


def document_of(part: Part, *, quick: bool) -> dict[str, Any]:
    """Return a part's study with its simulation table."""
    split, seed = part
    document = study(seed, 4 if quick else ROUNDS, PRIVATE, "masked")
    if quick:
        document["lora"]["layers"] = 1
        document["data"]["max_length"] = 16
    sites = medquad_sites(quick)
    table: dict[str, Any] = {"data": "files", "baselines": ["personal"], "evaluate_every": ROUNDS}
    table["resources"] = {"threads": 1}
    if split == "institutions":
        table["sites"] = sites
    else:
        table["partition"] = SKEWED | in_one_place(sites) | ({"sites": 4} if quick else {})
    return document | {"simulation": table}


def run(part: Part, folder: str, quick: bool) -> tuple[Part, dict[str, Any]]:
    """Return what the sites of a part gain. A run that is there is taken if it is finished, and otherwise continued."""
    path = Path(folder) / "-".join(str(each) for each in (*part, *(["quick"] if quick else [])))
    file = path.with_suffix(".toml")
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    write(file, document_of(part, quick=quick))
    if path.exists() and before != file.read_text(encoding="utf-8"):
        shutil.rmtree(path)
    simulated = reopen(path) if path.exists() else prepare(file, path)
    with ExitStack() as stack:
        if quick:
            stack.enter_context(patch.object(personal, "RATES", (3e-3,)))
            stack.enter_context(patch.object(personal, "STAGES", 2))
        summary = finished(simulated) or run_simulation(simulated)
    federated = {"federated": summary["federated"]["accuracy"], "epsilon": summary["epsilon"]}
    return part, summary["personal"] | federated


def checks_of(split: str, runs: Sequence[dict[str, Any]], *, full: bool) -> list[Check]:
    """Return the figures of a split, as means over seeds."""

    def mean(which: str, field: str) -> float:
        sites = ({site: values[which] for site, values in tested(each).items()} for each in runs)
        return 100 * statistics.mean(float(spread(values, "accuracy")[field]) for values in sites)

    found = []
    for field, words in (("worst_value", "worst site"), ("mean", "mean of the sites")):
        found += [Check(f"{words}, {which}, {split}", mean(which, field), "%", "", None) for which in WHICH]
    worst, gain = mean("chosen", "worst_value"), mean("chosen", "mean") - mean("shared", "mean")
    lost = max(losses(split, runs))
    met = [worst >= TARGET, gain >= 0, lost <= 1] if full else [None] * 3
    found += [
        Check(f"worst site with its choice, {split}", worst, "%", f">= {TARGET:g}", met[0]),
        Check(f"mean of the sites, chosen less shared, {split}", gain, "points", ">= 0", met[1]),
        Check(f"most that a site lost by its choice, {split}", lost, "points", "<= 1", met[2]),
    ]
    left = sum(values["records"] < LEAST_TESTS for each in runs for values in each["per_site"].values())
    found.append(Check(f"sites left out: under {LEAST_TESTS} tests, {split}", left, "", "", None))
    return found


def tested(found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found at the sites that have enough test records."""
    return {site: values for site, values in found["per_site"].items() if values["records"] >= LEAST_TESTS}


def losses(split: str, runs: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Yield the points by which the better of shared and trained is above what a site chose.

    The nine institutions are the same sites at each seed: theirs are means over seeds, as one test record of the
    smallest is nearly four points. The skewed sites are other ones at each seed.
    """
    every = [(name, site) for each in runs for name, site in tested(each).items()]
    groups = [[site] for _, site in every]
    if split == "institutions":
        groups = [[site for name, site in every if name == own] for own in sorted({name for name, _ in every})]
    for sites in groups:
        shared, trained, chosen = (
            statistics.mean(site[which] for site in sites) for which in ("shared", "trained", "chosen")
        )
        yield 100 * (max(shared, trained) - chosen)


def main() -> None:
    """Run both splits with all seeds, two parts at a time, and print the checks."""
    bench = start("personal", __doc__, seeds=3)
    require(MEDQUAD)
    parts = [(split, bench.seed + number) for number in range(bench.seeds) for split in SPLITS]
    parts = [part for part in parts if bench.only in name_of(part)]
    found = measured(bench, parts)
    checks: list[Check] = []
    details: dict[str, Any] = {}
    for split in SPLITS:
        runs = {name_of(part): found[part] for part in parts if part[0] == split}
        details |= runs
        checks += checks_of(split, list(runs.values()), full=not bench.quick) if runs else []
    bench.finish(checks, details)


def measured(bench: Bench, parts: Sequence[Part]) -> dict[Part, dict[str, Any]]:
    """Run the parts and return what each found."""
    found = {}
    with TemporaryDirectory() as temporary, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        folder = temporary if bench.keep is None else str(bench.keep)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for future in as_completed([pool.submit(run, part, folder, bench.quick) for part in parts]):
            part, gained = future.result()
            found[part] = gained
            worst = ", ".join(f"{which} {100 * gained[which]['worst_value']:.1f} %" for which in ("shared", "chosen"))
            bench.say(f"{name_of(part)}: worst site {worst}; epsilon {gained['epsilon']:.2f}")
    return found


if __name__ == "__main__":
    main()
