"""What a site answers to a message, whichever way it came: the worker's answer, or as much of an error as may leave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from privet.client.rounds.worker import Worker
from privet.common.errors import (
    BudgetExhaustedError,
    DataError,
    DivergedError,
    PrivetError,
    ProtocolError,
    RefusedError,
)
from privet.common.refusals import Refusals
from privet.common.study.messages import Failure, Message, Offer, RoundOpen, Secured, Shown
from privet.common.study.study import Study

_log = logging.getLogger("privet.site")
_refusals = Refusals(_log)
_COORDINATOR = "coordinator"
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


def answer(
    read: Callable[[], Message],
    find_worker: Callable[[], Worker],
) -> Message:
    """Return the answer to the message that `read` returns. Never raises: an error becomes a `Failure`.

    Args:
        read: Reads the message; may raise.
        find_worker: Returns the site's worker; may raise.
    """
    _refusals.settle()
    try:
        asked = read()
        return _answer(find_worker(), asked)
    except PrivetError as error:
        _note(error)
        return _told(error)
    except Exception as error:  # its text may hold a record, so nothing but its type is told
        _refusals.note("the site failed", _COORDINATOR, detail=f"failed: {type(error).__name__}")
        return Failure("InternalError", "unexpected failure at the site", "the site's own log says which")


def _answer(worker: Worker, asked: Message) -> Message:
    """Return the worker's answer, or its refusal with a statement for the round log."""
    try:
        if isinstance(asked, Offer):
            return worker.offer(Study.parse(dict(asked.study)))
        if isinstance(asked, Shown):
            return worker.cosign(asked)
        if isinstance(asked, RoundOpen):
            return worker.advertise(asked) if asked.masking else worker.update(asked)
        if isinstance(asked, Secured):
            return worker.answer(asked)
    except RefusedError as error:
        _note(error)
        return replace(_told(error), statement=worker.refusal(asked, error))
    raise ProtocolError(f"a site does not answer a {asked.kind} message")


def _note(error: PrivetError) -> None:
    """Write down in the site's own log what it refused, and why: also what is not told to others."""
    code = f" {error.code}" if isinstance(error, RefusedError) else ""
    _refusals.note(f"{type(error).__name__}{code}", _COORDINATOR, detail=str(error))


def _told(error: PrivetError) -> Failure:
    """Return what the coordinator learns of an error."""
    if not error.private:
        return Failure(type(error).__name__, error.message, error.hint)
    return _TOLD.get(type(error), Failure(type(error).__name__, "a rule or the state of the site forbids it", _OWN_LOG))
