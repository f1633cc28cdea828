"""The in-memory engine: all sites' workers in one process, behind the coordinator's `Exchange`.

Workers and rounds are the deployed ones. All sites share one frozen base, with adapters mounted in turn. Each site
holds its records as tokens, and in a round its update and its secrets. A simulated worker differs from a deployed one
in three points. Its data is read once for all arms of a run. Its training is timed. Its data or updates may be changed
on purpose (`privet.simulations.scenarios.malicious`).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

from privet.client.rounds.answers import answer
from privet.client.rounds.worker import Worker
from privet.client.site import Resources
from privet.client.training.footprint import high_water
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.client.training.meter import Meter
from privet.client.training.model import open_host
from privet.common.study.messages import Contribution, Message, RoundOpen
from privet.common.study.study import Study
from privet.simulations.sites import SimulatedConfig, SimulatedSite, load_simulated

FIRST_NODE = 2
"""Address of the first site. The other sites follow in name order."""


class Behaviour(Protocol):
    """Changes that a site makes to its data and its update before the protocol receives them."""

    def data(self, study: Study, host: ModelHost, data: SiteData) -> SiteData:
        """Return the data that the site trains on."""

    def update(self, contribution: Contribution) -> Contribution:
        """Return the contribution that the site sends."""


@dataclass
class DataPool:
    """The sites' records as tokens, read once per process and shared by all arms that train on them."""

    _known: dict[str, SiteData] = field(default_factory=dict)
    _hosts: dict[tuple[str, Resources], ModelHost] = field(default_factory=dict)
    _read: dict[str, str] = field(default_factory=dict)

    def host(self, study: Study, resources: Resources) -> ModelHost:
        """Return the host of a study's model. Its base is located and verified once. Raises as `open_host`."""
        key = study.digest, resources
        if key not in self._hosts:
            self._hosts[key] = open_host(study, resources, begun=True)
        return self._hosts[key]

    def load(self, worker: SimulatedWorker, study: Study, host: ModelHost) -> SiteData:
        """Return a site's data under a study. The first call reads its files. Raises as `Worker.open`."""
        config = worker.config
        files = [(path.name, (stat := path.stat()).st_ino, stat.st_mtime_ns) for path in config.train]
        site = config.model_copy(update={"train": (), "test": (), "peers": {}, "log": None})
        key = repr((self._what_is_read(study), site, files))
        if key not in self._known:
            self._known[key] = worker.read(study, host)
        return self._known[key]

    def _what_is_read(self, study: Study) -> str:
        """Return the part of a study that determines its data."""
        if study.digest not in self._read:
            other = {"training": None, "aggregation": None, "lora": None, "secure_aggregation": None}
            self._read[study.digest] = repr(study.model_copy(update=other))
        return self._read[study.digest]


@dataclass
class Stopwatch:
    """Wall and CPU seconds of the sites' training, validation included, and what it did in them."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    meter: Meter = field(default_factory=Meter)

    def add(self, other: Stopwatch) -> None:
        """Add the times of another watch."""
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.meter.add(other.meter)

    def copy(self) -> Stopwatch:
        """Return the times as they are now."""
        return Stopwatch(self.seconds, self.cpu_seconds, self.meter.copy())

    def since(self, before: Stopwatch) -> Stopwatch:
        """Return the times since an earlier copy."""
        return Stopwatch(
            self.seconds - before.seconds, self.cpu_seconds - before.cpu_seconds, self.meter.since(before.meter)
        )


class SimulatedWorker(Worker):
    """A worker among many in one process."""

    def __init__(
        self, config: SimulatedConfig, pool: DataPool, watch: Stopwatch, behaviour: Behaviour | None = None
    ) -> None:
        super().__init__(SimulatedSite(config))
        self.config = config
        self._pool, self._watch, self.behaviour = pool, watch, behaviour

    def read(self, study: Study, host: ModelHost) -> SiteData:
        """Read this site's files, as a deployed worker does."""
        return super()._load(study, host)

    def _host(self, study: Study) -> ModelHost:
        return self._pool.host(study, self.config.resources)

    def _load(self, study: Study, host: ModelHost) -> SiteData:
        data = self._pool.load(self, study, host)
        return data if self.behaviour is None else self.behaviour.data(study, host, data)

    def _contribution(self, opened: RoundOpen) -> Contribution:
        meter = self._host(Study.parse(dict(opened.study))).meter
        started, cpu, before = time.perf_counter(), time.process_time(), meter.copy()
        contribution = super()._contribution(opened)
        self._watch.seconds += time.perf_counter() - started
        self._watch.cpu_seconds += time.process_time() - cpu
        self._watch.meter.add(meter.since(before))
        return contribution if self.behaviour is None else self.behaviour.update(contribution)


@dataclass(frozen=True)
class MemoryExchange:
    """An `Exchange` with workers in this process: each message is answered at once, one at a time."""

    workers: Mapping[int, Worker]

    def nodes(self) -> Sequence[int]:
        """Return all sites' addresses."""
        return sorted(self.workers)

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        """Yield each site's answer, in the order of addresses. No deadline applies here."""
        for node in sorted(requests):
            yield node, answer(partial(requests.__getitem__, node), partial(self.workers.__getitem__, node))


@dataclass(frozen=True)
class Fleet:
    """The simulated sites of a run, by address."""

    workers: Mapping[int, SimulatedWorker]
    watch: Stopwatch

    @property
    def names(self) -> dict[int, str]:
        """Return the sites' names by address."""
        return {node: worker.name for node, worker in self.workers.items()}

    def exchange(self) -> MemoryExchange:
        """Return the exchange with all sites."""
        return MemoryExchange(self.workers)


def load_sites(files: Sequence[Path]) -> list[SimulatedConfig]:
    """Read site files. Each is read again only if it or its directory changes. Raises as `load_simulated`."""
    return [_site(file, _changed(file), _changed(file.parent)) for file in files]


def _changed(path: Path) -> tuple[int, int]:
    found = path.stat() if path.exists() else None
    return (0, 0) if found is None else (found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4096)
def _site(file: Path, changed: tuple[int, int], beside: tuple[int, int]) -> SimulatedConfig:
    return load_simulated(file)


def open_fleet(files: Sequence[Path], pool: DataPool, behaviours: Mapping[str, Behaviour] | None = None) -> Fleet:
    """Return workers for site files. Nothing is loaded yet.

    Raises:
        StudyError: A site file is missing or not valid.
    """
    watch, found = Stopwatch(), behaviours or {}
    sites = load_sites(files)
    workers = {
        node: SimulatedWorker(site, pool, watch, found.get(site.name)) for node, site in enumerate(sites, FIRST_NODE)
    }
    return Fleet(workers, watch)


def peak_memory_mb() -> int:
    """Return the largest resident set of this process so far, in MB of 10^6 bytes."""
    # On Linux, `ru_maxrss` also counts the process that started this one.
    if (found := high_water()) is not None:
        return round(found / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
