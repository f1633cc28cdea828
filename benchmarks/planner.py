"""What `privet plan` recommends, against the best of a sweep over 60 settings, on data that the planner never sees.

The studies of `small_consortia.py` that classify, at epsilon 8: 600 generated patients over five sites, unit patient;
MedQuAD cut to 1,000 answers over its nine institutions, unit record, and the same with unit document. (The planner has
no stand-in for named entities.) It gets the counts of units that the sites declare, and nothing else. The sweep draws
60 of the choices that the planner looks at and trains each of them once, on the data itself. Its five best, and what
the planner recommends, are trained with two further seeds: best is who has the highest mean of all three. Choosing
among 60 by the test records favours the sweep.

`--only TEXT` runs one setting. `--keep DIR` keeps each arm's summary there, and a later run takes it from there: all of
it takes two hours on two cores. A quick run plans nothing, and takes a head start alone for the recommendation.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import Bench, Check, kept, start
from small_consortia import Arm, document_of, score
from studies import MEDQUAD, require, write

from privet.client.training.data import load_records
from privet.common.study.study import Study
from privet.simulations.plan.declared import consortium_of, readable
from privet.simulations.plan.search import advise
from privet.simulations.plan.settings import Choice, alone, changed, grid
from privet.simulations.runs.simulate import prepare, run_simulation

EPSILON = 8.0
DATA = ("notes", "medquad", "documents")
DRAWN, FINALISTS, SEEDS = 60, 5, 3
MOST_LOST, MOST_SECONDS = 2.0, 180.0


@dataclass(frozen=True)
class Trained:
    """One choice to train.

    Attributes:
        data: A name of `DATA`.
        name: Of the choice.
        choice: The settings.
        seed: Of everything random.
        largest: Largest count of units that a site declares.
    """

    data: str
    name: str
    choice: Choice
    seed: int
    largest: int


def document_for(data: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return a setting's study as it is, with its simulation table, and write its sites' files."""
    folder.mkdir()
    return document_of(Arm(data, "as it is", EPSILON, seed), folder, quick=False)


def declared_units(document: Mapping[str, Any]) -> list[int] | None:
    """Return the units of each site, in the order of their names; None where the study's file says them."""
    sites = document["simulation"].get("sites")
    if sites is None:
        return None
    study = Study.parse({key: value for key, value in document.items() if key != "simulation"})
    return [
        len(load_records(Path(sites[site]["train"][0]), study, training=False)[0].by_unit()) for site in sorted(sites)
    ]


def train(what: Trained, folder: str, keep: Path | None) -> tuple[Trained, float]:
    """Train one choice, or take its accuracy as it was kept; in percent."""
    place = Path(folder) / f"{what.data}-{what.name}-{what.seed}"
    document = changed(document_for(what.data, what.seed, place), what.choice, what.largest)
    settings = {key: value for key, value in document.items() if key not in ("model", "simulation")}

    def run() -> dict[str, Any]:
        summary: dict[str, Any] = run_simulation(prepare(write(place / "study.toml", document), place / "run"))
        return summary

    return what, score(kept(keep, place.name, settings, run))


def measured(bench: Bench, pool: ProcessPoolExecutor, folder: str, found: Iterable[Trained]) -> dict[Trained, float]:
    """Train several choices, two at a time; return the accuracy of each."""
    scores = {}
    running = [pool.submit(train, each, folder, bench.keep) for each in found]
    for future in as_completed(running):
        what, scores[what] = future.result()
        bench.say(f"{what.data:<10} {what.name:<12} seed {what.seed}  {scores[what]:.1f} %")
    return scores


def compare(bench: Bench, pool: ProcessPoolExecutor, folder: str, data: str) -> tuple[list[Check], dict[str, Any]]:
    """Plan one setting, sweep it, and return the checks and what they came from."""
    document = document_for(data, bench.seed, Path(folder) / f"{data}-plan")
    declared = consortium_of(document, Path(folder), declared_units(document), 2.2)
    values, began = readable(document), time.perf_counter()
    study = Study.parse(values)
    advised = alone(study) if bench.quick else advise(values, declared.consortium, seed=bench.seed).choice
    seconds = time.perf_counter() - began
    choices, largest = list(grid(study)), max(declared.consortium.units)
    order = np.random.default_rng(bench.seed).permutation(len(choices))[: 1 if bench.quick else DRAWN]
    tried = {f"{number}": choices[number] for number in sorted(int(each) for each in order)}
    named = {**tried, "recommended": advised}
    first = measured(
        bench, pool, folder, [Trained(data, name, choice, bench.seed, largest) for name, choice in named.items()]
    )
    once = {what.name: value for what, value in first.items()}
    finalists = sorted(tried, key=lambda name: -once[name])[: 1 if bench.quick else FINALISTS]
    seeds = range(bench.seed + 1, bench.seed + (1 if bench.quick else SEEDS))
    later = measured(
        bench,
        pool,
        folder,
        [Trained(data, name, named[name], seed, largest) for seed in seeds for name in (*finalists, "recommended")],
    )
    scores = {
        name: [once[name], *(value for what, value in later.items() if what.name == name)]
        for name in (*finalists, "recommended")
    }
    means = {name: statistics.mean(values) for name, values in scores.items()}
    best = max(finalists, key=lambda name: means[name])
    lost = means[best] - means["recommended"]
    checks = [
        Check(
            f"planning, {data}", seconds, "s", f"< {MOST_SECONDS:g}",
            None if bench.quick else seconds < MOST_SECONDS,
        ),
        Check(f"accuracy as recommended, {data}", means["recommended"], "%", "", None),
        Check(f"accuracy of the best of {len(tried)}, {data}", means[best], "%", "", None),
        Check(f"median accuracy of {len(tried)}, {data}", statistics.median(once[n] for n in tried), "%", "", None),
        Check(
            f"lost by the recommendation, {data}", lost, "points", f"<= {MOST_LOST:g}",
            None if bench.quick else lost <= MOST_LOST,
        ),
    ]  # fmt: skip
    details = {
        "recommended": {"choice": advised.document(), "scores": scores["recommended"]},
        "best": {"choice": named[best].document(), "scores": scores[best]},
        "swept": {name: {"choice": choice.document(), "score": once[name]} for name, choice in tried.items()},
    }
    return checks, details


def main() -> None:
    """Plan and sweep each setting, and print the checks."""
    bench = start("planner", __doc__, seeds=1)
    if not bench.quick:
        require(MEDQUAD)
    checks: list[Check] = []
    details: dict[str, Any] = {}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for data in [each for each in DATA[: 1 if bench.quick else None] if bench.only in each]:
            found, details[data] = compare(bench, pool, folder, data)
            checks += found
    bench.finish(checks, json.loads(json.dumps(details)))


if __name__ == "__main__":
    main()
