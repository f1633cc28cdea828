"""The documents in the order of a regulation: AI Act Annex IV, a DPIA, EDPB Opinion 28/2024, HIPAA, a permit.

Headings name the points of the text; each point has sentences or a gap. What a text asks for was read in: Regulation
(EU) 2024/1689, Annex IV; Regulation (EU) 2016/679, Article 35(7); EDPB Opinion 28/2024, section 3.2; 45 CFR 164.308,
164.312, 164.316 and 164.514; Regulation (EU) 2025/327.
"""

from __future__ import annotations

import re

from privet.common.log.statements import (
    AdapterState,
    EgressDecision,
    EgressReview,
    Export,
    Genesis,
    Join,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    Statement,
)
from privet.common.progress import number_of
from privet.common.study.terms import permit_asked
from privet.simulations.dossier import parts, promise
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.gate import egress
from privet.simulations.dossier.parts import CONTROLLER, EACH_SITE, PAGE, PROVIDER
from privet.simulations.dossier.sources import Claim, Document, Section, Sentence, missing
from privet.simulations.dossier.words import day_of, factor_of, period, placeholder, quoted, sentence, spoken

_UNITED_STATES = "It is for a hospital in the United States, and probably not applicable elsewhere."


def annex_iv(evidence: Evidence) -> Document:
    """Return the technical documentation in the order of Annex IV of the AI Act."""
    return Document(
        "annex-iv",
        "Technical documentation, in the order of Annex IV of the AI Act",
        (
            parts.head(evidence, "annex-iv", "Annex IV applies only if the AI system is a high-risk one."),
            Section("1. General description", tuple(_general(evidence))),
            Section("2. Elements and development", tuple(_development(evidence))),
            Section("3. Monitoring, functioning and control", tuple(_functioning(evidence))),
            Section(
                "4. Appropriateness of the performance metrics",
                (missing("why the metrics suit the intended use", PROVIDER),),
            ),
            Section(
                "5. Risk management system",
                (
                    missing("the risk management system (Article 9)", PROVIDER),
                    Sentence(
                        "What was measured about attacks, and what was not, is in the assessment of anonymity.",
                        Claim(PAGE, "anonymity-assessment"),
                    ),
                ),
            ),
            Section("6. Changes over the lifecycle", (*parts.course(evidence), *_later(evidence))),
            Section("7. Standards applied", (missing("harmonised standards and other solutions", PROVIDER),)),
            Section(
                "8. EU declaration of conformity", (missing("a copy of the declaration, if there is one", PROVIDER),)
            ),
            Section(
                "9. Post-market monitoring",
                (
                    missing("the monitoring plan (Article 72)", PROVIDER),
                    Sentence(
                        "privet can count an adapter's answers at a site, and compare the counts with a reference.",
                        Claim("docs/use.md", "watch-what-it-answers"),
                    ),
                ),
            ),
        ),
    )


def _general(evidence: Evidence) -> list[Sentence]:
    study = evidence.study
    said = [
        *parts.purpose(evidence),
        missing(
            "the provider's name and address, and the version of the AI system that the adapter is part of", PROVIDER
        ),
        *parts.release(evidence),
    ]
    if not study.counts:
        said.append(
            Sentence(
                f"The adapter is a file in PEFT's format. It works only on the base model {study.model.base}.",
                evidence.field("model.base"),
                Claim("docs/use.md", "use-a-trained-adapter"),
            )
        )
    return [
        *said,
        Sentence(
            "The versions of the coordinator's software are in software.json and in the SBOM of this dossier. The log "
            "holds the digest of this file.",
            evidence.file("software.json"),
            evidence.all(RunOpen)[-1][0],
        ),
        missing("the versions of the software at the site, and the hardware that the system runs on", EACH_SITE),
        missing("the user interface, and the instructions for use", PROVIDER),
    ]


def _development(evidence: Evidence) -> list[Sentence]:
    study = evidence.study
    columns = ", ".join(f"{column} ({role})" for role, column in sorted(study.data.columns.items()))
    return [
        *parts.training(evidence),
        *promise.privacy(evidence),
        *promise.hidden_sums(evidence),
        Sentence(
            f"By its design, records stay at their sites. Of a site's files, these columns are used: {columns}. The "
            f"model reads at most {study.data.max_length} tokens (words or parts of words) of a record; what is "
            "longer is cut.",
            evidence.field("data.columns"),
            evidence.field("data.max_length"),
            Claim("docs/architecture.md", "one-round"),
            max_length=study.data.max_length,
        ),
        missing(
            "where the records come from, how they were selected, labelled and cleaned, and for whom they stand",
            EACH_SITE,
        ),
        missing("the computing resources that were used", EACH_SITE),
        missing("the measures of human oversight (Article 14)", PROVIDER),
        *parts.measured(evidence),
        missing("a test on records that no site trained on, and by group of persons", EACH_SITE),
        *parts.attacks(evidence),
        Sentence(
            "What privet claims about security, under which assumptions, and what it does not claim, is written down "
            "with the tests of each claim.",
            Claim("SECURITY.md", "what-is-claimed"),
            Claim("SECURITY.md", "what-is-not-claimed"),
        ),
        *egress(evidence),
    ]


def _functioning(evidence: Evidence) -> list[Sentence]:
    return [
        missing("capabilities and limits in the intended use, and accuracy for specific persons or groups", PROVIDER),
        missing("foreseeable unintended outcomes, and the oversight that meets them", PROVIDER),
        *promise.not_covered(evidence),
        Sentence(
            "Each step of the run is a signed entry of a log that the "
            + ("simulated " if evidence.simulated else "")
            + "sites witness. Anybody can verify it later, without asking the coordinator.",
            evidence.log,
            Claim("docs/round-log.md", "1-what-a-verified-log-proves-and-what-it-does-not"),
        ),
    ]


def _later(evidence: Evidence) -> list[Sentence]:
    if any(each.type == "adapter-state" for _, each in evidence.told):
        return []  # told with the release
    if not evidence.all(Export):
        return [Sentence("No adapter was released, so there is none whose state could change.", evidence.log)]
    return [Sentence("The log states no change since the release: the adapter is in use.", evidence.log)]


def dpia(evidence: Evidence) -> Document:
    """Return the input of a data protection impact assessment, in the order of Article 35(7) GDPR."""
    return Document(
        "dpia-input",
        "Input for a data protection impact assessment, in the order of Article 35(7) GDPR",
        (
            parts.head(evidence, "dpia-input"),
            Section("(a) The processing and its purposes", tuple(_processing(evidence))),
            Section(
                "(b) Necessity and proportionality",
                (
                    missing("why the processing is necessary and proportionate to the purposes", CONTROLLER),
                    missing("which national law on research applies, and what it demands", CONTROLLER),
                    *_minimal(evidence),
                ),
            ),
            Section(
                "(c) Risks to the rights and freedoms of data subjects",
                (
                    *promise.not_covered(evidence),
                    *promise.side_channels(evidence),
                    *parts.attacks(evidence),
                    missing("the likelihood and severity of each risk for data subjects", CONTROLLER),
                ),
            ),
            Section(
                "(d) Measures",
                (
                    *promise.privacy(evidence),
                    *promise.others(evidence),
                    *promise.hidden_sums(evidence),
                    *_policies(evidence),
                    *egress(evidence),
                    *_withdrawal(evidence),
                    missing("measures at the sites' machines, and the training of their staff", EACH_SITE),
                ),
            ),
            Section("Parties, information and rights", tuple(_duties())),
            Section(
                "Advice and views",
                (
                    missing("the advice of the data protection officer", CONTROLLER),
                    missing("the views of data subjects or their representatives", CONTROLLER),
                ),
            ),
        ),
    )


def _processing(evidence: Evidence) -> list[Sentence]:
    counts = " the study's counts" if evidence.study.counts else " a change of the adapter (an update)"
    noisy = ", with noise" if evidence.study.private else ""
    return [
        *parts.purpose(evidence),
        *parts.course(evidence),
        Sentence(
            f"By its design, a site sends in each round{counts}{noisy}, and a signed statement for the log; and once, "
            f"when it agrees to the study, a number of {evidence.study.privacy.unit}s, which others can read. By its "
            "design, no record leaves a site, and no identifier of a record or patient. "
            + (
                "A simulation does not show it: one program read all files."
                if evidence.simulated
                else "The log does not show what else a site's machine sends."
            ),
            evidence.file("study.json"),
            Claim("docs/architecture.md", "one-round"),
            Claim("SECURITY.md", "privacy-of-records"),
        ),
        *parts.release(evidence),
        missing(
            "categories of data subjects and of data, recipients outside the consortium, and transfers", CONTROLLER
        ),
        missing(
            "how long records, log, ledgers and this dossier are kept (`privet site retention SITE` prints the "
            "periods of the site's policy)",
            EACH_SITE,
        ),
    ]


def _duties() -> list[Sentence]:
    """Return what the GDPR asks of the parties around the processing. Nothing of it is in a log."""
    return [
        missing(
            "the legal names of sites and coordinator, and their agreement as joint controllers (Article 26) or with a "
            "processor (Article 28)",
            CONTROLLER,
        ),
        missing("in which place and country the coordinator's service is hosted, and by whom", "the coordinator"),
        missing("how persons are informed (Articles 13 and 14)", CONTROLLER),
        missing("how requests under Articles 15 to 22 are answered, and by whom", CONTROLLER),
        missing("the record of processing activities (Article 30)", CONTROLLER),
        missing("who reports incidents, to whom, and within which time (Articles 33 and 34)", CONTROLLER),
    ]


def _minimal(evidence: Evidence) -> list[Sentence]:
    study = evidence.study
    read = spoken(sorted(set(study.data.columns.values())))
    said = [
        Sentence(
            f"Of a site's files, these columns are read: {read}"
            + (f"; and {study.data.unit}, which says what rows belong together." if study.data.unit else "."),
            evidence.field("data"),
        )
    ]
    if study.private and study.privacy.unit == "patient":
        said.append(
            Sentence(
                f"At most {number_of(study.privacy.max_records_per_unit, 'record')} of a patient enter one step.",
                evidence.field("privacy.max_records_per_unit"),
            )
        )
    return said


def _policies(evidence: Evidence) -> list[Sentence]:
    rounds = evidence.all(SiteRound)
    refusals = evidence.all(Refusal)
    if not rounds:
        return [Sentence("No site has stated a round.", evidence.log)]
    policies, sites = {each.policy for _, each in rounds}, {each.site for _, each in rounds}
    found = f"Number of different policies that the sites named: {len(policies)}."
    if len(policies) == 1 and len(sites) > 1:
        found = f"All {len(sites)} sites named the same policy ({len(policies)} digest)."
        if not evidence.simulated:
            found += " Policies are each site's own, so somebody has to explain why they are equal."
    here = " The sites were simulated; nobody was asked." if evidence.simulated else ""
    return [
        Sentence(
            "By its design, each site judges a study by its own policy before it opens a file. The policies stay at "
            f"the sites; each statement of a site names the policy by a digest. {found}{here}",
            rounds[0][0],
            rounds[-1][0],
            evidence.log,
            Claim("docs/site-policy.md", "the-sites-policy"),
            policies=len(policies),
            **({"sites": len(sites)} if len(policies) == 1 < len(sites) else {}),
        ),
        Sentence(
            f"Refusals of sites in this run: {len(refusals) or 'none'}.{here}",
            evidence.log,
            *(leaf for leaf, _ in refusals[:8]),
            refusals=len(refusals),
        ),
    ]


def _withdrawal(evidence: Evidence) -> list[Sentence]:
    study = evidence.study
    bound = f"Differential privacy bounds what this run's results tell about one {study.privacy.unit}"
    if study.privacy.unit == "record":
        bound += ". It protects a person with several records less"
    bound = f"{bound}."
    if evidence.simulated:
        bound = (
            f"Nothing bounds what this run's results tell about one {study.privacy.unit}: the noise of a simulation is "
            "public. At real sites, differential privacy is to bound it."
        )
    objection = (
        [
            missing(
                "how objections are met (Article 21), a right where the legal basis is Article 6(1)(e) or (f); privet "
                "has nothing for it but the withdrawal",
                CONTROLLER,
            )
        ]
        if evidence.study.purpose is None or may_object(evidence.study.purpose.legal_basis)
        else []
    )
    return [
        Sentence(
            "privet can leave a person's records out of later rounds and studies (withdrawal). The trained adapter is "
            "not changed by it, and what was released stays released.",
            Claim("docs/operate-site.md", "a-person-withdraws"),
        ),
        Sentence(
            "Whether anybody asked for it in this run is not in the log, by design: it would be a fact about one "
            "person.",
            Claim("docs/privacy.md", "a-unit-is-withdrawn"),
        ),
        *objection,
        Sentence(
            bound if study.private else "Nothing bounds what this run's results tell about them.",
            evidence.field("privacy.mode"),
            *((evidence.field("privacy.unit"), Claim("docs/privacy.md", "the-guarantee")) if study.private else ()),
        ),
    ]


_LETTER = re.compile(
    r"\b6\s*(?:\(\s*1\s*\)|(?:abs|para|paragraph)?\.?\s*1)\W*(?:lit|point|letter|buchst)?\W*([a-f])\b", re.I
)
"""The letter of Article 6(1) GDPR in a legal basis, as in `6(1)(e)` and `Art. 6 Abs. 1 lit. e`."""


def may_object(basis: str) -> bool:
    """Whether a legal basis may be Article 6(1)(e) or (f) GDPR: it names one of them, or no letter, or is no basis."""
    named = {letter.lower() for letter in _LETTER.findall(basis)}
    return placeholder(basis) or not named or bool(named & {"e", "f"})


def anonymity(evidence: Evidence) -> Document:
    """Return the assessment of anonymity, with the elements that EDPB Opinion 28/2024 names."""
    return Document(
        "anonymity-assessment",
        "Input for an assessment of anonymity, after EDPB Opinion 28/2024",
        (
            parts.head(evidence, "anonymity-assessment"),
            Section(
                "The question",
                (
                    *parts.nothing_measured(evidence),
                    Sentence(
                        "By the Opinion, a model is anonymous only if two things are insignificantly likely: that "
                        "personal data from training are extracted from it, and that queries obtain them. privet "
                        "measures; it does not answer the question.",
                        Claim(PAGE, "anonymity-assessment"),
                    ),
                    *_bound_alone(evidence),
                    missing("whether the model is anonymous", CONTROLLER),
                ),
            ),
            Section(
                "Design: sources and preparation of data",
                (
                    missing("which sources were chosen, and how identifiers were removed before training", EACH_SITE),
                    Sentence(
                        "A site can scan its files for identifiers before training. The result stays at the site.",
                        Claim("docs/operate-site.md", "scan-before-training"),
                    ),
                    *_minimal(evidence),
                ),
            ),
            Section(
                "Design: method of training",
                (*parts.training(evidence), *promise.privacy(evidence), *promise.others(evidence)),
            ),
            Section("Design: limits of the guarantee", tuple(promise.not_covered(evidence))),
            Section(
                "Design: outputs of the model",
                (
                    missing("which measures limit what a deployed model answers", "the deployer"),
                    *egress(evidence),
                ),
            ),
            Section(
                "Analysis: is it built as designed?",
                (
                    *parts.course(evidence),
                    parts.proved(evidence),
                    Sentence(
                        "The coordinator's modules are named by SHA-256, so a reviewer can compare them with a release "
                        "of privet.",
                        evidence.file("software.json"),
                    ),
                    missing("reports of reviews of the code that ran", "the consortium"),
                ),
            ),
            Section("Tests: resistance to attacks", (*parts.every_attack(evidence), *_further_tests())),
            Section(
                "Documentation",
                (
                    missing("the impact assessment, or why none was needed", CONTROLLER),
                    missing("the advice of the data protection officer", CONTROLLER),
                ),
            ),
        ),
    )


def _bound_alone(evidence: Evidence) -> list[Sentence]:
    """Return what the bound of differential privacy says about the question, and what it leaves open."""
    if not evidence.study.private:
        return promise.privacy(evidence)
    factor, shown = factor_of(evidence.privacy["epsilon"]["run"])
    return [
        Sentence(
            f"Epsilon alone does not answer it. It bounds the worst case by a factor of {shown}. The larger the "
            "factor, the more depends on what attacks reach."
            + (" Of this run, which is simulated, it bounds nothing." if evidence.simulated else ""),
            promise.last_end(evidence),
            Claim("docs/attacks.md", "results"),
            factor=factor,
        )
    ]


def _further_tests() -> list[Sentence]:
    return [
        missing(
            "what the model repeats of its training records, as `privet evaluate RUN --train FILE` counts it", EACH_SITE
        ),
        missing(
            "the results of attribute inference and of model inversion, for which privet has no test",
            parts.TESTER,
        ),
    ]


def hipaa_activity(evidence: Evidence) -> Document:
    """Return the events that an activity review looks at, in order of the log."""
    said = [
        Sentence(f"{day_of(each.time)}: {what}", evidence.at(leaf, each))
        for leaf, each in evidence.told
        if (what := _event(each))
    ]
    said.append(_rounds(evidence))
    return Document(
        "hipaa-activity-review",
        "Input for a review of information system activity (45 CFR 164.308(a)(1)(ii)(D), 164.312(b))",
        (
            parts.head(evidence, "hipaa-activity-review", _UNITED_STATES),
            Section("Events of the log, by the clocks of their authors", tuple(said)),
            Section("What each site sent", tuple(_sent(evidence))),
            Section(
                "The review",
                (
                    missing(
                        "who looked at this log and at the site's application log, when, and what was found", EACH_SITE
                    ),
                    Sentence(
                        "A site's application log holds what it answered and what it refused. It stays at the site.",
                        Claim("docs/operate-site.md", "day-by-day"),
                    ),
                    missing("whether documentation is kept for six years (164.316(b)(2)(i))", EACH_SITE),
                ),
            ),
        ),
    )


def _event(each: Statement) -> str:
    """Return what happened, as a sentence; empty for what happens in every round."""
    match each:
        case Genesis():
            return f"the consortium {each.consortium} begins with {spoken([member.site for member in each.members])}."
        case Join():
            return f"{each.member.site} joins."
        case Revoke():
            return f"{each.site} is revoked ({quoted(each.reason)})."
        case Renew():
            return f"{each.member.site} renews its keys."
        case Rotate():
            return "the coordinator replaces the keys of the log, and its own."
        case RunOpen():
            return f"the coordinator opens run {each.run}."
        case RoundAbort():
            return f"round {each.round} ends without a result: {sentence(each.reason)}"
        case Refusal():
            what = f"round {each.round}" if each.round else "the run"
            return f"{each.site} refuses {what}, with the code {each.code}."
        case EgressReview():
            return f"{each.site} {'signs' if each.verdict == 'signed' else 'REFUSES'} the candidate."
        case EgressDecision():
            return f"the coordinator decides about the candidate: {each.verdict}."
        case Export():
            return f"the coordinator releases the adapter in {len(each.files)} files."
        case AdapterState():
            return f"the coordinator states that the adapter is {each.state}: {sentence(each.reason)}"
    return ""


def _rounds(evidence: Evidence) -> Sentence:
    """Return how many statements about rounds are not listed one by one."""
    opened, stated, closed = (len(evidence.all(kind)) for kind in (RoundOpened, SiteRound, RoundClose))
    return Sentence(
        f"Not listed one by one are the entries about rounds: {number_of(opened, 'opening')}, "
        f"{number_of(stated, 'signed statement')} of sites, {number_of(closed, 'ending')} with a result.",
        evidence.log,
        opened=opened,
        stated=stated,
        closed=closed,
    )


def _sent(evidence: Evidence) -> list[Sentence]:
    rounds = evidence.all(SiteRound)
    who = " (simulated)" if evidence.simulated else ""
    said = []
    for site in sorted({each.site for _, each in rounds}):
        own = [(leaf, each) for leaf, each in rounds if each.site == site]
        (first, began), (last, ended) = own[0], own[-1]
        said.append(
            Sentence(
                f"{site}{who} states that it sent {number_of(len(own), 'update')}, {period(began.time, ended.time)}.",
                first,
                *([last] if last != first else []),
                evidence.log,
                updates=len(own),
            )
        )
    return said or [Sentence("No site has stated an update.", evidence.log)]


def hipaa_expert(evidence: Evidence) -> Document:
    """Return what an expert needs for a determination. The determination is theirs."""
    return Document(
        "hipaa-expert-input",
        "Input for an expert determination (45 CFR 164.514(b)(1))",
        (
            parts.head(evidence, "hipaa-expert-input", _UNITED_STATES),
            Section(
                "Methods",
                (
                    *parts.training(evidence),
                    *promise.privacy(evidence),
                    *promise.others(evidence),
                    *promise.hidden_sums(evidence),
                ),
            ),
            Section("Results", tuple(parts.attacks(evidence))),
            Section("Limits", (*promise.not_covered(evidence), *promise.side_channels(evidence))),
            Section(
                "Identifiers in the records",
                (
                    missing("counts of the 18 kinds of identifiers in the training files (164.514(b)(2))", EACH_SITE),
                    Sentence(
                        "`privet site scan SITE` counts them at a site, without contents.",
                        Claim("docs/operate-site.md", "scan-before-training"),
                    ),
                ),
            ),
            Section(
                "The determination",
                (
                    missing("whether the risk is very small, for which recipients, and until when", "the expert"),
                    missing("the expert's name, knowledge and experience", "the expert"),
                ),
            ),
        ),
    )


def permit(evidence: Evidence) -> Document | None:
    """Return the fields of the study's permit, and whether each round began while it held; None without one."""
    found = None if evidence.study.purpose is None else evidence.study.purpose.permit
    if found is None:
        return None
    said = [
        Sentence(
            "privet shows the sites what the study says about a permit. Whether there is a permit was not checked.",
            Claim("docs/privacy-officer.md", "purpose-legal-basis-and-permit"),
        ),
        parts.in_the_studys_words(
            "Number", "the number of the permit", found.number, evidence.field("purpose.permit.number")
        ),
        parts.in_the_studys_words(
            "Permitted purpose",
            "the purpose that the permit names",
            found.purpose,
            evidence.field("purpose.permit.purpose"),
        ),
        Sentence(f"Last day, in the study's words: {found.expires} (UTC).", evidence.field("purpose.permit.expires")),
    ]
    times = parts.rounds_in_time(evidence)
    if times is not None:
        days = [day_of(time) for time in times]
        within = days[1] <= found.expires
        said.append(
            Sentence(
                f"By the coordinator's clock, rounds began {period(*times)}: "
                + ("all of them by this day." if within else "NOT all of them by this day."),
                evidence.log,
                evidence.field("purpose.permit.expires"),
                within=float(within),
            )
        )
    said += [
        Sentence(
            f"The study asks for {permit_asked(evidence.study)}. By its design, after this day, each site refuses the "
            "study and its rounds by its own clock, and the coordinator opens no round.",
            evidence.field("purpose.permit.expires"),
            Claim("docs/privacy-officer.md", "purpose-legal-basis-and-permit"),
        ),
        missing(
            "whether there is a permit, as the study says it, its conditions, and the secure environment", CONTROLLER
        ),
    ]
    return Document(
        "ehds-permit",
        "What the study says about a data permit (Regulation (EU) 2025/327)",
        (parts.head(evidence, "ehds-permit"), Section("A permit, in the study's words", tuple(said))),
    )
