"""Run one cell of the matrix with one seed: a consortium of its own, its fault, its study, and the verdict."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from faults.cells import Cell, Draw
from faults.checks import Events, Remains, remains_of, sites_of, violations
from faults.play import COORDINATOR, Script, Stage, nothing, parts_of, play
from faults.process import WAITS, Part, note, read_events
from faults.proxy import bad_network
from faults.world import World, copy_world, point_at
from privet.client.rounds.logbook import WITNESS
from privet.client.site import load_site

_SMALL_DISK = "24m"
_REFUSED_WITHIN = 20.0  # seconds
_STRANGER, _SECOND, FORKED = "stranger", "second", "forked"
_MOVES = ("advertise", "share", "mask", "confirm", "reveal", "update")


@dataclass(frozen=True)
class Result:
    """The result of a cell with one seed.

    Attributes:
        seed: The seed.
        got: Outcome of the round with the fault.
        wrong: Failed checks, the invariants first.
        compared: Whether the adapter was compared with that of an undisturbed run.
        closed: Number of rounds closed.
        aborted: Number of rounds aborted.
        charges: Number of all charges, and of those whose update is in no sum.
        duplicates: Repetitions that were answered with the same bytes, or discarded.
        faults: Faults that happened.
        recovery: For each kill: seconds to the first message of the restarted process that moves a round forward, and
            seconds to the end of a round.
        seconds: Duration of the whole cell.
    """

    seed: int
    got: str
    wrong: tuple[str, ...]
    compared: bool
    closed: int
    aborted: int
    charges: tuple[int, int]
    duplicates: int
    faults: int
    recovery: Sequence[tuple[float | None, float | None]] = ()
    seconds: float = 0.0


def run_cell(
    cell: Cell, seed: int, made: tuple[Path, ForkServerContext], folder: Path, reference: str | None
) -> tuple[Result, str]:
    """Run a cell with a seed in a new folder, and check it.

    Args:
        cell: The cell.
        seed: The seed.
        made: The consortium to copy, and the context that starts processes.
        folder: Folder to create; the files of the run stay there.
        reference: Digest of the adapter of an undisturbed run with the same draws.

    Returns:
        The result, and the digest of the adapter.
    """
    template, context = made
    drawn, began = cell.draw(seed), time.monotonic()
    small = {"victim": drawn.victim, "coordinator": COORDINATOR}.get(cell.disk)
    with small_disk(folder / small) if small is not None else nullcontext():
        world = copy_world(template, folder, drawn.kind, seed)
        ended = _play(cell, drawn, Stage(world, context))
        remains = remains_of(world)
        wrong = violations(remains, reference, drawn.victim if cell.liar else "")
        if not (ended and remains.released):
            wrong.append("the study did not come to its end")
        got, others = outcome(remains, drawn)
        wrong += verdicts(cell, drawn, remains, got, others)
        result = Result(
            seed=seed,
            got=got,
            wrong=tuple(wrong),
            compared=reference is not None and remains.undisturbed,
            closed=sum(end["type"] == "round-close" for end in remains.ends.values()),
            aborted=sum(end["type"] == "round-abort" for end in remains.ends.values()),
            charges=(len(remains.charges), remains.wasted),
            duplicates=remains.duplicates,
            faults=len(faults_in(remains.events)) + (cell.script not in ("", "proxy")),
            recovery=recoveries(remains.events),
            seconds=round(time.monotonic() - began, 2),
        )
    return result, remains.state.adapter.digest


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a small disk at a directory until the block ends. Needs the right to mount."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        # Detached at once, and unmounted when the last file is closed: a killed process may take a moment to end.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount disks."""
    try:
        with small_disk(folder / "mounted"):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def _play(cell: Cell, drawn: Draw, stage: Stage) -> bool:
    """Run the study with the faults from outside."""
    world, script = stage.world, cast(Script, nothing)
    parts = parts_of(world, cell.faults(drawn), cell.waits)
    match cell.script:
        case "proxy":
            return _over_bad_network(stage, parts, drawn)
        case "second":
            script = once("asked", 1, lambda: _refused_second(stage, parts[0]))
        case "stranger":
            parts.append(_stranger(world, drawn))
        case "old ledger":
            return _with_old_ledger(stage, parts, _ledger_of(world, drawn.victim), drawn.victim)
        case "fork":
            return _fork(stage, parts)
    return play(stage, parts, script)


def _refused_second(stage: Stage, first: Part) -> None:
    """Start a second coordinator, and wait until it has ended: by then the first may have ended, too."""
    stage.start(replace(first, name=_SECOND))
    stage.running[_SECOND].join(_REFUSED_WITHIN)


def _over_bad_network(stage: Stage, parts: Sequence[Part], drawn: Draw) -> bool:
    """Run the study with a damaging proxy between the victim and the coordinator."""
    world = stage.world
    with bad_network(world.fleet_port, drawn.seed) as proxy:
        point_at(world.site_file(drawn.victim), proxy.port)
        ended = play(stage, parts)
        note(world.folder, "network", "fault", action="corrupt", hits=proxy.hits)
    return ended


def once(what: str, number: int, action: Callable[[], None]) -> Script:
    """Return a script that acts once, after an event of a round at the coordinator."""
    done: list[bool] = []

    def script(stage: Stage, events: Events) -> None:
        if not done and any(e["what"] == what and e.get("round") == number for e in events):
            done.append(True)
            action()

    return script


def _stranger(world: World, drawn: Draw) -> Part:
    """Return a node like the victim's, with a node key that was never admitted."""
    shutil.copytree(world.folder / drawn.victim, world.folder / _STRANGER)
    key = ec.generate_private_key(ec.SECP384R1())
    file = world.folder / _STRANGER / "keys/node"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return Part(world.folder, _STRANGER, world.seed)


def _with_old_ledger(stage: Stage, parts: Sequence[Part], ledger: Path, site: str) -> bool:
    """Run the study. After round 1 the ledger is replaced by its copy from before the study, but not its anchor.

    At the end the newest ledger is restored: it is the one to check.
    """
    old, newest = stage.world.folder / "old", stage.world.folder / "newest"
    old.mkdir()
    newest.mkdir()
    shutil.copy2(ledger, old)

    def put_back() -> None:
        stage.end(site)
        _swap(ledger, newest, old)
        stage.start(replace(stage.parts[site], faults=()))

    ended = play(stage, parts, once("closed", 1, put_back))
    _swap(ledger, old, newest)
    return ended


def _swap(ledger: Path, away: Path, back: Path) -> None:
    """Replace a ledger, with its write-ahead log, by another."""
    for file in ledger.parent.glob(f"{ledger.name}*"):
        shutil.move(file, away / file.name)
    for file in back.iterdir():
        shutil.move(file, ledger.parent / file.name)


def _ledger_of(world: World, site: str) -> Path:
    ledger = load_site(world.site_file(site)).ledger
    if ledger is None:
        raise ValueError("the site has no ledger")
    return ledger


def _fork(stage: Stage, parts: Sequence[Part]) -> bool:
    """Run the study to its end, then continue from a backup of round 1 until the witnesses refuse it.

    At the end the newest directory is restored, so the disk holds the finished run and the evidence of the witnesses.
    """
    world, kept = stage.world, stage.world.folder / "backup"

    def back_up() -> None:
        stage.end(COORDINATOR)
        shutil.copytree(world.coordinator, kept)
        stage.start(parts[0])

    if not play(stage, parts, once("closed", 1, back_up)):
        return False
    newest = world.folder / "newest"
    world.coordinator.rename(newest)
    kept.rename(world.coordinator)
    forked = Stage(world, stage.context)
    again = [replace(part, waits=(3.0, *WAITS[1:])) for part in parts]
    note(world.folder, "network", FORKED)
    play(forked, again, until=lambda: is_refused(world, after_fork(read_events(world.folder))))
    world.coordinator.rename(world.folder / "forked")
    newest.rename(world.coordinator)
    return True


def after_fork(events: Events) -> Events:
    """Return the events since the backup was restored; none if none was restored."""
    place = next((place for place, event in enumerate(events) if event["what"] == FORKED), len(events))
    return events[place:]


def is_refused(world: World, events: Events) -> bool:
    """Return whether the restored backup was stopped: all witnesses hold evidence, or the quorum was missing."""
    waits = [e for e in events if e["who"] == COORDINATOR and e["what"] == "error" and "cosignatures" in e["message"]]
    return bool(waits) or all(evidence_of(world).values())


def evidence_of(world: World) -> dict[str, int]:
    """Return the number of checkpoints that each site keeps as evidence against the log."""
    return {
        site.name: len(list((site.log.state / WITNESS / "evidence").glob("*.txt")))
        for site in sites_of(world)
        if site.log is not None
    }


def faults_in(events: Events) -> list[Mapping[str, Any]]:
    """Return the faults that happened."""
    return [event for event in events if event["what"] == "fault"]


def outcome(remains: Remains, drawn: Draw) -> tuple[str, dict[int, str]]:
    """Return the outcome of the round with the fault, and the outcomes of the others."""

    def end_of(statement: Mapping[str, Any]) -> str:
        missing = set(drawn.kind.names) - set(statement["survivors"])
        if statement["type"] == "round-abort":
            return "aborted"
        return "all" if not missing else "without" if missing == {drawn.victim} else f"without {sorted(missing)}"

    ends = {number: end_of(statement) for number, statement in remains.ends.items()}
    return ends.pop(drawn.round, "no such round"), ends


def verdicts(cell: Cell, drawn: Draw, remains: Remains, got: str, others: Mapping[int, str]) -> Iterator[str]:
    """Yield the differences from the expected outcome of the cell."""
    if got not in cell.expects:
        yield f"expected round {drawn.round} to end with {' or '.join(cell.expects)}, got {got}"
    for number, end in others.items():
        if end not in cell.others:
            yield f"expected round {number} to end with {' or '.join(cell.others)}, got {end}"
    if cell.faults(drawn) and not faults_in(remains.events):
        yield "the fault never came about"
    paid = {charge.site for charge in remains.charges if charge.round == drawn.round}
    if not cell.charged and (paid if got == "aborted" else drawn.victim in paid):
        yield f"round {drawn.round} was charged at {sorted(paid)}"
    yield from _around(cell, remains)


def _around(cell: Cell, remains: Remains) -> Iterator[str]:
    """Yield the failed checks of the faults from outside."""
    errors = [(e["who"], e["error"]) for e in remains.events if e["what"] == "error"]
    if cell.script == "second" and (_SECOND, "StateError") not in errors:
        yield f"the second coordinator was not refused: {errors}"
    if cell.script == "stranger" and any(e["who"] == _STRANGER and e["what"] == "answered" for e in remains.events):
        yield "a stranger was asked something"
    evidence = evidence_of(remains.world)
    hits = sum(event.get("hits", 0) for event in faults_in(remains.events))
    if cell.script == "proxy" and not hits:
        yield "no connection was damaged"
    since = after_fork(remains.events)
    if cell.script == "fork" and not is_refused(remains.world, since):
        yield f"witnesses did not refuse a backup of the log: {evidence}"
    if any(event["what"] == "asked" and event["stage"] in _MOVES for event in since):
        yield "a round was played on a backup of the log"
    if cell.script != "fork" and any(evidence.values()):
        yield f"witnesses keep evidence against the log: {evidence}"
    if cell.name.startswith("certificate"):
        restarts = [e["t"] for e in remains.events if e["who"] == COORDINATOR and e["what"] == "start"]
        if len(restarts) < 2 or any(e["what"] == "answered" and e["t"] < restarts[1] for e in remains.events):
            yield "a site answered a coordinator whose certificate is not good"


def recoveries(events: Events) -> list[tuple[float | None, float | None]]:
    """Return for each kill the seconds to the victim's next message that moves a round forward, and to a round's end.

    None stands for an event that did not happen any more.
    """
    found = []
    for kill in events:
        if kill["what"] != "fault" or kill.get("action") != "kill":
            continue
        later = [event for event in events if event["t"] > kill["t"]]
        moved = (
            event["t"]
            for event in later
            if event["who"] == kill["who"] and event["what"] in ("asked", "sent") and event["stage"] in _MOVES
        )
        closed = (event["t"] for event in later if event["what"] == "closed")
        found.append((_since(kill["t"], next(moved, None)), _since(kill["t"], next(closed, None))))
    return found


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 3)
