"""The cost of differential privacy per training step on a GPU: `train_step.py` with larger models.

MiniLM (batch 32, 128 tokens), which is bound by launching kernels, and randomly initialised Llamas of one and seven
billion parameters in bf16, at 512 tokens: adapters on query and value in one batch, and on all linear layers over a
step of 64 records in eight batches. Activations of the largest are checkpointed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Bench, Check, start
from train_step import LINEAR, MEMORY_TARGET, TARGET, VARIANTS, Case, compare, llama, minilm, study_of

from privet.client.bases.names import locate_base
from privet.client.site import Resources
from privet.client.training.model import _host
from privet.common.errors import StudyError
from privet.common.study.study import Study

BF16 = Resources(device="cuda", precision="bf16")


def measured(bench: Bench, case: Case, variants: tuple[str, ...]) -> tuple[list[Check], dict[str, Any]]:
    """Compare on one case, and let go of the card's memory."""
    result = compare(case, bench.seed, variants)
    bench.say(f"{case.name}: {result}")
    _host.cache_clear()
    torch.cuda.empty_cache()
    ratios, held = result["ratios"], result["device_step_mb"]
    grown = held["private"] / held["plain"]
    checks = [
        Check(
            f"DP step / plain step on a GPU, {case.name}",
            ratios["private"],
            "x",
            "<= 1.06",
            ratios["private"] <= TARGET,
        ),
        Check(f"DP step's memory / plain step's on a GPU, {case.name}", grown, "x", "<= 1.10", grown <= MEMORY_TARGET),
    ]
    if "plain again" in ratios:
        again = ratios["plain again"]
        checks.append(Check(f"plain step / plain step on a GPU, {case.name} (noise)", again, "x", "about 1", None))
    return checks, result


def cases(directory: Path) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Yield what to compare on and the variants, with one model on the disk at a time."""
    encoder = minilm()
    for precision in ("fp32", "bf16") if locatable(encoder) else ():
        yield Case(f"MiniLM {precision}", encoder, Resources(device="cuda", precision=precision), 32, 30), VARIANTS
    study = llama(directory / "1b", 20, 2048, ["q_proj", "v_proj"], 512)
    yield Case("Llama 1B, query and value", study, BF16, 8, 30), VARIANTS
    study = study_of(study.model.base, dict(study.model.sha256), "causal-lm", LINEAR, 512)
    yield Case("Llama 1B, all linear layers", study, BF16, 64, 8, 8), VARIANTS
    shutil.rmtree(directory / "1b")
    study = llama(directory / "7b", 32, 4096, ["q_proj", "v_proj"], 512)
    checkpointed = BF16.model_copy(update={"gradient_checkpointing": True})
    yield Case("Llama 7B, checkpointed", study, checkpointed, 8, 8), VARIANTS[::2]


def locatable(study: Study) -> bool:
    """Return whether the base is on this machine."""
    try:
        locate_base(study.model)
    except StudyError:
        return False
    return True


def run(bench: Bench, directory: Path) -> tuple[list[Check], dict[str, Any]]:
    """Compare on every case."""
    checks: list[Check] = []
    details: dict[str, Any] = {}
    for case, variants in cases(directory):
        found, details[case.name] = measured(bench, case, variants)
        checks += found
    return checks, details


def main() -> None:
    """Run the comparison and print its checks."""
    bench = start("train_step_cuda", __doc__)
    if not torch.cuda.is_available():
        bench.say("skipped: no CUDA device")
        return
    with TemporaryDirectory() as directory:
        bench.finish(*run(bench, Path(directory)))


if __name__ == "__main__":
    main()
