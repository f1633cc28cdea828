"""The tasks: metrics over records, and predictions for new texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from privet.client.training.features import IGNORED, Feature, encode_words
from privet.client.training.host import ModelHost
from privet.client.training.passes import score
from privet.client.training.preference import score_pairs
from privet.client.training.scores import (
    Tally,
    classification_tally,
    empty_tally,
    lm_tally,
    pair_tally,
    token_tally,
)
from privet.client.training.spelled import AS_TEXT
from privet.client.training.template import open_template
from privet.common.study.study import Study


@dataclass(frozen=True)
class Batch:
    """Padded tensors on the device: ids and mask [n, t]; labels [n] or [n, t]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


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


def evaluate(host: ModelHost, study: Study, features: Sequence[Feature], most: int = 64) -> Tally:
    """Return the additive statistics of the mounted adapter over `features`.

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        features: The records.
        most: Most records of a pass.
    """
    total = empty_tally(study.task.kind, len(study.task.labels))
    if study.task.kind == "preference":
        pairs = score_pairs(host, features, most)
        margins = [pair.margin for pair in pairs]
        return pair_tally([pair.correct for pair in pairs], margins, [pair.loss for pair in pairs])
    scores = score(host, features, most)
    losses = [found.loss for found in scores]
    if not scores:
        return total
    if study.task.kind == "causal-lm":
        return lm_tally([found.total for found in scores], [len(found.truth) for found in scores])
    truth, predicted = [found.truth.tolist() for found in scores], [found.predicted.tolist() for found in scores]
    if study.task.kind == "text-classification":
        classes = len(study.task.labels)
        return classification_tally([t for (t,) in truth], [p for (p,) in predicted], losses, classes)
    names = study.task.labels
    tags = [[[names[label] for label in row] for row in rows] for rows in (truth, predicted)]
    return token_tally(tags[0], tags[1], losses)


@torch.no_grad()
def predict_classes(host: ModelHost, study: Study, texts: Sequence[str]) -> list[dict[str, float]]:
    """Return, for each text, the probability of every label."""
    options = {"truncation": True, "max_length": study.data.max_length, **AS_TEXT}
    encoded = host.tokenizer(list(texts), **options)["input_ids"]
    batch = collate(host, [Feature(tuple(ids), 0) for ids in encoded])
    probabilities = forward(host, batch).float().softmax(-1).tolist()
    return [dict(zip(study.task.labels, row, strict=True)) for row in probabilities]


@torch.no_grad()
def predict_tags(host: ModelHost, study: Study, words: Sequence[str]) -> list[str]:
    """Return one tag per word; words past the study's length are O."""
    ((ids, places, _),) = encode_words(host.tokenizer, [{"tokens": list(words)}], study.data.max_length)
    guess = forward(host, collate(host, [Feature(ids, (IGNORED,) * len(ids))]))[0].argmax(-1).tolist()
    return ["O" if place is None else study.task.labels[guess[place]] for place in places]


def left_padded(host: ModelHost, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts and their mask, both [n, t], with padding on the left: all answers then begin at one place."""
    width, pad = max(map(len, rows)), host.tokenizer.pad_token_id
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=host.device), torch.tensor(mask, device=host.device)


def answer_ends(host: ModelHost, study: Study) -> tuple[list[int], str]:
    """Return the tokens at which an answer ends, and the text at which it ends where no single token does.

    They are the base's own end tokens, and the marker with which its chat template ends a turn.
    """
    own = host.model.generation_config.eos_token_id
    ends = set(own if isinstance(own, list) else [] if own is None else [own])
    template = open_template(host.tokenizer, study.task)
    marker = template.end.strip() if template is not None else ""
    ids = host.tokenizer(marker, add_special_tokens=False)["input_ids"] if marker else []
    if len(ids) == 1:
        return sorted({*ends, *ids}), ""
    return sorted(ends), marker
