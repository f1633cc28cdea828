"""The fault matrix: a killed coordinator loses nothing, and the checks find what is broken on purpose."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from faults.cells import CELLS, Cell
from faults.checks import Charge, Remains, ledgers, paid_for_two, released_uncharged, remains_of, unmaskings, violations
from faults.play import forks
from faults.process import Fault
from faults.run import Result, recoveries, run_cell
from faults.study import write_base
from faults.world import KINDS, World, make_template

from privet.client.rounds.logbook import WITNESS
from privet.client.rounds.memory import Memory
from privet.client.site import load_site
from privet.common.audit.release import ADAPTER
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.note import Note, log_lines
from privet.server.consortium.coordinator import open_coordinator
from privet.server.rounds.state import RunState
from tests.support.forks import end_training_processes

SEND = "privet.client.network.fleet:FleetLink.send"
DIGESTS = ("sha256:" + "a" * 64, "sha256:" + "b" * 64)


def cell(name: str) -> Cell:
    return next(each for each in CELLS if each.name == name)


@dataclass(frozen=True)
class Played:
    world: World
    result: Result
    remains: Remains


def play(folder: Path, chosen: Cell, seed: int) -> Played:
    kind = KINDS[chosen.kind]
    template = make_template(folder / f"template-{kind.name}", kind, write_base(folder / f"base-{kind.name}"))
    place = folder / f"{kind.name}-{seed}"
    end_training_processes()  # or they would be forked from one that has not filled the accountant's cache
    result, _ = run_cell(chosen, seed, (template, forks(template)), place, None)
    world = World(place, kind, seed)
    return Played(world, result, remains_of(world))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """A study whose coordinator was killed between storing the state of round 1 and logging the round's end."""
    folder = tmp_path_factory.mktemp("faults")
    yield play(folder, cell("coordinator: state durable, round-close not"), 0)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_coordinator_killed_between_state_and_log_closes_the_round_and_charges_nobody_twice(killed: Played) -> None:
    assert killed.result.wrong == ()
    assert killed.result.got == "all"
    assert (killed.result.closed, killed.result.aborted, killed.result.faults) == (2, 0, 1)
    assert killed.result.charges == (6, 0)
    assert len(killed.result.recovery) == 1
    assert killed.remains.undisturbed
    assert [line[:2] for line in violations(killed.remains, "sha256:another")] == ["I4"]


@pytest.mark.slow
def test_what_is_changed_on_disk_afterwards_is_found(killed: Played, tmp_path: Path) -> None:
    def found(name: str, change: Any) -> set[str]:
        shutil.copytree(killed.world.folder, tmp_path / name)
        world = World(tmp_path / name, killed.world.kind, 0)
        change(world)
        return {line[:2] for line in violations(remains_of(world))}

    def other_adapter(world: World) -> None:
        shutil.copy(world.folder / "start" / ADAPTER, world.run / "adapter" / ADAPTER)

    def other_branch(world: World) -> None:
        made = open_coordinator(world.coordinator)
        text = Checkpoint(made.keys.origin, 3, bytes(32)).text
        head = Note(text, log_lines(text, made.keys.origin, made.keys.log, made.keys.pq)).encode()
        log = load_site(world.site_file("birch")).log
        assert log is not None
        with Memory(log.state / WITNESS).rows(write=True) as memory:
            memory.keep(3, head)

    def lower_limit(world: World) -> None:
        file = world.site_file("cedar")
        file.write_text(re.sub(r"(?m)^epsilon = .*$", "epsilon = 1.0", file.read_text()))

    def lost_ledger(world: World) -> None:
        for file in (world.folder / "alder" / "state").glob("ledger.db-*"):
            file.unlink()
        shutil.copy(killed.world.folder.parent / "template-three/alder/state/ledger.db", world.folder / "alder/state")

    assert found("nothing", lambda world: None) == set()
    assert found("adapter", other_adapter) == {"I4"}
    assert found("branch", other_branch) == {"I3"}
    assert found("limit", lower_limit) == {"I6"}
    assert found("ledger", lost_ledger) == {"I1", "I2", "I6"}


@pytest.mark.slow
def test_a_ledger_that_charges_after_sending_is_found(tmp_path: Path) -> None:
    late = replace(
        cell("plain: site charged, around sending"),
        faults=lambda drawn: {drawn.victim: [Fault("charge_late"), Fault("kill", SEND, "after", 1, "update")]},
    )
    played = play(tmp_path, late, 0)
    broken = {line[:2] for line in played.result.wrong}
    assert "I1" in broken


# --- the checks, one by one, on made-up events -----------------------------------------------------------------


def remains(tmp_path: Path, events: list[dict[str, Any]], charges: tuple[Charge, ...] = ()) -> Remains:
    return Remains(World(tmp_path, KINDS["three"], 0), events, cast(RunState, None), charges)


def event(what: str, **fields: Any) -> dict[str, Any]:
    return {"t": 1.0, "who": "alder", "what": what, "round": 1, "reply": "secured", "asked": "q", "said": "a", **fields}


def test_an_update_that_was_not_charged_when_it_was_sent_is_found(tmp_path: Path) -> None:
    charge = Charge("alder", 1, DIGESTS[0])
    sent = event("sending", stage="mask", charged=True)
    assert list(released_uncharged(remains(tmp_path, [sent], (charge,)))) == []
    assert list(released_uncharged(remains(tmp_path, [sent])))  # the ledger has lost it
    assert list(released_uncharged(remains(tmp_path, [{**sent, "charged": False}], (charge,))))  # it came too late
    assert list(released_uncharged(remains(tmp_path, [{**sent, "reply": "failure", "charged": False}]))) == []


def test_a_second_payload_and_a_second_mask_are_found(tmp_path: Path) -> None:
    first, second = (event("payload", digest=digest) for digest in DIGESTS)
    charge = Charge("alder", 1, DIGESTS[0])
    masked = event("answered", stage="mask")
    assert list(paid_for_two(remains(tmp_path, [first, first, masked, masked], (charge,)), "")) == []
    assert list(paid_for_two(remains(tmp_path, [first, second], (charge,)), ""))
    assert list(paid_for_two(remains(tmp_path, [second], (charge,)), ""))
    assert list(paid_for_two(remains(tmp_path, [second], (charge,)), "alder")) == []
    assert list(paid_for_two(remains(tmp_path, [masked, {**masked, "said": "b"}]), ""))


def test_a_draw_that_was_not_paid_and_a_second_one_are_found(tmp_path: Path) -> None:
    lost, drew = Charge("alder", 1, ""), event("drawing")
    assert list(released_uncharged(remains(tmp_path, [drew], (lost,)))) == []
    assert list(paid_for_two(remains(tmp_path, [drew], (lost,)), "")) == []
    assert list(released_uncharged(remains(tmp_path, [drew])))
    assert list(released_uncharged(remains(tmp_path, [event("sending", stage="mask", charged=True)], (lost,))))
    assert list(paid_for_two(remains(tmp_path, [drew, drew], (lost,)), ""))


def test_a_second_list_a_short_list_and_a_reveal_without_one_are_found(tmp_path: Path) -> None:
    keys = event("answered", stage="advertise", threshold=3, least=3)
    whole, short = (event("answered", stage="confirm", survivors=each) for each in ([0, 1, 2], [0, 1]))
    reveal = event("answered", stage="reveal")
    assert list(unmaskings(remains(tmp_path, [keys, whole, whole, reveal]))) == []
    assert len(list(unmaskings(remains(tmp_path, [keys, short])))) == 1
    assert len(list(unmaskings(remains(tmp_path, [keys, whole, short])))) == 2
    assert list(unmaskings(remains(tmp_path, [keys, reveal])))
    assert list(unmaskings(remains(tmp_path, [keys, whole, event("unmasked", survivors=[0, 2, 3])])))


def test_a_round_charged_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faults.checks.sites_of", lambda world: [])
    charges = (Charge("alder", 1, DIGESTS[0]), Charge("alder", 2, DIGESTS[0]))
    assert list(ledgers(remains(tmp_path, [], charges))) == []
    assert list(ledgers(remains(tmp_path, [], (*charges, charges[0]))))


def test_recovery_is_from_the_kill_to_the_next_step_of_the_same_process_and_to_the_next_end() -> None:
    def at(t: float, who: str, what: str, **fields: Any) -> dict[str, Any]:
        return {"t": t, "who": who, "what": what, **fields}

    events = [
        at(1.0, "alder", "fault", action="kill"),
        at(2.0, "birch", "sent", stage="share"),
        at(2.5, "alder", "sent", stage="shown"),
        at(3.0, "alder", "sent", stage="share"),
        at(5.0, "coordinator", "closed"),
    ]
    assert recoveries(events) == [(2.0, 4.0)]


# --- the matrix ------------------------------------------------------------------------------------------------


def test_every_fault_is_bound_to_a_function_that_exists_and_every_round_is_hit() -> None:
    from faults.actions import ACTIONS

    assert len({each.name for each in CELLS}) == len(CELLS)
    for each in CELLS:
        drawn = [each.draw(seed) for seed in range(5)]
        assert {one.round for one in drawn} == ({1, 2} if each.round is None else {each.round})
        faults = [fault for one in drawn for given in each.faults(one).values() for fault in given]
        assert faults or each.script
        for fault in faults:
            assert fault.action in ACTIONS
            assert fault.moment in ("before", "after")
            if fault.target:
                module, _, path = fault.target.partition(":")
                owner: Any = importlib.import_module(module)
                for name in path.split("."):
                    owner = getattr(owner, name)
                assert callable(owner)
