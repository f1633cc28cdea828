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
from peft import LoraConfig, get_peft_model
from torch import nn

from privet.client.site import Resources
from privet.client.training.base import HeadModel
from privet.client.training.dp import PerSampleGradients, hooked_gradients, per_sample_gradients
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import _host, open_host
from privet.client.training.persample import FlatGradients, outer
from privet.client.training.tasks import collate, forward, record_losses
from privet.common.errors import PrivetError, StateError, StudyError
from privet.common.study.study import Study
from tests.support.tiny import random_adapter, records_of, rows_for, tiny_study

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")

Engine = Callable[[nn.Module, Sequence[nn.Parameter]], AbstractContextManager[PerSampleGradients]]
CPU = Resources(device="cpu", precision="fp32")
CASES = [
    (family, kind)
    for family in ("bert", "gpt2", "llama", "qwen2")
    for kind in ("text-classification", "token-classification", "causal-lm")
    if (family, kind) != ("bert", "causal-lm")
]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def collect(
    engine: Engine, host: ModelHost, study: Study, features: Sequence[Feature], trained: Sequence[nn.Parameter]
) -> torch.Tensor:
    """Return per-sample gradients [n, P] of one backward pass."""
    with engine(host.model, trained) as collected:
        batch = collate(host, features)
        record_losses(study, forward(host, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
        return torch.cat(collected.take(len(features)), dim=1)


@contextmanager
def own(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[PerSampleGradients]:
    """The engine of this package, which the choice must have fallen on."""
    with per_sample_gradients(model, trained) as collected:
        assert isinstance(collected, FlatGradients)
        yield collected


ENGINES: dict[str, Engine] = {"own": own, "hooks": hooked_gradients}


def one_by_one(
    host: ModelHost, study: Study, features: Sequence[Feature], trained: Sequence[nn.Parameter]
) -> torch.Tensor:
    """Return the same by plain autograd, one record at a time."""
    rows = []
    for feature in features:
        batch = collate(host, [feature])
        loss = record_losses(study, forward(host, batch), batch).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trained))]))
    return torch.stack(rows)


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
    expected = one_by_one(host, study, features, trained)
    assert float(expected.norm(dim=1).min()) > 0
    assert relative(collect(ENGINES[engine], host, study, features, trained), expected, trained) < 1e-5


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
    bases: Mapping[str, Path], family: str, kind: str, extra: dict[str, Any]
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": "fedavg", **extra})
    host, features, trained = prepare(study)
    expected = one_by_one(host, study, features, trained)
    assert relative(collect(own, host, study, features, trained), expected, trained) < 1e-5


@pytest.mark.parametrize(
    ("family", "kind", "saved"), [("llama", "causal-lm", "norm"), ("bert", "text-classification", "word_embeddings")]
)
def test_layers_without_a_rule_are_left_to_the_hooks(
    bases: Mapping[str, Path], family: str, kind: str, saved: str
) -> None:
    extra = {"task.kind": kind, "aggregation.method": "fedavg", "lora.modules_to_save": [saved]}
    study = tiny_study(bases[family], **extra)
    host, features, trained = prepare(study)
    with per_sample_gradients(host.model, trained) as collected:
        assert not isinstance(collected, FlatGradients)
    expected = one_by_one(host, study, features, trained)
    assert relative(collect(per_sample_gradients, host, study, features, trained), expected, trained) < 1e-5


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
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen2"])
def test_both_kinds_of_checkpointing_change_nothing(
    bases: Mapping[str, Path],
    checkpointing: Callable[[Study], AbstractContextManager[ModelHost]],
    family: str,
    method: str,
    dropout: float,
) -> None:
    study = tiny_study(bases[family], **{"aggregation.method": method, "lora.dropout": dropout})
    host, features, trained = prepare(study)
    torch.manual_seed(5)
    expected = collect(own, host, study, features, trained)
    with checkpointing(study) as saving:
        saved = [p for _, p in saving.train_only(saving.spec.trained(method))]
        calls: list[int] = []
        target = next(m for n, m in saving.model.named_modules() if n.endswith(study.lora.targets[0]))
        handle = target.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(5)
        found = collect(own, saving, study, features, saved)
        handle.remove()
    assert len(calls) == 2, "nothing was recomputed"
    assert relative(found, expected, trained) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapter_dropout_draws_as_the_library_draws(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family], **{"aggregation.method": "fedavg", "lora.dropout": 0.3})
    host, features, trained = prepare(study)
    found = {}
    for name, engine, seed in (("own", own, 1), ("hooks", hooked_gradients, 1), ("other", own, 2)):
        torch.manual_seed(seed)
        found[name] = collect(engine, host, study, features, trained)
    assert relative(found["own"], found["hooks"], trained) < 1e-5
    assert relative(found["other"], found["hooks"], trained) > 1e-2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind"), [("bert", "text-classification"), ("llama", "causal-lm")])
def test_in_bfloat16_they_are_as_close_to_float32_as_plain_training(
    bases: Mapping[str, Path], family: str, kind: str, base: torch.dtype
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, "aggregation.method": "fedavg"})
    host, features, trained = prepare(study)
    exact = one_by_one(host, study, features, trained)
    low, _, rounded = prepare(study, CPU.model_copy(update={"precision": "bf16"}))
    _host.cache_clear()  # its base is about to change
    for parameter in low.model.parameters():
        if all(parameter is not adapted for adapted in low.parameters.values()):
            parameter.data = parameter.data.to(base)
    plain = one_by_one(low, study, features, rounded)
    found = collect(own, low, study, features, rounded)
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


def taken(engine: Engine, model: nn.Module, trained: Sequence[nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    """Return per-sample gradients of a nonlinear sum of the model's outputs."""
    for parameter in trained:
        parameter.grad = None
    with engine(model, trained) as collected:
        model(x).sin().sum().backward()
        return torch.cat(collected.take(len(x)), dim=1)


def looped(model: nn.Module, trained: Sequence[nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    """Return the same by plain autograd, one record at a time."""
    rows = [torch.autograd.grad(model(row).sin().sum(), list(trained)) for row in torch.split(x, 1)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_variants_that_are_still_linear_are_exact(config: dict[str, Any]) -> None:
    model, trained = peft_model(Pair(), **config)
    x = torch.randn(5, 3, 4)
    assert relative(taken(own, model, trained, x), looped(model, trained, x), trained) < 1e-5


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
    assert relative(taken(own, model, trained, x), looped(model, trained, x), trained) < 1e-5


def test_dora_is_exact_without_its_magnitudes_and_refused_with_them() -> None:
    # DoRA takes the norm of W + B A as a constant, so that A and B still act as layers alone.
    model, trained = peft_model(Pair(), use_dora=True)
    x = torch.randn(5, 3, 4)
    with pytest.raises((PrivetError, TypeError)):
        taken(per_sample_gradients, model, trained, x)
    model, _ = peft_model(Pair(), use_dora=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
    factors = [p for p in model.parameters() if p.requires_grad]
    assert relative(taken(own, model, factors, x), looped(model, factors, x), factors) < 1e-5


def test_adapters_that_are_switched_off_meanwhile_are_refused() -> None:
    model: Any
    model, trained = peft_model(Pair())
    x = torch.randn(5, 4)
    with own(model, trained) as collected, model.disable_adapter():
        assert torch.equal(
            model(x), model.base_model.model.second.base_layer(torch.tanh(model.base_model.model.first.base_layer(x)))
        )
        with pytest.raises(StateError, match="per-sample"):
            collected.take(5)


# --- layers ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(1, 6),
    positions=st.lists(st.integers(1, 4), max_size=2),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_the_outer_product_is_summed_over_positions_and_not_over_records(
    seed: int, records: int, positions: list[int], sizes: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(records, *positions, size, generator=generator) for size in sizes)
    torch.testing.assert_close(outer(left, right), torch.einsum("n...a,n...b->nab", left, right), rtol=1e-4, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
    adapted=st.booleans(),
    frozen=st.sets(st.integers(0, 3), max_size=3),
)
def test_any_stack_of_linear_layers_equals_the_loop(
    seed: int, records: int, positions: list[int], bias: bool, adapted: bool, frozen: set[int]
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
    torch.testing.assert_close(taken(own, model, kept, x), expected, rtol=1e-4, atol=1e-5)


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
        assert relative(taken(own, model, trained, x), looped(model, trained, x), trained) < 1e-5


def test_the_parts_add_up_to_the_batch_gradient_which_is_never_computed() -> None:
    torch.manual_seed(0)
    model = Pair().train()
    trained = list(model.parameters())
    x = torch.randn(6, 4)
    whole = torch.autograd.grad(model(x).sin().sum(), trained)
    with own(model, trained) as collected:
        model(x).sin().sum().backward()
        assert all(parameter.grad is None for parameter in trained)
        (found,) = collected.take(6)
    torch.testing.assert_close(found.sum(0), torch.cat([g.flatten() for g in whole]), rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_lies_before_the_layers() -> None:
    torch.manual_seed(0)
    for model, trained in (peft_model(Pair()), (Pair(), [])):
        trained = trained or list(model.parameters())
        x = torch.randn(5, 3, 4, requires_grad=True)
        (expected,) = torch.autograd.grad(model(x).sin().sum(), [x])
        with own(model, trained):
            model(x).sin().sum().backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------


def test_a_layer_that_mixes_records_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    with (
        pytest.raises(StudyError, match="gradient of each single record"),
        per_sample_gradients(model, list(model.parameters())),
    ):
        pass


def test_embeddings_shared_by_all_records_fail_closed(bert: Path) -> None:
    # BERT looks position embeddings up once for the whole batch: they have no per-sample gradient.
    study = tiny_study(bert, **{"lora.modules_to_save": ["position_embeddings"]})
    host, features, trained = prepare(study)
    with pytest.raises(PrivetError):
        collect(per_sample_gradients, host, study, features, trained)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_parameter_that_took_no_part_is_refused(engine: str) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).train()
    with ENGINES[engine](model, list(model.parameters())) as collected:
        model["used"](torch.ones(4, 3)).sum().backward()
        with pytest.raises(StateError, match="per-sample"):
            collected.take(4)


def test_a_weight_used_outside_its_layer_is_refused() -> None:
    layer = nn.Linear(3, 3).train()
    x = torch.randn(4, 3)
    with own(layer, list(layer.parameters())) as collected:
        (layer(x) + x @ layer.weight).sum().backward()
        with pytest.raises(StateError, match="per-sample"):
            collected.take(4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", ["shared", "records"])
def test_a_layer_called_with_something_all_records_share_is_refused(engine: str, first: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3)).train()
    shared, records = torch.randn(1, 2, 3), torch.randn(4, 2, 3)
    inputs = (shared, records) if first == "shared" else (records, shared)
    with ENGINES[engine](model, list(model.parameters())) as collected:
        (model(inputs[0]) * model(inputs[1])).sum().backward()
        with pytest.raises(StateError, match="other than the batch"):
            collected.take(4)


def test_gradients_are_taken_once() -> None:
    layer = nn.Linear(3, 2).train()
    with own(layer, list(layer.parameters())) as collected:
        layer(torch.ones(4, 3)).sum().backward()
        with pytest.raises(StateError):
            collected.take(3)
        with pytest.raises(StateError):
            collected.take(4)


def test_what_only_evaluates_leaves_nothing_behind() -> None:
    layer = nn.Linear(3, 2).train()
    with own(layer, list(layer.parameters())) as collected:
        with torch.no_grad():
            layer(torch.ones(9, 3))
        layer(torch.ones(4, 3)).sum().backward()
        assert torch.equal(collected.take(4)[0], torch.ones(4, 8))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_context_leaves_no_trace_even_after_an_error(bert: Path, engine: str) -> None:
    study = tiny_study(bert)
    host, features, trained = prepare(study)
    batch = collate(host, features)
    before = forward(host, batch).detach()
    state = {name: sorted(vars(module)) for name, module in host.model.named_modules()}
    with pytest.raises(KeyError), ENGINES[engine](host.model, trained):
        raise KeyError
    collect(ENGINES[engine], host, study, features, trained)
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in trained)
    if engine == "own":
        assert {name: sorted(vars(module)) for name, module in host.model.named_modules()} == state
    assert torch.equal(forward(host, batch), before)
    record_losses(study, forward(host, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and getattr(p, "grad_sample", None) is None for p in trained)
    for parameter in trained:
        parameter.grad = None
