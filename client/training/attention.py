"""Attention within each record of a pass: rows of one record never meet rows of another.

A pass lays the tokens of several records end to end (`privet.client.training.packing`). Everything in a transformer but
attention works on one token at a time. Here attention takes one record's rows at a time, in shapes that follow from
that record's own length, so its result does not depend on which other records are in the pass, nor on its place.

Transformers looks an attention function up by name in every forward pass (`AttentionInterface`), and passes the
layout on as a keyword. A family that does not look it up, or that asks for something this function does not compute, is
run one record at a time instead (`privet.client.training.passes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from privet.client.training.packing import Block, Layout, within_records
from privet.common.errors import StudyError

NAME = "privet_packed"
"""Name of this attention among those of transformers. No mask function has this name, so none is built."""

# Keywords that models pass along and that change nothing here: what they say is in the layout, or is bookkeeping.
_IGNORED = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "layer_idx", "logits_to_keep", "num_items_in_batch", "position_embeddings"}
)  # fmt: skip


class UnpackableError(StudyError):
    """A model cannot be run on records laid end to end. Passes of one record are used instead."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return each record's attention over its own rows, [1, rows, heads, size]: an attention of transformers.

    Args:
        module: The layer that asks; it may say that it is causal.
        query: [1, heads, rows, size].
        key: [1, key heads, rows, size].
        value: As `key`.
        attention_mask: None: a row's record and its place are in the layout.
        layout: Where each record lies.
        scaling: Factor of the scores; None: 1/√size.
        dropout: Probability of leaving a weight out.
        is_causal: Whether a token attends to earlier ones only; None: as the module says.
        sliding_window: A token attends to tokens nearer than this.
        softcap: Bound on scores, by tanh; None: no bound.
        others: Anything else that is not None is refused.

    Raises:
        UnpackableError: There is no layout, or the model asks for more than this.
    """
    unknown = [name for name, found in others.items() if name not in _IGNORED and found not in (None, False)]
    if layout is None or attention_mask is not None or unknown:
        wanted = ", ".join(unknown) or "a mask"
        raise UnpackableError(f"the model uses an attention that is not computed within records, with {wanted}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = scale, softcap, causal, sliding_window, dropout
    with within_records():
        found: torch.Tensor = _PackedAttention.apply(query[0], key[0], value[0], layout, options)  # type: ignore[no-untyped-call]
    return found.unsqueeze(0), None


class _PackedAttention(torch.autograd.Function):
    """softmax(s q kᵀ) v of each record, for q [heads, rows, size] and k, v [key heads, rows, size].

    Every record's part is written into one tensor. As slices, each would cost autograd a tensor of all rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        options: tuple[float, float | None, bool, int | None, float],
    ) -> torch.Tensor:
        scale, softcap, causal, window, dropout = options
        heads = _Heads(len(q), len(k))
        out = v.new_zeros(q.shape[1], len(q), v.shape[-1])
        kept, slopes, masks = [], [], []
        for block in layout.blocks:
            qs, ks, vs = heads.queries(q, block), heads.keys(k, block), heads.keys(v, block)
            scores = torch.bmm(qs, ks.transpose(1, 2)).float().mul_(scale)
            if softcap is not None:
                scores = torch.tanh_(scores.div_(softcap))
                slopes.append(1 - scores.square())
                scores = scores.mul_(softcap)
            heads.per_record(scores, block).add_(layout.bias(block, q.device, causal=causal, window=window)[:, None])
            weights = torch.softmax(scores, -1).to(v.dtype)
            kept.append(weights)
            if dropout:
                masks.append(torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout))
                weights = weights * masks[-1]
            heads.put(out.transpose(0, 1), block, torch.bmm(weights, vs))
        ctx.save_for_backward(q, k, v, *kept, *slopes, *masks)
        ctx.layout, ctx.scale, ctx.capped = layout, scale, softcap is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        blocks = ctx.layout.blocks
        slopes = kept[len(blocks) : 2 * len(blocks)] if ctx.capped else []
        masks = kept[len(blocks) + len(slopes) :]
        heads = _Heads(len(q), len(k))
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad = grad.transpose(0, 1)
        for index, block in enumerate(blocks):
            qs, ks, vs = heads.queries(q, block), heads.keys(k, block), heads.keys(v, block)
            do, weights = heads.queries(grad, block), kept[index]
            used = weights * masks[index] if masks else weights
            heads.put_keys(dv, block, torch.bmm(used.transpose(1, 2), do))
            dp = torch.bmm(do, vs.transpose(1, 2))
            if masks:
                dp = dp * masks[index]
            ds = torch._softmax_backward_data(dp.float(), weights.float(), -1, torch.float32)
            if slopes:
                ds = ds.mul_(slopes[index])
            ds = ds.mul_(ctx.scale).to(q.dtype)
            heads.put(dq, block, torch.bmm(ds, ks))
            heads.put_keys(dk, block, torch.bmm(ds.transpose(1, 2), qs))
        return dq, dk, dv, None, None


@dataclass(frozen=True)
class _Heads:
    """How [heads, rows, size] falls into one matrix for each key head and record of a block.

    With fewer key heads than query heads, the queries of all heads that share keys lie in one matrix.
    """

    queries_: int
    keys_: int

    def queries(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """Return [key heads · records, shared · width, size] of x [heads, rows, size]."""
        shared, records = self.queries_ // self.keys_, len(block.lengths)
        part = x[:, block.rows]
        if shared == 1 and records == 1:
            return part
        part = part.reshape(self.keys_, shared, records, block.width, x.shape[-1]).transpose(1, 2)
        return part.reshape(self.keys_ * records, shared * block.width, x.shape[-1])

    def keys(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """Return [key heads · records, width, size] of x [key heads, rows, size]."""
        part = x[:, block.rows]
        return part if len(block.lengths) == 1 else part.reshape(-1, block.width, x.shape[-1])

    def per_record(self, scores: torch.Tensor, block: Block) -> torch.Tensor:
        """Return scores as [key heads, records, shared, width, width], a view."""
        records = len(block.lengths)
        return scores.view(self.keys_, records, -1, block.width, block.width)

    def put(self, into: torch.Tensor, block: Block, found: torch.Tensor) -> None:
        """Write what `queries` took apart back into its rows."""
        shared, records = self.queries_ // self.keys_, len(block.lengths)
        if not (shared == 1 and records == 1):
            found = found.view(self.keys_, records, shared, block.width, -1).transpose(1, 2)
            found = found.reshape(self.queries_, records * block.width, -1)
        into[:, block.rows] = found

    def put_keys(self, into: torch.Tensor, block: Block, found: torch.Tensor) -> None:
        """Write what `keys` took apart back into its rows."""
        into[:, block.rows] = found if len(block.lengths) == 1 else found.view(self.keys_, -1, found.shape[-1])


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention within records while the context is open. Each call then needs a `layout`."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


AttentionInterface.register(NAME, packed_attention)
