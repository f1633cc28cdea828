"""One round of local training: LoRA by (DP-)SGD from the received adapter to an update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privet.client.training.dp import (
    Clipping,
    PerSampleGradients,
    balance,
    clip_units,
    draw_rows,
    draw_units,
    next_clip_norm,
    noisy,
    per_sample_gradients,
    physical_batches,
)
from privet.client.training.model import ModelHost
from privet.client.training.tasks import Feature, collate, forward, record_losses
from privet.common.errors import DivergedError
from privet.common.privacy.accounting import PrivacyEvent, quiet_warnings, split_noise
from privet.common.privacy.noise import Randomness
from privet.common.privacy.schedule import rate_factor
from privet.common.privacy.shared_noise import Integers, SharedNoise, contribute
from privet.common.study.adapter import Adapter, TensorSpec, Vector
from privet.common.study.sections import OptimizerSection, PrivacySection, TrainingSection
from privet.common.study.study import Study

_DRAWING = ThreadPoolExecutor(1, "noise")

Batches = Iterable[tuple[Sequence[Feature], Sequence[int]]]
"""A step's physical batches: records, and the unit of each."""


@dataclass(frozen=True)
class TrainingSet:
    """A site's training records as features, with the rows of each unit and the count it declared."""

    features: Sequence[Feature]
    units: Sequence[Sequence[int]]
    declared: int


@dataclass(frozen=True)
class StepSum:
    """What a step adds up over its units, before noise.

    Attributes:
        gradient: Sum of the units' gradients, clipped under privacy, float64 [d], where the model is.
        balance: Half the units whose gradient was within the clip norm less half of the others.
    """

    gradient: torch.Tensor
    balance: float


@dataclass(frozen=True)
class StepNoise:
    """The standard normal variates of one step, on the lattice of `Randomness.lattice_normal`.

    Attributes:
        gradient: For the gradient sum [d].
        balance: For the balance under adaptive clipping [1], otherwise [0].
    """

    gradient: NDArray[np.float64]
    balance: NDArray[np.float64]


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
    # A constant that everybody knows, so dividing by it costs no privacy; the number drawn would be a secret.
    expected = study.training.sampling_rate * data.declared
    host.model.train()
    summing = _summing(host, study, parameters, mechanism, draws.noise, expected)
    # PyTorch warns of hooks on layers whose inputs need no gradient, such as B's where A is frozen.
    with summing as sums, quiet_warnings():
        for step in range(study.training.steps):
            factor = rate_factor(study.training.schedule, first_step + step, study.total_steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            rows = draw_step(study, data, draws.sampling)
            total = sums.sum(step_batches(data.features, rows, physical_batch))
            set_gradients(parameters, total / expected)
            _pull_back(parameters, start, study.training.fedprox_mu)
            optimizer.step()
    with torch.no_grad():
        moved = [(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)]
    update: Vector = torch.cat(moved).cpu().numpy()
    return update


class GradientSums(Protocol):
    """Where a round's steps get their gradient sums from."""

    def sum(self, batches: Batches) -> torch.Tensor:
        """Return the next step's gradient sum as the optimizer takes it, float64 [d]."""


@contextmanager
def _summing(
    host: ModelHost,
    study: Study,
    parameters: Sequence[nn.Parameter],
    mechanism: PrivacyEvent | None,
    noise: Randomness,
    expected: float,
) -> Iterator[GradientSums]:
    """Give the sums of a round's steps: noised where `mechanism` says how much, otherwise as they are."""
    if mechanism is None:
        yield PlainSums(host, study, parameters)
        return
    with per_sample_gradients(host.model, parameters) as per_sample:
        clipping = clipping_of(study.privacy, per_sample, study.privacy.promise.clip_norm)
        yield PrivateSums(host, study, parameters, mechanism.noise_multiplier, noise, expected, clipping)


@dataclass
class PlainSums:
    """Gradient sums without privacy."""

    host: ModelHost
    study: Study
    parameters: Sequence[nn.Parameter]
    _steps: int = 0

    def sum(self, batches: Batches) -> torch.Tensor:
        """Return the next step's gradient sum, float64 [d].

        Raises:
            DivergedError: It is not finite.
        """
        self._steps += 1
        total = gradient_sum(self.host, self.study, batches, self.parameters, None).gradient
        if not bool(torch.isfinite(total).all()):
            raise DivergedError(
                f"training diverged at step {self._steps} of {self.study.training.steps} of the round: the loss or a "
                "gradient is infinite or not a number",
                "lower training.learning_rate in the study",
            )
        return total


@dataclass
class PrivateSums:
    """Gradient sums of clipped gradients with noise. A record that is not finite counts as zero, and nobody is told.

    Attributes:
        host: The model.
        study: What was agreed.
        parameters: What is trained.
        noise_multiplier: z of everything that a step releases.
        noise: Where noise is drawn from, and nothing else.
        expected: Units expected in a step's batch.
        clipping: How units are clipped in the next step; an adaptive clip norm moves from step to step.
    """

    host: ModelHost
    study: Study
    parameters: Sequence[nn.Parameter]
    noise_multiplier: float
    noise: Randomness
    expected: float
    clipping: Clipping

    def sum(self, batches: Batches) -> torch.Tensor:
        """Return the next step's gradient sum with its noise, float64 [d]."""
        size = sum(parameter.numel() for parameter in self.parameters)
        # Drawing takes the CPU as long as a step of a small model takes the accelerator, so both go on at once.
        noise = noise_ahead(self.host.device, self.study.privacy, size, self.noise)
        summed = gradient_sum(self.host, self.study, batches, self.parameters, self.clipping)
        clip_norm = self.clipping.norm
        total, following = release(self.study.privacy, self.noise_multiplier, clip_norm, summed, self.expected, noise())
        self.clipping = replace(self.clipping, norm=following)
        return total


def _pull_back(parameters: Sequence[nn.Parameter], start: Sequence[torch.Tensor], mu: float) -> None:
    """Add the gradient of the proximal term mu/2 |w - w_round|^2 (Li et al. 2020)."""
    if not mu:
        return
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def release_step(
    host: ModelHost,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    *,
    shares: SharedNoise,
    physical_batch: int,
) -> Integers:
    """Take this site's part in one step of a study whose sites share the noise; nothing at the site moves.

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent.
        data: The site's training records.
        draws: This round's randomness.
        shares: How much of the noise is this site's.
        physical_batch: Records per forward pass.

    Returns:
        The sum over the drawn units of their clipped gradients plus a share of the noise, in levels, int64 [d]. Only
        a sum over enough sites is private.
    """
    host.mount(adapter)
    parameters = [parameter for _, parameter in host.train_only(adapter.spec.trained(study.aggregation.method))]
    host.model.train()
    with per_sample_gradients(host.model, parameters) as per_sample, quiet_warnings():
        clipping = clipping_of(study.privacy, per_sample, shares.clip_norm)
        rows = draw_step(study, data, draws.sampling)
        summed = gradient_sum(host, study, step_batches(data.features, rows, physical_batch), parameters, clipping)
    return contribute(summed.gradient.cpu().numpy(), shares, draws.noise)


def clipping_of(privacy: PrivacySection, per_sample: PerSampleGradients, clip_norm: float) -> Clipping:
    """Return how a study's units are clipped to a norm."""
    return Clipping(per_sample, clip_norm, privacy.stability if privacy.clipping == "automatic" else None)


def draw_step(study: Study, data: TrainingSet, sampling: Randomness) -> dict[int, Sequence[int]]:
    """Draw one step's batch: the rows of each unit drawn."""
    most = study.privacy.max_records_per_unit if study.privacy.unit == "patient" else 1
    drawn = draw_units(len(data.units), study.training.sampling_rate, sampling)
    return {unit: draw_rows(data.units[unit], most, sampling) for unit in drawn}


def step_batches(
    features: Sequence[Feature], rows_by_unit: Mapping[int, Sequence[int]], size: int
) -> Iterator[tuple[list[Feature], list[int]]]:
    """Yield a step's physical batches of about `size` records, each with the unit of every record in it."""
    lengths = [len(feature.ids) for feature in features]
    for rows, owner in physical_batches(rows_by_unit, lengths, size):
        yield [features[row] for row in rows], owner


def gradient_sum(
    host: ModelHost,
    study: Study,
    batches: Batches,
    parameters: Sequence[nn.Parameter],
    clipping: Clipping | None,
) -> StepSum:
    """Return a step's sums over its units, clipped per unit where `clipping` is given.

    No batches give zeros: a step without records is a step all the same.
    """
    for parameter in parameters:
        parameter.grad = None  # the last step's, of whichever site used this model, is still there
    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size, dtype=torch.float64, device=host.device)
    balanced = torch.zeros((), dtype=torch.float64, device=host.device)
    for features, owner in batches:
        batch = collate(host, features)
        record_losses(study, forward(host, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
        if clipping is None:
            total += torch.cat([_gradient(parameter).flatten() for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
            continue
        units = owner[-1] + 1
        index = None if units == len(owner) else torch.tensor(owner, device=host.device)
        gradients = clipping.per_sample.take(len(owner))
        clipped, norms = clip_units(gradients, index, units, clipping.norm, clipping.stability)
        total += clipped
        balanced += balance(norms, clipping.norm)
    return StepSum(total, float(balanced))


def draw_noise(privacy: PrivacySection, size: int, noise: Randomness) -> StepNoise:
    """Draw one step's noise for a gradient of `size` values."""
    gradient = noise.lattice_normal(size)
    return StepNoise(gradient, noise.lattice_normal(1 if privacy.clipping == "adaptive" else 0))


def noise_ahead(device: torch.device, privacy: PrivacySection, size: int, noise: Randomness) -> Callable[[], StepNoise]:
    """Return a function that returns the next step's noise, which is drawn on the CPU while an accelerator works.

    Nothing else may use `noise` before that function has returned.
    """
    if device.type == "cpu":
        return partial(draw_noise, privacy, size, noise)
    return _DRAWING.submit(draw_noise, privacy, size, noise).result


def release(
    privacy: PrivacySection,
    noise_multiplier: float,
    clip_norm: float,
    summed: StepSum,
    expected: float,
    noise: StepNoise,
) -> tuple[torch.Tensor, float]:
    """Noise a step's sums. Return the gradient sum, and the clip norm of the next step.

    An adaptive clip norm starts from the study's in every round: a site may miss rounds, and would otherwise have
    to keep a state that nobody could check between those it takes part in.

    Args:
        privacy: How the study clips.
        noise_multiplier: z of everything this step releases.
        clip_norm: C that the sums were clipped to.
        summed: The sums.
        expected: Units expected in a step's batch.
        noise: This step's.
    """
    if privacy.clipping != "adaptive":
        return noisy(summed.gradient, noise_multiplier * clip_norm, noise.gradient), clip_norm
    for_gradient, for_count = split_noise(noise_multiplier, privacy.quantile_share)
    gradient = noisy(summed.gradient, for_gradient * clip_norm, noise.gradient)
    count = float(noisy(torch.tensor([summed.balance], dtype=torch.float64), for_count, noise.balance)[0])
    return gradient, next_clip_norm(clip_norm, count, expected, privacy.quantile, privacy.quantile_rate)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def set_gradients(parameters: Sequence[nn.Parameter], flat: torch.Tensor) -> None:
    """Lay a flat gradient [d] out over the parameters, for the optimizer."""
    parts = torch.split(flat.float(), [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view(parameter.shape)


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
