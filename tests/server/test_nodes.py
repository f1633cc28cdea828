"""Connected nodes, read without Flower: the same as Flower's own answer, at every state of a node."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
from flwr.common.constant import TIMESTAMP_TOLERANCE

from privet.common.errors import StateError
from privet.server.network.nodes import CLOCK_SECONDS, flowers_key, registered_in
from tests.support.fleet_world import World, public_line


def test_a_table_read_without_flower_tells_what_flower_tells(tmp_path: Path) -> None:
    world, file = World(tmp_path), tmp_path / "link.db"
    keys = [world.node_key() for _ in range(5)]
    nodes, state = [world.link.register(public_line(key)) for key in keys], world.link._state
    assert registered_in(file) == world.link.nodes()
    for node in nodes[1:4]:
        assert state.activate_node(node, 30.0)
    assert state.deactivate_node(nodes[2])
    world.link.unregister(public_line(keys[4]))
    with sqlite3.connect(file) as database:  # its time is over, and nobody has asked since
        late = (time.time() - 5, flowers_key(public_line(keys[3])))
        database.execute("UPDATE node SET online_until = ? WHERE public_key = ?", late)
    found = registered_in(file)  # before Flower is asked, which marks what is late
    assert found == world.link.nodes()
    assert {each.id: each.online for each in found} == dict(zip(nodes[:4], (False, True, False, False), strict=True))
    assert [each.id for each in found] == sorted(nodes[:4])
    assert registered_in(file) == world.link.nodes()


def test_what_is_no_table_of_nodes_and_no_key_is_said(tmp_path: Path) -> None:
    (tmp_path / "link.db").write_bytes(b"")
    with pytest.raises(sqlite3.Error):
        registered_in(tmp_path / "link.db")
    with pytest.raises(StateError, match="P-384"):
        flowers_key(b"ssh-ed25519 AAAA")


def test_a_clock_may_be_as_far_off_as_a_node_of_flower_expects() -> None:
    assert CLOCK_SECONDS == TIMESTAMP_TOLERANCE
