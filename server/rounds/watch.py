"""Watches a run's exchanges: which stage it is at, and which sites have not answered yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from privet.common.secagg.encoding import asks_for_keys, is_kind
from privet.common.secagg.messages import (
    DealDelivery,
    Delivery,
    Expected,
    Finish,
    LinkDelivery,
    Proof,
    Roster,
    Step,
    Survivors,
)
from privet.common.study.messages import Message, Offer, RoundOpen, Secured, Shown
from privet.server.exchange import Exchange
from privet.server.rounds.wait import Wait

COSIGN, TRAIN = "cosign the round log", "train"
_SECURED = {
    Roster: "exchange shares of the masks",
    Delivery: TRAIN,
    LinkDelivery: "check the keys for the masks",
    DealDelivery: "check the keys for the masks",
    Step: TRAIN,
    Expected: TRAIN,
    Finish: "reveal shares of the masks",
    Survivors: "confirm whose updates arrived",
    Proof: "reveal shares of the masks",
}


@dataclass
class Watch:
    """Passes on what a run waits for, by the names of sites.

    Attributes:
        tell: Receives each change.
        owners: Returns which site each address belongs to, where that is known.
        check: Is called again and again while no round is under way: for consent, and for cosignatures. What it raises
            ends the run there, which can be resumed.
    """

    tell: Callable[[Wait], None] = lambda wait: None
    owners: Callable[[], Mapping[int, str]] = dict
    check: Callable[[], None] = lambda: None
    _last: Wait | None = None

    def names(self, nodes: Iterable[int]) -> dict[int, str]:
        """Return a name for each address: its site's, or `unnamed site 1` and so on where nobody has said it."""
        known = self.owners()
        unknown = [node for node in sorted(nodes) if node not in known]
        return {**known, **{node: f"unnamed site {number}" for number, node in enumerate(unknown, 1)}}

    def waits(self, wait: Wait) -> None:
        """Tell what the run waits for now. A stage that is repeated has been waited for since it began."""
        last = self._last
        same = last is not None and (last.stage, last.round) == (wait.stage, wait.round)
        self._last = replace(wait, since=last.since if same and last is not None else time.time())
        if self._last != last:
            self.tell(self._last)

    def over(self, exchange: Exchange) -> Exchange:
        """Return an exchange that tells which answers it waits for."""
        return _Watched(exchange, self)


@dataclass(frozen=True)
class _Watched:
    exchange: Exchange
    watch: Watch

    def nodes(self) -> Sequence[int]:
        self.watch.check()  # they are looked for between rounds alone
        return self.exchange.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        stage, number = _stage(next(iter(requests.values()), None))
        if stage == COSIGN:
            self.watch.check()
        if not stage:
            yield from self.exchange.ask(requests, timeout=timeout)
            return
        names = self.watch.names(requests)
        answered: list[str] = []
        missing = dict.fromkeys(sorted(names[node] for node in requests), "")
        self.watch.waits(Wait(stage, number, 0, (), dict(missing)))
        for node, reply in self.exchange.ask(requests, timeout=timeout):
            if missing.pop(names.get(node, ""), None) is not None:
                answered.append(names[node])
                self.watch.waits(Wait(stage, number, 0, tuple(answered), dict(missing)))
            yield node, reply


def _stage(request: Message | None) -> tuple[str, int]:
    """Return what a request asks of a site, and in which round; nothing for an offer, which is told of as a whole."""
    match request:
        case None | Offer():
            return "", 0
        case Shown():
            return COSIGN, 0
        case RoundOpen():
            return ("send keys for the masks" if asks_for_keys(request.masking) else TRAIN), request.round
        case Secured():
            return next((name for kind, name in _SECURED.items() if is_kind(kind, request.body)), ""), request.round
    return "", 0
