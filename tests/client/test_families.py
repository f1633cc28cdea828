"""Families of models: each trains with the gradients of single records, or is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from privet.client.site import Resources
from privet.client.training.architecture import first_position, most_positions
from privet.client.training.base import build_base
from privet.client.training.boundary import first_sentence, library_errors
from privet.client.training.model import _host, open_host
from privet.common.errors import DataError, StudyError
from tests.support.families import FAMILIES, MORE, family_base, family_study
from tests.support.family_table import CLOSE, KINDS, NAMES, built, measure, published, table
from tests.support.tiny import tiny_study

CPU = Resources(device="cpu", precision="fp32")


def refusal(study: Any) -> str:
    with pytest.raises(StudyError) as caught:
        open_host(study, CPU)
    assert "Traceback" not in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


# --- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "token-classification"),
        ("gpt2", "causal-lm"),
        ("deberta-v3", "text-classification"),
        ("mixtral", "causal-lm"),
        ("gemma3-vision", "causal-lm"),
        ("t5", "text-classification"),
    ],
)
def test_a_family_trains_as_the_table_says(name: str, kind: str) -> None:
    with built(name) as base:
        found = measure(base, name, kind)
    assert found.error < CLOSE
    assert found.repeats
    assert found.dropout is not False
    (row,) = [line for line in published().splitlines() if line.startswith(f"| {name} |")]
    assert row.split(" | ")[1 + KINDS.index(kind)] == found.cell


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_is_measured() -> None:
    """Written by `python -m tests.support.family_table --write`."""
    outcomes = {}
    for name in NAMES:
        with built(name) as base:
            for kind in KINDS:
                outcomes[name, kind] = found = measure(base, name, kind)
                assert found.error < CLOSE, (name, kind)
                assert found.repeats, (name, kind)
                assert found.dropout is not False, (name, kind)
    assert table(outcomes) == published()


@pytest.mark.parametrize("name", ["longformer", "xlnet", "gpt-neo", "mamba"])
def test_a_family_that_mixes_rows_takes_one_record_a_pass(tmp_path: Path, name: str) -> None:
    host = open_host(family_study(family_base(tmp_path / "base", name), name), CPU)
    assert not host.shape.packed
    assert host.verdict.startswith(MORE[name].verdict)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    base = family_base(tmp_path / "base", name)
    found = refusal(family_study(base, name, **{"task.kind": kind}))
    assert found == "model.base: an encoder-decoder; take an encoder or a decoder"


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_a_language_model_that_sees_later_tokens_is_refused(tmp_path: Path, name: str) -> None:
    """Its loss would fall to nothing: it would learn to copy the token that it is given."""
    base = family_base(tmp_path / "base", name, head=True)
    assert "sees later tokens" in refusal(family_study(base, name, **{"task.kind": "causal-lm"}))


def test_a_family_without_a_language_model_is_named(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "mpnet")
    assert "the family mpnet has no class for a language model" in refusal(
        family_study(base, "mpnet", **{"task.kind": "causal-lm"})
    )


def test_layers_that_a_task_does_not_use_are_named(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "longformer")
    found = refusal(family_study(base, "longformer", **{"lora.targets": ["query", "query_global"]}))
    assert found == "lora.targets: the model does not use the layers query_global in text-classification"


class _Failing(torch.autograd.Function):
    """Computes forwards, and fails backwards, as where a family changes a view in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a view was modified inplace. More of it.\nAnd more")


def test_layers_without_a_gradient_are_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = transformers.models.bert.modeling_bert.BertIntermediate
    plain = inner.forward
    monkeypatch.setattr(inner, "forward", lambda self, x: _Failing.apply(plain(self, x)))  # type: ignore[no-untyped-call]
    _host.cache_clear()
    found = refusal(tiny_study(bert, **{"lora.layers": 1, "lora.targets": ["query", "value", "output.dense"]}))
    assert found == (
        "lora.targets: no gradient can be computed for dense, query, value of the base model (RuntimeError: a view was "
        "modified inplace)"
    )


def test_a_slow_tokenizer_cannot_tell_the_word_of_a_token(bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    for file in base.glob("*token*"):
        file.unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    found = refusal(tiny_study(base, **{"task.kind": "token-classification"}))
    assert found.startswith("model.base: token-classification needs a fast tokenizer")
    assert "ByT5Tokenizer" in found


def _unknown_family(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "no-such-family"}))


def _other_sizes(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def _no_tokenizer(base: Path) -> None:
    for file in base.glob("token*"):
        file.unlink()


def _broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"version": "1.0"}')


def _broken_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\0" * 100)


def _pictures(base: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(base)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_unknown_family, "cannot be loaded (ValueError: "),
        (_other_sizes, "cannot be loaded ("),
        (_no_tokenizer, "has no tokenizer"),
        (_broken_tokenizer, "the tokenizer of the base cannot be read ("),
        (_broken_weights, "cannot be loaded ("),
        (_pictures, "linear layers are fc1"),
    ],
)
def test_no_error_of_a_library_passes(bert: Path, tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    damage(base)
    assert text in refusal(tiny_study(base, **{"lora.targets": ["query"]}))


def test_a_model_of_pictures_is_refused(bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    _pictures(base)
    assert "no table of token embeddings" in refusal(tiny_study(base, **{"lora.targets": ["q_proj"]}))


def test_the_boundary_says_what_failed_and_passes_what_was_meant() -> None:
    with (
        pytest.raises(StudyError, match=r"^model\.base: no \(KeyError: 'x'\) \(do\)$"),
        library_errors("model.base: no", "do"),
    ):
        raise KeyError("x")
    with pytest.raises(DataError), library_errors("model.base: no", "do"):
        raise DataError("meant")
    with pytest.raises(StudyError, match="too little memory"), library_errors("model.base: no", "do"):
        raise MemoryError
    assert len(first_sentence(ValueError("long " * 100))) < 180
    assert first_sentence(ValueError("One thing. Another\nthird")) == "ValueError: One thing"
    assert first_sentence(ValueError()) == "ValueError"


# --- what a family calls its own -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first"), [("roberta", 1), ("longformer", 1), ("mpnet", 2), ("bert", 0), ("opt", 0)])
def test_positions_start_where_the_family_starts_them(tmp_path: Path, name: str, first: int) -> None:
    base = family_base(tmp_path / "base", name)
    bare = build_base(base, family_study(base, name).task, 0.0, "sdpa", torch.float32)
    assert first_position(bare) == first
    most = most_positions(bare)
    assert most == 128 - (2 if name == "opt" else first)
    assert open_host(family_study(base, name, **{"data.max_length": most}), CPU)
    found = refusal(family_study(base, name, **{"data.max_length": most + 1}))
    assert found == f"data.max_length: expected at most {most} tokens, the limit of the base model, found {most + 1}"


@pytest.mark.parametrize("name", ["gemma3-vision", "llava"])
def test_a_multimodal_base_is_trained_as_its_text_model_alone(tmp_path: Path, name: str) -> None:
    base = family_base(tmp_path / "base", name)
    study = family_study(base, name, **{"task.kind": "causal-lm", "lora.layers": 1, "lora.targets": ["all-linear"]})
    host = open_host(study, CPU)
    assert len(host.spec.pairs()) == 7
    assert all(".layers.1." in tensor and "vision" not in tensor for tensor in host.spec.names)
    assert not any("vision" in found for found, _ in host.model.named_parameters())
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base).eval()
    ids = torch.arange(4, 14)[None]
    bare = build_base(base, study.task, 0.0, "sdpa", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(bare(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_a_layer_is_never_left_out_by_dropout(tmp_path: Path) -> None:
    base = family_base(tmp_path / "base", "opt")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"layerdrop": 0.5}))
    study = family_study(base, "opt")
    model: Any = build_base(base, study.task, 0.2, "sdpa", torch.float32)
    assert (model.config.layerdrop, model.config.dropout) == (0.0, 0.2)


def test_every_family_of_the_quick_tests_is_in_the_table() -> None:
    rows = published()
    assert all(f"| {name} |" in rows for name in FAMILIES)
