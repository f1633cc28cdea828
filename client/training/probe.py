"""The probe: whether a record's loss and gradient are the same bits in whatever company, on the device in use.

The privacy proof needs that a unit's term depends on that unit alone (`docs/privacy.md`). Packed passes are built for
that (`privet.client.training.packing`). Whether the kernels of this device, precision and model keep it is measured
here, when a host opens: records alone, among others, and in other places, in training and in scoring, under an adapter
of random values and under one that makes ties, where the last bit decides a class. The same passes are compared with
one record at a time under the model's own attention, which shows that packing computes what the model computes, and
that per-sample gradients are those of single records.

Where packing fails, passes of one record are used, which keep the promise by construction. They are checked as well:
a record twice, with others between, must give the same bits. A model that fails this too is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from privet.client.training.attention import UnpackableError
from privet.client.training.boundary import library_errors
from privet.client.training.dp import per_sample_gradients
from privet.client.training.features import IGNORED, Feature
from privet.client.training.host import ModelHost
from privet.client.training.packing import Placed, Shape, alone, is_within_records, place
from privet.client.training.passes import Pass, hidden_of, logits_of, outcome_of, pass_of
from privet.client.training.persample import find_rules
from privet.client.training.targets import short_names
from privet.client.training.vocabulary import ROWS, agrees
from privet.common.errors import DivergedError, PrivetError, StudyError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.sections import GENERATING

_SINGLE = Shape()
_OTHER_BASE = "choose another base model: docs/families.md lists the families that were tried"
# Largest relative difference between a packed pass and the model's own attention: of float32, and of bfloat16, whose
# values have 8 bits and pass through dozens of layers.
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


# Operations that treat each row by itself wherever it lies, or that only move rows or read a table. Whatever sorts or
# counts rows, or multiplies a number of rows that depends on them (tokens routed to experts), is not among them.
# fmt: off
_ROW_BY_ROW = frozenset({
    "_local_scalar_dense", "_log_softmax", "_to_copy", "_unsafe_view", "abs", "add", "addmm", "alias", "any",
    "arange", "argmax", "as_strided", "bitwise_and", "bitwise_or", "cat", "clamp", "clone", "contiguous", "copy", "cos",
    "detach", "div", "embedding", "empty", "empty_like", "eq", "erf", "exp", "expand", "gather", "ge", "gelu", "gt",
    "hardtanh", "index", "le", "leaky_relu", "lift_fresh", "linear", "logical_and", "logical_or", "lt", "mean",
    "mm", "mul", "native_layer_norm", "ne", "neg", "nll_loss_forward", "ones", "ones_like", "permute", "pow",
    "reciprocal", "relu", "reshape", "rsqrt", "rsub", "select", "sigmoid", "silu", "sin", "slice", "softplus", "split",
    "split_with_sizes", "sqrt", "square", "squeeze", "stack", "sub", "t", "tanh", "transpose", "unbind",
    "unsqueeze", "view", "where", "zeros", "zeros_like"
})
# fmt: on


# Of these, PyTorch computes the last values of a thread's part one by one, and the others in vectors, by functions that
# differ in last bits.
_BY_VECTORS = frozenset({"cos", "erf", "exp", "gelu", "pow", "sigmoid", "silu", "sin", "softplus", "tanh"})
# PyTorch gives a thread at least so many values, and takes up to so many at a time.
_GRAIN, _VECTORS = 32_768, 64


@dataclass(frozen=True)
class Term:
    """What a pass gives for one record: losses of its rows, predictions, gradient; losses and predictions in scoring.

    Scoring has no backward pass, and libraries may choose other kernels then.
    """

    losses: torch.Tensor
    predicted: torch.Tensor
    gradient: torch.Tensor
    scored: torch.Tensor
    scored_predicted: torch.Tensor

    @property
    def finite(self) -> bool:
        """Whether losses and gradient are finite."""
        return bool(torch.isfinite(self.losses).all() and torch.isfinite(self.gradient).all())

    def equals(self, other: Term) -> bool:
        """Return whether both are the same bits. Values that are not numbers differ from everything."""
        mine, theirs = vars(self), vars(other)
        return all(torch.equal(mine[name], theirs[name]) for name in mine)


def choose_shape(host: ModelHost, tokens: int, classes: int) -> tuple[Shape, str]:
    """Return the shape of passes that keeps each record to itself on this host, and why it is not the one proposed.

    Args:
        host: The host, with the shape to try first. Adapter values are changed.
        tokens: Most tokens of a record.
        classes: Number of labels; 0 for a language model.

    Raises:
        StudyError: The model cannot be trained on one record, or a record alone in its pass does not give the same bits
            twice.
    """
    proposed = host.shape
    dropout, host.dropout = host.dropout, False  # which would differ from pass to pass; private studies have none
    try:
        with quiet_warnings():
            features = _records(host, tokens, classes)
            _scatter(host, 0.3)
            host.shape = _SINGLE
            _check_runs(host, features)
            host.shape = proposed
            # Before any rounding, as the weights are still in float32 on a CPU, so that the comparison can be sharp.
            reason = _objection(_check_computation, host, features)
            host.round_frozen()
            host.shape = _SINGLE
            with library_errors(f"model.base: the model does not run on records of {tokens} tokens", _OTHER_BASE):
                _check_repeats(host, features)
            host.shape = proposed
            reason = reason or _objection(_check_company, host, features)
            return (_SINGLE, reason) if reason else (proposed, "")
    finally:
        host.shape, host.dropout = proposed, dropout


def _objection(
    check: Callable[[ModelHost, Sequence[Feature]], None], host: ModelHost, features: Sequence[Feature]
) -> str:
    """Return why packed passes fail a check; empty if they pass."""
    try:
        check(host, features)
    except PrivetError as error:
        return error.message
    except Exception as error:
        # A family that takes no position of each token, or reshapes rows in its own way, fails in its own words.
        return f"the model does not take records laid end to end ({type(error).__name__})"
    return ""


def _check_runs(host: ModelHost, features: Sequence[Feature]) -> None:
    """Check that one record trains every layer of the adapter, as a step of training runs it.

    Raises:
        StudyError: The model does not run on a record, a language model sees later tokens, or there are layers through
            which no gradient flows back, or which the model does not use.
    """
    parameters = list(host.parameters.items())
    passed = pass_of(host, features, alone(features, 0))
    with library_errors("model.base: the model does not run on a text", _OTHER_BASE):
        with host.passing(training=True), torch.no_grad():
            logits_of(host, passed)
        if host.kind in GENERATING:
            _check_causal(host, features[0])
        _check_vocabulary(host, features)
    host.train_only(host.spec.tensors)
    try:
        with library_errors("", ""):
            _backward_alone(host, passed)
    except StudyError as error:
        bad = [layer for layer in _layers_of(host) if not _trains(host, passed, layer)]
        raise StudyError(
            f"lora.targets: no gradient can be computed for {', '.join(bad) or 'these layers together'} of the base "
            f"model {error.message.strip()}",
            "name other layers in lora.targets and lora.modules_to_save of the study, or choose another base model",
        ) from error
    finally:
        host.train_only(host.spec.tensors)
    unused = [name for name, parameter in parameters if parameter.grad is None]
    for _, parameter in parameters:
        parameter.grad = None
    if unused:
        raise StudyError(
            f"lora.targets: the model does not use the layers {short_names(_layer_of(name) for name in unused)} in "
            f"{host.kind}",
            "name other layers in lora.targets and lora.modules_to_save of the study",
        )


def _backward_alone(host: ModelHost, passed: Pass) -> None:
    for parameter in host.parameters.values():
        parameter.grad = None
    with host.passing(training=True):
        torch.autograd.backward(outcome_of(host, passed).losses, passed.weights)


def _layers_of(host: ModelHost) -> list[str]:
    """Return the last names of the layers that the adapter trains."""
    return sorted({_layer_of(name).rpartition(".")[2] for name in host.parameters})


def _layer_of(name: str) -> str:
    """Return the name of the layer that a tensor of the adapter belongs to."""
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def _trains(host: ModelHost, passed: Pass, layer: str) -> bool:
    """Return whether the layers of a name can be trained alone."""
    for name, parameter in host.parameters.items():
        parameter.requires_grad_(_layer_of(name).endswith(f".{layer}"))
    try:
        _backward_alone(host, passed)
    except Exception:
        return False
    return True


@torch.no_grad()
def _check_causal(host: ModelHost, feature: Feature) -> None:
    """Check that a language model's logits do not change with later tokens.

    An encoder with a head for masked words would see the token that it is trained to predict.
    """
    changed = Feature((*feature.ids[:-1], (feature.ids[-1] + 1) % len(host.tokenizer)), feature.labels)
    with host.passing(training=False):
        first, second = (
            logits_of(host, pass_of(host, [each], alone([each], 0)))[:-1].float() for each in (feature, changed)
        )
    if len(first) and float((first - second).norm()) > _CLOSE[host.autocast or torch.float32] * float(first.norm()):
        raise StudyError(
            "model.base: the model sees later tokens, so it cannot learn to predict them: "
            f"task.kind {host.kind} needs a decoder",
            "choose a decoder, or another task.kind in the study",
        )


@torch.no_grad()
def _check_vocabulary(host: ModelHost, features: Sequence[Feature]) -> None:
    """Let losses take the last layer in parts only where that is what the model computes."""
    found = host.vocabulary
    if found is None:
        return
    packed, autocast = host.shape, host.autocast
    host.shape, host.vocabulary = _SINGLE, None
    if host.device.type == "cpu":
        host.autocast = None
    try:
        with host.passing(training=True):
            passed = pass_of(host, features, alone(features, 0))
            same = agrees(found, hidden_of(host, passed, found), logits_of(host, passed))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        same = False  # the part below the last layer has another interface of its own
    finally:
        host.shape, host.autocast = packed, autocast
    host.vocabulary = found if same else None


def _check_computation(host: ModelHost, features: Sequence[Feature]) -> None:
    """Check that packed passes give what the model's own attention gives for one record, but for rounding."""
    if find_rules(host.model, list(host.parameters.values())) is None:
        raise UnpackableError("a trained layer is neither LoRA on a linear layer nor a linear layer")
    packed, autocast = host.shape, host.autocast
    if host.device.type == "cpu":
        host.autocast = None
    try:
        mine = _terms(host, features, _companies(packed, features)[1])
        host.shape = _SINGLE
        for record in (0, 1):
            if record in mine and not _close(
                mine[record], _terms(host, features, alone(features, record))[record], host
            ):
                raise UnpackableError("the model computes something else on records laid end to end")
    finally:
        host.shape, host.autocast = packed, autocast


def _check_company(host: ModelHost, features: Sequence[Feature]) -> None:
    """Check that a watched record's term is the same bits in every pass."""
    companies = _companies(host.shape, features)
    if host.device.type == "cpu":
        host.threads = _whole_vectors(host, features, companies)
    _check_same(host, features, companies)
    _check_places(host, features)
    _make_ties(host)
    _check_same(host, features, companies[:3])


@contextmanager
def _spoiled(host: ModelHost, rows: torch.Tensor) -> Iterator[None]:
    """Give the tokens of these rows [rows, bool] of a pass values that are not a number.

    An adapter can be chosen under which one record overflows. A matrix unit that reads beyond the end of a row, and
    takes what it finds times zero, would carry that into the record before: zero times infinity is not a number. AMX
    does so (docs/privacy.md, "Records that overflow").
    """
    seen = []

    def spoil(layer: Any, given: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[-2] == len(rows))
        return hidden.masked_fill(rows.to(hidden.device)[:, None], torch.nan) if seen[-1] else hidden

    # Hooks of all of them: an embedding of positions alone would do as well.
    embeddings = [each for each in host.model.modules() if isinstance(each, nn.Embedding)]
    hooks = [each.register_forward_hook(spoil) for each in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not any(seen):
        raise UnpackableError("the model does not read its tokens by an embedding, so one of them cannot be spoiled")


@torch.no_grad()
def _check_places(host: ModelHost, features: Sequence[Feature]) -> None:
    """Check that the forward pass gives a short record the same bits in every place of a pass of every size."""
    for size in host.shape.sizes:
        width = host.shape.width(len(features[0].ids))
        rows = width * host.shape.group(width)
        with host.passing(training=True):
            passed = pass_of(host, features, place(host.shape, features, [[0]] * (size // rows), 0, size))
            outcome = outcome_of(host, passed)
        spans = [slice(start, start + length) for start, length in passed.layout.spans]
        for values in (outcome.values, outcome.losses):
            first, *others = (values[span] for span in spans)
            if all(torch.equal(first, other) for other in others):
                continue
            raise UnpackableError("a record's values change in their last bits with its place in a pass")


@torch.no_grad()
def _whole_vectors(host: ModelHost, features: Sequence[Feature], companies: Sequence[Placed]) -> int:
    """Return the most threads with which each works on whole vectors in all passes: then no place is special."""
    available = torch.get_num_threads()
    if available == 1:
        return 1
    vectors: set[tuple[int, int]] = set()
    for company in {company.layout.rows: company for company in companies}.values():
        noted = _Shapes()
        with host.passing(training=True), noted:
            outcome_of(host, pass_of(host, features, company))
        vectors |= noted.vectors
    if host.vocabulary is not None:
        # The exponentials of a part of the vocabulary, which are worked on within records, and so not noted.
        vectors.add((ROWS * len(host.vocabulary.layer.weight), _VECTORS))
    return most_threads(vectors, available)


def most_threads(vectors: Iterable[tuple[int, int]], available: int) -> int:
    """Return the most threads whose parts are whole in every operation of `_Shapes.vectors`; 1 always fits."""

    def whole(size: int, part: int, threads: int, grain: int) -> bool:
        many = min(threads, -(-size // grain))
        return many <= 1 or (part > 0 and -(-size // many) % part == 0)

    def fits(threads: int) -> bool:
        # GELU divides its values among all threads, however few values there are.
        return all(
            whole(size, part, threads, grain) for size, part in vectors for grain in (_GRAIN, max(1, size // threads))
        )

    return next((threads for threads in range(available, 1, -1) if fits(threads)), 1)


def _check_same(host: ModelHost, features: Sequence[Feature], companies: Sequence[Placed]) -> None:
    """Check a watched record's term: the same bits in all passes, also where all other records overflow."""
    known: dict[int, Term] = {}
    traces: dict[int, list[tuple[Any, ...]]] = {}
    for company in companies:
        noted = _Shapes()
        found = _terms(host, features, company, noted)
        if traces.setdefault(company.layout.rows, noted.found) != noted.found:
            raise UnpackableError("the model computes in shapes that depend on the records of a pass")
        if others := sorted({name for name, *_ in noted.found} - _ROW_BY_ROW):
            raise UnpackableError(
                f"the model has operations that are not known to treat each row by itself: {', '.join(others)}"
            )
        for record in (0, 1):
            if record in found and not known.setdefault(record, found[record]).equals(found[record]):
                raise UnpackableError(
                    "a record's loss or gradient changes in its last bits with the other records of a pass"
                )
    for company, rows in ((each, _rows_of_others(each)) for each in companies):
        if not bool(rows.any()):
            continue
        with _spoiled(host, rows):
            found = _terms(host, features, company)
        if not all(found[record].equals(term) for record, term in known.items() if record in found):
            raise UnpackableError("a record whose values are not finite changes the terms of others in a pass")


def _rows_of_others(company: Placed) -> torch.Tensor:
    """Return which rows hold records that are not watched. Padding is none of them: no record decides its values."""
    found = torch.zeros(company.layout.rows, dtype=torch.bool)
    for record, (start, length) in zip(company.records, company.layout.spans, strict=True):
        found[start : start + length] = record > 1
    return found


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the name and the shapes of every operation outside `within_records`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Any, ...]] = []
        # Of each operation by vectors: number of values, and of how many a thread's part must be a multiple. Values
        # that do not lie together (a half of wider rows) are taken row by row; 0 where a row's do not either.
        self.vectors: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_within_records():
            shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            name = str(func.overloadpacket).rpartition(".")[2]
            self.found.append((name.rstrip("_") if name[:1] != "_" else name, *shapes))
            if self.found[-1][0] in _BY_VECTORS:
                x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
                row = _VECTORS if x.is_contiguous() else x.shape[-1] if x.stride(-1) == 1 else 0
                self.vectors.add((x.numel(), row))
        return func(*args, **(kwargs or {}))


def _check_repeats(host: ModelHost, features: Sequence[Feature]) -> None:
    """Check that a record alone in its pass gives the same finite values twice, with another one between."""
    first, _, again = (_terms(host, features, alone(features, record))[record] for record in (0, 1, 0))
    if not first.finite:
        raise DivergedError(
            "a record's loss or gradient is infinite or not a number before any training, under adapter values of the "
            "size that training gives",
            "lower lora.alpha in the study, or choose another base model",
        )
    if not first.equals(again):
        raise StudyError(
            "model.base: a record alone in its pass does not give the same loss and gradient twice, so no privacy can "
            "be promised",
            "choose a base model without dropout of its own and without state, or another device (resources.device in "
            "the site file)",
        )


def _records(host: ModelHost, tokens: int, classes: int) -> list[Feature]:
    """Return records of drawn tokens: the two to watch, one short and one as long as can be, and their company."""
    stream = SeededRandomness(0, "probe")
    lengths = [max(1, min(tokens, 5)), tokens, max(1, tokens // 2), max(1, tokens // 3), max(1, tokens - 3), 1]
    features = []
    for index, length in enumerate(lengths):
        ids = tuple(int(x) for x in np.floor(stream.uniform(length) * len(host.tokenizer)))
        if host.kind == "text-classification":
            features.append(Feature(ids, index % classes))
        elif host.kind == "token-classification":
            features.append(Feature(ids, tuple((index + place) % classes for place in range(length))))
        else:
            features.append(Feature(ids, ids))
    return features


def _companies(shape: Shape, features: Sequence[Feature]) -> list[Placed]:
    """Return passes, in every size, in which the watched records are alone, among others, and at the end."""
    widths = [shape.width(len(feature.ids)) for feature in features]
    rows = [width * shape.group(width) for width in widths]

    def among(order: Sequence[int], size: int, *, last: bool) -> Placed:
        fitting: list[int] = []
        for record in sorted(order, key=lambda record: record > 1):  # what is watched has room first
            if sum(rows[other] for other in (*fitting, record)) <= size:
                fitting.append(record)
        start = size - sum(rows[record] for record in fitting) if last else 0
        groups = [[record] for record in order if record in fitting]
        return place(shape, features, groups, start // shape.alignment * shape.alignment, size)

    least, *larger = shape.sizes
    orders = (2, 0, 3, 1, 5, 4), (5, 4, 0, 3, 2, 1)
    return [
        among((0,), least, last=False),
        among(orders[0], least, last=False),
        among(orders[1], least, last=True),
        among((1,), least, last=False),
        *[among(orders[place % 2], size, last=bool(place % 2)) for place, size in enumerate(larger)],
    ]


def _terms(
    host: ModelHost, features: Sequence[Feature], placed: Placed, noted: _Shapes | None = None
) -> dict[int, Term]:
    """Return the terms of the records of a pass, and note the operations of its forward halves."""
    parameters = list(host.parameters.values())
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(True)
    with (
        host.passing(training=True),
        per_sample_gradients(host.model, parameters, packed=host.shape.packed) as collected,
    ):
        passed = pass_of(host, features, placed)
        collected.begin(passed.layout)
        with noted or nullcontext():
            outcome = outcome_of(host, passed)
        torch.autograd.backward(outcome.losses, passed.weights)
        gradients = collected.take()
    with host.passing(training=False), torch.no_grad(), noted or nullcontext():
        scored = outcome_of(host, passed)
    found = {}
    for index, (record, (start, length)) in enumerate(zip(passed.records, passed.layout.spans, strict=True)):
        rows = slice(start, start + length)
        kept = passed.labels[rows] != IGNORED
        found[record] = Term(
            outcome.losses.detach()[rows][kept],
            outcome.predicted[rows][kept],
            gradients[index],
            scored.losses[rows][kept],
            scored.predicted[rows][kept],
        )
    return found


def _close(found: Term, reference: Term, host: ModelHost) -> bool:
    allowed = _CLOSE[host.autocast or torch.float32]
    return all(
        float((mine - theirs).norm()) <= allowed * float(theirs.norm()) + 1e-6
        for mine, theirs in ((found.losses, reference.losses), (found.gradient, reference.gradient))
    )


@torch.no_grad()
def _scatter(host: ModelHost, scale: float) -> None:
    """Give the adapter values of every size that training gives."""
    for name, parameter in host.parameters.items():
        values = SeededRandomness(1, name).normal(parameter.numel()).reshape(parameter.shape)
        spread = scale / parameter.shape[-1] ** 0.5
        parameter.copy_(torch.from_numpy(values * spread))


@torch.no_grad()
def _make_ties(host: ModelHost) -> None:
    """Make last bits count: rows of a head that differ in sign alone, far from zero, as an attacker would choose."""
    for name, parameter in host.parameters.items():
        if ".classifier.weight" in name:
            rows = parameter[:1].repeat(len(parameter), 1) * 1e3
            parameter.copy_(rows * torch.tensor([1.0, -1.0], device=rows.device).repeat(len(rows))[: len(rows), None])
        else:
            parameter.mul_(3)
