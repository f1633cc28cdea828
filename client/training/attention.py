"""Attention within each record of a pass: rows of one record never meet rows of another.

A pass lays the tokens of several records end to end (`privet.client.training.packing`). Everything in a transformer but
attention works on one token at a time. Here attention takes one record's rows at a time, in shapes that follow from
that record's own length, so its result does not depend on which other records are in the pass, nor on its place.

Transformers looks an attention function up by name in every forward pass (`AttentionInterface`), and passes the
layout on as a keyword. A family that does not look it up, or that asks for something this function does not compute, is
run one record at a time instead (`privet.client.training.passes`).
"""

from __future__ import annotations

from collections.abc import Sequence
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

# Tokens up to which the weights of a record's attention are kept for the backward pass.
_SHORT = 512
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
    kind = _Kind(scale, softcap, causal, sliding_window, dropout)
    # Rotary positions leave queries and keys in float32; autocast would round them for the product just so.
    query, key = query.to(value.dtype), key.to(value.dtype)
    with within_records():
        found: torch.Tensor = _PackedAttention.apply(query[0], key[0], value[0], layout, kind)  # type: ignore[no-untyped-call]
    return found.unsqueeze(0), None


@dataclass(frozen=True)
class _Kind:
    """What a layer's attention computes: see `packed_attention`."""

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    dropout: float

    def weights(
        self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights of a block's records in `key`'s type, and the slope of the cap.

        Args:
            query: [matrices, shared · width, size].
            key: [matrices, width, size].
            bias: [records, 1, width, width]; records are the last part of the axis of matrices. None: zeros.
        """
        width = key.shape[1]
        if self.softcap is None:
            # Scale and bias are part of the product, and a softmax computes in float32 whatever it reads and writes: of
            # bfloat16, half of attention's time would go into passes over the scores.
            scores = _product(query, key.transpose(1, 2), self.scale, _spread(bias, len(key), query.shape[1]))
            return torch._softmax(scores, -1, False), None
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(self.scale)
        scores = torch.tanh_(scores.div_(self.softcap))
        slope = 1 - scores.square()
        scores = scores.mul_(self.softcap)
        if bias is not None:
            scores.view(-1, len(bias), query.shape[1] // width, width, width).add_(bias)
        return torch.softmax(scores, -1).to(key.dtype), slope

    def slopes(self, dp: torch.Tensor, weights: torch.Tensor, slope: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        """Return the gradient of the scores but for a factor, and this factor.

        Args:
            dp: Gradient of the weights.
            weights: What `weights` returned.
            slope: Likewise.
        """
        if slope is None:
            return torch._softmax_backward_data(dp, weights, -1, dp.dtype), self.scale
        ds = torch._softmax_backward_data(dp.float(), weights.float(), -1, torch.float32)
        return ds.mul_(slope).mul_(self.scale).to(dp.dtype), 1.0


def _product(a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return scale · a b + bias of matrices, rounded once."""
    if bias is None:
        nothing = a.new_empty(1).expand(len(a), a.shape[1], b.shape[2])
        return torch.baddbmm(nothing, a, b, beta=0, alpha=scale)
    return torch.baddbmm(bias.to(a.dtype), a, b, alpha=scale)


def _spread(bias: torch.Tensor | None, matrices: int, rows: int) -> torch.Tensor | None:
    """Return the bias [matrices, rows, width] of a block's records, [records, 1, width, width]."""
    if bias is None:
        return None
    records, width = len(bias), bias.shape[-1]
    each = bias.expand(-1, rows // width, -1, -1).reshape(records, rows, width)
    return each.expand(matrices // records, -1, -1, -1).reshape(matrices, rows, width)


class _PackedAttention(torch.autograd.Function):
    """softmax(s q kᵀ) v of each record, for q [heads, rows, size] and k, v [key heads, rows, size].

    Every record's part is written into one tensor. As slices, each would cost autograd a tensor of all rows. Weights of
    short records are kept for the backward pass. Those of long ones are computed again, one key head at a time, as they
    grow with the square of the length.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, kind: _Kind
    ) -> torch.Tensor:
        heads, kept, outs = _Heads(len(q), len(k)), [], []
        for block, *rows in zip(layout.blocks, *(layout.parts(x, 1) for x in (q, k, v)), strict=True):
            qs, ks, vs = heads.queries(rows[0], block), heads.keys(rows[1], block), heads.keys(rows[2], block)
            bias, found = _bias(layout, block, kind, q.device), []
            for part in _parts(block, len(ks), kind):
                weights, slope = kind.weights(_at(qs, part), _at(ks, part), bias)
                mask = None
                if kind.dropout:
                    mask = torch.empty_like(weights).bernoulli_(1 - kind.dropout).div_(1 - kind.dropout)
                found.append(torch.bmm(weights if mask is None else weights * mask, _at(vs, part)))
                kept += [weights, slope, mask] if _is_kept(block, kind) else []
            outs.append(heads.rows(_together(found), block).transpose(0, 1))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.kind = layout, kind
        return layout.joined(outs, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        layout: Layout = ctx.layout
        kind: _Kind = ctx.kind
        heads = _Heads(len(q), len(k))
        slopes: list[tuple[torch.Tensor, ...]] = []
        parts_of = (layout.parts(x, 1) for x in (q, k, v, grad.transpose(0, 1)))
        for block, *rows in zip(layout.blocks, *parts_of, strict=True):
            qs, ks, vs = heads.queries(rows[0], block), heads.keys(rows[1], block), heads.keys(rows[2], block)
            do, found = heads.queries(rows[3], block), []
            bias = _bias(layout, block, kind, q.device)
            for part in _parts(block, len(ks), kind):
                if _is_kept(block, kind):
                    weights, slope, mask, *kept = kept
                else:
                    (weights, slope), mask = kind.weights(_at(qs, part), _at(ks, part), bias), None
                used = weights if mask is None else weights * mask
                dp = torch.bmm(_at(do, part), _at(vs, part).transpose(1, 2))
                ds, scale = kind.slopes(dp if mask is None else dp * mask, weights, slope)
                found.append(
                    (_product(ds, _at(ks, part), scale), _product(ds.transpose(1, 2), _at(qs, part), scale),
                     torch.bmm(used.transpose(1, 2), _at(do, part)))
                )  # fmt: skip
            dq, dk, dv = (_together(each) for each in zip(*found, strict=True))
            slopes.append((heads.rows(dq, block), heads.key_rows(dk, block), heads.key_rows(dv, block)))
        return (*(layout.joined(each, 1) for each in zip(*slopes, strict=True)), None, None)


def _together(found: Sequence[torch.Tensor]) -> torch.Tensor:
    return found[0] if len(found) == 1 else torch.cat(list(found))


def _is_kept(block: Block, kind: _Kind) -> bool:
    return block.width <= _SHORT or kind.dropout > 0


def _parts(block: Block, matrices: int, kind: _Kind) -> list[slice | None]:
    """Return which matrices to compute at a time: all (None) of short records, one of a long one."""
    return [None] if _is_kept(block, kind) else [slice(index, index + 1) for index in range(matrices)]


def _at(x: torch.Tensor, part: slice | None) -> torch.Tensor:
    return x if part is None else x[part]


def _bias(layout: Layout, block: Block, kind: _Kind, device: torch.device) -> torch.Tensor | None:
    """Return a block's bias [records, 1, width, width]; None for one record all of whose rows attend to all.

    Of several records, none decides how the others are computed.
    """
    if block.lengths == (block.width,) and not kind.causal and kind.window is None:
        return None
    return layout.bias(block, device, causal=kind.causal, window=kind.window)[:, None]


@dataclass(frozen=True)
class _Heads:
    """How [heads, rows, size] falls into one matrix for each key head and record of a block.

    With fewer key heads than query heads, the queries of all heads that share keys lie in one matrix.
    """

    queries_: int
    keys_: int

    def queries(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """Return [key heads · records, shared · width, size] of a block's x [heads, rows, size]."""
        shared, records = self.queries_ // self.keys_, len(block.lengths)
        if shared == 1 and records == 1:
            return x
        part = x.reshape(self.keys_, shared, records, block.width, x.shape[-1]).transpose(1, 2)
        return part.reshape(self.keys_ * records, shared * block.width, x.shape[-1])

    def keys(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        """Return [key heads · records, width, size] of a block's x [key heads, rows, size]."""
        return x if len(block.lengths) == 1 else x.reshape(-1, block.width, x.shape[-1])

    def rows(self, found: torch.Tensor, block: Block) -> torch.Tensor:
        """Return what `queries` took apart in the form [heads, rows, size] again."""
        shared, records = self.queries_ // self.keys_, len(block.lengths)
        if shared == 1 and records == 1:
            return found
        found = found.view(self.keys_, records, shared, block.width, -1).transpose(1, 2)
        return found.reshape(self.queries_, records * block.width, -1)

    def key_rows(self, found: torch.Tensor, block: Block) -> torch.Tensor:
        """Return what `keys` took apart in the form [key heads, rows, size] again."""
        return found if len(block.lengths) == 1 else found.view(self.keys_, -1, found.shape[-1])


AttentionInterface.register(NAME, packed_attention)
