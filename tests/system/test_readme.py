"""The README and the pages under `docs/` say what is true.

Their commands run, their files are valid, their links lead somewhere, their figures are the committed ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from privet.client.formats import FormatSection
from privet.client.site import SiteConfig
from privet.common.retention import RetentionSection
from privet.common.study.reading import validate
from privet.common.study.sections import PurposeSection
from privet.simulations.data.federation import Simulation, check_files, load_plan
from tests.support.forks import Forks
from tests.support.pages import PAGES, ROOT, blocks, commands, inline, links, rows, text_of

README = text_of("README.md")
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "simulations" / "studies" / "demo.toml"


def checks_of(name: str) -> dict[str, dict[str, Any]]:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    assert document["quick"] is False
    return {check["name"]: check for check in document["checks"]}


# What it names


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    code = {page: [*commands(page), *inline(page)] for page in PAGES}
    named = {page: {line.split()[1] for line in lines if line.startswith("make ")} for page, lines in code.items()}
    assert {"demo", "test", "bench", "docs"} <= named["README.md"]
    assert {page: missing for page, found in named.items() if (missing := found - targets)} == {}


def test_its_links_lead_somewhere() -> None:
    assert {page: missing for page in PAGES if (missing := [str(f) for f in links(page) if not f.exists()])} == {}


def test_the_files_that_pages_name_exist() -> None:
    parts = "benchmarks|client|common|deploy|docs|server|simulations|src|tests"
    pattern = re.compile(rf"(?:python )?((?:{parts})/[\w./@-]*)")
    missing = {}
    for page in PAGES:
        if page != "CHANGELOG.md":  # which names files that were
            named = [match[1] for code in inline(page) if (match := pattern.fullmatch(code))]
            missing[page] = [name for name in named if not (ROOT / name).exists()]
    assert {page: names for page, names in missing.items() if names} == {}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 170
    assert len(rows("README.md", "result | value")) <= 10


# Its files


def test_the_readme_s_path_is_run_where_the_tutorial_is() -> None:
    path = [line for line in commands("README.md") if line.startswith("privet ")]
    assert [line.split()[1] for line in path] == ["new", "check", "simulate", "report"]
    assert set(path) <= set(commands("docs/tutorial.md"))


def test_its_files_are_valid() -> None:
    tables = [tomllib.loads(block) for block in blocks("docs/researcher.md", "toml")]
    (simulation,) = [table for table in tables if "sites" in table.get("simulation", {})]
    site, *apart, formats, kept = map(tomllib.loads, blocks("docs/operate-site.md", "toml"))
    assert validate(FormatSection, formats["format"], what="format").labels == {"J": "yes", "N": "no"}
    assert set(validate(Simulation, simulation["simulation"], what="simulation").sites) == {"north"}
    assert validate(SiteConfig, site, what="site").declared_count == 1200
    trainers = [validate(SiteConfig, {**site, **table}, what="site").resources.trainer for table in apart]
    assert trainers == ["process", "slurm"]
    assert validate(SiteConfig, {**site, **kept}, what="site").retention == RetentionSection()
    (purpose,) = (tomllib.loads(block) for block in blocks("docs/privacy-officer.md", "toml"))
    assert validate(PurposeSection, purpose["purpose"], what="purpose").permit is not None


@pytest.mark.parametrize("file", sorted(DEMO.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_that_come_with_it_are_valid_and_their_files_are_there(file: Path) -> None:
    found = load_plan(file)
    if found.simulation.data == "notes" or (ROOT.parent / "shared" / "data").is_dir():
        check_files(found)


def test_the_demo_is_a_valid_study() -> None:
    plan = load_plan(DEMO)
    assert plan.study.privacy.epsilon == 8.0
    assert plan.simulation.baselines == ("local", "pooled")


# Its figures


@pytest.mark.parametrize("page", PAGES)
def test_its_figures_are_the_committed_ones(page: str) -> None:
    text = text_of(page)
    for name in set(re.findall(r"benchmarks/results/([a-z_]+)\.json", text)):
        for check in checks_of(name).values():
            row = re.search(rf"^\| {re.escape(check['name'])} \| ([^|]+) \|", text, re.MULTILINE)
            if row is not None:
                assert float(row.group(1).split()[0]) == pytest.approx(check["value"], abs=0.051), check["name"]


def test_each_row_of_results_is_a_check() -> None:
    linked = re.findall(r"benchmarks/results/([a-z_]+)\.json", text_of("docs/results.md"))
    known = {name for file in linked for name in checks_of(file)}
    named = [row[0] for row in rows("docs/results.md", "check | figure | what was measured")]
    assert len(named) >= 40
    assert [name for name in named if name not in known] == []


def test_results_has_every_target_that_was_missed() -> None:
    table = rows("docs/results.md", "check | figure | target | file")
    stated = {name: (float(figure.split()[0]), target) for name, figure, target, _ in table}
    missed = {
        check["name"]: (round(check["value"], 2), check["target"])
        for file in sorted(RESULTS.glob("*.json"))
        for check in checks_of(file.stem).values()
        if check["met"] is False
    }
    assert stated == missed


def test_each_result_of_the_readme_is_a_committed_one() -> None:
    percent, seconds, times, plain = "{:.1f} %", "{:.1f} s", "{:.2f} x", "{:.2f}"
    full, audit = "accuracy at full size, ", "audit, epsilon 8: epsilon at least"
    found = {
        "Accuracy, four hospitals together": ("demo", "demo accuracy, federated, epsilon 8", percent),
        "Accuracy, mean of the same hospitals": ("demo", "demo accuracy, mean of the sites alone", percent),
        "Accuracy, same data in one place": ("demo", "demo accuracy, all data pooled, epsilon 8", percent),
        "Accuracy, nine institutions": ("utility_full", f"{full}distributed, epsilon 8 per record", percent),
        "Tokens recovered": ("attacks", "tokens read, one site, no protection", percent),
        "Lower bound on epsilon": ("attacks", audit, plain),
        "Time that masking adds": ("medquad", "time that masking adds to a round", percent),
        "Time of a private step": ("train_step_cuda", "DP step / plain step on a GPU, Llama 7B, checkpointed", times),
        "Violations of six invariants": ("faults", "violations of the six invariants", "{:.0f}"),
        "Time to verify a log": ("round_log", "verification, site signatures included", seconds),
    }
    stated = rows("README.md", "result | value")
    assert len(stated) == len(found)
    for (label, value), (start, (file, name, pattern)) in zip(stated, found.items(), strict=True):
        assert label.startswith(start)
        assert f"benchmarks/results/{file}.json" in label
        assert value == pattern.format(checks_of(file)[name]["value"]), label
    # What the labels say besides.
    attacks, without = checks_of("attacks"), checks_of("utility_full")[f"{full}federated, non-private"]["value"]
    protected = ("tokens read, one site, epsilon 8", "tokens read, secure sum of 5 sites")
    assert [attacks[name]["value"] for name in protected] == [0, 0]
    assert f"{without:.1f} % without privacy" in stated[3][0]
    assert f"after {checks_of('faults')['faults injected']['value']:.0f} faults" in stated[8][0]


def test_its_table_of_privacy_is_the_committed_one() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name in ("utility_full", "utility", "distributed"):
        found |= checks_of(name)
    large, unit = "accuracy at full size, ", "epsilon {} per record"
    wanted = {
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
    page = text_of("docs/results.md")
    for start, (without, private) in wanted.items():
        cells = []
        for name in (without, *(private.format(epsilon) for epsilon in (8, 3, 1))):
            check = found.get(name)
            half = check["unit"].partition("+-")[2] if check else ""
            cells.append("" if check is None else f"{check['value']:.1f}" + (f" ±{half}" if half else ""))
        assert re.sub(" +", " ", f"{start} {' | '.join(cells)} |") in page, start


# Its commands


def run(forks: Forks, line: str, directory: Path, extra: tuple[str, ...] = ()) -> str:
    """Run a command of a page, with the interpreter and the `privet` of these tests; return output and progress."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
    program, *arguments = *shlex.split(line), *extra
    if program == "privet":
        done = forks.run(arguments, environment, directory)
    else:
        done = subprocess.run(
            [program, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, line + "\n" + done.stdout + done.stderr
    return done.stdout + done.stderr


def halved(study: Path, text: str) -> None:
    """Write a study of four rounds with two.

    The pages' commands run as they are written, and most of their time goes into training five arms or six. What
    four rounds come to is measured by `benchmarks/demo.py`, and its figures are committed.
    """
    assert len(re.findall("^rounds = 4\\b", text, re.MULTILINE)) == 1
    study.write_text(re.sub("^rounds = 4\\b", "rounds = 2", text, flags=re.MULTILINE), encoding="utf-8")


@pytest.mark.slow
def test_the_researcher_s_path_runs_as_written(tmp_path: Path, forks: Forks) -> None:
    """Run a researcher's and an auditor's commands in order, where `make demo` would have put their results."""
    target = tmp_path / "simulations" / "studies" / "demo.toml"
    target.parent.mkdir(parents=True)
    halved(target, DEMO.read_text(encoding="utf-8"))
    output = {}
    for command in (*commands("docs/researcher.md"), *commands("docs/audit.md")):
        verb = command.split()[1]
        named = ("--out", "runs/demo") if verb == "simulate" and "--resume" not in command else ()
        output[verb] = run(forks, command, tmp_path, named)
    assert {"check", "simulate", "predict", "report", "audit"} <= set(output)
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert accuracy["federated"] - accuracy["local_mean"] >= 0.10
    assert summary["epsilon"] <= 8.0
    assert summary["peak_memory_mb"] < 3000
    assert "cardiology" in output["predict"]
    (program,) = blocks("docs/researcher.md", "python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def is_in(shown: str, output: str) -> bool:
    """Whether a line of a page is in the output, except for numbers, digests and what `…` stands for."""
    parts = [re.escape(pattern_of(part)) for part in shown.split("…")]
    return re.search("^" + ".*".join(parts), pattern_of(output), re.MULTILINE) is not None


def pattern_of(text: str) -> str:
    """Return a text with `#` for each number or digest, and one blank between words."""
    found = re.sub(r"sha256:[0-9a-f]*|\d[\d.,]*(e-\d+)?", "#", text)
    return "\n".join(" ".join(line.split()) for line in found.splitlines())


def in_order(predicted: str) -> str:
    """Return a line of `privet predict` with all labels but the first in the order of the alphabet."""
    first, *others = re.findall(r"[a-z]+ [\d.]+ %", predicted.splitlines()[0])
    return "   ".join([first, *sorted(others)])


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "make_data.py").write_text(blocks("docs/tutorial.md", "python")[0])
    output: dict[str, str] = {}
    for line in commands("docs/tutorial.md"):
        if not line.startswith(("make ", "source ")):
            verb = line.split()[1 if line.startswith("privet") else 0]
            output[verb] = output.get(verb, "") + run(forks, line, tmp_path)
            if verb == "new":
                study = (tmp_path / "study.toml").read_text(encoding="utf-8")
                assert all(block in study for block in blocks("docs/tutorial.md", "toml"))
                halved(tmp_path / "study.toml", study)
    del output["python"]
    printed = blocks("docs/tutorial.md", "text")
    assert len(printed) == len(output)
    assert output["head"] == printed[0]
    for shown, (verb, found) in zip(printed, output.items(), strict=True):
        if verb == "predict":  # which of the two wrong labels comes second is chance
            shown, found = in_order(shown), in_order(found)
        assert [line for line in shown.splitlines() if not is_in(line, found)] == [], verb
    assert load_plan(tmp_path / "study.toml").study.privacy.epsilon == 8.0
    summary = json.loads((tmp_path / "runs" / "triage" / "summary.json").read_text())
    assert summary["accuracy"]["federated"] - summary["accuracy"]["local_mean"] >= 0.20
    assert summary["epsilon"] <= 8.0
    assert output["predict"].startswith("neurology")
    assert "A simulation." in output["privacy"]
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "triage.tar").is_file()
