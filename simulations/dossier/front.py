"""The first page of a dossier: what happened, whether it is real, what is open, and who decides next."""

from __future__ import annotations

from importlib.metadata import version

from privet.common.log.statements import EgressDecision, Export, RoundClose, RunOpen, SiteRound
from privet.common.progress import number_of
from privet.simulations.dossier import parts, promise
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.sources import Claim, Document, Section, Sentence, missing
from privet.simulations.dossier.words import day_of, placeholder, second_of

_OPEN, _LARGE = 5, 3.0
"""Open points on the first page, and an epsilon from which the worst case is one of them."""


def front(evidence: Evidence) -> Document:
    """Return the first page."""
    return Document(
        "index",
        f"Dossier: run {evidence.run} of study {evidence.study.name}",
        (
            Section("What happened", (_began(evidence), *parts.course(evidence)[1:])),
            Section("Is it real processing?", (_real(evidence),)),
            Section("The result", (_result(evidence), *parts.measured(evidence)[:1])),
            Section("The main open points", tuple(_open(evidence))),
            Section("Who decides next", (_next(evidence),)),
            Section("Who made this dossier, and when", tuple(_made(evidence))),
            Section("What privet is", (_privet(),)),
        ),
    )


def _privet() -> Sentence:
    return Sentence(
        "privet is a program by which several sites, such as hospitals, train one model together. By its design, the "
        "records stay at their sites, a coordinator adds up what the sites send, and a log that the sites witness "
        "holds each step.",
        Claim("docs/architecture.md", "one-round"),
        Claim(parts.PAGE, "words"),
    )


def _began(evidence: Evidence) -> Sentence:
    leaf, opened = evidence.all(RunOpen)[-1]
    return Sentence(f"The coordinator began the run on {day_of(opened.time)} by its clock.", leaf)


def _result(evidence: Evidence) -> Sentence:
    exports, ends = evidence.all(Export), [leaf for leaf, each in evidence.all(RoundClose) if each.ended]
    if exports:
        return Sentence("The adapter was released.", exports[-1][0])
    if ends and evidence.study.gate is not None:
        return Sentence("A candidate, which has not passed the gate of its study and was not released.", ends[-1])
    return Sentence("No adapter was released.", evidence.log)


def _real(evidence: Evidence) -> Sentence:
    if evidence.simulated:
        return Sentence(
            "It was a simulation on one machine, and no run of real sites. If its files held records of real persons, "
            "that was processing of these records on that machine, and no privacy named here protected them.",
            evidence.log,
            Claim("docs/simulation.md", "limits"),
        )
    if not evidence.all(SiteRound):
        return Sentence("No site has stated a round, so the log does not show it.", evidence.log)
    return Sentence(
        "The sites state in the log that they kept a ledger of what they spent, which simulated sites do not. Whether "
        "their files held records of real persons is not in the log.",
        evidence.log,
    )


def _made(evidence: Evidence) -> list[Sentence]:
    last = max(each.time for _, each in evidence.told)
    return [
        Sentence(
            f"It was written by privet {version('privet')}, from the log as it stood at {second_of(last)}, the time of "
            "the last entry about this run. No clock is read: the same files and version give the same bytes to "
            "anybody.",
            evidence.log,
            Claim(parts.PAGE, "what-the-sources-are"),
        ),
        missing("who wrote this dossier, and when", "whoever hands it on"),
    ]


def _open(evidence: Evidence) -> list[Sentence]:
    """Return the points that weigh most, the first five of those that are open."""
    return [
        *_simulated(evidence),
        *_unbounded(evidence),
        *parts.nothing_measured(evidence),
        *_placeholders(evidence),
        missing("whether the model is anonymous, and the impact assessment", parts.CONTROLLER),
        missing("the legal names of the parties and their agreement (Articles 26 and 28 GDPR)", parts.CONTROLLER),
        missing("where the records come from, and for whom they stand", parts.EACH_SITE),
    ][:_OPEN]


def _simulated(evidence: Evidence) -> list[Sentence]:
    if not evidence.simulated:
        return []
    text = "A run of real sites is outstanding: nothing here shows how they behave."
    return [Sentence(text, evidence.log, Claim("docs/simulation.md", "limits"))]


def _unbounded(evidence: Evidence) -> list[Sentence]:
    """Return that the bound is missing or weak; nothing where it is not."""
    if not evidence.study.private:
        return promise.privacy(evidence)
    cost = evidence.privacy["epsilon"]["run"]
    if cost <= _LARGE:
        return []
    return [
        Sentence(
            f"The limit on what results tell allows much: {promise.epsilon(evidence, cost)} at most. No document here "
            "shows that it suffices.",
            promise.last_end(evidence),
            Claim("docs/privacy.md", "the-guarantee"),
            spent=cost,
        )
    ]


def _placeholders(evidence: Evidence) -> list[Sentence]:
    found = evidence.study.purpose
    if found is None:
        return parts.purpose(evidence)
    if not any(map(placeholder, (found.text, found.legal_basis, *found.contacts))):
        return []
    return [missing("purpose, legal basis or contacts: the study holds placeholders", parts.CONTROLLER)]


def _next(evidence: Evidence) -> Sentence:
    """Return who has to act."""
    if evidence.simulated:
        return Sentence(
            "Whoever simulated it: whether the study is offered to real sites. Each of them then decides by itself.",
            evidence.log,
            Claim("docs/privacy-officer.md", "before-a-study-runs"),
        )
    exports, decisions = evidence.all(Export), evidence.all(EgressDecision)
    ends = [leaf for leaf, each in evidence.all(RoundClose) if each.ended]
    if exports:
        leaf, export = exports[-1]
        text = f"The adapter was released on {day_of(export.time)}. Whoever puts it to use decides next: the provider."
        return Sentence(text, leaf)
    if not ends:
        return Sentence("The coordinator and the sites, who go on with the run or end it.", evidence.log)
    gate = evidence.study.gate
    if gate is None:
        return Sentence("The coordinator, who may release the adapter: the study has no gate.", evidence.log)
    if decisions:
        leaf, decided = decisions[-1]
        who = "The coordinator, who may release" if decided.verdict == "accepted" else "Nobody: it stays refused"
        return Sentence(f"The candidate is {decided.verdict}. {who}.", leaf)
    return Sentence(
        f"The sites: {number_of(gate.signatures, 'site')} must test and sign the candidate. Then the "
        "coordinator decides.",
        evidence.field("gate.signatures"),
        evidence.log,
        signatures=gate.signatures,
    )
