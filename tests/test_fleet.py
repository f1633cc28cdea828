"""The deployment transport end to end on loopback: a real link state and fleet API over TLS, resident nodes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from privet.client.node import Note
from privet.common.errors import StateError
from privet.common.flower import GridExchange
from privet.common.flower_fleet import NotAdmittedError, UnreachableError, connected, reply_to
from privet.common.messages import Failure, Message, Secured
from privet.server.deployed import run_over_flower
from privet.server.rounds import Timing, run_study
from privet.server.state import RunDirectory
from tests.fleet_world import Authority, World, node, online, public_pem, until
from tests.synthetic import NAMES, PEFT_CONFIG, Site, optima, quadratic, start_adapter, study_of, towards

pytestmark = pytest.mark.slow
ASKED = Secured("study", 1, "nonce", b"asked")


def echo(asked: Message) -> Message:
    return Secured("study", 1, "nonce", b"answer to " + asked.body) if isinstance(asked, Secured) else asked


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def port(world: World) -> Iterator[int]:
    with world.server() as server:
        yield server.port


def ask(world: World, body: bytes = b"asked", count: int = 1, timeout: float = 20.0) -> dict[int, Message]:
    with world.link.run() as grid:
        exchange = GridExchange(grid, 0.02)
        until(lambda: len(exchange.nodes()) >= count)
        asked = {number: Secured("study", 1, "nonce", body) for number in exchange.nodes()}
        return dict(exchange.ask(asked, timeout=timeout))


def test_a_message_goes_there_and_back(world: World, port: int, tmp_path: Path) -> None:
    key = world.node_key()
    with node(world, port, key, echo, tmp_path / "a.state") as tally:
        for size in (0, 3 * 2**20):
            (answer,) = ask(world, b"x" * size).values()
            assert answer == Secured("study", 1, "nonce", b"answer to " + b"x" * size)
    assert tally.kinds == ["train.secured"] * 2
    assert online(world) == []  # it signed off


def test_a_study_over_the_network_gives_what_it_gives_in_memory(world: World, port: int, tmp_path: Path) -> None:
    study = study_of()
    sites = [Site(NAMES[i], towards(x), weight=10 * (i + 1)) for i, x in enumerate(optima(study, 3))]

    run = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    with ExitStack() as stack:
        for site in sites:
            reply = site.reply
            stack.enter_context(
                node(world, port, world.node_key(), lambda asked, r=reply: r(asked), tmp_path / f"{site.name}.state")  # type: ignore[misc]
            )
        until(lambda: len(online(world)) == 3)
        state = run_over_flower(run, world.link, timing=Timing(30, 30, 30))
    direct = RunDirectory.create(tmp_path / "direct", study, start_adapter(), PEFT_CONFIG)
    assert state.adapter.digest == run_study(direct, quadratic(study)).adapter.digest
    assert state.stopped


def test_an_unregistered_node_is_not_admitted(world: World, port: int) -> None:
    with connected(world.connection(port, world.node_key(register=False))) as link, pytest.raises(NotAdmittedError):
        link.activate()


def test_a_removed_node_is_cut_off_at_once_and_its_key_is_never_taken_again(world: World, port: int) -> None:
    key = world.node_key()
    with connected(world.connection(port, key)) as link:
        link.activate()
        assert link.beat()
        world.link.unregister(public_pem(key))
        for call in (link.beat, link.receive, link.activate):
            with pytest.raises(NotAdmittedError):
                call()
    with pytest.raises(StateError, match="removed before"):
        world.link.register(public_pem(key))


def test_a_node_trusts_one_root(world: World, port: int) -> None:
    with (
        connected(world.connection(port, world.node_key(), Authority().root())) as link,
        pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        link.activate()


def test_a_node_refuses_an_expired_certificate(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.chain, world.key = world.authority.server(tmp_path, days=-1)
    with (
        world.server() as server,
        connected(world.connection(server.port, world.node_key())) as link,
        pytest.raises(UnreachableError, match="expired"),
    ):
        link.activate()


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.authority.server(tmp_path, days=-1)
    with world.server() as server:
        world.authority.server(tmp_path)
        server.renew_certificate()
        with connected(world.connection(server.port, world.node_key())) as link:
            link.activate()


def test_the_coordinator_comes_back_and_the_round_goes_on(world: World, tmp_path: Path) -> None:
    # The process that serves sites stops while a site works; the one that runs the study notices nothing.
    entered, leave = threading.Event(), threading.Event()

    def slow(asked: Message) -> Message:
        entered.set()
        assert leave.wait(30)
        return echo(asked)

    server = world.server()
    with server:
        port = server.port
        runner = node(world, port, world.node_key(), slow, tmp_path / "a.state")
        tally = runner.__enter__()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(ask(world, timeout=40)))
        asking.start()
        assert entered.wait(20)
    leave.set()
    until(lambda: tally.retries > 0)
    with world.server(port):
        asking.join(30)
        runner.__exit__(None, None, None)
    assert list(answers.values()) == [echo(ASKED)]


def test_a_site_that_died_over_a_message_takes_it_up_again_at_once(world: World, port: int, tmp_path: Path) -> None:
    key, note = world.node_key(), tmp_path / "a.state"
    with world.link.run() as grid:
        exchange = GridExchange(grid, 0.02)
        # As a process that is killed: it took the message, wrote its note and was gone, still signed on.
        with connected(world.connection(port, key)) as link:
            number = link.activate()
            answers: dict[int, Message] = {}
            asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=40)))
            asking.start()
            received = link.receive()
            while received is None:
                received = link.receive()
            Note(note).write(number, received, 1)
        started = time.monotonic()
        with node(world, port, key, echo, note):
            asking.join(30)
        assert answers == {number: echo(ASKED)}
        assert time.monotonic() - started < 25  # Flower's own wait for a lost node is 60 seconds


def test_a_message_that_kills_the_site_twice_is_refused_then(world: World, port: int, tmp_path: Path) -> None:
    key, note, asked = world.node_key(), tmp_path / "a.state", []
    with world.link.run() as grid, connected(world.connection(port, key)) as link:
        exchange = GridExchange(grid, 0.02)
        number = link.activate()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=40)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        Note(note).write(number, received, 2)
        with node(world, port, key, lambda message: asked.append(message) or echo(message), note):  # type: ignore[func-returns-value]
            asking.join(30)
    assert asked == []
    assert isinstance(answers[number], Failure)


def test_a_repeated_answer_is_stored_once_and_is_the_same(world: World, port: int) -> None:
    with world.link.run() as grid, connected(world.connection(port, world.node_key())) as link:
        exchange = GridExchange(grid, 0.02)
        number = link.activate()
        answers: list[tuple[int, Message]] = []
        asking = threading.Thread(target=lambda: answers.extend(exchange.ask({number: ASKED}, timeout=20)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        reply = reply_to(received, echo(link.fetch(received)))
        for _ in range(3):
            link.send(reply)
        asking.join(20)
        link.send(reply)
    assert answers == [(number, echo(ASKED))]


def test_an_answer_in_the_name_of_another_node_is_not_taken(world: World, port: int) -> None:
    with (
        world.link.run() as grid,
        connected(world.connection(port, world.node_key())) as link,
        connected(world.connection(port, world.node_key())) as rogue,
    ):
        exchange = GridExchange(grid, 0.02)
        number, other = link.activate(), rogue.activate()
        answers: dict[int, Message] = {}
        asking = threading.Thread(target=lambda: answers.update(exchange.ask({number: ASKED}, timeout=20)))
        asking.start()
        received = link.receive()
        while received is None:
            received = link.receive()
        assert rogue.receive() is None
        false = reply_to(received, Failure("Rogue", "", ""))
        rogue.send(false)  # in the other's name, from this one's connection
        false.header.metadata.__dict__["_src_node_id"] = other
        rogue.send(false)
        link.send(reply_to(received, echo(link.fetch(received))))
        asking.join(20)
    assert answers == {number: echo(ASKED)}


def test_two_runs_on_one_state_do_not_mix(world: World, port: int, tmp_path: Path) -> None:
    with (
        node(world, port, world.node_key(), echo, tmp_path / "a.state"),
        world.link.run() as first,
        world.link.run() as second,
    ):
        until(lambda: len(online(world)) == 1)
        (number,) = online(world)
        for grid, body in ((first, b"1"), (second, b"2"), (first, b"3")):
            asked = {number: Secured("study", 1, "nonce", body)}
            assert dict(GridExchange(grid, 0.02).ask(asked, timeout=20)) == {number: echo(asked[number])}


def test_what_a_run_leaves_is_deleted(world: World, port: int, tmp_path: Path) -> None:
    with node(world, port, world.node_key(), echo, tmp_path / "a.state"):
        ask(world, b"x" * 2**20)
    objects = world.link._state.object_store  # type: ignore[attr-defined]
    assert len(objects) == 0


def test_a_note_that_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    note = tmp_path / "a.state"
    for text in ("", "[]", "{}", '{"node": 1, "message": "AAAA"}', '{"node": "x"}', json.dumps({"node": 1})[:-1]):
        note.write_text(text)
        with pytest.raises(StateError):
            Note(note).read()
