"""The base and its adapter: verified before use, nothing executed, deterministic, and PEFT's own format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from privet.client.bases.names import locate_base
from privet.client.bases.opened import open_base
from privet.client.site import Resources
from privet.client.training import passes
from privet.client.training.base import HeadModel, build_base
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import (
    _host,
    choose_autocast,
    choose_device,
    initial_adapter,
    load_bare,
    open_host,
    peft_config_text,
)
from privet.client.training.packing import pack
from privet.client.training.passes import passes_of
from privet.client.training.tasks import collate, forward
from privet.common.errors import ProtocolError, RefusedError, StudyError, VerificationError
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.sections import ModelSection
from privet.common.study.study import Study
from tests.client.test_dp import single_passes
from tests.support import families
from tests.support.tiny import FAMILIES, LABELS, random_adapter, records_of, rows_for, sha256_table, tiny_study

CPU = Resources(device="cpu", precision="fp32")


def copy_of(base: Path, to: Path) -> Path:
    return Path(shutil.copytree(base, to / "base"))


def section(base: Path) -> ModelSection:
    return ModelSection(base=str(base), sha256=sha256_table(base))


def logits_of(host: ModelHost, study: Study, features: list[Feature]) -> torch.Tensor:
    host.model.eval()
    with torch.no_grad():
        return forward(host, collate(host, features))


def logits_in_passes(host: ModelHost, features: list[Feature], engine: str) -> torch.Tensor:
    """Return the logits at each record's first row [n, classes], from passes as training has them."""
    found: dict[int, torch.Tensor] = {}
    with single_passes(host, engine), host.passing(training=False), torch.no_grad():
        for passed in passes_of(host, features, pack(host.shape, features, range(len(features)), 64)):
            logits = passes.logits_of(host, passed)
            for record, (start, _) in zip(passed.records, passed.layout.spans, strict=True):
                found[record] = logits[start]
    return torch.stack([found[record] for record in range(len(features))])


def features_of(host: ModelHost, study: Study, rows: int = 6) -> list[Feature]:
    return encode_records(study, host.tokenizer, records_of(study, rows_for(study, rows, 3)))


# --- verification ----------------------------------------------------------------------------------------


def test_a_pinned_base_opens(bert: Path) -> None:
    opened = open_base(section(bert))
    assert opened.name == bert.resolve().name
    assert {file.name: file.resolve() for file in opened.iterdir()} == {
        name: (bert / name).resolve() for name in sha256_table(bert)
    }


def test_another_models_bytes_are_refused(bert: Path, tmp_path: Path) -> None:
    base = copy_of(bert, tmp_path)
    pinned = section(base)
    open_base(pinned)
    weights = load_file(base / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + np.float32(1e-3)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=pinned.sha256["model.safetensors"]):
        open_base(pinned)


@pytest.mark.parametrize("digest", ["0" * 64, "f" * 64])
def test_a_wrong_digest_is_refused_before_anything_is_loaded(bert: Path, digest: str) -> None:
    study = tiny_study(bert, model={"sha256": {**sha256_table(bert), "model.safetensors": digest}})
    with pytest.raises(VerificationError, match="expected SHA-256"):
        open_host(study, CPU)


def test_every_weight_file_must_be_pinned(bert: Path, tmp_path: Path) -> None:
    base = copy_of(bert, tmp_path)
    pinned = section(base)
    shutil.copy(base / "model.safetensors", base / "extra.safetensors")
    with pytest.raises(VerificationError, match=r"extra\.safetensors in .* is not pinned"):
        open_base(pinned)


def test_every_pinned_file_must_be_there(bert: Path, tmp_path: Path) -> None:
    base = copy_of(bert, tmp_path)
    pinned = {**sha256_table(base), "tokenizer.json": "0" * 64, "../base/config.json": "0" * 64, "gone": "0" * 64}
    with pytest.raises(VerificationError, match=r"\.\./base/config\.json, gone is pinned in the study, but is not in"):
        open_base(ModelSection(base=str(base), sha256=pinned))


def test_a_tokenizer_can_be_pinned_too(bert: Path, tmp_path: Path) -> None:
    base = copy_of(bert, tmp_path)
    pinned = ModelSection(base=str(base), sha256={**sha256_table(base), "tokenizer.json": "0" * 64})
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        open_base(pinned)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_refused_with_a_hint_to_convert_them(bert: Path, tmp_path: Path, name: str) -> None:
    base = copy_of(bert, tmp_path)
    pinned = section(base)
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(StudyError, match=f"safetensors file; found {name}") as caught:
        open_base(pinned)
    assert "convert the weights to safetensors" in caught.value.hint


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_base_brings_is_refused_and_never_run(bert: Path, tmp_path: Path, file: str) -> None:
    base = copy_of(bert, tmp_path)
    sentinel = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (base / f"{module}.py").write_text(code)
    document = json.loads((base / file).read_text())
    document["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    }
    (base / file).write_text(json.dumps(document))
    with pytest.raises(RefusedError, match="auto_map"):
        open_host(tiny_study(base), CPU)
    assert not sentinel.exists()


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    for base, text in (
        (str(tmp_path / "nothing"), "no directory"),
        ("package:no_such_package_here", "no installed Python package"),
        ("package:not a name", "no installed Python package"),
        ("somebody/no-such-model", "neither a base that this machine maps nor a model in the local Hugging Face cache"),
    ):
        with pytest.raises(StudyError, match=text):
            locate_base(ModelSection(base=base, sha256={"model.safetensors": "0" * 64}))


def test_a_base_without_the_weights_of_its_task_is_refused(bert: Path) -> None:
    # Its language head would start at random, another one at every site.
    with pytest.raises(StudyError, match=r"lacks .* causal-lm"):
        open_host(tiny_study(bert, **{"task.kind": "causal-lm"}), CPU)


# --- the adapter's layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora.targets": ["no_such_layer"]}, "no_such_layer"),
        ({"lora.targets": ["query", "valeu"]}, "has no layer valeu"),
        ({"lora.targets": ["LayerNorm"]}, "LayerNorm"),
        ({"lora.targets": ["word_embeddings"]}, "embedding"),
        ({"lora.modules_to_save": ["poller"]}, "has no layer poller"),
        ({"lora.layers": 3}, "expected at most 2, the number of layers of the base model, found 3"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(bert: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(StudyError, match=text):
        open_host(tiny_study(bert, **change), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_top_layers_are_adapted(bases: Mapping[str, Path], family: str) -> None:
    names = open_host(tiny_study(bases[family], **{"lora.layers": 1}), CPU).spec.names
    assert any(".1." in name for name in names)
    assert not any(".0." in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_names_what_is_trained_and_nothing_else(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family])
    _host.cache_clear()  # hosts are shared, and another test may have trained a part of this one
    host = open_host(study, CPU)
    roles = {tensor.name: tensor.role for tensor in host.spec.tensors}
    pairs = host.spec.pairs()
    assert len(pairs) == 2 * len(study.lora.targets)
    assert all(roles.pop(a) == "lora_A" and roles.pop(b) == "lora_B" for a, b in pairs)
    assert {name.rpartition(".classifier.")[2] for name in roles} == {"weight", "bias"}
    trainable = sum(p.numel() for p in host.model.parameters() if p.requires_grad)
    assert trainable == sum(tensor.size for tensor in host.spec.tensors)
    assert host.base_parameters == sum(p.numel() for p in host.model.parameters()) - trainable
    for method, count in (("fedavg", len(host.spec.tensors)), ("ffa", len(host.spec.tensors) - len(pairs))):
        host.train_only(host.spec.trained(method))
        assert sum(p.requires_grad for p in host.model.parameters()) == count
    host.train_only(host.spec.tensors)


# --- where an adapter starts -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_adapter_is_the_base_with_orthonormal_a(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family])
    adapter = initial_adapter(study, open_host(study, CPU))
    for tensor in adapter.spec.tensors:
        value = adapter.values[tensor.name].astype(np.float64)
        if tensor.role == "lora_A":
            np.testing.assert_allclose(value @ value.T, np.eye(tensor.shape[0]), atol=1e-6)
        else:
            assert not value.any()


def test_more_rank_than_width_leaves_rows_of_zeros(bert: Path) -> None:
    study = tiny_study(bert, **{"lora.rank": 40})
    adapter = initial_adapter(study, open_host(study, CPU))
    a = adapter.values[adapter.spec.pairs()[0][0]]
    np.testing.assert_allclose(a @ a.T, np.diag([1.0] * 32 + [0.0] * 8), atol=1e-6)


def test_the_first_adapter_is_a_function_of_base_and_seed(bert: Path) -> None:
    study = tiny_study(bert)
    host = open_host(study, CPU)
    first = initial_adapter(study, host)
    torch.manual_seed(99)
    host.mount(random_adapter(host.spec))
    assert initial_adapter(study, host).digest == first.digest
    assert initial_adapter(tiny_study(bert, **{"training.rounds": 9}), host).digest == first.digest
    assert initial_adapter(tiny_study(bert, seed=8), host).digest != first.digest
    a = [first.values[name] for name, _ in first.spec.pairs()]
    assert not np.array_equal(a[0], a[1]), "layers share their random values"


@pytest.mark.parametrize("extra", ["LayerNorm", "intermediate", "embeddings"])
def test_other_modules_trained_in_full_start_as_the_base_has_them(bert: Path, extra: str) -> None:
    study = tiny_study(bert, **{"lora.modules_to_save": [extra]})
    host = open_host(study, CPU)
    adapter = initial_adapter(study, host)
    host.mount(random_adapter(host.spec))
    assert initial_adapter(study, host).digest == adapter.digest
    weights = load_file(bert / "model.safetensors")
    full = [t for t in adapter.spec.tensors if t.role == "full" and ".classifier." not in t.name]
    assert full
    for tensor in full:
        name = tensor.name.removeprefix("base_model.model.backbone.")
        np.testing.assert_array_equal(adapter.values[tensor.name], weights[name])


def test_hosts_are_shared_between_studies_that_differ_in_training_alone(bert: Path) -> None:
    host = open_host(tiny_study(bert), CPU)
    assert open_host(tiny_study(bert, **{"training.rounds": 9, "aggregation.method": "ffa"}), CPU) is host
    assert open_host(tiny_study(bert, **{"lora.rank": 2}), CPU) is not host


# --- the head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("way", ["batch", "packed", "single"])
def test_pooling_takes_the_right_tokens_and_no_padding(
    bases: Mapping[str, Path], family: str, pooling: str, way: str
) -> None:
    study = tiny_study(bases[family], **{"task.pooling": pooling})
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    host.mount(adapter)
    ragged = [Feature(tuple(range(10, 10 + length)), 0) for length in (9, 4, 1)]
    found = logits_of(host, study, ragged) if way == "batch" else logits_in_passes(host, ragged, way)
    weight, bias = (
        torch.from_numpy(next(v for n, v in adapter.values.items() if n.endswith(f"classifier.{leaf}")))
        for leaf in ("weight", "bias")
    )
    for row, feature in enumerate(ragged):
        batch = collate(host, [feature])
        with torch.no_grad():
            model = host.model.base_model.model
            assert isinstance(model, HeadModel)
            hidden = model.backbone(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        vector = vector / vector.square().mean().sqrt()
        torch.testing.assert_close(found[row], weight @ vector + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_reads_all_layers_sees_each_layer_of_a_token(bases: Mapping[str, Path], family: str) -> None:
    study = tiny_study(bases[family], **{"task.kind": "token-classification", "task.head_reads": "all-layers"})
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    host.mount(adapter)
    weight, bias = (torch.tensor(adapter.values[f"base_model.model.classifier.{name}"]) for name in ("weight", "bias"))
    model = host.model.base_model.model
    assert isinstance(model, HeadModel)
    config: Any = model.config
    width = config.hidden_size
    assert weight.shape[1] == (1 + config.num_hidden_layers) * width
    features = features_of(host, study)
    found = logits_of(host, study, features)
    for row, feature in enumerate(features):
        batch = collate(host, [feature])
        with torch.no_grad():
            output = model.backbone(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        every = torch.cat([layer[0] for layer in output.hidden_states], -1)
        assert torch.equal(every[:, -width:], output.last_hidden_state[0])
        torch.testing.assert_close(found[row, : len(feature.ids)], every @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_head_that_reads_all_layers_is_for_words_and_for_bases_that_show_their_layers(bert: Path) -> None:
    every = {"task.head_reads": "all-layers"}
    with pytest.raises(StudyError, match="needs kind token-classification, found text-classification"):
        tiny_study(bert, **every)
    study = tiny_study(bert, **{"task.kind": "token-classification", **every})
    model = build_base(locate_base(study.model, CPU.bases), study.task, 0.0, "sdpa", torch.float32)
    assert isinstance(model, HeadModel)
    forward_ = model.backbone.forward

    def without_the_first(**inputs: Any) -> Any:
        output = forward_(**inputs)
        output.hidden_states = output.hidden_states[1:]
        return output

    model.backbone.forward = without_the_first
    with pytest.raises(StudyError, match=r"task.head_reads: .* of the family bert does not give"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["text-classification", "token-classification", "causal-lm"])
def test_padding_changes_no_logits(bases: Mapping[str, Path], family: str, kind: str) -> None:
    if (family, kind) == ("bert", "causal-lm"):
        kind = "token-classification"
    study = tiny_study(bases[family], **{"task.kind": kind})
    host = open_host(study, CPU)
    host.mount(random_adapter(host.spec))
    features = features_of(host, study)
    together = logits_of(host, study, features)
    for row, feature in enumerate(features):
        alone = logits_of(host, study, [feature])[0]
        own = together[row] if alone.dim() == 1 else together[row, : len(feature.ids)]
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-4)


def test_an_untrained_classifier_prefers_no_class(bert: Path) -> None:
    study = tiny_study(bert)
    host = open_host(study, CPU)
    host.mount(initial_adapter(study, host))
    assert not logits_of(host, study, features_of(host, study)).any()


# --- PEFT's format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "extra"),
    [
        ("bert", "text-classification", {}),
        ("bert", "text-classification", {"lora.layers": 1, "lora.modules_to_save": ["LayerNorm"]}),
        ("bert", "token-classification", {}),
        ("gpt2", "text-classification", {}),
        ("gpt2", "causal-lm", {}),
        ("llama", "causal-lm", {"lora.modules_to_save": ["lm_head"]}),
        ("qwen2", "causal-lm", {}),
        ("qwen2", "causal-lm", {"lora.targets": ["all-linear"], "lora.rslora": True}),
        ("gpt2", "token-classification", {"lora.targets": ["all-linear"], "lora.rank_pattern": {"c_fc": 2}}),
        ("llama", "causal-lm", {"lora": {"rank_pattern": {"1.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 3.0}}}),
    ],
)
def test_a_published_adapter_loads_with_peft_and_computes_the_same(
    bases: Mapping[str, Path], tmp_path: Path, family: str, kind: str, extra: dict[str, Any]
) -> None:
    study = tiny_study(bases[family], **{"task.kind": kind, **extra})
    host = open_host(study, CPU)
    adapter = random_adapter(host.spec)
    host.mount(adapter)
    features = features_of(host, study)
    expected = logits_of(host, study, features)
    (tmp_path / "adapter_config.json").write_text(peft_config_text(host, study))
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter.data)

    loaded = PeftModel.from_pretrained(load_bare(study), tmp_path).eval()
    batch = collate(host, features)
    with torch.no_grad():
        output = loaded(input_ids=batch.ids, attention_mask=batch.mask)
    found = output if isinstance(output, torch.Tensor) else output.logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01

    saved = tmp_path / "again"
    loaded.save_pretrained(saved)
    assert read_layout((saved / "adapter_model.safetensors").read_bytes()) == adapter.spec
    for name, value in load_file(saved / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(value, adapter.values[name])


def test_an_adapters_bytes_are_safetensors_and_read_back(bert: Path, tmp_path: Path) -> None:
    host = open_host(tiny_study(bert), CPU)
    adapter = random_adapter(host.spec)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter.data)
    assert {n: v.tobytes() for n, v in load_file(file).items()} == {n: v.tobytes() for n, v in adapter.values.items()}
    assert Adapter.read(host.spec, adapter.data).digest == adapter.digest
    for broken in (adapter.data[:-1], adapter.data + b"\0", b"\xff" * len(adapter.data), b""):
        with pytest.raises(ProtocolError):
            Adapter.read(host.spec, broken)


def test_what_is_mounted_is_what_is_in_the_model(bert: Path) -> None:
    host = open_host(tiny_study(bert), CPU)
    adapter = random_adapter(host.spec, seed=5)
    host.mount(adapter)
    for name, parameter in host.parameters.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), adapter.values[name])
    assert len(LABELS) in {p.shape[0] for n, p in host.parameters.items() if ".classifier." in n}


# --- resources -------------------------------------------------------------------------------------------


def test_resources_choose_device_and_precision() -> None:
    cpu = torch.device("cpu")
    assert choose_device(Resources(device="cpu")) == cpu
    assert choose_autocast(Resources(precision="fp32"), cpu) is None
    assert choose_autocast(Resources(precision="bf16"), cpu) is torch.bfloat16
    assert choose_autocast(Resources(), cpu) in (None, torch.bfloat16)
    if torch.cuda.is_available():
        assert choose_device(Resources()).type == "cuda"
    else:
        assert choose_device(Resources()) == cpu
        with pytest.raises(StudyError, match="expected a CUDA device"):
            choose_device(Resources(device="cuda"))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_family_keeps_a_dropout_rate_that_the_study_does_not_set(tmp_path: Path, family: str) -> None:
    """Rates under names of their own would be applied by functions, and by layers that recompute."""
    base = families.family_base(tmp_path / "base", family)
    config = json.loads((base / "config.json").read_text())
    rates = [name for name, value in config.items() if "drop" in name and isinstance(value, float)]
    (base / "config.json").write_text(json.dumps(config | dict.fromkeys(rates, 0.3)))
    study = families.family_study(base, family, **{"task.kind": families.FAMILIES[family].kinds[0]})
    model: Any = build_base(base, study.task, 0.0, "eager", torch.float32)
    assert [name for name in rates if getattr(model.config, name, 0.0)] == []


@pytest.mark.parametrize("family", ["albert", "mpnet"])
def test_a_family_without_layers_that_recompute_is_named(tmp_path: Path, family: str) -> None:
    base = families.family_base(tmp_path / "base", family)
    with pytest.raises(StudyError, match=f"gradient_checkpointing: the base model's family, {family}"):
        open_host(families.family_study(base, family), Resources(device="cpu", gradient_checkpointing=True))


def test_a_base_of_routed_experts_also_classifies(tmp_path: Path) -> None:
    base = families.family_base(tmp_path / "base", "mixtral")
    host = open_host(families.family_study(base, "mixtral", **{"task.kind": "text-classification"}), CPU)
    assert not host.shape.packed
