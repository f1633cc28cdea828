"""Rounds of a study whose cohort stays the same: one set-up of secure aggregation for a block of them.

Where no site may drop out::

    RoundOpen with BlockParameters  ->  Advertise
    Roster                          ->  Links
    LinkDelivery                    ->  Joined
    Step                            ->  Masked     (the sites train here)
    RoundOpen with Step             ->  Masked     (each later round: one exchange)

All sites have joined before the first one trains: a site that cannot costs nobody anything. The block ends with a round
that a site missed: a site that restarted has lost its keys, and would miss the next one too.

Where drop-outs are tolerated::

    RoundOpen with DealtParameters  ->  Advertise
    Roster                          ->  Deal
    DealDelivery                    ->  Joined
    Expected                        ->  Masked
    RoundOpen with Expected         ->  Masked     (each later round)
    Finish                          ->  Reveal     (all expected sites have sent a vector)
    Survivors                       ->  Confirm    (one has not)
    Proof                           ->  Reveal

A site that misses a round is not expected in the next ones. It is asked again with the next set-up: at once if it has
answered, as a site that restarted does, and otherwise after a few rounds.

A block also ends with its last round, and when the cohort changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from privet.common.errors import ProtocolError
from privet.common.masking.parameters import inputs_of
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.dealt_sums import DealtAggregator
from privet.common.secagg.encoding import encode
from privet.common.secagg.messages import (
    Advertise,
    BlockParameters,
    Confirm,
    Deal,
    DealtParameters,
    Expected,
    Joined,
    Links,
    Masked,
    Parameters,
    Reveal,
    SeveralRounds,
    Step,
)
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Failure, Message, RoundOpen
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.masked import LATE, AnswerKind, Group, Waits, combine, finish, group_of, take
from privet.server.rounds.participants import Participant, RoundSum

# Rounds that a block goes on without a site that does not answer: a set-up waits for it until a deadline.
_PATIENCE = 8
_NOT_EXPECTED = Failure(
    "TooFewSitesError",
    "the site missed an earlier round of the block, or its set-up, and is asked again with the next set-up",
    "check that the site is running and online; the next set-up takes it in",
)
_Block = BlockAggregator | DealtAggregator


@dataclass
class _Live:
    """A block that later rounds can use.

    Attributes:
        block: The coordinator's side.
        nodes: The addresses of its cohort.
        without: Rounds since a site of the cohort was last expected in vain.
    """

    block: _Block
    nodes: tuple[int, ...]
    without: int = 0


class Blocks:
    """The block that a run is in. It is in memory only: a coordinator that restarts begins a new one."""

    def __init__(self) -> None:
        self._live: _Live | None = None

    def collect(
        self,
        exchange: Exchange,
        study: Study,
        spec: AdapterSpec,
        cohort: Mapping[str, Participant],
        opened: RoundOpen,
        waits: Waits,
    ) -> RoundSum:
        """Run one round's exchanges, with a set-up where it needs one, and return the sum.

        Raises:
            StudyError: The cohort is too small for the number of sites that masking has to protect against.
            TooFewSitesError: A site did not stay to the end; where drop-outs are tolerated, too many did not.
            DivergedError: No site delivered, because training diverged at every one.
        """
        members = {name: cohort[name] for name in sorted(cohort)}
        group = group_of(study, spec, opened, members, _aggregator)
        live, self._live = self._live, None
        if live is not None and _goes_on(live, group):
            block = live.block
            group.coordinator = block
            inputs = inputs_of(group.study_digest, opened.round, opened.adapter_digest)
            take(exchange, [group], Masked, lambda group: _opened(group, block, inputs), waits.training)
        else:
            live, block = None, _aggregator(group.parameters)
            group.coordinator = block
            shared: AnswerKind = Deal if isinstance(block, DealtAggregator) else Links
            take(exchange, [group], Advertise, Group.proposal, waits.step)
            take(exchange, [group], shared, Group.roster, waits.step)
            take(exchange, [group], Joined, Group.deliveries, waits.step)
            take(exchange, [group], Masked, lambda group: _first(group, block), waits.training)
        if isinstance(block, DealtAggregator):
            _unmask(exchange, group, block, waits)
        total = finish(study, spec, group, cohort)
        if total is not None:
            self._live = _next(live, group, block)
        return combine(study, [(group, total)], opened)


def _aggregator(parameters: Parameters) -> _Block:
    match parameters:
        case DealtParameters():
            return DealtAggregator(parameters)
        case BlockParameters():
            return BlockAggregator(parameters)
    raise ProtocolError("a study without blocks has no round of one", "report this as a bug")


def _unmask(exchange: Exchange, group: Group, block: DealtAggregator, waits: Waits) -> None:
    """Run the exchanges after the vectors, of a block that tolerates drop-outs."""
    if block.complete:
        take(exchange, [group], Reveal, lambda group: group.each(block.finishes()), waits.step)
    else:
        take(exchange, [group], Confirm, Group.survivors, waits.step)
        take(exchange, [group], Reveal, Group.proofs, waits.step)
    if block.asked:
        for site, name in enumerate(group.names):
            if site not in block.asked:
                group.failures.setdefault(name, _NOT_EXPECTED)


def _next(live: _Live | None, group: Group, block: _Block) -> _Live | None:
    """Return the block for the next round, given that of this one if it was not new; None if a new one is to begin."""
    missed = 0
    if isinstance(block, DealtAggregator) and len(block.expected) < len(group.names):
        gone = {group.names[site] for site in block.asked if site not in block.expected}
        # It answers, so a set-up need not wait for it: it may have restarted, or failed this once.
        if any(group.failures.get(name, LATE) != LATE for name in gone):
            return None
        missed = 1 + (0 if live is None else live.without)
        if missed >= _PATIENCE:
            return None
    return _Live(block, group.nodes, missed)


def _goes_on(live: _Live, group: Group) -> bool:
    """Return whether a round can use a block's keys: the same sites at the same addresses, and the same terms."""
    begun, now = live.block.parameters, group.parameters
    if not isinstance(begun, SeveralRounds) or not isinstance(now, SeveralRounds) or live.nodes != group.nodes:
        return False
    same = replace(now, round=begun.round, inputs=begun.inputs, rounds=begun.rounds) == begun
    return same and live.block.holds(now.round)


def _first(group: Group, block: _Block) -> dict[int, Message]:
    """Return the message that begins a block's first round, by number of the site."""
    step = block.begin(group.opened.round, group.parameters.inputs)
    return dict.fromkeys(_asked(group, step), group.secured(step))


def _opened(group: Group, block: _Block, inputs: bytes) -> dict[int, Message]:
    """Return the message that opens a later round of a block, by number of the site."""
    step = block.begin(group.opened.round, inputs)
    masking = encode(step)
    return {n: replace(group.opened, masking=masking, declared=group.declared[n]) for n in _asked(group, step)}


def _asked(group: Group, step: Step | Expected) -> Sequence[int]:
    return step.sites if isinstance(step, Expected) else range(len(group.names))
