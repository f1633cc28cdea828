"""The baseline `personal`: each simulated site trains the federated adapter further for itself, as real sites may."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from privet.client.training.loading import load_data
from privet.client.training.personal import Material, Personal, mixed, personal_study, personalise
from privet.client.training.tasks import evaluate
from privet.client.training.train import Draws
from privet.common.errors import DataError
from privet.common.files import write_durably
from privet.common.privacy.noise import SeededRandomness, derive_key
from privet.common.progress import Tell, silent
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.engines.evaluation import PRIMARY, Evaluator
from privet.simulations.engines.memory import load_sites
from privet.simulations.runs.own_records import lower_is_better
from privet.simulations.sites import SimulatedConfig

FOLDER = "personal"


def run_personal(
    folder: Path, study: Study, files: Sequence[Path], evaluator: Evaluator, federated: Adapter, tell: Tell = silent
) -> dict[str, Any]:
    """Return what sites gain by adapters of their own, on their own test records.

    Args:
        folder: The run directory. What a site found is kept in it, for a resumed run.
        study: The study.
        files: The site files.
        evaluator: Scores adapters.
        federated: The adapter that all sites share.
        tell: Hears how far it is.

    Returns:
        Per site its test records and the primary metric of the shared adapter, of the trained one, of the best mixture
        of both and of the one that the site chose; and over the sites with test records: mean, worst site and gap,
        before and after.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    found = {}
    sites = [site for site in load_sites(files) if site.name in evaluator.features]
    for number, site in enumerate(sites, start=1):
        file = folder / FOLDER / f"{site.name}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("shared_digest") != federated.digest:
            said = partial(_told, tell, f"personal adapters, site {number} of {len(sites)}")
            kept = _of_site(study, site, evaluator, federated, said) | {"shared_digest": federated.digest}
            write_durably(file, json.dumps(kept).encode())
        found[site.name] = kept
    metric = PRIMARY[study.task.kind]
    shared, chosen = ({site: each[which] for site, each in found.items()} for which in ("shared", "chosen"))
    return {"metric": metric, "per_site": found, "shared": spread(shared, metric), "chosen": spread(chosen, metric)}


def _told(tell: Tell, where: str, stage: str, done: int = 0, total: int | None = None) -> None:
    tell(f"{where}: {stage}", done, total)


def _of_site(study: Study, site: SimulatedConfig, evaluator: Evaluator, shared: Adapter, tell: Tell) -> dict[str, Any]:
    host, seed = evaluator.host, site.reproducible_seed
    with host.lock:
        try:
            tell("reading the records", 0, None)
            key = derive_key(seed, "personal-split", site.name)
            data = load_data(site, personal_study(study), host, key, distinct=False)
            draws = Draws(*(SeededRandomness(seed, site.name, f"personal-{name}") for name in ("sampling", "noise")))
            material = Material(data.training, data.validation, data.validation_units)
            most = site.resources.physical_batch
            made = personalise(host, study, shared, material, draws, most, tell)
        except DataError:  # too few units: the site keeps the shared adapter
            made = None
        tell("testing the adapters", 0, None)
        return _measured(study, site.name, evaluator, shared, made)


def _measured(study: Study, site: str, evaluator: Evaluator, shared: Adapter, made: Personal | None) -> dict[str, Any]:
    """Return the primary metric of each adapter on a site's test records."""
    metric = PRIMARY[study.task.kind]

    def measured(adapter: Adapter) -> dict[str, float]:
        evaluator.host.mount(adapter)
        return evaluate(evaluator.host, study, evaluator.features[site]).metrics(study.task.labels)

    before = measured(shared)
    after = before if made is None or made.chosen.share == 0 else measured(made.adapter)
    trained = before if made is None else measured(made.trained_adapter)
    mixture = before if made is None else measured(mixed(shared, made.trained_adapter, made.mixture.share))
    return {
        "records": before["records"],
        "shared": before[metric],
        "trained": trained[metric],
        "mixed": mixture[metric],
        "chosen": after[metric],
        "share": 0.0 if made is None else made.chosen.share,
    }


def spread(values: Mapping[str, float], metric: str) -> dict[str, Any]:
    """Return mean, worst site and gap between best and worst, of a metric by site; of no site, nothing."""
    if not values:
        return {}
    ordered = sorted(values, key=lambda site: values[site], reverse=lower_is_better(metric))
    worst, best = ordered[0], ordered[-1]
    return {
        "mean": sum(values.values()) / len(values),
        "worst": worst,
        "worst_value": values[worst],
        "gap": abs(values[best] - values[worst]),
    }
