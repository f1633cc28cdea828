"""Tensors that no round changes are sent to a site once. Afterwards it gets what sites train alone.

The message states the digest of the whole adapter. A site completes the adapter with its copy, or makes the tensors
from base and seed, and compares the digest. A site that cannot, or that is of a version which knows whole adapters
only, answers with a failure before it spends anything. It is then sent the whole adapter in the same round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from privet.common.errors import ProtocolError, VerificationError
from privet.common.study.messages import Failure, Message, RoundOpen
from privet.server.exchange import Exchange
from privet.server.rounds.participants import Participant
from privet.server.rounds.state import RunState

# Failures in a row after which a site gets whole adapters only.
_MOST_FAILURES = 2
_UNUSABLE = (ProtocolError.__name__, VerificationError.__name__)


@dataclass
class Copies:
    """Which sites of a run need no whole adapter.

    Attributes:
        sites: Those whose update was in the sum of a closed round. So a run that is resumed sends what it would have
            sent without the interruption.
        failures: Parts in a row that a node could not use.
    """

    sites: set[str] = field(default_factory=set)
    failures: dict[int, int] = field(default_factory=dict)
    _seen: int = 0

    def over(
        self, exchange: Exchange, state: RunState, method: str, participants: Mapping[str, Participant]
    ) -> Exchange:
        """Return an exchange that sends less of the state's adapter, where the aggregation method allows it."""
        if not state.adapter.spec.frozen(method):
            return exchange
        for statement in state.statements[self._seen :]:
            self.sites.update(statement["survivors"])
        self._seen = len(state.statements)
        nodes = {each.node for name, each in participants.items() if name in self.sites}
        able = {node for node in nodes if self.failures.get(node, 0) < _MOST_FAILURES}
        return Sparing(exchange, state.adapter.part(method).data, able, self.failures)


@dataclass(frozen=True)
class Sparing:
    """An exchange that sends what sites train alone to sites that have the rest.

    Attributes:
        exchange: The transport.
        part: Bytes of what sites train.
        able: Nodes that get the part.
        failures: Parts in a row that a node could not use.
    """

    exchange: Exchange
    part: bytes = field(repr=False)
    able: Collection[int]
    failures: dict[int, int]

    def nodes(self) -> Sequence[int]:
        """Return the addresses that are online now."""
        return self.exchange.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        """Send one message to each address and yield the replies.

        Addresses that could not use the part are asked again after the others, and have `timeout` seconds anew.
        """
        parts = {
            node: replace(request, adapter=self.part)
            for node, request in requests.items()
            if node in self.able and isinstance(request, RoundOpen)
        }
        again: dict[int, Message] = {}
        for node, reply in self.exchange.ask({**requests, **parts}, timeout=timeout):
            if node in parts and isinstance(reply, Failure) and reply.error in _UNUSABLE:
                self.failures[node] = self.failures.get(node, 0) + 1
                again[node] = requests[node]
                continue
            if node in parts:
                self.failures.pop(node, None)
            yield node, reply
        if again:
            yield from self.exchange.ask(again, timeout=timeout)
