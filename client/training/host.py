"""The base with its adapter, loaded once and shared by everything in the process."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from privet.client.training.attention import NAME
from privet.client.training.features import Pair
from privet.client.training.meter import Meter
from privet.client.training.packing import Shape
from privet.client.training.quantised import values_of
from privet.client.training.vocabulary import Vocabulary
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec

# In names of the base's own values of a module that is trained in full.
_OWN = ".original_module."


@dataclass
class ModelHost:
    """A loaded base with one mounted adapter, its tokenizer and its device.

    Sites in one process share a host, because only adapter values differ between them. Use it under `lock`.

    Attributes:
        kind: Kind of task.
        dropout: Whether training applies dropout.
        shape: The shape of passes: packed, or one record at a time. `privet.client.training.probe` has checked it.
        threads: CPU threads of a packed pass, no more and no fewer; None leaves the number as it is.
        first_position: Position number of a record's first token.
        verdict: Why passes are not packed, in words; empty if they are.
        beta: Of preference tuning; None for other tasks.
        vocabulary: The last layer of a language model, where losses take it in parts; None where logits are whole.
        meter: What training takes; it stays at the site.
        kept: The last whole adapter that a round started from, by the study's digest, where no round changes all of it
            (`client.rounds.received`).
        starts: Adapters that studies start from, by seed, where they take time to compute.
        references: What the base makes of pairs, as far as known; it stays at the site (`client.training.preference`).
    """

    model: PeftModel
    tokenizer: Any
    device: torch.device
    autocast: torch.dtype | None
    spec: AdapterSpec
    parameters: Mapping[str, nn.Parameter]
    kind: str
    dropout: bool
    shape: Shape
    threads: int | None = None
    first_position: int = 0
    verdict: str = ""
    beta: float | None = None
    vocabulary: Vocabulary | None = None
    meter: Meter = field(default_factory=Meter)
    kept: dict[str, bytes] = field(default_factory=dict, repr=False)
    starts: dict[int, Adapter] = field(default_factory=dict, repr=False)
    references: dict[Pair, float] = field(default_factory=dict, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def base_parameters(self) -> int:
        """Number of frozen parameters."""
        return values_of(self.model) - sum(p.numel() for p in self.parameters.values())

    def mount(self, adapter: Adapter) -> None:
        """Copy an adapter's values into the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(adapter.values[name])))

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Compute what the base computes inside the context: with factors of zeros, and its own values elsewhere."""
        own = {n.replace(_OWN, "."): p for n, p in self.model.named_parameters() if _OWN in n}
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for tensor in self.spec.tensors:
                if tensor.role == "full":
                    self.parameters[tensor.name].copy_(own[tensor.name])
                else:
                    self.parameters[tensor.name].zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(before[name])

    def train_only(self, trained: tuple[TensorSpec, ...]) -> list[tuple[TensorSpec, nn.Parameter]]:
        """Let gradients flow to `trained` and to nothing else; return those parameters in order."""
        names = {tensor.name for tensor in trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        return [(tensor, self.parameters[tensor.name]) for tensor in trained]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the enclosed computation in this host's precision."""
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield

    def round_frozen(self) -> None:
        """Keep the frozen linear layers' values in the precision of the computation, as autocast rounds them each time.

        On a CPU this saves a conversion of the weights in every pass. What is trained, or shared with another layer,
        stays as it is.
        """
        if self.autocast is None:
            return
        kept = {id(parameter) for parameter in self.parameters.values()}
        for name, module in self.model.named_modules():
            linear = type(module) in (nn.Linear, Conv1D)
            kept |= {id(p) for p in module.parameters(recurse=False) if not linear or "original_module" in name}
        for parameter in self.model.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(self.autocast)

    @contextmanager
    def passing(self, *, training: bool) -> Iterator[None]:
        """Prepare the model for passes of this host's shape, to train or to evaluate."""
        # Without dropout, training computes what evaluation computes, so no family's own way of it applies any. Layers
        # recompute their activations in training mode only.
        self.model.train(training and self.dropout)
        if training:
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = True
        # A thread that rounds tiny values to zero, as some libraries ask for, would treat its rows in its own way.
        torch.set_flush_denormal(False)
        threads = torch.get_num_threads()
        exact = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if self.device.type != "cpu":
            # An accelerator's backward kernels otherwise add up in whatever order their threads finish.
            torch.use_deterministic_algorithms(True, warn_only=True)
        if self.threads is not None and self.shape.packed:
            # As probed, also where fewer are set by now: a smaller number may split vectors that this one does not.
            torch.set_num_threads(self.threads)
        # Families keep no keys and values where the whole model is in training mode. Otherwise a layer that recomputes
        # its activations would meet its own keys of the first time.
        uncached = configured(self.model, "use_cache", False)
        attention = configured(self.model, "_attn_implementation_internal", NAME)
        within = attention if self.shape.packed else nullcontext()
        try:
            with uncached, within:
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(exact[0], warn_only=exact[1])
            self.model.eval()


def release_memory() -> None:
    """Give freed memory back to the system: an allocator keeps what the probe's passes took, gigabytes of it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


@contextmanager
def configured(model: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of each configuration in a model that has it, while the context is open."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, name)}
    before = {key: getattr(config, name) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, name, value)
        yield
    finally:
        for key, config in configs.items():
            setattr(config, name, before[key])
