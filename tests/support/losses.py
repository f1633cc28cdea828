"""Losses of padded batches, by PyTorch's functions alone: what records laid end to end are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from privet.client.training.features import IGNORED, Feature
from privet.client.training.host import ModelHost
from privet.client.training.tasks import Batch, collate, forward
from privet.common.study.sections import GENERATING


def record_losses(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return one loss per record [n], in float32, for a kind of task.

    Cross-entropy of the class, or its mean over the record's own labelled tokens (0 for a record without any).
    """
    if kind == "text-classification":
        return functional.cross_entropy(logits.float(), batch.labels, reduction="none")
    sums, counts = token_losses(kind, logits, batch)
    return sums / counts.clamp(min=1)


def token_losses(kind: str, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each record's summed token loss and number of labelled tokens, both [n]."""
    labels = batch.labels
    if kind in GENERATING:
        logits, labels = logits[:, :-1], labels[:, 1:]  # the logits at a token predict the next one
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def one_by_one(host: ModelHost, features: Sequence[Feature], trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the gradient of each record's loss [n, P] by plain autograd, one record at a time."""
    rows = []
    for feature in features:
        batch = collate(host, [feature])
        loss = record_losses(host.kind, forward(host, batch), batch).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trained))]))
    return torch.stack(rows)
