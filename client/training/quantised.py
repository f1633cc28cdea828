"""Frozen linear layers in four or eight bits: a large base fits a small accelerator.

A layer keeps integers and scales, and computes with the values that these stand for. Those are a fixed function of the
base's files, in float32 operations that IEEE 754 defines to the last bit. So every machine has the same ones, and a
study pins their digest (`model.quantised`). Head, embeddings, norms and adapters stay as they are.

nf4: blocks of 64 values. A value is the nearest of 16 quantiles of a normal distribution, times the largest absolute
value of its block (Dettmers et al. 2023, arXiv:2305.14314, section 3). It takes 4.5 bits. The bytes are those of
`bitsandbytes` without double quantisation. int8: a value is an integer from -127 to 127, times a scale of its row
(Dettmers et al. 2022, arXiv:2208.07339, section 2.1). It takes 8 bits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from privet.client.bases.opened import open_base
from privet.client.training.architecture import load_text_model
from privet.client.training.persample import computing, rows_apart
from privet.common.errors import StudyError, VerificationError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.study.sections import ModelSection, Quantisation

BLOCK = 64
"""Values that share a scale under nf4."""
# Appendix E of the paper, in float32.
_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Values that are computed at once, a multiple of a block: what float32 takes of them stays small beside a layer.
_PART = 2**18
# What follows is the name of a layer in the first numbered list of layers. What comes before depends on the task.
_NUMBERED = re.compile(r"(?:.*?\.)??(?P<name>[^.]+\.\d+\..+)")


class QuantisedLinear(nn.Linear):
    """y = x Wᵀ + b with a frozen W [out, in] that is kept in few bits.

    Each pass computes the values of W anew, forwards and backwards, and forgets them.
    """

    packed: torch.Tensor
    """nf4: two values a byte, the first in the high bits, [blocks, 32] uint8. int8: [out, in]."""
    bits: torch.Tensor
    """The scales as float32 bit patterns, [blocks] or [out] int32: a change of the model's type must not round them."""

    def __init__(self, linear: nn.Linear, kind: Quantisation) -> None:
        """Quantise a layer. The layer itself stays as it is."""
        nn.Module.__init__(self)  # without a weight
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        packed, scales = (_to_nf4 if kind == "nf4" else _to_int8)(linear.weight.detach().float().cpu())
        self.register_buffer("packed", packed)
        self.register_buffer("bits", scales.view(torch.int32))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The values of W [out, in] in float32, computed anew."""
        return self.values(torch.float32)

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of W [out, in], rounded to a type."""
        found = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.packed.device)
        scales = self.bits.view(torch.float32)
        if self.kind == "int8":
            rows = max(1, _PART // self.in_features)
            for part, packed, scale in zip(
                _parts(found, rows), _parts(self.packed, rows), _parts(scales, rows), strict=True
            ):
                torch.mul(packed, scale[:, None], out=part)
            return found
        pairs, flat = _pairs(self.packed.device), found.view(-1)
        for number, (packed, scale) in enumerate(
            zip(_parts(self.packed, _PART // BLOCK), _parts(scales, _PART // BLOCK), strict=True)
        ):
            codes = functional.embedding(packed.int(), pairs).view(torch.float32).view(-1, BLOCK)
            part = flat[number * _PART : number * _PART + codes.numel()]
            if len(part) == codes.numel():
                torch.mul(codes, scale[:, None], out=part.view(-1, BLOCK))
            else:  # the last block is not full
                part.copy_((codes * scale[:, None]).view(-1)[: len(part)])
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., out] of x [..., in]."""
        found: torch.Tensor = _Product.apply(computing(x, x.dtype), self)  # type: ignore[no-untyped-call]
        return found

    def plain(self) -> nn.Linear:
        """Return an ordinary layer with the same values, in float32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = self.bias
        return layer

    def extra_repr(self) -> str:
        """Return what the layer is, as PyTorch prints it."""
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """x Wᵀ + b, without a copy of W kept for the way back: all layers' copies would take more than the base saves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        bias = layer.bias
        return functional.linear(x, layer.values(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows_apart(dy, ctx.layer.values(dy.dtype)), None


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two codes of each byte, [256, 1] int64: one look-up gives two float32 values."""
    codes, places = torch.tensor(_CODES), torch.arange(256)
    return torch.stack([codes[places >> 4], codes[places & 15]], 1).view(torch.int64).to(device)


def _parts(tensor: torch.Tensor, rows: int) -> Sequence[torch.Tensor]:
    return torch.split(tensor, rows)


def _to_nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes [blocks, 32] and scales [blocks] of float32 values; the last block is filled up with zeros."""
    codes, flat = torch.tensor(_CODES), values.reshape(-1)
    middles = (codes[1:] + codes[:-1]) / 2
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8)
    at_once = _PART // BLOCK
    for out, block, scale in zip(
        _parts(packed, at_once), _parts(blocks, at_once), _parts(scales, at_once), strict=True
    ):
        # A block of zeros has the scale 0, and each code then stands for 0.
        relative = block / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        places = torch.zeros(block.shape, dtype=torch.uint8)
        for middle in middles:  # three times as fast as a search in the sorted middles
            places += relative > middle
        out.copy_(places[:, 0::2] << 4 | places[:, 1::2])
    return packed, scales


def _to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers [out, in] and scales [out] of float32 values."""
    scales = values.abs().amax(1) / 127
    safe = scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (values / safe).round_().clamp_(-127, 127).to(torch.int8), scales


def load_quantised(
    base: Path, task: str, dropout: float, attention: str, dtype: torch.dtype, kind: Quantisation, expected: str
) -> tuple[nn.Module, list[str]]:
    """Load a verified base's text model as `load_text_model` does, and quantise it.

    Args:
        base: The directory.
        task: Kind of task.
        dropout: Rate of every dropout.
        attention: Attention to use where the family offers it.
        dtype: Of the weights that are not quantised.
        kind: Number format.
        expected: Digest of the quantised layers; empty where it is to be found out.

    Raises:
        StudyError: The model cannot be loaded, or cannot be quantised.
        VerificationError: The digest is another one.
    """
    # In the files' own type: in another one, the layers would be rounded before they are quantised.
    loaded, missing = load_text_model(base, task, dropout, attention, None)
    found = quantise(loaded, kind)
    if expected and found != expected:
        raise VerificationError(
            f"model.quantised: expected SHA-256 {expected} of the base's layers in {kind}, found {found}",
            f"run `privet base DIRECTORY --quantisation {kind}` on the base's directory, and paste the table into the "
            "study; if it prints the expected value, this installation loads the files in another way",
        )
    exact = getattr(loaded, "_keep_in_fp32_modules", None) or ()
    for name, parameter in loaded.named_parameters():
        if parameter.is_floating_point() and not any(each in name for each in exact):
            parameter.data = parameter.data.to(dtype)
    return loaded, missing


def quantised_digest(directory: Path, pins: Mapping[str, str], kind: Quantisation) -> str:
    """Return the digest of a base's quantised layers.

    Args:
        directory: The base's directory.
        pins: SHA-256 of its files.
        kind: Number format.

    Raises:
        StudyError, RefusedError, VerificationError: As `open_base` and `load_quantised`.
    """
    path = directory.resolve()
    opened = open_base(ModelSection(base=path.name, sha256=dict(pins)), {path.name: path})
    with quiet_warnings():
        # Whatever the task: it decides what is around the layers, and not their names in the digest.
        model, _ = load_text_model(opened, "text-classification", 0.0, "eager", None)
    return quantise(model, kind)


def quantise(model: nn.Module, kind: Quantisation) -> str:
    """Replace the linear layers in a model's numbered layers, one after the other, and return the result's digest.

    Args:
        model: A base, without adapters, on the CPU.
        kind: The number format.

    Returns:
        SHA-256 in hexadecimal over each layer by name: its name within the list of layers, shape, integers and scales.

    Raises:
        StudyError: The model has no such layers, or one with a value that is not finite.
    """
    found: dict[str, QuantisedLinear] = {}
    for name, module in list(model.named_modules()):
        numbered = _NUMBERED.fullmatch(name)
        # Exact types: a subclass may compute something else.
        if numbered is None or type(module) is not nn.Linear:
            continue
        if not bool(torch.isfinite(module.weight).all()):
            raise StudyError(
                f"model.quantisation: the layer {name} of the base model has values that are not finite",
                "copy the model again, or remove model.quantisation and model.quantised from the study",
            )
        layer = QuantisedLinear(module, kind)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
        if found.setdefault(numbered["name"], layer) is not layer:
            raise _unsuited(f"two of its layers have the name {numbered['name']}")
    if not found:
        raise _unsuited("it has no linear layers that are numbered by layer")
    return _digest(kind, found)


def _digest(kind: Quantisation, layers: dict[str, QuantisedLinear]) -> str:
    counted = hashlib.sha256(f"privet quantised base 1 {kind}\n".encode())
    for name, layer in sorted(layers.items()):
        counted.update(f"{name} {layer.out_features} {layer.in_features}\n".encode())
        for tensor in (layer.packed, layer.bits):
            counted.update(tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
    return counted.hexdigest()


def _unsuited(why: str) -> StudyError:
    return StudyError(
        f"model.quantisation: the base model cannot be quantised: {why}",
        "remove model.quantisation and model.quantised from the study, or choose another base model",
    )


def values_of(model: nn.Module) -> int:
    """Return the number of values of a model: of its parameters, and of its quantised layers."""
    layers = (module for module in model.modules() if isinstance(module, QuantisedLinear))
    return sum(each.numel() for each in model.parameters()) + sum(x.in_features * x.out_features for x in layers)


def dequantise(model: nn.Module) -> None:
    """Put ordinary layers with the same values, in float32, in place of a model's quantised ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                setattr(parent, name, child.plain())
