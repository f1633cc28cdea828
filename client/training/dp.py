"""Differentially private gradients: sample units, clip each unit's gradient, add exactly, add noise.

Guarantee of one step (`gradient_sum` plus noise): let a step draw each unit independently with probability q,
and let S(D) be the sum over the drawn units of their terms. A term is a unit's clipped gradient in multiples of the
noise lattice, cut to integers. It is a function of that unit alone, bit for bit: a pass has the same shape whatever is
in it (`privet.client.training.packing`), and integers are added, so neither other units nor the order matter. Adding or
removing one unit therefore changes S by exactly its term, of L2 norm at most C. S + N(0, z²C²) is then a
Poisson-subsampled Gaussian mechanism with sensitivity C and noise multiplier z (Abadi et al. 2016; Mironov et al.
2019). For units with several rows, which rows enter is drawn from the unit's own rows, so the argument holds unchanged
for patients. An empty draw releases pure noise and is accounted like any other. Dividing by the expected batch, a
public constant, is post-processing.

A unit's gradient g is clipped in one of three ways:

* flat: g·min(1, C/|g|), of norm at most C.
* automatic: g·C/(|g| + s) with s > 0 (Bu et al. 2023, arXiv:2206.07136, AUTO-S). Its norm is C·|g|/(|g| + s),
  which is below C, so that the guarantee is the same. Every unit counts nearly alike, and C only sets the scale.
* adaptive: flat, and C follows a quantile of the norms (Andrew et al. 2021, arXiv:1905.03871). A step then
  releases a second sum: each unit counts +1/2 if its norm is at most C and -1/2 if not, so that one unit moves
  it by at most 1/2. Both sums over their deviations are one Gaussian vector: see `privacy.split_noise`.

With `Clipping.head` the head's part of a gradient and the rest are clipped apart, flat or automatic, each to a norm of
its own; the squares of both norms add up to C². Parts of a vector are orthogonal, so the norm of a term is at most C as
before, and nothing else in the argument changes.

A unit whose gradient is not finite contributes zero to either sum: stopping on it would itself tell that it is
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privet.client.training.persample import PerSampleGradients, SingleGradients, find_rules, flat_gradients
from privet.common.errors import StateError
from privet.common.privacy.noise import Randomness

# The clip norms that a study may set, which an adaptive one never leaves.
_CLIP_NORMS = (1e-6, 1e6)
# Values whose norm is taken at a time, as PyTorch converts to float64 before it sums. On a CPU, few enough that one
# thread sums them (PyTorch divides from 32,768 on), so that the order does not depend on the number of threads.
_COLUMNS, _WIDE_COLUMNS = 16_384, 1 << 22
# Integers up to here are exact in float64.
_EXACT = 2**53


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
def per_sample_gradients(
    model: nn.Module, trained: Sequence[nn.Parameter], *, packed: bool
) -> Iterator[PerSampleGradients]:
    """Collect per-sample gradients of `trained` during the passes of the context.

    Args:
        model: The model.
        trained: What is trained.
        packed: Whether a pass holds several records. Then LoRA and linear layers must own all of `trained`, and write
            the gradients (`privet.client.training.persample`). Otherwise autograd's gradient is the record's.

    Raises:
        StateError: `packed`, and a trained layer has no rule.
    """
    if not packed:
        yield SingleGradients(trained)
        return
    rules = find_rules(model, trained)
    if rules is None:
        raise StateError("a trained layer has no rule for per-sample gradients", "report this as a bug")
    with flat_gradients(rules, trained) as collected:
        yield collected


Columns = tuple[tuple[int, int], ...]
"""Ranges of columns, from and to, in order."""


@dataclass(frozen=True)
class Clipping:
    """How a step clips units, and the lattice on which it adds them: see the module's docstring.

    Attributes:
        norm: C.
        lattice: Size of the integer 1 in a term, in units of the gradient.
        stability: s of automatic clipping; None clips flat.
        head: Columns of the head, from and to, that are clipped apart from the others; none clips all together.
        head_share: The head's part of C², above 0 and below 1, where it is clipped apart.
    """

    norm: float
    lattice: float
    stability: float | None = None
    head: Columns = ()
    head_share: float = 0.0

    def parts(self, size: int) -> list[tuple[Columns, float]]:
        """Return the parts of a gradient [size] that are clipped apart: their columns, and the norm of each.

        Raises:
            StateError: The head's norm would be 0 or C, as an adapter has no head or nothing else.
        """
        if not self.head:
            return [(((0, size),), self.norm)]
        edges = [0, *(edge for columns in self.head for edge in columns), size]
        rest = tuple(pair for pair in zip(edges[::2], edges[1::2], strict=True) if pair[0] < pair[1])
        if not rest or not 0 < self.head_share < 1:
            raise StateError("clipping: expected a head and other values beside it", "report this as a bug")
        return [
            (self.head, self.norm * math.sqrt(self.head_share)),
            (rest, self.norm * math.sqrt(1 - self.head_share)),
        ]

    @property
    def largest(self) -> int:
        """Largest absolute value in a term."""
        return math.ceil(self.norm / self.lattice)


@dataclass
class TermSum:
    """The sum of units' terms, in integers, and the balance. Units may come in any order.

    Attributes:
        clipping: How units are clipped.
        total: Sum of the terms, int64 [P], where the gradients are.
        balance: Half the units of norm at most C, less half the units beyond it.
    """

    clipping: Clipping
    total: torch.Tensor
    balance: float = 0.0
    _open: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    def add(self, gradients: torch.Tensor, rows: Sequence[int]) -> None:
        """Add a pass's gradients.

        Args:
            gradients: [n, P], float32. A unit of several rows gives them one after another, if need be over several
                passes.
            rows: Number of rows in this step of the unit that each belongs to.
        """
        if self._open is None and all(count == 1 for count in rows):
            self._close(gradients)
            return
        whole = []
        for gradient, count in zip(gradients, rows, strict=True):
            # One row after another, in the order of the unit's own rows: a sum in float32 depends on its order.
            done, so_far = self._open or (0, torch.zeros_like(gradient))
            done, so_far = done + 1, so_far + gradient
            self._open = (done, so_far) if done < count else None
            if done == count:
                whole.append(so_far)
        if whole:
            self._close(torch.stack(whole))

    def _close(self, gradients: torch.Tensor) -> None:
        terms, norms = clip_units(gradients, self.clipping)
        self.total += terms
        self.balance += balance(norms, self.clipping.norm)


def clip_units(gradients: torch.Tensor, clipping: Clipping) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip each unit's gradient, cut it to the lattice, and add up.

    Args:
        gradients: Of each unit, [n, P] in float32.
        clipping: How.

    Returns:
        The sum of the terms in multiples of `clipping.lattice`, int64 [P], and each unit's norm before clipping,
        float64 [n]: NaN for a unit that contributes zero because its gradient is not finite, or too large to be scaled
        in float32. Term and norm of a unit do not depend on the other units.
    """
    width = _COLUMNS if gradients.device.type == "cpu" else _WIDE_COLUMNS
    # In float64: squares of small float32 values underflow, and long sums of them come out too low or too high. Unit by
    # unit: the order in which PyTorch sums several rows depends on their number.
    parts = clipping.parts(gradients.shape[1])
    norms = [torch.stack([_norm(gradient, columns, width) for gradient in gradients]) for columns, _ in parts]
    factors = [_factors(found, norm, clipping.stability) for found, (_, norm) in zip(norms, parts, strict=True)]
    # NaN and the reciprocal of infinity are not. A unit counts whole or not at all.
    usable = torch.stack([each >= torch.finfo(torch.float32).tiny for each in factors]).all(0)
    if not bool(usable.all()):
        gradients = torch.where(usable.unsqueeze(1), gradients, 0.0)
    # Float64 holds integers up to 2^53 exactly: sums of so few terms are exact, in any order.
    few = max(1, _EXACT // (clipping.largest + 1))
    total = torch.zeros(gradients.shape[1], dtype=torch.int64, device=gradients.device)
    for (ranges, _), each in zip(parts, factors, strict=True):
        scales = (torch.where(usable, each, 0.0) / clipping.lattice).unsqueeze(1)
        for start, end in ranges:
            for first in range(start, end, width):
                columns = slice(first, min(first + width, end))
                for part, scale in zip(torch.split(gradients[:, columns], few), torch.split(scales, few), strict=True):
                    total[columns] += (part.double() * scale).trunc_().sum(0).long()
    whole = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return total, torch.where(usable, whole, math.nan)


def _factors(norms: torch.Tensor, most: float, stability: float | None) -> torch.Tensor:
    """Return what gradients of some norms [n] are multiplied by, so that none is longer than `most`; float64 [n]."""
    below = norms.clamp(min=most) if stability is None else norms + stability
    # The margin covers what rounding in float64 can add to C: a relative error of P·2^-53 of the norm, and less of the
    # product. Cutting to integers adds nothing, as it never makes a value larger.
    return most * (1 - 1e-6) / below


def _norm(gradient: torch.Tensor, columns: Columns, width: int) -> torch.Tensor:
    """Return the norm of some columns of a gradient [P], in an order that depends on nothing else."""
    cut = [part for start, end in columns for part in torch.split(gradient[start:end], width)]
    found: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in cut])
    )
    return found


def balance(norms: torch.Tensor, clip_norm: float) -> float:
    """Return half the units of norm at most C less half the units beyond it, exactly; NaN counts as neither."""
    return 0.5 * float((norms <= clip_norm).sum() - (norms > clip_norm).sum())


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


def noisy(total: torch.Tensor, lattice: float, variates: NDArray[np.float64]) -> torch.Tensor:
    """Return `noise.lattice_release` of `total`, the same bits, computed where `total` is.

    Args:
        total: Sum of terms, int64 [d].
        lattice: Size of the integer 1.
        variates: `Randomness.lattice_normal` of d values, drawn for this and nothing else.

    Returns:
        Float64 [d].
    """
    noise = torch.from_numpy((2 * variates).astype(np.int64)).to(total.device)
    return (2 * total + noise).double() * (lattice / 2)
