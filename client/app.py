"""The Flower ClientApp of a site: messages in, the worker's answers out. It decides nothing itself.

Flower's SuperNode starts it with a site file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from privet.client.rounds.answers import answer
from privet.client.rounds.worker import Worker, open_worker
from privet.common.errors import StudyError
from privet.common.flower.records import pack, unpack

QUERIES, TRAINING = ("offer", "shown"), ("update", "secured")
"""Flower's routes by which a site is asked, and by which it is asked to train."""


def client_app(respond: Callable[[Message, Context], Message]) -> ClientApp:
    """Return an app that answers each message of ours in one and the same way."""
    made = ClientApp()
    for route in QUERIES:
        made.query(route)(respond)
    for route in TRAINING:
        made.train(route)(respond)
    return made


def find_worker(context: Context) -> Worker:
    """Return the worker of this node, by the site file that its operator named.

    Raises:
        StudyError: The node says nowhere which site it is, or the file is not valid.
    """
    if "site" not in context.node_config:
        raise StudyError("this node does not know its site", "start it with --node-config 'site=\"/path/site.toml\"'")
    return open_worker(Path(str(context.node_config["site"])))


def _respond(message: Message, context: Context) -> Message:
    reply = answer(lambda: unpack(message.content), lambda: find_worker(context))
    return Message(pack(reply), reply_to=message)


app = client_app(_respond)
