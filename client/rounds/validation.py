"""Validation at a site: loss and accuracy, on the held-out units, of the adapter that a round starts from."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privet.client.rounds.loading import SiteData
from privet.client.training.host import ModelHost
from privet.client.training.preference import Judged, judge
from privet.common.privacy.noise import cut
from privet.common.study.adapter import Adapter
from privet.common.study.messages import VALIDATION_LOSS_CAP

SENSITIVITY = 3**0.5
"""Largest L2 norm that one unit adds to the validation sums: each of the three values lies in [0, 1]."""

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
        # A unit's rows are averaged first, and its loss is capped and scaled to [0, 1]. So one unit adds at most
        # `SENSITIVITY`, however many rows it has and however wrong the model is on them.
        for rows in data.validation_units:
            losses = [finite_loss(scores[row]) for row in rows]
            loss = min(float(np.mean(losses)), VALIDATION_LOSS_CAP) / VALIDATION_LOSS_CAP
            sums += cut(np.array([1.0, loss, float(np.mean([scores[row].correct for row in rows]))]), lattice)
    return sums


def finite_loss(found: Judged) -> float:
    """Return a record's loss; the cap where it is not finite."""
    return found.loss if math.isfinite(found.loss) else VALIDATION_LOSS_CAP
