"""What runs in the background goes on after an error, or ends the process on purpose and says why."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from privet.common.doors.places import Share
from privet.common.errors import StateError
from privet.common.refusals import Refusals
from privet.server.doors.door import Door, listen
from privet.server.network.gate import Gate, Limits
from privet.server.network.service import Tending
from tests.server.test_gate import Inside, request, through
from tests.server.test_refusals import Time
from tests.support.fleet_world import World


def test_work_that_fails_is_logged_and_tried_again_and_ends_the_process_when_it_fails_for_minutes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, broken = Time(), True

    def work() -> None:
        if broken:
            raise OSError(errno.EMFILE, "Too many open files")

    tending, waits = Tending(work, clock), []
    for _ in range(8):
        assert not tending.attempt()
        waits.append(tending.wait)
        clock.now += tending.wait
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert "regular work failed, next attempt in 30 s: OSError" in caplog.text
    broken = False
    assert tending.attempt()
    assert tending.wait == 1
    broken = True
    assert not tending.attempt()
    clock.now += 301
    with pytest.raises(StateError, match="failed for 300 s, so it may admit a revoked site: OSError"):
        tending.attempt()


def test_nodes_that_wait_are_woken_also_after_the_link_state_could_not_be_read() -> None:
    inside, failed = Inside(), list[int]()

    def waiting() -> frozenset[int]:
        if not failed:
            failed.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return frozenset({7})

    inside.waiting = waiting  # type: ignore[method-assign]
    assert through(Gate(inside, Limits(hold_seconds=5.0)), *request()) == 200
    assert failed


def test_a_runs_heartbeat_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.server.network.link._HEARTBEAT", 0.01)
    link, beats, enough = World(tmp_path).link, [], threading.Event()

    def beat(task: int) -> None:
        beats.append(task)
        if len(beats) > 3:
            enough.set()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(link._state, "acknowledge_task_heartbeat", beat)
    with link.run():
        assert enough.wait(5)


def test_a_door_that_finds_no_files_closes_a_stranger_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[bool, int]:
        loop, spent = asyncio.get_running_loop(), [True]
        accept = loop.sock_accept

        async def accepting(listening: socket.socket) -> Any:
            found = await accept(listening)
            if spent[0] and len(door.places) == 1:
                spent[0] = False
                found[0].close()
                raise OSError(errno.EMFILE, "Too many open files")
            return found

        monkeypatch.setattr(loop, "sock_accept", accepting)
        door = Door(
            listen("127.0.0.1", 0),
            lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
            Share(),
            Refusals(logging.getLogger("none")),
        )
        serving = loop.create_task(door.serve(lambda place: asyncio.Protocol()))
        callers = []
        for count in (1, 0, 1):
            callers.append(socket.create_connection(("127.0.0.1", door.port)))
            for _ in range(100):
                await asyncio.sleep(0.01)
                if len(door.places) == count and (count or not spent[0]):
                    break
        alive, here = not serving.done(), len(door.places)
        serving.cancel()
        door.close_all()
        with suppress(asyncio.CancelledError):
            await serving
        for caller in callers:
            caller.close()
        return alive, here

    assert asyncio.run(run()) == (True, 1)
