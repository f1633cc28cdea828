"""A base in four or eight bits: the same values everywhere, and training over them as over any base."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from privet.client.release.exports import export_release
from privet.client.release.opened import mounted, open_release
from privet.client.site import Resources
from privet.client.training import quantised
from privet.client.training.dp import Clipping
from privet.client.training.host import ModelHost
from privet.client.training.model import load_bare, open_host
from privet.client.training.quantised import QuantisedLinear, dequantise, quantise, quantised_digest, values_of
from privet.common.errors import RefusedError, StudyError, VerificationError
from privet.common.study.sections import ModelSection, Quantisation
from privet.common.study.study import Study
from tests.client.test_dp import flat, prepare, step_terms
from tests.conftest import Run
from tests.support.released import CPU, run_of
from tests.support.tiny import sha256_table, tiny_base, tiny_study

KINDS: tuple[Quantisation, ...] = ("nf4", "int8")
# `bitsandbytes` 0.50.2, quantize_4bit(weights(), quant_type="nf4", blocksize=64).
NF4 = (
    "0feeddcba9876543221100ffeedccba9765433211100feeddcba9876543221100ffeeddcba9765433211100feeedcba9876543221100ff"
    "eeddcba9865443211100feeedcba9876543221100ffeeddcba9875543211100feeedcb"
)
SCALES = (1.0010000467300415, 0.9869999885559082, 0.9800000190734863)


def weights() -> torch.Tensor:
    """Values that are the same on every machine; the last block has 52 of 64."""
    return ((torch.arange(5 * 36) * 7919 % 2003 - 1001).float() / 1000).view(5, 36)


def layer_of(values: torch.Tensor, kind: Quantisation) -> QuantisedLinear:
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False)
    linear.weight = nn.Parameter(values)
    return QuantisedLinear(linear, kind)


def model_of(base: Path, kind: Quantisation) -> dict[str, Any]:
    return {"model.quantisation": kind, "model.quantised": quantised_digest(base, sha256_table(base), kind)}


# --- the values ------------------------------------------------------------------------------------------


def test_the_bytes_of_four_bits_are_those_of_the_library_that_defined_them() -> None:
    layer = layer_of(weights(), "nf4")
    found = bytes(layer.packed.flatten().tolist()).hex()
    # The rest of the last block is filled up with zeros, whose code is 7.
    assert (found[: len(NF4)], set(found[len(NF4) :])) == (NF4, {"7"})
    assert tuple(layer.bits.view(torch.float32).tolist()) == SCALES


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (7, 130), (96, 200)])
def test_four_bits_are_the_nearest_quantiles_of_each_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.randn(shape) * 0.05
    flat_values = np.pad(values.numpy().reshape(-1).astype(np.float64), (0, -values.numel() % 64)).reshape(-1, 64)
    codes = np.array(quantised._CODES, np.float32).astype(np.float64)
    expected = np.zeros_like(flat_values)
    for row, block in enumerate(flat_values):
        scale = np.abs(block).max()
        for place, value in enumerate(block):
            expected[row, place] = codes[np.argmin(np.abs(codes - value / scale))] * scale
    found = layer_of(values, "nf4").values(torch.float32)
    assert found.shape == values.shape
    np.testing.assert_allclose(found.numpy().reshape(-1), expected.reshape(-1)[: values.numel()], rtol=2e-7)


def test_eight_bits_are_multiples_of_a_scale_of_the_row() -> None:
    torch.manual_seed(1)
    values = torch.randn(9, 70) * torch.logspace(-3, 2, 9)[:, None]
    found, step = layer_of(values, "int8").values(torch.float32), values.abs().amax(1, keepdim=True) / 127
    assert bool(((found - values).abs() <= step * 0.501).all())
    np.testing.assert_allclose((found / step).numpy(), (found / step).round().numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_a_computation_in_parts_gives_the_same(
    kind: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    values = torch.randn(10, 100)
    values[3:6] = 0
    layer = layer_of(values, kind)
    whole = {dtype: layer.values(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    assert bool((whole[torch.float32][4] == 0).all())
    for dtype, found in whole.items():
        assert torch.equal(found, whole[torch.float32].to(dtype))
    monkeypatch.setattr(quantised, "_PART", 128)
    again = layer_of(values, kind)
    assert torch.equal(again.packed, layer.packed)
    for dtype, found in whole.items():
        assert torch.equal(again.values(dtype), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_models_type_rounds_nothing(kind: Quantisation) -> None:
    layer = layer_of(weights(), kind)
    before = layer.values(torch.float32)
    assert torch.equal(layer.bfloat16().half().double().values(torch.float32), before)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 4.5 / 8), ("int8", 1.02)])
def test_a_layer_takes_the_bits_that_are_promised_and_keeps_no_copy_for_the_way_back(
    kind: Quantisation, most: float
) -> None:
    layer = layer_of(torch.randn(256, 256), kind)
    assert sum(each.numel() * each.element_size() for each in layer.buffers()) <= most * 256 * 256
    assert list(layer.parameters()) == []
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert kept == []
    y.square().sum().backward()
    w = layer.values(torch.float32)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ w.t()) @ w)


# --- a base ----------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_layers_whatever_is_built_around_them(llama: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        model: Any = transformers.LlamaForCausalLM.from_pretrained(llama)
        assert quantise(model, kind) == quantised_digest(llama, sha256_table(llama), kind)
        assert type(model.lm_head) is nn.Linear
        assert {name for name, each in model.named_modules() if isinstance(each, QuantisedLinear)} == {
            f"model.layers.{number}.{part}"
            for number in (0, 1)
            for part in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        }
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert quantised_digest(base, sha256_table(base), "nf4") != quantised_digest(llama, sha256_table(llama), "nf4")


def test_a_base_without_suitable_layers_or_with_broken_ones_is_refused(tmp_path: Path) -> None:
    gpt2 = tiny_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(StudyError, match="no linear layers that are numbered by layer"):  # its own kind of layers
        quantised_digest(gpt2, sha256_table(gpt2), "nf4")
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})
    model["layers"][0]["up"].weight.data[1, 1] = float("nan")  # type: ignore[index]
    with pytest.raises(StudyError, match=r"the layer layers.0.up of the base model has values that are not finite"):
        quantise(model, "nf4")
    twice = nn.ModuleDict({part: nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})
                           for part in ("text", "image")})  # fmt: skip
    with pytest.raises(StudyError, match=r"two of its layers have the name layers.0.up"):
        quantise(twice, "nf4")


@pytest.mark.parametrize("key", ["quantisation", "quantised"])
def test_one_key_alone_is_refused_and_a_study_without_both_has_the_digest_that_it_had(key: str, llama: Path) -> None:
    whole = {"base": "x", "sha256": sha256_table(llama), "quantisation": "nf4", "quantised": "0" * 64}
    with pytest.raises(ValueError, match="privet base DIRECTORY --quantisation nf4"):
        ModelSection.model_validate({name: value for name, value in whole.items() if name != key})
    assert "quantis" not in ModelSection(base="x", sha256=sha256_table(llama)).model_dump_json()


def test_other_values_than_the_study_pins_are_refused(llama: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm", **model_of(llama, "nf4"), "model.quantised": "0" * 64})
    with pytest.raises(VerificationError, match=r"model.quantised: expected SHA-256 0{64} of the base's layers in nf4"):
        open_host(study, CPU)


def test_layers_in_few_bits_are_not_trained_in_full(llama: Path) -> None:
    change = {"lora.modules_to_save": ["mlp"], **model_of(llama, "nf4")}
    with pytest.raises(StudyError, match=r"mlp holds layers that model.quantisation keeps in few bits"):
        open_host(tiny_study(llama, **{"task.kind": "causal-lm", **change}), CPU)


# --- training --------------------------------------------------------------------------------------------


def terms_of(host: ModelHost, study: Study, features: Any, clipping: Clipping) -> torch.Tensor:
    drawn = {row: [row] for row in range(len(features))}
    return step_terms(host, study, features, drawn, clipping).total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["causal-lm", "text-classification", "token-classification"])
def test_a_private_step_is_that_of_a_plain_base_with_the_same_values(
    llama: Path, bert: Path, tmp_path: Path, task: str, kind: Quantisation
) -> None:
    base = bert if task == "token-classification" else llama
    change = {"task.kind": task, "lora.targets": ["all-linear"] if base is llama else ["query", "dense"]}
    few = tiny_study(base, **{**change, **model_of(base, kind)})
    model: Any = (transformers.BertModel if base is bert else transformers.LlamaForCausalLM).from_pretrained(base)
    quantise(model, kind)
    dequantise(model)
    same = Path(shutil.copytree(base, tmp_path / "same"))
    model.save_pretrained(same)
    plain = tiny_study(same, **change)
    results = []
    for study in (few, plain):
        host, features = prepare(study)
        assert host.shape.packed, host.verdict
        results.append((terms_of(host, study, features, flat(0.3)), host.base_parameters))
    (ours, size), (theirs, other) = results
    assert size == other
    assert bool(ours.any())
    # In units of the lattice: the last bits of a gradient are rounded there.
    assert int((ours - theirs).abs().max()) <= 1e-5 * float(theirs.double().norm())


def test_a_host_in_half_precision_keeps_the_scales_and_counts_every_value(llama: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm", **model_of(llama, "nf4")})
    host = open_host(study, Resources(device="cpu", precision="bf16"))
    exact = open_host(study, CPU)
    assert (
        host.base_parameters == exact.base_parameters == values_of(transformers.LlamaForCausalLM.from_pretrained(llama))
    )
    ours, theirs = ([x for x in each.model.modules() if isinstance(x, QuantisedLinear)] for each in (host, exact))
    assert len(ours) == 14
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.values(torch.float32), b.values(torch.float32))


# --- a whole study ---------------------------------------------------------------------------------------


def test_the_printed_table_trains_and_the_merged_export_computes_what_was_trained(
    llama: Path, tmp_path: Path, privet: Run
) -> None:
    code, out, err = privet("base", llama, "--quantisation", "nf4")
    assert code == 0, err
    table = tomllib.loads(out)["model"]
    assert table["quantisation"] == "nf4"
    assert table["quantised"] == json.loads(privet("base", llama, "--quantisation", "nf4", "--json")[1])["quantised"]
    chosen = {f"model.{key}": table[key] for key in ("quantisation", "quantised")}
    run, _ = run_of(tmp_path / "run", llama, "causal-lm", chosen)
    with mounted(open_release(run), CPU) as host, torch.no_grad():
        assert any(isinstance(each, QuantisedLinear) for each in host.model.modules())
        expected = host.model(input_ids=torch.tensor([[5, 9, 17]])).logits
    with pytest.raises(RefusedError, match="trains on a base in nf4"):
        export_release(open_release(run), tmp_path / "peft", "peft")
    export_release(open_release(run), tmp_path / "merged", "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=torch.tensor([[5, 9, 17]])).logits, expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(each, QuantisedLinear) for each in load_bare(open_release(run).study).modules())
