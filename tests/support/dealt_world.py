"""A block that tolerates drop-outs, in memory: its set-up, and rounds that tests can tamper with."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from privet.common.secagg import dealt, masks, messages, site
from privet.common.secagg.coordinator import Total
from privet.common.secagg.dealt_sums import DealtAggregator
from privet.common.secagg.messages import DealtParameters
from privet.common.secagg.quantize import WORD, Words

world = importlib.import_module("tests.support.secagg_world")
blocks = importlib.import_module("tests.support.block_world")
NOBODY: frozenset[int] = frozenset()


def dealt_parameters(sites: int, rounds: int = 3, **changes: Any) -> DealtParameters:
    """Return parameters of a block with drop-outs that pass the rules."""
    single = world.parameters(sites, **{"corrupt": 1 if sites > 3 else 0, "degree": 0, **changes})
    return DealtParameters(**vars(single), rounds=rounds)


class DealtWorld:
    """A cohort and a coordinator that set up a block. Each step takes who misses it."""

    def __init__(self, parameters: DealtParameters, seed: bytes = b"dealt", missing: Collection[int] = NOBODY) -> None:
        self.parameters, self.n = parameters, len(parameters.cohort)
        self.coordinator = DealtAggregator(parameters)
        self.random = {i: world.Drbg(b"%s %d" % (seed, i)) for i in range(self.n)}
        self.journals = {i: world.Journal() for i in range(self.n)}
        self.adverts: dict[int, messages.Advertise] = {}
        self.advertised: dict[int, site.Advertised] = {}
        for i in set(range(self.n)) - set(missing):
            self.advertised[i], self.adverts[i] = site.advertise(
                world.identity(i), parameters, parameters.inputs, world.pins(self.n), world.LOW, self.random[i]
            )
            self.coordinator.admit(world.over_the_wire(self.adverts[i]))
        self.roster = world.over_the_wire(self.coordinator.roster())
        self.dealt: dict[int, dealt.Dealt] = {}
        self.deals: dict[int, messages.Deal] = {}
        self.blocks: dict[int, dealt.DealtBlock] = {}
        self.joined: dict[int, messages.Joined] = {}
        self.masked: dict[int, messages.Masked] = {}
        self.number = parameters.round

    def deal(self, missing: Collection[int] = NOBODY) -> DealtWorld:
        """Take the second exchange."""
        for i, state in self.advertised.items():
            if i not in missing:
                self.dealt[i], self.deals[i] = dealt.deal(state, self.roster)
                self.coordinator.admit(world.over_the_wire(self.deals[i]))
        self.deliveries = {i: world.over_the_wire(each) for i, each in self.coordinator.deliveries().items()}
        return self

    def join(self, missing: Collection[int] = NOBODY) -> DealtWorld:
        """Let every site open its items."""
        if not self.deals:
            self.deal()
        for i, state in self.dealt.items():
            if i not in missing:
                self.blocks[i], self.joined[i] = dealt.join(state, self.deliveries[i])
                self.coordinator.admit(world.over_the_wire(self.joined[i]))
        return self

    def words(self, index: int, number: int) -> Words:
        """A site's vector of a round: any words whose sum has room."""
        room = (1 << self.parameters.layout.lane_bits) // self.n
        rng = np.random.default_rng([index, number])
        return rng.integers(0, room, self.parameters.layout.words).astype(WORD)

    def begin(self, number: int) -> messages.Expected:
        """Begin a round at the coordinator."""
        self.number, self.masked = number, {}
        expected: messages.Expected = world.over_the_wire(self.coordinator.begin(number, blocks.inputs_of(number)))
        self.expected = expected
        return expected

    def mask(
        self, index: int, number: int, expected: Iterable[int] | None = None, inputs: bytes | None = None
    ) -> messages.Masked:
        """Let a site mask its vector of a round."""
        inputs = blocks.inputs_of(number) if inputs is None else inputs
        sites = self.expected.sites if expected is None else tuple(expected)
        words = self.words(index, number)
        return self.blocks[index].mask(number, inputs, sites, words, self.journals[index])

    def collect(self, number: int, missing: Collection[int] = NOBODY) -> DealtWorld:
        """Begin a round, and let all expected sites but `missing` mask."""
        for i in self.begin(number).sites:
            if i not in missing:
                self.masked[i] = world.over_the_wire(self.mask(i, number))
                self.coordinator.admit(self.masked[i])
        return self

    def confirm(self, missing: Collection[int] = NOBODY) -> DealtWorld:
        """Let the survivors confirm, and return the proofs."""
        self.survivors = {i: world.over_the_wire(m) for i, m in self.coordinator.survivors().items()}
        self.confirms = {}
        for i, message in self.survivors.items():
            if i not in missing:
                self.confirms[i] = world.over_the_wire(self.blocks[i].confirm(message, self.journals[i]))
                self.coordinator.admit(self.confirms[i])
        self.proofs = {i: world.over_the_wire(m) for i, m in self.coordinator.proofs().items()}
        return self

    def play(self, number: int, drops: Mapping[str, Collection[int]] | None = None) -> Total:
        """Run a round; `drops` are those who miss mask, confirm or reveal."""
        drops = drops or {}
        self.collect(number, drops.get("mask", NOBODY))
        silent = drops.get("reveal", NOBODY)
        if self.coordinator.complete:
            self.finishes = {i: world.over_the_wire(m) for i, m in self.coordinator.finishes().items()}
            reveals = {
                i: self.blocks[i].finish(m, self.journals[i]) for i, m in self.finishes.items() if i not in silent
            }
        else:
            self.confirm(drops.get("confirm", NOBODY))
            reveals = {i: self.blocks[i].reveal(m, self.journals[i]) for i, m in self.proofs.items() if i not in silent}
        self.reveals = {i: world.over_the_wire(each) for i, each in reveals.items()}
        for each in self.reveals.values():
            self.coordinator.admit(each)
        return self.coordinator.total()

    def equal(self, total: Total) -> bool:
        """Return whether a sum is that of its survivors' vectors in the round that was played last."""
        vectors = [self.words(i, self.number) for i in total.survivors]
        low = masks.LOW if self.parameters.packed else np.uint64(2**64 - 1)
        return bool(np.array_equal(total.words & low, np.sum(vectors, axis=0, dtype=WORD) & low))
