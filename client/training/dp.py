"""Differentially private gradients: sample units, clip each unit's gradient, add noise.

Guarantee of one step (`gradient_sum` plus noise): let a step draw each unit independently with probability q,
and let S(D) be the sum over the drawn units of their clipped gradients. Adding or removing one unit changes S
by at most C in L2, because a unit's rows enter no other unit's term and every term is clipped to C. S + N(0,
z²C²) is then a Poisson-subsampled Gaussian mechanism with sensitivity C and noise multiplier z (Abadi et al.
2016; Mironov et al. 2019). For units with several rows, which rows enter is drawn from the unit's own rows, so
the argument holds unchanged for patients. An empty draw releases pure noise and is accounted like any other.
Dividing by the expected batch, a public constant, is post-processing.

A unit's gradient g is clipped in one of three ways:

* flat: g·min(1, C/|g|), of norm at most C.
* automatic: g·C/(|g| + s) with s > 0 (Bu et al. 2023, arXiv:2206.07136, AUTO-S). Its norm is C·|g|/(|g| + s),
  which is below C, so that the guarantee is the same. Every unit counts nearly alike, and C only sets the scale.
* adaptive: flat, and C follows a quantile of the norms (Andrew et al. 2021, arXiv:1905.03871). A step then
  releases a second sum: each unit counts +1/2 if its norm is at most C and -1/2 if not, so that one unit moves
  it by at most 1/2. Both sums over their deviations are one Gaussian vector: see `privacy.split_noise`.

A unit whose gradient is not finite contributes zero to either sum: stopping on it would itself tell that it is
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from torch import nn

from privet.client.training.persample import check_widths, find_rules, flat_gradients
from privet.common.errors import StateError, StudyError
from privet.common.privacy.noise import Randomness, lattice_unit

# The clip norms that a study may set, which an adaptive one never leaves.
_CLIP_NORMS = (1e-6, 1e6)
# Columns whose norm is taken at a time, as PyTorch converts to float64 before it sums: what a core's cache holds; on an
# accelerator, so many that there is little to launch.
_COLUMNS, _WIDE_COLUMNS = 32_768, 1 << 22


def draw_units(units: int, rate: float, randomness: Randomness) -> list[int]:
    """Draw each of `units` independently with probability `rate` (Poisson sampling)."""
    return [int(index) for index in np.flatnonzero(randomness.uniform(units) < rate)]


def draw_rows(rows: Sequence[int], most: int, randomness: Randomness) -> list[int]:
    """Draw at most `most` of one unit's rows, uniformly without replacement."""
    if len(rows) <= most:
        return list(rows)
    order = np.argsort(randomness.uniform(len(rows)), kind="stable")
    return sorted(rows[index] for index in order[:most])


class PerSampleGradients(Protocol):
    """The per-sample gradients that the last backward pass left."""

    def take(self, records: int) -> list[torch.Tensor]:
        """Return float32 blocks [records, size] that together hold every trained parameter in order; forget them.

        Raises:
            StateError: A parameter has none, or for another number of records: something trained unseen.
        """


@contextmanager
def per_sample_gradients(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[PerSampleGradients]:
    """Collect per-sample gradients of `trained` during backward passes of summed losses inside the context.

    Where LoRA and linear layers own all of `trained`, those layers write them (`privet.client.training.persample`);
    elsewhere Opacus's hooks do, and gradient checkpointing must be of the re-entrant kind.

    Raises:
        StudyError: A trained layer has no per-sample rule, such as one with running statistics.
    """
    rules = find_rules(model, trained)
    with hooked_gradients(model, trained) if rules is None else flat_gradients(rules, trained) as collected:
        yield collected


@contextmanager
def hooked_gradients(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[PerSampleGradients]:
    """Collect per-sample gradients by Opacus's hooks, for layers of any kind.

    Raises:
        StudyError: As `per_sample_gradients`.
    """
    try:
        hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)
    except NotImplementedError:
        raise StudyError(
            "lora: for a trained layer of this type, opacus cannot compute the gradient of each single record",
            "train linear layers only: correct lora.targets and lora.modules_to_save in the study",
        ) from None
    collected = _HookedGradients(trained)
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(collected.watch) for module in owners]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
        hooks.cleanup()


class _HookedGradients:
    """What Opacus's hooks leave on the parameters."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self._widths: set[int] = set()

    def watch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Note the batch size that a trained layer is called with. A forward pre-hook."""
        self._widths.add(len(inputs[0]))

    def take(self, records: int) -> list[torch.Tensor]:
        """Return one float32 tensor [records, size] per parameter, and forget them: see `PerSampleGradients`."""
        widths, self._widths = self._widths, set()
        check_widths(widths, records)
        taken = []
        for parameter in self._trained:
            gradient: Any = getattr(parameter, "grad_sample", None)
            if not isinstance(gradient, torch.Tensor) or len(gradient) != records:
                raise StateError(
                    f"a trained parameter of shape {list(parameter.shape)} has no per-sample gradient (one gradient "
                    "for each record)",
                    "train other layers (lora.targets): each trained layer must be called in every forward pass, "
                    "and gradient checkpointing must be re-entrant",
                )
            taken.append(gradient.detach().reshape(records, -1).float())
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return taken


@dataclass(frozen=True)
class Clipping:
    """Where a step's per-sample gradients come from, and how it clips units: see the module's docstring.

    Attributes:
        per_sample: What the backward pass leaves.
        norm: C.
        stability: s of automatic clipping; None clips flat.
    """

    per_sample: PerSampleGradients
    norm: float
    stability: float | None = None


def clip_units(
    gradients: Sequence[torch.Tensor],
    owner: torch.Tensor | None,
    units: int,
    clip_norm: float,
    stability: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip each unit's gradient and add up.

    Args:
        gradients: Per-sample gradients in blocks [n, size].
        owner: Unit of each sample, [n], in 0..units-1; None where each sample is a unit of its own.
        units: Number of units in this batch.
        clip_norm: C, the largest L2 norm of a unit's contribution.
        stability: s of automatic clipping; None clips flat.

    Returns:
        The sum [size of all blocks], and each unit's norm before clipping, float64 [units]: NaN for a unit that
        contributes zero because its gradient is not finite, or too large to be scaled in float32.
    """
    if owner is not None:
        gradients = [g.new_zeros(units, g.shape[1]).index_add_(0, owner, g) for g in gradients]
    # In float64: squares of small float32 values underflow, and long sums of them come out too low or too high.
    on_cpu = gradients[0].device.type == "cpu"
    width = _COLUMNS if on_cpu else _WIDE_COLUMNS
    columns = [part for g in gradients for part in torch.split(g, width, dim=1)]
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in columns]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    below = norms.clamp(min=clip_norm) if stability is None else norms + stability
    # The margin covers what rounding, here and onto the noise's lattice, can add to C.
    factors = clip_norm * (1 - 1e-6) / below
    usable = factors >= torch.finfo(torch.float32).tiny  # NaN and the reciprocal of infinity are not
    factors = torch.where(usable, factors, 0.0)
    # An accelerator would have to be waited for to know whether any is not; there, all go through it.
    if not (on_cpu and bool(usable.all())):
        columns = [torch.where(usable.unsqueeze(1), part, 0.0) for part in columns]
    total = torch.cat([factors @ part.double() for part in columns])
    return total, torch.where(usable, norms, math.nan)


def balance(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Return half the units of norm at most C less half the units beyond it; NaN counts as neither."""
    return 0.5 * ((norms <= clip_norm).sum() - (norms > clip_norm).sum())


def next_clip_norm(clip_norm: float, noised_balance: float, expected: float, target: float, rate: float) -> float:
    """Return the clip norm of the next step, C·exp(-rate·(b - target)) (Andrew et al. 2021, algorithm 1).

    b is the noised fraction of units within C. It is taken from the balance over the expected batch, a public
    constant: the number of units really drawn is not public. A declared count beside the truth draws b towards
    or from 1/2, which leaves the median where it is and shifts other quantiles.

    Args:
        clip_norm: C of this step.
        noised_balance: This step's `balance` plus noise.
        expected: Units expected in a step's batch.
        target: Fraction of units to be within C.
        rate: Largest change of C's logarithm.
    """
    fraction = min(max(0.5 + noised_balance / expected, 0.0), 1.0)
    least, most = _CLIP_NORMS
    return min(max(clip_norm * math.exp(-rate * (fraction - target)), least), most)


def physical_batches(
    rows_by_unit: Mapping[int, Sequence[int]], lengths: Sequence[int], size: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Split a step's rows into batches of about `size`, never splitting a unit.

    Yields:
        Row indices, and for each the position of its unit within the batch. Units of like length stand together.
    """
    order = sorted(rows_by_unit, key=lambda unit: (max(lengths[row] for row in rows_by_unit[unit]), unit))
    rows: list[int] = []
    owner: list[int] = []
    for unit in order:
        if rows and len(rows) + len(rows_by_unit[unit]) > size:
            yield rows, owner
            rows, owner = [], []
        position = owner[-1] + 1 if owner else 0
        rows += rows_by_unit[unit]
        owner += [position] * len(rows_by_unit[unit])
    if rows:
        yield rows, owner


def noisy(total: torch.Tensor, deviation: float, variates: NDArray[np.float64]) -> torch.Tensor:
    """Return `noise.gaussian_release` of `total`, the same bits, computed where `total` is.

    Args:
        total: Float64, shape (d,).
        deviation: Standard deviation of the noise.
        variates: `Randomness.lattice_normal` of d values, drawn for this and nothing else.

    Raises:
        StateError: As `gaussian_release`.
    """
    # As a tensor beside `total`: what CUDA divides by a number, it multiplies with the number's rounded reciprocal.
    unit = torch.tensor(lattice_unit(deviation), dtype=torch.float64, device=total.device)
    noise = torch.from_numpy(variates).to(total.device)
    return (torch.round(total / unit) + noise) * unit
