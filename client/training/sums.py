"""One sum over all units of a site, with noise: a head start's, or the counts of a study that trains nothing.

A unit's term is a function of that unit alone. It is scaled to an L2 norm of at most C, cut to integers on the noise
lattice and added exactly, so adding or removing the unit moves the sum by exactly its term. One release with noise
N(0, z²C²) is therefore the Gaussian mechanism of noise multiplier z, without sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privet.client.training.dp import Clipping
from privet.client.training.meter import Meter
from privet.client.training.train import MOST, MOST_SHARED, check_room
from privet.common.masking.bounds import largest_term
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.privacy.noise import LATTICE, Randomness, lattice_release, lattice_unit
from privet.common.privacy.shared_noise import Integers, SharedNoise, contribute
from privet.common.study.study import Study

Summing = Callable[[Clipping], Integers]
"""Returns the sum of all units' terms, each of at most a norm, in multiples of a lattice: int64 [k]."""


def release_sum(
    study: Study, terms: Summing, units: int, noise: Randomness, mechanism: PrivacyEvent | None, meter: Meter
) -> NDArray[np.float64]:
    """Return a site's sum with noise of its own, float64 [k].

    Args:
        study: What was agreed.
        terms: Adds up the units' terms.
        units: Number of units of the site.
        noise: A stream that nothing else uses.
        mechanism: Noise multiplier of the release; None releases the sum as it is.
        meter: Counts the time that the noise takes.

    Raises:
        StateError: The noise is so small that sums could exceed 64 bits.
    """
    norm = largest_term(study)
    lattice = LATTICE if mechanism is None else lattice_unit(mechanism.noise_multiplier * norm)
    clipping = Clipping(norm, lattice)
    check_room(clipping, units, 1.0, MOST)
    points = terms(clipping)
    with meter.phase("noise"):
        if mechanism is None:
            return points.astype(np.float64) * lattice
        return lattice_release(points, lattice, noise)


def share_sum(terms: Summing, units: int, noise: Randomness, shares: SharedNoise, meter: Meter) -> Integers:
    """Return a site's sum plus its share of the noise, in levels, int64 [k].

    Only a sum over enough sites is private. Arguments and errors as `release_sum`; `shares` is how much of the noise is
    this site's.
    """
    clipping = Clipping(shares.clip_norm, shares.lattice)
    check_room(clipping, units, 1.0, MOST_SHARED)
    points = terms(clipping)
    with meter.phase("noise"):
        return contribute(points, shares, noise)
