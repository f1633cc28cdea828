"""The faults of a process, by name. Each is bound to calls of a production function, or to the start."""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from faults.process import Fault, Process, put
from privet.client.budget.releases import Releases
from privet.client.network.fleet import FleetLink
from privet.common.pki.certificates import create_authority, issue
from privet.common.study.messages import Contribution, Message, Secured
from privet.server.consortium.coordinator import open_coordinator
from privet.server.network import service
from privet.server.network.grid import GridExchange

FILLER, HIDDEN = "filler", ".hidden"
Action = Callable[[Process, Fault, Any], Any]
"""Carries out a fault, and returns the result that the call shall return."""


def install(process: Process) -> None:
    """Bind the faults of this process. They wrap around the functions that record events."""
    for fault in process.part.faults:
        if fault.target:
            _wrap(process, fault)
        else:
            ACTIONS[fault.action](process, fault, None)


def _wrap(process: Process, fault: Fault) -> None:
    """Wrap a function so that the fault happens before or after one of its calls, or at each call."""
    module, _, path = fault.target.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in outer:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), count(1)

    def due(moment: str) -> bool:
        counted = fault.moment == moment and fault.stage in ("", process.stage)
        return counted and (fault.count == 0 or next(calls) == fault.count)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if due("before"):
            ACTIONS[fault.action](process, fault, None)
        result = original(*args, **kwargs)
        return ACTIONS[fault.action](process, fault, result) if due("after") else result

    setattr(owner, name, wrapped)


# --- faults that end or delay a process ---------------------------------------------------------------------------


def kill(process: Process, fault: Fault, result: Any) -> Any:
    """Kill this process, as the kernel or a power switch would."""
    process.note("fault", action="kill", round=process.round, stage=process.stage)
    os.kill(os.getpid(), signal.SIGKILL)


def stall(process: Process, fault: Fault, result: Any) -> Any:
    """Wait for `amount` seconds."""
    process.note("fault", action="stall", round=process.round, stage=process.stage)
    time.sleep(fault.amount)
    return result


def jitter(process: Process, fault: Fault, result: Any) -> Any:
    """Wait for a random time, so that answers arrive in any order."""
    if not process.round:
        process.note("fault", action="jitter")
    time.sleep(random.SystemRandom().uniform(0, fault.amount))
    return result


def fill(process: Process, fault: Fault, result: Any) -> Any:
    """Fill the disk to the last byte; with an amount, for that many seconds."""
    file = process.part.folder / process.part.name / FILLER
    with file.open("wb") as opened:
        size, at = 1 << 22, 0
        while size >= 1 << 12:
            try:
                os.posix_fallocate(opened.fileno(), at, size)
                at += size
            except OSError:
                size >>= 1
    process.note("fault", action="fill", round=process.round, stage=process.stage)
    if fault.amount:
        timer = threading.Timer(fault.amount, functools.partial(file.unlink, missing_ok=True))
        timer.daemon = True
        timer.start()
    return result


# --- faults of messages ----------------------------------------------------------------------------------


def garble(process: Process, fault: Fault, result: Any) -> Any:
    """Flip a bit of a signed answer."""
    if not isinstance(result, Secured):
        return result
    process.note("fault", action="garble", round=process.round, stage=process.stage)
    return replace(result, body=result.body[:-1] + bytes([result.body[-1] ^ 1]))


def replay(process: Process, fault: Fault, result: Message) -> Message:
    """Send the answer of the round before."""
    kept: dict[str, Message] = process.kept
    before, kept[process.stage] = kept.get(process.stage), result
    if before is None:
        return result
    process.note("fault", action="replay", round=process.round, stage=process.stage)
    return before


def repeat(process: Process, fault: Fault, result: Any) -> Any:
    """Deliver every message twice, and send every answer twice."""
    receive, send = FleetLink.receive, FleetLink.send
    again: list[Any] = []

    def received(self: FleetLink) -> Any:
        if again:
            return again.pop()
        found = receive(self)
        if found is not None:
            again.append(found)
        return found

    def sent(self: FleetLink, reply: Any) -> None:
        send(self, reply)
        send(self, reply)

    process.note("fault", action="repeat", round=0, stage="")
    put(FleetLink, "receive", received)
    put(FleetLink, "send", sent)
    put(FleetLink, "confirm", lambda self, message: None)
    return result


def ask_twice(process: Process, fault: Fault, result: Any) -> Any:
    """Send every request twice, and discard the second answers."""
    ask = GridExchange.ask

    def asked(self: GridExchange, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        first = list(ask(self, requests, timeout=timeout))
        list(ask(self, requests, timeout=timeout))
        yield from first

    process.note("fault", action="ask_twice", round=0, stage="")
    put(GridExchange, "ask", asked)
    return result


# --- faults of an update ---------------------------------------------------------------------------------


def not_finite(process: Process, fault: Fault, result: Any) -> Any:
    """Replace the result of training, or the update of the site, by NaN."""
    process.note("fault", action="nan", round=process.round, stage=process.stage)
    if isinstance(result, Contribution):
        return replace(result, update=np.full_like(result.update, np.nan))
    return np.full_like(result, np.nan)


def enlarge(process: Process, fault: Fault, result: Contribution) -> Contribution:
    """Multiply the update by a million."""
    process.note("fault", action="enlarge", round=process.round, stage=process.stage)
    return replace(result, update=result.update * np.float32(1e6))


# --- faults of clocks, certificates and files -------------------------------------------------------------------------


def misdate(process: Process, fault: Fault, result: Any) -> Any:
    """Shift the clock of the site by `amount` seconds, for `seconds` seconds or until the end.

    OpenSSL reads the system clock, which a program cannot shift for itself alone.
    """
    real_time, real_now, until = time.time, datetime.now, time.monotonic() + (fault.seconds or 1e9)
    process.note("fault", action="misdate", round=process.round, stage=process.stage)

    def ahead() -> float:
        return fault.amount if time.monotonic() < until else 0.0

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_now(tz) + timedelta(seconds=ahead())

    # gRPC's core, too, reads the system clock: deadlines that Python makes for it must be of that clock.
    put(importlib.import_module("grpc._channel"), "time", SimpleNamespace(**{**vars(time), "time": real_time}))
    put(time, "time", lambda: real_time() + ahead())
    for module in ("privet.client.policy.consent", "privet.client.budget.chain"):
        put(importlib.import_module(module), "datetime", Shifted)
    put(importlib.import_module("flwr.supernode.node_auth_http_interceptor"), "now", lambda: Shifted.now(UTC))
    return result


def misissue(process: Process, fault: Fault, result: Any) -> Any:
    """Serve with a certificate that has expired, is not valid yet, or comes from another authority."""

    def issued(authority: Any, key: Any, name: str, role: Any, now: datetime, days: float) -> Any:
        if fault.note == "foreign":
            return issue(create_authority("elsewhere", now), key, name, role, now, days)
        shift = timedelta(days=30 if fault.note == "early" else -30)
        return issue(authority, key, name, role, now + shift, days)

    process.note("fault", action=f"certificate {fault.note}", round=0, stage="")
    put(service, "issue", issued)
    return result


def revoke(process: Process, fault: Fault, result: Any) -> Any:
    """Revoke the membership of a site, as `coordinator revoke` does."""
    made = open_coordinator(process.part.folder / "coordinator")
    made.members.revoke(fault.note, "key-compromise", datetime.now(UTC))
    process.note("fault", action="revoke", round=process.round, stage=process.stage)
    return result


def hide(process: Process, fault: Fault, result: Any) -> Any:
    """Hide a file before the start."""
    file = Path(process.part.folder / process.part.name / fault.note)
    process.note("fault", action="hide", round=0, stage="")
    file.rename(file.with_name(file.name + HIDDEN))
    return result


def charge_late(process: Process, fault: Fault, result: Any) -> Any:
    """Charge the ledger only after the update is sent. This is wrong on purpose, to test the checks themselves."""
    charge, send = Releases.charge, FleetLink.send
    owed: list[Callable[[], None]] = []

    def charged(self: Releases, study: Any, contribution: Contribution) -> None:
        owed.append(functools.partial(charge, self, study, contribution))

    def sent(self: FleetLink, reply: Any) -> None:
        send(self, reply)
        while owed:
            owed.pop()()

    put(Releases, "charge", charged)
    put(FleetLink, "send", sent)
    return result


ACTIONS: dict[str, Action] = {
    "kill": kill,
    "stall": stall,
    "jitter": jitter,
    "fill": fill,
    "garble": garble,
    "replay": replay,
    "repeat": repeat,
    "ask_twice": ask_twice,
    "nan": not_finite,
    "enlarge": enlarge,
    "misdate": misdate,
    "misissue": misissue,
    "revoke": revoke,
    "hide": hide,
    "charge_late": charge_late,
}
