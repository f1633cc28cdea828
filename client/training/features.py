"""Records to tokens, with the label of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from privet.client.training.data import Records
from privet.common.study.study import Study

IGNORED = -100
"""Label of tokens that are not part of the loss."""


@dataclass(frozen=True)
class Feature:
    """One record as tokens: ids [t], and one class or one label per token [t]."""

    ids: tuple[int, ...]
    labels: int | tuple[int, ...]


def encode_records(study: Study, tokenizer: Any, records: Records) -> list[Feature]:
    """Return records as features, truncated to the study's length. Each has at least one token."""
    features = _encode(study, tokenizer, records) if len(records) else []
    return [feature if feature.ids else _blank(feature, tokenizer) for feature in features]


def _blank(feature: Feature, tokenizer: Any) -> Feature:
    """Return a feature of one padding token, for a record of which the tokenizer leaves nothing."""
    labels = feature.labels if isinstance(feature.labels, int) else (IGNORED,)
    return Feature((int(tokenizer.pad_token_id),), labels)


def _encode(study: Study, tokenizer: Any, records: Records) -> list[Feature]:
    if study.task.kind == "text-classification":
        texts = [row["text"] for row in records.rows]
        encoded = tokenizer(texts, truncation=True, max_length=study.data.max_length)["input_ids"]
        return [Feature(tuple(ids), row["label"]) for ids, row in zip(encoded, records.rows, strict=True)]
    if study.task.kind == "token-classification":
        return _encode_tokens(study, tokenizer, records)
    return [_encode_answer(study, tokenizer, row["prompt"], row["answer"]) for row in records.rows]


def _encode_tokens(study: Study, tokenizer: Any, records: Records) -> list[Feature]:
    """Label each word at its first token. Its other tokens are not part of the loss."""
    encoded = tokenizer(
        [row["tokens"] for row in records.rows],
        is_split_into_words=True,
        truncation=True,
        max_length=study.data.max_length,
    )
    features = []
    for index, row in enumerate(records.rows):
        labels, previous = [], None
        for word in encoded.word_ids(index):
            labels.append(IGNORED if word is None or word == previous else row["tags"][word])
            previous = word
        features.append(Feature(tuple(encoded["input_ids"][index]), tuple(labels)))
    return features


def prompt_ids(study: Study, tokenizer: Any, prompt: str) -> list[int]:
    """Return a prompt's tokens, with the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        system = [{"role": "system", "content": study.task.system_prompt}] if study.task.system_prompt else []
        text = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    parts = [study.task.system_prompt, prompt] if study.task.system_prompt else [prompt]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + list(tokenizer("\n".join(parts) + "\n", add_special_tokens=False)["input_ids"])


def _encode_answer(study: Study, tokenizer: Any, prompt: str, answer: str) -> Feature:
    """Join prompt and answer. Only the answer and its end token are part of the loss.

    Of a long prompt the end is kept, in at most half of the length, so that part of the answer is always learned.
    """
    limit = study.data.max_length
    head = prompt_ids(study, tokenizer, prompt)
    tail = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        tail.append(tokenizer.eos_token_id)
    if len(head) + len(tail) > limit:
        head = head[-max(limit // 2, limit - len(tail)) :]
        tail = tail[: limit - len(head)]
    return Feature(tuple(head + tail), (IGNORED,) * len(head) + tuple(tail))


def row_labels(kind: str, feature: Feature) -> Sequence[int]:
    """Return the label of each of a record's rows [t]. A text's class stands at its first row.

    The logits at a token predict the next one, so a language model's labels move one row up.

    Args:
        kind: Kind of task.
        feature: The record.
    """
    if isinstance(feature.labels, int):
        return (feature.labels, *[IGNORED] * (len(feature.ids) - 1))
    return (*feature.labels[1:], IGNORED) if kind == "causal-lm" else feature.labels
