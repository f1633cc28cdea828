"""The cost of simulation beyond training: 100 and 1000 sites, Flower's Ray engine, and remembered frozen layers.

MiniLM with LoRA on generated notes, secure aggregation, the round log, and DP at epsilon 8, on one thread. Overhead is
what rounds take beyond the sites' training: CPU time in one process, which other work on the machine disturbs little;
wall time beside Ray, whose actors train on both cores at once, so that half of the training is taken off: the most that
they can save. Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import MINILM, write


def study(seed: int, sites: int, patients: int, rounds: int, training: dict[str, Any]) -> dict[str, Any]:
    """Return a study over generated notes, with its scenario, as plain values."""
    return {
        "name": "simulated",
        "seed": seed,
        "model": MINILM,
        "task": {
            "kind": "text-classification",
            "labels": ["cardiology", "neurology", "gastroenterology", "orthopaedics", "respiratory", "dermatology"],
        },
        "data": {"columns": {"text": "note", "label": "specialty"}, "unit": "patient", "max_length": 48},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "layers": 3},
        "training": {"rounds": rounds, "learning_rate": 2e-3, "head_learning_rate": 2e-2, **training},
        "aggregation": {"largest_count": 100},
        "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        "simulation": {
            "data": "notes",
            "evaluate_every": 1000,
            "activations_mb": 0,
            "partition": {"split": "iid", "sites": sites, "patients": patients, "least_units": 1},
            "resources": {"precision": "fp32", "threads": 1},
        },
    }


def prepared(document: dict[str, Any], folder: str) -> tuple[Any, float, float]:
    """Prepare a simulation and its workers; return it with the wall and CPU seconds, imports and noise apart."""
    from privet.common.privacy.accounting import plan
    from privet.simulations.data.federation import load_plan
    from privet.simulations.runs.simulate import prepare

    file = write(Path(folder) / "study.toml", document)
    plan(load_plan(file).study)
    wall, cpu = time.perf_counter(), time.process_time()
    simulated = prepare(file, Path(folder) / "run")
    simulated.fleet()
    return simulated, time.perf_counter() - wall, time.process_time() - cpu


def federate(document: dict[str, Any]) -> dict[str, Any]:
    """Run the rounds of a simulation in memory, and return what they took."""
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.engines.memory import peak_memory_mb
    from privet.simulations.runs.simulate import run_over

    with TemporaryDirectory() as folder:
        simulated, startup, startup_cpu = prepared(document, folder)
        fleet = simulated.fleet()
        for worker in fleet.workers.values():
            worker.open(simulated.plan.study)
        rounds: list[float] = []
        training: list[float] = []

        def closed(statement: Any, adapter: Any) -> None:
            rounds.append(statement["seconds"])
            training.append(fleet.watch.seconds - sum(training))

        cpu = time.process_time()
        state = run_over(RunDirectory.open(simulated.path), fleet.exchange(), closed)
        return {
            "sites": len(fleet.workers),
            "startup_seconds": startup,
            "startup_cpu_seconds": startup_cpu,
            "round_seconds": rounds,
            "training_seconds": training,
            "cpu_seconds": time.process_time() - cpu,
            "training_cpu_seconds": fleet.watch.cpu_seconds,
            "survivors": [len(statement["survivors"]) for statement in state.statements],
            "peak_memory_mb": peak_memory_mb(),
        }


def with_ray(document: dict[str, Any]) -> dict[str, Any]:
    """Run the same rounds through Flower's simulation engine."""
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.engines.ray import run_with_ray

    with TemporaryDirectory() as folder:
        simulated, _, _ = prepared(document, folder)
        started = time.perf_counter()
        run_with_ray(simulated.path, simulated.path / "sites", nodes=len(simulated.sites), timeout=900)
        total = time.perf_counter() - started
        statements = RunDirectory.open(simulated.path).load().statements
        return {"total_seconds": total, "round_seconds": [statement["seconds"] for statement in statements]}


def remembered(document: dict[str, Any]) -> dict[str, Any]:
    """Train the same rounds with frozen layers computed anew and remembered, and return times and differences.

    Of masked updates, `grid` is what one step of one site's rounding makes of the mean.
    """
    import numpy as np

    from privet.common.masking.bounds import bound_of
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.engines.activations import remembering
    from privet.simulations.runs.simulate import run_over

    results: dict[str, Any] = {}
    adapters = []
    for name, megabytes in (("anew", 0), ("cold", 1024), ("warm", 1024)):
        with TemporaryDirectory() as folder:
            simulated, _, _ = prepared(document, folder)
            fleet = simulated.fleet()
            host = simulated.evaluator().host
            with remembering(host, simulated.plan.study, megabytes) as outputs:
                state = run_over(RunDirectory.open(simulated.path), fleet.exchange(), lambda s, a: None)
            results[name] = {"training_cpu_seconds": fleet.watch.cpu_seconds}
            for group in state.statements[-1].get("masking") or ():
                study = simulated.plan.study
                step = study.aggregation.largest_count * bound_of(study, "full") / (2 ** (group["bits"] - 1) - 1)
                declared = [worker.open(study)[0].training.declared for worker in fleet.workers.values()]
                results["grid"] = step / sum(declared)
            if outputs is not None:
                results[name] |= {"hits": outputs.hits, "misses": outputs.misses, "mb": outputs.size / 1e6}
            adapters.append(state.adapter)
    names = adapters[0].spec.names
    anew, cold, warm = (adapter.flatten(names) for adapter in adapters)
    results["difference"] = float(np.abs(cold - anew).max())
    products = [
        np.concatenate([(each.values[b].astype(float) @ each.values[a]).ravel() for a, b in each.spec.pairs()])
        for each in adapters
    ]
    results["difference_of_products"] = float(np.abs(products[1] - products[0]).max())
    results["same_bits_warm"] = bool((cold == warm).all())
    return results


def overhead(result: dict[str, Any], cores: int = 1, training: list[float] | None = None) -> list[float]:
    """Return each round's seconds beyond training."""
    trained = result["training_seconds"] if training is None else training
    return [whole - part / cores for whole, part in zip(result["round_seconds"], trained, strict=True)]


def alone(function: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        result: dict[str, Any] = pool.submit(function, document).result()
        return result


def main() -> None:
    """Run all parts, one after the other, and print the checks."""
    bench: Bench = start("simulate", __doc__)
    full = not bench.quick
    hundred = study(bench.seed, *((100, 1200, 3) if full else (12, 144, 1)), {"local_steps": 4, "sampling_rate": 0.25})
    thousand = study(
        bench.seed, *((1000, 4000, 1) if full else (60, 240, 1)), {"local_steps": 1, "sampling_rate": 0.25}
    )
    small = study(bench.seed, 10, 120, 3, {"local_steps": 1, "sampling_rate": 0.25})
    layers = study(bench.seed, *((6, 90, 3) if full else (3, 45, 1)), {"local_steps": 4, "sampling_rate": 0.5})
    # Rounding updates to the masks' grid, or a change of basis, enlarges what is compared: shown beside, no check.
    plain = {"aggregation": {"method": "ffa", "largest_count": 100}, "secure_aggregation": {"mode": "plain"}}
    details: dict[str, Any] = {}
    details["hundred"] = many = alone(federate, hundred)
    beyond = 100 * (many["cpu_seconds"] / many["training_cpu_seconds"] - 1)
    bench.say(f"{many['sites']} sites: overhead {beyond:.1f} % of {many['training_cpu_seconds']:.0f} s of training")
    details["thousand"] = most = alone(federate, thousand)
    bench.say(f"{most['sites']} sites: start-up {most['startup_seconds']:.1f} s, {most['peak_memory_mb']} MB")
    details["layers"] = frozen = alone(remembered, layers | plain)
    details["layers_masked"] = masked = alone(remembered, layers) if full else frozen
    seconds = {name: frozen[name]["training_cpu_seconds"] for name in ("anew", "cold", "warm")}
    bench.say("training with frozen layers: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    checks = [
        Check(f"overhead beyond training, {many['sites']} sites", beyond, "%", "< 15", beyond < 15 if full else None),
        Check(
            f"memory, {most['sites']} sites",
            most["peak_memory_mb"] / 1000,
            "GB",
            "<= 6",
            most["peak_memory_mb"] <= 6000 if full else None,
        ),
        Check(
            f"start-up after imports, {most['sites']} sites",
            most["startup_seconds"],
            "s",
            "< 5",
            most["startup_seconds"] < 5 if full else None,
        ),
        Check("the same in CPU time", most["startup_cpu_seconds"], "s", "", None),
        Check("training, frozen layers remembered, first time", seconds["anew"] / seconds["cold"], "x", "", None),
        Check("training, frozen layers remembered, again", seconds["anew"] / seconds["warm"], "x", "", None),
        Check("largest difference of the adapter", frozen["difference"], "", "<= 1e-5", frozen["difference"] <= 1e-5),
    ]
    if full:
        checks += [
            Check("the same, masked and refactored", masked["difference"], "", "", None),
            Check("of B·A, masked and refactored", masked["difference_of_products"], "", "", None),
            Check("one step of the masks' grid in the mean", masked["grid"], "", "", None),
        ]
    if full:
        details["memory"] = memory = alone(federate, small)
        details["ray"] = ray = alone(with_ray, small)
        ours = statistics.median(overhead(memory))
        theirs = statistics.median(overhead(ray, 2, memory["training_seconds"]))
        bench.say(f"overhead of a round over {memory['sites']} sites: {ours:.2f} s, through Ray {theirs:.2f} s")
        checks.append(Check("Ray's overhead of a round over ours", theirs / ours, "x", ">= 10", theirs >= 10 * ours))
    bench.finish(checks, json.loads(json.dumps(details)))


if __name__ == "__main__":
    main()
