"""The virtual clock: what an exchange would take over given lines and machines.

A site's answer arrives after its message has come down, its machine has worked and its answer has gone up:

    latency + down bytes / down rate + records / records per second + up bytes / up rate

An exchange ends with the last answer, or at its deadline where one is missing, and never before all bytes have passed
through the coordinator's own line. Sites work side by side. Nothing is measured: the same scenario gives the same
times on every machine. What it leaves out: queues on shared lines, lost packets, and the sites' cryptography, which is
milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privet.common.privacy.noise import SeededRandomness
from privet.common.secagg.encoding import kind_of
from privet.common.secagg.messages import Delivery, Proof, Roster, Survivors
from privet.common.study.messages import Message, RoundOpen, Secured
from privet.simulations.data.scenario import Network, Range, Stage

_ASKED: dict[type, Stage] = {Roster: "share", Delivery: "train", Survivors: "confirm", Proof: "reveal"}
_BITS = 8e-6  # megabits in a byte


@dataclass(frozen=True)
class SiteLine:
    """One site's line and machine: megabits per second, seconds of a round trip, records per second."""

    down: float
    up: float
    latency: float
    records: float

    def slower(self, times: float) -> SiteLine:
        """Return the same, so many times slower."""
        return replace(self, down=self.down / times, up=self.up / times, records=self.records / times)


@dataclass(frozen=True)
class Transfer:
    """What one site does in an exchange: bytes each way, and training records worked through."""

    down: int
    up: int
    records: float


def draw_line(network: Network, seed: int, site: str) -> SiteLine:
    """Return a site's line and machine, each figure drawn log-uniformly from its range."""
    draws = iter(SeededRandomness(seed, "line", site).uniform(4).tolist())

    def drawn(bounds: Range) -> float:
        return float(bounds[0] * (bounds[1] / bounds[0]) ** next(draws))

    down, up = drawn(network.down_mbit), drawn(network.up_mbit)
    return SiteLine(down, up, drawn(network.latency_ms) / 1000, drawn(network.records_per_second))


def seconds_of(line: SiteLine, transfer: Transfer) -> float:
    """Return after how many seconds a site's answer is there."""
    carried = _BITS * (transfer.down / line.down + transfer.up / line.up)
    return line.latency + carried + transfer.records / line.records


def exchange_seconds(
    network: Network, arrivals: Sequence[float], moved: tuple[int, int], waited: float | None
) -> float:
    """Return how long an exchange takes the coordinator.

    Args:
        network: Its line.
        arrivals: Seconds after which each answer was there, of those that came in time.
        moved: Bytes down to all sites and up from them.
        waited: The deadline, where an answer was missing; None where all came.
    """
    carried = _BITS * max(moved) / network.coordinator_mbit
    return max(carried, waited if waited is not None else max(arrivals, default=0.0))


def stage_of(asked: Message) -> Stage | None:
    """Return the stage of a round that a message to a site begins; None outside of rounds."""
    if isinstance(asked, RoundOpen):
        return "advertise" if asked.masking else "train"
    if isinstance(asked, Secured):
        kind = kind_of(asked.body)
        return None if kind is None else _ASKED.get(kind)
    return None


def size_of(message: Message) -> int:
    """Return a message's bytes: its binary parts, and its fields as JSON."""
    parts = message.parts()
    return sum(map(len, parts.blobs.values())) + len(json.dumps(parts.fields, separators=(",", ":")))


def deadline_of(network: Network, stage: Stage) -> float:
    """Return how long the coordinator waits for a stage, in seconds."""
    return network.training_seconds if stage == "train" else network.step_seconds
