"""Find texts that are much alike, in time linear in their number but for sorting, and in bounded memory.

MinHash (Broder 1997, "On the resemblance and containment of documents") over shingles of three words; candidates by
bands of the signature (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). Each band is sorted,
and texts of one key are compared with their next neighbours alone. A crowd of equal texts thus costs no pairs.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass, field

import numpy as np

MOST_TEXTS = 1_000_000
"""Texts that are compared. Each takes about 300 bytes."""
ALIKE = 0.8
"""Least share of common shingles (Jaccard similarity, estimated) of two texts that are much alike."""
_HASHES, _BANDS = 64, 8
_NEIGHBOURS = 4
_SHINGLE = 3
_LONGEST = 20_000
"""Words of a text that count. Bounds the memory of one signature."""
_BLOCK = 1024
_CELLS = 1 << 20
_SAMPLE = 2000
_COMMON, _MOSTLY = 0.5, 0.8
"""A text is templated if `_MOSTLY` of its shingles are each in more than `_COMMON` of all texts."""
_WORDS = re.compile(r"\w+")
_MIX = np.frombuffer(hashlib.shake_256(b"shingles").digest(2 * _HASHES * 8), "<u8").reshape(2, _HASHES)
_FACTORS, _SHIFTS = _MIX[0] | np.uint64(1), _MIX[1]
_PLACES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def shingles(text: str) -> np.ndarray:
    """Return the distinct hashes of a text's shingles, as 64-bit numbers; none of a text without words."""
    words = [zlib.crc32(word.encode("utf-8", "replace")) for word in _WORDS.findall(text.lower())[:_LONGEST]]
    if not words:
        return np.empty(0, np.uint64)
    words += [0] * (_SHINGLE - len(words))
    codes = np.array(words, np.uint64)
    count = len(codes) - _SHINGLE + 1
    mixed = sum(
        (codes[place : place + count] * _PLACES[place] for place in range(_SHINGLE)), np.zeros(count, np.uint64)
    )
    return np.unique(mixed ^ (mixed >> np.uint64(29)))


def signature(hashes: np.ndarray) -> np.ndarray:
    """Return the MinHash signature of a text's shingles, shape (64,), 32 bits each."""
    least = np.full(_HASHES, np.iinfo(np.uint64).max)
    for first in range(0, len(hashes), _BLOCK):
        mixed = hashes[first : first + _BLOCK, None] * _FACTORS + _SHIFTS
        least = np.minimum(least, mixed.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class Alike:
    """Numbers of training texts.

    Attributes:
        compared: Texts that were compared, tests included.
        near_duplicate: Those with a text much alike of another unit.
        train_test: Those with a test text much alike.
        label_noise: Those with a training text much alike that has another label.
        sampled: Texts of the sample of templated ones.
        templated: Templated ones of the sample.
    """

    compared: int
    near_duplicate: int
    train_test: int
    label_noise: int
    sampled: int
    templated: int


@dataclass
class Twins:
    """Takes texts one after another, and counts those that are much alike."""

    _signatures: list[np.ndarray] = field(default_factory=list)
    _facts: list[tuple[int, int, bool]] = field(default_factory=list)
    _cells: np.ndarray = field(default_factory=lambda: np.zeros(_CELLS, np.uint32))
    _texts: int = 0
    _sample: list[np.ndarray] = field(default_factory=list)
    _stride: int = 1

    def add(self, text: str, unit: str, label: str | None, *, test: bool) -> None:
        """Take a text with words in it.

        Args:
            text: The text.
            unit: Name of the unit of privacy; unique where there is no column of units.
            label: Its label; None if labels do not count.
            test: Whether it is of a test file.
        """
        hashes = shingles(text)
        if not len(hashes):
            return
        if not test:
            self._count(hashes)
        if len(self._facts) < MOST_TEXTS:
            self._signatures.append(signature(hashes))
            # 62 bits: names of units and labels are not kept, and two of them collide once in 10^18.
            self._facts.append((hash(unit) >> 2, -1 if label is None else hash(label) >> 2, test))

    def _count(self, hashes: np.ndarray) -> None:
        """Count a text's shingles, and keep those of each `_stride`-th text as the sample."""
        cells = np.unique((hashes % np.uint64(_CELLS)).astype(np.uint32))
        self._cells[cells] += 1
        if self._texts % self._stride == 0:
            self._sample.append(cells)
            if len(self._sample) > _SAMPLE:
                self._sample, self._stride = self._sample[::2], 2 * self._stride
        self._texts += 1

    def counts(self) -> Alike:
        """Return the counts of all texts so far."""
        count = len(self._facts)
        alike = {name: np.zeros(count, bool) for name in ("unit", "test", "label")}
        if count > 1:
            found = np.stack(self._signatures)
            units = np.array([unit for unit, _, _ in self._facts])
            labels = np.array([label for _, label, _ in self._facts])
            tests = np.array([test for _, _, test in self._facts])
            for first, second in self._pairs(found):
                both = ~tests[first] & ~tests[second]
                other = both & (units[first] != units[second])
                named = both & (labels[first] != -1) & (labels[second] != -1) & (labels[first] != labels[second])
                for name, chosen in (("unit", other), ("label", named), ("test", tests[first] != tests[second])):
                    alike[name][first[chosen]] = True
                    alike[name][second[chosen]] = True
            alike["test"] &= ~tests
        common = self._cells > _COMMON * self._texts
        # Of fewer texts than ten, half says nothing about a template.
        templated = sum(common[cells].mean() >= _MOSTLY for cells in self._sample) if self._texts >= 10 else 0
        return Alike(
            count,
            int(alike["unit"].sum()),
            int(alike["test"].sum()),
            int(alike["label"].sum()),
            len(self._sample),
            int(templated),
        )

    @staticmethod
    def _pairs(found: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return pairs of texts that are much alike, each as two arrays of places."""
        pairs = []
        rows = _HASHES // _BANDS
        powers = np.cumprod(np.full(rows, _PLACES[0]), dtype=np.uint64)
        for band in range(_BANDS):
            keys = (found[:, band * rows : (band + 1) * rows] * powers).sum(axis=1, dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            for step in range(1, _NEIGHBOURS + 1):
                first, second = order[:-step], order[step:]
                near = keys[first] == keys[second]
                first, second = first[near], second[near]
                near = np.concatenate(
                    [
                        (found[first[at : at + 65536]] == found[second[at : at + 65536]]).mean(axis=1) >= ALIKE
                        for at in range(0, len(first), 65536)
                    ]
                    or [np.zeros(0, bool)]
                )
                pairs.append((first[near], second[near]))
        return pairs
