"""Flower: what privet relies on beyond its public API is still there, and both grids do what rounds expect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr.app
import flwr.clientapp
import flwr.serverapp
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from privet.common.errors import StateError, TooFewSitesError
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import Consent, Failure, Message, Offer, RoundOpen
from privet.server.app import app as server_app
from privet.server.network.grid import GridExchange
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.timing import Timing
from tests.support.memory_grid import MemoryGrid, run_in_memory
from tests.support.synthetic import NAMES, PEFT_CONFIG, Site, optima, quadratic, start_adapter, study_of, towards

# The version whose internals `server/network` and its like use.
FLOWER_VERSION = "1.41"
NODES = (11, 12, 13)
OPENED = RoundOpen({"name": "x"}, 1, "nonce", "digest", ("alder",), b"adapter")

# Flower's internals


def test_flower_is_the_version_that_the_adapter_modules_were_written_for() -> None:
    found = version("flwr")
    assert found.startswith(f"{FLOWER_VERSION}."), (
        f"flwr {found} is installed and server/network/link.py and its like were written for {FLOWER_VERSION}.x: "
        "read Flower's changes to Message, Metadata, Grid and TaskIdentity, then raise FLOWER_VERSION"
    )


def test_the_task_identity_is_where_a_message_finds_it() -> None:
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    try:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 3, 5, 7
        message = FlowerMessage(RecordDict(), 9, "query.offer")
        assert (message.metadata.src_task_id, message.metadata.run_id, message.metadata.src_node_id) == (3, 5, 7)
        assert message.metadata.dst_node_id == 9
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, f"_{name}", value)


def test_a_message_takes_its_id_and_run_from_its_metadata() -> None:
    MemoryGrid(ClientApp(), {})
    message = FlowerMessage(RecordDict(), 9, "query.offer", ttl=100.0)
    assert {"_message_id", "_run_id", "_reply_to_message_id"} <= set(message.metadata.__dict__)
    assert message.metadata.message_id == ""
    message.metadata.__dict__["_message_id"] = "mine"
    message.metadata.__dict__["_run_id"] = 4
    assert (message.metadata.message_id, message.metadata.run_id) == ("mine", 4)
    for reply in (FlowerMessage(RecordDict(), reply_to=message), FlowerMessage(Error(code=2), reply_to=message)):
        assert reply.metadata.reply_to_message_id == "mine"
        assert reply.metadata.src_node_id == 9
        assert reply.metadata.run_id == 4


def test_the_abstract_grid_asks_for_nothing_that_ours_does_not_have() -> None:
    assert Grid.__abstractmethods__ <= set(vars(MemoryGrid))


def test_the_public_names_are_where_the_package_imports_them() -> None:
    for module, names in {
        flwr.app: ("Context", "Error", "Message", "RecordDict", "ConfigRecord"),
        flwr.clientapp: ("ClientApp",),
        flwr.serverapp: ("Grid", "ServerApp"),
    }.items():
        assert all(hasattr(module, name) for name in names)


# The in-memory grid, with real app objects


def client_of(sites: Mapping[str, Site]) -> ClientApp:
    """Return a ClientApp whose node answers as the synthetic site that its configuration names."""
    app = ClientApp()

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        reply = sites[str(context.node_config["site"])].reply(unpack(message.content))
        if reply is None:
            raise LookupError("patient 17 has no record")
        return FlowerMessage(pack(reply), reply_to=message)

    app.query("offer")(answer)
    app.train("update")(answer)
    return app


def grid_of(*sites: Site) -> MemoryGrid:
    by_name = {site.name: site for site in sites}
    return MemoryGrid(client_of(by_name), {n: {"site": s.name} for n, s in zip(NODES, sites, strict=False)})


def three_sites() -> list[Site]:
    return [Site(NAMES[i], towards(x), weight=10 * (i + 1)) for i, x in enumerate(optima(study_of(), 3))]


def test_the_real_server_app_runs_a_study_over_the_memory_grid(tmp_path: Path) -> None:
    study = study_of()
    run = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    sites = three_sites()
    nodes = {node: {"site": site.name} for node, site in zip(NODES, sites, strict=True)}
    client = client_of({site.name: site for site in sites})
    run_in_memory(server_app, client, nodes, {"run": str(run.path), "round-timeout": 30})
    state = run.load()
    assert state.stopped
    assert [statement["round"] for statement in state.statements] == [1, 2, 3, 4]
    direct = RunDirectory.create(tmp_path / "direct", study, start_adapter(), PEFT_CONFIG)
    assert run_study(Unlogged(direct), quadratic(study)).adapter.digest == state.adapter.digest


def test_the_server_app_needs_a_run_directory() -> None:
    with pytest.raises(StateError, match="has no key `run`"):
        run_in_memory(server_app, client_of({}), {}, {})


def test_an_exception_in_a_client_app_is_a_failure_without_its_text() -> None:
    broken = Site("birch", towards(np.zeros(1)), answer=lambda asked, honest: None)
    exchange = GridExchange(grid_of(three_sites()[0], broken), poll=0.001)
    replies = dict(exchange.ask({node: Offer(study_of().document()) for node in NODES[:2]}, timeout=5))
    assert isinstance(replies[11], Consent)
    failure = replies[12]
    assert isinstance(failure, Failure)
    assert "failed while it answered" in failure.message
    assert "17" not in f"{failure.error}{failure.message}{failure.hint}"


def test_a_site_that_raises_in_one_round_is_left_out_of_that_round(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 3})
    run = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    sites = three_sites()
    sites[1].answer = lambda asked, honest: None if isinstance(asked, RoundOpen) and asked.round == 2 else honest
    state = run_study(Unlogged(run), GridExchange(grid_of(*sites), poll=0.001))
    assert [s["survivors"] for s in state.statements] == [
        ["alder", "birch", "cedar"],
        ["alder", "cedar"],
        list(NAMES[:3]),
    ]
    assert list(state.statements[1]["failures"]) == ["birch"]


def test_a_node_that_does_not_exist_fails_and_the_rest_goes_on() -> None:
    exchange = GridExchange(grid_of(*three_sites()), poll=0.001)
    assert exchange.nodes() == [11, 12, 13]
    replies = dict(exchange.ask({11: Offer(study_of().document()), 99: Offer(study_of().document())}, timeout=5))
    assert isinstance(replies[11], Consent)
    assert isinstance(replies[99], Failure)


def test_an_answer_is_given_out_once() -> None:
    grid = grid_of(*three_sites())
    message = FlowerMessage(pack(Offer(study_of().document())), 11, "query.offer")
    (identity,) = grid.push_messages([message])
    assert len(list(grid.pull_messages([identity]))) == 1
    assert list(grid.pull_messages([identity])) == []
    assert list(grid.pull_messages(["unknown"])) == []


def test_sending_and_receiving_in_one_call() -> None:
    grid = grid_of(*three_sites())
    messages = [FlowerMessage(pack(Offer(study_of().document())), node, "query.offer") for node in NODES]
    replies = list(grid.send_and_receive(messages))
    assert [unpack(reply.content) for reply in replies] == [
        Consent(site.name, study_of().digest, start_adapter().spec.digest, site.weight) for site in three_sites()
    ]


def test_nodes_keep_their_own_state() -> None:
    app = ClientApp()

    def count(message: FlowerMessage, context: Context) -> FlowerMessage:
        seen = int(context.state.get("seen", ConfigRecord({"n": 0}))["n"]) + 1  # type: ignore[arg-type]
        context.state["seen"] = ConfigRecord({"n": seen})
        return FlowerMessage(pack(Failure(str(context.node_id), str(seen), "")), reply_to=message)

    app.query("offer")(count)
    exchange = GridExchange(MemoryGrid(app, {11: {}, 12: {}}), poll=0.001)
    for asked in ({11: Offer({})}, {11: Offer({}), 12: Offer({})}):
        replies = dict(exchange.ask(asked, timeout=5))
    assert replies == {11: Failure("11", "2", ""), 12: Failure("12", "1", "")}


# The exchange over any grid


class ScriptedGrid(Grid):
    """A grid whose replies come when and how a test says."""

    def __init__(self, script: Callable[[int, list[FlowerMessage]], Iterable[FlowerMessage]]) -> None:
        MemoryGrid(ClientApp(), {})  # sets the identity that Flower's messages need
        self.script = script
        self.sent: list[FlowerMessage] = []
        self.pulls = 0

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **keys: Any) -> FlowerMessage:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [13, 11, 12]

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        new = list(messages)
        for message in new:
            message.metadata.__dict__["_message_id"] = f"id-{message.metadata.dst_node_id}"
        self.sent += new
        return [message.metadata.message_id for message in new]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        assert all(message_ids), "an empty id must never be asked for"
        self.pulls += 1
        return self.script(self.pulls, [m for m in self.sent if m.metadata.message_id in set(message_ids)])

    def send_and_receive(self, messages: Iterable[FlowerMessage], *, timeout: float | None = None) -> Any:
        raise NotImplementedError


def answer_to(message: FlowerMessage) -> FlowerMessage:
    return FlowerMessage(pack(Failure("node", str(message.metadata.dst_node_id), "")), reply_to=message)


ASKED: Mapping[int, Message] = dict.fromkeys(NODES, OPENED)
ALL = {node: Failure("node", str(node), "") for node in NODES}


def test_replies_find_their_nodes_in_any_order_and_over_several_looks() -> None:
    exchange = GridExchange(ScriptedGrid(lambda pull, waiting: [answer_to(waiting[-1])]), poll=0.001)
    assert dict(exchange.ask(ASKED, timeout=5)) == ALL
    assert exchange.nodes() == [11, 12, 13]


def test_messages_carry_their_type_and_outlive_the_deadline() -> None:
    grid = ScriptedGrid(lambda pull, waiting: [answer_to(m) for m in waiting])
    exchange = GridExchange(grid, poll=0.001)
    dict(exchange.ask({11: OPENED}, timeout=7))
    dict(exchange.ask({12: Offer({})}, timeout=7))
    assert [(m.metadata.message_type, m.metadata.dst_node_id) for m in grid.sent] == [
        ("train.update", 11),
        ("query.offer", 12),
    ]
    assert all(m.metadata.ttl > 7 for m in grid.sent)


@pytest.mark.parametrize("timeout", [0.0, 0.05, 0.2])
def test_silence_ends_at_the_deadline(timeout: float) -> None:
    grid = ScriptedGrid(lambda pull, waiting: [])
    started = time.monotonic()
    assert dict(GridExchange(grid, poll=0.01).ask(ASKED, timeout=timeout)) == {}
    assert timeout <= time.monotonic() - started < timeout + 10
    assert grid.pulls >= 1


def test_who_answered_in_time_counts_where_another_stays_silent() -> None:
    grid = ScriptedGrid(lambda pull, waiting: [answer_to(m) for m in waiting if m.metadata.dst_node_id != 12])
    assert dict(GridExchange(grid, poll=0.01).ask(ASKED, timeout=0.05)) == {n: ALL[n] for n in (11, 13)}


def test_a_silent_grid_is_too_few_sites(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", study_of(), start_adapter(), PEFT_CONFIG)
    with pytest.raises(TooFewSitesError, match="0 sites consented"):
        run_study(
            Unlogged(run), GridExchange(ScriptedGrid(lambda pull, waiting: []), poll=0.01), timing=Timing(gathering=0.1)
        )


def test_a_foreign_or_repeated_reply_is_ignored() -> None:
    stranger = FlowerMessage(RecordDict(), 11, "query.offer")
    stranger.metadata.__dict__["_message_id"] = "id-of-another-round"

    def script(pull: int, waiting: list[FlowerMessage]) -> list[FlowerMessage]:
        return [FlowerMessage(pack(Failure("old", "", "")), reply_to=stranger), *map(answer_to, waiting[:1] * 2)]

    assert dict(GridExchange(ScriptedGrid(script), poll=0.001).ask(ASKED, timeout=5)) == ALL


@pytest.mark.parametrize("identity", ["", None])
def test_a_message_that_flower_could_not_store_is_a_failure(identity: Any) -> None:
    class Full(ScriptedGrid):
        def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
            return [identity if i == "id-12" else i for i in super().push_messages(messages)]

    replies = dict(GridExchange(Full(lambda pull, waiting: map(answer_to, waiting)), poll=0.001).ask(ASKED, timeout=5))
    assert replies[11] == ALL[11]
    assert isinstance(replies[12], Failure)
    assert "could not be delivered" in replies[12].message


def test_messages_too_large_for_flower_are_failures() -> None:
    class TooLarge(ScriptedGrid):
        def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
            return []

    grid = TooLarge(lambda pull, waiting: [])
    replies = dict(GridExchange(grid, poll=0.001).ask(ASKED, timeout=5))
    assert [type(replies[node]) for node in NODES] == [Failure] * 3
    assert grid.pulls == 0


def test_nothing_to_ask_asks_nothing() -> None:
    grid = ScriptedGrid(lambda pull, waiting: [])
    assert dict(GridExchange(grid).ask({}, timeout=5)) == {}
    assert grid.sent == []


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"privet": ConfigRecord({"kind": "consent", "fields": b"[" * 100_000})})]
)
def test_a_reply_that_is_no_message_is_a_failure(content: RecordDict) -> None:
    grid = ScriptedGrid(lambda pull, waiting: [FlowerMessage(content, reply_to=m) for m in waiting])
    reply = dict(GridExchange(grid, poll=0.001).ask({11: OPENED}, timeout=5))[11]
    assert isinstance(reply, Failure)
    assert reply.error == "ProtocolError"


def test_an_error_reply_is_a_failure_without_its_reason() -> None:
    error = Error(code=1, reason="row 17: secret")
    grid = ScriptedGrid(lambda pull, waiting: [FlowerMessage(error, reply_to=m) for m in waiting])
    reply = dict(GridExchange(grid, poll=0.001).ask({11: OPENED}, timeout=5))[11]
    assert isinstance(reply, Failure)
    assert "secret" not in f"{reply.error}{reply.message}{reply.hint}"
