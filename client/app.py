"""The Flower ClientApp of a site: messages in, the worker's answers out. It decides nothing itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from privet.client.worker import Worker, open_worker
from privet.common.errors import (
    BudgetExhaustedError,
    DataError,
    DivergedError,
    PrivetError,
    ProtocolError,
    RefusedError,
    StudyError,
)
from privet.common.messages import Failure, Offer, RoundOpen, Secured, Shown
from privet.common.messages import Message as Spoken
from privet.common.study import Study
from privet.common.wire import RECORD, pack, unpack

app = ClientApp()
_log = logging.getLogger("privet.site")
_OWN_LOG = "the site's own log says why"
# What is told of an error whose text is the site's own affair: counts and names in it would answer questions about the
# data, and so would the step at which training diverged.
_TOLD = {
    DataError: Failure("DataError", "the site's data does not fit the study", _OWN_LOG),
    DivergedError: Failure("DivergedError", "training diverged at the site", "lower the learning rate"),
    BudgetExhaustedError: Failure(
        "BudgetExhaustedError", "the site's privacy limit does not cover the study", _OWN_LOG
    ),
}


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
    try:
        asked = unpack(message.content)
        worker = find_worker(context)
        if isinstance(asked, Offer):
            answer: Spoken = _offer(worker, asked)
        elif isinstance(asked, Shown):
            answer = worker.cosign(asked)
        elif isinstance(asked, RoundOpen) and asked.masking:
            answer = worker.advertise(asked)
            if worker.site.reproducible_seed is not None:
                _remember(context, asked)
        elif isinstance(asked, RoundOpen):
            answer = worker.update(asked)
        elif isinstance(asked, Secured):
            answer = worker.answer(asked, lambda start: _remembered(context, start))
            if worker.site.reproducible_seed is not None:
                _remember(context, asked)
        else:
            raise ProtocolError(f"a site does not answer a {asked.kind} message")
    except PrivetError as error:
        _log.warning("refused: %s", error)
        answer = _told(error)
    except Exception as error:  # its text may hold a record, so nothing but its type is told
        _log.error("failed: %s", type(error).__name__)
        answer = Failure("InternalError", "unexpected failure at the site", "the site's own log says which")
    return Message(pack(answer), reply_to=message)


def _offer(worker: Worker, asked: Offer) -> Spoken:
    """Consent to a study, or refuse it with a statement for the round log."""
    try:
        return worker.offer(Study.parse(dict(asked.study)))
    except RefusedError as error:
        _log.warning("refused: %s", error)
        return replace(_told(error), statement=worker.refusal(asked.run, 0, error))


def _told(error: PrivetError) -> Failure:
    """Return what the coordinator learns of an error."""
    if not error.private:
        return Failure(type(error).__name__, error.message, error.hint)
    return _TOLD.get(type(error), Failure(type(error).__name__, "a rule or the state of the site forbids it", _OWN_LOG))


# Flower's simulation engine answers each message in whichever process is free. The context travels along, so a
# simulated site keeps there what it was asked in the round, and takes the round up from it.
def _remember(context: Context, asked: RoundOpen | Secured) -> None:
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
        StudyError: The node says nowhere which site it is.
    """
    if "site" in context.node_config:
        return open_worker(Path(str(context.node_config["site"])))
    if "partition-id" in context.node_config and context.run_config.get("sites"):
        files = sorted(Path(str(context.run_config["sites"])).glob("*.toml"))
        return open_worker(files[int(context.node_config["partition-id"])])
    raise StudyError("this node does not know its site", "start it with --node-config 'site=\"/path/site.toml\"'")
