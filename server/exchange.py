"""How the coordinator talks to sites: send these messages, collect replies until a deadline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from privet.common.study.messages import Message


class Exchange(Protocol):
    """A transport. Implemented on Flower's Grid (`privet.server.network.grid`), and by tests in memory."""

    def nodes(self) -> Sequence[int]:
        """Return the addresses that can be reached now, in ascending order."""

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        """Send one message to each address and yield the replies as they come, within `timeout` seconds.

        An address that answered nothing is missing; one that failed answers with `Failure`. None comes twice.
        """
