"""Validation at a site: loss and accuracy, on the held-out units, of the adapter that a round starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from privet.client.rounds.loading import SiteData
from privet.client.training.model import ModelHost
from privet.client.training.tasks import Feature, batches, collate, forward, record_losses
from privet.common.study.adapter import Adapter
from privet.common.study.messages import VALIDATION_LOSS_CAP
from privet.common.study.study import Study

SENSITIVITY = 3**0.5
"""Largest L2 norm that one unit adds to the validation sums: each of the three values lies in [0, 1]."""


def validation_sums(host: ModelHost, study: Study, adapter: Adapter, data: SiteData) -> NDArray[np.float64]:
    """Return the validation sums of an adapter without noise: units, capped losses, correct units, [3]."""
    sums = np.zeros(3)
    host.mount(adapter)
    if data.validation:
        losses, correct = unit_scores(host, study, data.validation)
        # A unit's rows are averaged first, and its loss is capped and scaled to [0, 1]. So one unit adds at most
        # `SENSITIVITY`, however many rows it has and however wrong the model is on them.
        for rows in data.validation_units:
            loss = min(float(np.mean([losses[row] for row in rows])), VALIDATION_LOSS_CAP) / VALIDATION_LOSS_CAP
            sums += [1.0, loss, float(np.mean([correct[row] for row in rows]))]
    return sums


@torch.no_grad()
def unit_scores(host: ModelHost, study: Study, features: Sequence[Feature]) -> tuple[list[float], list[float]]:
    """Return each record's loss, with the cap for non-finite ones, and the fraction of its labels predicted right."""
    losses, correct = [0.0] * len(features), [0.0] * len(features)
    host.model.eval()
    try:
        for indices in batches(features, 64):
            batch = collate(host, [features[index] for index in indices])
            logits = forward(host, batch)
            values = record_losses(study, logits, batch).nan_to_num(
                VALIDATION_LOSS_CAP, VALIDATION_LOSS_CAP, VALIDATION_LOSS_CAP
            )
            labels = batch.labels
            if study.task.kind == "causal-lm":  # the logits at a token predict the next one
                logits, labels = logits[:, :-1], labels[:, 1:]
            right = (logits.argmax(-1) == labels).float()
            if right.dim() > 1:
                kept = (labels >= 0).float()
                right = (right * kept).sum(1) / kept.sum(1).clamp(min=1)
            for index, loss, hit in zip(indices, values.tolist(), right.tolist(), strict=True):
                losses[index], correct[index] = loss, hit
    finally:
        host.model.train()
    return losses, correct
