"""What a planner knows of a consortium: counts that sites declare, and the sizes of the base, where it is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.client.bases.names import as_name, locate_base
from privet.common.errors import StudyError
from privet.common.study.sections import ALL_LINEAR
from privet.common.study.study import Study
from privet.simulations.plan.world import Consortium

# Of a base that is not here: a small sentence encoder. Linear layers of a transformer layer, for all-linear.
_WIDTH, _LAYERS, _LINEAR = 384, 6, 6


@dataclass(frozen=True)
class Declared:
    """A consortium, and whether the sizes of its base are known.

    Attributes:
        consortium: The counts and sizes.
        known: Whether the sizes are those of the study's base.
    """

    consortium: Consortium
    known: bool


def readable(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study file's values in which a base that is a directory has pins, as a simulation adds them."""
    model = document.get("model")
    if not isinstance(model, dict) or model.get("sha256") or not str(model.get("base")).startswith((".", "/", "~")):
        return dict(document)
    return {**document, "model": {**model, "sha256": {"config.json": "0" * 64}}}


def consortium_of(document: Mapping[str, Any], root: Path, units: Sequence[int] | None, records: float) -> Declared:
    """Return what a planner may know of a study: no file of records is opened.

    Args:
        document: The study file's values.
        root: Directory of the study file.
        units: Units that each site declares; None: those of the generated notes that the file simulates.
        records: Records of a unit, on the mean, where the unit is a patient.

    Raises:
        StudyError: The study is invalid, not private or no text classifier, or the counts are missing or too few.
    """
    study = Study.parse(readable(document))
    if not study.private:
        raise StudyError(
            'privacy.mode: expected a private study, found "none", for which no noise has to be planned',
            'set privacy.mode = "local" or "distributed", epsilon, delta and clip_norm in the study',
        )
    if study.task.kind != "text-classification":
        raise StudyError(
            f"task.kind: the planner's stand-in classifies texts, found {study.task.kind}",
            "try settings on public data of this kind with `privet sweep SWEEP`",
        )
    found = tuple(units or _simulated(document, study))
    if len(found) < study.cohort.min_sites:
        raise StudyError(
            f"plan: expected the counts of cohort.min_sites = {study.cohort.min_sites} sites or more, found "
            f"{len(found)}",
            "name each site's count, as in `privet plan STUDY --units 120 --units 95 --units 80`",
        )
    width, layers, known = _sizes(document, study, root)
    targets = _LINEAR if ALL_LINEAR in study.lora.targets else len(study.lora.targets)
    modules = min(study.lora.layers or layers, layers) * targets
    each = records if study.privacy.unit == "patient" else 1.0
    return Declared(Consortium(found, each, len(study.task.labels), width, modules, study.lora.rank), known)


def _simulated(document: Mapping[str, Any], study: Study) -> list[int]:
    """Return the units of each site of generated notes, in equal parts; none if the file does not say."""
    simulation = document.get("simulation", {})
    partition = simulation.get("partition") or {}
    patients, sites = partition.get("patients"), partition.get("sites")
    if simulation.get("data") != "notes" or not patients or not sites:
        raise StudyError(
            "plan: expected the number of units that each site declares, found none",
            "name each site's count, as in `privet plan STUDY --units 120 --units 95 --units 80`",
        )
    each = patients // sites if study.privacy.unit == "patient" else round(2.2 * patients / sites)
    return [each] * sites


def _sizes(document: Mapping[str, Any], study: Study, root: Path) -> tuple[int, int, bool]:
    """Return width and number of layers of the base, and whether they are known."""
    bases = document.get("simulation", {}).get("resources", {}).get("bases", {})
    try:
        named = as_name(study.model.base, root)
        mapped = {name: (root / path).resolve() for name, path in bases.items()}
        place = named[1] if named is not None else locate_base(study.model, mapped)
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        return int(config["hidden_size"]), int(config["num_hidden_layers"]), True
    except (StudyError, OSError, ValueError, KeyError, TypeError):
        return _WIDTH, _LAYERS, False
