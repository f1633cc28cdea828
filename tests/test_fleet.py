"""The deployment transport end to end on loopback: a real link state and fleet API over TLS, resident nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from privet.common.flower import GridExchange
from privet.common.messages import Message, Secured
from privet.server.deployed import run_over_flower
from privet.server.rounds import Timing, run_study
from privet.server.state import RunDirectory
from tests.fleet_world import World, node, online, until
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
