"""The README says what is true: its commands run, its files are valid, its figures are the committed ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from privet.client.site import SiteConfig
from privet.common.study.reading import validate
from privet.simulations.data.federation import Simulation, check_files, load_plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "simulations" / "studies" / "demo.toml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Return the README's shell commands, without their comments."""
    lines = [line.split(" # ")[0].strip() for block in blocks("console") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_files_are_valid() -> None:
    simulation, site = (tomllib.loads(block) for block in blocks("toml"))
    assert set(validate(Simulation, simulation["simulation"], what="simulation").sites) == {"north"}
    assert validate(SiteConfig, site, what="site").declared_count == 1200


@pytest.mark.parametrize("file", sorted(DEMO.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_that_come_with_it_are_valid_and_their_files_are_there(file: Path) -> None:
    found = load_plan(file)
    if found.simulation.data == "notes" or (ROOT.parent / "shared" / "data").is_dir():
        check_files(found)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_its_figures_are_the_committed_ones(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"benchmarks/results/([a-z_]+)\.json", text)):
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert document["quick"] is False
        for check in document["checks"]:
            row = re.search(rf"^\| {re.escape(check['name'])} \| ([^|]+) \|", text, re.MULTILINE)
            if row is not None:
                assert float(row.group(1).split()[0]) == pytest.approx(check["value"], abs=0.051), check["name"]


def test_its_table_of_privacy_is_the_committed_one() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name in ("utility_full", "utility", "distributed"):
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert document["quick"] is False
        found |= {check["name"]: check for check in document["checks"]}
    large, unit = "accuracy at full size, ", "epsilon {} per record"
    rows = {
        "| large | pooled | |": (large + "pooled, non-private", ""),
        "| large | in shares | ffa |": ("", f"{large}distributed, {unit}"),
        "| large | of each site | ffa |": (large + "federated, non-private", f"{large}local, {unit}"),
        "| small | pooled | |": ("accuracy, pooled, one pass, non-private", ""),
        "| small | in shares | ffa |": ("", f"accuracy, distributed, {unit}"),
        "| small | of each site | fedsvd, per document |": ("", "accuracy, fedsvd, epsilon {} per document"),
    } | {
        f"| small | of each site | {method} |": (f"accuracy, {method}, non-private", f"accuracy, {method}, {unit}")
        for method in ("ffa", "fedavg", "fedsvd")
    }
    for start, (without, private) in rows.items():
        cells = []
        for name in (without, *(private.format(epsilon) for epsilon in (8, 3, 1))):
            check = found.get(name)
            half = check["unit"].partition("+-")[2] if check else ""
            cells.append("" if check is None else f"{check['value']:.1f}" + (f" ±{half}" if half else ""))
        assert re.sub(" +", " ", f"{start} {' | '.join(cells)} |") in README, start


@pytest.mark.slow
def test_the_researcher_s_path_runs_as_written(tmp_path: Path) -> None:
    """Run the README's commands in order, where `make demo` would have put their results."""
    target = tmp_path / "simulations" / "studies" / "demo.toml"
    target.parent.mkdir(parents=True)
    shutil.copyfile(DEMO, target)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    output = {}
    for command in commands():
        if command.startswith("make"):
            continue
        words = shlex.split(command)
        if words[1] == "simulate" and "--resume" not in words:
            words += ["--out", "runs/demo"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        output[words[1]] = done.stdout
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert accuracy["federated"] - accuracy["local_mean"] >= 0.10
    assert summary["epsilon"] <= 8.0
    assert summary["peak_memory_mb"] < 3000
    assert "cardiology" in output["predict"]
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_demo_is_a_valid_study() -> None:
    plan = load_plan(DEMO)
    assert plan.study.privacy.epsilon == 8.0
    assert plan.simulation.baselines == ("local", "pooled")
