"""Cache the outputs of frozen lower layers, so that each record passes through them once per process.

If `lora.layers` leaves the lower layers of the base frozen and dropout is off, their output depends on a record's
tokens alone, and not on adapter, site or round. It does not depend on the other records of its pass either, not even in
its last bits: that is what a pass is built for, and the host has checked it (`privet.client.training.probe`). So the
same seed gives the same bits with a cold cache, a warm one and none.

A record of t tokens takes 4·t·h bytes for hidden size h: 74 kB for 48 tokens of MiniLM. At the memory limit, further
records are computed and not cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privet.client.training.base import HeadModel
from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.packing import Layout, pack
from privet.client.training.passes import rows_of
from privet.common.errors import StateError
from privet.common.study.study import Study

# Paths of the layers in model families.
_LAYERS = ("encoder.layer", "transformer.layer", "layers", "h")


@dataclass
class Outputs:
    """The outputs of frozen layers by record, up to `limit` bytes. Hits and misses count records."""

    limit: int
    size: int = 0
    hits: int = 0
    misses: int = 0
    known: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Cache a record's output [t, h] if the limit allows."""
        if key in self.known:
            return
        size = value.numel() * value.element_size()
        if self.size + size <= self.limit:
            self.known[key] = value.clone()
            self.size += size


@lru_cache(maxsize=2)
def _outputs(key: str, limit: int) -> Outputs:
    return Outputs(limit)


def frozen_layers(host: ModelHost, study: Study) -> tuple[nn.Module, str, int] | None:
    """Return the module that holds the base's layers, their name in it, and how many of the lower ones are frozen.

    None where outputs are not provably the same: dropout is on, no layer below the adapters is frozen, or the family of
    the base is unknown here.
    """
    model, backbone = host.model.get_base_model(), backbone_of(host)
    if backbone is None or study.lora.layers is None or study.training.dropout:
        return None
    for path in _LAYERS:
        owner, name = _owner(backbone, path)
        layers = getattr(owner, name, None)
        if isinstance(layers, nn.ModuleList):
            below = len(layers) - study.lora.layers
            trained = {id(parameter) for parameter in host.parameters.values()}
            inside = {id(p) for layer in layers[below:] for p in layer.parameters()}
            head = {id(p) for p in model.classifier.parameters()} if isinstance(model, HeadModel) else set[int]()
            # A trained parameter outside the upper layers and the head would change what is cached.
            if owner is None or below < 1 or trained - inside - head:
                return None
            return owner, name, below
    return None


def backbone_of(host: ModelHost) -> nn.Module | None:
    """Return the part of a model below its head or last layer; None where passes do not go through one."""
    model = host.model.get_base_model()
    if isinstance(model, HeadModel):
        return model.backbone
    return None if host.vocabulary is None or not host.shape.packed else host.vocabulary.backbone


def _owner(backbone: nn.Module, path: str) -> tuple[nn.Module | None, str]:
    first, _, last = path.rpartition(".")
    return (getattr(backbone, first, None) if first else backbone), last


@contextmanager
def remembering(host: ModelHost, study: Study, megabytes: int) -> Iterator[Outputs | None]:
    """Cache the outputs of a host's frozen layers inside the context. Yield None where they cannot be cached.

    Args:
        host: The host. Code that computes on it takes its lock.
        study: The study that is trained.
        megabytes: Limit in MB of 10^6 bytes; 0 for no cache.
    """
    found = frozen_layers(host, study) if megabytes else None
    if found is None:
        yield None
        return
    owner, name, below = found
    parts = (study.model.model_dump_json(), below, host.device, host.autocast, host.shape)
    outputs = _outputs(repr(parts), megabytes * 10**6)
    whole: nn.ModuleList = getattr(owner, name)
    recall = _Recall(host, owner, name, whole[:below], outputs)
    # A language model's layout goes to the part below its last layer, as no classifier needs it.
    entered = host.model if host.vocabulary is None else host.vocabulary.backbone
    shortened = nn.ModuleList([recall, *(_Pass() for _ in range(below - 1)), *whole[below:]])

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Passes have a layout. What has none, as when an answer is generated, takes all layers.
        in_passes = isinstance(kwargs.get("layout"), Layout)
        setattr(owner, name, shortened if in_passes else whole)
        if in_passes:
            recall.prepare(module, args, kwargs)

    handle = entered.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        yield outputs
    finally:
        handle.remove()
        setattr(owner, name, whole)


class _Pass(nn.Module):
    """Replaces a frozen layer, and returns its input."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


class _Recall(nn.Module):
    """Replaces all frozen layers: returns their cached outputs for the records of a pass."""

    def __init__(self, host: ModelHost, owner: nn.Module, name: str, layers: nn.ModuleList, outputs: Outputs) -> None:
        super().__init__()
        self.layers = layers  # as a module, so that the model keeps their parameters
        self._outputs, self._last = outputs, layers[-1]
        # Set past `nn.Module`: this module is inside both, and as sub-modules they would form a cycle.
        vars(self)["_host"], vars(self)["_place"] = host, (owner, name)
        self._ready: torch.Tensor | None = None

    def prepare(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Assemble the outputs of a pass before the model runs. A forward pre-hook."""
        ids, layout = kwargs["input_ids"], kwargs["layout"]
        places = [slice(start, start + length) for start, length in layout.spans]
        tokens = ids[0].cpu().numpy()
        keys = [tokens[place].tobytes() for place in places]
        known = self._outputs.known
        missing = [index for index, key in enumerate(keys) if key not in known]
        self._outputs.hits += len(keys) - len(missing)
        self._outputs.misses += len(missing)
        if len(missing) == len(keys) or not vars(self)["_host"].shape.packed:
            self._ready = self._compute(kwargs)
            for key, place in zip(keys, places, strict=True):
                self._outputs.put(key, self._ready[0, place])
            return
        # Only what is missing passes through the layers: most passes hold a record that none before them held.
        computed = self._compute_records([tokens[places[index]] for index in missing]) if missing else []
        parts = {index: known[key] for index, key in enumerate(keys) if key in known}
        parts |= dict(zip(missing, computed, strict=True))
        first = parts[0]
        self._ready = first.new_zeros(1, layout.rows, first.shape[-1])
        for index, place in enumerate(places):
            self._ready[0, place] = parts[index]
            self._outputs.put(keys[index], parts[index])

    def _compute_records(self, records: Sequence[NDArray[np.int64]]) -> list[torch.Tensor]:
        """Return the outputs [t, h] of records, in passes of their own."""
        host: ModelHost = vars(self)["_host"]
        features = [Feature(tuple(record.tolist()), 0) for record in records]
        found: dict[int, torch.Tensor] = {}
        for placed in pack(host.shape, features, range(len(features)), len(features)):
            ids, positions = rows_of(host, features, placed)
            output = self._compute({"input_ids": ids, "position_ids": positions, "layout": placed.layout})
            for record, (start, length) in zip(placed.records, placed.layout.spans, strict=True):
                found[record] = output[0, start : start + length]
        return [found[index] for index in range(len(records))]

    @torch.no_grad()
    def _compute(self, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Run a pass through the frozen layers, and return the last one's output [1, rows, h]."""
        owner, name = vars(self)["_place"]
        whole, found = getattr(owner, name), list[Any]()
        # As `HeadModel.forward`: the layout is for the backbone where there is no mask.
        masked = kwargs.get("attention_mask") is not None
        where = {key: value for key, value in kwargs.items() if not (masked and key == "layout")}
        handle = self._last.register_forward_hook(lambda module, inputs, output: found.append(output))
        setattr(owner, name, self.layers)
        try:
            backbone = backbone_of(vars(self)["_host"])
            # Past its hooks, of which this call may be one.
            backbone.forward(**where)  # type: ignore[union-attr]
        finally:
            handle.remove()
            setattr(owner, name, whole)
        (output,) = found
        if not isinstance(output, torch.Tensor):
            raise StateError(
                "the outputs of the frozen layers can be kept in memory only if each layer returns one tensor; "
                "a layer of this base model returns something else",
                "set simulation.activations_mb = 0 in the study, so that these outputs are not kept",
            )
        return output

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ready, self._ready = self._ready, None
        if ready is None or ready.shape != hidden.shape:
            raise StateError(
                "the frozen layers of the base model got a pass for which no outputs were prepared",
                "set simulation.activations_mb = 0 in the study, so that these outputs are not kept",
            )
        return ready
