"""The demo's study: four synthetic hospitals, MiniLM, epsilon 8; against each site alone and all data pooled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import ROOT, Check, start

from privet.simulations.runs.simulate import prepare, run_simulation
from privet.simulations.terminal.report import save_figure


def main() -> None:
    """Run the demo and print its checks. It is short enough that --quick changes nothing."""
    bench = start("demo", __doc__)
    with TemporaryDirectory() as folder:
        simulated = prepare(ROOT / "simulations" / "studies" / "demo.toml", Path(folder) / "run")
        summary = run_simulation(simulated)
        figure = save_figure(summary, simulated.path)
        if bench.save and figure is not None:
            shutil.copyfile(figure, ROOT / "docs" / "images" / "demo.png")
    scores = {name: 100 * summary["accuracy"][name] for name in ("before", "federated", "local_mean", "pooled")}
    gain = scores["federated"] - scores["local_mean"]
    checks = [
        Check("demo accuracy before training", scores["before"], "%", "", None),
        Check("demo accuracy, mean of the sites alone", scores["local_mean"], "%", "", None),
        Check("demo accuracy, federated, epsilon 8", scores["federated"], "%", "", None),
        Check("demo accuracy, all data pooled, epsilon 8", scores["pooled"], "%", "", None),
        Check("demo: federated minus mean of the sites alone", gain, "points", ">= 10", gain >= 10),
        Check("demo run", summary["seconds"], "s", "<= 120", summary["seconds"] <= 120),
        Check("demo peak memory", summary["peak_memory_mb"] / 1000, "GB", "<= 3", summary["peak_memory_mb"] <= 3000),
    ]
    bench.finish(checks, json.loads(json.dumps(summary)))


if __name__ == "__main__":
    main()
