"""Per-sample gradients: both ways of taking them against a loop of single records, and all that must be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from peft import LoraConfig, get_peft_model
from torch import nn

from privet.client.site import Resources
from privet.client.training.base import HeadModel
from privet.client.training.dp import per_sample_gradients
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import _host, open_host
from privet.client.training.packing import Block, Layout, Shape, pack
from privet.client.training.passes import backward, logits_of, losses_of, passes_of
from privet.client.training.persample import FlatGradients, PerSampleGradients, SingleGradients, outer, rows_apart
from privet.client.training.tasks import collate, forward
from privet.common.errors import StateError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.study.study import Study
from tests.support.losses import one_by_one, record_losses
from tests.support.tiny import random_adapter, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
CASES = [
    (family, kind)
    for family in ("bert", "gpt2", "llama", "qwen2")
    for kind in ("text-classification", "token-classification", "causal-lm")
    if (family, kind) != ("bert", "causal-lm")
]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENGINES = ("packed", "single")


def prepare(study: Study, resources: Resources = CPU) -> tuple[ModelHost, list[Feature], list[nn.Parameter]]:
    """Return a host with random adapter values, features of ragged length, and what is trained."""
    host = open_host(study, resources)
    host.mount(random_adapter(host.spec))
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 7, seed=3)))
    assert len({len(feature.ids) for feature in features}) > 2
    trained = [p for _, p in host.train_only(host.spec.trained(study.aggregation.method))]
    for parameter in trained:
        parameter.grad = None  # the host is shared, and another test may have trained on it
    return host, features, trained


@contextmanager
def shaped(host: ModelHost, engine: str) -> Iterator[None]:
    """Let a host whose passes are packed run one record a pass instead, if `engine` is "single"."""
    assert host.shape.packed, host.verdict
    before = host.shape
    host.shape = before if engine == "packed" else Shape()
    try:
        yield
    finally:
        host.shape = before


def collect(host: ModelHost, features: Sequence[Feature], trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return per-sample gradients [n, P] as training takes them, in the order of `features`."""
    found: dict[int, torch.Tensor] = {}
    packed = host.shape.packed
    with host.passing(training=True), per_sample_gradients(host.model, trained, packed=packed) as collected:
        assert isinstance(collected, FlatGradients if packed else SingleGradients)
        for passed in passes_of(host, features, pack(host.shape, features, range(len(features)), 64)):
            collected.begin(passed.layout)
            backward(host, passed)
            found |= dict(zip(passed.records, collected.take(), strict=True))
    return torch.stack([found[record] for record in range(len(features))])


@contextmanager
def own(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[PerSampleGradients]:
    """The engine for packed passes."""
    with per_sample_gradients(model, trained, packed=True) as collected:
        assert isinstance(collected, FlatGradients)
        yield collected


def hooked(host: ModelHost, features: Sequence[Feature], trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return per-sample gradients [n, P] of a padded batch by Opacus's hooks, which share no code with ours."""
    with quiet_warnings():
        hooks: Any = GradSampleHooks(host.model.train(), batch_first=True, loss_reduction="sum", strict=True)
        try:
            batch = collate(host, features)
            losses: torch.Tensor = record_losses(host.kind, forward(host, batch), batch)
            torch.autograd.backward(losses.sum())
            grads: list[torch.Tensor] = [parameter.grad_sample for parameter in trained]  # type: ignore[attr-defined]
            return torch.cat([grad.detach().reshape(len(features), -1).float() for grad in grads], dim=1)
        finally:
            hooks.cleanup()
            host.model.eval()
            for parameter in trained:
                parameter.grad = None


def relative(found: torch.Tensor, expected: torch.Tensor, trained: Sequence[nn.Parameter]) -> float:
    """Return the largest relative L2 error of any record in any parameter."""
    sizes = [parameter.numel() for parameter in trained]
    errors = [
        ((f - e).norm(dim=1) / e.norm(dim=1).clamp(min=1e-9)).max()
        for f, e in zip(torch.split(found, sizes, dim=1), torch.split(expected, sizes, dim=1), strict=True)
    ]
    return float(torch.stack(errors).max())


# --- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_equal_a_loop_over_single_records(
    bases: Mapping[str, Path], family: str, kind: str, method: str, engine: str
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": method})
    host, features, trained = prepare(study)
    expected = one_by_one(host, features, trained)
    assert float(expected.norm(dim=1).min()) > 0
    with shaped(host, engine):
        assert relative(collect(host, features, trained), expected, trained) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_equal_those_of_opacus_hooks(bases: Mapping[str, Path], family: str, kind: str, engine: str) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": "fedavg"})
    host, features, trained = prepare(study)
    expected = hooked(host, features, trained)
    with shaped(host, engine):
        assert relative(collect(host, features, trained), expected, trained) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("family", "kind", "extra"),
    [
        ("llama", "causal-lm", {"lora.modules_to_save": ["lm_head"]}),
        ("qwen2", "causal-lm", {"lora.targets": ALL_LINEAR}),
        ("llama", "token-classification", {"lora.targets": ALL_LINEAR, "lora.layers": 1}),
        ("gpt2", "causal-lm", {"lora.targets": ["c_attn", "lm_head"]}),  # tied to the frozen embedding
        ("gpt2", "causal-lm", {"lora.targets": ["c_attn", "c_proj", "c_fc"], "lora.layers": 1}),
        ("bert", "text-classification", {"lora.targets": ["query", "dense"], "lora.modules_to_save": ["value"]}),
    ],
)
def test_all_linear_layers_and_modules_trained_in_full_have_rules(
    bases: Mapping[str, Path], family: str, kind: str, extra: dict[str, Any], engine: str
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": "fedavg", **extra})
    host, features, trained = prepare(study)
    plain = one_by_one(host, features, trained)
    with shaped(host, engine):
        found = collect(host, features, trained)
    if relative(found, plain, trained) < 1e-5:
        return
    # Where a softmax is steep, plain autograd in float32 is itself farther than this from autograd in float64, by
    # processors differently far. Ours may then be twice as far, and no more.
    assert kind != "text-classification"  # whose head computes in float32
    host.model.double()
    exact = one_by_one(host, features, trained).float()
    host.model.float()
    assert relative(found, exact, trained) < max(1e-5, 2 * relative(plain, exact, trained))


@pytest.mark.parametrize(
    ("family", "kind", "saved"),
    [
        ("llama", "causal-lm", "norm"),
        ("bert", "text-classification", "word_embeddings"),
        ("bert", "text-classification", "position_embeddings"),
    ],
)
def test_models_with_layers_without_a_rule_run_one_record_a_pass(
    bases: Mapping[str, Path], family: str, kind: str, saved: str
) -> None:
    extra = {"task.kind": kind, "aggregation.method": "fedavg", "lora.modules_to_save": [saved]}
    study = tiny_study(bases[family], **extra)
    host, features, trained = prepare(study)
    assert host.shape == Shape()
    assert "neither LoRA on a linear layer nor a linear layer" in host.verdict
    found = collect(host, features, trained)
    assert relative(found, one_by_one(host, features, trained), trained) < 1e-5
    assert torch.equal(collect(host, features[::-1], trained), found.flip(0))
    with pytest.raises(StateError, match="no rule"), own(host.model, trained):
        pass


@pytest.fixture(params=[True, False], ids=["reentrant", "non-reentrant"])
def checkpointing(request: pytest.FixtureRequest) -> Callable[[Study], AbstractContextManager[ModelHost]]:
    """Open a host that recomputes its layers in the backward pass, one way or the other."""

    @contextmanager
    def opened(study: Study) -> Iterator[ModelHost]:
        host = open_host(study, CPU.model_copy(update={"gradient_checkpointing": True}))
        host.mount(random_adapter(host.spec))
        base: Any = host.model.get_base_model()
        backbone: Any = base.backbone if isinstance(base, HeadModel) else base
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": request.param})
        try:
            yield host
        finally:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    return opened


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen2"])
def test_both_kinds_of_checkpointing_change_no_bit(
    bases: Mapping[str, Path],
    checkpointing: Callable[[Study], AbstractContextManager[ModelHost]],
    family: str,
    method: str,
    dropout: float,
    engine: str,
) -> None:
    study = tiny_study(bases[family], **{"aggregation.method": method, "lora.dropout": dropout})
    host, features, trained = prepare(study)
    with shaped(host, engine):
        torch.manual_seed(5)
        expected = collect(host, features, trained)
    with checkpointing(study) as saving, shaped(saving, engine):
        saved = [p for _, p in saving.train_only(saving.spec.trained(method))]
        calls: list[int] = []
        target = next(m for n, m in saving.model.named_modules() if n.endswith(study.lora.targets[0]))
        handle = target.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)
        found = collect(saving, features, saved)
        handle.remove()
    assert len(calls) == 2 * (1 if engine == "packed" else len(features)), "nothing was recomputed"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapter_dropout_draws_as_the_library_draws(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family], **{"aggregation.method": "fedavg", "lora.dropout": 0.3})
    host, features, trained = prepare(study)

    def plain(record: int) -> torch.Tensor:
        """Return one record's gradient by plain autograd, from a pass with all of them."""
        with host.passing(training=True):
            (passed,) = passes_of(host, features, pack(host.shape, features, range(len(features)), 64))
            start, length = passed.layout.spans[passed.records.index(record)]
            torch.manual_seed(1)
            losses = losses_of(logits_of(host, passed), passed)
            loss = losses[start : start + length] @ passed.weights[start : start + length]
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    expected = torch.stack([plain(record) for record in range(len(features))])
    torch.manual_seed(1)
    assert relative(collect(host, features, trained), expected, trained) < 1e-5
    torch.manual_seed(2)
    assert relative(collect(host, features, trained), expected, trained) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind"), [("bert", "text-classification"), ("llama", "causal-lm")])
def test_in_bfloat16_they_are_as_close_to_float32_as_plain_training(
    bases: Mapping[str, Path], family: str, kind: str, base: torch.dtype, engine: str
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": "fedavg"})
    host, features, trained = prepare(study)
    exact = one_by_one(host, features, trained)
    low, _, rounded = prepare(study, CPU.model_copy(update={"precision": "bf16"}))
    _host.cache_clear()  # its base is about to change
    for parameter in low.model.parameters():
        if all(parameter is not adapted for adapted in low.parameters.values()):
            parameter.data = parameter.data.to(base)
    plain = one_by_one(low, features, rounded)
    with shaped(low, engine):
        found = collect(low, features, rounded)
    assert found.dtype == torch.float32
    error, usual = float((found - exact).norm()), float((plain - exact).norm())
    assert usual > 1e-3 * float(exact.norm()), "nothing was rounded"
    assert error < 1.25 * usual


# --- the adapter library's other shapes ------------------------------------------------------------------


def peft_model(base: nn.Module, **config: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a PEFT model with normal adapter values, in training mode, and its trained parameters."""
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"], **config))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3)
    return model.train(), trained


class Pair(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, ..., 3] for [n, ..., 4]."""
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def layout_of(x: torch.Tensor, together: int = 1) -> Layout:
    """Return where n records lie whose rows are those of x [n, ..., size], in blocks of at most `together` records."""
    width = x[0].numel() // x.shape[-1]
    lengths = [width] * len(x)
    starts = range(0, len(x), together)
    return Layout(
        width * len(x), tuple(Block(first * width, width, tuple(lengths[first : first + together])) for first in starts)
    )


def taken(model: nn.Module, trained: Sequence[nn.Parameter], x: torch.Tensor, together: int = 1) -> torch.Tensor:
    """Return per-sample gradients of a nonlinear sum of the model's outputs."""
    for parameter in trained:
        parameter.grad = None
    with own(model, trained) as collected:
        collected.begin(layout_of(x, together))
        model(x).sin().sum().backward()
        return collected.take()


def looped(model: nn.Module, trained: Sequence[nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    """Return the same by plain autograd, one record at a time."""
    rows = [torch.autograd.grad(model(row).sin().sum(), list(trained)) for row in torch.split(x, 1)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_variants_that_are_still_linear_are_exact(config: dict[str, Any]) -> None:
    model, trained = peft_model(Pair(), **config)
    x = torch.randn(5, 3, 4)
    assert relative(taken(model, trained, x), looped(model, trained, x), trained) < 1e-5


def test_two_active_adapters_are_exact() -> None:
    model: Any
    model, _ = peft_model(Pair())
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 3, 4)
    assert relative(taken(model, trained, x), looped(model, trained, x), trained) < 1e-5


def test_dora_is_exact_without_its_magnitudes_and_refused_with_them() -> None:
    # DoRA takes the norm of W + B A as a constant, so that A and B still act as layers alone.
    model, trained = peft_model(Pair(), use_dora=True)
    x = torch.randn(5, 3, 4)
    with pytest.raises(StateError, match="no rule"):
        taken(model, trained, x)
    model, _ = peft_model(Pair(), use_dora=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
    factors = [p for p in model.parameters() if p.requires_grad]
    assert relative(taken(model, factors, x), looped(model, factors, x), factors) < 1e-5


def test_adapters_that_are_switched_off_meanwhile_are_refused() -> None:
    model: Any
    model, trained = peft_model(Pair())
    x = torch.randn(5, 4)
    with own(model, trained) as collected, model.disable_adapter():
        collected.begin(layout_of(x))
        assert torch.equal(
            model(x), model.base_model.model.second.base_layer(torch.tanh(model.base_model.model.first.base_layer(x)))
        )
        with pytest.raises(StateError, match="per-sample"):
            collected.take()


# --- layers ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(1, 6),
    positions=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_the_outer_product_is_summed_over_positions_and_not_over_records(
    seed: int, records: int, positions: int, sizes: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(records, positions, size, generator=generator) for size in sizes)
    torch.testing.assert_close(outer(left, right), torch.einsum("nta,ntb->nab", left, right), rtol=1e-4, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
    adapted=st.booleans(),
    frozen=st.sets(st.integers(0, 3), max_size=3),
    together=st.integers(1, 5),
)
def test_any_stack_of_linear_layers_equals_the_loop(
    seed: int, records: int, positions: list[int], bias: bool, adapted: bool, frozen: set[int], together: int
) -> None:
    torch.manual_seed(seed)
    base = Pair()
    if not bias:
        base.first.bias = base.second.bias = None  # type: ignore[assignment]
    model, trained = peft_model(base) if adapted else (base, list(base.parameters()))
    kept = [p for index, p in enumerate(trained) if index not in frozen]
    for parameter in trained:
        parameter.requires_grad_(any(parameter is other for other in kept))
    if not kept:
        return
    x = torch.randn(records, *positions, 4)
    expected = looped(model, kept, x)
    torch.testing.assert_close(taken(model, kept, x, together), expected, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One layer called twice on the same records, and a second layer that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, ..., 4] for [n, ..., 4]."""
        return self.tied(torch.tanh(self.layer(torch.tanh(self.layer(x)))))  # type: ignore[no-any-return]


def test_calls_of_a_shared_layer_and_of_a_shared_weight_add_up_per_record() -> None:
    torch.manual_seed(0)
    model = Twice().train()
    trained = list(model.parameters())
    assert len(trained) == 3
    for x in (torch.randn(5, 4), torch.randn(3, 2, 4)):
        assert relative(taken(model, trained, x), looped(model, trained, x), trained) < 1e-5


def test_the_parts_add_up_to_the_batch_gradient_which_is_never_computed() -> None:
    torch.manual_seed(0)
    model = Pair().train()
    trained = list(model.parameters())
    x = torch.randn(6, 4)
    whole = torch.autograd.grad(model(x).sin().sum(), trained)
    with own(model, trained) as collected:
        collected.begin(layout_of(x))
        model(x).sin().sum().backward()
        assert all(parameter.grad is None for parameter in trained)
        found = collected.take()
    torch.testing.assert_close(found.sum(0), torch.cat([g.flatten() for g in whole]), rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_lies_before_the_layers() -> None:
    torch.manual_seed(0)
    for model, trained in (peft_model(Pair()), (Pair(), [])):
        trained = trained or list(model.parameters())
        x = torch.randn(5, 3, 4, requires_grad=True)
        (expected,) = torch.autograd.grad(model(x).sin().sum(), [x])
        with own(model, trained) as collected:
            collected.begin(layout_of(x))
            model(x).sin().sum().backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_empty_places_and_rows_of_no_record_are_left_out() -> None:
    torch.manual_seed(0)
    model = Pair().train()
    trained = list(model.parameters())
    x = torch.randn(10, 4)
    # Records of 2, 1 and 2 rows; rows 3, 6 and 7 are no record's and have no loss. Row 9 lies after all blocks.
    layout = Layout(10, (Block(0, 2, (2, 1)), Block(4, 2, (2, 0))))
    rows = [[0, 1], [2], [4, 5]]
    with own(model, trained) as collected:
        collected.begin(layout)
        model(x)[[row for record in rows for row in record]].sin().sum().backward()
        found = collected.take()
    parts = [torch.autograd.grad(model(x[record]).sin().sum(), trained) for record in rows]
    expected = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------


ROWS_4 = Layout(4, tuple(Block(row, 1, (1,)) for row in range(4)))


def test_a_layer_that_mixes_records_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    with pytest.raises(StateError, match="no rule"), own(model, list(model.parameters())):
        pass


def test_a_pass_of_several_records_is_refused_where_it_must_be_one() -> None:
    model = nn.Linear(3, 2)
    with (
        per_sample_gradients(model, list(model.parameters()), packed=False) as collected,
        pytest.raises(StateError, match="must be one record, got 4"),
    ):
        collected.begin(ROWS_4)


def test_a_trained_parameter_that_took_no_part_is_refused_in_a_pass_of_several_records() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).train()
    with own(model, list(model.parameters())) as collected:
        collected.begin(ROWS_4)
        model["used"](torch.ones(4, 3)).sum().backward()
        with pytest.raises(StateError, match="per-sample"):
            collected.take()


def test_it_has_a_gradient_of_zero_in_a_pass_of_one_record() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # another pass's
    with per_sample_gradients(model, list(model.parameters()), packed=False) as collected:
        collected.begin(Layout(1, (Block(0, 1, (1,)),)))
        model["used"](torch.ones(1, 3)).sum().backward()
        assert torch.equal(collected.take(), torch.tensor([[1.0] * 8 + [0.0] * 8]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_weight_used_outside_its_layer_is_refused() -> None:
    layer = nn.Linear(3, 3).train()
    x = torch.randn(4, 3)
    with own(layer, list(layer.parameters())) as collected:
        collected.begin(ROWS_4)
        (layer(x) + x @ layer.weight).sum().backward()
        with pytest.raises(StateError, match="per-sample"):
            collected.take()


@pytest.mark.parametrize("first", ["shared", "records"])
def test_a_layer_called_with_something_all_records_share_is_refused(first: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3)).train()
    shared, records = torch.randn(1, 2, 3), torch.randn(4, 2, 3)
    inputs = (shared, records) if first == "shared" else (records, shared)
    with own(model, list(model.parameters())) as collected:
        collected.begin(layout_of(records))
        (model(inputs[0]) * model(inputs[1])).sum().backward()
        with pytest.raises(StateError, match="other than the rows of the pass"):
            collected.take()


def test_gradients_are_taken_once_and_for_the_pass_that_was_announced() -> None:
    layer = nn.Linear(3, 2).train()
    with own(layer, list(layer.parameters())) as collected:
        layer(torch.ones(4, 3)).sum().backward()  # none was announced
        with pytest.raises(StateError, match="other than the rows of the pass"):
            collected.take()
        collected.begin(layout_of(torch.ones(3, 3)))
        layer(torch.ones(4, 3)).sum().backward()
        with pytest.raises(StateError, match="other than the rows of the pass"):
            collected.take()
        collected.begin(ROWS_4)
        with pytest.raises(StateError, match="per-sample"):
            collected.take()
        collected.begin(ROWS_4)
        layer(torch.ones(4, 3)).sum().backward()
        assert torch.equal(collected.take(), torch.ones(4, 8))
        with pytest.raises(StateError, match="per-sample"):
            collected.take()


def test_what_only_evaluates_leaves_nothing_behind() -> None:
    layer = nn.Linear(3, 2).train()
    with own(layer, list(layer.parameters())) as collected:
        collected.begin(ROWS_4)
        with torch.no_grad():
            layer(torch.ones(9, 3))
        layer(torch.ones(4, 3)).sum().backward()
        assert torch.equal(collected.take(), torch.ones(4, 8))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_context_leaves_no_trace_even_after_an_error(bert: Path, engine: str) -> None:
    study = tiny_study(bert)
    host, features, trained = prepare(study)
    batch = collate(host, features)
    before = forward(host, batch).detach()

    def state() -> dict[str, list[str]]:
        return {name: sorted(vars(module)) for name, module in host.model.named_modules()}

    untouched = state()
    modes = {name: module.training for name, module in host.model.named_modules()}
    with shaped(host, engine):
        packed = host.shape.packed
        with (
            pytest.raises(KeyError),
            host.passing(training=True),
            per_sample_gradients(host.model, trained, packed=packed),
        ):
            raise KeyError
        collect(host, features, trained)
    assert all(p.grad is None for p in trained)
    assert state() == untouched
    assert {name: module.training for name, module in host.model.named_modules()} == modes
    assert torch.equal(forward(host, batch), before)
    torch.autograd.backward(record_losses(host.kind, forward(host, batch), batch).sum())
    assert all(p.grad is not None for p in trained)
    for parameter in trained:
        parameter.grad = None


@pytest.mark.parametrize("values", [5, 32, 33, 80, 96])
def test_a_row_that_is_no_number_reaches_no_other_row_of_a_product(values: int) -> None:
    # Of AMX alone: elsewhere this holds for any product.
    left, right = torch.randn(512, values).bfloat16(), torch.randn(values, 640).bfloat16()
    clean = rows_apart(left, right)
    assert torch.allclose(clean.double(), left.double() @ right.double(), rtol=2**-7, atol=2**-3)
    spoiled = rows_apart(left.index_fill(0, torch.tensor([256]), torch.nan), right)
    others = torch.arange(512) != 256
    assert torch.equal(spoiled[others], clean[others])
    assert bool(torch.isnan(spoiled[256]).all())
