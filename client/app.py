"""The Flower ClientApp of a site: messages in, the worker's answers out. It decides nothing itself.

Flower's SuperNode starts it with a site file of its own. A simulated site's is taken in simulations alone: within their
processes, or where the node's configuration says that it is one.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from privet.client.rounds.answers import answer
from privet.client.rounds.worker import Worker, open_worker
from privet.client.site import SIMULATION, check_protected
from privet.common.errors import StudyError
from privet.common.flower.records import RECORD, pack, unpack
from privet.common.study.messages import Message as Spoken
from privet.common.study.messages import RoundOpen, Secured

SIMULATED = "simulated"
"""In a node's configuration, which its operator writes and no coordinator: its site may be a simulated one."""

app = ClientApp()


@app.query("offer")
def offer(message: Message, context: Context) -> Message:
    """Answer an offer with consent or a reason."""
    return _answer(message, context)


@app.query("shown")
def shown(message: Message, context: Context) -> Message:
    """Answer a checkpoint of the round log with a cosignature or a reason."""
    return _answer(message, context)


@app.train("update")
def update(message: Message, context: Context) -> Message:
    """Answer an opened round with a contribution or a reason."""
    return _answer(message, context)


@app.train("secured")
def secured(message: Message, context: Context) -> Message:
    """Answer one message of secure aggregation."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    reply = answer(
        lambda: unpack(message.content),
        lambda: find_worker(context),
        lambda start: _remembered(context, start),
        lambda worker, asked: _remember(context, worker, asked),
    )
    return Message(pack(reply), reply_to=message)


# Flower's simulation engine answers each message in whichever process is free. The context travels along, so a
# simulated site keeps there what it was asked in the round, and takes the round up from it.
def _remember(context: Context, worker: Worker, asked: Spoken) -> None:
    masked = isinstance(asked, Secured) or (isinstance(asked, RoundOpen) and bool(asked.masking))
    if not masked or worker.site.reproducible_seed is None:
        return
    record = pack(asked)[RECORD]
    if record in context.state.values():
        return  # it came twice
    if isinstance(asked, RoundOpen):
        context.state.clear()
    context.state[f"asked-{len(context.state):02d}"] = record


def _remembered(context: Context, start: int) -> list[RoundOpen | Secured]:
    records = sorted(context.state.items())[start:]
    messages = (unpack(RecordDict({RECORD: record})) for _, record in records)
    return [message for message in messages if isinstance(message, RoundOpen | Secured)]


def find_worker(context: Context) -> Worker:
    """Return the worker of this node: its own site file, or by partition a file of a simulation's directory.

    Raises:
        StudyError: The node says nowhere which site it is, or its site is a simulated one and this is no simulation.
    """
    if "site" in context.node_config:
        file = Path(str(context.node_config["site"]))
        worker = open_worker(file)
        if not context.node_config.get(SIMULATED):
            check_protected(worker.site, file)
        return worker
    # The coordinator names this directory, so a node outside a simulation does not look there.
    if SIMULATION in os.environ and "partition-id" in context.node_config and context.run_config.get("sites"):
        files = sorted(Path(str(context.run_config["sites"])).glob("*.toml"))
        return open_worker(files[int(context.node_config["partition-id"])])
    raise StudyError("this node does not know its site", "start it with --node-config 'site=\"/path/site.toml\"'")
