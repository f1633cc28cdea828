"""A whole round in memory, step by step, so that tests can stop it, drop sites and tamper with messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.common.errors import StateError
from privet.common.secagg import coordinator, encoding, graph, messages, quantize, site, terms
from privet.common.secagg.messages import Parameters
from privet.common.secagg.quantize import Segment, Words
from privet.common.secagg.suites import Suite

NONE: frozenset[int] = frozenset()
SUITE = Suite.X25519_MLKEM768  # of all rounds that name none; tests set others
INPUTS = hashlib.sha256(b"study and model").digest()


class Drbg:
    """Reproducible bytes: SHA-256 of the seed and a counter. For tests only."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.counter = 0
        self.left = b""

    def __call__(self, count: int) -> bytes:
        while len(self.left) < count:
            self.left += hashlib.sha256(self.seed + self.counter.to_bytes(8, "big")).digest()
            self.counter += 1
        out, self.left = self.left[:count], self.left[count:]
        return out


class Journal:
    """A site's durable record, here in memory."""

    def __init__(self) -> None:
        self.entries: list[site.RecordedStep] = []

    def __call__(self, entry: site.RecordedStep) -> None:
        if any((e.session, e.round, e.step) == (entry.session, entry.round, entry.step) for e in self.entries):
            raise StateError(f"this round's {entry.step} step is on record already")
        self.entries.append(entry)


def identity(index: int) -> site.Identity:
    seed = hashlib.sha256(b"identity %d" % index).digest()
    return site.Identity(f"site-{index:04d}", Ed25519PrivateKey.from_private_bytes(seed))


def segments(size: int, bound: float = 1.0) -> tuple[Segment, ...]:
    return (Segment("examples", 1, 1e6, count=True), Segment("update", size, bound))


def parameters(
    sites: int,
    *,
    corrupt: int = 0,
    dropouts: int = 0,
    size: int = 7,
    bits: int = 16,
    number: int = 1,
    degree: int | None = None,
    threshold: int | None = None,
    min_survivors: int | None = None,
    layout: tuple[Segment, ...] | None = None,
    proposed: bool = True,
    suite: Suite | None = None,
) -> Parameters:
    assumed = corrupt if proposed else 0
    choice = graph.choose(sites, assumed, dropouts)
    survivors = max(terms.least_survivors(sites, assumed), sites - dropouts)
    members = tuple(
        messages.CohortMember(who.name, who.key.public_key().public_bytes_raw()) for who in map(identity, range(sites))
    )
    return Parameters(
        session=hashlib.sha256(b"session").digest(),
        round=number,
        inputs=INPUTS,
        cohort=members,
        degree=choice.degree if degree is None else degree,
        threshold=choice.threshold if threshold is None else threshold,
        corrupt=corrupt,
        security=graph.SECURITY,
        min_survivors=survivors if min_survivors is None else min_survivors,
        bits=bits,
        segments=segments(size) if layout is None else layout,
        suite=SUITE if suite is None else suite,
    )


def pins(sites: int) -> dict[str, bytes]:
    return {who.name: who.key.public_key().public_bytes_raw() for who in map(identity, range(sites))}


def values(index: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    return {"examples": np.array([100 + index]), "update": rng.uniform(-1.2, 1.2, size).astype(np.float32)}


LOW = terms.Floor(cohort=2, survivors=2, threshold=1, corrupt=0, corrupt_fraction=0.0, security=0, classical=True)


@dataclass
class World:
    """A cohort, a coordinator and the messages so far. Each step takes who misses it."""

    parameters: Parameters
    seed: bytes = b"seed"
    floor: terms.Floor = LOW
    vector: Callable[[int], Mapping[str, np.ndarray]] | None = None
    journals: dict[int, Journal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = len(self.parameters.cohort)
        self.coordinator = coordinator.Aggregator(self.parameters)
        self.layout = self.parameters.layout
        self.size = self.layout.segments[-1].size
        self.random = {i: Drbg(self.seed + b" site %d" % i) for i in range(self.n)}
        self.journals = self.journals or {i: Journal() for i in range(self.n)}
        self.words: dict[int, Words] = {}
        self.masking: dict[int, site.MaskedState] = {}
        self.masked: dict[int, messages.Masked] = {}

    def advertise(self, missing: Collection[int] = NONE) -> World:
        self.advertised, self.adverts = {}, {}
        for i in range(self.n):
            if i not in missing:
                self.advertised[i], self.adverts[i] = site.advertise(
                    identity(i), self.parameters, INPUTS, pins(self.n), self.floor, self.random[i]
                )
                self.coordinator.admit(over_the_wire(self.adverts[i]))
        self.roster = over_the_wire(self.coordinator.roster())
        return self

    def share(self, missing: Collection[int] = NONE) -> World:
        self.shared, self.shares = {}, {}
        for i, state in self.advertised.items():
            if i not in missing:
                self.shared[i], self.shares[i] = site.share(state, self.roster)
                self.coordinator.admit(over_the_wire(self.shares[i]))
        self.deliveries = {i: over_the_wire(m) for i, m in self.coordinator.deliveries().items()}
        return self

    def encoded(self, index: int) -> Words:
        chosen = self.vector(index) if self.vector else values(index, self.size)
        return quantize.quantise(self.layout, chosen, self.random[index]).words

    def mask(self, missing: Collection[int] = NONE) -> World:
        for i, state in self.shared.items():
            if i not in missing:
                self.words[i] = self.encoded(i)
                copy = self.words[i].copy()
                self.masking[i], self.masked[i] = site.mask(state, self.deliveries[i], copy, self.journals[i])
                self.coordinator.admit(over_the_wire(self.masked[i]))
        self.survivors = {i: over_the_wire(m) for i, m in self.coordinator.survivors().items()}
        return self

    def confirm(self, missing: Collection[int] = NONE) -> World:
        self.confirmed, self.confirms = {}, {}
        for i, state in self.masking.items():
            if i not in missing:
                self.confirmed[i], self.confirms[i] = site.confirm(state, self.survivors[i])
                self.coordinator.admit(over_the_wire(self.confirms[i]))
        self.proofs = {i: over_the_wire(m) for i, m in self.coordinator.proofs().items()}
        return self

    def reveal(self, missing: Collection[int] = NONE) -> World:
        self.reveals = {}
        for i, state in self.confirmed.items():
            if i not in missing:
                self.reveals[i] = site.reveal(state, self.proofs[i], self.journals[i])
                self.coordinator.admit(over_the_wire(self.reveals[i]))
        return self

    def finish(self, drops: Mapping[str, Collection[int]] | None = None) -> coordinator.Total:
        drops = drops or {}
        self.advertise(drops.get("advertise", NONE)).share(drops.get("share", NONE)).mask(drops.get("mask", NONE))
        self.confirm(drops.get("confirm", NONE)).reveal(drops.get("reveal", NONE))
        return self.coordinator.total()


def over_the_wire(message: Any) -> Any:
    """Encode and decode, so that every test also crosses the byte encoding."""
    return encoding.decode(type(message), encoding.encode(message))
