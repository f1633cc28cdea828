"""The coordinator's transport to the sites over Flower's Grid, with any implementation of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from privet.common.errors import ProtocolError
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import Failure
from privet.common.study.messages import Message as Spoken

Owners = Callable[[], Mapping[int, str]]

_MESSAGE_TYPES = {
    "offer": "query.offer",
    "shown": "query.shown",
    "round-open": "train.update",
    "secured": "train.secured",
}


class GridExchange:
    """An `Exchange` over Flower's Grid. Polls by itself: Flower's own loop sleeps for seconds between polls."""

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

    def nodes(self) -> Sequence[int]:
        """Return the ids of the nodes that are online, in ascending order."""
        return sorted(self._grid.get_node_ids())

    def ask(self, requests: Mapping[int, Spoken], *, timeout: float) -> Iterator[tuple[int, Spoken]]:
        """Send one message to each node; yield the replies as they arrive, until all have or the timeout has passed."""
        if not requests:
            return
        messages = [
            Message(pack(request), dst_node_id=node, message_type=_MESSAGE_TYPES[request.kind], ttl=timeout + 60)
            for node, request in sorted(requests.items())
        ]
        # Replies are matched by the message that they answer: a failing node's reply names the SuperLink as its source.
        # The SuperLink gives no id to a message for a node that has just left, and an empty list if they are too large.
        ids = list(self._grid.push_messages(messages)) or [""] * len(messages)
        pushed = list(zip(ids, sorted(requests), strict=True))
        waiting = {identity: node for identity, node in pushed if identity}
        lost = Failure(
            "FlowerError", "the message could not be delivered to the site", "see the coordinator's application log"
        )
        yield from ((node, lost) for identity, node in pushed if not identity)
        deadline = time.monotonic() + timeout
        owners = None if self._owners is None else self._owners()
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    answer = _read(reply)
                    yield node, answer if owners is None else _own(answer, owners.get(node))
            if waiting and time.monotonic() >= deadline:
                return
            if waiting:
                time.sleep(self._poll)


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
            f"the site's process failed with Flower's error code {reply.error.code}",
            "see the site's application log",
        )
    try:
        return unpack(reply.content)
    except ProtocolError as error:
        return Failure("ProtocolError", error.message, error.hint)
