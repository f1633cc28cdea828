"""Sites with a trainer apart, for tests: seeded ones, trainers that run in the test's own process, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.site import load_site
from privet.client.trainer.apart import Opening, Trainer
from privet.client.trainer.wire import VERSION, Packet, pack, unpack
from privet.client.trainer.work import Work
from privet.common.errors import StateError
from privet.common.pki.keyfile import make_key, public_key
from privet.common.privacy.noise import Randomness, SeededRandomness
from privet.common.study.study import Study
from tests.support.faulty_rounds import uncounted
from tests.support.tiny import class_rows, site_toml, write_policy

SITES = ("ash", "elm", "oak", "yew")
Bent = Callable[[Packet, Packet], Packet]
"""Makes another answer of a request and its honest answer."""


class SeededSite(RealSite):
    """A real site whose sampling and noise can be had again, to compare two ways of training bit by bit."""

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        return SeededRandomness(11, purpose, round_number)


def place(
    folder: Path,
    study: Study,
    rows: Any = None,
    *,
    sites: Sequence[str] = SITES,
    slurm: dict[str, Any] | None = None,
    **resources: Any,
) -> Path:
    """Write a site that agreed to a study, and return its file. `resources` go into its table of that name.

    Args:
        folder: Of the site.
        study: The study.
        rows: The site's records.
        sites: All sites, this one first.
        slurm: The table of that name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {site: public_key(make_key(folder / f"{site}.pem")) for site in sites}
    file = site_toml(
        folder,
        "ash",
        class_rows(30) if rows is None else rows,
        seed=None,
        witnesses=sites,
        studies=[study.digest],
        declared_count=30,
        identity="ash.pem",
        limit={"unit": study.privacy.unit, "epsilon": 50.0, "delta": 1e-3} if study.private else None,
        resources=resources,
    )
    admitted = {"privacy.unit": study.privacy.unit, "metrics.allow": ["validation", "statistics", "evaluate"]}
    banded = {} if study.privacy.band is None else {"privacy.banded_noise": True}
    write_policy(folder / "ash.policy.toml", **admitted, **banded)
    file.write_text(file.read_text() + "[peers]\n" + "".join(f'{site} = "{key}"\n' for site, key in keys.items()))
    if slurm is not None:
        file.write_text(file.read_text().replace("[resources]\n", '[resources]\ntrainer = "slurm"\n'))
        with_table(file, "resources.slurm", **slurm)
    return file


def worker_at(file: Path) -> Worker:
    """Return a worker for a site's file, seeded."""
    return Worker(SeededSite(load_site(file)))


def with_table(file: Path, table: str, **values: Any) -> Path:
    """Add a table to a site's file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    file.write_text(file.read_text() + "\n".join([f"[{table}]", *lines]) + "\n")
    return file


@dataclass
class HereChannel:
    """A trainer in the test's own process, which nothing confines.

    Attributes:
        bent: Changes its answers.
        asked: All requests.
        dies_at: Number of the request at which it ends.
        version: Of privet, as it says.
    """

    bent: Bent = lambda asked, answer: answer
    asked: list[Packet] = field(default_factory=list)
    dies_at: int | None = None
    queued: bool = False
    version: str = VERSION
    _work: Work | None = None

    def open(self) -> None:
        self._work = self._work or Work()

    @property
    def alive(self) -> bool:
        return self._work is not None

    def send(self, body: bytes, until: float) -> None:
        if self._work is None:
            raise StateError("the trainer does not run")
        self.asked.append(unpack(body))

    def receive(self, most: int, until: float) -> bytes:
        packet = self.asked[-1]
        if self._work is None or len(self.asked) - 1 == self.dies_at:
            raise StateError("the trainer's process ended with signal 9")
        if packet.kind == "confine":
            return pack(Packet("done", {"network": False, "files": False, "signals": False, "version": self.version}))
        with uncounted() if packet.kind == "open" else nullcontext():
            answer = self._work.answer(packet)
        bent = pack(self.bent(packet, unpack(answer)))
        assert len(bent) <= most
        return bent

    def close(self) -> None:
        if self._work is not None and self._work._opened is not None:
            self._work._opened.round.close()  # the model is this process's
        self._work = None


def trainer_here(monkeypatch: Any, channel: HereChannel) -> None:
    """Have sites use a trainer in this process, whatever their files ask for."""

    def made(config: Any, opened: Opening, check: Callable[[], None]) -> Trainer:
        return Trainer(opened, [channel], check=check)

    monkeypatch.setattr("privet.client.rounds.worker.trainer_of", made)
