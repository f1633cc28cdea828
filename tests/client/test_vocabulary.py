"""Losses that take the vocabulary in parts: those of whole logits, with the same gradients, in any company."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from privet.client.site import Resources
from privet.client.training.features import IGNORED
from privet.client.training.model import open_host
from privet.client.training.probe import most_threads
from privet.client.training.verdicts import anew
from privet.client.training.vocabulary import ROWS, Vocabulary, agrees, find_vocabulary
from tests.support.tiny import tiny_study

FP32 = Resources(device="cpu", precision="fp32", threads=1)
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def last(scale: float = 1.0, softcap: float | None = None, bias: bool = False) -> Vocabulary:
    torch.manual_seed(3)
    layer = nn.Linear(24, 301, bias=bias).requires_grad_(False)
    return Vocabulary(nn.Identity(), layer, scale, softcap)


def drawn(rows: int, labelled: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator) * 3
    labels = torch.full((rows,), IGNORED)
    places = torch.randperm(rows, generator=generator)[:labelled]
    labels[places] = torch.randint(0, 301, (labelled,), generator=generator)
    return hidden, labels


def test_the_last_layer_is_rounded_once_and_again_when_its_weight_has_changed() -> None:
    found = last(bias=True)
    weight, bias = found.rounded(torch.bfloat16)
    assert found.rounded(torch.bfloat16)[0] is weight
    assert torch.equal(weight, found.layer.weight.bfloat16())
    assert bias is not None
    with torch.no_grad():
        found.layer.weight.mul_(2)
    assert torch.equal(found.rounded(torch.bfloat16)[0], found.layer.weight.bfloat16())
    assert found.rounded(torch.float32)[0].data_ptr() == found.layer.weight.data_ptr()  # no copy


@pytest.mark.parametrize("found", [last(), last(0.25), last(softcap=4.0), last(0.5, 6.0), last(bias=True)])
@pytest.mark.parametrize(("rows", "labelled"), [(5, 0), (5, 3), (128, 128), (500, 391)])
def test_losses_and_gradients_are_those_of_whole_logits(found: Vocabulary, rows: int, labelled: int) -> None:
    hidden, labels = drawn(rows, labelled)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    factors = torch.rand(rows)
    losses, tokens = found.losses(mine, labels)
    torch.autograd.backward(losses, factors)

    logits = functional.linear(theirs, found.layer.weight, found.layer.bias) * found.scale
    logits = logits if found.softcap is None else found.softcap * torch.tanh(logits / found.softcap)
    expected = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    torch.autograd.backward(expected, factors)

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert mine.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert not tokens.any()  # none is sought where a gradient is
    kept = labels != IGNORED
    scored, tokens = found.losses(hidden, labels)
    assert torch.equal(scored, losses.detach())
    assert torch.equal(tokens[kept], logits.argmax(1)[kept])
    assert not tokens[~kept].any()


def test_a_row_is_the_same_bits_in_any_company() -> None:
    found, (hidden, labels) = last(), drawn(600, 600)
    together, _ = found.losses(hidden, labels)
    for start, stop in ((0, 1), (37, 38), (100, 400), (599, 600)):
        alone, _ = found.losses(hidden[start:stop], labels[start:stop])
        assert torch.equal(alone, together[start:stop])


def test_in_bfloat16_losses_stay_float32() -> None:
    found, (hidden, labels) = last(), drawn(50, 40)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = found.losses(hidden, labels)
    exact, _ = found.losses(hidden, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    ],
    ids=["gemma2", "granite"],
)
def test_what_families_do_to_their_logits_is_known(model: nn.Module) -> None:
    model.eval()
    found = find_vocabulary(model, set())
    assert found is not None
    ids = torch.arange(9)[None]
    with torch.no_grad():
        hidden, logits = found.backbone(ids).last_hidden_state[0], model(ids).logits[0]
    assert agrees(found, hidden, logits)
    assert not agrees(replace(found, scale=found.scale * 1.01, softcap=None), hidden, logits)


def test_a_model_that_does_more_to_its_logits_keeps_them_whole(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.client.training.probe.agrees", lambda *_: False)
    study = tiny_study(llama, **{"task.kind": "causal-lm", "lora.rank": 3})
    with anew():
        assert open_host(study, FP32).vocabulary is None


def test_a_trained_last_layer_keeps_logits_whole(bases: Mapping[str, Path]) -> None:
    study = tiny_study(bases["llama"], **{"task.kind": "causal-lm", "lora.modules_to_save": ["lm_head"]})
    assert open_host(study, FP32).vocabulary is None
    assert open_host(tiny_study(bases["llama"], **{"task.kind": "causal-lm"}), FP32).vocabulary is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("found", [last(), last(0.5, 6.0)])
def test_a_row_that_is_not_finite_changes_no_other(found: Vocabulary, autocast: bool, bad: float) -> None:
    hidden, labels = drawn(300, 300)
    spoiled = [0, 64, 127, 128, 299]
    kept = [row for row in range(300) if row not in spoiled]

    def results(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mine = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, _ = found.losses(mine, labels)
        torch.autograd.backward(losses, torch.ones(300))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, tokens = found.losses(values, labels)
        assert mine.grad is not None
        return losses.detach()[kept], tokens[kept], mine.grad[kept]

    others = hidden.clone()
    others[spoiled] = bad
    for before, after in zip(results(hidden), results(others), strict=True):
        assert torch.equal(before, after)


def test_rows_without_a_label_get_no_gradient_whatever_they_hold() -> None:
    found, (hidden, labels) = last(), drawn(50, 20)
    hidden[labels == IGNORED] = float("nan")
    mine = hidden.clone().requires_grad_()
    losses, _ = found.losses(mine, labels)
    torch.autograd.backward(losses, (labels != IGNORED).float())
    assert mine.grad is not None
    assert not losses.detach()[labels == IGNORED].any()
    assert not mine.grad[labels == IGNORED].any()
    assert torch.isfinite(mine.grad).all()


@pytest.mark.parametrize(("tokens", "available", "chosen"), [(240, 4, 4), (241, 4, 2), (241, 3, 2), (241, 2, 2)])
def test_threads_take_whole_vectors_of_a_part(tokens: int, available: int, chosen: int) -> None:
    """A thread's last values are computed by another function where they do not fill a vector."""
    assert most_threads({(ROWS * tokens, 64)}, available) == chosen
