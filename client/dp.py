"""Differentially private gradients: sample units, clip each unit's gradient, add noise.

Guarantee of one step (`private_step_sum` plus noise): let a step draw each unit independently with
probability q, and let S(D) be the sum over the drawn units of their clipped gradients. Adding or removing
one unit changes S by at most C in L2, because a unit's rows enter no other unit's term and every term is
clipped to C. S + N(0, z²C²) is then a Poisson-subsampled Gaussian mechanism with sensitivity C and noise
multiplier z (Abadi et al. 2016; Mironov et al. 2019). For units with several rows, which rows enter is drawn
from the unit's own rows, so the argument holds unchanged for patients. An empty draw releases pure noise and
is accounted like any other. Dividing by the expected batch, a public constant, is post-processing.

A unit whose gradient is not finite contributes zero: stopping on it would itself tell that it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from privet.common.errors import StateError, StudyError
from privet.common.noise import Randomness


def draw_units(units: int, rate: float, randomness: Randomness) -> list[int]:
    """Draw each of `units` independently with probability `rate` (Poisson sampling)."""
    return [int(index) for index in np.flatnonzero(randomness.uniform(units) < rate)]


def draw_rows(rows: Sequence[int], most: int, randomness: Randomness) -> list[int]:
    """Draw at most `most` of one unit's rows, uniformly without replacement."""
    if len(rows) <= most:
        return list(rows)
    order = np.argsort(randomness.uniform(len(rows)), kind="stable")
    return sorted(rows[index] for index in order[:most])


@contextmanager
def per_sample_gradients(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[PerSampleGradients]:
    """Collect per-sample gradients of `trained` during backward passes inside the context.

    Raises:
        StudyError: A trained layer has no per-sample rule, such as one with running statistics.
    """
    try:
        hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)
    except NotImplementedError:
        raise StudyError("lora: a trained layer has no per-sample gradients", "train linear layers only") from None
    watching = PerSampleGradients(trained)
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(watching.watch) for module in owners]
    try:
        yield watching
    finally:
        for handle in handles:
            handle.remove()
        hooks.cleanup()


class PerSampleGradients:
    """The per-sample gradients that the last backward pass left on the parameters."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self._widths: set[int] = set()

    def watch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Note the batch size that a trained layer is called with. A forward pre-hook."""
        self._widths.add(len(inputs[0]))

    def take(self, records: int) -> list[torch.Tensor]:
        """Return one float32 tensor [records, size] per parameter, and forget them.

        Raises:
            StateError: A parameter has none, or for another number of records: something trained unseen.
        """
        widths, self._widths = self._widths, set()
        if widths - {records}:
            raise StateError(
                "a trained layer also works on something other than the batch's records, so that its gradients "
                "cannot be told apart by record",
                "train other layers (lora.targets), or take a base without shared relative positions",
            )
        taken = []
        for parameter in self._trained:
            gradient: Any = getattr(parameter, "grad_sample", None)
            if not isinstance(gradient, torch.Tensor) or len(gradient) != records:
                raise StateError(
                    f"a trained parameter of shape {list(parameter.shape)} has no per-sample gradient",
                    "gradient checkpointing must be re-entrant, and every trained layer must take part",
                )
            taken.append(gradient.detach().reshape(records, -1).float())
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return taken


def clipped_sum(
    gradients: Sequence[torch.Tensor], owner: torch.Tensor | None, units: int, clip_norm: float
) -> torch.Tensor:
    """Return the sum of clipped unit gradients, [size of all parameters].

    Args:
        gradients: Per parameter, per-sample gradients [n, size].
        owner: Unit of each sample, [n], in 0..units-1; None where each sample is a unit of its own.
        units: Number of units in this batch.
        clip_norm: C, the largest L2 norm of a unit's contribution.
    """
    if owner is not None:
        gradients = [g.new_zeros(units, g.shape[1]).index_add_(0, owner, g) for g in gradients]
    # In float64: squares of small float32 values underflow, and long sums of them come out too low.
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in gradients])
    norms = torch.linalg.vector_norm(norms, dim=0)
    finite = torch.isfinite(norms)
    # The tiny margin keeps float32 rounding of the product below C.
    factors = torch.where(finite, clip_norm * (1 - 1e-6) / norms.clamp(min=clip_norm), 0.0).float()
    if not bool(finite.all()):
        gradients = [torch.where(finite.unsqueeze(1), g, 0.0) for g in gradients]
    return torch.cat([factors @ g for g in gradients])


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


def noisy(total: np.ndarray[Any, Any], deviation: float, randomness: Randomness) -> np.ndarray[Any, Any]:
    """Return `total` plus independent Gaussian noise of the given standard deviation, in float64."""
    noised: np.ndarray[Any, Any] = total.astype(np.float64) + deviation * randomness.normal(total.size)
    return noised
