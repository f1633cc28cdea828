"""What a site's training takes: tokens, seconds by phase, and its loss. These numbers stay at the site.

The loss of a batch is a function of records. It may be shown where a study promises no privacy, and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

PHASES = ("passes", "clipping", "noise")
"""passes: forwards and backwards. clipping: of each unit's gradient, with the sum. noise: its draw and the release."""


@dataclass
class Meter:
    """Totals of one process since it began.

    Attributes:
        tokens: Tokens of records in training passes, without padding.
        records: Records in training passes whose losses are finite.
        loss: Sum of their losses.
        seconds: Wall-clock seconds by phase.
    """

    tokens: int = 0
    records: int = 0
    loss: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the enclosed work. On an accelerator, work that is under way counts where it is awaited."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def passed(self, lengths: Sequence[int], loss: float, records: int | None = None) -> None:
        """Count one pass over sequences of the given lengths, with the sum of the losses of so many records.

        Without `records`, each sequence is one. A sum that is not finite is left out, with its records.
        """
        self.tokens += sum(lengths)
        if math.isfinite(loss):
            self.records += len(lengths) if records is None else records
            self.loss += loss

    def copy(self) -> Meter:
        """Return the totals as they are now."""
        return Meter(self.tokens, self.records, self.loss, dict(self.seconds))

    def since(self, before: Meter) -> Meter:
        """Return what has been counted since an earlier copy."""
        seconds = {name: value - before.seconds[name] for name, value in self.seconds.items()}
        return Meter(self.tokens - before.tokens, self.records - before.records, self.loss - before.loss, seconds)

    def add(self, other: Self) -> None:
        """Add what another process has counted."""
        self.tokens += other.tokens
        self.records += other.records
        self.loss += other.loss
        for name, value in other.seconds.items():
            self.seconds[name] += value

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of a record; None without any."""
        return self.loss / self.records if self.records else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens in a second of all phases; None without any."""
        total = sum(self.seconds.values())
        return self.tokens / total if total else None
