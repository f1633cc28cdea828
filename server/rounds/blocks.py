"""Rounds of a study whose cohort stays the same: one set-up of secure aggregation for a block of them.

::

    RoundOpen with BlockParameters  ->  Advertise
    Roster                          ->  Links
    LinkDelivery                    ->  Joined
    Step                            ->  Masked     (the sites train here)
    RoundOpen with Step             ->  Masked     (each later round: one exchange)

All sites have joined before the first one trains: a site that cannot costs nobody anything.

A block ends with its last round, when the cohort changes, and with a round that a site missed: a site that restarted
has lost its keys, and would miss the next one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from privet.common.masking.parameters import inputs_of
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.encoding import encode
from privet.common.secagg.messages import Advertise, BlockParameters, Joined, Links, Masked
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Message, RoundOpen
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.masked import Group, Waits, combine, finish, group_of, take
from privet.server.rounds.participants import Participant, RoundSum


class Blocks:
    """The block that a run is in. It is in memory only: a coordinator that restarts begins a new one."""

    def __init__(self) -> None:
        self._live: tuple[BlockAggregator, tuple[int, ...]] | None = None

    def collect(
        self,
        exchange: Exchange,
        study: Study,
        spec: AdapterSpec,
        cohort: Mapping[str, Participant],
        opened: RoundOpen,
        waits: Waits,
    ) -> RoundSum:
        """Run one round's exchanges, with a set-up where it needs one, and return the sum over the cohort.

        Raises:
            StudyError: The cohort is too small for the number of sites that masking has to protect against.
            TooFewSitesError: A site did not stay to the end.
            DivergedError: No site delivered, because training diverged at every one.
        """
        members = {name: cohort[name] for name in sorted(cohort)}
        group = group_of(study, spec, opened, members, BlockAggregator)
        live, self._live = self._live, None
        if live is not None and _goes_on(live, group):
            group.coordinator = live[0]
            inputs = inputs_of(group.study_digest, opened.round, opened.adapter_digest)
            step = encode(group.coordinator.begin(opened.round, inputs))
            take(exchange, [group], Masked, lambda group: _opened(group, step), waits.training)
        else:
            take(exchange, [group], Advertise, Group.proposal, waits.step)
            take(exchange, [group], Links, Group.roster, waits.step)
            take(exchange, [group], Joined, Group.deliveries, waits.step)
            take(exchange, [group], Masked, _first, waits.training)
        total = finish(study, spec, group, cohort)
        if total is not None:
            self._live = group.coordinator, group.nodes
        return combine(study, [(group, total)], opened)


def _goes_on(live: tuple[BlockAggregator, tuple[int, ...]], group: Group[BlockAggregator]) -> bool:
    """Return whether a round can use a block's keys: the same sites at the same addresses, and the same terms."""
    block, nodes = live
    begun, now = block.parameters, group.parameters
    if not isinstance(begun, BlockParameters) or not isinstance(now, BlockParameters) or nodes != group.nodes:
        return False
    same = replace(now, round=begun.round, inputs=begun.inputs, rounds=begun.rounds) == begun
    return same and block.holds(now.round)


def _first(group: Group[BlockAggregator]) -> dict[int, Message]:
    """Return the message that begins a block's first round, by number of the site."""
    step = group.coordinator.begin(group.opened.round, group.parameters.inputs)
    return dict.fromkeys(range(len(group.names)), group.secured(step))


def _opened(group: Group[BlockAggregator], step: bytes) -> dict[int, Message]:
    """Return the message that opens a later round of a block, by number of the site."""
    return {n: replace(group.opened, masking=step, declared=count) for n, count in enumerate(group.declared)}
