"""The resident site: it receives one message at a time, answers it, and survives failures of either side.

A message is stored on disk before it is answered and removed after its answer has arrived. So a site that was killed
answers it after the restart. That never releases anything twice: the ledger charges a round once, and a second request
for it gets the same bytes. This module does not look into messages.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from privet.client.network.fleet import (
    HEARTBEAT,
    FleetLink,
    NotAdmittedError,
    Received,
    Reply,
    RunOverError,
    TooLargeError,
    UnreachableError,
    UntrustedError,
    reply_to,
)
from privet.client.waiting import awaited
from privet.common.errors import ProtocolError, StateError
from privet.common.files import write_durably
from privet.common.refusals import sparing
from privet.common.study.messages import Failure, Message

_log = logging.getLogger("privet.site.node")
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
# A coordinator that has no message and answers within `_QUICK` seconds is asked again after `_PAUSE` seconds.
_PAUSE, _QUICK = 0.1, 0.5
_MOST_ATTEMPTS = 2
_SPARED = 60.0
"""Seconds that a message lives longer than its answer is awaited (`privet.server.network.grid`)."""
_STOPPED = Failure(
    "InternalError",
    "the site's process ended repeatedly while it worked on its answer to this message",
    "ask the site's operator: the site's application log holds the reason",
)
_TOO_LARGE = Failure(
    "ProtocolError",
    "the site's answer is larger than the coordinator accepts",
    "train a smaller adapter: lower lora.rank in the study",
)
_T = TypeVar("_T")

Answer = Callable[[Callable[[], Message]], Message]
"""Answers the message that its argument returns."""


class Meter(Protocol):
    """Counts events of the node, and no data."""

    def answered(self, kind: str, seconds: float) -> None:
        """Count one answer, by its kind."""

    def connected(self, up: bool) -> None:
        """Record whether the coordinator accepts this node."""

    def retried(self) -> None:
        """Count one request that has to be repeated."""


@dataclass(frozen=True)
class NodeState:
    """The file beside a site's node key: the node's number at the coordinator, and the message in progress."""

    path: Path

    def read(self) -> tuple[int | None, Received | None, int]:
        """Return the node's number, the message in progress, and the number of attempts to answer it.

        Raises:
            StateError: The file exists but cannot be read.
        """
        if not self.path.is_file():
            return None, None, 0
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            node, attempts = int(document["node"]), int(document.get("attempts", 0))
            message = document.get("message")
            return node, None if message is None else Received.from_bytes(b64decode(message)), attempts
        except (ValueError, KeyError, TypeError, AttributeError):
            hint = f"delete {self.path}: the round in progress then continues without this site"
            raise StateError(
                f"the state file {self.path} of this site's connection is damaged and cannot be read", hint
            ) from None

    def write(self, node: int, received: Received | None = None, attempts: int = 0) -> None:
        """Replace the file, durably."""
        document: dict[str, int | str] = {"node": node}
        if received is not None:
            document |= {"attempts": attempts, "message": b64encode(received.to_bytes()).decode("ascii")}
        write_durably(self.path, json.dumps(document).encode())


@dataclass
class Connection:
    """A site's connection to its coordinator, while the site serves.

    Attributes:
        stop: If it is set, the node finishes at the next opportunity and signs off.
        arrived: Called when an answer has arrived at the coordinator.
    """

    link: FleetLink
    answer: Answer
    note: NodeState
    meter: Meter
    stop: threading.Event = field(default_factory=threading.Event)
    arrived: Callable[[], None] = lambda: None

    def serve(self) -> None:
        """Serve until `stop` is set. It reconnects by itself after any failure of the network or the coordinator."""
        # The coordinator, or an impostor at its address, could otherwise fill the disk with log lines.
        with sparing(_log):
            self._serve()

    def _serve(self) -> None:
        wait = _FIRST_WAIT
        while not self.stop.is_set():
            try:
                with self._signed_on() as number:
                    wait = _FIRST_WAIT
                    self._messages(number)
            except NotAdmittedError as error:
                self.meter.connected(False)
                _log.warning(
                    "the coordinator does not accept this node (%s): its site was revoked or is not a member, its "
                    "clock differs by minutes, or an earlier connection still counts, for at most 60 s; `privet site "
                    "doctor SITE` says which",
                    error,
                )
                wait = _LONGEST_WAIT / 3
            except (UnreachableError, RunOverError, TooLargeError) as error:
                self.meter.connected(False)
                _warn(error)
            except OSError as error:  # no files or no disk are left; the message in progress is sent again
                self.meter.connected(False)
                _log.error("the connection ended, trying again: %s", error.strerror or type(error).__name__)
            self.meter.retried()
            self.stop.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    @contextmanager
    def _signed_on(self) -> Iterator[int]:
        """Sign on, and sign off at the end. Heartbeats are sent in the background, also while a message is answered."""
        before, received, attempts = self.note.read()
        number = self.link.activate(before)
        if number != before:
            # The coordinator has a new node for this key, so it expects no answer from the old one: drop the message.
            self.note.write(number)
        _log.info("connected to the coordinator")
        self.meter.connected(True)
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), daemon=True, name="heartbeat")
        beats.start()
        try:
            if received is not None and number == before:
                self._handle(number, received, attempts)
            yield number
        finally:
            ended.set()
            beats.join(2 * HEARTBEAT)
            self._sign_off(number)

    def _sign_off(self, number: int) -> None:
        self.meter.connected(False)
        try:
            self.link.deactivate(number)
        except (UnreachableError, NotAdmittedError, RunOverError, TooLargeError):
            _log.info("signing off failed; the coordinator notices within a minute that this node is gone")

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            try:
                if not self.link.beat():
                    _log.warning("the coordinator no longer knows this node")
            except (UnreachableError, NotAdmittedError, RunOverError, TooLargeError):
                self.meter.retried()
            except Exception as error:  # of any kind: without heartbeats the coordinator would count this node as gone
                self.meter.retried()
                _log.error("a heartbeat failed, next attempt in %.0f s: %s", HEARTBEAT, type(error).__name__)

    def _messages(self, number: int) -> None:
        while not self.stop.is_set():
            asked = time.monotonic()
            received = self._insist(self.link.receive, math.inf)
            if received is not None:
                self._handle(number, received, 0)
            elif time.monotonic() - asked < _QUICK:
                self.stop.wait(_PAUSE)

    def _handle(self, number: int, received: Received, attempts: int) -> None:
        """Answer one message, unless its run is over or its time is up."""
        started = time.monotonic()
        within = started + received.header.metadata.ttl
        confirmed = False
        # Stored before it is answered, with the attempt counted: a message that kills the process is not retried for
        # ever.
        self.note.write(number, received, attempts + 1)
        try:
            reply = self._reply(received, attempts, within)
            try:
                confirmed = self._insist(lambda: self.link.send(reply), within)
            except TooLargeError:
                _log.error(
                    "the answer is larger than the coordinator accepts, or than what is left of this site's quota; "
                    "a failure is sent instead"
                )
                confirmed = self._insist(lambda: self.link.send(reply_to(received, _TOO_LARGE)), within)
        except RunOverError:
            _log.info("the coordinator no longer waits for the answer to the last message; the answer is dropped")
        else:
            self.meter.answered(received.header.metadata.message_type, time.monotonic() - started)
            self.arrived()
        # Removed only now: a crash before the answer arrived must send it again.
        self.note.write(number)
        # May fail: confirming frees space at the coordinator, which frees it at the end of the run in any case.
        if not confirmed:
            with suppress(RunOverError, UnreachableError):
                self.link.confirm(received)

    def _reply(self, received: Received, attempts: int, within: float) -> Reply:
        if attempts >= _MOST_ATTEMPTS:
            _log.error("this site was stopped %d times while it answered one message, and now refuses it", attempts)
            return reply_to(received, _STOPPED)
        try:
            asked = self._insist(lambda: self.link.fetch(received), within)
        except ProtocolError as error:
            return reply_to(received, Failure("ProtocolError", error.message, error.hint))
        with awaited(within - _SPARED):
            return reply_to(received, self.answer(lambda: asked))

    def _insist(self, action: Callable[[], _T], within: float) -> _T:
        """Repeat an action until the coordinator has accepted it.

        Raises:
            RunOverError: The message's time was up before that.
            UnreachableError: The node was stopped.
        """
        wait = _FIRST_WAIT
        while True:
            try:
                return action()
            except UnreachableError as error:
                if self.stop.is_set():
                    raise
                if time.monotonic() > within:
                    raise RunOverError from None
                self.meter.retried()
                _warn(error)
                self.stop.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)


def _warn(error: UnreachableError | RunOverError | TooLargeError) -> None:
    """Log that the coordinator cannot be reached, or, as a refusal, that another server answers in its place."""
    if isinstance(error, UntrustedError):
        extra = {"event": "refused", "reason": "the coordinator is not to be trusted", "peer": "coordinator"}
        _log.warning("refused: %s", error, extra=extra)
    else:
        _log.warning("the coordinator cannot be reached; trying again: %s", error or type(error).__name__)
