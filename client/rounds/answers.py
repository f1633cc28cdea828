"""What a site answers to a message, over any transport: the worker's answer, or the part of an error that may leave."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace

from privet.client.rounds.diary import Diary
from privet.client.rounds.worker import Worker
from privet.common.errors import (
    BudgetExhaustedError,
    DataError,
    DivergedError,
    PrivetError,
    ProtocolError,
    RefusedError,
    ScanError,
    SpentRoundError,
)
from privet.common.refusals import Refusals
from privet.common.study.messages import Failure, Message, Offer, RoundOpen, Secured, Shown
from privet.common.study.study import Study

_log = logging.getLogger("privet.site")
_refusals = Refusals(_log)
_COORDINATOR = "coordinator"
_VERSIONS = "run the same version of privet at the site and at the coordinator"
_CONTINUE = re.compile("continue the round without this site(.*)")
_OWN_LOG = "ask the site's operator: the site's application log holds the reason"
# By name, as a process without PyTorch answers too. What the site's operator reads of them.
_MEMORY = ("MemoryError", "OutOfMemoryError")
_LARGE = (
    ": the memory is too small; lower resources.physical_batch, or set resources.gradient_checkpointing = true, in the "
    "site file; or train with a base in few bits (model.quantisation in the study)"
)
# Errors whose texts are private to the site: their counts and names would answer questions about the data, and so would
# the step at which training diverged. The coordinator gets these fixed texts instead.
_FIXED = {
    DataError: Failure("DataError", "the site's data files do not meet the study's requirements", _OWN_LOG),
    DivergedError: Failure(
        "DivergedError",
        "training diverged at the site: a value was infinite or not a number",
        "lower training.learning_rate in the study",
    ),
    SpentRoundError: Failure(
        "SpentRoundError",
        "the site charged this round before and lost its update, so it sits the round out",
        "nothing: the site takes part again in the next round",
    ),
    BudgetExhaustedError: Failure(
        "BudgetExhaustedError", "the study would exceed the privacy limit of the site's dataset", _OWN_LOG
    ),
    # One text for a scan that is missing, old or not clean: which of them would say something of the records.
    ScanError: Failure("ScanError", "the site's policy requires another scan of its data files", _OWN_LOG),
}


def answer(
    read: Callable[[], Message],
    find_worker: Callable[[], Worker],
    diary: Diary | None = None,
) -> Message:
    """Return the answer to the message that `read` returns. Never raises: an error becomes a `Failure`.

    Args:
        read: Reads the message; may raise.
        find_worker: Returns the site's worker; may raise.
        diary: Logs what happens in each round; None logs refusals and errors alone.
    """
    _refusals.settle()
    try:
        asked = read()
        worker = find_worker()
        if diary is None:
            return _answer(worker, asked)
        diary.asked(asked)
        reply = _answer(worker, asked)
        diary.answered(asked, reply)
        return reply
    except PrivetError as error:
        _note(error)
        return _failure(error)
    except Exception as error:  # its text may hold a record, so only its type is logged and nothing of it is sent
        name = type(error).__name__
        _refusals.note("the site failed", _COORDINATOR, detail=f"failed: {name}{_LARGE if name in _MEMORY else ''}")
        return Failure(
            "InternalError", "an unexpected error occurred at the site while it answered this message", _OWN_LOG
        )


def _answer(worker: Worker, asked: Message) -> Message:
    """Return the worker's answer, or its refusal with a statement for the round log."""
    try:
        if isinstance(asked, Offer):
            return worker.offer(Study.parse(dict(asked.study)), asked.run, asked.node)
        if isinstance(asked, Shown):
            return worker.cosign(asked)
        if isinstance(asked, RoundOpen):
            return worker.advertise(asked) if asked.masking else worker.update(asked)
        if isinstance(asked, Secured):
            return worker.answer(asked)
    except RefusedError as error:
        _note(error)
        return replace(_failure(error), statement=worker.refusal(asked, error))
    raise ProtocolError(
        f"expected a message that a coordinator sends to a site, found one of kind {asked.kind}", _VERSIONS
    )


def _note(error: PrivetError) -> None:
    """Log the refusal or error with its full text in the site's application log, also where the text is private."""
    code = f" {error.code}" if isinstance(error, RefusedError) else ""
    _refusals.note(f"{type(error).__name__}{code}", _COORDINATOR, detail=_for_the_site(error))


def _for_the_site(error: PrivetError) -> str:
    """Return an error's text for the site's own log: in place of a hint for the coordinator, what this site does."""
    found = _CONTINUE.fullmatch(error.hint)
    if found is None:
        return str(error)
    more = found[1].removeprefix(": it counts as a drop-out").removeprefix(", and ").removeprefix("; ")
    return f"{error.message} (this site sits the round out, and takes part in the next one{more and '; '}{more})"


def _failure(error: PrivetError) -> Failure:
    """Return what the coordinator learns of an error."""
    if not error.private:
        return Failure(type(error).__name__, error.message, error.hint)
    general = Failure(
        type(error).__name__,
        "the site did not take part; the reason is private, and is in the site's own log: ask its operator",
        _OWN_LOG,
    )
    return _FIXED.get(type(error), general)
