"""A block of rounds in memory: its set-up, and rounds that tests can tamper with."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection
from typing import Any

import numpy as np

from privet.common.secagg import block, messages, site
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.coordinator import Total
from privet.common.secagg.messages import BlockParameters
from privet.common.secagg.quantize import WORD, Words

world = importlib.import_module("tests.support.secagg_world")


def block_parameters(sites: int, rounds: int = 4, **changes: Any) -> BlockParameters:
    """Return parameters of a block that pass the rules."""
    single = world.parameters(
        sites, **{"corrupt": 1 if sites > 2 else 0, "min_survivors": sites, "degree": 0, **changes}
    )
    return BlockParameters(**vars(single), rounds=rounds)


def inputs_of(number: int) -> bytes:
    """Digest of study and model of a round; that of the first is the block's."""
    return world.INPUTS if number == 1 else hashlib.sha256(b"model %d" % number).digest()


class BlockWorld:
    """A cohort and a coordinator that have set up a block."""

    def __init__(self, parameters: BlockParameters, seed: bytes = b"block") -> None:
        self.parameters, self.n = parameters, len(parameters.cohort)
        self.coordinator = BlockAggregator(parameters)
        self.random = {i: world.Drbg(b"%s %d" % (seed, i)) for i in range(self.n)}
        self.journals = {i: world.Journal() for i in range(self.n)}
        self.adverts: dict[int, messages.Advertise] = {}
        self.advertised: dict[int, site.Advertised] = {}
        pins = world.pins(self.n)
        for i in range(self.n):
            self.advertised[i], self.adverts[i] = site.advertise(
                world.identity(i), parameters, parameters.inputs, pins, world.LOW, self.random[i]
            )
            self.coordinator.admit(world.over_the_wire(self.adverts[i]))
        self.roster = world.over_the_wire(self.coordinator.roster())
        self.linked: dict[int, block.Linked] = {}
        self.items: dict[int, messages.Links] = {}
        self.blocks: dict[int, block.Block] = {}
        self.joined: dict[int, messages.Joined] = {}

    def link(self) -> BlockWorld:
        """Take the second exchange."""
        for i, state in self.advertised.items():
            self.linked[i], self.items[i] = block.link(state, self.roster)
            self.coordinator.admit(world.over_the_wire(self.items[i]))
        self.deliveries = {i: world.over_the_wire(each) for i, each in self.coordinator.deliveries().items()}
        return self

    def join(self) -> BlockWorld:
        """Let every site open its items."""
        self.link()
        for i, state in self.linked.items():
            self.blocks[i], self.joined[i] = block.join(state, self.deliveries[i])
            self.coordinator.admit(world.over_the_wire(self.joined[i]))
        self.coordinator.begin(self.parameters.round, self.parameters.inputs)
        return self

    def words(self, index: int, number: int) -> Words:
        """A site's vector of a round: any words whose sum has room."""
        room = (1 << self.parameters.layout.lane_bits) // self.n
        rng = np.random.default_rng([index, number])
        return rng.integers(0, room, self.parameters.layout.words).astype(WORD)

    def mask(self, index: int, number: int, inputs: bytes | None = None) -> messages.Masked:
        """Let a site mask its vector of a round."""
        inputs = inputs_of(number) if inputs is None else inputs
        return self.blocks[index].mask(number, inputs, self.words(index, number), self.journals[index])

    def play(self, number: int, missing: Collection[int] = ()) -> Total:
        """Run a round."""
        if number != self.parameters.round:
            assert self.coordinator.begin(number, inputs_of(number)).roster == self.blocks[0].roster
        for i in range(self.n):
            if i not in missing:
                self.coordinator.admit(world.over_the_wire(self.mask(i, number)))
        return self.coordinator.total()

    def expected(self, number: int) -> Words:
        """The sum of all vectors of a round."""
        total: Words = np.sum([self.words(i, number) for i in range(self.n)], axis=0, dtype=WORD)
        return total
