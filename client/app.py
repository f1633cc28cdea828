"""The Flower ClientApp of a site: it passes each message to the worker and returns the answer. It decides nothing.

Flower's SuperNode starts it. The node configuration names the site file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from privet.client.network.opening import open_member
from privet.client.rounds.answers import answer
from privet.client.rounds.worker import Worker
from privet.common.errors import StudyError
from privet.common.flower.records import pack, unpack

QUERIES, TRAINING = ("offer", "shown"), ("update", "secured")
"""Flower's routes for questions, and for training."""


def client_app(respond: Callable[[Message, Context], Message]) -> ClientApp:
    """Return an app that answers every message of ours with `respond`."""
    made = ClientApp()
    for route in QUERIES:
        made.query(route)(respond)
    for route in TRAINING:
        made.train(route)(respond)
    return made


def find_worker(context: Context) -> Worker:
    """Return the worker of this node. The node configuration, which the operator writes, names the site file.

    Raises:
        StudyError: The node configuration names no site file, or the file is not valid.
    """
    if "site" not in context.node_config:
        raise StudyError(
            "Flower's node configuration has no `site` entry with the path of a site file",
            "start the node with --node-config 'site=\"/path/site.toml\"'",
        )
    worker = open_member(Path(str(context.node_config["site"])))
    if worker.site.config.resources.trainer != "inside":  # Flower may start and end a process for each message
        raise StudyError(
            f"the site file of {worker.name} asks for a trainer apart, which a SuperNode of Flower does not run",
            'serve the site with `privet site serve SITE`, or set trainer = "inside" under [resources] in its file',
        )
    return worker


def _respond(message: Message, context: Context) -> Message:
    reply = answer(lambda: unpack(message.content), lambda: find_worker(context))
    return Message(pack(reply), reply_to=message)


app = client_app(_respond)
