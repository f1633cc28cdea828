"""The cost in epsilon of rounding to 14 and 16 bits per site when sites share the noise, against a continuous Gaussian.

Fifty steps in which every unit takes part, delta 1e-5, one drop-out and one corrupt site in ten of each. `privet` adds
noise and then rounds: it pays for the total variation distance of `shared_noise.approximation_error`. `textbook` is the
distributed discrete Gaussian of Kairouz, Liu and Steinke (2021), which rounds and then adds integer noise: its
theorem 1 for the sensitivity of a site's rounded sum (both branches; the second needs rounding to be repeated until
the norm fits), corollary 12 for the divergence. Last, the steps' cost by brute force: the exact probabilities of the
integers' sum, composed by Google's dp-accounting, on the coarsest lattice that is allowed.
"""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from harness import Check, start
from scipy.optimize import brentq
from scipy.stats import norm

from privet.common.privacy.accounting import PrivacyEvent, epsilon
from privet.common.privacy.shared_noise import LEAST_LEVEL_BITS, approximation_error, level_bits
from privet.common.secagg.quantize import lane_bits

STEPS, DELTA = 50, 1e-5
ORDERS = [*np.linspace(1.05, 12, 300), *range(13, 200)]
UNITS = 50  # drawn per site and step, at most


def gaussian(z: float, delta: float) -> float:
    """Return the exact epsilon of the steps with continuous noise (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(STEPS) / z

    def log_excess(eps: float) -> float:
        log_p, log_q = float(norm.logcdf(mu / 2 - eps / mu)), eps + float(norm.logcdf(-mu / 2 - eps / mu))
        return log_p + math.log1p(-math.exp(log_q - log_p)) - math.log(delta)

    return float(brentq(log_excess, 1e-6, 1e4, xtol=1e-12))


def textbook(size: int, helpers: int, z: float, bits: int) -> tuple[float, float]:
    """Return the excess over continuous noise of rounding first, for either branch, both by Rényi divergence."""
    # As fine as `bits` allow for 4 deviations of one site's rotated values and noise.
    scale = 2 ** (bits - 1) / 4 / math.sqrt(1 / size + z * z / helpers)
    deviation = z * scale / math.sqrt(helpers)
    plain = scale + math.sqrt(size)
    # beta = 1/e: rounding is repeated e/(e-1) times on average.
    repeated = math.sqrt(scale**2 + size / 4 + math.sqrt(2) * (scale + math.sqrt(size) / 2))
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, helpers))
    continuous = compute_epsilon(ORDERS, [STEPS * a / (2 * z * z) for a in ORDERS], DELTA)[0]
    found = []
    for moved in (plain, min(plain, repeated)):
        rate = moved**2 / (2 * helpers * deviation**2)
        found.append(compute_epsilon(ORDERS, [STEPS * (a * rate + tau * size) for a in ORDERS], DELTA)[0])
    return 100 * (found[0] / continuous - 1), 100 * (found[1] / continuous - 1)


def privet(size: int, sites: int, helpers: int, z: float, bits: int) -> tuple[float, int, float]:
    """Return the excess of rounding last, k, and the decimal logarithm of what it adds to delta."""
    k = level_bits(lane_bits(bits, sites), sites, helpers, z, UNITS * sites)
    exact = gaussian(z, DELTA)
    added = approximation_error(2.0**k, helpers) + math.log(size * STEPS) + np.logaddexp(0, exact)
    return 100 * (gaussian(z, DELTA - math.exp(added)) / exact - 1), k, float(added / math.log(10))


def brute_force(helpers: int, z: float, rate: float, steps: int) -> tuple[float, float]:
    """Return epsilon by the exact probabilities of the integers, and by privet's accountant."""
    deviation = 2.0**LEAST_LEVEL_BITS
    reach = math.ceil(13 * deviation) + 2
    k = np.arange(-reach, reach + 1)
    centres = np.random.default_rng(helpers).uniform(-0.5, 0.5, helpers)
    there = centres + np.eye(helpers)[0] * math.sqrt(helpers) * deviation / z

    def total(where: Any) -> Any:
        return reduce(np.convolve, [np.diff(norm.cdf((np.append(k, reach + 1) - 0.5 - u) / deviation)) for u in where])

    without, having = total(centres), total(there)
    mixed = (1 - rate) * without + rate * having
    kept = np.minimum(without, mixed) > 1e-30
    masses = [dict(enumerate(np.log(each[kept]).tolist())) for each in (without, mixed)]
    losses = [
        from_two_probability_mass_functions(lower, upper, value_discretization_interval=1e-4).self_compose(steps)
        for lower, upper in (masses, masses[::-1])
    ]
    found = max(float(loss.get_epsilon_for_delta(DELTA)) for loss in losses)
    return found, epsilon([PrivacyEvent(z, rate, steps, "record")], DELTA)


def main() -> None:
    """Print the tables."""
    bench = start("distributed_epsilon", __doc__)
    rows = []
    bench.say(
        "     d    n    m    z   epsilon   14 bits: privet  textbook, repeated   16 bits: privet  textbook, repeated"
    )
    for size, sites, z in itertools.product((40_000, 200_000, 1_000_000), (3, 9, 30, 100), (0.6, 1.0, 2.0)):
        aside = max(1, sites // 10)
        helpers = max(2, sites - 2 * aside)
        row: dict[str, Any] = {"size": size, "sites": sites, "helpers": helpers, "noise_multiplier": z}
        row["epsilon"] = gaussian(z, DELTA)
        for bits in (14, 16):
            excess, k, added = privet(size, sites, helpers, z, bits)
            plain, repeated = textbook(size, helpers, z, bits)
            row[str(bits)] = {
                "excess": excess, "level_bits": k, "log10_delta_added": added,
                "textbook": plain, "textbook_repeated": repeated,
            }  # fmt: skip
        rows.append(row)
        cells = "".join(
            f"{row[b]['excess']:>19.4f} % {row[b]['textbook']:>7.2f} % {row[b]['textbook_repeated']:>7.2f} %"
            for b in ("14", "16")
        )
        bench.say(f"{size:>7} {sites:>4} {helpers:>4} {z:>4} {row['epsilon']:>9.3f}{cells}")
    cases = [(2, 1.0, 0.05, 20), (7, 0.8, 1 / 27, 40), (24, 0.6, 1 / 27, 40)]
    forced = [(*case, *brute_force(*case)) for case in cases]
    for helpers, z, rate, steps, exact, stated in forced:
        bench.say(
            f"m {helpers}, z {z}, rate {rate:.3f}, {steps} steps: {exact:.4f} by brute force, {stated:.4f} stated"
        )
    checks = [
        Check(
            f"largest excess in epsilon at {bits} bits", max(row[bits]["excess"] for row in rows), "%", f"<= {target}",
            max(row[bits]["excess"] for row in rows) <= target,
        )
        for bits, target in (("14", 3), ("16", 0.5))
    ]  # fmt: skip
    checks += [
        Check(f"the same, {what}, {bits} bits", max(row[bits][key] for row in rows), "%", "", None)
        for what, key in (("rounding first", "textbook"), ("rounding first, repeated", "textbook_repeated"))
        for bits in ("14", "16")
    ]
    over = max(exact - stated for *_, exact, stated in forced)
    checks.append(Check("brute force less what is stated", over, "epsilon", "<= 0", over <= 0))
    bench.finish(checks, {"rows": rows, "brute_force": forced})


if __name__ == "__main__":
    main()
