"""Per-sample gradients of LoRA and linear layers, written into one flat buffer by their own backward pass.

For y = W x + b at every position t of record i, the gradient of record i's loss is dW_i = Σ_t dy_it x_itᵀ and
db_i = Σ_t dy_it (Goodfellow 2015, arXiv:1510.01799). Autograd computes the sum over records instead, and hooks
compute that sum and the parts. Here the backward pass writes the parts and returns nothing for the weights,
so the sum is never computed. While the context is open, each trained layer has a `forward` of this module.

The rows of a record lie together in a pass (`privet.client.training.packing`). Its part is a product of its own rows,
in shapes that follow from its own length, so no other record changes a bit of it.

It fails closed. A parameter that no layer here owns is not taken at all (`find_rules`). A parameter without a gradient,
or with one from outside these layers, or a layer that computed on other rows than the pass has, is refused when
gradients are taken. `privet.client.training.probe` compares with the gradients of records alone, by autograd.

The buffer takes 4·n·P bytes for n records of a pass and P trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from privet.client.training.packing import Block, Layout
from privet.common.errors import StateError

Forward = Callable[..., torch.Tensor]
Rule = Callable[[Any, "FlatGradients"], Forward]


class PerSampleGradients(Protocol):
    """The per-sample gradients of one pass at a time."""

    def begin(self, layout: Layout) -> None:
        """Say where the records of the next forward pass lie."""

    def take(self) -> torch.Tensor:
        """Return the gradients [records, P] of the pass in float32, parameter beside parameter, and forget them.

        Raises:
            StateError: A parameter has none, or one of other rows than the pass has: something trained unseen.
        """


def flat_gradient(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the gradients that autograd left, one behind the other, [P] in float32; zeros where it left none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.flatten().float() for part in parts])


class SingleGradients:
    """The gradients of passes of one record each: autograd's sum over records is then the record's own."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained

    def begin(self, layout: Layout) -> None:
        """Check that the pass is one record. See `PerSampleGradients`."""
        if len(layout.spans) != 1:
            raise StateError(
                f"a pass without per-sample gradients must be one record, got {len(layout.spans)}",
                "report this as a bug",
            )
        for parameter in self._trained:
            parameter.grad = None

    def take(self) -> torch.Tensor:
        """Return the gradients [1, P]. See `PerSampleGradients`."""
        taken = flat_gradient(self._trained).unsqueeze(0)
        for parameter in self._trained:
            parameter.grad = None
        return taken


class FlatGradients:
    """Per-sample gradients of one pass: [n, P] in float32, parameter beside parameter."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self._index = {id(parameter): index for index, parameter in enumerate(trained)}
        self._sizes = [parameter.numel() for parameter in trained]
        self._layout: Layout | None = None
        self._buffer = torch.empty(0)
        self._slots: tuple[torch.Tensor, ...] = ()
        self._written: set[int] = set()
        self._foreign = False

    def wants(self, parameter: torch.Tensor | None) -> bool:
        """Return whether the gradients of this parameter are collected."""
        return id(parameter) in self._index

    def begin(self, layout: Layout) -> None:
        """Say where the records of the next forward pass lie. See `PerSampleGradients`."""
        self._layout, self._written, self._foreign = layout, set(), False
        self._slots = ()

    def put(self, parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        """Add each record's Σ_t left_t right_tᵀ, or Σ_t left_t, over its rows: a layer called twice is summed.

        Args:
            parameter: [a, b], or [a] without `right`.
            left: [..., a], with as many rows in all as the pass has.
            right: [..., b], likewise.
        """
        layout = self._layout
        left = left.reshape(-1, left.shape[-1])
        right = None if right is None else right.reshape(-1, right.shape[-1])
        if layout is None or len(left) != layout.rows:
            self._foreign = True  # `take` refuses the pass
            return
        if not self._slots:
            self._buffer = torch.empty(len(layout.spans), sum(self._sizes), device=left.device)
            self._slots = torch.split(self._buffer, self._sizes, dim=1)
        slot = self._slots[self._index[id(parameter)]].view(-1, *parameter.shape)
        again = id(parameter) in self._written
        self._written.add(id(parameter))
        if left.device.type == "cpu":
            # Faster than in bfloat16, whose small products cost more to set up than to compute.
            left, right = left.float(), None if right is None else right.float()
        lefts = layout.parts(left, 0)
        rights = [None] * len(lefts) if right is None else layout.parts(right, 0)
        sizes = [sum(1 for length in block.lengths if length) for block in layout.blocks]  # empty places come last
        for block, mine, theirs, into in zip(layout.blocks, lefts, rights, torch.split(slot, sizes), strict=True):
            found = _per_record(block, mine, theirs)
            found = found if len(found) == len(into) else found[: len(into)]
            into.add_(found) if again else into.copy_(found)

    def take(self) -> torch.Tensor:
        """Return the gradients, and forget them. See `PerSampleGradients`."""
        # Forgotten before anything is checked: an error must not leave gradients for the next pass.
        buffer, written, foreign = self._buffer, self._written, self._foreign
        self._layout, self._slots, self._written, self._foreign = None, (), set(), False
        self._buffer = torch.empty(0)
        if foreign:
            raise StateError(
                "a trained layer computes on something other than the rows of the pass, so its gradients cannot be "
                "separated by record",
                "train other layers (lora.targets in the study)",
            )
        for parameter in self._trained:
            if parameter.grad is not None or id(parameter) not in written:
                raise StateError(
                    f"a trained parameter of shape {list(parameter.shape)} has no per-sample gradient (one gradient "
                    "for each record)",
                    "train other layers (lora.targets): each trained layer must be called in every forward pass",
                )
        return buffer


def _per_record(block: Block, mine: torch.Tensor, theirs: torch.Tensor | None) -> torch.Tensor:
    """Return Σ_t left_t right_tᵀ [records, a, b], or Σ_t left_t [records, a] in float32, of a block's rows."""
    count = len(block.lengths)
    if theirs is None:
        return mine.view(count, block.width, -1).sum(1, dtype=torch.float32)
    if count > 1:
        return outer(mine.view(count, block.width, -1), theirs.view(count, block.width, -1))
    # The thinner factor goes first: on CPUs, the other order takes two to eight times as long.
    thin = mine.shape[1] <= theirs.shape[1]
    return (torch.mm(mine.t(), theirs) if thin else torch.mm(theirs.t(), mine).t()).unsqueeze(0)


def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return Σ_t left_it right_itᵀ of each record i, [n, a, b], for inputs [n, t, a] and [n, t, b]."""
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right)
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2)


class _LinearCall(torch.autograd.Function):
    """y = x Wᵀ + b for x [n, ..., in], y [n, ..., out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear, collected: FlatGradients, *_: Any) -> torch.Tensor:
        ctx.save_for_backward(x if collected.wants(layer.weight) else None)
        ctx.layer, ctx.collected = layer, collected
        return functional.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (x,), layer, collected = ctx.saved_tensors, ctx.layer, ctx.collected
        if collected.wants(layer.weight):
            collected.put(layer.weight, dy, x)
        if collected.wants(layer.bias):
            collected.put(layer.bias, dy)
        dx = rows_apart(dy, layer.weight.to(dy.dtype)) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def rows_apart(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right, such that no value of a row of `left` reaches another row (docs/privacy.md, overflow).

    The probe would refuse many a head otherwise, on processors with AMX: they read a row in parts of 32 values, and a
    last part that is shorter may be read on into the next row. Measured: of up to 32 values, only odd numbers are.
    """
    values = left.shape[-1]
    short = -values % 32 if values > 32 else values % 2
    if short and left.dtype == torch.bfloat16 and left.device.type == "cpu":
        left, right = functional.pad(left, (0, short)), functional.pad(right, (0, 0, 0, short))
    return left @ right


class _LoraCall(torch.autograd.Function):
    """y = base + s B(A x) for x [n, ..., in], base and y [n, ..., out]."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, scale: float, collected: FlatGradients, *factors: nn.Parameter
    ) -> torch.Tensor:
        a, b = factors  # [r, in], [out, r]
        down = a.to(x.dtype)
        h = functional.linear(x, down)  # [n, ..., r]
        ctx.save_for_backward(x if collected.wants(a) else None, h)
        # The scale is applied to the small factor, and the sum is part of the product: two passes over y less each way.
        scaled = (b * scale).to(h.dtype)
        # The factors themselves and not saved tensors: under checkpointing those are other objects later, and
        # `collected` finds a parameter by its identity.
        ctx.factors, ctx.rounded, ctx.scale, ctx.collected = factors, (down, scaled), scale, collected
        y = torch.addmm(base.to(h.dtype).reshape(-1, len(b)), h.reshape(-1, len(a)), scaled.t())
        return y.view(base.shape).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (x, h), (a, b), (down, scaled), collected = ctx.saved_tensors, ctx.factors, ctx.rounded, ctx.collected
        inner = dy.to(h.dtype)
        if collected.wants(b):
            collected.put(b, inner, h * ctx.scale)
        dh = inner @ scaled
        if collected.wants(a):
            collected.put(a, dh, x)
        dx = dh @ down if ctx.needs_input_grad[1] else None
        return dy, dx, None, None, None, None


def computing(x: torch.Tensor, otherwise: torch.dtype) -> torch.Tensor:
    """Return x in autocast's type where autocast is on, and else in `otherwise`."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise)


def _linear_forward(layer: nn.Linear, collected: FlatGradients) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x = computing(x, x.dtype)
        # Weight and bias are arguments, so that autograd calls `backward` also where x needs no gradient.
        found: torch.Tensor = _LinearCall.apply(x, layer, collected, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return found

    return forward


def _lora_forward(layer: Any, collected: FlatGradients) -> Forward:
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    frozen, dropout, scale = layer.base_layer, layer.lora_dropout[name], layer.scaling[name]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A call that is not the plain computation takes PEFT's own path; `take` then finds no gradient and refuses.
        if args or kwargs or layer.disable_adapters or layer.merged:
            return LoraLinear.forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        base = frozen(x)
        x = computing(dropout(x), a.dtype)
        found: torch.Tensor = _LoraCall.apply(base, x, scale, collected, a, b)  # type: ignore[no-untyped-call]
        return found

    return forward


def _plain_factors(module: Any) -> tuple[nn.Linear, nn.Linear] | None:
    """Return A and B of a LoRA layer that computes W x + s B(A(dropout(x))) and nothing else."""
    if type(module) is not LoraLinear or len(module.active_adapters) != 1:
        return None
    (name,) = module.active_adapters
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return None
    return module.lora_A[name], module.lora_B[name]


def find_rules(model: nn.Module, trained: Sequence[nn.Parameter]) -> list[tuple[nn.Module, Rule]] | None:
    """Return each layer to watch with its rule, or None where a layer that owns a trained parameter has none."""
    wanted = {id(parameter) for parameter in trained}
    rules: list[tuple[nn.Module, Rule]] = []
    owned: set[int] = set()
    inside: set[int] = set()
    for module in model.modules():  # a LoRA layer comes before its factors
        factors = _plain_factors(module)
        owners = [module] if factors is None else list(factors)
        mine = {id(p) for owner in owners for p in owner.parameters(recurse=False)} & wanted
        if not mine or id(module) in inside:
            continue
        # Exact types: a subclass, or a module with a replaced `forward`, may compute something else.
        if "forward" in vars(module) or (factors is None and type(module) is not nn.Linear):
            return None
        rules.append((module, _linear_forward if factors is None else _lora_forward))
        inside |= {id(factor) for factor in factors or ()}
        owned |= mine
    return rules if owned == wanted else None


@contextmanager
def flat_gradients(rules: Sequence[tuple[nn.Module, Rule]], trained: Sequence[nn.Parameter]) -> Iterator[FlatGradients]:
    """Collect per-sample gradients of `trained` by the rules of `find_rules`, inside the context."""
    collected = FlatGradients(trained)
    forwards = [(layer, rule(layer, collected)) for layer, rule in rules]
    for layer, forward in forwards:
        vars(layer)["forward"] = forward
    try:
        yield collected
    finally:
        for layer, _ in forwards:
            del vars(layer)["forward"]
