"""The site's side of a trainer apart: what it is asked, and what of its answers is believed.

The trainer is given records, so it can ruin what is made of them. It cannot make a sum that no honest one could make:
an answer of another kind, or beyond the bound of its sum, is refused. All that is drawn, and all that is charged, is on
this side.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privet.client.trainer.wire import SPARE, VERSION, Packet, lists, malformed, pack, ragged, unpack
from privet.client.trainer.work import clipping_head, rows_of
from privet.client.training.counts import counted_rows
from privet.client.training.dp import Clipping, TermSum
from privet.client.training.loading import SiteData
from privet.client.training.meter import Meter
from privet.client.training.train import Drawn, Stepping, TrainingSet
from privet.common.canonical import canonical_json, digest
from privet.common.errors import (
    DataError,
    DivergedError,
    PrivetError,
    ProtocolError,
    StateError,
    StudyError,
    VerificationError,
)
from privet.common.privacy.noise import Randomness
from privet.common.privacy.shared_noise import Integers
from privet.common.study.adapter import Adapter, AdapterSpec, TensorRole, TensorSpec
from privet.common.study.study import Study

_PATIENCE = 21_600.0
"""Seconds after which a trainer that has not answered one request is ended. A late answer is of use: the ledger stores
the update, and it leaves when the round is asked for again."""
_COUNT = 1_000_000_000
_HELD = 10_000_000
"""Most units of a site, and a bound on what its process keeps of them."""
_OPENED = 2**28
"""Most bytes of what a trainer says of the records."""
_PLANTED = 10_000
"""Room for canaries, which are units beyond the declared ones."""
_NAMES = re.compile("(sha256:[0-9a-f]{64})?")
_LONGEST = 2000
_ERRORS: Mapping[str, type[PrivetError]] = {
    kind.__name__: kind for kind in (StudyError, DataError, ProtocolError, VerificationError, StateError, DivergedError)
} | {"RefusedError": StateError}
"""The errors that a trainer may answer with. It speaks for no ledger and for no policy: a site signs its refusals."""


class Channel(Protocol):
    """The way to one trainer."""

    queued: bool

    def open(self) -> None:
        """Start the trainer, or begin a session with it."""

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""

    def send(self, body: bytes, until: float) -> None:
        """Send a request."""

    def receive(self, most: int, until: float) -> bytes:
        """Return the answer to it, of at most `most` bytes."""

    def close(self) -> None:
        """End the trainer."""


@dataclass(frozen=True)
class Opening:
    """What trainers are opened with.

    Attributes:
        study: The study.
        readable: Files and directories that they read.
        request: The request `open`: study, the part of the site file, and what only the site knows.
        declared: The count that the site file declares; None: it follows from the records.
        gpus: Number of GPUs that this process sees, and a trainer beside it ought to find one of.
    """

    study: Study
    readable: Sequence[str]
    request: Mapping[str, Any]
    declared: int | None
    gpus: int = 0

    @property
    def digest(self) -> str:
        """Names all that trainers are given, in hexadecimal."""
        return digest(canonical_json({"read": list(self.readable), "open": dict(self.request)})).removeprefix("sha256:")


@dataclass
class Trainer:
    """One study's trainers, as one. They are started when they are needed, and again where they have ended.

    Attributes:
        opening: What they are opened with.
        channels: The ways to them; the units of a step are dealt over all.
        said: Receives what is enforced on a trainer, once it is known.
        check: Checks the data files, whenever trainers have read them.
        lock: Held by whoever uses the trainers.
        meter: Counts what they take.
        kept: As of a `ModelHost`.
        stale: Whether the records have changed since the study was opened. Then it has to be opened anew.
    """

    opening: Opening
    channels: Sequence[Channel]
    said: Callable[[Mapping[str, Any]], None] = lambda confined: None
    check: Callable[[], None] = lambda: None
    lock: threading.RLock = field(default_factory=threading.RLock)
    meter: Meter = field(default_factory=Meter)
    kept: dict[str, bytes] = field(default_factory=dict, repr=False)
    stale: bool = False
    _ready: bool = False
    _facts: tuple[str, AdapterSpec, SiteData] | None = field(default=None, repr=False)
    _totals: list[Meter] = field(default_factory=list, repr=False)
    _starts: dict[int, Adapter] = field(default_factory=dict, repr=False)

    def ready(self) -> None:
        """Have all trainers run, with the study open in each. Nothing is drawn.

        Raises:
            StateError: One cannot be started, is queued still, or reads other records than when the study was opened.
            PrivetError: As `open_host` and `load_data`. Its text stays at the site.
        """
        with self.lock:
            if self._ready and all(channel.alive for channel in self.channels):
                return
            self._ready = False
            with self._careful():
                for channel in self.channels:
                    channel.open()
                self._totals = [Meter() for _ in self.channels]
                confine = Packet("confine", {"read": list(self.opening.readable)})
                confined = self._all([confine] * len(self.channels))
                for answer in confined:
                    _check_version(answer)
                opened = self._all([Packet("open", self.opening.request)] * len(self.channels), _OPENED)
                for answer in confined[:1]:
                    self.said(answer.head)
                for answer in opened:
                    self._learn(answer)
                # After they were read: files that changed before would go unseen otherwise, for good.
                self.check()
            self._ready = True

    def knows(self, study: Study) -> bool:
        """Return whether a trainer has said what a study finds at this site, though it may have ended since."""
        return self._facts is not None and self.opening.study.digest == study.digest

    @property
    def spec(self) -> AdapterSpec:
        """The layout of the adapter."""
        return self._known[1]

    @property
    def data(self) -> SiteData:
        """The site's records: their units, without contents."""
        return self._known[2]

    def close(self) -> None:
        """End all trainers."""
        for channel in self.channels:
            channel.close()

    # --- what is asked ---------------------------------------------------------------------------------------

    def start(self, study: Study) -> Adapter:
        """Return the adapter that a study starts from, as base and seed decide it. Raises as `ready`."""
        if study.seed not in self._starts:
            answer = self._one(Packet("start"), 4 * self._values())
            self._starts[study.seed] = Adapter.read(self.spec, _array(answer, "adapter", np.uint8).tobytes())
        return self._starts[study.seed]

    def validation_points(self, adapter: Adapter, lattice: float) -> Integers:
        """Return an adapter's validation sums in multiples of `lattice`, int64 [3]. Raises as `ready`."""
        answer = self._one(Packet("validate", {"lattice": lattice}, _adapter(adapter)))
        points = _array(answer, "points", np.int64, 3)
        # Each unit adds three values from 0 to 1.
        _check(bool((points >= 0).all()) and 0 <= points.max() < 2**60)
        _check(points.max() * lattice <= len(self.data.validation_units))
        return points

    def unit_sum(self, study: Study, adapter: Adapter, sampling: Randomness, size: int, clipping: Clipping) -> Integers:
        """Return the sum over all units of a round that is one sum, int64 [k]. Raises as `ready`.

        Args:
            study: The study.
            adapter: What the coordinator sent.
            sampling: Draws the rows of units with more than the study counts.
            size: k.
            clipping: The bound of a unit's term, and the lattice.
        """
        self.ready()  # before rows are drawn, and so paid for
        units = self.data.training.units
        rows = ragged("rows", counted_rows(study, units, sampling) if study.kind == "statistics" else [])
        answer = self._one(
            Packet("sum", {"clipping": clipping_head(clipping)}, {**rows, **_adapter(adapter)}), 8 * size
        )
        points = _array(answer, "points", np.int64, size)
        _check_bound(points, clipping, len(units))
        return points

    @contextmanager
    def stepping(
        self, study: Study, adapter: Adapter, own: NDArray[np.bool_] | None, *, private: bool
    ) -> Iterator[Stepping]:
        """Begin a round from an adapter. Raises as `ready`."""
        arrays = _adapter(adapter) | ({} if own is None else {"own": own})
        self.ready()
        with self._careful():
            self._all([Packet("begin", {"private": private}, arrays)] * len(self.channels))
        trained = [
            (tensor, nn.Parameter(torch.from_numpy(np.array(adapter.values[tensor.name]))))
            for tensor in study.trained(self.spec)
        ]
        yield _Steps(self, trained, own)

    def step(
        self, kind: str, values: NDArray[np.float32], drawn: Drawn, head: Mapping[str, Any]
    ) -> list[tuple[int, Packet]]:
        """Ask every trainer for the sum over its part of a step's units. Return the parts' sizes and the answers."""
        # Dealt in turn, so that each gets about as many of each length, whatever their order.
        order, ways = sorted(drawn), len(self.channels)
        parts = [{unit: drawn[unit] for unit in order[way::ways]} for way in range(ways)]
        with self._careful():
            packets = [Packet(kind, head, {"values": values, **rows_of(part)}) for part in parts]
            answers = self._all(packets, 8 * len(values))
        return [(len(part), answer) for part, answer in zip(parts, answers, strict=True)]

    # --- how -------------------------------------------------------------------------------------------------

    @property
    def _known(self) -> tuple[str, AdapterSpec, SiteData]:
        if self._facts is None:
            raise StateError("the trainer has no study open", "report this as a bug")
        return self._facts

    def _values(self) -> int:
        return sum(tensor.size for tensor in self.spec.tensors)

    def _one(self, packet: Packet, most: int = 0) -> Packet:
        self.ready()
        with self._careful():
            return self._exchange([(0, packet)], most)[0]

    def _all(self, packets: Sequence[Packet], most: int = 0) -> list[Packet]:
        return self._exchange(list(enumerate(packets)), most)

    def _exchange(self, asked: Sequence[tuple[int, Packet]], most: int) -> list[Packet]:
        """Ask trainers, all at once, and return their answers."""
        until = time.monotonic() + _PATIENCE
        for way, packet in asked:
            self.channels[way].send(pack(packet), until)
        answers = [(way, unpack(self.channels[way].receive(most + SPARE, until))) for way, _ in asked]
        for way, answer in answers:
            if answer.kind == "error":
                raise _error(answer.head)
            self._count(way, answer.head)
        return [answer for _, answer in answers]

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """End all trainers if an exchange fails, unless they wait in a queue before a session: no answer may come late.

        Within a session, the next request would have the number of the one that failed.
        """
        try:
            yield
        except BaseException:
            if self._ready or not any(channel.queued for channel in self.channels):
                self._ready = False
                self.close()
            raise

    def _learn(self, answer: Packet) -> None:
        """Take what a trainer says of the records. Refuse it where something else was said before."""
        facts = {name: value for name, value in answer.head.items() if name != "meter"}
        arrays = {name: digest(value.tobytes()) for name, value in answer.arrays.items()}
        try:
            known = digest(canonical_json({"facts": facts, "arrays": arrays}))
        except (ValueError, RecursionError):
            raise malformed("what it says of the records") from None
        if self._facts is None:
            self._facts = known, *self._read(answer)
        elif self._facts[0] != known:
            self.stale = True
            raise StateError(
                "the site's data files, or its base, have changed since the study was opened",
                "nothing: the site reads them anew in the next round",
            )

    def _read(self, answer: Packet) -> tuple[AdapterSpec, SiteData]:
        head = answer.head
        try:
            spec, units = AdapterSpec.parse(head["spec"]), lists(answer, "units")
            declared = int(head["declared"]) if self.opening.declared is None else self.opening.declared
            classes = _array(answer, "classes", np.int64).tolist()
            held_out, names, device = int(head["held-out"]), str(head["names"]), str(head["device"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise malformed("what it says of the records") from None
        # Each unit more is room for a sum that is no site's. Who declares a count declares about his own.
        most = min(self.opening.study.aggregation.largest_count, _HELD)
        room = most if self.opening.declared is None else min(most, 2 * self.opening.declared + _PLANTED)
        _check(len(classes) in (0, len(units)) and declared >= 1 and _NAMES.fullmatch(names) is not None)
        _check(len(units) <= room and 0 <= held_out <= most)
        if self.opening.gpus and device == "cpu":
            raise StateError(
                "this process sees a GPU and the trainer does not: confinement may hide a file of the driver",
                'set trainer = "inside" under [resources] in the site file, or device = "cpu"',
            )
        _check(all(type(size) is int and 0 < size < _COUNT for tensor in spec.tensors for size in tensor.shape))
        _check(all(isinstance(tensor.name, str) and tensor.role in get_args(TensorRole) for tensor in spec.tensors))
        training = TrainingSet((), units, declared, classes)
        return spec, SiteData(training, (), [()] * held_out, (), names)

    def _count(self, way: int, head: Mapping[str, Any]) -> None:
        """Add what a trainer has counted since its last answer."""
        found = head.get("meter")
        if not isinstance(found, dict):
            return
        try:
            seconds = {name: float(found["seconds"][name]) for name in self.meter.seconds}
            total = Meter(int(found["tokens"]), int(found["records"]), float(found["loss"]), seconds)
            more = total.since(self._totals[way])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise malformed("what it has counted") from None
        counted = [more.tokens, more.records, *more.seconds.values()]
        if not all(0 <= each < _COUNT**2 for each in counted) or not math.isfinite(more.loss):
            raise malformed("what it has counted")
        self.meter.add(more)
        self._totals[way] = total


@dataclass(frozen=True)
class _Steps:
    """A round's steps at trainers apart. What is trained lies here, and is moved here."""

    trainer: Trainer
    trained: Sequence[tuple[TensorSpec, nn.Parameter]]
    own: NDArray[np.bool_] | None

    device = torch.device("cpu")

    @property
    def spec(self) -> AdapterSpec:
        return self.trainer.spec

    @property
    def meter(self) -> Meter:
        return self.trainer.meter

    def terms(self, drawn: Drawn, clipping: Clipping) -> TermSum:
        answers = self.trainer.step("terms", self._flat(), drawn, {"clipping": clipping_head(clipping)})
        total, balance = np.zeros(self._size, np.int64), 0.0
        for units, answer in answers:
            part, share = _array(answer, "total", np.int64, self._size), _number(answer.head, "balance")
            # So the sum of all has room, as it would have of units that one trainer adds up.
            _check_bound(part, clipping, units)
            _check(abs(share) <= units / 2 and (2 * share).is_integer())
            total += part
            balance += share
        _check(self.own is None or not total[~self.own].any())
        return TermSum(clipping, torch.from_numpy(total), balance)

    def plain(self, drawn: Drawn) -> torch.Tensor:
        answers = self.trainer.step("plain", self._flat(), drawn, {})
        total = np.zeros(self._size)
        for _, answer in answers:
            total += _array(answer, "total", np.float64, self._size)
        return torch.from_numpy(total)

    @property
    def _size(self) -> int:
        return sum(tensor.size for tensor, _ in self.trained)

    def _flat(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = torch.cat([p.detach().flatten() for _, p in self.trained]).numpy()
        return values


def _adapter(adapter: Adapter) -> dict[str, NDArray[Any]]:
    return {"adapter": np.frombuffer(adapter.data, np.uint8)}


def _array(answer: Packet, name: str, kind: type[np.generic], size: int | None = None) -> NDArray[Any]:
    found = answer.arrays.get(name)
    if found is None or found.dtype != kind or found.ndim != 1 or (size is not None and len(found) != size):
        raise malformed(f"the array {name}")
    return found


def _number(head: Mapping[str, Any], name: str) -> float:
    found = head.get(name)
    if not isinstance(found, int | float) or not abs(found) < _COUNT:
        raise malformed(f"the number {name}")
    return float(found)


def _check_bound(points: Integers, clipping: Clipping, units: int) -> None:
    """Check that a sum of terms is not longer than that of so many units can be, in the norm that clips them."""
    # Float64 rounds a relative error of 2^-53 into each square and sum, far less than the margin; clipping has another.
    norm = float(np.linalg.norm(points.astype(np.float64)))
    _check(norm * clipping.lattice <= units * clipping.norm * (1 + 1e-6))


def _check(honest: bool) -> None:
    if not honest:
        raise StateError(
            "the trainer returned a sum that no records can have, and it was refused",
            "nothing: the site sits this round out. If it happens again, take the trainer for broken into: train "
            'inside (`trainer = "inside"` under [resources] in the site file) or on another machine',
        )


def _check_version(answer: Packet) -> None:
    """Check that a trainer runs the version of this process: one that began before an update has its faults still."""
    if answer.head.get("version") != VERSION:
        raise StateError(
            f"the trainer runs another version of privet than the site, which has {VERSION}",
            "nothing: the site ends it, and begins another in the next round",
        )


def _error(head: Mapping[str, Any]) -> PrivetError:
    """Return a trainer's error as one of this process. Its text may be of records, so it stays at the site."""
    kind = _ERRORS.get(str(head.get("type")))
    message, hint = str(head.get("message"))[:_LONGEST], str(head.get("hint"))[:_LONGEST]
    if kind is None:
        hint = (
            "if memory ran out, lower physical_batch under [resources] in the site file; otherwise report this as a bug"
        )
        return StateError(f"the trainer failed: {message[:80]}", hint)
    error = kind(message, hint)
    error.private = True
    return error
