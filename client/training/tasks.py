"""The three tasks: records to tokens, tokens to per-record losses, logits to metrics.

Every loss is the loss of one record and depends on that record alone. Models return losses averaged over a batch's
tokens. With these, one record's gradient would depend on the lengths of the others, which breaks differential privacy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from privet.client.training.data import Records
from privet.client.training.model import ModelHost
from privet.client.training.scores import Tally, classification_tally, empty_tally, lm_tally, token_tally
from privet.common.study.study import Study

IGNORED = -100
"""Label of tokens that are not part of the loss."""


@dataclass(frozen=True)
class Feature:
    """One record as tokens: ids [t], and one class or one label per token [t]."""

    ids: tuple[int, ...]
    labels: int | tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Padded tensors on the device: ids and mask [n, t]; labels [n] or [n, t]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def encode_records(study: Study, tokenizer: Any, records: Records) -> list[Feature]:
    """Return records as features, truncated to the study's length."""
    if not len(records):
        return []
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


def collate(host: ModelHost, features: Sequence[Feature]) -> Batch:
    """Pad features on the right to the longest of them."""
    width = max(len(feature.ids) for feature in features)
    ids = np.full((len(features), width), host.tokenizer.pad_token_id, np.int64)
    mask = np.zeros((len(features), width), np.int64)
    per_token = not isinstance(features[0].labels, int)
    labels = np.full((len(features), width) if per_token else len(features), IGNORED, np.int64)
    for row, feature in enumerate(features):
        ids[row, : len(feature.ids)] = feature.ids
        mask[row, : len(feature.ids)] = 1
        if per_token:
            labels[row, : len(feature.ids)] = feature.labels
        else:
            labels[row] = feature.labels
    return Batch(*(torch.from_numpy(array).to(host.device) for array in (ids, mask, labels)))


def forward(host: ModelHost, batch: Batch) -> torch.Tensor:
    """Return logits, [n, classes] or [n, t, classes or vocabulary]."""
    with host.computing():
        output = host.model(input_ids=batch.ids, attention_mask=batch.mask)
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits


def record_losses(study: Study, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return one loss per record [n], in float32.

    Cross-entropy of the class, or its mean over the record's own labelled tokens (0 for a record without any).
    """
    if study.task.kind == "text-classification":
        return functional.cross_entropy(logits.float(), batch.labels, reduction="none")
    sums, counts = token_losses(study, logits, batch)
    return sums / counts.clamp(min=1)


def token_losses(study: Study, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each record's summed token loss and number of labelled tokens, both [n]."""
    labels = batch.labels
    if study.task.kind == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]  # the logits at a token predict the next one
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def batches(features: Sequence[Feature], size: int) -> Iterator[list[int]]:
    """Yield indices in groups of `size`. Records of similar length are together, which saves padding."""
    order = sorted(range(len(features)), key=lambda index: len(features[index].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def evaluate(host: ModelHost, study: Study, features: Sequence[Feature], size: int = 64) -> Tally:
    """Return the additive statistics of the mounted adapter over `features`."""
    total = empty_tally(study.task.kind, len(study.task.labels))
    host.model.eval()
    try:
        for indices in batches(features, size):
            chosen = [features[index] for index in indices]
            batch = collate(host, chosen)
            total = total + _tally(study, forward(host, batch), batch)
    finally:
        host.model.train()
    return total


def _tally(study: Study, logits: torch.Tensor, batch: Batch) -> Tally:
    if study.task.kind == "causal-lm":
        sums, counts = token_losses(study, logits, batch)
        return lm_tally(sums.tolist(), counts.tolist())
    losses = record_losses(study, logits, batch).tolist()
    predicted = logits.argmax(-1)
    if study.task.kind == "text-classification":
        return classification_tally(batch.labels.tolist(), predicted.tolist(), losses, len(study.task.labels))
    names = study.task.labels
    true_tags, predicted_tags = [], []
    for truth, guess in zip(batch.labels.tolist(), predicted.tolist(), strict=True):
        kept = [(t, g) for t, g in zip(truth, guess, strict=True) if t != IGNORED]
        true_tags.append([names[t] for t, _ in kept])
        predicted_tags.append([names[g] for _, g in kept])
    return token_tally(true_tags, predicted_tags, losses)


@torch.no_grad()
def predict_classes(host: ModelHost, study: Study, texts: Sequence[str]) -> list[dict[str, float]]:
    """Return, for each text, the probability of every label."""
    host.model.eval()
    encoded = host.tokenizer(list(texts), truncation=True, max_length=study.data.max_length)["input_ids"]
    batch = collate(host, [Feature(tuple(ids), 0) for ids in encoded])
    probabilities = forward(host, batch).float().softmax(-1).tolist()
    return [dict(zip(study.task.labels, row, strict=True)) for row in probabilities]


@torch.no_grad()
def predict_tags(host: ModelHost, study: Study, words: Sequence[str]) -> list[str]:
    """Return one tag per word; words past the study's length are O."""
    host.model.eval()
    encoded = host.tokenizer([list(words)], is_split_into_words=True, truncation=True, max_length=study.data.max_length)
    ids = tuple(encoded["input_ids"][0])
    guess = forward(host, collate(host, [Feature(ids, (IGNORED,) * len(ids))]))[0].argmax(-1).tolist()
    tags = ["O"] * len(words)
    seen: set[int] = set()
    for position, word in enumerate(encoded.word_ids(0)):
        if word is not None and word not in seen:
            seen.add(word)
            tags[word] = study.task.labels[guess[position]]
    return tags


@torch.no_grad()
def generate_answers(host: ModelHost, study: Study, prompts: Sequence[str], size: int = 16) -> list[str]:
    """Return greedy answers. Batches are padded on the left, so that all answers start at the same position."""
    host.model.eval()
    tokenizer, answers = host.tokenizer, []
    for start in range(0, len(prompts), size):
        rows = [
            prompt_ids(study, tokenizer, prompt)[-study.data.max_length :] for prompt in prompts[start : start + size]
        ]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=host.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=host.device)
        with host.computing():
            full = host.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=study.task.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += tokenizer.batch_decode(full[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
