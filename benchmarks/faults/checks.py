"""The invariants that must hold after any fault. They are checked on the files on disk when all processes are dead.

* I1: no release and no draw without a charge. The ledger of a site has charged every update before the site begins to
  send it, and every round before its first random draw.
* I2: one payload per charge. All that was masked or sent for a round has one digest, the charged one, and one mask. A
  site draws for a round once.
* I3: the log is complete, its statements are valid at their positions, and every cosigned checkpoint belongs to it.
* I4: the adapter of the state and the published adapter are those of the last round-close. If all sites were in every
  round, and trained each round once, their bits equal those of an undisturbed run.
* I5: no unmasking for fewer sites than the threshold, and one list of survivors per round.
* I6: the charges compose to at most the limit, and no round is charged twice.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from faults.process import read_events
from faults.world import RUN, World
from privet.client.budget.ledger import Ledger
from privet.client.budget.releases import limit_of
from privet.client.rounds.logbook import open_witness
from privet.client.site import SiteConfig, load_site
from privet.common.audit.release import ADAPTER
from privet.common.audit.verify import Verdict, verify_bundle
from privet.common.errors import PrivetError
from privet.common.log.checkpoint import open_checkpoint
from privet.common.study.adapter import Adapter, read_layout
from privet.server.consortium.coordinator import open_coordinator
from privet.server.log.roundlog import open_log
from privet.server.rounds.run_log import RELEASE
from privet.server.rounds.state import RunDirectory, RunState

Events = Sequence[Mapping[str, Any]]
_UPLOADS = ("mask", "update")


@dataclass(frozen=True)
class Charge:
    """A charge in the ledger of a site. The payload is empty where the round began and no update was stored."""

    site: str
    round: int
    payload: str


@dataclass(frozen=True)
class Remains:
    """The files on disk after a run.

    Attributes:
        world: The consortium.
        events: The events of its processes.
        state: The state of the run.
        charges: The charges of all sites.
    """

    world: World
    events: Events
    state: RunState
    charges: tuple[Charge, ...]

    @property
    def ends(self) -> dict[int, Mapping[str, Any]]:
        """The statement of each round."""
        return {statement["round"]: statement for statement in self.state.statements}

    @property
    def released(self) -> bool:
        """Whether the run has published its release."""
        return (self.world.run / RELEASE / ADAPTER).exists()

    @property
    def undisturbed(self) -> bool:
        """Whether all sites were in every round, and trained each round once."""
        whole = all(len(end["survivors"]) == self.world.kind.sites for end in self.ends.values())
        trained = [(event["who"], event["round"]) for event in self.events if event["what"] == "training"]
        return whole and self.state.stopped and len(set(trained)) == len(trained)

    @property
    def wasted(self) -> int:
        """Number of charges for a round whose sum does not contain the update of the site."""
        ends = self.ends
        return sum(charge.site not in ends.get(charge.round, {"survivors": ()})["survivors"] for charge in self.charges)

    @property
    def duplicates(self) -> int:
        """Number of answers and updates that were repeated with the same bytes."""
        said = [(e["who"], e["round"], e["stage"], e["asked"], e["said"]) for e in self.events if _secured(e)]
        sent = [(e["who"], e["round"], e["digest"]) for e in self.events if e["what"] == "payload"]
        return sum(len(each) - len(set(each)) for each in (said, sent))


def _secured(event: Mapping[str, Any]) -> bool:
    return (event["what"], event.get("reply")) == ("answered", "secured")


def remains_of(world: World) -> Remains:
    """Read the files on disk."""
    charges = [charge for site in sites_of(world) for charge in charges_of(site)]
    return Remains(world, read_events(world.folder), RunDirectory.open(world.run).load(), tuple(charges))


def sites_of(world: World) -> list[SiteConfig]:
    """Return the sites' configurations."""
    return [load_site(world.site_file(name)) for name in world.kind.names]


def charges_of(site: SiteConfig) -> Iterator[Charge]:
    """Yield the charges in the ledger of a site, one for each round that began."""
    if site.ledger is None:
        raise ValueError("the site has no ledger")
    with closing(sqlite3.connect(f"{site.ledger.as_uri()}?mode=ro", uri=True)) as database:
        for number, payload in database.execute(
            "SELECT b.round, c.payload FROM entries b LEFT JOIN entries c ON c.kind = 'charge' "
            "AND (c.dataset, c.study, c.round) = (b.dataset, b.study, b.round) WHERE b.kind = 'begin'"
        ):
            yield Charge(site.name, number, payload or "")


def violations(remains: Remains, reference: str | None = None, liar: str = "") -> list[str]:
    """Return the violations of I1 to I6. I4 is checked only if the run has ended.

    Args:
        remains: The files on disk.
        reference: Digest of the adapter of an undisturbed run with the same draws; None compares none.
        liar: Name of a malicious site, whose payloads are not checked.
    """
    return [
        *released_uncharged(remains),
        *paid_for_two(remains, liar),
        *log_and_witnesses(remains.world),
        *(adapters(remains, reference) if remains.released else ()),
        *unmaskings(remains),
        *ledgers(remains),
    ]


def released_uncharged(remains: Remains) -> Iterator[str]:
    """Yield violations of I1."""
    began = {(charge.site, charge.round) for charge in remains.charges}
    charged = {(charge.site, charge.round) for charge in remains.charges if charge.payload}
    for event in remains.events:
        if event["what"] == "drawing" and (event["who"], event["round"]) not in began:
            yield f"I1: {event['who']} drew for round {event['round']}, whose cost was not spent"
        sent = event["what"] == "sending" and event["stage"] in _UPLOADS and event["reply"] != "failure"
        if sent and not (event["charged"] and (event["who"], event["round"]) in charged):
            yield f"I1: {event['who']} sent an update of round {event['round']} that was not charged"


def paid_for_two(remains: Remains, liar: str) -> Iterator[str]:
    """Yield violations of I2."""
    payloads: dict[tuple[str, int], set[str]] = defaultdict(set)
    masks: dict[tuple[str, int], set[str]] = defaultdict(set)
    drawn = [(event["who"], event["round"]) for event in remains.events if event["what"] == "drawing"]
    for site, number in {each for each in drawn if drawn.count(each) > 1}:
        yield f"I2: {site} drew {drawn.count((site, number))} times for round {number}"
    for event in remains.events:
        if event["what"] == "payload":
            payloads[event["who"], event["round"]].add(event["digest"])
        if _secured(event) and event["stage"] == "mask":
            masks[event["who"], event["round"]].add(event["said"])
    charged: dict[tuple[str, int], set[str]] = defaultdict(set)
    for charge in remains.charges:
        charged[charge.site, charge.round].add(charge.payload)
    for (site, number), found in payloads.items():
        if site != liar and (len(found) > 1 or not found <= charged[site, number]):
            yield f"I2: {site} used {len(found)} payloads for round {number}, or another than the charged one"
    for (site, number), found in masks.items():
        if len(found) > 1:
            yield f"I2: {site} masked round {number} {len(found)} times"


def log_and_witnesses(world: World) -> Iterator[str]:
    """Yield violations of I3."""
    verdict = audit(world)
    if not verdict.ok:
        yield f"I3: {verdict}"
    made = open_coordinator(world.coordinator)
    with open_log(made.log_directory, made.keys.origin, made.keys.log) as log:
        for site in sites_of(world):
            for note in _heads(site):
                head = open_checkpoint(note, made.keys.public)[0]
                if head.size > log.size or log.root_at(head.size) != head.root:
                    yield f"I3: {site.name} cosigned {head.size} leaves that are not this log's"


def _heads(site: SiteConfig) -> list[bytes]:
    if site.log is None:
        raise ValueError("the site names no log")
    return open_witness(site, site.log).notes()


def audit(world: World) -> Verdict:
    """Verify the log up to the last checkpoint that a quorum cosigned, against the policy of a site."""
    made, site = open_coordinator(world.coordinator), sites_of(world)[0]
    if site.log is None:
        raise ValueError("the site names no log")
    policy = made.members.policy()
    if policy is None:
        raise ValueError("the consortium is not founded")
    with open_log(made.log_directory, made.keys.origin, made.keys.log) as log:
        note = log.accepted(policy)
        if note is None:
            return Verdict("no checkpoint has a quorum")
        size = open_checkpoint(note, made.keys.public)[0].size
        leaves = list(log.leaves())[:size]
    return verify_bundle(lambda: leaves, note, policy)


def adapters(remains: Remains, reference: str | None) -> Iterator[str]:
    """Yield violations of I4."""
    world, state = remains.world, remains.state
    verdict = audit(world)
    found = verdict.history.runs.get(RUN)
    if found is None or found.adapter != state.adapter.digest:
        yield "I4: the state's adapter is not the one of the last round-close"
    for directory in (world.run / "adapter", world.run / RELEASE):
        data = (directory / ADAPTER).read_bytes()
        if Adapter.read(read_layout(data), data).digest != state.adapter.digest:
            yield f"I4: {directory.name} holds another adapter than the state"
    try:
        state.adapter.check_finite("the adapter")
    except PrivetError as error:
        yield f"I4: {error.message}"
    if reference is not None and remains.undisturbed and state.adapter.digest != reference:
        yield "I4: all sites were in every round, and the adapter has other bits than that of an undisturbed run"


def unmaskings(remains: Remains) -> Iterator[str]:
    """Yield violations of I5."""
    lists: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    terms: dict[int, tuple[int, int]] = {}
    revealed: set[int] = set()
    for event in remains.events:
        if event["what"] == "unmasked":
            lists[event["round"]].add(tuple(event["survivors"]))
        if _secured(event):
            if event["stage"] == "advertise":
                terms[event["round"]] = event["threshold"], event["least"]
            if event["stage"] == "confirm":
                lists[event["round"]].add(tuple(event["survivors"]))
            if event["stage"] == "reveal":
                revealed.add(event["round"])
    for number, found in lists.items():
        if len(found) > 1:
            yield f"I5: sites confirmed {len(found)} lists of survivors for round {number}"
        if any(len(each) < max(terms[number]) for each in found):
            yield f"I5: round {number} was to be unmasked for fewer than {max(terms[number])} sites"
    for number in revealed - set(lists):
        yield f"I5: a site revealed its shares in round {number} without having confirmed a list"


def ledgers(remains: Remains) -> Iterator[str]:
    """Yield violations of I6."""
    rows = [(charge.site, charge.round) for charge in remains.charges]
    for name, number in {row for row in rows if rows.count(row) > 1}:
        yield f"I6: {name} charged round {number} twice"
    for site in sites_of(remains.world):
        limit = limit_of(site)
        if site.ledger is None or site.dataset is None or limit is None:
            raise ValueError("the site has no ledger or no limit")
        try:
            ledger = Ledger.open(site.ledger, site.anchor, site.ledger_key)
            ledger.verify()
            spent = ledger.statement(site.dataset, limit).epsilon
            ledger.close()
        except PrivetError as error:
            yield f"I6: the ledger of {site.name}: {error.message}"
            continue
        if not spent <= limit.epsilon:
            yield f"I6: {site.name} spent {spent}, its limit is {limit.epsilon}"
