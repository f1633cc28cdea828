"""Makes `accountants.json`: epsilon of the same histories by independent accountants. A few minutes.

    python -m tests.vectors.privacy.make

* `prv`: `privet.common.privacy.epsilon`, which reports: Opacus's PRV accountant, its upper bound.
* `rdp`: the same module's RDP, Opacus's. `rdp_dp_accounting`: Google's.
* `pld`: Google's dp-accounting, privacy loss distributions rounded up on a mesh of `pld_mesh`: an upper bound.

`beyond` holds histories on which Opacus's PRV accountant as it is (`opacus_prv`) gives too little, a number below 0,
no number (null), or would take more memory than there is ("too large"). All of them release without sampling, so that
the exact epsilon is known.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from privet.common.privacy.accounting import PrivacyEvent, epsilon

FILE = Path(__file__).with_name("accountants.json")
PACKAGES = ("dp-accounting", "numpy", "opacus", "scipy")
RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE

History = list[tuple[float, float, int]]
"""Noise multiplier, sampling rate, steps."""

CASES: list[tuple[str, History, float]] = [
    # One release, with sampling and without.
    ("one step, all units", [(0.5, 1.0, 1)], 1e-5),
    ("one step, all units", [(1.0, 1.0, 1)], 1e-5),
    ("one step, all units", [(2.0, 1.0, 1)], 1e-6),
    ("one step, all units", [(4.0, 1.0, 1)], 1e-5),
    ("one step, all units", [(8.0, 1.0, 1)], 1e-8),
    ("one step", [(0.5, 0.0001, 1)], 1e-5),
    ("one step", [(0.5, 0.1, 1)], 1e-5),
    ("one step", [(1.0, 0.01, 1)], 1e-8),
    ("one step", [(2.0, 0.5, 1)], 1e-5),
    ("one step", [(8.0, 0.1, 1)], 1e-6),
    # Validation sums: every unit in every round.
    ("rounds of all units", [(2.0, 1.0, 3)], 1e-5),
    ("rounds of all units", [(4.0, 1.0, 10)], 1e-6),
    ("rounds of all units", [(8.0, 1.0, 100)], 1e-5),
    ("rounds of all units", [(8.0, 1.0, 1000)], 1e-8),
    # What studies are like.
    ("a study", [(0.6, 0.03125, 192)], 1e-5),
    ("a study", [(1.0, 0.03125, 192)], 1e-5),
    ("a study", [(1.5, 0.03125, 192)], 1e-5),
    ("a study", [(0.8, 0.1, 50)], 1e-5),
    ("a study", [(0.8, 0.01, 1000)], 1e-6),
    ("a study", [(1.0, 0.01, 1000)], 1e-5),
    ("a study", [(1.0, 0.01, 1000)], 1e-8),
    ("a study", [(2.0, 0.1, 1000)], 1e-5),
    ("a study", [(2.0, 0.5, 100)], 1e-6),
    ("a study", [(4.0, 0.5, 1000)], 1e-5),
    ("a study", [(8.0, 0.5, 1000)], 1e-8),
    # Tiny rates.
    ("tiny rate", [(0.5, 0.0001, 1000)], 1e-5),
    ("tiny rate", [(0.5, 0.001, 100)], 1e-8),
    ("tiny rate", [(0.8, 0.001, 1000)], 1e-6),
    ("tiny rate", [(1.0, 0.0001, 10000)], 1e-5),
    ("tiny rate", [(4.0, 0.001, 1000)], 1e-5),
    # Very many steps.
    ("many steps", [(0.5, 0.0001, 100000)], 1e-5),
    ("many steps", [(0.8, 0.001, 100000)], 1e-5),
    ("many steps", [(1.0, 0.0001, 100000)], 1e-6),
    ("many steps", [(1.0, 0.01, 30000)], 1e-5),
    ("many steps", [(2.0, 0.001, 100000)], 1e-8),
    ("many steps", [(2.0, 0.01, 100000)], 1e-5),
    ("many steps", [(4.0, 0.01, 100000)], 1e-6),
    ("many steps", [(8.0, 0.1, 30000)], 1e-5),
    # Several mechanisms: studies that follow each other, training beside validation, a late change of rate.
    ("two studies", [(1.0, 0.03125, 192), (1.5, 0.0625, 96)], 1e-5),
    ("training and validation", [(0.8, 0.01, 500), (8.0, 1.0, 10)], 1e-6),
    ("years", [(0.6, 0.001, 2000), (1.0, 0.01, 1000), (4.0, 0.1, 500), (8.0, 1.0, 20)], 1e-8),
]

TOO_LARGE = "too large"
BEYOND: list[tuple[str, History, float]] = [
    ("float64 is too coarse", [(100.0, 1.0, 10000)], 1e-12),
    ("float64 is too coarse", [(300.0, 1.0, 100000)], 1e-12),
    ("float64 is too coarse", [(40.0, 1.0, 20000)], 1e-12),
    ("the grid overflows", [(0.3, 1.0, 120)], 1e-5),
    ("below zero", [(50.0, 1.0, 1)], 5e-2),
    (TOO_LARGE, [(0.5, 1.0, 100000)], 1e-5),
    (TOO_LARGE, [(1.0, 1.0, 10**9)], 1e-5),
]


def pld_mesh(history: History) -> float:
    """Return a mesh on which rounding up adds little: each step adds some of it."""
    return 1e-4 if sum(steps for _, _, steps in history) <= 1000 else 1e-5


def ours(history: History, delta: float, accountant: Any = "prv") -> float:
    """Return epsilon as privet computes it."""
    return epsilon([PrivacyEvent(z, q, steps, "record") for z, q, steps in history], delta, accountant)


def googles(history: History, delta: float, accountant: Any) -> float:
    """Return epsilon by an accountant of dp-accounting."""
    for z, q, steps in history:
        gaussian = GaussianDpEvent(z)
        accountant.compose(gaussian if q == 1 else PoissonSampledDpEvent(q, gaussian), steps)
    return float(accountant.get_epsilon(delta))


def row(name: str, history: History, delta: float) -> dict[str, Any]:
    """Return one line of the table."""
    mesh = pld_mesh(history)
    return {
        "name": name,
        "history": [list(mechanism) for mechanism in history],
        "delta": delta,
        "prv": ours(history, delta),
        "rdp": ours(history, delta, "rdp"),
        "rdp_dp_accounting": googles(history, delta, RdpAccountant(neighboring_relation=RELATION)),
        "pld": googles(history, delta, PLDAccountant(RELATION, mesh)),
        "pld_mesh": mesh,
    }


def opacus_prv(history: History, delta: float) -> float | None:
    """Return what Opacus's PRV accountant says by itself; None for no number."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    found = float(accountant.get_epsilon(delta=delta))
    return found if math.isfinite(found) else None


def row_beyond(name: str, history: History, delta: float) -> dict[str, Any]:
    """Return one line of what Opacus's PRV accountant cannot do."""
    return {
        "name": name,
        "history": [list(mechanism) for mechanism in history],
        "delta": delta,
        "opacus_prv": TOO_LARGE if name == TOO_LARGE else opacus_prv(history, delta),
        "reported": ours(history, delta),
    }


def main() -> None:
    """Compute the table and write it."""
    logging.disable(logging.WARNING)  # orders that dp-accounting leaves out
    warnings.simplefilter("ignore")
    table = {
        "made_by": "python -m tests.vectors.privacy.make",
        "neighbouring": "add-or-remove-one-unit",
        "versions": {name: version(name) for name in PACKAGES},
        "cases": [row(*case) for case in CASES],
        "beyond": [row_beyond(*case) for case in BEYOND],
    }
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
