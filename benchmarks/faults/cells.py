"""The fault matrix as data: the faults, the points of a round at which they happen, and the expected outcomes.

A cell names points. The seed chooses one of them, the victim and the round. The outcome of the round is one of: "all"
(its sum contains all sites), "without" (all sites but the victim), "aborted" (no sum; the adapter stays).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faults.play import COORDINATOR
from faults.process import WAITS, Fault
from faults.study import ROUNDS
from faults.world import KINDS, Kind

Faults = Mapping[str, Sequence[Fault]]
_SEND = "privet.client.network.fleet:FleetLink.send"
_ANSWER = "privet.client.rounds.answers:_answer"
_SITE = "privet.common.secagg.site:"
_WORKER = "privet.client.rounds.worker:"
_RELEASES = "privet.client.budget.releases:Releases."
_LOG = "privet.server.log.roundlog:RoundLog."
_RECORD = "privet.server.rounds.run_log:RunLog."
_RUN = "privet.server.rounds.state:RunDirectory."
_ADMIT = "privet.common.secagg.coordinator:Aggregator.admit"


@dataclass(frozen=True)
class Draw:
    """The choices of a seed.

    Attributes:
        kind: The consortium.
        seed: The seed.
        victim: The site with the fault.
        round: The round with the fault.
    """

    kind: Kind
    seed: int
    victim: str
    round: int


def draw(kind: Kind, seed: int, cell: str) -> Draw:
    """Choose victim and round. Two consecutive seeds choose different rounds."""
    chosen = random.Random(f"{cell} {seed}")  # noqa: S311 - chooses cases
    return Draw(kind, seed, chosen.choice(kind.names), 1 + seed % ROUNDS)


@dataclass(frozen=True)
class Point:
    """A point before or after a call that happens `each` times per round, after `first` calls before round 1."""

    target: str
    moment: str
    stage: str = ""
    each: int = 1
    first: int = 0

    def fault(self, drawn: Draw, action: str = "kill", amount: float = 0.0) -> Fault:
        """Return the fault at this point in the drawn round."""
        within = random.Random(drawn.seed).randrange(self.each)  # noqa: S311 - chooses cases
        calls = self.first + (drawn.round - 1) * self.each + 1 + within
        return Fault(action, self.target, self.moment, calls, self.stage, amount)


@dataclass(frozen=True)
class Cell:
    """One fault.

    Attributes:
        name: Name in the table.
        what: Description of the fault, for the table.
        kind: The kind of consortium.
        expects: Allowed outcomes of the round with the fault.
        faults: Returns the faults of each process for the choices of a seed.
        charged: False if the victim must not be charged for the round; if the round is aborted, no site.
        others: Allowed outcomes of the other rounds.
        waits: Seconds that the coordinator waits for sites to connect, to train, and to answer another step.
        round: The round with the fault, if the seed does not choose it.
        script: Fault from outside: "second", "stranger", "fork", "old ledger", "proxy"; empty: none.
        disk: Owner of a directory on a small disk of its own: "victim" or "coordinator".
        liar: Whether the victim is malicious.
    """

    name: str
    what: str
    kind: str
    expects: tuple[str, ...]
    faults: Callable[[Draw], Faults]
    charged: bool = True
    others: tuple[str, ...] = ("all",)
    waits: tuple[float, float, float] = WAITS
    round: int | None = None
    script: str = ""
    disk: str = ""
    liar: bool = False

    def draw(self, seed: int) -> Draw:
        """Return what a seed chooses for this cell."""
        drawn = draw(KINDS[self.kind], seed, self.name)
        return drawn if self.round is None else Draw(drawn.kind, seed, drawn.victim, self.round)


def one_of(points: Sequence[Point], drawn: Draw) -> Point:
    """Choose a point. Of two points, each is chosen for two consecutive seeds, so that it meets both rounds."""
    return points[drawn.seed // ROUNDS % len(points)] if len(points) <= ROUNDS else points[drawn.seed % len(points)]


def killed(*points: Point, who: str = "") -> Callable[[Draw], Faults]:
    """Return faults that kill the victim, or `who`, at one of these points."""
    return lambda drawn: {who or drawn.victim: [one_of(points, drawn).fault(drawn)]}


def befallen(action: str, point: Point, who: str = "", **more: Any) -> Callable[[Draw], Faults]:
    """Return the fault of another action for the victim, or `who`, at a point."""
    return lambda drawn: {who or drawn.victim: [point.fault(drawn, action, **more)]}


def both(target: str, **more: Any) -> tuple[Point, Point]:
    """Return the points before and after a call."""
    return Point(target, "before", **more), Point(target, "after", **more)


def sending(stage: str) -> tuple[Point, Point]:
    """Return the points before and after an answer is sent."""
    return both(_SEND, stage=stage)


def taking_in(stage: str) -> tuple[Point, Point]:
    """Return the points before and after the coordinator admits one of three answers."""
    return both(_ADMIT, stage=stage, each=3)


_COORDINATOR = (
    Cell(
        "coordinator: round-open durable, no quorum yet",
        "killed with the round in its log and before a quorum of cosignatures is",
        "three",
        ("all",),
        killed(Point(_LOG + "checkpoint", "after"), Point(_LOG + "cosign", "before"), who=COORDINATOR),
    ),
    Cell(
        "coordinator: round-open cosigned",
        "killed after the quorum, before any site was asked into the round",
        "three",
        ("aborted",),
        killed(Point(_LOG + "cosign", "after"), Point(_RECORD + "open", "after"), who=COORDINATOR),
        charged=False,
    ),
    Cell(
        "coordinator: collecting keys and shares",
        "killed around taking in a site's keys or shares",
        "three",
        ("aborted",),
        killed(*taking_in("advertise"), *taking_in("share"), who=COORDINATOR),
        charged=False,
    ),
    Cell(
        "coordinator: collecting masked updates",
        "killed around taking in a site's masked update",
        "three",
        ("aborted",),
        killed(*taking_in("mask"), who=COORDINATOR),
    ),
    Cell(
        "coordinator: collecting confirmations and reveals",
        "killed around taking in a site's confirmation or reveal",
        "three",
        ("aborted",),
        killed(*taking_in("confirm"), *taking_in("reveal"), who=COORDINATOR),
    ),
    Cell(
        "coordinator: sum known, nothing durable",
        "killed after unmasking, before the state is stored",
        "three",
        ("aborted",),
        killed(
            Point("privet.common.secagg.coordinator:Aggregator.total", "after"),
            Point(_RUN + "store", "before", first=1),
            who=COORDINATOR,
        ),
    ),
    Cell(
        "coordinator: state durable, round-close not",
        "killed between storing the state and logging the end of the round",
        "three",
        ("all",),
        killed(Point(_RUN + "store", "after", first=1), Point(_RECORD + "close", "before"), who=COORDINATOR),
    ),
    Cell(
        "coordinator: round-close durable, not published",
        "killed after logging the end of the round, before anybody saw it",
        "three",
        ("all",),
        killed(Point(_RECORD + "close", "after"), who=COORDINATOR),
    ),
    Cell(
        "coordinator: release",
        "killed around publishing what the run has come to",
        "three",
        ("all",),
        killed(
            *both(_RECORD + "release"),
            Point(_RECORD + "_export", "after"),
            Point(_RUN + "publish", "before", first=3),
            Point(_LOG + "publish", "after", first=2),
            who=COORDINATOR,
        ),
        round=1,
    ),
    Cell(
        "plain: coordinator collecting updates",
        "killed around taking in an update that travels in the clear",
        "plain",
        ("all",),
        killed(*both("privet.server.log.journal:Journal.hear_round", each=3), who=COORDINATOR),
    ),
)

_KILLED_SITES = (
    Cell(
        "site: consenting or cosigning",
        "killed around consent, around cosigning, and around sending either",
        "four",
        ("all",),
        killed(
            *both("privet.client.rounds.logbook:Logbook.cosign"),
            *sending("shown"),
            Point(_WORKER + "Worker.offer", "after"),
        ),
    ),
    Cell(
        "site: making keys",
        "killed around making the round's keys, before they are sent",
        "four",
        ("all",),
        killed(*both(_WORKER + "Worker.advertise"), Point(_SEND, "before", stage="advertise")),
    ),
    Cell(
        "site: keys sent, sharing",
        "killed after sending its keys, whose secrets are gone then, and around making and sending shares",
        "four",
        ("without",),
        killed(Point(_SEND, "after", stage="advertise"), *both(_SITE + "share"), *sending("share")),
        charged=False,
    ),
    Cell(
        "site: before its first draw",
        "killed around reserving, before the round's cost is spent",
        "four",
        ("without",),
        killed(*both(_RELEASES + "reserve"), Point(_RELEASES + "begin", "before")),
        charged=False,
    ),
    Cell(
        "site: drawing, in training",
        "killed after the round's cost is spent, around training, before the update is stored",
        "four",
        ("without",),
        killed(
            Point(_RELEASES + "begin", "after"),
            Point(_WORKER + "train_round", "after"),
            Point(_RELEASES + "charge", "before"),
        ),
    ),
    Cell(
        "site: charged, not sent",
        "killed after charging, around masking, before sending",
        "four",
        ("without",),
        killed(Point(_RELEASES + "charge", "after"), *both(_SITE + "mask"), Point(_SEND, "before", stage="mask")),
    ),
    Cell(
        "site: update sent, not acknowledged",
        "killed right after sending its masked update, around confirming",
        "four",
        ("all",),
        killed(Point(_SEND, "after", stage="mask"), *both(_SITE + "confirm"), *sending("confirm")),
    ),
    Cell(
        "site: unmasking",
        "killed around revealing its shares",
        "four",
        ("all",),
        killed(*both(_SITE + "reveal"), *sending("reveal")),
    ),
    Cell(
        "site: one of three",
        "killed after its keys are sent, where no site can be spared",
        "three",
        ("aborted",),
        killed(
            Point(_SITE + "share", "after"),
            Point(_RELEASES + "reserve", "after"),
            Point(_RELEASES + "charge", "after"),
            Point(_SEND, "before", stage="mask"),
        ),
    ),
    Cell(
        "plain: site before its first draw",
        "killed after reserving, where updates travel in the clear; it trains when it is asked again",
        "plain",
        ("all",),
        killed(Point(_RELEASES + "reserve", "after"), Point(_RELEASES + "begin", "before")),
    ),
    Cell(
        "plain: site drawing, in training",
        "killed after the round's cost is spent, where updates travel in the clear and no site can be spared",
        "plain",
        ("aborted",),
        killed(Point(_RELEASES + "begin", "after"), Point(_WORKER + "train_round", "after")),
    ),
    Cell(
        "plain: site charged, around sending",
        "killed after charging, before and after sending",
        "plain",
        ("all",),
        killed(Point(_RELEASES + "charge", "after"), *sending("update")),
    ),
)

_MESSAGES = (
    Cell(
        "slow site",
        "its masked update is sent after the deadline",
        "four",
        ("without",),
        befallen("stall", Point(_SEND, "before", stage="mask"), amount=8.0),
        waits=(WAITS[0], 5.0, WAITS[2]),
    ),
    Cell(
        "duplicated messages",
        "every message is delivered twice and every answer sent twice, at the victim; or every request at all sites",
        "three",
        ("all",),
        lambda drawn: {drawn.victim: [Fault("repeat")]} if drawn.seed % 2 else {COORDINATOR: [Fault("ask_twice")]},
    ),
    Cell(
        "replayed message",
        "an answer is the one of the round before",
        "four",
        ("without",),
        lambda drawn: {
            drawn.victim: [
                Fault("replay", _ANSWER, "after", count=0, stage=("advertise", "share", "mask")[drawn.seed % 3])
            ]
        },
        round=2,
    ),
    Cell(
        "reordered messages",
        "every site answers after a time of its own",
        "three",
        ("all",),
        lambda drawn: {name: [Fault("jitter", _SEND, "before", count=0, amount=0.3)] for name in drawn.kind.names},
    ),
    Cell(
        "corrupted on the way",
        "a network that flips bits and cuts connections between a site and the coordinator",
        "three",
        ("all",),
        lambda drawn: {},
        others=("all",),
        script="proxy",
    ),
    Cell(
        "corrupted at the end",
        "one bit of a signed answer is flipped before it is packed",
        "four",
        ("without",),
        lambda drawn: {
            drawn.victim: [
                Point(_ANSWER, "after", stage=("advertise", "share", "mask")[drawn.seed % 3]).fault(drawn, "garble")
            ]
        },
    ),
    Cell(
        "update that is not finite",
        "training gives NaN",
        "four",
        ("without",),
        befallen("nan", Point(_WORKER + "train_round", "after")),
    ),
    Cell(
        "plain: a site that lies",
        "NaN, or a million times what was trained, is sent in the clear",
        "plain",
        ("all",),
        lambda drawn: {
            drawn.victim: [
                Point(_WORKER + "Worker._contribution", "after").fault(drawn, ("nan", "enlarge")[drawn.seed // 2 % 2])
            ]
        },
        liar=True,
    ),
)

_PLACES = (
    Cell(
        "disk full at a site",
        "no byte is left around reserving, charging and taking the masking step, and for two seconds",
        "four",
        ("without",),
        lambda drawn: {
            drawn.victim: [
                one_of(
                    (
                        Point(_RELEASES + "reserve", "before"),
                        Point(_RELEASES + "charge", "before"),
                        Point(_SITE + "mask", "before"),
                    ),
                    drawn,
                ).fault(drawn, "fill", 2.0)
            ]
        },
        others=("all", "without"),  # a round may begin and end while the disk is still full
        disk="victim",
    ),
    Cell(
        "disk full at the coordinator",
        "no byte is left around appending to the log or storing the state; it ends, and comes back with space",
        "three",
        ("all", "aborted"),
        lambda drawn: {
            COORDINATOR: [
                one_of(
                    (
                        Point(_LOG + "append", "before", each=3, first=1),
                        Point(_RUN + "store", "before", first=1),
                        Point(_RECORD + "close", "before"),
                    ),
                    drawn,
                ).fault(drawn, "fill")
            ]
        },
        disk="coordinator",
    ),
    Cell(
        "certificate of the coordinator",
        "expired, not valid yet, or another authority's, until it is started again",
        "three",
        ("all",),
        lambda drawn: {COORDINATOR: [Fault("misissue", note=("late", "early", "foreign")[drawn.seed % 3])]},
        waits=(2.5, *WAITS[1:]),
    ),
    Cell(
        "no root or node key at a site",
        "a site starts without the file; it is put back",
        "three",
        ("all",),
        lambda drawn: {drawn.victim: [Fault("hide", note=("consortium/root.pem", "keys/node")[drawn.seed % 2])]},
    ),
    Cell("stranger", "a node whose key nobody admitted connects", "three", ("all",), lambda d: {}, script="stranger"),
    Cell(
        "revoked site",
        "revoked after the first round",
        "four",
        ("without",),
        lambda drawn: {
            COORDINATOR: [Fault("revoke", _RECORD + "close", "after", note=drawn.victim)],
        },
        charged=False,
        round=2,
    ),
    Cell(
        "clock minutes off",
        "a site's clock is four minutes behind; or ten minutes ahead, and set right after five seconds",
        "three",
        ("all",),
        lambda drawn: {
            drawn.victim: [
                Fault("misdate", amount=-240.0) if drawn.seed % 2 else Fault("misdate", amount=600.0, seconds=5)
            ]
        },
    ),
    Cell(
        "clock a day off",
        "a site's clock jumps by a day for a second, before it shares",
        "four",
        ("all", "without"),
        lambda drawn: {
            drawn.victim: [
                Fault("misdate", _SITE + "share", "before", drawn.round, "", 86400.0 * (-1) ** drawn.seed, 1.0)
            ]
        },
        others=("all", "without"),
    ),
    Cell(
        "old ledger",
        "a site's ledger is put back from a backup",
        "four",
        ("without",),
        lambda d: {},
        round=2,
        script="old ledger",
    ),
    Cell(
        "two coordinators",
        "a second one starts on the same directory",
        "three",
        ("all",),
        lambda d: {},
        script="second",
    ),
    Cell(
        "forked log",
        "a coordinator's directory is put back from a backup",
        "three",
        ("all",),
        lambda d: {},
        others=("all", "aborted"),
        round=1,
        script="fork",
    ),
)

NOTHING = {kind: Cell(f"nothing ({kind})", "nothing", kind, ("all",), lambda drawn: {}) for kind in KINDS}
CELLS: tuple[Cell, ...] = (*_COORDINATOR, *_KILLED_SITES, *_MESSAGES, *_PLACES)
