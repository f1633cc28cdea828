"""Faults between the coordinator and the sites: an `Exchange` with drop-outs, stragglers and a virtual clock.

Every draw depends only on the seed, the site, the round and the stage. A resumed run therefore meets the same faults.
The message of a stage does not reach a site that drops out of the stage. If an answer arrives after the deadline on the
virtual clock, it is withheld, because the coordinator no longer waits for it.

Each exchange appends one line to `exchanges.jsonl`, before the round can close.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.common.privacy.noise import SeededRandomness
from privet.common.study.messages import Message, RoundOpen, Secured
from privet.server.exchange import Exchange
from privet.simulations.data.scenario import STAGES, Faults, Network, Stage
from privet.simulations.scenarios.network import (
    SiteLine,
    Transfer,
    deadline_of,
    draw_line,
    exchange_seconds,
    seconds_of,
    size_of,
    stage_of,
)

FILE = "exchanges.jsonl"


@dataclass(frozen=True)
class World:
    """The conditions under which the sites of a run work.

    Attributes:
        names: Names of the sites, by address.
        records: Expected number of training records that each site processes in a round, by address.
    """

    seed: int
    network: Network
    faults: Faults
    names: Mapping[int, str]
    records: Mapping[int, float]

    def drops_out(self, node: int, round_number: int, stage: Stage) -> bool:
        """Whether a site drops out of a stage."""
        return self._draw("dropout", node, round_number, stage) < self.faults.dropout.get(stage, 0.0)

    def line(self, node: int, round_number: int) -> SiteLine:
        """Return the line and machine of a site in a round; a straggler's are slower."""
        line = draw_line(self.network, self.seed, self.names[node])
        slow = self._draw("straggler", node, round_number, "") < self.faults.stragglers
        return line.slower(self.faults.slowdown) if slow else line

    def _draw(self, purpose: str, node: int, round_number: int, stage: str) -> float:
        return float(SeededRandomness(self.seed, purpose, self.names[node], round_number, stage).uniform(1)[0])


@dataclass(frozen=True)
class FaultyExchange:
    """An exchange with drop-outs, stragglers and a virtual clock."""

    inner: Exchange
    world: World
    file: Path

    def nodes(self) -> Sequence[int]:
        """Return the addresses that the inner exchange reaches."""
        return self.inner.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        """Ask the sites that have not dropped out, and yield the answers within the deadline on the virtual clock."""
        stage = next((stage for asked in requests.values() if (stage := stage_of(asked)) is not None), None)
        if stage is None:
            yield from self.inner.ask(requests, timeout=timeout)
            return
        world = self.world
        number = next(asked.round for asked in requests.values() if isinstance(asked, RoundOpen | Secured))
        limit = deadline_of(world.network, stage)
        reached = {n: asked for n, asked in requests.items() if not world.drops_out(n, number, stage)}
        down = {node: size_of(asked) for node, asked in reached.items()}
        arrivals: dict[int, float] = {}
        up = 0
        for node, reply in self.inner.ask(reached, timeout=timeout):
            # The site has answered already; the virtual clock alone decides whether the coordinator receives it.
            transfer = Transfer(down[node], size_of(reply), world.records[node] if stage == "train" else 0.0)
            seconds = seconds_of(world.line(node, number), transfer)
            if seconds <= limit:
                up += transfer.up
                arrivals[node] = seconds
                yield node, reply
        moved = (sum(down.values()), up)
        # The coordinator cannot tell a missing answer from a slow one, so it waits until the deadline.
        waited = limit if len(arrivals) < len(requests) else None
        seconds = exchange_seconds(world.network, list(arrivals.values()), moved, waited)
        self._keep(
            {
                "round": number,
                "stage": stage,
                "asked": len(requests),
                "seconds": round(seconds, 6),
                "bytes_down": moved[0],
                "bytes_up": moved[1],
                "dropped": [world.names[node] for node in sorted(requests) if node not in reached],
                "late": [world.names[node] for node in sorted(reached) if node not in arrivals],
            }
        )

    def _keep(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def keep_closed(file: Path, closed: int) -> None:
    """Remove the lines of rounds that have not closed, before such a round runs again."""
    lines = read_exchanges(file)
    text = "".join(json.dumps(line) + "\n" for line in lines if line["round"] <= closed)
    file.write_text(text, encoding="utf-8")


def read_exchanges(file: Path) -> list[dict[str, Any]]:
    """Return one document for each exchange. An incomplete last line, as a kill leaves it, is left out."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def account(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the seconds and bytes of a run on the virtual clock, and the number of missing answers by stage."""
    rounds: dict[int, dict[str, Any]] = {}
    for line in lines:
        each = rounds.setdefault(
            line["round"], {"round": line["round"], "seconds": 0.0, "bytes_down": 0, "bytes_up": 0}
        )
        each["seconds"] = round(each["seconds"] + line["seconds"], 6)
        each["bytes_down"] += line["bytes_down"]
        each["bytes_up"] += line["bytes_up"]
    missing = {
        kind: {s: sum(len(line[kind]) for line in lines if line["stage"] == s) for s in STAGES}
        for kind in ("dropped", "late")
    }
    return {
        "rounds": list(rounds.values()),
        "seconds": round(sum(each["seconds"] for each in rounds.values()), 3),
        "bytes_down": sum(each["bytes_down"] for each in rounds.values()),
        "bytes_up": sum(each["bytes_up"] for each in rounds.values()),
        **{kind: {stage: count for stage, count in counts.items() if count} for kind, counts in missing.items()},
    }
