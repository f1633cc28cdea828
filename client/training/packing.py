"""Passes: records laid end to end in one of a few numbers of rows, one row a token, without padding between records.

Why: a matrix product adds up in an order that depends on its shape. Padded to the longest of a batch, a record's loss
and gradient would change in their last bits with its companions. An adapter can be chosen so that such a bit decides a
class; then one record moves the gradients of all others, and the noise no longer covers it (`docs/privacy.md`).

So passes have few shapes, and a row's result must not depend on which of them it is in, on its place, or on other rows.
That holds for the kernels of common libraries, and `privet.client.training.probe` checks it on the device in use. Where
it fails, a pass is one record at its own length.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch


class _Within(threading.local):
    """Of each thread by itself: another one may be probing a model, or be inside records of its own."""

    records = False


_within = _Within()


@contextmanager
def within_records() -> Iterator[None]:
    """Mark work on the rows of one record after another: its shapes follow from each record, and differ between them.

    `privet.client.training.probe` demands of everything else that shapes do not depend on what is in a pass.
    """
    before, _within.records = _within.records, True
    try:
        yield
    finally:
        _within.records = before


def is_within_records() -> bool:
    """Return whether the work going on is marked by `within_records`."""
    return _within.records


ALIGNMENT = 8
"""A record starts at a multiple of so many rows: vector instructions then see all records alike."""


class Lengthy(Protocol):
    """Something with tokens."""

    @property
    def ids(self) -> Sequence[int]:
        """The tokens."""


@dataclass(frozen=True)
class Shape:
    """How a host computes: the same for all of its passes.

    Attributes:
        sizes: Rows that a pass may have, ascending; a pass takes the least that hold its records. Empty: a pass is one
            record at its own length.
        together: Rows that attention takes at a time where several records of one width fit into them. Each then
            takes one launch of an accelerator less. Missing records are made up for by padding. 1: each by itself.
        alignment: Widths are multiples of this.
    """

    sizes: tuple[int, ...] = ()
    together: int = 1
    alignment: int = ALIGNMENT

    @property
    def packed(self) -> bool:
        """Whether records lie end to end."""
        return bool(self.sizes)

    def width(self, length: int) -> int:
        """Return the rows of a record of `length` tokens."""
        return -(-length // self.alignment) * self.alignment

    def group(self, width: int) -> int:
        """Return how many records of one width attention takes at a time: the width alone decides."""
        return max(1, self.together // width)


@dataclass(frozen=True)
class Block:
    """Neighbouring records of one width. Row `start + i·width` is the first of record i.

    Attributes:
        lengths: Tokens of each record; 0 for an empty place.
    """

    start: int
    width: int
    lengths: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The rows of all its records."""
        return slice(self.start, self.start + self.width * len(self.lengths))


@dataclass(frozen=True)
class Layout:
    """Where records lie in a pass of `rows` rows. Rows of no record hold padding."""

    rows: int
    blocks: tuple[Block, ...]
    _biases: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row and number of tokens of each record, in order."""
        return [
            (block.start + place * block.width, length)
            for block in self.blocks
            for place, length in enumerate(block.lengths)
            if length
        ]

    def records(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the vectors [tokens, h] of each record, in order, of the pass's rows [rows, h]."""
        sizes, reached = [], 0
        for start, length in self.spans:
            sizes += [start - reached, length]
            reached = start + length
        parts: tuple[torch.Tensor, ...] = torch.split(rows, [*sizes, self.rows - reached])
        return parts[1::2]

    def parts(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, ...]:
        """Return the rows of each block, of a tensor with the pass's rows in `axis`."""
        return torch.split(x, self._sizes, axis)[1:-1]

    def joined(self, parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """Return a tensor with the pass's rows in `axis`, of those of each block; other rows are zeros."""
        before, *_, after = self._sizes
        outside = [parts[0].new_zeros(*parts[0].shape[:axis], n, *parts[0].shape[axis + 1 :]) for n in (before, after)]
        return torch.cat([outside[0], *parts, outside[1]], axis)

    @property
    def _sizes(self) -> list[int]:
        """The number of rows before the first block, of each block, and after the last; blocks follow one another."""
        stop = self.blocks[-1].rows.stop
        return [self.blocks[0].start, *(block.rows.stop - block.start for block in self.blocks), self.rows - stop]

    def bias(self, block: Block, device: torch.device, *, causal: bool, window: int | None) -> torch.Tensor:
        """Return 0 where a token of a block's record attends, and -inf where not: [records, width, width], float32.

        Args:
            block: The block.
            device: Where the tensor is wanted.
            causal: Attend to earlier tokens and oneself only.
            window: Attend to rows nearer than this only.
        """
        key = (block.width, block.lengths, causal, window)
        if (found := self._biases.get(key)) is None:
            place = torch.arange(block.width, device=device)
            lengths = torch.tensor(block.lengths, device=device)
            distance = place[:, None] - place[None, :]
            allowed = (place < lengths[:, None])[:, None, :].expand(-1, block.width, -1)
            if causal:
                allowed = allowed & (distance >= 0)
            if window is not None:
                allowed = allowed & (distance.abs() < window)
            # Padding attends to itself as well: the softmax of nothing would be not a number.
            allowed = allowed | (distance == 0)
            found = torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, float("-inf"))
            self._biases[key] = found
        return found


@dataclass(frozen=True)
class Placed:
    """The records of one pass.

    Attributes:
        records: Index of each record, in the order of `layout.spans`.
        layout: Where they lie.
    """

    records: tuple[int, ...]
    layout: Layout


def pack(shape: Shape, features: Sequence[Lengthy], records: Sequence[int], most: int) -> Iterator[Placed]:
    """Lay records into passes, in any order: longer ones first, each into the first pass that has room.

    Args:
        shape: How the host computes.
        features: All features.
        records: Indices of those to lay out.
        most: Most records of a pass; a group of one width is never split for it.
    """
    if not shape.packed:
        yield from (alone(features, record) for record in records)
        return
    order = sorted(records, key=lambda record: (-shape.width(len(features[record].ids)), record))
    passes: list[list[list[int]]] = []
    room: list[tuple[int, int]] = []
    for group in _grouped(shape, features, order):
        rows = _rows(shape, features, group)
        for index, (free, places) in enumerate(room):
            if rows <= free and len(group) <= places:
                passes[index].append(group)
                room[index] = free - rows, places - len(group)
                break
        else:
            passes.append([group])
            room.append((shape.sizes[-1] - rows, most - len(group)))
    for groups in passes:
        yield place(shape, features, groups)


def pack_in_order(shape: Shape, features: Sequence[Lengthy], records: Sequence[int], most: int) -> Iterator[Placed]:
    """Lay records into passes without changing their order. Arguments as `pack`."""
    if not shape.packed:
        yield from (alone(features, record) for record in records)
        return
    groups: list[list[int]] = []
    used = 0
    for record in records:
        rows = _rows(shape, features, [record])
        if groups and (used + rows > shape.sizes[-1] or len(groups) >= most):
            yield place(shape, features, groups)
            groups, used = [], 0
        groups.append([record])
        used += rows
    if groups:
        yield place(shape, features, groups)


def alone(features: Sequence[Lengthy], record: int) -> Placed:
    """Return a pass of one record at its own length."""
    length = len(features[record].ids)
    return Placed((record,), Layout(length, (Block(0, length, (length,)),)))


def _rows(shape: Shape, features: Sequence[Lengthy], group: Sequence[int]) -> int:
    """Return the rows of a group of records of one width, with those that make up for missing records."""
    width = shape.width(len(features[group[0]].ids))
    return width * shape.group(width)


def _grouped(shape: Shape, features: Sequence[Lengthy], order: Sequence[int]) -> Iterator[list[int]]:
    """Yield groups of records of one width, from records sorted by width."""
    for width, records in groupby(order, key=lambda record: shape.width(len(features[record].ids))):
        same, size = list(records), shape.group(width)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def place(
    shape: Shape, features: Sequence[Lengthy], groups: Sequence[Sequence[int]], start: int = 0, size: int | None = None
) -> Placed:
    """Lay groups of records into one packed pass, in this order.

    Args:
        shape: How the host computes.
        features: All features.
        groups: Records of one width each, at most `shape.group`.
        start: First row of the first group, a multiple of the alignment.
        size: Rows of the pass; None: the least that hold the groups.
    """
    blocks = []
    for group in groups:
        lengths = [len(features[record].ids) for record in group]
        width = shape.width(lengths[0])
        block = Block(start, width, (*lengths, *[0] * (shape.group(width) - len(group))))
        blocks.append(block)
        start = block.rows.stop
    rows = size or next(size for size in shape.sizes if size >= start)
    return Placed(tuple(record for group in groups for record in group), Layout(rows, tuple(blocks)))
