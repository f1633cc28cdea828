"""The coordinator's transport to the sites: send messages, collect replies until a deadline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from privet.common.study.messages import Message


class Exchange(Protocol):
    """A transport. Implemented on Flower's Grid (`privet.server.network.grid`), and by tests in memory."""

    def nodes(self) -> Sequence[int]:
        """Return the addresses that are online now, in ascending order."""

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        """Send one message to each address and yield the replies as they arrive, within `timeout` seconds.

        An address that does not answer is left out; one that fails answers with `Failure`. No address is yielded twice.
        An offer may be repeated while its answer is due; a transport that keeps answers does not send it again.
        """
