"""A simulation that continues from an earlier run's adapter: what it forgets, and what both cost together.

The adapter that it began from and the one that it ends with are measured on the old run's test records and on its own.
The budget is one account of all runs of the chain, by site: a site of the same name is taken for the same people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privet.client.budget.accounts import Cost, Item, Limit, composed_epsilon, paid_rounds
from privet.client.budget.releases import cost_of_round
from privet.client.site import SiteConfig
from privet.common.audit.privacy_statement import rounds_by_site
from privet.common.errors import PrivetError, StateError
from privet.common.files import write_durably
from privet.common.privacy.accounting import plan
from privet.common.progress import Tell, silent
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.data.federation import site_files
from privet.simulations.engines.evaluation import PRIMARY, Evaluator, open_evaluator
from privet.simulations.engines.memory import load_sites

PARENT = "continued.json"
"""In a run directory: the run whose adapter it began from."""
_MOST = 64
_Rounds = Mapping[str, Sequence[Item]]


def keep_parent(directory: Path, run: Path) -> None:
    """Note in a new run directory which run it continues."""
    found = {"run": str(run.resolve()), "adapter": RunDirectory.open(run).load().adapter.digest}
    write_durably(directory / PARENT, (json.dumps(found) + "\n").encode())


def parent_of(path: Path) -> tuple[Path, str] | None:
    """Return the run that a run continues, and the digest of the adapter that it began from; None if it continues none.

    Raises:
        StateError: The note cannot be read.
    """
    try:
        found = json.loads((path / PARENT).read_bytes())
        return Path(found["run"]), str(found["adapter"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path / PARENT} cannot be read ({type(error).__name__})", "restore it from a backup"
        ) from None


def continuation(
    path: Path, study: Study, evaluator: Evaluator, after: Adapter, tell: Tell = silent
) -> dict[str, Any] | None:
    """Return what a run that continues another forgot and learned, and the budget of all; None if it continues none.

    Args:
        path: The run directory.
        study: Its study.
        evaluator: Scores adapters on its test records.
        after: The adapter that it ends with.
        tell: Hears how far it is.

    Returns:
        `run` and `metric`; `tests`, with the metric `before` and `after` on the `old` and the `new` test records;
        `epsilon`, see `budget`; and `missing`, what could not be computed, with the reason.
    """
    parent = parent_of(path)
    if parent is None:
        return None
    run, digest = parent
    metric, missing = PRIMARY[study.task.kind], dict[str, str]()
    tests, cost = dict[str, Any](), None
    tell("evaluating what was forgotten", 0, None)
    try:
        old = RunDirectory.open(run)
        before = old.load().adapter
        if before.digest != digest:
            raise StateError(f"{run} has another adapter than the one that this run began from", "")
        tests["new"] = _measured(evaluator, before, after, metric)
        if old.study.task.labels != study.task.labels:
            raise StateError(f"the study of {run} has other labels", "")
        tests["old"] = _measured(open_evaluator(old.study, site_files(run)), before, after, metric)
    except PrivetError as error:
        missing["tests"] = error.message
    try:
        cost = budget(path)
    except PrivetError as error:
        missing["epsilon"] = error.message
    return {"run": run.name, "metric": metric, "tests": tests, "epsilon": cost, "missing": missing}


def _measured(evaluator: Evaluator, before: Adapter, after: Adapter, metric: str) -> dict[str, float] | None:
    """Return the metric of both adapters over all test records; None where there are none."""
    if not evaluator.records:
        return None
    first, last = (evaluator.metrics(evaluator.tallies(adapter)) for adapter in (before, after))
    return {"records": first["records"], "before": first[metric], "after": last[metric]}


def budget(path: Path) -> dict[str, Any] | None:
    """Return the epsilon of a run and of those that it continues, as one accountant has it.

    Args:
        path: The run directory.

    Returns:
        `unit` and `delta`, those of this run's study; and the largest epsilon of a site in `this` run, in the runs
        `before` it, and `together`. `together` is None where the studies protect different units. None if this run is
        not private.

    Raises:
        StateError: A run of the chain cannot be read. Its cost is not known then.
    """
    chain = [path]
    while (parent := parent_of(chain[-1])) is not None:
        chain.append(parent[0])
        if len(chain) > _MOST:
            raise StateError(f"{path} continues more than {_MOST} runs, or itself", "restore the runs from a backup")
    study = RunDirectory.open(path).study
    mechanism = plan(study)
    if mechanism is None:
        return None
    limit = Limit(study.privacy.unit, mechanism.target, mechanism.delta)
    this, *earlier = map(_items, chain)
    return {
        "unit": limit.unit,
        "delta": limit.delta,
        "this": _largest([this], limit),
        "before": _largest(earlier, limit),
        "together": _largest([this, *earlier], limit),
    }


def _items(path: Path) -> _Rounds:
    """Return what each site of a run paid for, round by round: all rounds that it was asked into."""
    run = RunDirectory.open(path)
    sites: dict[str, SiteConfig] = {site.name: site for site in load_sites(site_files(path))}
    rounds = rounds_by_site(run.load().statements)
    return {
        name: [Item(run.study.digest, _cost(run.study, sites[name], number), False, 1) for number in numbers]
        for name, numbers in rounds.items()
        if name in sites
    }


def _cost(study: Study, site: SiteConfig, number: int) -> Cost | None:
    return cost_of_round(study, site, number=number)


def _largest(runs: Sequence[_Rounds], limit: Limit) -> float | None:
    """Return the largest epsilon of a site over some runs; None where there is no guarantee."""
    names = sorted({name for run in runs for name in run})
    found = [composed_epsilon(paid_rounds(item for run in runs for item in run.get(name, ())), limit) for name in names]
    most = max(found, default=0.0)
    return most if most < float("inf") else None
