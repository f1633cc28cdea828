"""Counts without training: how far noisy histograms of labels and lengths are from the true ones, by epsilon.

MedQuAD over its nine institutions, by kind of question and in tokens of MiniLM, with noise that the sites share. Units
are records, and documents of which up to 4 records count. The error of a histogram is the distance of total variation
between its shares and the true ones, in points: half the sum of the differences of all shares. Each figure is a mean
over `--seeds` draws of the noise.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from harness import Bench, Check, start
from studies import LABELS, MEDQUAD, MINILM, medquad_sites, require

from privet.client.site import Resources
from privet.client.training.counts import Countable, count_sum
from privet.client.training.dp import Clipping
from privet.client.training.loading import load_data
from privet.client.training.meter import Meter
from privet.client.training.model import open_host
from privet.client.training.sums import release_sum, share_sum
from privet.common.audit.counts import counts_document, drift
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.noise import SeededRandomness
from privet.common.privacy.shared_noise import rescale
from privet.common.study.counts import cells_of
from privet.common.study.study import Study
from privet.simulations.sites import SimulatedConfig

EPSILONS = (0.1, 0.3, 1.0, 3.0)
DELTA = 1e-5
UNITS = {"record": "record", "document": "patient"}
"""Units of this benchmark, and the study's word for each."""
BLOCKS = ("label", "length")


def study(unit: str, epsilon: float | None) -> Study:
    """Return a study that counts; None: without noise."""
    privacy: dict[str, Any] = {"mode": "none", "unit": UNITS[unit]}
    if epsilon is not None:
        privacy |= {"mode": "distributed", "epsilon": epsilon, "delta": DELTA}
    return Study.parse(
        {
            "name": "counts",
            "kind": "statistics",
            "model": MINILM,
            "task": {"kind": "text-classification", "labels": list(LABELS)},
            "data": {"columns": {"text": "answer", "label": "question_type"}, "unit": "document"},
            "aggregation": {"largest_count": 5000},
            "privacy": privacy,
        }
    )


def read(unit: str, quick: bool) -> dict[str, Countable]:
    """Return the records of each site as they are counted."""
    asked, found = study(unit, None), {}
    host = open_host(asked, Resources(device="cpu"))
    for site, files in medquad_sites(quick).items():
        config = SimulatedConfig.model_validate({"name": site, "train": files["train"], "reproducible_seed": 0})
        counts = load_data(config, asked, host, b"split", distinct=False).counts
        if counts is not None:
            found[site] = counts
    return found


def counted(asked: Study, sites: dict[str, Countable], seed: int) -> dict[str, Any]:
    """Return the result of one round, without masks, which change nothing in the sum."""
    cells, names = cells_of(asked), sorted(sites)
    total = np.zeros(len(cells.names))
    shares = shared_noise(asked, len(names), head=True) if asked.private else None
    for name in names:
        data, noise = sites[name], SeededRandomness(seed, f"noise {name}")

        def terms(clipping: Clipping, data: Countable = data, name: str = name) -> Any:
            return count_sum(asked, data, SeededRandomness(seed, f"rows {name}"), clipping)

        if shares is None:
            total += release_sum(asked, terms, len(data.units), noise, None, Meter())
        else:
            total += rescale(share_sum(terms, len(data.units), noise, shares, Meter()), shares)
    metrics = dict(zip(cells.names, (total / cells.scale).tolist(), strict=True))
    statement = {"type": "round-close", "cohort": names, "survivors": names, "metrics": metrics}
    return counts_document(asked, [statement])


def error(true: dict[str, Any], result: dict[str, Any], block: str) -> float:
    """Return the distance of a histogram from the true one, 0 to 1; 1 where noise leaves no records at all."""
    return float(next((each["distance"] for each in drift(true, result) if each["block"] == block), 1.0))


def measure(unit: str, bench: Bench) -> tuple[list[Check], dict[str, Any]]:
    """Return the errors of a unit's histograms at each epsilon."""
    sites, checks, details = read(unit, bench.quick), [], {}
    true = counted(study(unit, None), sites, 0)
    for epsilon in EPSILONS:
        results = [counted(study(unit, epsilon), sites, bench.seed + number) for number in range(bench.seeds)]
        labels, lengths = (100 * statistics.mean(error(true, each, block) for each in results) for block in BLOCKS)
        deviation = results[0]["deviation"]
        name = f"epsilon {epsilon:g} per {unit}"
        checks += [
            Check(f"noise on a count, {name}", deviation, "records", "", None),
            Check(f"error of labels, {name}", labels, "points", "", None),
            Check(f"error of lengths, {name}", lengths, "points", "", None),
        ]
        details[f"{epsilon:g}"] = {"deviation": deviation, "labels": labels, "lengths": lengths}
    return checks, {"true": {cell["name"]: cell["value"] for cell in true["cells"]}, "errors": details}


def main() -> None:
    """Count with every unit and epsilon, and print the errors."""
    bench = start("counts", __doc__, seeds=5)
    require(MEDQUAD)
    checks, details = [], {}
    for unit in UNITS:
        found, details[unit] = measure(unit, bench)
        checks += found
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
