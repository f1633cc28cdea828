"""Shared noise against own noise: MedQuAD over its nine institutions, per record, at epsilon 8, 3 and 1.

The study is that of `utility.py` (answers cut at 32 tokens, adapters on the upper three layers, 27 rounds of one step,
one pass, ffa with FedAdam), whose results are the figures of own noise: the two modes differ in who adds the noise and
in nothing else. Accuracy is on the tests of all sites, at epsilon 8 the mean of three seeds with its 95 % interval
(Student's t). Non-private training on all data in one place takes the same steps. The overhead of the secure sum is all
that a step takes outside the sites' gradients, nine sites in one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import utility
from arms import details, run_arms, simulation
from harness import RESULTS, ROOT, Bench, Check, start
from medquad import counting_training
from studies import MEDQUAD, in_one_place, medquad_sites, require, write

from privet.common.masking.noise_shares import shared_noise
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.runs.simulate import prepare, run_simulation

METHOD = "ffa"
EPSILONS = (8.0, 3.0, 1.0)
# Points that sharing the noise may cost against pooled training without privacy.
TARGETS = {8.0: 2.0, 3.0: 4.0, 1.0: 8.0}
Arm = tuple[str, float | None, int]
"""Mode, epsilon and seed."""
_STEP: Arm = ("distributed", 8.0, 0)
_FEW = 4  # rounds


def study(arm: Arm, rounds: int) -> dict[str, Any]:
    """Return an arm's study as plain values, without its simulation table."""
    mode, epsilon, seed = arm
    document = utility.study((METHOD, "record", epsilon, seed), rounds)
    if epsilon is not None:
        document["privacy"]["mode"] = mode
    if mode == "pooled":
        document["cohort"], document["secure_aggregation"] = {"min_sites": 1}, {"mode": "plain"}
        document["aggregation"]["largest_count"] = 15_000
    return document


def table(arm: Arm, sites: dict[str, dict[str, list[str]]], **resources: Any) -> dict[str, Any]:
    """Return an arm's simulation table: over the sites, or over all their data in one place."""
    return simulation({"pooled": in_one_place(sites)} if arm[0] == "pooled" else sites, **resources)


def arms(bench: Bench) -> list[Arm]:
    """Return what is run."""
    if bench.quick:
        return [("distributed", 8.0, 0)]
    rest = [(8.0, seed) for seed in utility.SEEDS] + [(epsilon, 0) for epsilon in EPSILONS[1:]]
    return [("pooled", None, 0), *(("distributed", *each) for each in rest)]


def own_noise() -> dict[tuple[str, float | None], list[float]]:
    """Return the accuracies of local mode in the last full run of `utility.py`; nothing if there is none."""
    file = RESULTS / "utility.json"
    if not file.is_file():
        return {}
    runs = json.loads(file.read_text(encoding="utf-8"))["details"]
    names = {epsilon: f"{METHOD}-record-{epsilon}-" for epsilon in EPSILONS}
    return {
        ("local", epsilon): [100 * runs[key]["federated"]["accuracy"] for key in sorted(runs) if key.startswith(name)]
        for epsilon, name in names.items()
    }


def overhead(document: dict[str, Any], folder: str) -> float:
    """Return what a few steps take outside the sites' gradients, in percent of these, with nothing beside them."""
    path = Path(folder) / "overhead"
    with counting_training() as training:
        run_simulation(prepare(write(path.with_suffix(".toml"), document), path))
    rounds = sum(statement["seconds"] for statement in RunDirectory.open(path).load().statements)
    return float(100 * (rounds - sum(training)) / sum(training))


def main() -> None:
    """Run all arms, two at a time, and print the table."""
    bench = start("distributed", __doc__)
    require(MEDQUAD)
    sites, rounds = medquad_sites(bench.quick), _FEW if bench.quick else utility.ROUNDS
    with TemporaryDirectory() as folder:
        results = run_arms(bench, {arm: study(arm, rounds) | table(arm, sites) for arm in arms(bench)}, folder)
        few = study(_STEP, _FEW) | table(_STEP, sites)
        found = checks(results, bench.quick) + cost(overhead(few, folder), len(sites), bench.quick)
    if bench.save and not bench.quick:
        draw(found, ROOT / "docs" / "images" / "distributed.png")
    bench.finish(found, details(results))


def checks(results: dict[Arm, dict[str, Any]], quick: bool) -> list[Check]:
    """Return the accuracies against their targets."""
    found = {} if quick else own_noise()
    for (mode, epsilon, _), summary in sorted(results.items(), key=str):
        found.setdefault((mode, epsilon), []).append(100 * summary["federated"]["accuracy"])
    cells = {key: utility.cell(scores) for key, scores in found.items()}
    rows = [] if quick else [Check("accuracy, pooled, one pass, non-private", cells["pooled", None][0], "%", "", None)]
    for epsilon in EPSILONS:
        for mode in ("distributed", "local"):
            if (mode, epsilon) in cells:
                mean, half = cells[mode, epsilon]
                unit = "%" if half is None else f"% +-{half:.1f}"
                rows.append(Check(f"accuracy, {mode}, epsilon {epsilon:g} per record", mean, unit, "", None))
        if quick:
            continue
        shared, most = cells["distributed", epsilon][0], TARGETS[epsilon]
        behind = cells["pooled", None][0] - shared
        rows.append(Check(f"behind pooled at epsilon {epsilon:g}", behind, "points", f"<= {most:g}", behind <= most))
        if ("local", epsilon) in cells:
            ahead = shared - cells["local", epsilon][0]
            rows.append(Check(f"ahead of local at epsilon {epsilon:g}", ahead, "points", "> 0", ahead > 0))
    return rows


def draw(found: list[Check], path: Path) -> None:
    """Save accuracy by epsilon for both modes, against pooled training without privacy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = {check.name: check.value for check in found}
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    axes.axhline(
        values["accuracy, pooled, one pass, non-private"], color="#777777", linestyle=":", label="pooled, non-private"
    )
    for mode, colour in (("distributed", "#0b6e4f"), ("local", "#c0504d")):
        names = {epsilon: f"accuracy, {mode}, epsilon {epsilon:g} per record" for epsilon in EPSILONS}
        points = [(epsilon, values[name]) for epsilon, name in names.items() if name in values]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=mode)
    axes.set(xscale="log", xlabel="epsilon per record", ylabel="accuracy [%]", title="MedQuAD, nine sites, one pass")
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def cost(overhead: float, sites: int, quick: bool) -> list[Check]:
    """Return what a step takes beside its gradients, and how much noise is in it."""
    noise = shared_noise(Study.parse(study(_STEP, utility.ROUNDS)), sites)
    return [
        Check("overhead of the secure sum", overhead, "%", "< 10", None if quick else overhead < 10),
        Check("noise of a step over the noise accounted", (sites / noise.helpers) ** 0.5, "x", "", None),
        Check("the same with own noise", sites**0.5, "x", "", None),
    ]


if __name__ == "__main__":
    main()
