"""Several processes that train for one simulation: each holds the base once, and always the same sites.

A site's secrets of a round and its records as tokens stay in its process, so a site never changes process. Sites are
placed by the size of their files, the largest first. Answers come in the order of addresses, as in one process, so that
a run gives the same bits with any number of processes, as long as each uses as many threads. Processes on a machine
with several GPUs take them in turn.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from queue import SimpleQueue
from typing import Self, TypeVar

import torch

from privet.client.rounds.answers import answer
from privet.client.site import SiteConfig
from privet.common.errors import StateError
from privet.common.study.messages import Message, RoundOpen
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.simulations.engines.activations import remembering
from privet.simulations.engines.memory import Behaviour, DataPool, Fleet, SimulatedWorker, Stopwatch, peak_memory_mb
from privet.simulations.sites import SimulatedConfig

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Key = tuple[int, int]
"""A site in a process: number of its fleet, and its address there."""
Answered = tuple[Message, Stopwatch]
"""A site's answer, and what it spent in training for it."""
# Answers of a process that may wait for those of the others: they lie in memory.
_AHEAD = 4


class Crew:
    """Processes that train. A context manager: they end with it, at once where it ends by an error."""

    def __init__(self, processes: int, megabytes: int = 0) -> None:
        """Start the processes.

        Args:
            processes: How many, at least one.
            megabytes: Memory in each for the outputs of frozen layers.
        """
        self.processes = processes
        threads = max(1, torch.get_num_threads() // processes)
        self._hands = [
            ProcessPoolExecutor(1, get_context("spawn"), _begin, (n, threads, megabytes)) for n in range(processes)
        ]
        for hand in self._hands:
            hand.submit(int)  # which starts its process
            # As long as we could write there too, half an answer of a process that has ended would be waited for.
            hand._result_queue._writer.close()  # type: ignore[attr-defined]
        self._started = [process for hand in self._hands for process in hand._processes.values()]
        self._load = [0] * processes
        self._place: dict[str, int] = {}
        self._fleets = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stop()
        for hand in self._hands:
            hand.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """End the processes at once. Whoever waits for one, in another thread, gets a `StateError`."""
        for process in self._started:
            process.terminate()

    def exchange(self, fleet: Fleet, study: Study) -> Exchange:
        """Return the way to the sites of a fleet, each placed in a process.

        Args:
            fleet: The sites. What they spend in training is added to its watch.
            study: What they train.
        """
        self._fleets += 1
        nodes = sorted(fleet.workers, key=lambda node: -_size(fleet.workers[node].config))
        parts: list[dict[Key, tuple[SimulatedConfig, Behaviour | None]]] = [{} for _ in self._hands]
        places = {}
        for node in nodes:
            worker = fleet.workers[node]
            places[node] = self._placed(worker.config)
            parts[places[node]][self._fleets, node] = worker.config, worker.behaviour
        with _ends_told():
            for hand, part in zip(self._hands, parts, strict=True):
                if part:
                    hand.submit(_enrol, study, part).result()
        hands = {node: self._hands[place] for node, place in places.items()}
        return CrewExchange(self._fleets, hands, fleet.watch)

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
        """Call a function with each item, one at a time in each process, and yield the results in order.

        Raises:
            StateError: A process has ended.
            Exception: What the function raises.
        """
        free: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for hand in self._hands:
            free.put(hand)

        def call(item: _Item) -> _Result:
            hand = free.get()
            try:
                with _ends_told():
                    return hand.submit(function, item).result()
            finally:
                free.put(hand)

        threads = ThreadPoolExecutor(len(self._hands))
        try:
            yield from threads.map(call, items)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def peak_memory_mb(self) -> int:
        """Return the largest resident sets of all processes so far, added up, in MB of 10^6 bytes."""
        with _ends_told():
            return sum(hand.submit(peak_memory_mb).result() for hand in self._hands)

    def _placed(self, site: SiteConfig) -> int:
        """Return a site's process: the one that it has, or the one with the least to do."""
        if site.name not in self._place:
            place = min(range(len(self._load)), key=self._load.__getitem__)
            self._place[site.name] = place
            self._load[place] += _size(site)
        return self._place[site.name]


@contextmanager
def crew_of(processes: int, megabytes: int = 0) -> Iterator[Crew | None]:
    """Give a crew of several processes; None for one, which is the caller's own."""
    if processes <= 1:
        yield None
        return
    with Crew(processes, megabytes) as crew:
        yield crew


@dataclass(frozen=True)
class CrewExchange:
    """An `Exchange` with sites in several processes."""

    fleet: int
    hands: Mapping[int, ProcessPoolExecutor] = field(repr=False)
    watch: Stopwatch

    def nodes(self) -> Sequence[int]:
        """Return all sites' addresses."""
        return sorted(self.hands)

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        """Yield each site's answer, in the order of addresses. Nothing here takes time that a deadline could end.

        Raises:
            StateError: A process has ended.
        """
        lines: dict[ProcessPoolExecutor, deque[int]] = {}
        for node in sorted(requests):
            lines.setdefault(self.hands[node], deque()).append(node)
        asked: dict[int, Future[Answered]] = {}

        def send(hand: ProcessPoolExecutor) -> None:
            if lines[hand]:
                node = lines[hand].popleft()
                asked[node] = hand.submit(_reply, (self.fleet, node), requests[node])

        with _ends_told():
            for hand in [*lines] * _AHEAD:
                send(hand)
            # None is cancelled, whatever happens: the executor of a process that ends does not stand that.
            for node in sorted(requests):
                reply, spent = asked.pop(node).result()
                send(self.hands[node])
                self.watch.add(spent)
                yield node, reply


@contextmanager
def _ends_told() -> Iterator[None]:
    """Say in words that a process has ended, be it while it was waited for or before it was asked."""
    try:
        yield
    except BrokenProcessPool:
        raise StateError(
            "a process that trained for the simulation has ended, for want of memory or by a signal",
            "resume the run, with fewer --workers where memory is short",
        ) from None


def _size(site: SiteConfig) -> int:
    return sum(path.stat().st_size for path in site.train)


@dataclass
class _Process:
    """What one of the processes holds."""

    megabytes: int = 0
    pool: DataPool = field(default_factory=DataPool)
    watch: Stopwatch = field(default_factory=Stopwatch)
    workers: dict[Key, SimulatedWorker] = field(default_factory=dict)
    remembered: ExitStack = field(default_factory=ExitStack)
    hosts: set[int] = field(default_factory=set)
    adapter: bytes = b""


_here = _Process()


def _begin(number: int, threads: int, megabytes: int) -> None:
    """Set up a new process; what a site file says of threads goes before `threads`."""
    _here.megabytes = megabytes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _enrol(study: Study, sites: Mapping[Key, tuple[SimulatedConfig, Behaviour | None]]) -> None:
    """Take in sites of a study, whose workers live here from now on."""
    for key, (site, behaviour) in sites.items():
        _here.workers[key] = SimulatedWorker(site, _here.pool, _here.watch, behaviour)
        host = _here.pool.host(study, site.resources)
        if id(host) not in _here.hosts:
            _here.hosts.add(id(host))
            _here.remembered.enter_context(remembering(host, study, _here.megabytes))


def _reply(key: Key, asked: Message) -> Answered:
    """Return the answer of a site that lives here."""
    before = Stopwatch(_here.watch.seconds, _here.watch.cpu_seconds)
    if isinstance(asked, RoundOpen):
        # Each message brings a copy of the adapter, and under secure aggregation each site keeps its message.
        _here.adapter = _here.adapter if _here.adapter == asked.adapter else asked.adapter
        asked = replace(asked, adapter=_here.adapter)
    reply = answer(lambda: asked, partial(_here.workers.__getitem__, key))
    return reply, Stopwatch(_here.watch.seconds - before.seconds, _here.watch.cpu_seconds - before.cpu_seconds)
