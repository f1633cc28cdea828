"""The virtual clock: the time of an exchange over given lines and machines.

The message goes down to the site, the site processes its records, and the answer goes up. It arrives after

    latency + down bytes / down rate + records / records per second + up bytes / up rate

An exchange ends with the last answer, or at its deadline if an answer is missing. It never ends before all bytes have
passed through the coordinator's own line. Sites work in parallel. Nothing is measured: the same scenario gives the same
times on every machine. The clock leaves out queues on shared lines, lost packets, and the cryptography of the sites,
which takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privet.common.privacy.noise import SeededRandomness
from privet.common.secagg.encoding import asks_for_keys, kind_of
from privet.common.secagg.messages import (
    DealDelivery,
    Delivery,
    Expected,
    Finish,
    LinkDelivery,
    Proof,
    Roster,
    Step,
    Survivors,
)
from privet.common.study.messages import Message, RoundOpen, Secured
from privet.simulations.data.scenario import Network, Range, Stage

_ASKED: dict[type, Stage] = {
    Roster: "share",
    Delivery: "train",
    LinkDelivery: "share",
    DealDelivery: "share",
    Step: "train",
    Expected: "train",
    Finish: "reveal",
    Survivors: "confirm",
    Proof: "reveal",
}
_BITS = 8e-6  # megabits in a byte


@dataclass(frozen=True)
class SiteLine:
    """The line and machine of one site: Mbit/s down and up, seconds of a round trip, records per second."""

    down: float
    up: float
    latency: float
    records: float

    def slower(self, times: float) -> SiteLine:
        """Return the same line and machine, `times` times slower."""
        return replace(self, down=self.down / times, up=self.up / times, records=self.records / times)


@dataclass(frozen=True)
class Transfer:
    """The work of one site in an exchange: bytes each way, and training records processed."""

    down: int
    up: int
    records: float


def draw_line(network: Network, seed: int, site: str) -> SiteLine:
    """Return the line and machine of a site; each figure is drawn log-uniformly from its range."""
    draws = iter(SeededRandomness(seed, "line", site).uniform(4).tolist())

    def drawn(bounds: Range) -> float:
        return float(bounds[0] * (bounds[1] / bounds[0]) ** next(draws))

    down, up = drawn(network.down_mbit), drawn(network.up_mbit)
    return SiteLine(down, up, drawn(network.latency_ms) / 1000, drawn(network.records_per_second))


def seconds_of(line: SiteLine, transfer: Transfer) -> float:
    """Return the seconds until the answer of a site arrives."""
    carried = _BITS * (transfer.down / line.down + transfer.up / line.up)
    return line.latency + carried + transfer.records / line.records


def exchange_seconds(
    network: Network, arrivals: Sequence[float], moved: tuple[int, int], waited: float | None
) -> float:
    """Return the seconds that an exchange takes at the coordinator.

    Args:
        network: The network; only the coordinator's line counts here.
        arrivals: Seconds until each answer that met the deadline.
        moved: Bytes down to all sites, and bytes up from all sites.
        waited: The deadline in seconds if an answer was missing; None if all arrived.
    """
    carried = _BITS * max(moved) / network.coordinator_mbit
    return max(carried, waited if waited is not None else max(arrivals, default=0.0))


def stage_of(asked: Message) -> Stage | None:
    """Return the stage of a round that a message to a site begins; None for messages outside of rounds."""
    if isinstance(asked, RoundOpen):
        return "advertise" if asks_for_keys(asked.masking) else "train"
    if isinstance(asked, Secured):
        kind = kind_of(asked.body)
        return None if kind is None else _ASKED.get(kind)
    return None


def size_of(message: Message) -> int:
    """Return the size of a message in bytes: its binary parts, and its fields as JSON."""
    parts = message.parts()
    return sum(map(len, parts.blobs.values())) + len(json.dumps(parts.fields, separators=(",", ":")))


def deadline_of(network: Network, stage: Stage) -> float:
    """Return the seconds that the coordinator waits for the answers of a stage."""
    return network.training_seconds if stage == "train" else network.step_seconds
