"""Write the weights of a base as safetensors, the same bytes every time.

Tensors are written in the order of their names, into files of bounded size. Every value is written once: a tensor that
the configuration ties to another one, with the same bytes, is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
_LARGEST = 5_000_000_000
"""Most bytes of one file of weights. Larger models are written in several."""

Read = Callable[[], torch.Tensor]
"""Reads one tensor. It is called when the tensor is written, so that one file of weights is in memory at a time."""


def converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor's values in `dtype` if they are floating-point numbers; None keeps them as they are."""
    plain = tensor.detach().cpu()
    if dtype is not None and plain.is_floating_point():
        plain = plain.to(dtype)
    return plain.contiguous()


def _size(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    width = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
    return tensor.numel() * width


def _without_copies(tensors: Mapping[str, Read], rows: int) -> dict[str, Read]:
    """Leave out every copy of an embedding [rows, n]; names with "embed" are kept before others."""
    kept: dict[str, Read] = {}
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    for name in sorted(tensors, key=lambda name: ("embed" not in name, name)):
        tensor = tensors[name]()
        if tensor.ndim == 2 and len(tensor) == rows:  # only embeddings and heads are tied
            raw = tensor.detach().contiguous().view(torch.uint8).numpy()
            key = tuple(tensor.shape), hashlib.sha256(raw.tobytes()).digest()
            if key in seen:
                continue
            seen.add(key)
        kept[name] = tensors[name]
    return kept


def write_weights(
    tensors: Mapping[str, Read],
    directory: Path,
    dtype: torch.dtype | None,
    tied_rows: int | None,
    largest: int = _LARGEST,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as numbered files with an index.

    Args:
        tensors: What reads each tensor, by name.
        directory: Where to write.
        dtype: Floating-point type of the values; None keeps each tensor's own.
        tied_rows: Size of the vocabulary, if the configuration ties embeddings; None if it does not.
        largest: Most bytes of one file. A single tensor may be larger.

    Returns:
        The files of weights, in order.
    """
    kept = dict(tensors) if tied_rows is None else _without_copies(tensors, tied_rows)
    groups: list[list[str]] = [[]]
    sizes = {name: _size(kept[name](), dtype) for name in sorted(kept)}
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files: list[Path] = []
    places: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        whole = len(groups) == 1
        file = directory / ("model.safetensors" if whole else f"model-{number:05}-of-{len(groups):05}.safetensors")
        values = _apart({name: converted(kept[name](), dtype) for name in names})
        save_file(values, file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file.name)
        files.append(file)
    if len(files) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
    return files


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of which none shares memory with another: safetensors refuses those that do."""
    apart: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        part = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
        seen.add(storage.data_ptr())
        apart[name] = tensor.clone() if part else tensor
    return apart


def write_json(file: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    file.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
