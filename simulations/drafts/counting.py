"""A study that trains nothing, for the sites and the data of one that trains: it counts, or it measures an adapter."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from privet.common.errors import StudyError
from privet.common.study.reading import read_toml
from privet.common.study.study import Study
from privet.simulations.drafts.draft import Draft

Kind = Literal["statistics", "evaluate"]
EPSILON: Mapping[Kind, float] = {"statistics": 0.5, "evaluate": 1.0}
"""What is proposed: of a budget for years, such a study should take little."""

_ENDINGS: Mapping[Kind, str] = {"statistics": "counts", "evaluate": "measured"}
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# What stays of each table. All else is about training.
_KEPT: Mapping[str, Collection[str] | None] = {
    "seed": None,
    "model": None,
    "task": None,
    "data": ("columns", "unit", "max_length", "unicode"),
    "aggregation": ("largest_count",),
    "cohort": None,
    "privacy": ("mode", "unit", "delta", "max_records_per_unit", "dropouts", "dropout_fraction"),
    "secure_aggregation": ("mode", "corrupt", "corrupt_fraction", "dropout_fraction", "security", "suite"),
    "simulation": ("data", "patients", "sites", "partition", "test_fraction", "patient_ids", "resources"),
}


def draft_counting(
    source: Path, kind: Kind, *, name: str | None, epsilon: float | None, adapter: str | None, files: str | None
) -> Draft:
    """Return a study that counts or measures, made from one that trains.

    Args:
        source: The study file of the one that trains.
        kind: What the new study does.
        name: Its name. Without it: that of the other with an ending.
        epsilon: Of the new study. Without it: `EPSILON`.
        adapter: For evaluate: the digest of an adapter, or `base`.
        files: For evaluate: which of a site's files are measured on.

    Raises:
        StudyError: The file is no study that trains, or the new one would not be valid.
    """
    document = read_toml(source, what="study")
    study = Study.parse({key: value for key, value in document.items() if key != "simulation"})
    if study.counts:
        raise StudyError(
            f"{source}: expected a study that trains, found one of kind {study.kind}",
            f"name the study that trains: `privet new --from STUDY --kind {kind}`",
        )
    made: dict[str, Any] = {"name": name or f"{study.name[:54]}-{_ENDINGS[kind]}", "kind": kind}
    made |= {table: _part(document[table], kept) for table, kept in _KEPT.items() if table in document}
    if kind == "evaluate":
        made["lora"] = {key: value for key, value in document.get("lora", {}).items() if key != "site_ranks"}
        made["evaluation"] = {"adapter": _adapter(study, adapter), **({} if files is None else {"files": files})}
    else:
        longest = study.data.max_length
        made["statistics"] = {"lengths": [*(end for end in _LENGTHS if end < 2 * longest)]}
    if study.private:
        made["privacy"]["epsilon"] = EPSILON[kind] if epsilon is None else epsilon
    Study.parse({key: value for key, value in made.items() if key != "simulation"})
    order = (*Study.model_fields, "simulation")
    return Draft({key: made[key] for key in order if key in made})


def _part(table: Any, kept: Collection[str] | None) -> Any:
    if kept is None or not isinstance(table, Mapping):
        return copy.deepcopy(table)
    return {key: copy.deepcopy(value) for key, value in table.items() if key in kept}


def _adapter(study: Study, adapter: str | None) -> str:
    if adapter is not None:
        return adapter
    base = ", or `--adapter base` for the base alone" if study.task.generates else ""
    raise StudyError(
        "--adapter: expected the digest of the adapter to measure, found none",
        f"copy it from `privet registry list`: `privet new --from STUDY --kind evaluate --adapter sha256:...`{base}",
    )
