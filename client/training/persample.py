"""Per-sample gradients of LoRA and linear layers, written into one flat buffer by their own backward pass.

For y = W x + b at every position t of record i, the gradient of record i's loss is dW_i = Σ_t dy_it x_itᵀ and
db_i = Σ_t dy_it (Goodfellow 2015, arXiv:1510.01799). Autograd computes the sum over records instead, and hooks
compute that sum and the parts. Here the backward pass writes the parts and returns nothing for the weights,
so the sum is never computed. While the context is open, each trained layer has a `forward` of this module.

It fails closed. A parameter that no layer here owns is refused at the start. A parameter without a gradient, or with
one from outside these layers, is refused when gradients are taken. One case is not detected: a layer whose first axis
has the batch's length but is not the records, such as tokens routed to an expert.

The buffer takes 4·n·P bytes for n records of a physical batch and P trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from privet.common.errors import StateError

Forward = Callable[..., torch.Tensor]
Rule = Callable[[Any, "FlatGradients"], Forward]


def check_widths(widths: set[int], records: int) -> None:
    """Check that trained layers computed on the batch's records and on nothing else.

    Raises:
        StateError: A layer computed on another number of rows: records would share a gradient.
    """
    if widths - {records}:
        raise StateError(
            "a trained layer computes on something other than the batch's records, so its gradients cannot be "
            "separated by record",
            "train other layers (lora.targets in the study), or choose a base model without shared relative positions",
        )


class FlatGradients:
    """Per-sample gradients of one backward pass: [n, P] in float32, parameter beside parameter."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self._index = {id(parameter): index for index, parameter in enumerate(trained)}
        self._sizes = [parameter.numel() for parameter in trained]
        self._buffer: torch.Tensor | None = None
        self._slots: tuple[torch.Tensor, ...] = ()
        self._written: set[int] = set()
        self._widths: set[int] = set()

    def wants(self, parameter: torch.Tensor | None) -> bool:
        """Return whether the gradients of this parameter are collected."""
        return id(parameter) in self._index

    def put(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add the gradients [n, *shape] of one call of a layer: a layer called twice is summed per record."""
        if self._buffer is None:
            self._buffer = torch.empty(len(gradient), sum(self._sizes), device=gradient.device)
            self._slots = torch.split(self._buffer, self._sizes, dim=1)
        self._widths.add(len(gradient))
        if len(gradient) != len(self._buffer):
            return  # `take` refuses the batch
        slot = self._slots[self._index[id(parameter)]].view(gradient.shape)
        if id(parameter) in self._written:
            slot.add_(gradient)
        else:
            slot.copy_(gradient)
            self._written.add(id(parameter))

    def take(self, records: int) -> list[torch.Tensor]:
        """Return the gradients as one block [records, P], and forget them. Call it after each backward pass.

        Raises:
            StateError: A parameter has none or one that is not per sample, or for another number of records.
        """
        # Forgotten before anything is checked: an error must not leave gradients for the next batch.
        buffer, widths, written = self._buffer, self._widths, self._written
        self._buffer, self._slots, self._widths, self._written = None, (), set(), set()
        check_widths(widths, records)
        for parameter in self._trained:
            if parameter.grad is not None or id(parameter) not in written:
                raise StateError(
                    f"a trained parameter of shape {list(parameter.shape)} has no per-sample gradient (one gradient "
                    "for each record)",
                    "train other layers (lora.targets): each trained layer must be called in every forward pass",
                )
        return [] if buffer is None else [buffer]


def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return Σ_t left_it right_itᵀ of each record i, [n, a, b], for inputs [n, ..., a] and [n, ..., b]."""
    if left.dim() != 3:
        left, right = left.reshape(len(left), -1, left.shape[-1]), right.reshape(len(right), -1, right.shape[-1])
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right)
    # The thinner factor goes first: on CPUs, the other order takes four to eight times as long.
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
            collected.put(layer.weight, outer(dy, x))
        if collected.wants(layer.bias):
            collected.put(layer.bias, dy.reshape(len(dy), -1, dy.shape[-1]).sum(1, dtype=torch.float32))
        dx = dy @ layer.weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


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
            collected.put(b, outer(inner, h * ctx.scale))
        dh = inner @ scaled
        if collected.wants(a):
            collected.put(a, outer(dh, x))
        dx = dh @ down if ctx.needs_input_grad[1] else None
        return dy, dx, None, None, None, None


def _computing(x: torch.Tensor, otherwise: torch.dtype) -> torch.Tensor:
    """Return x in autocast's type where autocast is on, and else in `otherwise`."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise)


def _linear_forward(layer: nn.Linear, collected: FlatGradients) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x = _computing(x, x.dtype)
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
        x = _computing(dropout(x), a.dtype)
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
