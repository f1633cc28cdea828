"""A's rows along the directions in which inputs vary: orthonormal, public, the best of their rank, and worth having."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from privet.client.site import Resources
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.start import _rows, _sketch
from privet.common.study.study import Study
from tests.support.tiny import random_adapter, tiny_study

FP32 = Resources(device="cpu", precision="fp32", threads=1)
KINDS = [
    ("bert", "text-classification"),
    ("bert", "token-classification"),
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
]


def opened(bases: Mapping[str, Path], family: str, kind: str, start: str = "inputs") -> tuple[Study, ModelHost]:
    study = tiny_study(bases[family], **{"task.kind": kind, "lora.start": start})
    return study, open_host(study, FP32)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_rows_are_orthonormal_and_the_model_starts_as_the_base(
    family: str, kind: str, bases: Mapping[str, Path]
) -> None:
    study, host = opened(bases, family, kind)
    adapter = initial_adapter(study, host)
    for tensor in host.spec.tensors:
        value = adapter.values[tensor.name]
        if tensor.role == "lora_A":
            np.testing.assert_allclose(value @ value.T, np.eye(len(value)), atol=1e-5)
        elif tensor.role == "lora_B":
            assert not value.any()


def test_it_depends_on_the_seed_and_not_on_what_was_mounted_before(bases: Mapping[str, Path]) -> None:
    study, host = opened(bases, "llama", "causal-lm")
    first = initial_adapter(study, host)
    host.starts.clear()
    host.mount(random_adapter(host.spec))
    assert initial_adapter(study, host).digest == first.digest
    other = initial_adapter(study.model_copy(update={"seed": study.seed + 1}), host)
    assert other.digest != first.digest


def test_the_rows_see_more_of_other_inputs_than_random_ones_do(bases: Mapping[str, Path]) -> None:
    shares = {}
    for start in ("inputs", "random"):
        study, host = opened(bases, "llama", "causal-lm", start)
        host.mount(initial_adapter(study, host))
        seen, whole = 0.0, 0.0

        def note(module: LoraLinear, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal seen, whole
            seen += float((inputs[0] @ module.lora_A["default"].weight.T).square().sum())
            whole += float(inputs[0].square().sum())

        handles = [m.register_forward_pre_hook(note) for m in host.model.modules() if isinstance(m, LoraLinear)]
        with torch.no_grad():
            host.model(input_ids=torch.arange(3, 40)[None])
        for handle in handles:
            handle.remove()
        shares[start] = seen / whole
    assert shares["inputs"] > 1.5 * shares["random"]


def test_a_sketch_in_parts_finds_the_directions_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    strengths = torch.tensor([9.0, 5.0, 3.0, *[0.3] * 37], dtype=torch.float64)
    rows = torch.randn(600, 40, generator=generator, dtype=torch.float64) * strengths
    sketch = torch.empty(0, 40, dtype=torch.float64)
    for part in torch.split(rows, 100):
        sketch = _sketch(torch.cat([sketch, part]), 12)
    found = _rows(sketch, 3)
    _, _, exact = torch.linalg.svd(rows, full_matrices=False)
    overlap = np.abs(found @ exact[:3].numpy().T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=0.02)


def test_rows_beyond_the_rank_of_the_inputs_are_zero() -> None:
    sketch = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 9.0)).double()
    found = _rows(sketch, 4)
    assert np.linalg.norm(found[0]) == pytest.approx(1.0)
    assert not found[1:].any()


def test_it_is_no_part_of_the_digest_of_studies_that_do_not_name_it(bert: Path) -> None:
    plain = tiny_study(bert)
    assert "start" not in plain.document()["lora"]
    assert tiny_study(bert, **{"lora.start": "inputs"}).digest != plain.digest
