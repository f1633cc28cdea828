"""Adapters as people write them: all linear layers, patterns of rank and alpha, rsLoRA; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from privet.client.site import Resources
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.targets import short_names
from privet.common.errors import StudyError
from privet.common.study.study import Study
from privet.server.rounds.aggregate import refactor
from tests.support.families import family_base, family_study
from tests.support.family_table import CLOSE, collect
from tests.support.losses import one_by_one
from tests.support.tiny import random_adapter, records_of, rows_for, tiny_document, tiny_study

CPU = Resources(device="cpu", precision="fp32")


def layers_of(host: ModelHost) -> dict[str, LoraLinear]:
    return {name: module for name, module in host.model.named_modules() if isinstance(module, LoraLinear)}


def refusal(study: Study) -> str:
    with pytest.raises(StudyError) as caught:
        open_host(study, CPU)
    return caught.value.message


# --- all linear layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "names"),
    [
        ("bert", "text-classification", {"query", "key", "value", "dense"}),
        ("gpt2", "causal-lm", {"c_attn", "c_proj", "c_fc"}),
        ("llama", "causal-lm", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_all_linear_is_every_linear_layer_but_the_head(
    bases: Mapping[str, Path], family: str, kind: str, names: set[str]
) -> None:
    host = open_host(tiny_study(bases[family], **{"task.kind": kind, "lora.targets": ["all-linear"]}), CPU)
    assert {name.rpartition(".")[2] for name in layers_of(host)} == names
    assert {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in host.spec.pairs()} == names
    top = open_host(
        tiny_study(bases[family], **{"task.kind": kind, "lora.targets": ["all-linear"], "lora.layers": 1}), CPU
    )
    assert 2 * len(layers_of(top)) == len(layers_of(host))


def test_all_linear_may_stand_beside_other_names(llama: Path) -> None:
    host = open_host(tiny_study(llama, **{"task.kind": "causal-lm", "lora.targets": ["all-linear", "lm_head"]}), CPU)
    assert len(layers_of(host)) == 15


def test_all_linear_leaves_routed_experts_alone(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "qwen2-moe")
    host = open_host(family_study(base, "qwen2-moe", **{"lora.targets": ["all-linear"]}), CPU)
    assert not any(".experts." in name for name in host.spec.names)
    assert any(".shared_expert." in name for name in host.spec.names)


# --- patterns and rsLoRA ---------------------------------------------------------------------------------


PATTERNS: dict[str, Any] = {
    "lora.targets": ["all-linear"],
    "lora.rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
    "lora.alpha_pattern": {"v_proj": 3.0},
    "lora.rslora": True,
    "task.kind": "causal-lm",
    "aggregation.method": "fedavg",
}


def test_patterns_and_rslora_set_rank_and_scale_layer_by_layer(llama: Path) -> None:
    host = open_host(tiny_study(llama, **PATTERNS), CPU)
    for name, layer in layers_of(host).items():
        rank = 2 if name.endswith("down_proj") else 6 if name.endswith("1.self_attn.q_proj") else 4
        alpha = 3.0 if name.endswith("v_proj") else 8.0
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / math.sqrt(rank))
        assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == rank


def test_gradients_of_single_records_have_each_layers_own_scale(llama: Path) -> None:
    study = tiny_study(llama, **PATTERNS)
    host = open_host(study, CPU)
    assert host.shape.packed
    host.mount(random_adapter(host.spec, scale=0.05))
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 5, seed=3)))
    trained = [p for _, p in host.train_only(host.spec.trained("fedavg"))]
    found = collect(host, features, trained)
    host.model.double()
    expected = one_by_one(host, features, trained).float()
    host.model.float()
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < CLOSE


def test_refactoring_keeps_the_product_of_each_rank(llama: Path) -> None:
    study = tiny_study(llama, **PATTERNS)
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    again, bases = refactor(adapter)
    ranks = {len(basis) for basis in bases.values()}
    assert ranks == {2, 4, 6}
    for a, b in host.spec.pairs():
        np.testing.assert_allclose(
            again.values[b] @ again.values[a], adapter.values[b] @ adapter.values[a], rtol=1e-4, atol=1e-5
        )
    first = initial_adapter(study, host)
    for a, _ in host.spec.pairs():
        np.testing.assert_allclose(first.values[a] @ first.values[a].T, np.eye(len(first.values[a])), atol=1e-6)


def test_the_order_of_a_pattern_changes_nothing(llama: Path) -> None:
    """The digest is one of sorted keys, so two studies of one digest must train the same."""
    document = tiny_document(llama, PATTERNS)
    turned = tiny_document(llama, PATTERNS)
    turned["lora"]["rank_pattern"] = dict(reversed(document["lora"]["rank_pattern"].items()))
    one, other = Study.parse(document), Study.parse(turned)
    assert one.digest == other.digest
    assert open_host(one, CPU).spec == open_host(other, CPU).spec


def test_a_study_without_the_new_keys_does_not_say_them(bert: Path) -> None:
    assert set(tiny_study(bert).document()["lora"]) == {
        "rank", "alpha", "dropout", "targets", "layers", "modules_to_save"
    }  # fmt: skip


def test_ranks_are_said_in_words(bert: Path) -> None:
    assert tiny_study(bert).lora.ranks_text == "4"
    assert tiny_study(bert, **{"lora.rank_pattern": {"query": 16}}).lora.ranks_text == "4 to 16"


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("bert", {"lora.targets": ["quary"]}, "no layer quary; its linear layers are dense, key, query, value"),
        ("bert", {"lora.targets": ["query.*"]}, r"no layer query.*; its"),
        ("bert", {"lora.targets": ["classifier"]}, "no layer classifier"),
        ("bert", {"lora.targets": ["LayerNorm"]}, "LayerNorm is no linear layer of the base model (it is a LayerNorm)"),
        ("bert", {"lora.modules_to_save": ["poler"]}, "no layer poler; its layers are "),
        ("bert", {"lora.rank_pattern": {"dense": 2}}, "no layer dense; its adapted layers are query, value"),
        ("bert", {"lora.alpha_pattern": {"query": 2.0, "self.query": 3.0}}, "query and self.query both name the layer"),
        ("gpt2", {"task.kind": "causal-lm", "lora.modules_to_save": ["lm_head"]}, "lm_head is tied to the embedding"),
        ("gpt2", {"task.kind": "causal-lm", "lora.modules_to_save": ["wte"]}, "wte is tied to lm_head"),
    ],
)
def test_a_name_that_cannot_be_trained_is_refused(
    bases: Mapping[str, Path], family: str, change: dict[str, Any], text: str
) -> None:
    assert text in refusal(tiny_study(bases[family], **change))


def test_experts_are_no_linear_layers(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "mixtral")
    assert "experts is no linear layer" in refusal(family_study(base, "mixtral", **{"lora.targets": ["experts"]}))


def test_top_layers_are_not_guessed(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "albert")
    assert "top layers of the base model cannot be told" in refusal(family_study(base, "albert", **{"lora.layers": 1}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("use_dora", True, "lora.use_dora: DoRA is not supported"),
        ("use_rslora", True, "lora.use_rslora: unknown key; set rslora = true instead"),
        ("r", 8, "lora.r: unknown key; set rank instead"),
        ("rank_pattern", {"query": 0}, "lora.rank_pattern.query"),
        ("rank_pattern", {"(a+)+": 4}, "lora.rank_pattern"),
        ("alpha_pattern", {"query": -1.0}, "lora.alpha_pattern.query"),
    ],
)
def test_keys_of_other_libraries_are_answered(bert: Path, field: str, value: Any, text: str) -> None:
    document = tiny_document(bert, {})
    document["lora"][field] = value
    with pytest.raises(StudyError) as caught:
        Study.parse(document)
    assert text in caught.value.message


def test_at_most_twenty_names_are_listed() -> None:
    assert short_names(f"layers.0.name{index:02}" for index in range(30)).endswith("name19 and 10 more")


@pytest.mark.parametrize("saved", ["embeddings", "word_embeddings"])
def test_an_untied_embedding_is_trained_in_full(bert: Path, saved: str) -> None:
    study = tiny_study(bert, **{"lora.modules_to_save": [saved], "aggregation.method": "fedavg"})
    host = open_host(study, CPU)
    assert not host.shape.packed
    host.mount(random_adapter(host.spec))
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 3, seed=3)))
    trained = [p for _, p in host.train_only(host.spec.trained("fedavg"))]
    found = collect(host, features, trained)
    assert torch.equal(found, torch.stack([collect(host, [feature], trained)[0] for feature in features]))
    sizes = [tensor.size for tensor in host.spec.trained("fedavg")]
    assert all(bool(part.any()) for part in torch.split(found, sizes, dim=1))
