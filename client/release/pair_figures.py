"""Figures of preference tuning: how often, and by how much, a model prefers the chosen answers of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from privet.client.release.bootstrap import Array, Measure, Measured, ratio
from privet.client.training.preference import PairScore

PREFERENCE = (
    Measure("accuracy", "preference accuracy", "higher", ratio(0, 5), percent=True),
    Measure("loss", "DPO loss", "lower", ratio(1, 5)),
    Measure("margin", "margin in nats", "higher", ratio(2, 5)),
    Measure("likelier", "chosen answer is likelier", "higher", ratio(3, 5), percent=True),
    Measure("likelier_per_token", "chosen answer is likelier, per token", "higher", ratio(4, 5), percent=True),
)
"""The first three compare with the base, whose margins are 0 by definition. The last two look at one model alone."""

BY_DEFINITION = (
    "Margins are measured from the base. So by definition the base's margin is 0, its preference accuracy 50 % and its "
    "loss log 2. Whether a model finds the chosen answer likelier does not depend on that."
)


def preferred(base: Sequence[PairScore], tuned: Sequence[PairScore]) -> Measured:
    """Return the preferences of base and tuned model, pair by pair."""
    sums = [_sums(scores) for scores in (base, tuned)]
    return Measured(PREFERENCE, sums[0], sums[1])


def _sums(scores: Sequence[PairScore]) -> Array:
    rows = [(s.correct, s.loss, s.margin, s.likelier, s.likelier_per_token, 1.0) for s in scores]
    return np.array(rows, np.float64).reshape(-1, 6)
