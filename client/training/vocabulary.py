"""Losses over a vocabulary, without the logits of a whole pass.

With a large vocabulary, the logits of a pass, their softmax and its gradient take more memory than the model: 10 bytes
for each row and token of the vocabulary. Here the last layer works on a fixed number of rows at a time, and only on
rows with a label. Each part's loss and gradient are taken at once, so that no logits are kept (after Wijmans et al.
2024, arXiv:2411.09009, without its skipping of small gradients, which would change values).

A part has always the same number of rows, whatever records are in the pass, so that a row's result does not depend on
them (`privet.client.training.packing`). `privet.client.training.probe` checks it with the rest of a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from privet.client.training.features import IGNORED
from privet.client.training.packing import within_records

ROWS, _ROWS_ON_DEVICE = 128, 1024
"""Rows of a part on a CPU, and on an accelerator."""
# Largest relative difference from the model's own logits: in float32, and in narrower types.
_CLOSE, _CLOSE_IN_16_BITS = 1e-4, 2e-2


@dataclass(frozen=True)
class Vocabulary:
    """The last layer of a language model, frozen, and the model below it.

    Attributes:
        backbone: Everything below the last layer; its output has `last_hidden_state`.
        layer: The last layer.
        scale: Factor of the logits.
        softcap: Bound on logits, by tanh; None: no bound.
    """

    backbone: nn.Module
    layer: nn.Linear
    scale: float
    softcap: float | None
    _rounded: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def rounded(self, computing: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the last layer's weight and bias in a type.

        The weight may be that of the embedding, which stays in float32. It is frozen, so it is rounded once, and not
        for each pass.
        """
        weight, bias = self.layer.weight, self.layer.bias
        now = (computing, weight.data_ptr(), weight._version, None if bias is None else bias._version)
        if now not in self._rounded:
            self._rounded.clear()
            self._rounded[now] = (
                weight.detach().to(computing), None if bias is None else bias.detach().to(computing)
            )  # fmt: skip
        return self._rounded[now]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [n, vocabulary] of hidden states [n, h]."""
        return self.through(hidden, self.layer.weight, self.layer.bias)

    def through(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return float32 logits [n, vocabulary] through the last layer's weight and bias, perhaps rounded."""
        logits = functional.linear(hidden, weight, bias).float()
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits if self.softcap is None else torch.tanh_(logits.div_(self.softcap)).mul_(self.softcap)

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cross-entropy [rows], float32, with gradient to `hidden`, and the most probable tokens [rows].

        Where a gradient is wanted, all tokens are 0: training asks for none, and finding them takes a pass over all
        logits.

        Args:
            hidden: Last hidden states [rows, h].
            labels: Tokens [rows]; `IGNORED` where a row has none. Such rows have loss 0 and token 0.
        """
        found: tuple[torch.Tensor, torch.Tensor] = _Losses.apply(hidden, labels, self)  # type: ignore[no-untyped-call]
        return found


class _Losses(torch.autograd.Function):
    """Takes each row's gradient with its loss: the loss of a row enters the total with a factor, known only later."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, last: Vocabulary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        kind = hidden.device.type
        computing = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        losses = torch.zeros(len(hidden), device=hidden.device)
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        slopes = torch.zeros_like(hidden) if wanted else torch.empty(0)
        size = ROWS if kind == "cpu" else _ROWS_ON_DEVICE
        with within_records(), torch.autocast(kind, enabled=False):
            part = _Part(last, computing)
            for rows in torch.split(torch.nonzero(labels != IGNORED).flatten(), size):
                # Filled up with rows of zeros, so that every product has the same shape.
                filled = torch.zeros(size, hidden.shape[1], dtype=computing, device=hidden.device)
                filled[: len(rows)] = hidden[rows].to(computing)
                targets = torch.zeros(size, dtype=torch.int64, device=hidden.device)
                targets[: len(rows)] = labels[rows]
                loss, token, slope = part(filled, targets, wanted)
                losses[rows] = loss[: len(rows)]
                if token is not None:
                    tokens[rows] = token[: len(rows)]
                if slope is not None:
                    slopes[rows] = slope[: len(rows)].to(slopes.dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(tokens)
        return losses, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * factors[:, None].to(slopes.dtype), None, None


class _Part:
    """Loss, and most probable token or gradient, of a fixed number of rows."""

    def __init__(self, last: Vocabulary, computing: torch.dtype) -> None:
        self._weight, self._bias = last.rounded(computing)
        self._last = last

    def __call__(
        self, hidden: torch.Tensor, targets: torch.Tensor, wanted: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        scale, softcap = self._last.scale, self._last.softcap
        logits = self._last.through(hidden, self._weight, self._bias)
        places = targets[:, None]
        own, total = logits.gather(1, places), torch.logsumexp(logits, 1)
        loss = total - own[:, 0]
        if not wanted:
            return loss, logits.argmax(1), None
        capped = None if softcap is None else 1 - logits.div(softcap).square_()
        slope = logits.sub_(total[:, None]).exp_()
        slope.scatter_add_(1, places, torch.full_like(own, -1.0))
        if capped is not None:
            slope = slope.mul_(capped.mul_(scale))
        elif scale != 1:
            slope = slope.mul_(scale)
        # A processor's matrix unit (AMX) may read on into the next row, where a row has an odd number of values, and
        # take it times zero. What is not finite would reach the row before, so nothing of it enters the product.
        spoiled = ~torch.isfinite(loss)[:, None]
        slope = slope.masked_fill_(spoiled, 0.0).to(self._weight.dtype) @ self._weight
        return loss, None, slope.masked_fill_(spoiled, math.nan)


def find_vocabulary(model: nn.Module, trained: set[int]) -> Vocabulary | None:
    """Return the last layer of a causal language model; None where it is trained, or is more than a linear layer.

    Args:
        model: The base with its adapter laid over it, but not the adapter's own wrapper.
        trained: Identities of the trained parameters.
    """
    layer, prefix = model.get_output_embeddings(), getattr(model, "base_model_prefix", "")  # type: ignore[operator]
    backbone = getattr(model, prefix, None) if prefix else None
    if type(layer) is not nn.Linear or not isinstance(backbone, nn.Module) or "forward" in vars(layer):
        return None
    if any(id(parameter) in trained for parameter in layer.parameters()):
        return None
    config = model.config
    divided = getattr(config, "logits_scaling", None) or 1.0  # of Granite
    scale = getattr(config, "logit_scale", None) or 1.0  # of Cohere
    softcap = getattr(config, "final_logit_softcapping", None)  # of Gemma 2
    return Vocabulary(backbone, layer, float(scale) / float(divided), None if softcap is None else float(softcap))


@torch.no_grad()
def agrees(found: Vocabulary, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    """Return whether the model's own logits [n, vocabulary] are those of its last hidden states [n, h]."""
    kind = found.layer.weight.dtype
    mine, theirs = found.logits(hidden.to(kind)), logits.float()
    allowed = _CLOSE if kind == torch.float32 else _CLOSE_IN_16_BITS
    return mine.shape == theirs.shape and float((mine - theirs).norm()) <= allowed * float(theirs.norm())
