"""One process of a consortium under faults: a production entry point with some functions wrapped before it starts.

There are three kinds of wrappers. Some append events to the consortium's `events.jsonl`, so that the exchanges can be
compared with the files on disk. Some fix the draws of the sites, so that runs can be compared bit for bit. The draws
depend on the site, the round, and how often the site has trained the round, so that training again never gives the same
bytes. The others inject the faults (`faults.actions`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from faults.actions import install
from faults.process import Part, Process, put, read_events
from faults.world import RUN, read_study
from privet.client.budget.releases import Releases, _payload
from privet.client.budget.sealing import Sealer
from privet.client.network.fleet import FleetLink
from privet.client.network.serve import serve_site
from privet.client.rounds import answers, masked
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.site import SiteConfig, load_site
from privet.common.errors import PrivetError
from privet.common.jsonlog import log_as_json
from privet.common.masking.vector import words_of
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness, derive_seed
from privet.common.secagg.coordinator import Aggregator as Unmasking
from privet.common.secagg.encoding import asks_for_keys, decode, is_kind, kind_of
from privet.common.secagg.messages import (
    BlockParameters,
    DealDelivery,
    DealtParameters,
    Delivery,
    Expected,
    Finish,
    LinkDelivery,
    Parameters,
    Proof,
    Roster,
    Step,
    Survivors,
)
from privet.common.study.messages import Contribution, Failure, Message, RoundOpen, Secured
from privet.server import studies
from privet.server.consortium.coordinator import open_coordinator
from privet.server.network import deployed
from privet.server.network.grid import GridExchange
from privet.server.network.service import Serving, serving
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.timing import Timing

_STAGES: Sequence[tuple[Any, str]] = (
    (Roster, "share"),
    (Delivery, "mask"),
    (LinkDelivery, "share"),
    (DealDelivery, "share"),
    (Step, "mask"),
    (Expected, "mask"),
    (Finish, "reveal"),
    (Survivors, "confirm"),
    (Proof, "reveal"),
)
_TICK, _SHORT = 1.0, 0.2
# Polls less often than in production, which leaves more of the machine to the sites.
deployed._POLL = 0.1


def stage_of(asked: Message) -> str:
    """Return the step of a round that a message of the coordinator asks for."""
    if isinstance(asked, RoundOpen):
        return ("advertise" if asks_for_keys(asked.masking) else "mask") if asked.masking else "update"
    if isinstance(asked, Secured):
        return next((name for kind, name in _STAGES if is_kind(kind, asked.body)), "")
    return asked.kind


def run(part: Part) -> None:
    """Run one process of a consortium until it ends."""
    log = os.open(part.folder / f"{part.name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    torch.set_num_threads(1)
    process = Process(part)
    process.note("start", faulty=bool(part.faults))
    try:
        if part.name == "second":
            studies.reopen_study(open_coordinator(part.folder / "coordinator"), RUN).play(Timing(*part.waits), print)
        elif part.name == "coordinator":
            watch_coordinator(process)
            install(process)
            coordinate(part)
        else:
            watch_site(process)
            install(process)
            serve_site(part.folder / (part.directory or part.name) / "site.toml")
    except PrivetError as error:
        process.note("error", error=type(error).__name__, message=error.message, hint=error.hint)
        sys.exit(error.exit_code)


def coordinate(part: Part) -> None:
    """Serve the sites and run or resume the study, as `coordinator serve` and `coordinator run` do, in one process.

    A kill therefore ends both.
    """
    log_as_json()
    made = open_coordinator(part.folder / "coordinator")
    with serving(made, lambda: datetime.now(UTC)) as service:
        threading.Thread(target=_tend, args=(service,), daemon=True).start()
        _await_sites(service, part.waits[0])
        if (made.directory / "runs" / RUN).exists():
            study = studies.reopen_study(made, RUN)
        else:
            study = studies.begin(made, read_study(part.folder), part.folder / "start", RUN)
        study.play(Timing(*part.waits), lambda line: print(line, flush=True))


def _await_sites(service: Serving, seconds: float) -> None:
    """Wait until all sites are connected, as an operator does before a study."""
    deadline = time.monotonic() + seconds
    while not all(node.online for node in service.link.nodes()) and time.monotonic() < deadline:
        time.sleep(_SHORT)


def _tend(service: Serving) -> None:
    while True:
        time.sleep(_TICK)
        service.tend()


# --- events ---------------------------------------------------------------------------------------------


def watch_coordinator(process: Process) -> None:
    """Record the requests of the coordinator, each unmasking, and the end of each round."""
    ask, total, close = GridExchange.ask, Unmasking.total, RunLog.close

    def asked(self: GridExchange, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        if requests:
            first = next(iter(requests.values()))
            process.stage, process.round = stage_of(first), int(getattr(first, "round", 0))
            process.note("asked", stage=process.stage, round=process.round, sites=len(requests))
        yield from ask(self, requests, timeout=timeout)

    def unmasked(self: Unmasking, *, workers: int = 1) -> object:
        result = total(self, workers=workers)
        process.note("unmasked", round=process.round, survivors=list(result.survivors))
        return result

    def closed(self: RunLog, state: Any) -> None:
        close(self, state)
        process.note("closed", round=state.round)

    put(GridExchange, "ask", asked)
    put(Unmasking, "total", unmasked)
    put(RunLog, "close", closed)


def watch_site(process: Process) -> None:
    """Record the requests, trainings, answers and messages of a site, and fix its draws."""
    site = load_site(process.part.folder / (process.part.directory or process.part.name) / "site.toml")
    name = process.part.directory or process.part.name
    process.trained.update(
        event["round"]
        for event in read_events(process.part.folder)
        if event["who"] == process.part.name and event["what"] == "training"
    )
    mark = Sealer(site.ledger_key).mark
    answer, send = answers._answer, FleetLink.send
    reserve, begin = Releases.reserve, Releases.begin
    last: dict[str, object] = {}

    def answered(worker: Worker, asked: Message) -> Message:
        process.stage, process.round = stage_of(asked), int(getattr(asked, "round", 0))
        last.clear()
        last.update(reply="failure")
        try:
            reply = answer(worker, asked)
        except PrivetError as error:
            process.note("refused", stage=process.stage, round=process.round, error=type(error).__name__)
            raise
        last.update(_exchange(asked, reply))
        if isinstance(reply, Contribution):
            process.note("payload", round=reply.round, digest=mark(_payload(reply)))
        process.note("answered", stage=process.stage, round=process.round, **last)
        return reply

    def sent(self: FleetLink, reply: Any) -> None:
        upload = process.stage in ("mask", "update")
        paid = is_charged(site, process.round) if upload else None
        process.note("sending", stage=process.stage, round=process.round, charged=paid, **last)
        send(self, reply)
        process.note("sent", stage=process.stage, round=process.round)

    def reserved(self: Releases, study: Any, opened: RoundOpen, names: str = "") -> Contribution | None:
        stored = reserve(self, study, opened, names)
        if stored is None:
            process.trained[opened.round] += 1
            process.note("training", round=opened.round)
        return stored

    def begun(self: Releases, study: Any, number: int) -> None:
        begin(self, study, number)
        process.note("drawing", round=number)

    def words(study: Any, spec: Any, contribution: Contribution, layout: Any, _: Any) -> Any:
        process.note("payload", round=contribution.round, digest=mark(_payload(contribution)))
        stream = draws(contribution.round, "rounding")
        return words_of(study, spec, contribution, layout, lambda count: stream.words(-(-count // 8)).tobytes()[:count])

    def draws(number: int, purpose: str) -> SeededRandomness:
        return SeededRandomness(process.part.seed, name, number, purpose, process.trained[number])

    def dropout(_: RealSite, number: int) -> None:
        torch.manual_seed(derive_seed(process.part.seed, name, number, "dropout", process.trained[number]))

    put(answers, "_answer", answered)
    put(FleetLink, "send", sent)
    put(Releases, "reserve", reserved)
    put(Releases, "begin", begun)
    put(masked, "words_of", words)
    put(RealSite, "randomness", lambda _, number, purpose: draws(number, purpose))
    put(RealSite, "seed_dropout", dropout)


def _exchange(asked: Message, reply: Message) -> dict[str, object]:
    """Return the fields of an exchange to record: digests, and the terms of secure aggregation."""
    found: dict[str, object] = {"reply": reply.kind, "asked": _digest_of(asked), "said": _digest_of(reply)}
    if isinstance(asked, RoundOpen | Secured):
        found["nonce"] = asked.nonce
    if isinstance(asked, RoundOpen) and asks_for_keys(asked.masking):
        proposed = kind_of(asked.masking)
        terms = decode(proposed if proposed in (BlockParameters, DealtParameters) else Parameters, asked.masking)
        found |= {"threshold": terms.threshold, "least": terms.min_survivors}
    if isinstance(asked, Secured) and is_kind(Survivors, asked.body):
        found["survivors"] = list(decode(Survivors, asked.body).survivors)
    if isinstance(reply, Failure):
        found |= {"error": reply.error, "message": reply.message}
    return found


def _digest_of(message: Message) -> str:
    """Return a digest of a message, without the fields that the log adds."""
    parts = message.parts()
    state = hashlib.sha256(json.dumps(dict(parts.fields), sort_keys=True, default=str).encode())
    for name, blob in sorted(parts.blobs.items()):
        state.update(name.encode() + b"\0" + blob)
    return state.hexdigest()


def is_charged(site: SiteConfig, number: int) -> bool:
    """Return whether the ledger of a site on disk holds a charge for a round."""
    if site.ledger is None:
        return False
    query = "SELECT 1 FROM entries WHERE kind = 'charge' AND round = ?"
    with closing(sqlite3.connect(f"{site.ledger.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute(query, (number,)).fetchone() is not None


def warm(folder: Path) -> None:
    """Fill the cache of the accountant, so that the processes forked from this one have it."""
    mechanism = plan(read_study(folder))
    if mechanism is not None:
        for rounds in range(4):
            mechanism.spent(rounds)
