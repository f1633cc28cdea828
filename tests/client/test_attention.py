"""Attention within records: what it computes, and that neighbours of the same width change no bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from privet.client.training.attention import packed_attention
from privet.client.training.packing import Block, Layout, Run

HEADS, KEY_HEADS, SIZE = 4, 2, 8


class Module(nn.Module):
    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal


def inputs(rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k and v as linear layers give them, [1, heads, rows, size], and a gradient of the result."""
    torch.manual_seed(0)
    counts = (HEADS, KEY_HEADS, KEY_HEADS)
    qkv = [torch.randn(rows, count * SIZE).to(dtype).view(1, rows, count, SIZE).transpose(1, 2) for count in counts]
    return [*qkv, torch.randn(1, rows, HEADS, SIZE).to(dtype)]


def run(layout: Layout, given: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Return the attention and the gradients of q, k and v, [rows, heads, size] each."""
    q, k, v, grad = [each.clone().requires_grad_() for each in given]
    causal = options.pop("causal", False)
    found, _ = packed_attention(Module(causal=causal), q, k, v, None, layout=layout, **options)
    gradients = torch.autograd.grad(found, (q, k, v), grad)
    return [found[0].detach(), *(each[0].transpose(0, 1) for each in gradients)]


def test_runs_join_blocks_of_one_width_that_touch() -> None:
    blocks = (Block(8, 16, (16,)), Block(24, 16, (9,)), Block(40, 8, (8,)), Block(56, 8, (7,)))
    layout = Layout(72, blocks)
    assert layout.runs == (
        Run(8, 16, (16, 9), blocks[:2]),
        Run(40, 8, (8,), blocks[2:3]),
        Run(56, 8, (7,), blocks[3:]),
    )
    assert layout.gaps == (slice(0, 8), slice(48, 56), slice(64, 72))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"sliding_window": 3}, {"softcap": 2.0}])
def test_each_record_attends_to_itself_alone(options: dict[str, Any]) -> None:
    layout = Layout(40, (Block(8, 8, (8,)), Block(16, 8, (5,)), Block(24, 8, (6,))))
    *qkv, grad = inputs(40, torch.float32)
    of_records = torch.zeros(40, dtype=torch.bool)
    for start, length in layout.spans:
        of_records[start : start + length] = True
    grad[:, ~of_records] = 0  # losses of padding have no weight
    found = run(layout, [*qkv, grad], **options)
    for start, length in layout.spans:
        rows = slice(start, start + length)
        q, k, v = (each[:, :, rows].clone().requires_grad_() for each in qkv)
        shared = HEADS // KEY_HEADS
        scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) * SIZE**-0.5
        if "softcap" in options:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        place = torch.arange(length)
        distance = place[:, None] - place[None]
        if options.get("causal"):
            scores = scores.masked_fill(distance < 0, float("-inf"))
        if window := options.get("sliding_window"):
            scores = scores.masked_fill(distance.abs() >= window, float("-inf"))
        out = (functional.softmax(scores, -1) @ v.repeat_interleave(shared, 1)).transpose(1, 2)
        wanted = [out[0], *(x[0].transpose(0, 1) for x in torch.autograd.grad(out, (q, k, v), grad[:, rows]))]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[rows], theirs, rtol=1e-4, atol=1e-5)
    for each in found:
        assert not each[:8].any()
        assert not each[32:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 64, 600])
def test_neighbours_of_the_same_width_change_no_bit(dtype: torch.dtype, width: int) -> None:
    rows, records = 4 * width, 3
    given = inputs(rows, dtype)
    blocks = [Block(place * width, width, (width - place,)) for place in range(records)]
    together = run(Layout(rows, tuple(blocks)), given)
    for block in blocks:
        for mine, theirs in zip(run(Layout(rows, (block,)), given), together, strict=True):
            assert torch.equal(mine[block.rows], theirs[block.rows])
