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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from privet.client.training.packing import Block, Layout, Run, within_records
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
        found: torch.Tensor = _PackedAttention.apply(query.squeeze(0), key.squeeze(0), value.squeeze(0), layout, kind)  # type: ignore[no-untyped-call]
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
            query: [matrices, shared · width, size], multiplied by `scale`.
            key: [matrices, width, size].
            bias: [records, width, width]; records are the first part of the axis of matrices. None: zeros.
        """
        scores = torch.bmm(query, key.transpose(1, 2)).float()
        slope = None
        if self.softcap is not None:
            scores = torch.tanh_(scores.div_(self.softcap))
            slope = 1 - scores.square()
            scores = scores.mul_(self.softcap)
        if bias is not None:
            width = key.shape[1]
            scores.view(len(bias), -1, width, width).add_(bias[:, None])
        return torch.softmax(scores, -1).to(key.dtype), slope


class _PackedAttention(torch.autograd.Function):
    """softmax(s q kᵀ) v of each record, for q [heads, rows, size] and k, v [key heads, rows, size].

    Weights of short records are kept for the backward pass. Those of long ones are computed again, one key head at a
    time, as they grow with the square of the length.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, kind: _Kind
    ) -> torch.Tensor:
        out = v.new_empty(q.shape[1], len(q), v.shape[-1]).transpose(0, 1)
        kept: list[torch.Tensor | None] = []
        for run in layout.runs:
            qs, ks, vs = (_apart(x, run, len(k)) for x in (q, k, v))
            qs.mul_(kind.scale)
            found = vs.new_empty(*qs.shape[:2], vs.shape[-1])
            kept += [qs, ks, vs]
            for part, bias in _parts(layout, run, kind, ks):
                weights, slope = kind.weights(qs[part], ks[part], bias)
                mask = None
                if kind.dropout:
                    mask = torch.empty_like(weights).bernoulli_(1 - kind.dropout).div_(1 - kind.dropout)
                torch.bmm(weights if mask is None else weights * mask, vs[part], out=found[part])
                kept += [weights, slope, mask] if _is_kept(run, kind) else []
            _put(out, run, found, len(k))
        _clear_padding(layout, out)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.kind, ctx.heads = layout, kind, (len(q), len(k))
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        kept, kind, (heads, key_heads) = iter(ctx.saved_tensors), ctx.kind, ctx.heads
        rows = len(grad)
        grad = grad.transpose(0, 1)
        into: list[torch.Tensor] = []
        for run in ctx.layout.runs:
            qs, ks, vs = (next(kept) for _ in range(3))
            do = _apart(grad, run, key_heads)
            dq, dk, dv = (torch.empty_like(x) for x in (qs, ks, vs))
            for part, bias in _parts(ctx.layout, run, kind, ks):
                if _is_kept(run, kind):
                    weights, slope, mask = (next(kept) for _ in range(3))
                else:
                    (weights, slope), mask = kind.weights(qs[part], ks[part], bias), None
                dp = torch.bmm(do[part], vs[part].transpose(1, 2))
                dp = dp if mask is None else dp * mask
                # Computed in float32 and rounded once, whatever the type of what goes in.
                ds = torch._softmax_backward_data(dp, weights, -1, dp.dtype)
                ds = ds if slope is None else ds.mul_(slope)
                torch.bmm(ds, ks[part], out=dq[part])
                torch.bmm(ds.transpose(1, 2), qs[part], out=dk[part])
                used = weights if mask is None else weights * mask
                torch.bmm(used.transpose(1, 2), do[part], out=dv[part])
            dq.mul_(kind.scale)
            found = ((dq, heads), (dk, key_heads), (dv, key_heads))
            into = into or [x.new_empty(rows, count, x.shape[-1]).transpose(0, 1) for x, count in found]
            for each, (x, _) in zip(into, found, strict=True):
                _put(each, run, x, key_heads)
        for each in into:
            _clear_padding(ctx.layout, each)
        return *into, None, None


def _is_kept(block: Block, kind: _Kind) -> bool:
    return block.width <= _SHORT or kind.dropout > 0


def _parts(layout: Layout, run: Run, kind: _Kind, keys: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield which matrices of a run to compute at a time, with their bias.

    These are all of a block of short records, and one of a long one. A product's shape thus never depends on the run.
    """
    heads = len(keys) // len(run.lengths)
    first = 0
    for block in run.blocks:
        bias = layout.bias(block, keys.device, causal=kind.causal, window=kind.window)
        last = first + heads * len(block.lengths)
        step = last - first if _is_kept(run, kind) else 1
        for start in range(first, last, step):
            yield slice(start, start + step), bias
        first = last


def _apart(x: torch.Tensor, run: Run, keys: int) -> torch.Tensor:
    """Return a copy of a run's rows, of [heads, rows, size]: [records · key heads, shared · width, size].

    It is one matrix for each record and key head. With fewer key heads than query heads, the queries of all heads that
    share keys lie in one matrix.
    """
    found = x[:, run.rows].view(keys, -1, len(run.lengths), run.width, x.shape[-1]).permute(2, 0, 1, 3, 4)
    return found.clone(memory_format=torch.contiguous_format).view(-1, found.shape[2] * run.width, x.shape[-1])


def _put(into: torch.Tensor, run: Run, found: torch.Tensor, keys: int) -> None:
    """Write what `_apart` took apart into its rows of [heads, rows, size]."""
    rows = into[:, run.rows].view(keys, -1, len(run.lengths), run.width, found.shape[-1])
    rows.copy_(found.view(len(run.lengths), keys, -1, run.width, found.shape[-1]).permute(1, 2, 0, 3, 4))


def _clear_padding(layout: Layout, x: torch.Tensor) -> None:
    """Write zeros into the rows of [heads, rows, size] that belong to no record."""
    for rows in layout.gaps:
        x[:, rows] = 0


AttentionInterface.register(NAME, packed_attention)
