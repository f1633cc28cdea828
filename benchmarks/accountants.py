"""Epsilon of the same histories by independent accountants, computed anew and held against the committed table.

    python benchmarks/accountants.py [--quick] [--json] [--save]

The table is `tests/vectors/privacy/accountants.json`; `--save` without `--quick` also writes it. Its columns:

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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from harness import ROOT, Bench, Check, start
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from privet.common.privacy.accounting import PrivacyEvent, epsilon

FILE = ROOT / "tests" / "vectors" / "privacy" / "accountants.json"
COLUMNS = ("prv", "rdp", "rdp_dp_accounting", "pld")
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


def of_all_units(line: Mapping[str, Any]) -> bool:
    """Whether a line releases without sampling."""
    return all(q == 1 for _, q, _ in line["history"])


def of_one_step(line: Mapping[str, Any]) -> bool:
    """Whether a line releases once."""
    return bool(sum(steps for _, _, steps in line["history"]) == 1)


def log_excess(log_p: float, eps: float, log_q: float) -> float:
    """Return log(p - exp(eps) q), for p and q too small to be written down."""
    ratio = eps + log_q - log_p
    return log_p + math.log1p(-math.exp(ratio)) if ratio < 0 else -math.inf


def gaussian_log_delta(mu: float, eps: float) -> float:
    """Return log delta of the Gaussian mechanism of sensitivity mu and deviation 1 (Balle and Wang 2018, theorem 8)."""
    return log_excess(float(norm.logcdf(mu / 2 - eps / mu)), eps, float(norm.logcdf(-mu / 2 - eps / mu)))


def sampled_log_delta(z: float, q: float, eps: float) -> float:
    """Return log delta of one Poisson-subsampled Gaussian release: the larger for adding and for removing a unit.

    With N the standard normal over z, the outputs are N and (1 - q) N + q (N + 1), whose likelihood ratio grows
    with the output; so the worst set is a half-line from where the ratio is exp(eps).
    """

    def crossing(ratio: float) -> float:
        return z * z * math.log((ratio - (1 - q)) / q) + 0.5

    def mixed(log_n: float, log_shifted: float) -> float:
        return float(np.logaddexp(math.log1p(-q) + log_n, math.log(q) + log_shifted))

    above = crossing(math.exp(eps))
    without = float(norm.logsf(above / z))
    found = [log_excess(mixed(without, float(norm.logsf((above - 1) / z))), eps, without)]
    if math.exp(-eps) > 1 - q:
        below = crossing(math.exp(-eps))
        without = float(norm.logcdf(below / z))
        found.append(log_excess(without, eps, mixed(without, float(norm.logcdf((below - 1) / z)))))
    return max(found)


def solved(log_delta: Any, delta: float) -> float:
    """Return the smallest epsilon, at least 0, at which `log_delta(epsilon)` is at most log(delta)."""
    if log_delta(0.0) <= math.log(delta):
        return 0.0
    high = 1.0
    while log_delta(high) > math.log(delta):
        high *= 2
    return float(brentq(lambda eps: max(log_delta(eps), -1e6) - math.log(delta), 0.0, high, xtol=1e-9))


def exact(line: Mapping[str, Any]) -> float:
    """Return the true epsilon of a line that releases all units, or once."""
    if of_all_units(line):
        mu = math.sqrt(sum(steps / z**2 for z, _, steps in line["history"]))
        return solved(lambda eps: gaussian_log_delta(mu, eps), line["delta"])
    z, q, _ = line["history"][0]
    return solved(lambda eps: sampled_log_delta(z, q, eps), line["delta"])


def tolerance(table: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far a figure may be from the table's, relatively and absolutely: little with the same packages."""
    same = {name: version(name) for name in PACKAGES} == table["versions"]
    return (1e-6, 1e-6) if same else (1e-3, 2e-3)


def apart(found: float | str | None, committed: float | str | None, tolerances: tuple[float, float]) -> float:
    """Return the distance of two figures in tolerances: above 1, they differ. What is no number has to be the same."""
    if isinstance(found, float) and isinstance(committed, float):
        return abs(found - committed) / max(tolerances[0] * abs(committed), tolerances[1])
    return 0.0 if found == committed else math.inf


def compute(bench: Bench) -> dict[str, Any]:
    """Compute the table; of a quick run, without what takes long."""
    long = {"many steps", "years", "the grid overflows"} if bench.quick else set()
    rows, beyond = [], []
    for case in CASES:
        if case[0] not in long:
            rows.append(row(*case))
            bench.say(f"{case[0]:<24} " + "  ".join(f"{name} {rows[-1][name]:.6f}" for name in COLUMNS))
    for case in BEYOND:
        if case[0] not in long:
            beyond.append(row_beyond(*case))
            bench.say(f"{case[0]:<24} reported {beyond[-1]['reported']:.6f}, by PRV alone {beyond[-1]['opacus_prv']}")
    return {
        "made_by": "python benchmarks/accountants.py --save",
        "neighbouring": "add-or-remove-one-unit",
        "versions": {name: version(name) for name in PACKAGES},
        "cases": rows,
        "beyond": beyond,
    }


def checks_of(found: Mapping[str, Any], committed: Mapping[str, Any]) -> list[Check]:
    """Hold a table against the committed one, and what privet reports against the truth."""

    def lines(name: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        known = {json.dumps([line["history"], line["delta"]]): line for line in committed[name]}
        return [(line, known[json.dumps([line["history"], line["delta"]])]) for line in found[name]]

    def most(name: str, columns: Sequence[str], tolerances: tuple[float, float]) -> float:
        return max(apart(line[key], old[key], tolerances) for line, old in lines(name) for key in columns)

    near = tolerance(committed)
    known = [(exact(line), line["prv"]) for line in found["cases"] if of_all_units(line) or of_one_step(line)]
    known += [(exact(line), line["reported"]) for line in found["beyond"]]
    short = max(truth - stated for truth, stated in known)
    figures = [
        *((f"{name} against the table", most("cases", [name], near)) for name in COLUMNS),
        ("what is reported beyond PRV against the table", most("beyond", ["reported"], near)),
        # Where PRV fails, what it says is rounding errors, and those are the processor's.
        ("PRV alone against the table", most("beyond", ["opacus_prv"], (0.0, 0.05))),
    ]
    checks = [Check(name, value, "tol.", "<= 1", value <= 1) for name, value in figures]
    above = max(line["pld"] - line["prv"] for line in found["cases"])
    checks.append(Check("what is reported lies below PLD by", above, "epsilon", "<= 0", above <= 0))
    checks.append(Check("what is reported lies below the exact epsilon by", short, "epsilon", "<= 0", short <= 0))
    return checks


def main() -> None:
    """Compute the table, and print how far it is from the committed one."""
    bench = start("accountants", __doc__)
    logging.disable(logging.WARNING)  # orders that dp-accounting leaves out
    warnings.simplefilter("ignore")
    table = compute(bench)
    checks = checks_of(table, json.loads(FILE.read_text(encoding="utf-8")))
    if bench.save and not bench.quick:
        FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    bench.finish(checks, {"rows": len(table["cases"]), "beyond": len(table["beyond"]), "versions": table["versions"]})


if __name__ == "__main__":
    main()
