"""What a run waits for, for the person who started it: the stage, and the sites that have not answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from privet.common.log.encoding import shown
from privet.common.progress import duration
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

CONSENT, COSIGN, TRAIN = "consent", "cosign the round log", "train"
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

# Names in a line; the others are counted.
_NAMED = 5


@dataclass(frozen=True)
class Wait:
    """What a run waits for.

    Attributes:
        stage: What the sites are asked to do, as the end of a sentence: `train`.
        round: Number of the round; 0 between rounds.
        needed: How many sites the stage needs; 0 if it waits for each until its deadline.
        answered: Names of the sites that have done it.
        missing: The other sites by name, each with the reason if it is known, such as a refusal; otherwise empty.
        since: When the stage began, in Unix seconds.
    """

    stage: str
    round: int = 0
    needed: int = 0
    answered: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    since: float = 0.0


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


def several(names: Sequence[str]) -> str:
    """Return names as a list; of many, the first few and the number of the others."""
    first = ", ".join(names[:_NAMED])
    return first if len(names) <= _NAMED else f"{first} and {len(names) - _NAMED} others"


def sentence(wait: Wait, now: float) -> str:
    """Return in one line who is waited for, for what, and since when."""
    where = f"round {wait.round}: " if wait.round else ""
    since = f"since {time.strftime('%H:%M', time.localtime(wait.since))} ({duration(now - wait.since)})"
    done, missing = len(wait.answered), list(wait.missing)
    if not missing and not wait.needed:
        return f"{where}every site has answered; computing, {since}"
    count = f"{done} of {done + len(missing)} have"
    if wait.needed:  # only consent needs a number
        agreed = f"{done} of the {wait.needed} sites needed have agreed"
        count = agreed if done else f"none of the {wait.needed} sites needed has agreed yet"
    return f"{where}waiting for {several(missing) or 'sites'} to {wait.stage}, {since}; {count}"


def details(wait: Wait) -> list[str]:
    """Return a line for each site that is missing for a reason."""
    reasons = [(name, shown(why)) for name, why in wait.missing.items()]
    if wait.stage == CONSENT:
        reasons = [(name, why or "connected, has not answered yet") for name, why in reasons]
    return [f"  {name}: {why}" for name, why in reasons if why]
