"""Shared by all benchmarks: arguments, description of the machine, printed checks, and the result document."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Check:
    """One figure and its target. `met` is None if there is no target."""

    name: str
    value: float
    unit: str
    target: str
    met: bool | None


@dataclass
class Bench:
    """One run of a benchmark."""

    name: str
    seed: int
    quick: bool
    as_json: bool
    save: bool
    against: Path | None = None
    seeds: int = 1
    keep: Path | None = None
    only: str = ""
    started: float = field(default_factory=time.perf_counter)

    def say(self, line: str) -> None:
        """Print a line of progress or result, except with --json."""
        if not self.as_json:
            print(line, flush=True)

    def finish(self, checks: list[Check], details: dict[str, Any]) -> None:
        """Print the checks; print or write the result document with --json or --save."""
        document = {
            "name": self.name,
            "quick": self.quick,
            "command": f"python benchmarks/{Path(sys.argv[0]).name}" + (" --quick" if self.quick else ""),
            "commit": commit(),
            "machine": machine(),
            "seed": self.seed,
            "seconds": round(time.perf_counter() - self.started, 1),
            "checks": [asdict(check) for check in checks],
            "details": details,
        }
        if self.quick:
            self.say("quick run: smaller data and fewer steps; do not compare these figures with those of a full run")
        for check in checks:
            verdict = {True: "met", False: "MISSED", None: ""}[check.met]
            self.say(f"{check.name:<58} {check.value:>10.3f} {check.unit:<8} {check.target:<16} {verdict}")
        if self.save:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if self.as_json:
            print(json.dumps(document))


def start(
    name: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    against: str = "",
    seeds: int | None = None,
) -> Bench:
    """Parse the arguments that every benchmark takes; by default those of the command line.

    With `against`, a benchmark also takes the directory of an earlier version, which that text describes. With `seeds`,
    it takes a number of seeds, by default this one, a directory that keeps the results of finished parts, and a text
    that chooses parts by name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="run a smaller benchmark that ends within 50 s on 2 cores")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    if against:
        parser.add_argument("--against", type=Path, metavar="DIR", help=against)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, from --seed on")
        parser.add_argument("--keep", type=Path, metavar="DIR", help="keep finished parts here, and do not repeat them")
        parser.add_argument("--only", default="", metavar="TEXT", help="run the parts whose names contain this")
    given = parser.parse_args(arguments)
    return Bench(
        name, given.seed, given.quick, given.json, given.save, getattr(given, "against", None),
        getattr(given, "seeds", 1), getattr(given, "keep", None), getattr(given, "only", ""),
    )  # fmt: skip


def kept(
    folder: Path | None, name: str, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `run` returns; or, without running it, what a run with the same settings has kept in a folder."""
    file = None if folder is None else folder / f"{name}.json"
    settings = json.loads(json.dumps(settings))
    if file is not None and file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return dict(found["summary"])
    summary = run()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {"commit": commit(), "settings": settings, "summary": summary}
        file.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return summary


def commit() -> str:
    """Return the commit of the working tree, with + if it has uncommitted changes, other than results."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """Return a description of the machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }
