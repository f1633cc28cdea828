"""What a dossier says of the egress gate: its conditions, what sites said of the candidate, and what was decided."""

from __future__ import annotations

from privet.common.log.gate import Gate, stated_bound
from privet.common.log.statements import EgressDecision, EgressReview, Export, RoundClose, RunOpen, SiteRound
from privet.common.progress import number_of
from privet.common.study.terms import gate_conditions
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.sources import Claim, OfLeaf, Sentence, missing
from privet.simulations.dossier.words import day_of, quoted, spoken

_CLAIM = Claim("docs/decisions/0023-a-release-passes-a-gate.md", "conditions")
_TESTS = {
    "canary": "planted canaries",
    "membership": "membership inference",
    "repeated": "repeated words of training answers",
}


def egress(evidence: Evidence) -> list[Sentence]:
    """Return under which conditions the adapter may leave, and what sites and coordinator decided of it."""
    if evidence.study.gate is None:
        return [
            Sentence(
                "The study has no egress gate. The coordinator releases the adapter when the run ends. No test of the "
                "adapter and no signature of a site is needed.",
                evidence.file("study.json"),
                Claim("docs/study-reference.md", "gate"),
            ),
            missing("who decided that the adapter may leave, and why"),
        ]
    conditions = gate_conditions(evidence.study)
    leaf, opened = evidence.all(RunOpen)[-1]
    said = [
        Sentence(
            "The study has an egress gate: when a run ends, its adapter is a candidate, for tests alone. The adapter "
            f"leaves only if {'; '.join(conditions)}.",
            evidence.field("gate"),
            leaf,
            _CLAIM,
            **_terms(opened),
        )
    ]
    return said + _limits(evidence) + _reviews(evidence) + _decisions(evidence)


def canaries_alone() -> Sentence:
    """Return what an audit with canaries cannot show."""
    return Sentence(
        "An audit with canaries can show that protection is worse than promised, never that it is as good.",
        Claim(_CLAIM.page, "what-is-not-claimed"),
    )


def _limits(evidence: Evidence) -> list[Sentence]:
    """Return whom the gate needs, who can stop it, and what an audit with canaries cannot show."""
    needed = 0 if evidence.study.gate is None else evidence.study.gate.signatures
    sites = len({each.site for _, each in evidence.all(SiteRound)})
    lead = f"The signatures of any {needed} of the {sites} sites that took part suffice."
    if needed > sites:
        lead = f"It needs {number_of(needed, 'site')}, and {sites} took part by now: the candidate cannot pass."
    said = [
        Sentence(
            f"{lead} Another site stops it only if its refusal names a condition that its own test found broken; a "
            "refusal for another reason does not stop it. The coordinator can refuse at any time.",
            evidence.field("gate.signatures"),
            evidence.log,
            _CLAIM,
            needed=needed,
            sites=sites,
        )
    ]
    if evidence.study.gate is not None and evidence.study.gate.canaries is not None:
        said.append(canaries_alone())
    return said


def _terms(opened: RunOpen) -> dict[str, float]:
    """Return the numbers in the conditions, as the log states them."""
    if opened.gate is None:
        return {}
    stated = opened.gate.model_dump(mode="json")
    return {name: float(value) for name, value in stated.items() if isinstance(value, int | float)}


def _reviews(evidence: Evidence) -> list[Sentence]:
    (_, opened), found = evidence.all(RunOpen)[-1], evidence.all(EgressReview)
    said = []
    for leaf, each in found:
        tests = ", ".join(_TESTS[name] for name in each.tested) or "nothing"
        text = f"On {day_of(each.time)}, {each.site} "
        if each.verdict == "signed":
            text += f"signed the candidate, until {day_of(each.expires)}. Its own test covered: {tests}."
        else:
            failed = f" Its test found these conditions broken: {', '.join(_TESTS[name] for name in each.failed)}."
            text += f"REFUSED the candidate: {quoted(each.reason)}.{failed if each.failed else ''}"
        said.append(Sentence(text, leaf))
        if each.canaries is not None and opened.gate is not None:
            counts, bound = each.canaries, Gate(opened, opened.gate).bound_of(each.canaries)
            said.append(
                Sentence(
                    f"{each.site} audited {counts.planted} planted canaries: {counts.right} of {counts.guesses} "
                    "guesses of which ones were in its training were right, so epsilon is at least "
                    f"{bound:.2f} with 95 % confidence.",
                    leaf,
                    Claim("docs/attacks.md", "canaries-is-the-promise-kept"),
                    planted=counts.planted,
                    guesses=counts.guesses,
                    right=counts.right,
                    bound=float(stated_bound(bound) or 0.0),
                )
            )
    return said or [Sentence("No site has signed or refused the candidate.", evidence.log)]


def _decisions(evidence: Evidence) -> list[Sentence]:
    said = []
    for leaf, each in evidence.all(EgressDecision):
        against = f", and refused by {spoken(each.refused)}" if each.refused else ""
        how = (
            f"accepted the candidate. It may be released until {day_of(each.expires or each.time)}"
            if each.verdict == "accepted"
            else f"REFUSED the candidate: {quoted(each.reason)}. Nothing of this run is ever released"
        )
        said.append(
            Sentence(
                f"On {day_of(each.time)}, the coordinator {how}. It was signed by {spoken(each.signed)}{against}."
                + _figures(each, evidence.simulated),
                leaf,
                signed=len(each.signed),
                refused=len(each.refused),
                **{name: value for name, value in _measured(each).items() if value is not None},
            )
        )
    if said:
        return said
    return [Sentence("The log holds no decision on the candidate, so it may not leave.", evidence.log)]


def _measured(decision: EgressDecision) -> dict[str, float | None]:
    return {"epsilon": decision.epsilon, "bound": decision.bound, "quality": decision.quality}


def _figures(decision: EgressDecision, simulated: bool) -> str:
    mark = " (simulated: protects nobody)" if simulated else ""
    words = {"epsilon": "epsilon spent", "bound": "lower bound on epsilon by canaries", "quality": "quality"}
    told = [
        f"{words[name]} {value:.4g}{mark if name == 'epsilon' else ''}"
        for name, value in _measured(decision).items()
        if value is not None
    ]
    return f" Its figures: {'; '.join(told)}." if told else ""


def candidate(evidence: Evidence) -> list[Sentence]:
    """Return what came of a run that has released nothing."""
    ends: list[tuple[OfLeaf, RoundClose]] = evidence.all(RoundClose)
    if evidence.all(Export) or not ends or not ends[-1][1].ended or evidence.study.gate is None:
        return [Sentence(f"No adapter of run {evidence.run} was released.", evidence.log)]
    leaf, last = ends[-1]
    return [
        Sentence(
            f"Run {evidence.run} ended with a candidate, the adapter {last.adapter_after} of round {last.round}. It "
            "has not passed the gate of its study, and was not released.",
            leaf,
            evidence.log,
            round=last.round,
        ),
        Sentence(
            "Not released does not mean not sent: each round begins at the sites with the adapter of the round before "
            "it, and sites that took part can fetch the candidate to test it. So the coordinator and these sites can "
            "have files of adapters of this run.",
            evidence.log,
            Claim("docs/architecture.md", "one-round"),
            Claim("docs/operate-site.md", "test-a-candidate"),
        ),
        Sentence(
            f"Its gate needs the signatures of {number_of(evidence.study.gate.signatures, 'site')}.",
            evidence.field("gate.signatures"),
            signatures=evidence.study.gate.signatures,
        ),
    ]
