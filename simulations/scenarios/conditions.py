"""Apply a scenario to a simulated run: wrap the exchange with the sites, and summarise what happened."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.simulations.data.federation import Plan
from privet.simulations.data.scenario import Faults, Network
from privet.simulations.engines.memory import Fleet
from privet.simulations.scenarios.curious import CuriousExchange, read_index
from privet.simulations.scenarios.faults import FILE, FaultyExchange, World, account, keep_closed, read_exchanges
from privet.simulations.scenarios.malicious import Liar

_VIEW = "view"


def exchange_of(plan: Plan, fleet: Fleet, exchange: Exchange, directory: Path, closed: int) -> Exchange:
    """Return the exchange through which the coordinator reaches the sites under the plan's scenario.

    Args:
        plan: The simulation.
        fleet: The sites.
        exchange: An exchange with the sites in which nothing goes wrong.
        directory: The run directory, where the scenario's events are written.
        closed: Number of rounds that have closed. Events of later rounds are removed, since those rounds run again.
    """
    simulation = plan.simulation
    if simulation.network is not None or simulation.faults is not None:
        keep_closed(directory / FILE, closed)
        world = World(
            plan.study.seed,
            simulation.network or Network(),
            simulation.faults or Faults(),
            fleet.names,
            expected_records(plan.study, fleet),
        )
        exchange = FaultyExchange(exchange, world, directory / FILE)
    # Outermost, so that the coordinator sees only the answers that reach it in time.
    if simulation.curious:
        exchange = CuriousExchange(exchange, fleet.names, directory / _VIEW)
    return exchange


def expected_records(study: Study, fleet: Fleet) -> dict[int, float]:
    """Return the expected number of training records that each site processes in a round, by address."""
    most = study.privacy.max_records_per_unit if study.privacy.unit == "patient" else 1
    found = {}
    for node, worker in fleet.workers.items():
        data, _ = worker.open(study)
        rows = sum(min(len(unit), most) for unit in data.training.units)
        found[node] = study.training.steps * study.training.sampling_rate * rows
    return found


def scenario_document(plan: Plan, fleet: Fleet, directory: Path) -> dict[str, Any]:
    """Return the part of a summary about the scenario: sites, malicious sites, virtual clock, messages seen."""
    sizes = [len(worker.open(plan.study)[0].training.units) for worker in fleet.workers.values()]
    liars = {w.name: w.behaviour.entry.attack for w in fleet.workers.values() if isinstance(w.behaviour, Liar)}
    document: dict[str, Any] = {
        "sites": len(sizes),
        "units_per_site": {"least": min(sizes), "median": statistics.median(sizes), "most": max(sizes)},
        "malicious": liars,
    }
    if plan.simulation.partition is not None:
        document["split"] = plan.simulation.partition.split
    if plan.simulation.network is not None or plan.simulation.faults is not None:
        document["virtual"] = account(read_exchanges(directory / FILE))
    if plan.simulation.curious:
        document["coordinator_saw"] = _seen(read_index(directory / _VIEW))
    return document


def _seen(index: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of messages of each kind that a curious coordinator has kept."""
    found: dict[str, int] = {}
    for kinds in index.values():
        for name, entry in kinds.items():
            found[name] = found.get(name, 0) + entry["messages"]
    return dict(sorted(found.items()))
