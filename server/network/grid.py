"""The coordinator's transport to the sites over Flower's Grid, with any implementation of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from privet.common.errors import ProtocolError
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import Failure, Offer
from privet.common.study.messages import Message as Spoken

Owners = Callable[[], Mapping[int, str]]

_MESSAGE_TYPES = {
    "offer": "query.offer",
    "shown": "query.shown",
    "round-open": "train.update",
    "secured": "train.secured",
}
_NO_ANSWER = "the site's process did not answer: it hangs, was stopped, or lost its connection"
# By the codes of Flower's `ErrorCode`.
_ERRORS = {
    1: "the site's process could not start its part of the round",
    2: "the site's process failed while it answered",
    3: _NO_ANSWER,
    4: _NO_ANSWER,
    5: _NO_ANSWER,
    8: "the site's process crashed while it answered",
}
# Seconds: how long an offer may wait for its answer, and after how long without a look it is forgotten.
_OFFERED, _FORGOTTEN = 3600.0, 10.0


@dataclass
class _Sent:
    """An offer that is not answered yet: the id of its message, and when an answer was last looked for."""

    offer: Offer
    message: str
    looked: float


class GridExchange:
    """An `Exchange` over Flower's Grid. Polls by itself: Flower's own loop sleeps for seconds between polls.

    An offer that is repeated while its answer is due is not sent again: the first one's answer is waited for. So a
    caller can look often, for a short time each, and a slow site still answers each offer once. An answer belongs to
    the message that it answers; that to an offer that was forgotten is never read.
    """

    def __init__(self, grid: Grid, poll: float = 0.05, owners: Owners | None = None) -> None:
        """Use a grid.

        Args:
            grid: Flower's.
            poll: Seconds between two looks for replies.
            owners: Returns which site each node belongs to; None where nodes belong to nobody in particular.
        """
        self._grid = grid
        self._poll = poll
        self._owners = owners
        self._sent: dict[int, _Sent] = {}

    def nodes(self) -> Sequence[int]:
        """Return the ids of the nodes that are online, in ascending order."""
        nodes = sorted(self._grid.get_node_ids())
        # A node that left may never have read its offer.
        self._sent = {node: sent for node, sent in self._sent.items() if node in nodes}
        return nodes

    def ask(self, requests: Mapping[int, Spoken], *, timeout: float) -> Iterator[tuple[int, Spoken]]:
        """Send one message to each node; yield the replies as they arrive, until all have or the timeout has passed."""
        if not requests:
            return
        waiting = {self._sent[node].message: node for node in requests if self._due(node, requests[node])}
        requests = {node: request for node, request in requests.items() if node not in waiting.values()}
        messages = [
            Message(
                pack(request),
                dst_node_id=node,
                message_type=_MESSAGE_TYPES[request.kind],
                ttl=(_OFFERED if isinstance(request, Offer) else timeout) + 60,
            )
            for node, request in sorted(requests.items())
        ]
        # Replies are matched by the message that they answer: a failing node's reply names the SuperLink as its source.
        # The SuperLink gives no id to a message for a node that has just left, and an empty list if they are too large.
        ids = (list(self._grid.push_messages(messages)) if messages else []) or [""] * len(messages)
        pushed = list(zip(ids, sorted(requests), strict=True))
        waiting |= {identity: address for identity, address in pushed if identity}
        for identity, address in pushed:
            self._sent.pop(address, None)
            request = requests[address]
            if identity and isinstance(request, Offer):
                self._sent[address] = _Sent(request, identity, time.monotonic())
        lost = Failure(
            "FlowerError", "the message could not be delivered to the site", "see the coordinator's application log"
        )
        yield from ((address, lost) for identity, address in pushed if not identity)
        deadline = time.monotonic() + timeout
        owners = None if self._owners is None else self._owners()
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._sent.pop(node, None)
                    answer = _read(reply)
                    yield node, answer if owners is None else _own(answer, owners.get(node))
            if waiting and time.monotonic() >= deadline:
                for sent in (self._sent[each] for each in waiting.values() if each in self._sent):
                    sent.looked = time.monotonic()
                return
            if waiting:
                time.sleep(self._poll)

    def _due(self, node: int, request: Spoken) -> bool:
        """Whether this offer is at the node already, and its answer is still looked for."""
        sent = self._sent.get(node)
        return sent is not None and sent.offer == request and time.monotonic() - sent.looked < _FORGOTTEN


def _own(answer: Spoken, owner: str | None) -> Spoken:
    """Return a node's answer if it speaks for the node's own site, and a failure instead of it otherwise."""
    if owner is not None and getattr(answer, "site", owner) == owner:
        return answer
    return Failure(
        "ProtocolError",
        "the node answered in the name of another site than the one that it belongs to",
        "list the members with `privet coordinator members`; revoke the site whose node this is",
    )


def _read(reply: Message) -> Spoken:
    if reply.has_error():
        return Failure(
            "FlowerError",
            _ERRORS.get(reply.error.code, f"the site's process failed (error code {reply.error.code} of Flower)"),
            "look at the log of `privet site serve SITE` at this site, or restart it there",
        )
    try:
        return unpack(reply.content)
    except ProtocolError as error:
        return Failure("ProtocolError", error.message, error.hint)
