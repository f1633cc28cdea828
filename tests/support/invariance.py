"""What is the same bits in any company: records, adapters that make last bits count, and the terms of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from privet.client.training.dp import Clipping, TermSum, per_sample_gradients
from privet.client.training.features import IGNORED, Feature, Pair
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.client.training.passes import score
from privet.client.training.preference import score_pairs
from privet.client.training.train import Steps, TrainingSet, clipping_of, head_columns, prepare, term_sum
from privet.client.training.validation import validation_points
from privet.common.privacy.noise import LATTICE
from privet.common.study.adapter import Adapter
from privet.common.study.sections import GENERATING
from privet.common.study.study import Study
from tests.support.tiny import random_adapter

ADAPTERS = ("ordinary", "large", "ties")
NOISE_MULTIPLIER = 0.7

Units = Mapping[int, Sequence[int]]
"""Rows of each unit."""


@dataclass(frozen=True)
class Bench:
    """A host with a study, records and an adapter.

    Attributes:
        most: Most records of a pass.
    """

    host: ModelHost
    study: Study
    features: Sequence[Feature]
    adapter: Adapter
    most: int = 32

    @property
    def clipping(self) -> Clipping:
        """How the study clips."""
        head = head_columns(self.study, self.host.spec)
        return clipping_of(self.study.privacy, self.study.privacy.promise.clip_norm, NOISE_MULTIPLIER, head)

    def terms(self, *draws: Units) -> list[TermSum]:
        """Return the sum of the terms of each draw, all under the same adapter."""
        self.host.mount(self.adapter)
        trained = self.host.train_only(self.study.trained(self.host.spec))
        parameters = [parameter for _, parameter in trained]
        data = TrainingSet(self.features, [[row] for row in range(len(self.features))], len(self.features))
        self.host.references.clear()  # what another engine found
        prepare(self.host, data, self.most)
        steps = Steps(self.host, self.study, data, parameters, self.most)
        collecting = per_sample_gradients(self.host.model, parameters, packed=self.host.shape.packed)
        with self.host.passing(training=True), collecting as per_sample:
            return [term_sum(steps, drawn, per_sample, self.clipping) for drawn in draws]

    def scores(self, order: Sequence[int]) -> dict[int, tuple[bytes, ...]]:
        """Return the bits of the scores of these records, scored in this order."""
        self.host.mount(self.adapter)
        features = [self.features[row] for row in order]
        parts: list[tuple[np.ndarray[Any, Any], ...]]
        if self.host.beta is not None:
            pairs = score_pairs(self.host, features, self.most)
            parts = [(np.array([p.chosen, p.rejected, p.reference]), np.array(p.tokens)) for p in pairs]
        else:
            parts = [(s.losses, s.truth, s.predicted) for s in score(self.host, features, self.most)]
        return {row: tuple(array.tobytes() for array in arrays) for row, arrays in zip(order, parts, strict=True)}

    def validation(self, units: Units) -> np.ndarray[Any, Any]:
        """Return the validation sums of these units."""
        data = SiteData(
            TrainingSet([], [], 1),
            [self.features[row] for rows in units.values() for row in rows],
            _renumbered(units),
            (),
        )
        return validation_points(self.host, self.adapter, data, LATTICE)


def _renumbered(units: Units) -> list[list[int]]:
    found, start = [], 0
    for rows in units.values():
        found.append(list(range(start, start + len(rows))))
        start += len(rows)
    return found


def check_invariance(bench: Bench, units: Units, joining: int) -> None:
    """Assert that one unit more changes sums, scores and validation by exactly what it gives alone.

    Args:
        bench: Where.
        units: Rows of each unit, `joining` among them.
        joining: The unit that joins the others.
    """
    others = {unit: rows for unit, rows in units.items() if unit != joining}
    mine = {joining: units[joining]}
    whole, without, alone = bench.terms(units, others, mine)
    assert torch.equal(whole.total - without.total, alone.total)
    assert whole.balance - without.balance == alone.balance
    clipping = bench.clipping
    square = sum(value * value for value in alone.total.tolist())
    assert square <= (Fraction(clipping.norm) / Fraction(clipping.lattice)) ** 2
    rows = [row for found in units.values() for row in found]
    with_it, rest = bench.scores(rows), [row for row in rows if row not in units[joining]]
    for order in (rest, units[joining], rows[::-1], [*units[joining], *rest]):
        assert bench.scores(order) == {row: with_it[row] for row in order}
    assert (bench.validation(units) - bench.validation(others) == bench.validation(mine)).all()


def drawn_features(host: ModelHost, classes: int, lengths: Sequence[int], seed: int) -> list[Feature]:
    """Return records of drawn tokens and labels; of tokens, some have no label. Answers of a pair differ in length."""
    if host.kind == "preference":
        other = [lengths[(place * 7 + 3) % len(lengths)] for place in range(len(lengths))]
        chosen, rejected = (
            _drawn(host, classes, wanted, own) for wanted, own in ((lengths, seed), (other, seed + 2**32))
        )
        return [Pair(a.ids, a.labels, b) for a, b in zip(chosen, rejected, strict=True)]
    return _drawn(host, classes, lengths, seed)


def _drawn(host: ModelHost, classes: int, lengths: Sequence[int], seed: int) -> list[Feature]:
    rng = np.random.default_rng(seed)
    features = []
    for length in lengths:
        ids = tuple(int(token) for token in rng.integers(0, len(host.tokenizer) - 1, length))  # the last: see `poison`
        shown = rng.random(length) < 0.7
        if host.kind == "text-classification":
            features.append(Feature(ids, int(rng.integers(classes))))
        elif host.kind == "token-classification":
            drawn = rng.integers(classes, size=length)
            features.append(Feature(ids, tuple(int(x) if s else IGNORED for x, s in zip(drawn, shown, strict=True))))
        else:
            start = int(rng.integers(length))
            features.append(Feature(ids, (*[IGNORED] * start, *ids[start:])))
    return features


# --- adapters --------------------------------------------------------------------------------------------


def drawn_adapter(host: ModelHost, features: Sequence[Feature], kind: str, seed: int) -> Adapter:
    """Return an adapter of one of `ADAPTERS`; one that makes ties makes them for the first of `features`."""
    adapter = random_adapter(host.spec, seed, 10.0 if kind == "large" else 0.3)
    return tie_making(host, adapter, features) if kind == "ties" else adapter


def tie_making(host: ModelHost, adapter: Adapter, features: Sequence[Feature], rows: int = 24) -> Adapter:
    """Return an adapter under which the last bits of some rows' vectors decide everything, as an attacker's would.

    A vector v is all but orthogonal to what a layer is given, so that v·x is a rounding error, and is multiplied by
    something huge. The layer is the head, of rows ±K·v, so that the error decides between two classes. Without a head
    it is the last layer with an adapter, of A = v and a huge B.

    Args:
        host: The model. Its adapter is replaced.
        adapter: Everything else.
        features: For whose vectors to make ties.
        rows: Vectors, fewer than their width.
    """
    host.mount(adapter)
    base = host.model.get_base_model()
    head = getattr(base, "classifier", None) if host.kind not in GENERATING else None
    layer = head or [m for m in base.modules() if hasattr(m, "lora_A")][-1]
    factor = 1e5 if host.autocast else 1e8
    v = _orthogonal(_inputs(host, layer, features)[:rows])
    changed: dict[str, np.ndarray[Any, Any]] = {}
    if head is not None:
        name = next(name for name in adapter.values if name.endswith("classifier.weight"))
        signs = np.array([1, -1, 0.5, -0.5, 1, -1])[np.arange(len(adapter.values[name])) % 6]
        changed = {name: factor * signs[:, None] * v, name.replace("weight", "bias"): np.zeros(len(signs))}
    else:
        a, b = (n for n in sorted(adapter.values) if _of(host, n) is layer)
        changed = {a: np.tile(v, (len(adapter.values[a]), 1)), b: adapter.values[b] * factor}
    return adapter.replace({name: value.astype(np.float32) for name, value in changed.items()})


def _of(host: ModelHost, name: str) -> nn.Module | None:
    """Return the layer with an adapter that a LoRA parameter belongs to."""
    module: nn.Module
    for module in host.model.modules():
        factors = [*getattr(module, "lora_A", {}).values(), *getattr(module, "lora_B", {}).values()]
        if any(factor.weight is host.parameters[name] for factor in factors):
            return module
    return None


def _inputs(host: ModelHost, layer: nn.Module, features: Sequence[Feature]) -> np.ndarray[Any, Any]:
    """Return the vectors [n, h] that a layer is given, of rows that are not empty."""
    found: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().float()))
    try:
        score(host, features)
    finally:
        handle.remove()
    vectors = torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
    return vectors[vectors.abs().sum(1) > 0].double().numpy()


def _orthogonal(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the unit vector most orthogonal to all of these."""
    return np.asarray(np.linalg.svd(vectors)[2][-1])


# --- engines ---------------------------------------------------------------------------------------------


@contextmanager
def changed(host: ModelHost, **values: Any) -> Iterator[None]:
    """Change attributes of a host inside the context."""
    before = {name: getattr(host, name) for name in values}
    for name, value in values.items():
        setattr(host, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(host, name, value)


@contextmanager
def checkpointing(host: ModelHost, *, reentrant: bool) -> Iterator[None]:
    """Recompute activations in the backward pass inside the context, if the model can."""
    base: Any = host.model.get_base_model()
    backbone = base if host.kind in GENERATING else base.backbone
    if not backbone.supports_gradient_checkpointing:
        yield
        return
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    backbone.enable_input_require_grads()
    try:
        yield
    finally:
        backbone.disable_input_require_grads()
        backbone.gradient_checkpointing_disable()


@contextmanager
def poison(host: ModelHost) -> Iterator[int]:
    """Give the last token an embedding that is not a number inside the context; yield the token."""
    base: Any = host.model.get_base_model()
    table = (base if host.kind in GENERATING else base.backbone).get_input_embeddings()
    token = len(host.tokenizer) - 1
    before = table.weight.data[token].clone()
    table.weight.data[token] = float("nan")
    try:
        yield token
    finally:
        table.weight.data[token] = before
