"""The canary condition of a gate on the demo's study: the arm without privacy fails it, and the private one passes.

One of the four synthetic hospitals plants canaries as its own process does, and tests the candidate with what stands
behind `privet gate test`. The gate asks that canaries show no epsilon above 3.

113 right guesses of 113 are the fewest that show more than 3. The audit guesses a quarter of the canaries on one side,
so fewer than 452 canaries can show no such epsilon; 600 are planted, and a coin decides for each whether it is trained
on.

Two studies are run, each without privacy and at epsilon 8:

* `demo`: `simulations/studies/demo.toml` as it is. In its 16 steps a record is drawn once on average.
* `demo, longer`: the same hospitals, base, task, columns, clipping and aggregation. 120 steps draw a record 30 times on
  average, at five to ten times the learning rates, so that a model learns records by heart. Notes are cut at 16 tokens,
  and the adapter sits on the base's last layer, which makes the run shorter.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import ROOT, Bench, Check, start

from privet.client.release.candidate import Outcome, outcome_of
from privet.client.release.opened import Release
from privet.client.site import Resources
from privet.client.training.canaries import Planting
from privet.client.training.data import Records
from privet.common.canonical import digest
from privet.common.log.agreement import gate_of, run_opened
from privet.common.log.gate import Gate
from privet.common.study.study import Study, load_study
from privet.simulations.attacks.arms import Workshop
from privet.simulations.data.clinical_notes import HOSPITALS, generate_notes
from privet.simulations.sites import load_simulated

CANARIES, EPSILON = 600, 3.0
LONGER: dict[str, dict[str, Any]] = {
    "training": {
        "rounds": 10, "local_steps": 12, "sampling_rate": 0.25, "learning_rate": 2e-2, "head_learning_rate": 0.1,
    },
    "lora": {"layers": 1},
    "data": {"max_length": 16},
}  # fmt: skip
STUDIES: dict[str, dict[str, dict[str, Any]]] = {"demo": {}, "demo, longer": LONGER}


def study(seed: int, changes: dict[str, dict[str, Any]], *, private: bool) -> Study:
    """Return the demo's study with changes and a gate."""
    document = load_study(ROOT / "simulations" / "studies" / "demo.toml").document()
    for table, values in changes.items():
        document[table] = document[table] | values
    if not private:
        document["privacy"] = {"mode": "none"}
    gate = {"signatures": 3, "canaries": CANARIES, "epsilon": EPSILON}
    return Study.parse(document | {"seed": document["seed"] + seed, "gate": gate})


def hospitals(chosen: Study) -> dict[str, Records]:
    """Return the training notes of each hospital, as records of a study."""
    found = {}
    for each in HOSPITALS:
        notes = generate_notes(each, seed=chosen.seed, part="train")
        rows = tuple({"text": note.note, "label": chosen.task.labels.index(note.specialty)} for note in notes)
        found[each.name] = Records(rows, tuple(note.patient for note in notes))
    return found


def tested(folder: Path, chosen: Study, planting: Planting) -> Outcome:
    """Train a study with canaries at one hospital, and return that hospital's test of the candidate."""
    workshop = Workshop(folder, Resources(threads=1))
    sites = hospitals(chosen)
    victim = min(sites)
    # The declared count is public, so it does not depend on the coins.
    declared = {victim: len(sites[victim]) + planting.count // 2}
    sites[victim] = planting.planted(chosen, workshop.host(chosen).tokenizer, sites[victim])
    trail = workshop.run("arm", chosen, sites, declared=declared)
    site = load_simulated(folder / "arm" / "sites" / f"{victim}.toml")
    return outcome_of(Release(folder, chosen, trail.released), site, bytes(32), planting)


def bound(chosen: Study, outcome: Outcome) -> float:
    """Return the lower bound on epsilon that the log computes from what the site would state."""
    terms = gate_of(chosen)
    if terms is None or outcome.canaries is None:
        raise SystemExit("the study has no gate with canaries")
    return Gate(run_opened("demo", chosen, digest(b"adapter"), 1), terms).bound_of(outcome.canaries)


def run_arm(task: tuple[str, bool, int]) -> tuple[str, bool, float, Outcome]:
    """Run one arm, on one thread, and return what its gate computes and what the hospital's test found."""
    name, private, seed = task
    chosen = study(seed, STUDIES[name], private=private)
    with TemporaryDirectory() as folder:
        outcome = tested(Path(folder), chosen, Planting(CANARIES, seed.to_bytes(32, "big")))
    return name, private, bound(chosen, outcome), outcome


def run(bench: Bench) -> None:
    """Run all arms, two at a time, and print the checks."""
    names = list(STUDIES)[: 1 if bench.quick else None]
    tasks = [(name, private, bench.seed) for name in reversed(names) for private in (False, True)]  # longest first
    checks, details = [], {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for name, private, value, outcome in pool.map(run_arm, tasks):
            arm, found = f"{name}, {'epsilon 8' if private else 'no privacy'}", outcome.figures["canary"]
            met = value <= EPSILON if private else value > EPSILON
            target = f"{'<=' if private else '>'} {EPSILON:g}"
            checks.append(Check(f"gate, {arm}: epsilon at least", value, "", target, met))
            details[arm] = {"failed": outcome.failed, **found}
            bench.say(
                f"{arm}: {found['right']} of {found['guesses']} guesses right, fails {outcome.failed or 'nothing'}"
            )
    bench.finish(checks, {"canaries": CANARIES, "arms": details, "changes": STUDIES})


if __name__ == "__main__":
    run(start("gate", __doc__))
