"""The resident site: takes messages one at a time, has them answered, sends the answers, and survives both ends.

A message is noted on disk before it is answered and forgotten after its answer has arrived, so a site that is
killed takes it up again. That cannot release anything twice: what a round releases is charged once, and a second
request for it gets the same bytes. Nothing here looks into a message.
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
from privet.common.errors import ProtocolError, StateError
from privet.common.files import write_durably
from privet.common.refusals import sparing
from privet.common.study.messages import Failure, Message

_log = logging.getLogger("privet.site.node")
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
# A coordinator that answers "nothing" at once, instead of after a while, is asked again after this.
_PAUSE, _QUICK = 0.1, 0.5
_MOST_ATTEMPTS = 2
_STOPPED = Failure("InternalError", "the site was stopped while it answered", "the site's own log says why")
_TOO_LARGE = Failure("ProtocolError", "the answer is larger than the coordinator takes", "")
_T = TypeVar("_T")

Answer = Callable[[Callable[[], Message]], Message]
"""Answers the message that the function given returns."""


class Meter(Protocol):
    """Counts what the node does; no data."""

    def answered(self, kind: str, seconds: float) -> None:
        """Count one answer, by its kind."""

    def connected(self, up: bool) -> None:
        """Note whether the coordinator takes this node."""

    def retried(self) -> None:
        """Count one attempt that has to be repeated."""


@dataclass(frozen=True)
class NodeState:
    """What a site keeps on disk beside its key: its number at the coordinator, and the message under way."""

    path: Path

    def read(self) -> tuple[int | None, Received | None, int]:
        """Return the node's number, the message under way, and how often it was taken up.

        Raises:
            StateError: The file is there but cannot be read.
        """
        if not self.path.is_file():
            return None, None, 0
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            node, attempts = int(document["node"]), int(document.get("attempts", 0))
            message = document.get("message")
            return node, None if message is None else Received.from_bytes(b64decode(message)), attempts
        except (ValueError, KeyError, TypeError, AttributeError):
            hint = "delete it: a message under way is then answered by nobody"
            raise StateError(f"{self.path} cannot be read", hint) from None

    def write(self, node: int, received: Received | None = None, attempts: int = 0) -> None:
        """Replace the note, durably."""
        document: dict[str, int | str] = {"node": node}
        if received is not None:
            document |= {"attempts": attempts, "message": b64encode(received.to_bytes()).decode("ascii")}
        write_durably(self.path, json.dumps(document).encode())


@dataclass
class Connection:
    """A site's connection to its coordinator, for as long as it is to serve.

    Attributes:
        stop: Set from outside; the node then finishes at the next opportunity and signs off.
    """

    link: FleetLink
    answer: Answer
    note: NodeState
    meter: Meter
    stop: threading.Event = field(default_factory=threading.Event)

    def serve(self) -> None:
        """Serve until told to stop. Comes back by itself after whatever the network or the coordinator did."""
        # The coordinator, or whoever answers in its place, can have each of these lines written without end.
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
                    "the coordinator does not admit this node (%s): it is not registered, was removed, its clock is "
                    "off by minutes, or an earlier connection of it still counts, for 60 seconds at most",
                    error,
                )
                wait = _LONGEST_WAIT / 3
            except (UnreachableError, RunOverError, TooLargeError) as error:
                self.meter.connected(False)
                _warn(error)
            self.meter.retried()
            self.stop.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    @contextmanager
    def _signed_on(self) -> Iterator[int]:
        """Sign on, send heartbeats in the background, also while a message is answered, and sign off at the end."""
        before, received, attempts = self.note.read()
        number = self.link.activate(before)
        if number != before:
            self.note.write(number)  # an earlier message was for a node that is no more
        _log.info("connected", extra={"node": number})
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
            _log.info("could not sign off; the coordinator notices within a minute")

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            try:
                if not self.link.beat():
                    _log.warning("the coordinator does not know this node any longer")
            except (UnreachableError, NotAdmittedError, RunOverError, TooLargeError):
                self.meter.retried()

    def _messages(self, number: int) -> None:
        while not self.stop.is_set():
            asked = time.monotonic()
            received = self._insist(self.link.receive, math.inf)
            if received is not None:
                self._handle(number, received, 0)
            elif time.monotonic() - asked < _QUICK:
                self.stop.wait(_PAUSE)

    def _handle(self, number: int, received: Received, attempts: int) -> None:
        """Answer one message, unless nobody waits for the answer any longer."""
        started = time.monotonic()
        within = started + received.header.metadata.ttl
        self.note.write(number, received, attempts + 1)
        try:
            reply = self._reply(received, attempts, within)
            try:
                self._insist(lambda: self.link.send(reply), within)
            except TooLargeError:
                _log.error("the coordinator takes no answer of this size")
                self._insist(lambda: self.link.send(reply_to(received, _TOO_LARGE)), within)
        except RunOverError:
            _log.info("nobody waits for the answer to the last message any longer; it is dropped")
        else:
            self.meter.answered(received.header.metadata.message_type, time.monotonic() - started)
        self.note.write(number)
        # It only frees space at the coordinator, which frees it at the end of the run in any case.
        with suppress(RunOverError, UnreachableError):
            self.link.confirm(received)

    def _reply(self, received: Received, attempts: int, within: float) -> Reply:
        if attempts >= _MOST_ATTEMPTS:
            _log.error("this site was stopped %d times while it answered one message; it refuses it", attempts)
            return reply_to(received, _STOPPED)
        try:
            asked = self._insist(lambda: self.link.fetch(received), within)
        except ProtocolError as error:
            return reply_to(received, Failure("ProtocolError", error.message, error.hint))
        return reply_to(received, self.answer(lambda: asked))

    def _insist(self, action: Callable[[], _T], within: float) -> _T:
        """Repeat an action until the coordinator has taken it in.

        Raises:
            RunOverError: It did not before the message's time was up.
            UnreachableError: The node was told to stop.
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
    """Write down that the coordinator cannot be reached, and apart from it that somebody else answers in its place."""
    if isinstance(error, UntrustedError):
        extra = {"event": "refused", "reason": "the coordinator is not to be trusted", "peer": "coordinator"}
        _log.warning("refused: %s", error, extra=extra)
    else:
        _log.warning("the coordinator cannot be reached, trying again: %s", error or type(error).__name__)
