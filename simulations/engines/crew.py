"""Several processes that train for one simulation: each holds the base once, and always the same sites.

A site's secrets of a round and its records as tokens stay in its process, so a site never changes process. Sites are
assigned by the size of their files, the largest first. Answers come in the order of addresses, as in one process. So a
run gives the same bits with any number of processes, if each uses the same number of threads. On a machine with several
GPUs, processes are assigned to them in turn.
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
"""A site's answer, and the time it trained for it."""
# Answers of a process that may wait, in memory, for those of the other processes.
_AHEAD = 4


class Crew:
    """Processes that train. A context manager: they end with it, and at once if it ends by an error."""

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
            hand.submit(int)  # starts its process
            # Our own copy of the writing end is closed: with it open, a read of half an answer from a process that has
            # ended would never return.
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
        """End the processes at once. A thread that waits for one gets a `StateError`."""
        for process in self._started:
            process.terminate()

    def exchange(self, fleet: Fleet, study: Study) -> Exchange:
        """Return the exchange with the sites of a fleet, each assigned to a process.

        Args:
            fleet: The sites. Their training time is added to its watch.
            study: The study that they train.
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
            Exception: Any error of the function.
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
        """Return a site's process: its present one, or the one with the least load."""
        if site.name not in self._place:
            place = min(range(len(self._load)), key=self._load.__getitem__)
            self._place[site.name] = place
            self._load[place] += _size(site)
        return self._place[site.name]


@contextmanager
def crew_of(processes: int, megabytes: int = 0) -> Iterator[Crew | None]:
    """Yield a crew of several processes, or None for one: that is the caller's own process."""
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
        """Yield each site's answer, in the order of addresses. No deadline applies here.

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
            # No future is ever cancelled: the executor of a process that has ended fails on cancelled ones.
            for node in sorted(requests):
                reply, spent = asked.pop(node).result()
                send(self.hands[node])
                self.watch.add(spent)
                yield node, reply


@contextmanager
def _ends_told() -> Iterator[None]:
    """Raise an error in words if a process has ended, before or during a call."""
    try:
        yield
    except BrokenProcessPool:
        raise StateError(
            "a training process of the simulation has ended unexpectedly: the machine ran out of memory, "
            "or the process was killed",
            "use fewer --workers; continue a simulation with `privet simulate --resume RUN`, "
            "and run any other command again",
        ) from None


def _size(site: SiteConfig) -> int:
    return sum(path.stat().st_size for path in site.train)


@dataclass
class _Process:
    """State of one of the processes."""

    megabytes: int = 0
    pool: DataPool = field(default_factory=DataPool)
    watch: Stopwatch = field(default_factory=Stopwatch)
    workers: dict[Key, SimulatedWorker] = field(default_factory=dict)
    remembered: ExitStack = field(default_factory=ExitStack)
    hosts: set[int] = field(default_factory=set)
    adapter: bytes = b""


_here = _Process()


def _begin(number: int, threads: int, megabytes: int) -> None:
    """Set up a new process. The number of threads in a site file overrides `threads`."""
    _here.megabytes = megabytes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends us
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
    """Add sites of a study. Their workers are in this process from now on."""
    for key, (site, behaviour) in sites.items():
        _here.workers[key] = SimulatedWorker(site, _here.pool, _here.watch, behaviour)
        host = _here.pool.host(study, site.resources)
        if id(host) not in _here.hosts:
            _here.hosts.add(id(host))
            _here.remembered.enter_context(remembering(host, study, _here.megabytes))


def _reply(key: Key, asked: Message) -> Answered:
    """Return the answer of a site in this process."""
    before = _here.watch.copy()
    if isinstance(asked, RoundOpen):
        # Each message holds a copy of the adapter, and a site under secure aggregation keeps its message. All sites of
        # the process share one copy, so that memory does not grow with their number.
        _here.adapter = _here.adapter if _here.adapter == asked.adapter else asked.adapter
        asked = replace(asked, adapter=_here.adapter)
    reply = answer(lambda: asked, partial(_here.workers.__getitem__, key))
    return reply, _here.watch.since(before)
