"""One round of local training: LoRA by (DP-)SGD from the received adapter to an update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from privet.client.dp import (
    PerSampleGradients,
    clipped_sum,
    draw_rows,
    draw_units,
    noisy,
    per_sample_gradients,
    physical_batches,
)
from privet.client.model import ModelHost
from privet.client.tasks import Feature, collate, forward, record_losses
from privet.common.adapter import Adapter, TensorSpec, Vector
from privet.common.errors import DivergedError
from privet.common.noise import Randomness
from privet.common.privacy import PrivacyEvent, quiet_warnings
from privet.common.schedule import rate_factor
from privet.common.study import OptimizerSection, Study, TrainingSection


@dataclass(frozen=True)
class TrainingSet:
    """A site's training records as features, with the rows of each unit and the count it declared."""

    features: Sequence[Feature]
    units: Sequence[Sequence[int]]
    declared: int


@dataclass(frozen=True)
class Draws:
    """The two streams of randomness of a site's round. They are never shared with anything else."""

    sampling: Randomness
    noise: Randomness


def train_round(
    host: ModelHost,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    *,
    first_step: int,
    mechanism: PrivacyEvent | None,
    physical_batch: int,
) -> Vector:
    """Train for one round and return the update: trained values after minus before, flattened, float32.

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent.
        data: The site's training records.
        draws: This round's randomness.
        first_step: Steps of the study before this round, for the learning-rate schedule.
        mechanism: Noise multiplier and sampling rate of private training; None trains without privacy.
        physical_batch: Records per forward pass.

    Raises:
        DivergedError: Without privacy, a loss is not finite. (With privacy such a record counts as zero.)
    """
    host.mount(adapter)
    trained = host.train_only(adapter.spec.trained(study.aggregation.method))
    parameters = [parameter for _, parameter in trained]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = local_optimizer(study.training, trained)
    rates = [group["lr"] for group in optimizer.param_groups]
    denominator = study.training.sampling_rate * data.declared
    host.model.train()
    watching = per_sample_gradients(host.model, parameters) if mechanism is not None else nullcontext()
    # PyTorch warns of hooks on layers whose inputs need no gradient, such as B's where A is frozen.
    with watching as per_sample, quiet_warnings():
        for step in range(study.training.steps):
            factor = rate_factor(study.training.schedule, first_step + step, study.total_steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            rows = draw_step(study, data, draws.sampling)
            total = gradient_sum(host, study, data.features, rows, parameters, per_sample, physical_batch)
            if mechanism is not None:
                deviation = mechanism.noise_multiplier * study.privacy.promise[2]
                total = noisy(total, deviation, draws.noise)
            elif not np.isfinite(total).all():
                raise DivergedError(
                    f"the loss is not finite at local step {step + 1} of {study.training.steps}",
                    "lower training.learning_rate",
                )
            _set_gradients(parameters, total / denominator)
            if study.training.fedprox_mu:
                for parameter, origin in zip(parameters, start, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - origin, alpha=study.training.fedprox_mu)
            optimizer.step()
    with torch.no_grad():
        moved = [(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)]
    update: Vector = torch.cat(moved).cpu().numpy()
    return update


def draw_step(study: Study, data: TrainingSet, sampling: Randomness) -> dict[int, Sequence[int]]:
    """Draw one step's batch: the rows of each unit drawn."""
    most = study.privacy.max_records_per_unit if study.privacy.unit == "patient" else 1
    drawn = draw_units(len(data.units), study.training.sampling_rate, sampling)
    return {unit: draw_rows(data.units[unit], most, sampling) for unit in drawn}


def gradient_sum(
    host: ModelHost,
    study: Study,
    features: Sequence[Feature],
    rows_by_unit: dict[int, Sequence[int]],
    parameters: Sequence[nn.Parameter],
    per_sample: PerSampleGradients | None,
    physical_batch: int,
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the step's gradient sum over units, clipped per unit where `per_sample` is given; float64 [d].

    No rows give zeros: a step without records is a step all the same.
    """
    for parameter in parameters:
        parameter.grad = None  # the last step's, of whichever site used this model, is still there
    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size, dtype=torch.float64, device=host.device)
    lengths = [len(feature.ids) for feature in features]
    for rows, owner in physical_batches(rows_by_unit, lengths, physical_batch):
        batch = collate(host, [features[row] for row in rows])
        record_losses(study, forward(host, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
        if per_sample is not None:
            units = owner[-1] + 1
            index = None if units == len(rows) else torch.tensor(owner, device=host.device)
            gradients = per_sample.take(len(rows))
            total += clipped_sum(gradients, index, units, study.privacy.promise[2])
        else:
            total += torch.cat([_gradient(parameter).flatten() for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
    return total.cpu().numpy()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _set_gradients(parameters: Sequence[nn.Parameter], flat: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    offset = 0
    for parameter in parameters:
        part = torch.from_numpy(flat[offset : offset + parameter.numel()]).view(parameter.shape)
        parameter.grad = part.to(parameter.device, parameter.dtype)
        offset += parameter.numel()


def parameter_groups(
    section: OptimizerSection, trained: Sequence[tuple[TensorSpec, nn.Parameter]]
) -> list[dict[str, object]]:
    """Return one group for LoRA tensors and one for modules trained in full, each with its learning rate."""
    lora = [parameter for tensor, parameter in trained if tensor.role != "full"]
    full = [parameter for tensor, parameter in trained if tensor.role == "full"]
    groups: list[dict[str, object]] = [{"params": lora, "lr": section.learning_rate}]
    if full:
        groups.append({"params": full, "lr": section.head_learning_rate or section.learning_rate})
    return groups


def local_optimizer(
    section: TrainingSection, trained: Sequence[tuple[TensorSpec, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Return the site's optimizer, with fresh state."""
    groups = parameter_groups(section, trained)
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=section.betas, weight_decay=section.weight_decay)
    return torch.optim.SGD(groups, momentum=section.momentum, weight_decay=section.weight_decay)
