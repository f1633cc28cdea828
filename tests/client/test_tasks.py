"""The three tasks: what is labelled, that a record's loss is its own, evaluation that adds, prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privet.client.site import Resources
from privet.client.training.features import IGNORED, Feature, encode_records, prompt_ids
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.tasks import (
    Batch,
    batches,
    collate,
    evaluate,
    forward,
    generate_answers,
    predict_classes,
    predict_tags,
    record_losses,
    token_losses,
)
from privet.common.study.study import Study
from tests.support.tiny import FAMILIES, Row, random_adapter, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
KINDS = ("text-classification", "token-classification", "causal-lm")


def prepare(base: Path, kind: str, **change: Any) -> tuple[Study, ModelHost]:
    study = tiny_study(base, **{"task.kind": kind, **change})
    host = open_host(study, CPU)
    host.mount(random_adapter(host.spec))
    return study, host


def encoded(study: Study, host: ModelHost, rows: list[Row]) -> list[Feature]:
    return encode_records(study, host.tokenizer, records_of(study, rows))


def text_of(host: ModelHost, ids: tuple[int, ...] | list[int]) -> str:
    return str(host.tokenizer.decode(ids))


# --- encoding --------------------------------------------------------------------------------------------


def test_texts_are_cut_and_keep_their_class(bert: Path) -> None:
    study, host = prepare(bert, "text-classification", **{"data.max_length": 6})
    features = encoded(study, host, rows_for(study, 9))
    assert [feature.labels for feature in features] == [0, 1, 2] * 3
    assert all(len(feature.ids) == 6 for feature in features)
    assert all(feature.ids[0] == host.tokenizer.bos_token_id for feature in features)
    assert all(feature.ids[-1] == host.tokenizer.eos_token_id for feature in features)
    assert encoded(study, host, []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_first_piece_of_a_word_is_labelled(bases: Mapping[str, Path], family: str) -> None:
    study, host = prepare(bases[family], "token-classification")
    row = {"tokens": ["man", "xylography", "pain", "qqq"], "tags": ["O", "B-sign", "I-sign", "O"]}
    (feature,) = encoded(study, host, [row])
    assert isinstance(feature.labels, tuple)
    assert len(feature.labels) == len(feature.ids) > 4, "no word fell into pieces"
    assert [label for label in feature.labels if label != IGNORED] == [0, 1, 2, 0]
    words = host.tokenizer([row["tokens"]], is_split_into_words=True).word_ids(0)
    for position, label in enumerate(feature.labels):
        first = words[position] is not None and words[position] not in words[:position]
        assert (label != IGNORED) == first
    if family == "bert":
        assert feature.labels[0] == feature.labels[-1] == IGNORED, "special tokens have no label"


def test_tags_past_the_length_are_cut_with_their_words(bert: Path) -> None:
    study, host = prepare(bert, "token-classification", **{"data.max_length": 5})
    (feature,) = encoded(study, host, [{"tokens": ["man"] * 9, "tags": ["O"] * 9}])
    assert isinstance(feature.labels, tuple)
    assert len(feature.ids) == len(feature.labels) == 5
    assert feature.labels == (IGNORED, 0, 0, 0, IGNORED)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-chat", "qwen2"])
def test_only_the_answer_and_its_end_are_learnt(bases: Mapping[str, Path], family: str) -> None:
    study, host = prepare(bases[family], "causal-lm")
    (feature,) = encoded(study, host, [{"prompt": "itchy rash", "answer": "skin"}])
    assert isinstance(feature.labels, tuple)
    head = prompt_ids(study, host.tokenizer, "itchy rash")
    assert list(feature.ids[: len(head)]) == head
    assert feature.labels[: len(head)] == (IGNORED,) * len(head)
    assert feature.labels[len(head) :] == feature.ids[len(head) :]
    assert text_of(host, feature.ids[len(head) : -1]).strip() == "skin"
    assert feature.ids[-1] == host.tokenizer.eos_token_id


def test_the_chat_template_is_used_where_there_is_one(bases: Mapping[str, Path]) -> None:
    system = {"task.system_prompt": "which bone"}
    for change, expected in (
        ({}, ["user itchy rash", "assistant"]),
        (system, ["system which bone", "user itchy rash", "assistant"]),
    ):
        study, host = prepare(bases["llama-chat"], "causal-lm", **change)
        ids = prompt_ids(study, host.tokenizer, "itchy rash")
        assert ids.count(host.tokenizer.bos_token_id) == len(expected), "the template brings the only start tokens"
        turns = [part.replace("</s>", "").strip() for part in text_of(host, ids).split("<s>")]
        assert turns == ["", *expected]
        assert ids[0] == host.tokenizer.bos_token_id


def test_without_a_template_system_prompt_and_prompt_stand_in_lines(llama: Path) -> None:
    study, host = prepare(llama, "causal-lm", **{"task.system_prompt": "which bone"})
    ids = prompt_ids(study, host.tokenizer, "itchy rash")
    assert ids[0] == host.tokenizer.bos_token_id
    assert text_of(host, ids[1:]) == "which bone\nitchy rash\n"


@pytest.mark.parametrize("limit", [4, 5, 8, 12, 20])
@pytest.mark.parametrize(("prompt_words", "answer_words"), [(30, 2), (2, 30), (30, 30), (1, 1)])
def test_a_long_record_keeps_some_prompt_and_some_answer(
    llama: Path, limit: int, prompt_words: int, answer_words: int
) -> None:
    study, host = prepare(llama, "causal-lm", **{"data.max_length": limit})
    row = {"prompt": " ".join(["monday"] * prompt_words), "answer": " ".join(["friday"] * answer_words)}
    head = prompt_ids(study, host.tokenizer, row["prompt"])
    tail = host.tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [host.tokenizer.eos_token_id]
    (feature,) = encoded(study, host, [row])
    assert isinstance(feature.labels, tuple)
    assert len(feature.ids) == len(feature.labels) == min(limit, len(head) + len(tail))
    learnt = [label for label in feature.labels if label != IGNORED]
    kept = list(feature.ids[: len(feature.ids) - len(learnt)])
    assert learnt == tail[: len(learnt)]
    assert kept == head[len(head) - len(kept) :], "a prompt keeps its end"
    assert len(learnt) == len(tail) or len(learnt) >= limit / 2
    assert len(kept) == len(head) or len(kept) >= limit // 2
    if len(tail) <= limit / 2:
        assert len(learnt) == len(tail), "an answer that fits into half is never cut"


@given(lengths=st.lists(st.integers(1, 60), max_size=40), size=st.integers(1, 12))
def test_batches_hold_every_record_once_and_like_lengths_together(lengths: list[int], size: int) -> None:
    features = [Feature((1,) * length, 0) for length in lengths]
    groups = list(batches(features, size))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(1 <= len(group) <= size for group in groups)
    in_order = [lengths[index] for group in groups for index in group]
    assert in_order == sorted(in_order)


def test_collating_pads_on_the_right_and_ignores_padding(bert: Path) -> None:
    _, host = prepare(bert, "token-classification")
    batch = collate(host, [Feature((5, 6, 7), (0, IGNORED, 2)), Feature((8,), (1,))])
    pad = host.tokenizer.pad_token_id
    assert batch.ids.tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[0, IGNORED, 2], [1, IGNORED, IGNORED]]
    assert collate(host, [Feature((5,), 2), Feature((6, 7), 0)]).labels.tolist() == [2, 0]


# --- losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_records_loss_does_not_depend_on_the_others(bases: Mapping[str, Path], family: str, kind: str) -> None:
    if (family, kind) == ("bert", "causal-lm"):
        return
    study, host = prepare(bases[family], kind)
    features = encoded(study, host, rows_for(study, 8))
    long = max(features, key=lambda feature: len(feature.ids))
    repeated = long.labels if isinstance(long.labels, int) else long.labels * 3
    company = [*features, Feature(long.ids * 3, repeated)]

    def losses(chosen: list[Feature]) -> torch.Tensor:
        batch = collate(host, chosen)
        return record_losses(study, forward(host, batch), batch).detach()

    together = losses(company)
    assert together.shape == (9,)
    assert together.dtype == torch.float32
    for row, feature in enumerate(company):
        torch.testing.assert_close(together[row], losses([feature])[0], rtol=1e-4, atol=1e-5)


def test_losses_are_cross_entropies_by_hand() -> None:
    base = {"name": "s", "model": {"base": "b", "sha256": {"model.safetensors": "0" * 64}}}
    rest = {
        "lora": {"targets": ["q"]},
        "training": {"learning_rate": 0.1, "rounds": 1, "local_steps": 1, "sampling_rate": 0.5},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "plain"},
    }
    labels = {"text-classification": ["x", "y"], "token-classification": ["O", "B-x", "I-x"], "causal-lm": []}
    columns = {"text-classification": "text label", "token-classification": "tokens tags", "causal-lm": "prompt answer"}

    def study(kind: str) -> Study:
        task = {"kind": kind, "labels": labels[kind]}
        data = {"columns": {role: role for role in columns[kind].split()}}
        return Study.parse({**base, **rest, "task": task, "data": data})

    def nll(logits: list[float], label: int) -> float:
        return math.log(sum(math.exp(value) for value in logits)) - logits[label]

    nothing = torch.zeros(0)
    logits = torch.tensor([[1.0, -1.0], [0.5, 3.0]])
    found = record_losses(study("text-classification"), logits, Batch(nothing, nothing, torch.tensor([0, 0])))
    assert found.tolist() == pytest.approx([nll([1.0, -1.0], 0), nll([0.5, 3.0], 0)], rel=1e-5)

    rows = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 2.0, 0.0]]] * 2)
    tags = torch.tensor([[IGNORED, 1, 2], [IGNORED] * 3])
    found = record_losses(study("token-classification"), rows, Batch(nothing, nothing, tags))
    assert found.tolist() == pytest.approx([(nll([0, 3, 1], 1) + nll([2, 2, 0], 2)) / 2, 0.0], rel=1e-5)

    # A language model's position t predicts token t + 1.
    found, counts = token_losses(study("causal-lm"), rows, Batch(nothing, nothing, tags))
    assert found.tolist() == pytest.approx([nll([1, 0, 2], 1) + nll([0, 3, 1], 2), 0.0], rel=1e-5)
    assert counts.tolist() == [2, 0]


def test_losses_are_float32_whatever_the_model_computes_in(llama: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm"})
    host = open_host(study, Resources(device="cpu", precision="bf16"))
    host.mount(random_adapter(host.spec))
    batch = collate(host, encoded(study, host, rows_for(study, 4)))
    logits = forward(host, batch)
    assert logits.dtype == torch.bfloat16
    assert record_losses(study, logits, batch).dtype == torch.float32


# --- evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("bert", KINDS[0]), ("bert", KINDS[1]), ("llama", KINDS[2])])
def test_evaluation_adds_over_disjoint_records(bases: Mapping[str, Path], family: str, kind: str) -> None:
    study, host = prepare(bases[family], kind)
    features = encoded(study, host, rows_for(study, 21))
    whole = evaluate(host, study, features)
    parts = [evaluate(host, study, features[:4]), evaluate(host, study, []), evaluate(host, study, features[4:])]
    np.testing.assert_allclose((parts[0] + parts[1] + parts[2]).sums, whole.sums, rtol=1e-5)
    np.testing.assert_allclose(evaluate(host, study, features, size=2).sums, whole.sums, rtol=1e-5)
    assert whole.sums[0] == 21
    assert not parts[1].sums.any()
    metrics = whole.metrics(study.task.labels)
    assert metrics["records"] == 21

    def loss(feature: Feature) -> tuple[float, float]:
        batch = collate(host, [feature])
        with torch.no_grad():
            if kind == "causal-lm":
                total, count = token_losses(study, forward(host, batch), batch)
                return float(total), float(count)
            return float(record_losses(study, forward(host, batch), batch)), 1.0

    singles = np.array([loss(feature) for feature in features])
    assert metrics["loss"] == pytest.approx(singles[:, 0].sum() / singles[:, 1].sum(), rel=1e-4)


def test_evaluation_counts_what_it_gets_right(bert: Path) -> None:
    study, host = prepare(bert, "text-classification")
    rows = rows_for(study, 12)
    features = encoded(study, host, rows)
    predicted = predict_classes(host, study, [row["text"] for row in rows])
    best = [max(found, key=lambda label: found[label]) for found in predicted]
    right = sum(guess == row["label"] for guess, row in zip(best, rows, strict=True))
    assert evaluate(host, study, features).metrics(study.task.labels)["accuracy"] == pytest.approx(right / 12)


def test_evaluation_runs_without_dropout_and_returns_to_training(bert: Path) -> None:
    study, host = prepare(bert, "text-classification", **{"training.dropout": 0.5})
    features = encoded(study, host, rows_for(study, 6))
    assert np.array_equal(evaluate(host, study, features).sums, evaluate(host, study, features).sums)
    assert host.model.training


# --- prediction ------------------------------------------------------------------------------------------


def test_class_probabilities_sum_to_one_and_do_not_depend_on_company(bert: Path) -> None:
    study, host = prepare(bert, "text-classification")
    texts = ["itchy rash since monday", "man", "chest pain " * 40]
    together = predict_classes(host, study, texts)
    for text, found in zip(texts, together, strict=True):
        assert tuple(found) == study.task.labels
        assert sum(found.values()) == pytest.approx(1)
        assert found == pytest.approx(predict_classes(host, study, [text])[0], rel=1e-3)


def test_every_word_gets_a_tag(bert: Path) -> None:
    study, host = prepare(bert, "token-classification")
    for leaf in ("weight", "bias"):  # a classifier that looks at one direction, to get more than one tag
        host.parameters[f"base_model.model.classifier.{leaf}"].data.zero_()
    host.parameters["base_model.model.classifier.weight"].data[1, :] = torch.linspace(-1, 1, 32)
    words = ["man", "xylography", "pain", "swollen", "knee", "broken", "since", "one"]
    tags = predict_tags(host, study, words)
    assert len(tags) == len(words)
    assert len(set(tags)) > 1
    batch = collate(host, encoded(study, host, [{"tokens": words, "tags": ["O"] * len(words)}]))
    with torch.no_grad():
        guess = forward(host, batch)[0].argmax(-1)
    first = [position for position, label in enumerate(batch.labels[0].tolist()) if label != IGNORED]
    assert tags == [study.task.labels[int(guess[position])] for position in first]


def test_words_past_the_length_are_outside(bert: Path) -> None:
    study, host = prepare(bert, "token-classification", **{"data.max_length": 12})
    host.parameters["base_model.model.classifier.bias"].data[1] = 100.0
    assert predict_tags(host, study, ["man"] * 30) == ["B-sign"] * 10 + ["O"] * 20


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-chat", "qwen2"])
def test_answers_do_not_depend_on_company(bases: Mapping[str, Path], family: str) -> None:
    # Prompts are padded on the left: padding must shift no position and attract no attention.
    study, host = prepare(bases[family], "causal-lm")
    prompts = [row["prompt"] for row in rows_for(study, 5)] + ["man", "chest pain " * 6]
    alone = [generate_answers(host, study, [prompt])[0] for prompt in prompts]
    assert generate_answers(host, study, prompts) == alone
    assert generate_answers(host, study, prompts, size=2) == alone
    assert len(set(alone)) > 1
    assert generate_answers(host, study, []) == []


def test_an_answer_is_greedy_and_ends_at_its_limit(llama: Path) -> None:
    study, host = prepare(llama, "causal-lm", **{"task.max_new_tokens": 3})
    ids = prompt_ids(study, host.tokenizer, "itchy rash")
    with torch.no_grad():
        for _ in range(3):
            batch = collate(host, [Feature(tuple(ids), 0)])
            ids.append(int(forward(host, batch)[0, -1].argmax()))
            if ids[-1] == host.tokenizer.eos_token_id:
                break
    start = len(prompt_ids(study, host.tokenizer, "itchy rash"))
    expected = host.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert generate_answers(host, study, ["itchy rash"]) == [expected]
