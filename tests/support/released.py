"""A run directory with a random adapter, as training leaves it, without any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.client.site import Resources
from privet.client.training.model import open_host, peft_config_text
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from tests.support.tiny import random_adapter, tiny_study

CPU = Resources(device="cpu", precision="fp32")


def run_of(
    path: Path, base: Path, kind: str, change: Mapping[str, Any] | None = None, seed: int = 0, scale: float = 0.3
) -> tuple[Path, Study]:
    """Write a run directory of a tiny study, and return it with the study. `change` overrides its fields."""
    study = tiny_study(base, **{"task.kind": kind, **(change or {})})
    host = open_host(study, CPU)
    RunDirectory.create(path, study, random_adapter(host.spec, seed, scale), peft_config_text(host, study))
    return path, study
