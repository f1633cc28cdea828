"""Rows of A that follow from the base: the directions in which a layer's inputs vary most.

An update of B sees its layer's input through A alone. Through random rows it sees rank / width of it, and noise covers
the rest of the rank as much as ever. Real inputs lie close to a few directions, so rows along these see most of them,
and the same noise costs a private study far less (docs/results.md). The directions are taken from the base on random
tokens, so they are public: a function of the base and of the study's seed, and of no record (as Paischer et al. 2024,
arXiv:2410.07170, who take them from training data).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from privet.client.training.features import IGNORED, Feature
from privet.client.training.host import ModelHost
from privet.client.training.packing import alone
from privet.client.training.passes import outcome_of, pass_of
from privet.common.privacy.noise import SeededRandomness

_SEQUENCES, _TOKENS = 32, 128
# Rows of a sketch for each row of A: what is left out of a sketch once does not come back.
_SPARE = 4


def input_directions(host: ModelHost, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return A of each adapted layer [rank, width]: orthonormal rows, those along which inputs vary most first.

    Args:
        host: The model, with B zero. Its lock is held by the caller.
        seed: Of the study.
    """
    sketches: dict[str, torch.Tensor] = {}
    ranks = {tensor.name: tensor.shape[0] for tensor in host.spec.tensors if tensor.role == "lora_A"}
    stream = SeededRandomness(seed, "lora_A", "tokens")
    vocabulary = len(host.tokenizer)
    with torch.no_grad(), host.passing(training=False), _watching(host, ranks, sketches):
        for _ in range(_SEQUENCES):
            ids = tuple(int(place * vocabulary) for place in stream.uniform(_TOKENS))
            features = [Feature(ids, 0 if host.kind == "text-classification" else (IGNORED,) * len(ids))]
            outcome_of(host, pass_of(host, features, alone(features, 0)))
    return {name: _rows(sketches[name], rank) for name, rank in ranks.items()}


@contextmanager
def _watching(host: ModelHost, ranks: Mapping[str, int], sketches: dict[str, torch.Tensor]) -> Iterator[None]:
    """Sketch the inputs of each adapted layer while the context is open."""
    handles: list[RemovableHandle] = []
    modules = dict(host.model.named_modules())
    for name, rank in ranks.items():
        layer = modules[name.partition(".lora_A.")[0]]

        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name, size: int = _SPARE * rank) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            known = sketches.get(name)
            sketches[name] = _sketch(rows if known is None else torch.cat([known, rows]), size)

        handles.append(layer.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sketch(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return at most `size` rows whose second moments are close to those of `rows` [n, d]."""
    if len(rows) <= size:
        return rows
    # From the smaller of both matrices of products: [n, n] is small where d is not.
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    kept: torch.Tensor = vectors[:, -size:].T @ rows
    return kept


def _rows(sketch: torch.Tensor, rank: int) -> NDArray[np.float32]:
    """Return the first right singular vectors of a sketch [n, d], [rank, d]; rows beyond its own rank are zero."""
    _, strengths, vectors = torch.linalg.svd(sketch, full_matrices=False)
    found = np.zeros((rank, sketch.shape[1]), np.float32)
    kept = int((strengths[:rank] > 1e-6 * strengths[0]).sum())
    # A sign that does not depend on the library: each row's largest entry is positive.
    chosen = vectors[:kept].numpy()
    signs = np.sign(chosen[np.arange(kept), np.abs(chosen).argmax(1)])
    found[:kept] = (chosen * signs[:, None]).astype(np.float32)
    return found
