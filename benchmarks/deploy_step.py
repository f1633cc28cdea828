"""A deployed step of a study whose sites share the noise: a coordinator and three hospitals as processes, over TLS.

Each round is one optimizer step of MiniLM's adapter: gradients of a few records at each site, the secure sum with all
its stages, the round log with its witnesses, the ledgers. Three studies run one after the other: with a set-up of
secure aggregation for each step; with one for a block of 64; and with four hospitals of which one may drop out of each
step of such a block, though none does. A step's time runs from opening the round to closing it, without the log's
cosignatures before it. What is beyond gradients is this less the time that the step's slowest site takes for passes and
clipping, as it counts it itself; noise stays in. Bytes are what the sites count on the wire, beside what `privet check`
computes.
"""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import Bench, Check, start
from studies import MINILM, write

from privet.client.site import rounded_count
from privet.simulations.data.clinical_notes import HOSPITALS, Hospital, generate_notes, write_site
from privet.simulations.data.federation import load_plan
from privet.simulations.deploy import Deployment, SitePlan, deployment, free_ports
from privet.simulations.terminal.explain import explain_study

BLOCK = 64


@dataclass(frozen=True)
class Arm:
    """How a study sets up secure aggregation.

    Attributes:
        what: In words.
        block: Rounds with one set-up; None for a set-up in each.
        sites: Number of hospitals.
        dropouts: How many of them may drop out of a step.
    """

    what: str
    block: int | None = BLOCK
    sites: int = 3
    dropouts: int = 0


ARMS = {
    "each": Arm("with a set-up of its own", None),
    "block": Arm("in a block"),
    "dealt": Arm("in a block that tolerates drop-outs, four sites", sites=4, dropouts=1),
}


def study(arm: str, rounds: int) -> dict[str, Any]:
    """Return a study as plain values."""
    chosen, names = ARMS[arm], sorted(hospital.name for hospital in _hospitals(arm))
    return {
        "name": f"steps-{arm}",
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
            "mode": "distributed", "epsilon": 1.0, "delta": 1e-5, "clip_norm": 1.0, "dropouts": chosen.dropouts,
            "dropout_fraction": 0.0,
        },
        "cohort": {"min_sites": 3, **({"sites": names} if chosen.dropouts else {})},
        **({} if chosen.block is None else {"secure_aggregation": {"block": chosen.block}}),
    }  # fmt: skip


def _hospitals(arm: str) -> tuple[Hospital, ...]:
    return HOSPITALS[: ARMS[arm].sites]


def plans(folder: Path, arm: str) -> dict[str, SitePlan]:
    """Write the hospitals' records."""
    found = {}
    for hospital in _hospitals(arm):
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


def counted(port: int) -> dict[str, float]:
    """Return the bytes that a site has sent and received so far, and its seconds of training by phase."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    pattern = r'privet_site_(?:bytes|training_seconds)_total\{(?:direction|phase)="(\w+)"\} (\S+)'
    return {what: float(value) for what, value in re.findall(pattern, text)}


@dataclass(frozen=True)
class Steps:
    """The steps of a study, in their order.

    Attributes:
        seconds: From opening each to closing it.
        gradients: Of these, what the slowest site took for passes and clipping.
    """

    seconds: list[float]
    gradients: list[float]

    @property
    def beyond(self) -> float:
        """Median of the seconds beyond gradients."""
        return statistics.median(each - own for each, own in zip(self.seconds, self.gradients, strict=True))


def steps_of(made: Deployment, path: Path, rounds: int, ports: Mapping[str, int]) -> Steps:
    """Run a study, and return its steps."""
    folder = made.coordinator / "runs" / path.stem / "rounds"
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(_gradients, folder, rounds, ports)
        made.privet("coordinator", "run", path, "-C", made.coordinator, "--gather", 120, "--yes")
        gradients = watching.result()
    statements = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if {statement["type"] for statement in statements} != {"round-close"}:
        raise SystemExit("a step was aborted, so its time is no measurement; run the benchmark again")
    return Steps([statement["seconds"] for statement in statements], gradients)


def _gradients(folder: Path, rounds: int, ports: Mapping[str, int]) -> list[float]:
    """Wait for each round to close, and return the seconds that its slowest site took for passes and clipping."""
    found, before = [], {site: counted(port) for site, port in ports.items()}
    deadline = time.monotonic() + 600
    for closed in range(1, rounds + 1):
        while len(list(folder.glob("*.json"))) < closed:
            if time.monotonic() > deadline:
                raise SystemExit("the study takes too long; run the benchmark on a quiet machine")
            time.sleep(0.02)
        now = {site: counted(port) for site, port in ports.items()}
        found.append(
            max(sum(now[site][what] - before[site][what] for what in ("passes", "clipping")) for site in ports)
        )
        before = now
    return found


def _difference(before: Mapping[str, float], after: Mapping[str, float], rounds: int) -> dict[str, float]:
    """Return by how much counters grew in a round."""
    return {what: (value - before.get(what, 0.0)) / rounds for what, value in after.items()}


def main() -> None:
    """Run the studies and print the checks."""
    bench: Bench = start("deploy_step", __doc__)
    rounds = 3 if bench.quick else 16
    found: dict[str, Steps] = {}
    wire: dict[str, dict[str, float]] = {}
    meaning: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        with TemporaryDirectory() as name:
            folder = Path(name)
            file, sites = write(folder / f"steps-{arm}.toml", study(arm, rounds)), plans(folder, arm)
            meaning[arm] = explain_study(load_plan(file))
            with deployment(folder / "consortium", file, sites, bench.say) as made:
                ports = measured(made, list(sites))
                before = {site: counted(port) for site, port in ports.items()}
                found[arm] = steps_of(made, file, rounds, ports)
                after = {site: counted(port) for site, port in ports.items()}
        more = [_difference(before[site], after[site], rounds) for site in ports]
        wire[arm] = {way: statistics.mean(each[way] for each in more) for way in ("sent", "received")}
    median = {arm: statistics.median(steps.seconds) for arm, steps in found.items()}
    most = {"block": 0.4, "dealt": 0.7}
    checks = []
    for arm in ("block", "dealt", "each"):
        beyond = found[arm].beyond
        met = beyond <= most[arm] if arm in most and not bench.quick else None
        target = f"<= {most[arm]}" if arm in most else ""
        checks += [
            Check(f"a step {ARMS[arm].what}, median", median[arm], "s", "", None),
            Check(f"a step {ARMS[arm].what}, beyond gradients", beyond, "s", target, met),
        ]
    for arm in ARMS:
        up = meaning[arm]["bytes_up_per_round_and_site"]
        down = meaning[arm]["bytes_down_per_round_and_site"]
        moves = wire[arm]
        checks += [
            Check(
                f"{arm}: bytes that a site sends / computed",
                moves["sent"] / up,
                "x",
                "<= 1.1",
                moves["sent"] <= 1.1 * up,
            ),
            Check(
                f"{arm}: bytes that a site receives / computed",
                moves["received"] / down,
                "x",
                "<= 1.1",
                moves["received"] <= 1.1 * down,
            ),
        ]
    bench.finish(
        checks,
        {
            "seconds": {arm: steps.seconds for arm, steps in found.items()},
            "gradients": {arm: steps.gradients for arm, steps in found.items()},
            "wire": wire,
            "computed": {arm: meaning[arm]["bytes_up_per_round_and_site"] for arm in ARMS},
        },
    )


if __name__ == "__main__":
    main()
