"""Canaries: records of random words that are planted in training, to bound the epsilon of a study from below.

They resemble no other record, and no record decides them. A fair coin decides for each whether it enters the training.
`privet.common.privacy.one_run` turns guesses of these coins into a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from privet.client.training.data import Records
from privet.common.errors import StudyError
from privet.common.privacy.noise import Randomness, derive_key
from privet.common.study.study import Study

CANARY_WORDS = 6
_SHORTEST = 3


class _Keyed(Randomness):
    """A stream of a site's own key."""

    def __init__(self, key: bytes, purpose: str) -> None:
        super().__init__(derive_key(int.from_bytes(key, "big"), purpose))


@dataclass(frozen=True)
class Planting:
    """The canaries that a site plants in one study.

    Attributes:
        count: Their number.
        key: 32 secret bytes, which decide texts and coins.
    """

    count: int
    key: bytes = field(repr=False)

    def records(self, study: Study, tokenizer: Any) -> Records:
        """Return all canaries. Raises as `vocabulary`."""
        return make_canaries(study, vocabulary(tokenizer), self.count, _Keyed(self.key, "canaries"))

    def coins(self) -> list[bool]:
        """Return for each whether it is included."""
        return flip_coins(self.count, _Keyed(self.key, "coins"))

    def planted(self, study: Study, tokenizer: Any, records: Records) -> Records:
        """Return records with the included canaries after them. Raises as `vocabulary`."""
        chosen = self.records(study, tokenizer).select([n for n, coin in enumerate(self.coins()) if coin])
        return Records((*records.rows, *chosen.rows), (*records.units, *chosen.units), records.incomplete)


def vocabulary(tokenizer: Any) -> list[str]:
    """Return the words that are one token each: `_SHORTEST` or more lower-case ASCII letters, sorted.

    Raises:
        StudyError: There are too few words for canaries.
    """
    words = {tokenizer.decode([number]).strip() for number in range(len(tokenizer))}
    found = sorted(w for w in words if len(w) >= _SHORTEST and w.isascii() and w.isalpha() and w.islower())
    if len(found) < 2 * CANARY_WORDS:
        raise StudyError(
            f"the base model's tokenizer: expected at least {2 * CANARY_WORDS} lower-case words of one token each, "
            f"from which canaries are made; found {len(found)}",
            "pin a base model with an English vocabulary in the study's [model] table",
        )
    return found


def make_canaries(study: Study, words: Sequence[str], count: int, draws: Randomness) -> Records:
    """Return `count` distinct records of random words with random labels, tags or answers."""

    def text() -> list[str]:
        return [words[int(x * len(words))] for x in draws.uniform(CANARY_WORDS)]

    def pick(options: int, size: int) -> list[int]:
        return [int(x * options) for x in draws.uniform(size)]

    rows: list[dict[str, Any]] = []
    for number in range(count):
        # The number keeps records distinct even if the vocabulary is small.
        body = [*text(), str(number)]
        if study.task.kind == "text-classification":
            rows.append({"text": " ".join(body), "label": pick(len(study.task.labels), 1)[0]})
        elif study.task.kind == "token-classification":
            rows.append({"tokens": body, "tags": pick(len(study.task.labels), len(body))})
        elif study.task.kind == "preference":
            rows.append({"prompt": " ".join(body), "chosen": " ".join(text()), "rejected": " ".join(text())})
        else:
            rows.append({"prompt": " ".join(body), "answer": " ".join(text())})
    return Records(tuple(rows), tuple(f"canary-{number}" for number in range(count)))


def flip_coins(count: int, draws: Randomness) -> list[bool]:
    """Return for each canary whether it is included."""
    return [bool(x < 0.5) for x in draws.uniform(count)]
