"""A deployed step of a study whose sites share the noise: a coordinator and three hospitals as processes, over TLS.

Each round is one optimizer step of MiniLM's adapter: gradients of a few records at each site, the secure sum with all
its stages, the round log with its witnesses, the ledgers. A step's time runs from opening the round to closing it; the
gradients, a fraction of a second here, are not taken off. The whole run by its steps also holds the start of the
command, the gathering of sites and the release. Bytes are what the sites count on the wire, beside what `privet check`
computes for the vectors alone.
"""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import MINILM, write

from privet.client.site import rounded_count
from privet.simulations.data.clinical_notes import HOSPITALS, generate_notes, write_site
from privet.simulations.data.federation import load_plan
from privet.simulations.deploy import Deployment, SitePlan, deployment, free_ports
from privet.simulations.terminal.explain import explain_study


def study(rounds: int) -> dict[str, Any]:
    """Return the study as plain values."""
    return {
        "name": "deployed-steps",
        "seed": 1,
        "model": MINILM,
        "task": {
            "kind": "text-classification",
            "labels": ["cardiology", "neurology", "gastroenterology", "orthopaedics", "respiratory", "dermatology"],
            "pooling": "mean",
        },
        "data": {"columns": {"text": "note", "label": "specialty"}, "unit": "patient", "max_length": 48},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": 0.01, "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {"method": "ffa", "optimizer": "adam", "learning_rate": 3e-3, "largest_count": 1000},
        "privacy": {
            "mode": "distributed", "epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "dropouts": 0,
            "dropout_fraction": 0.0,
        },
        "cohort": {"min_sites": 3},
    }  # fmt: skip


def plans(folder: Path) -> dict[str, SitePlan]:
    """Write three hospitals' records."""
    found = {}
    for hospital in HOSPITALS[:3]:
        records = generate_notes(hospital, seed=1, part="train")
        path = folder / f"{hospital.name}.csv"
        write_site(records, path)
        found[hospital.name] = SitePlan(path, rounded_count(len(records)))
    return found


def measured(made: Deployment, sites: list[str]) -> dict[str, int]:
    """Let each site serve its metrics, and return their ports."""
    ports = dict(zip(sites, free_ports(len(sites)), strict=True))
    for name, port in ports.items():
        made.end(name)
        file = made.site(name)
        file.write_text(file.read_text().replace("[coordinator]\n", f"[coordinator]\nmetrics_port = {port}\n"))
        made.start(name, "site", "serve", file)
    made.connected(len(sites))
    return ports


def moved(port: int) -> dict[str, float]:
    """Return the bytes that a site has sent and received so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {way: float(size) for way, size in re.findall(r'privet_site_bytes_total\{direction="(\w+)"\} (\S+)', text)}


def main() -> None:
    """Run the study and print the checks."""
    bench: Bench = start("deploy_step", __doc__)
    rounds = 3 if bench.quick else 20
    with TemporaryDirectory() as name:
        folder = Path(name)
        file, sites = write(folder / "study.toml", study(rounds)), plans(folder)
        meaning = explain_study(load_plan(file))
        with deployment(folder / "consortium", file, sites, bench.say) as made:
            ports = measured(made, list(sites))
            before = {site: moved(port) for site, port in ports.items()}
            began = time.perf_counter()
            made.privet(
                *("coordinator", "run", file, "--adapter", made.folder / "start", "-C", made.coordinator),
                *("--gather", 120),
            )
            whole = (time.perf_counter() - began) / rounds
            after = {site: moved(port) for site, port in ports.items()}
            found = sorted((made.coordinator / "runs" / "deployed-steps" / "rounds").glob("*.json"))
            statements = [json.loads(path.read_text()) for path in found]
    if [statement["type"] for statement in statements] != ["round-close"] * rounds:
        raise SystemExit("a step was aborted, so its time is no measurement; run the benchmark again")
    steps = [statement["seconds"] for statement in statements]
    wire = {
        way: statistics.mean((after[site][way] - before[site].get(way, 0.0)) / rounds for site in ports)
        for way in ("sent", "received")
    }
    up, down = meaning["bytes_up_per_round_and_site"], meaning["bytes_down_per_round_and_site"]
    step = statistics.median(steps)
    ratios = {"sent": wire["sent"] / up, "received": wire["received"] / down}
    full = not bench.quick
    checks = [
        Check("a deployed step, median", step, "s", "< 3", step < 3 if full else None),
        Check("the whole run by its steps", whole, "s", "", None),
        Check("bytes that a site sends / computed", ratios["sent"], "x", "<= 1.1", ratios["sent"] <= 1.1),
        Check("bytes that a site receives / computed", ratios["received"], "x", "<= 1.1", ratios["received"] <= 1.1),
        Check("sent by a site in a step", wire["sent"] / 1000, "kB", "", None),
        Check("received by a site in a step", wire["received"] / 1000, "kB", "", None),
    ]
    bench.finish(checks, {"steps": steps, "wire": wire, "computed": {"sent": up, "received": down}})


if __name__ == "__main__":
    main()
