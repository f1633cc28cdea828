"""Validation at a site: loss and accuracy, on the held-out units, of the adapter that a round starts from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.client.training.counts import unit_scores
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.client.training.preference import judge
from privet.common.privacy.noise import cut
from privet.common.study.adapter import Adapter

EXACT = 2.0**-40
"""Lattice of sums to which no noise is added."""


def validation_points(host: ModelHost, adapter: Adapter, data: SiteData, lattice: float) -> NDArray[np.int64]:
    """Return the validation sums of an adapter: units, capped losses, correct units, in multiples of `lattice`, [3].

    Each unit's three values are cut to integers before they are added, so one unit changes the sums by exactly its own.

    Args:
        host: The model; its lock is held by the caller.
        adapter: What the coordinator sent.
        data: The site's records.
        lattice: Size of the integer 1.
    """
    sums = np.zeros(3, np.int64)
    host.mount(adapter)
    if data.validation:
        scores = judge(host, data.validation)
        for rows in data.validation_units:
            sums += cut(unit_scores(scores, rows), lattice)
    return sums
