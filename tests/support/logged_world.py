"""Synthetic sites that witness a round log, and a coordinator that writes it: no model, and no transport.

A `LoggedSite` is a `MaskedSite` with the production logbook; the journal, the run log and the rounds are the
production ones. Both outlive their processes, so that a world can be stopped anywhere and gone on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from privet.client.rounds.logbook import OPENINGS, SALT, WITNESS, Logbook, SitePart, Written
from privet.client.rounds.masked import MaskedRounds
from privet.client.rounds.witness import Witness
from privet.common.canonical import digest
from privet.common.errors import RefusedError
from privet.common.log.agreement import promise_of
from privet.common.log.checkpoint import Policy, least_quorum
from privet.common.log.envelope import sign_envelope
from privet.common.log.gate import DAY, stated_bound
from privet.common.log.note import COSIGNATURE, NoteKey
from privet.common.log.statements import (
    CanaryCounts,
    Charge,
    EgressDecision,
    EgressReview,
    Genesis,
    LedgerHead,
    Member,
    StatedFloor,
)
from privet.common.privacy.accounting import plan
from privet.common.study.messages import Contribution, Failure, Message, Offer, RoundOpen, Shown
from privet.common.study.study import Study
from privet.server.log.journal import Journal, create_journal, open_journal
from privet.server.log.keys import Keys
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from tests.support.log_world import ORIGIN, private, public
from tests.support.masked_world import MaskedSite, Relay
from tests.support.secagg_world import identity, pins
from tests.support.synthetic import PEFT_CONFIG, Learner, optima, start_adapter, towards

NOW = 1_800_000_000
QUICK = Timing(gathering=0.0, round=5.0, step=5.0)
RELEASE_KEY = ec.derive_private_key(12345, ec.SECP256R1())


@dataclass
class LoggedSite(MaskedSite):
    """A site that takes part in nothing that is not in the log.

    Attributes:
        logbook: Its side of the log.
        refuses: Whether it says no to every offer.
        refuses_rounds: Rounds to which it says no, by their numbers.
        deaf: Whether it cosigns nothing.
        keeps_ledger: Whether it states a ledger, which a simulated site has not.
    """

    logbook: Logbook | None = None
    refuses: bool = False
    refuses_rounds: tuple[int, ...] = ()
    deaf: bool = False
    keeps_ledger: bool = True

    def restart(self) -> None:
        self.rounds = MaskedRounds(identity(self.number), self.pins, self.floor, self.journal, self._state)

    def respond(self, asked: Message) -> Message:
        assert self.logbook is not None
        if isinstance(asked, Shown):
            return Failure("TimeoutError", "deaf", "") if self.deaf else self.logbook.cosign(asked)
        if isinstance(asked, RoundOpen):
            self.logbook.check(Study.parse(dict(asked.study)), asked, self.pins)
            if asked.round in self.refuses_rounds:
                late = RefusedError("not at night")
                study = Study.parse(dict(asked.study))
                run = self.logbook.run_of(study, asked)
                refused = self.logbook.refuse(study, run, asked.round, late, digest(b"p"))
                return Failure("RefusedError", late.message, "", refused)
        if isinstance(asked, Offer) and self.refuses:
            error = RefusedError("not today")
            refused = self.logbook.refuse(Study.parse(dict(asked.study)), asked.run, 0, error, digest(b"p"))
            return Failure("RefusedError", error.message, "", refused)
        reply = super().respond(asked)
        if isinstance(reply, Contribution) and isinstance(asked, RoundOpen):
            return replace(reply, statement=self._state(asked, reply.upload))
        return reply

    def _state(self, opened: RoundOpen, upload: bytes) -> bytes:
        assert self.logbook is not None
        study = Study.parse(dict(opened.study))
        seen = self.logbook.check(study, opened, self.pins)
        mechanism, promise = plan(study), promise_of(study)
        charge = None
        if mechanism is not None and promise is not None:
            charge = Charge(
                account=self.logbook.account("notes", "record", mechanism.delta),
                training=promise.training,
                validation=promise.validation,
                delta=mechanism.delta,
                epsilon=mechanism.spent(opened.round),
                limit=None,
            )
        ledger, entry = None, opened.evidence.sequence + 1
        if self.keeps_ledger:
            head = digest(f"{self.name} {entry}".encode())
            ledger = LedgerHead(sequence=entry, head=head, previous=opened.evidence.head or None)
        part = SitePart(digest(upload), digest(b"policy"), ledger, charge, {"units": 10 * self.number + 7})
        return self.logbook.state(seen, opened, part)


@dataclass
class LoggedWorld:
    """A consortium in a folder.

    Attributes:
        folder: Everything that lasts.
        study: What it runs.
        exchange: Its sites, at nodes 2, 3, ...
        steps: Names of the log's steps, in order, since the coordinator was opened last.
        stop: Called with each; may raise.
    """

    folder: Path
    study: Study
    exchange: Relay
    steps: list[str] = field(default_factory=list)

    @property
    def keys(self) -> Keys:
        return Keys(ORIGIN, private("log"), private("coordinator"), RELEASE_KEY)

    @property
    def sites(self) -> dict[str, LoggedSite]:
        return {site.name: site for site in self.exchange.sites.values() if isinstance(site, LoggedSite)}

    @property
    def run(self) -> RunDirectory:
        return RunDirectory.open(self.folder / "run")

    @property
    def policy(self) -> Policy:
        return Policy.parse((self.folder / "log" / "policy").read_text())

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        with open_journal(self.folder / "log", self.keys) as journal:
            yield journal

    def log(self, journal: Journal, name: str = "run") -> RunLog:
        return RunLog(journal, self.run, name, self.folder / "run" / "public")

    def play(self, name: str = "run") -> RunState:
        """Run, or go on with, the study, as a coordinator that was just started."""
        with self.journal() as journal:
            return run_study(self.log(journal, name), self.exchange, timing=QUICK)


def world_of(
    folder: Path,
    study: Study,
    count: int = 3,
    *,
    learners: Sequence[Learner] | None = None,
    witnesses: int | None = None,
) -> LoggedWorld:
    """Return a consortium of `count` sites, of which the first `witnesses`, or all, witness the log."""
    known = pins(count)
    names = [identity(number).name for number in range(count)]
    members = tuple(
        Member(
            site=name,
            key=known[name].hex(),
            witness=NoteKey(name, COSIGNATURE, public(f"witness {name}")).text
            if witnesses is None or number < witnesses
            else None,
        )
        for number, name in enumerate(names)
    )
    keys = Keys(ORIGIN, private("log"), private("coordinator"), RELEASE_KEY)
    genesis = Genesis(
        time=NOW,
        consortium="north",
        log=keys.public.text,
        coordinator=public("coordinator").hex(),
        members=members,
        quorum=least_quorum(witnesses or count, 0),
        floor=StatedFloor(),
    )
    create_journal(folder / "log", keys, [genesis])
    policy = Policy.parse((folder / "log" / "policy").read_text())
    chosen = learners or [towards(optimum) for optimum in optima(study, count)]
    sites = {
        number + 2: LoggedSite(
            name,
            chosen[number],
            10 * (number + 1),
            number=number,
            pins=known,
            seed=b"seed",
            logbook=logbook_of(folder / name, name, number, policy),
        )
        for number, name in enumerate(names)
    }
    RunDirectory.create(folder / "run", study, start_adapter(), PEFT_CONFIG)
    return LoggedWorld(folder, study, Relay(sites))


def review_of(journal: Journal, number: int, name: str = "run", **changes: object) -> EgressReview:
    """Return what a site says of the candidate of a run: it signs, unless told otherwise."""
    run = journal.history.runs[name]
    assert run.gate is not None
    given = {
        "time": journal.clock(),
        "site": identity(number).name,
        "run": name,
        "study": run.statement.study,
        "adapter": run.gate.candidate,
        "verdict": "signed",
        "tested": ("canary",),
        "failed": (),
        "canaries": CanaryCounts(planted=40, guesses=10, right=6),
        "test": digest(b"figures"),
        "reason": "",
        "expires": journal.clock() + DAY,
    }
    return EgressReview.model_validate(given | changes)


def pass_gate(world: LoggedWorld, numbers: Sequence[int], name: str = "run") -> None:
    """Let sites sign the candidate of a run, and the coordinator accept it."""
    with world.journal() as journal:
        for number in numbers:
            said = sign_envelope(review_of(journal, number, name), identity(number).key)
            journal.hear(said, identity(number).name)
        run = journal.history.runs[name]
        assert run.gate is not None
        time = journal.clock()
        facts = run.gate.facts(time)
        accepted = EgressDecision(
            time=time,
            run=name,
            study=run.statement.study,
            adapter=str(run.gate.candidate),
            verdict="accepted",
            epsilon=facts.epsilon,
            bound=stated_bound(facts.bound),
            quality=facts.quality,
            signed=facts.signed,
            refused=facts.refused,
            reason="",
            expires=facts.expires,
        )
        journal.say(accepted)
        journal.flush()


def logbook_of(folder: Path, name: str, number: int, policy: Policy) -> Logbook:
    """Return a site's side of the log, new."""
    witness = Witness.create(folder / WITNESS, policy.log, name, private(f"witness {name}"))
    (folder / OPENINGS).mkdir()
    (folder / SALT).write_bytes(bytes(32))
    (folder / "log.policy").write_text(policy.text)
    rule = Written(folder / "log.policy", public("coordinator").hex())
    return Logbook(name, identity(number).key, rule, witness, folder, lambda: NOW)
