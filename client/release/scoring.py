"""What a mounted adapter makes of records: scores, probabilities, answers, continuations. In passes, with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privet.client.release.generation import greedy_answers
from privet.client.training.features import IGNORED, Feature
from privet.client.training.host import ModelHost
from privet.client.training.packing import pack
from privet.client.training.passes import Score, logits_of, passes_of, score
from privet.client.training.preference import PairScore, score_pairs
from privet.client.training.tasks import left_padded
from privet.common.study.study import Study

Watch = Callable[[str, int, int], None]
"""Receives what is being done, the number of records done, and their total."""

GENERATED = 16
"""Most answers that are generated together."""


def silent(what: str, done: int, total: int) -> None:
    """Watch nothing."""


def slices(total: int, size: int, what: str, watch: Watch) -> Iterator[slice]:
    """Yield the slices of a sequence, and report each one as done when the next is asked for."""
    for start in range(0, total, size):
        watch(what, start, total)
        yield slice(start, min(start + size, total))
    watch(what, total, total)


def scores_of(
    host: ModelHost, features: Sequence[Feature], most: int, what: str = "scoring", watch: Watch = silent
) -> list[Score]:
    """Return the score of each record under the mounted adapter.

    Args:
        host: The model; its lock is held by the caller.
        features: The records.
        most: Most records of a pass.
        what: What is being done, for `watch`.
        watch: Receives progress.
    """
    return [
        found for part in slices(len(features), 8 * most, what, watch) for found in score(host, features[part], most)
    ]


def pairs_of(
    host: ModelHost, features: Sequence[Feature], most: int, what: str = "scoring", watch: Watch = silent
) -> list[PairScore]:
    """Return the score of each pair under the mounted adapter. Arguments as in `scores_of`."""
    parts = slices(len(features), 8 * most, what, watch)
    return [found for part in parts for found in score_pairs(host, features[part], most)]


@torch.no_grad()
def class_probabilities(
    host: ModelHost, features: Sequence[Feature], most: int, what: str = "scoring", watch: Watch = silent
) -> NDArray[np.float64]:
    """Return the probability of each class for each text [n, classes]. Arguments as in `scores_of`."""
    found: dict[int, NDArray[np.float64]] = {}
    for part in slices(len(features), 8 * most, what, watch):
        several = features[part]
        with host.passing(training=False):
            for passed in passes_of(host, several, pack(host.shape, several, range(len(several)), most)):
                logits, labels = logits_of(host, passed).double(), passed.labels.cpu().numpy()
                rows = np.flatnonzero(labels != IGNORED)  # one of each record, in their order
                probabilities = logits[torch.from_numpy(rows).to(logits.device)].softmax(-1).cpu().numpy()
                for record, row in zip(passed.records, probabilities, strict=True):
                    found[part.start + record] = row
    return np.array([found[record] for record in range(len(features))])


def answers_of(
    host: ModelHost, study: Study, prompts: Sequence[Any], most: int, what: str = "answering", watch: Watch = silent
) -> list[str]:
    """Return the greedy answer to each prompt under the mounted adapter. Arguments as in `scores_of`."""
    return [
        answer
        for part in slices(len(prompts), min(GENERATED, most), what, watch)
        for answer in greedy_answers(host, study, prompts[part], GENERATED)
    ]


@torch.no_grad()
def continuations_of(
    host: ModelHost,
    heads: Sequence[Sequence[int]],
    tokens: int,
    most: int,
    seed: int | None = None,
    what: str = "continuing",
    watch: Watch = silent,
) -> list[str]:
    """Return the text with which the mounted adapter continues each sequence of tokens.

    Args:
        host: The model; its lock is held by the caller.
        heads: Tokens to continue, at least one each.
        tokens: Most tokens of a continuation.
        most: Most records of a pass; at most `GENERATED` are continued together.
        seed: None: the most probable token at each place. Otherwise tokens are sampled at temperature 1.
        what: What is being done, for `watch`.
        watch: Receives progress.
    """
    tokenizer, found = host.tokenizer, []
    drawn: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    if seed is not None:
        drawn["temperature"] = 1.0
    with torch.random.fork_rng(devices=[host.device] if host.device.type == "cuda" else []):
        torch.manual_seed(seed or 0)
        for part in slices(len(heads), min(GENERATED, most), what, watch):
            ids, mask = left_padded(host, heads[part])
            with host.computing():
                full = host.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    **drawn,
                )
            found += tokenizer.batch_decode(full[:, ids.shape[1] :], skip_special_tokens=True)
    return [str(text) for text in found]
