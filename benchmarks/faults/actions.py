"""What may befall a process, by name. A fault is bound to calls of a production function, or to the start."""

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
"""Does it, and returns what the call is to return."""


def install(process: Process) -> None:
    """Bind this process's faults. They are wrapped outermost, around what notes."""
    for fault in process.part.faults:
        if fault.target:
            _wrap(process, fault)
        else:
            ACTIONS[fault.action](process, fault, None)


def _wrap(process: Process, fault: Fault) -> None:
    """Do something before or after one call of a function, or after all of them."""
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


# --- what ends or holds up a process ---------------------------------------------------------------------------


def kill(process: Process, fault: Fault, result: Any) -> Any:
    """Kill this process, as the kernel or a power switch would."""
    process.note("fault", action="kill", round=process.round, stage=process.stage)
    os.kill(os.getpid(), signal.SIGKILL)


def stall(process: Process, fault: Fault, result: Any) -> Any:
    """Do nothing for a while."""
    process.note("fault", action="stall", round=process.round, stage=process.stage)
    time.sleep(fault.amount)
    return result


def jitter(process: Process, fault: Fault, result: Any) -> Any:
    """Take a time that nobody can foresee, so that answers arrive in any order."""
    if not process.round:
        process.note("fault", action="jitter")
    time.sleep(random.SystemRandom().uniform(0, fault.amount))
    return result


def fill(process: Process, fault: Fault, result: Any) -> Any:
    """Leave no byte of the disk; with an amount, for so many seconds."""
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


# --- what becomes of messages ----------------------------------------------------------------------------------


def garble(process: Process, fault: Fault, result: Any) -> Any:
    """Flip a bit of what a site signed."""
    if not isinstance(result, Secured):
        return result
    process.note("fault", action="garble", round=process.round, stage=process.stage)
    return replace(result, body=result.body[:-1] + bytes([result.body[-1] ^ 1]))


def replay(process: Process, fault: Fault, result: Message) -> Message:
    """Answer as in the round before."""
    kept: dict[str, Message] = process.kept
    before, kept[process.stage] = kept.get(process.stage), result
    if before is None:
        return result
    process.note("fault", action="replay", round=process.round, stage=process.stage)
    return before


def repeat(process: Process, fault: Fault, result: Any) -> Any:
    """Have every message delivered twice, and every answer sent twice."""
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
    """Have every request sent twice, and the second answers thrown away."""
    ask = GridExchange.ask

    def asked(self: GridExchange, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        first = list(ask(self, requests, timeout=timeout))
        list(ask(self, requests, timeout=timeout))
        yield from first

    process.note("fault", action="ask_twice", round=0, stage="")
    put(GridExchange, "ask", asked)
    return result


# --- what becomes of an update ---------------------------------------------------------------------------------


def not_finite(process: Process, fault: Fault, result: Any) -> Any:
    """Have training, or what leaves the site, come to nothing that is finite."""
    process.note("fault", action="nan", round=process.round, stage=process.stage)
    if isinstance(result, Contribution):
        return replace(result, update=np.full_like(result.update, np.nan))
    return np.full_like(result, np.nan)


def enlarge(process: Process, fault: Fault, result: Contribution) -> Contribution:
    """Send a million times what was trained."""
    process.note("fault", action="enlarge", round=process.round, stage=process.stage)
    return replace(result, update=result.update * np.float32(1e6))


# --- what becomes of clocks and papers -------------------------------------------------------------------------


def misdate(process: Process, fault: Fault, result: Any) -> Any:
    """Let the site's clock jump by an amount of seconds; if `seconds` are given, for so long.

    OpenSSL has a clock of its own, which no program can move without moving everybody's.
    """
    real_time, real_now, until = time.time, datetime.now, time.monotonic() + (fault.seconds or 1e9)
    process.note("fault", action="misdate", round=process.round, stage=process.stage)

    def ahead() -> float:
        return fault.amount if time.monotonic() < until else 0.0

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_now(tz) + timedelta(seconds=ahead())

    put(time, "time", lambda: real_time() + ahead())
    for module in ("privet.client.policy.consent", "privet.client.budget.chain"):
        put(importlib.import_module(module), "datetime", Shifted)
    put(importlib.import_module("flwr.supernode.node_auth_http_interceptor"), "now", lambda: Shifted.now(UTC))
    return result


def misissue(process: Process, fault: Fault, result: Any) -> Any:
    """Serve under a certificate that is expired, not valid yet, or another authority's."""

    def issued(authority: Any, key: Any, name: str, role: Any, now: datetime, days: float) -> Any:
        if fault.note == "foreign":
            return issue(create_authority("elsewhere", now), key, name, role, now, days)
        shift = timedelta(days=30 if fault.note == "early" else -30)
        return issue(authority, key, name, role, now + shift, days)

    process.note("fault", action=f"certificate {fault.note}", round=0, stage="")
    put(service, "issue", issued)
    return result


def revoke(process: Process, fault: Fault, result: Any) -> Any:
    """End a site's membership, as `coordinator revoke` does."""
    made = open_coordinator(process.part.folder / "coordinator")
    made.members.revoke(fault.note, "key-compromise", datetime.now(UTC))
    process.note("fault", action="revoke", round=process.round, stage=process.stage)
    return result


def hide(process: Process, fault: Fault, result: Any) -> Any:
    """Start without a file."""
    file = Path(process.part.folder / process.part.name / fault.note)
    process.note("fault", action="hide", round=0, stage="")
    file.rename(file.with_name(file.name + HIDDEN))
    return result


def charge_late(process: Process, fault: Fault, result: Any) -> Any:
    """Have the ledger charge after the update is sent, which is wrong: what the checks themselves are tested with."""
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
