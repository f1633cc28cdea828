"""The three tasks: what is labelled, that a record's loss is its own, evaluation that adds, prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.release.generation import greedy_answers
from privet.client.site import Resources
from privet.client.training.features import IGNORED, Feature, encode_records, prompt_ids
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.packing import alone, pack
from privet.client.training.passes import losses_of, pass_of, score
from privet.client.training.tasks import (
    collate,
    evaluate,
    forward,
    predict_classes,
    predict_tags,
)
from privet.common.study.study import Study
from tests.client.test_dp import single_passes
from tests.support.losses import record_losses, token_losses
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
def test_one_piece_of_a_word_is_labelled(bases: Mapping[str, Path], family: str) -> None:
    study, host = prepare(bases[family], "token-classification")
    row = {"tokens": ["man", "xylography", "pain", "qqq"], "tags": ["O", "B-sign", "I-sign", "O"]}
    (feature,) = encoded(study, host, [row])
    assert isinstance(feature.labels, tuple)
    assert len(feature.labels) == len(feature.ids) > 4, "no word fell into pieces"
    assert [label for label in feature.labels if label != IGNORED] == [0, 1, 2, 0]
    places = [place for place, label in enumerate(feature.labels) if label != IGNORED]
    for number, place in enumerate(places):
        # A causal model has read the whole word where it is labelled; another one is labelled at the first piece.
        ids, read = (feature.ids[1:place], number) if family == "bert" else (feature.ids[: place + 1], number + 1)
        assert text_of(host, ids).split() == row["tokens"][:read]
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


@pytest.mark.parametrize("kind", KINDS)
def test_passes_hold_tokens_positions_and_labels_at_each_records_rows(bert: Path, llama: Path, kind: str) -> None:
    _, host = prepare(llama if kind == "causal-lm" else bert, kind)
    choices: dict[str, tuple[int | tuple[int, ...], int | tuple[int, ...]]] = {
        KINDS[0]: (2, 1),
        KINDS[1]: ((0, IGNORED, 2), (1,)),
        KINDS[2]: ((IGNORED, 6, 7), (8,)),
    }
    labels = choices[kind]
    features = [Feature((5, 6, 7), labels[0]), Feature((8,), labels[1])]
    (placed,) = pack(host.shape, features, [1, 0], 64)
    passed = pass_of(host, features, placed)
    pad, rows = host.tokenizer.pad_token_id, passed.layout.rows
    assert passed.records == (0, 1)
    assert passed.layout.spans == [(0, 3), (8, 1)]
    assert passed.ids[0].tolist() == [5, 6, 7] + [pad] * 5 + [8] + [pad] * (rows - 9)
    assert passed.positions[0].tolist() == [0, 1, 2] + [0] * (rows - 3)
    found = {row: int(label) for row, label in enumerate(passed.labels) if label != IGNORED}
    weights = {row: float(weight) for row, weight in enumerate(passed.weights) if weight}
    # A text's class stands at its first row; a language model's labels at the row before.
    assert found == {KINDS[0]: {0: 2, 8: 1}, KINDS[1]: {0: 0, 2: 2, 8: 1}, KINDS[2]: {0: 6, 1: 7}}[kind]
    assert weights == {KINDS[0]: {0: 1, 8: 1}, KINDS[1]: {0: 0.5, 2: 0.5, 8: 1}, KINDS[2]: {0: 0.5, 1: 0.5}}[kind]
    single = pass_of(host, features, alone(features, 0))
    assert single.ids.tolist() == [[5, 6, 7]]
    assert single.labels.tolist() == passed.labels[:3].tolist()


def test_collating_pads_on_the_right_and_ignores_padding(bert: Path) -> None:
    _, host = prepare(bert, "token-classification")
    batch = collate(host, [Feature((5, 6, 7), (0, IGNORED, 2)), Feature((8,), (1,))])
    pad = host.tokenizer.pad_token_id
    assert batch.ids.tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[0, IGNORED, 2], [1, IGNORED, IGNORED]]
    assert collate(host, [Feature((5,), 2), Feature((6, 7), 0)]).labels.tolist() == [2, 0]


# --- losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "single"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_a_records_loss_depends_on_the_others(
    bases: Mapping[str, Path], family: str, kind: str, engine: str
) -> None:
    if (family, kind) == ("bert", "causal-lm"):
        return
    study, host = prepare(bases[family], kind)
    features = encoded(study, host, rows_for(study, 8))
    long = max(features, key=lambda feature: len(feature.ids))
    repeated = long.labels if isinstance(long.labels, int) else long.labels * 3
    company = [*features, Feature(long.ids * 3, repeated)]
    batch = collate(host, company)
    with torch.no_grad():
        expected = record_losses(kind, forward(host, batch), batch)
    with single_passes(host, engine):
        together = score(host, company)
        assert len(together) == 9
        for row, feature in enumerate(company):
            (found,) = score(host, [feature])
            assert found.losses.dtype == np.float32
            assert np.array_equal(found.losses, together[row].losses)
            assert np.array_equal(found.truth, together[row].truth)
            assert np.array_equal(found.predicted, together[row].predicted)
            assert found.loss == pytest.approx(float(expected[row]), rel=1e-4, abs=1e-5)


def test_losses_are_cross_entropies_by_hand(bert: Path, llama: Path) -> None:
    def nll(logits: list[float], label: int) -> float:
        return math.log(sum(math.exp(value) for value in logits)) - logits[label]

    def losses(base: Path, kind: str, features: list[Feature], rows: list[list[float]]) -> list[float]:
        """Return each record's loss, with `rows` as the logits of its rows."""
        _, host = prepare(base, kind)
        found = []
        for record in range(len(features)):
            passed = pass_of(host, features, alone(features, record))
            found.append(float(losses_of(torch.tensor(rows[: passed.layout.rows]), passed) @ passed.weights))
        return found

    classes = [Feature((5, 6), 0), Feature((5,), 1)]
    found = losses(bert, "text-classification", classes, [[1.0, -1.0, 0.0], [9.0, 9.0, 9.0]])
    assert found == pytest.approx([nll([1, -1, 0], 0), nll([1, -1, 0], 1)], rel=1e-5)

    rows = [[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 2.0, 0.0]]
    tags = [Feature((5, 6, 7), (IGNORED, 1, 2)), Feature((5, 6, 7), (IGNORED,) * 3)]
    found = losses(bert, "token-classification", tags, rows)
    assert found == pytest.approx([(nll([0, 3, 1], 1) + nll([2, 2, 0], 2)) / 2, 0.0], rel=1e-5)

    # A language model's position t predicts token t + 1.
    found = losses(llama, "causal-lm", tags, rows)
    assert found == pytest.approx([(nll([1, 0, 2], 1) + nll([0, 3, 1], 2)) / 2, 0.0], rel=1e-5)


def test_losses_are_float32_whatever_the_model_computes_in(llama: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm"})
    host = open_host(study, Resources(device="cpu", precision="bf16"))
    host.mount(random_adapter(host.spec))
    features = encoded(study, host, rows_for(study, 4))
    assert forward(host, collate(host, features)).dtype == torch.bfloat16
    assert {found.losses.dtype for found in score(host, features)} == {np.dtype(np.float32)}
    logits = torch.zeros(len(features[0].ids), 9, dtype=torch.bfloat16)
    assert (
        losses_of(logits, pass_of(host, [Feature((5,) * len(logits), (1,) * len(logits))], alone(features, 0))).dtype
        == torch.float32
    )


# --- evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("bert", KINDS[0]), ("bert", KINDS[1]), ("llama", KINDS[2])])
def test_evaluation_adds_over_disjoint_records(bases: Mapping[str, Path], family: str, kind: str) -> None:
    study, host = prepare(bases[family], kind)
    features = encoded(study, host, rows_for(study, 21))
    whole = evaluate(host, study, features)
    parts = [evaluate(host, study, features[:4]), evaluate(host, study, []), evaluate(host, study, features[4:])]
    np.testing.assert_allclose((parts[0] + parts[1] + parts[2]).sums, whole.sums, rtol=1e-12)
    assert np.array_equal(evaluate(host, study, features, most=2).sums, whole.sums)
    assert whole.sums[0] == 21
    assert not parts[1].sums.any()
    metrics = whole.metrics(study.task.labels)
    assert metrics["records"] == 21

    def loss(feature: Feature) -> tuple[float, float]:
        batch = collate(host, [feature])
        with torch.no_grad():
            if kind == "causal-lm":
                total, count = token_losses(kind, forward(host, batch), batch)
                return float(total), float(count)
            return float(record_losses(kind, forward(host, batch), batch)), 1.0

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


@pytest.mark.parametrize("engine", ["packed", "single"])
def test_evaluation_runs_without_dropout_also_after_training_with_it(bert: Path, engine: str) -> None:
    study, host = prepare(bert, "text-classification", **{"training.dropout": 0.5})
    features = encoded(study, host, rows_for(study, 6))
    first = evaluate(host, study, features).sums
    with single_passes(host, engine):
        with host.passing(training=True):
            assert host.model.training
        assert not host.model.training
        found = evaluate(host, study, features).sums
        assert np.array_equal(evaluate(host, study, features).sums, found)
    np.testing.assert_allclose(found, first, rtol=1e-5)


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
    alone = [greedy_answers(host, study, [prompt])[0] for prompt in prompts]
    assert greedy_answers(host, study, prompts) == alone
    assert greedy_answers(host, study, prompts, size=2) == alone
    assert len(set(alone)) > 1
    assert greedy_answers(host, study, []) == []


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
    assert greedy_answers(host, study, ["itchy rash"]) == [expected]
