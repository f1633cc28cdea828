"""What several documents of a dossier say: purpose, release, privacy, attacks, and what the log shows as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from privet.common.errors import StateError
from privet.common.log.statements import EgressReview, Export, RoundAbort, RoundClose, RoundOpened, RunOpen
from privet.common.progress import number_of
from privet.common.study.terms import terms_text
from privet.simulations.attacks.labels import label
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.gate import canaries_alone, candidate
from privet.simulations.dossier.sources import Claim, Gap, OfFile, OfStudy, Section, Sentence, missing
from privet.simulations.dossier.words import day_of, placeholder, quoted, sentence, spoken

PAGE = "docs/dossier.md"
CONTROLLER = "the controller"
PROVIDER = "the provider"
EACH_SITE = "each site"
CONSORTIUM = "the consortium"
TESTER = "whoever tests the adapter"

_METHODS = {
    "ffa": "The coordinator averages one of the adapter's two parts; the other stays as it began",
    "fedsvd": "The coordinator averages one of the adapter's two parts, and then writes both anew",
    "fedavg": "The coordinator averages both parts of the adapter",
}
_ATTACKS = {
    "canaries": "an audit with planted records, which bounds epsilon from below and proves no protection",
    "membership": "an attack that tells training records from others (membership inference)",
    "reconstruction": "an attack that reads words from a site's update (reconstruction)",
    "poisoning": "an attack by malicious sites on what the adapter answers (poisoning)",
}


def head(evidence: Evidence, anchor: str, use: str = "") -> Section:
    """Return the section with which each document begins: what it is, and that its evidence was verified.

    Args:
        evidence: What is known about the run.
        anchor: Of the section of the manual that describes the document.
        use: For whom the document is, where it is not for all.
    """
    report, who = evidence.report, spoken(evidence.report.verdict.cosigners)
    witnesses = f"simulated witnesses, named {who}, whose keys lay on one machine" if evidence.simulated else who
    said = [
        Sentence(
            "This document collects what privet can show, and names what it cannot. It is input for people who decide, "
            f"and no finding of conformity with any law.{use and ' ' + use}",
            Claim(PAGE, "what-it-is-and-what-it-is-not"),
            Claim(PAGE, anchor),
        ),
        Sentence(
            f"Before a sentence was written, run {evidence.run} was verified: {report.verdict.size} entries (leaves) "
            f"of the log; the signatures of its witnesses ({witnesses}); and study, rounds and any release against the "
            "log.",
            evidence.log,
            Claim("docs/audit.md", "the-verdict"),
            leaves=report.verdict.size,
        ),
    ]
    if not any(each.ended for _, each in evidence.all(RoundClose)) and not aborted_to_the_end(evidence):
        said.append(Sentence("The run has not ended: what follows is its state until now.", evidence.log))
    return Section("What this document is", tuple(said))


def simulation(evidence: Evidence) -> Section:
    """Return the warning with which each document of a simulated run begins."""
    return Section(
        "This run was a SIMULATION",
        (
            Sentence(
                "All sites were processes on one machine, the noise can be recomputed by anybody, and nothing here "
                "shows how a real site behaves. Sites and witnesses are names in a file: no institution of such a name "
                "has signed anything.",
                evidence.log,
                Claim("docs/simulation.md", "limits"),
            ),
        ),
        warning=True,
    )


def aborted_to_the_end(evidence: Evidence) -> bool:
    """Whether the last round of the study was aborted, with which a run ends as well."""
    return any(each.round == evidence.study.rounds for _, each in evidence.all(RoundAbort))


def proved(evidence: Evidence) -> Sentence:
    """Return what a verified log proves, and what it does not."""
    text = (
        "The log is whole: nobody changed it since. One program signed for all parties of this simulation, so it "
        "proves nothing about any of them."
        if evidence.simulated
        else "The log proves what each party stated, and that nobody changed it since. It cannot prove that a site "
        "trained as it states."
    )
    return Sentence(text, evidence.log, Claim("docs/round-log.md", "1-what-a-verified-log-proves-and-what-it-does-not"))


def purpose(evidence: Evidence) -> list[Sentence]:
    """Return purpose, legal basis and contacts in the study's own words."""
    found = evidence.study.purpose
    if found is None:
        return [missing("the purpose, the legal basis and contacts, as the study has no table [purpose]")]
    fields = [
        ("Purpose", "the purpose", found.text, evidence.field("purpose.text")),
        ("Legal basis", "the legal basis", found.legal_basis, evidence.field("purpose.legal_basis")),
        *(("Contact", "a contact", each, evidence.field("purpose.contacts")) for each in found.contacts),
    ]
    return [
        *(in_the_studys_words(*each) for each in fields),
        Sentence(
            "privet shows these statements to the sites before they approve the study, and checks none of them.",
            Claim("docs/privacy-officer.md", "purpose-legal-basis-and-permit"),
        ),
    ]


def in_the_studys_words(name: str, what: str, text: str, source: OfStudy) -> Sentence:
    """Return a statement of the study in its own words, or the gap that a placeholder leaves."""
    said = f"{name}, in the study's words: {sentence(text)}"
    if not placeholder(text):
        return Sentence(said, source)
    return Sentence(
        f"{said} The study holds a placeholder; the controller has to state it.",
        source,
        Gap(CONTROLLER, f"{what} (the study holds a placeholder)"),
    )


def release(evidence: Evidence) -> list[Sentence]:
    """Return which adapter was released, and its terms."""
    study = evidence.study
    exports = evidence.all(Export)
    if not exports:
        return candidate(evidence)
    leaf, export = exports[-1]
    said = [
        Sentence(
            f"Run {evidence.run} of study {study.name} released the adapter {export.adapter} after round "
            f"{export.round}, on {day_of(export.time)} by the coordinator's clock.",
            leaf,
            round=export.round,
        )
    ]
    if study.release is None:
        said.append(
            Sentence(
                "The study states no terms: every member that may see the study may receive the adapter, for any "
                "purpose and without end.",
                evidence.file("study.json"),
                Claim("docs/study-reference.md", "release"),
            )
        )
    else:
        said.append(Sentence(terms_text(study), evidence.field("release")))
    for each, statement in evidence.told:
        if statement.type == "adapter-state":
            fields = statement.model_dump(mode="json")
            said.append(
                Sentence(
                    f"On {day_of(statement.time)} the coordinator stated that the adapter is {fields['state']}: "
                    f"{quoted(fields['reason'])}",
                    evidence.at(each, statement),
                )
            )
    return said


def course(evidence: Evidence) -> list[Sentence]:
    """Return which rounds there were."""
    (leaf, opened) = evidence.all(RunOpen)[-1]
    closed, aborted = evidence.all(RoundClose), evidence.all(RoundAbort)
    sites = sorted({site for _, each in closed for site in each.survivors})
    return [
        Sentence(
            f"The coordinator began the run on {day_of(opened.time)} by its clock, for study {opened.study}.",
            leaf,
        ),
        Sentence(
            f"Of {number_of(opened.rounds, 'planned round')}, {len(closed)} ended with a result and {len(aborted)} "
            "without one. "
            + (
                f"Updates of {number_of(len(sites), 'site')} are in the results: {spoken(sites)}."
                if sites
                else "No site's update is in a result."
            ),
            leaf,
            evidence.log,
            rounds=opened.rounds,
            closed=len(closed),
            aborted=len(aborted),
            sites=len(sites),
        ),
    ]


def nothing_measured(evidence: Evidence) -> list[Sentence]:
    """Return that no attack was tried on the run; nothing where one was, or where a site has tested the candidate."""
    if evidence.attacks or evidence.all(EgressReview):
        return []
    return [
        Sentence(
            "Nothing about attacks was measured in this run.",
            evidence.log,
            Claim(PAGE, "anonymity-assessment"),
        )
    ]


def attacks(evidence: Evidence) -> list[Sentence]:
    """Return the results of attacks, for documents that are not the assessment of anonymity, which lists all of them.

    Raises:
        StateError: A result has not the fields that the attack writes.
    """
    nothing = nothing_measured(evidence)
    if not nothing:
        return every_attack(evidence)
    return [*nothing, missing("results of the attacks that the assessment of anonymity lists", TESTER)]


def every_attack(evidence: Evidence) -> list[Sentence]:
    """Return the results of the attacks that were tried on the run, and which were not.

    Raises:
        StateError: A result has not the fields that the attack writes.
    """
    said = []
    for name, what in _ATTACKS.items():
        if name not in evidence.attacks:
            said.append(missing(f"the result of {what}", TESTER))
            continue
        try:
            said += _RESULTS[name](evidence.attacks[name], evidence.file(f"attacks/{name}.json"))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StateError(
                f"the result of the attack {name} lacks a field or has a wrong value ({type(error).__name__})",
                f"run the attack again: `privet attack {name} --help`",
            ) from None
    if "canaries" in evidence.attacks:
        said.append(canaries_alone())
    if evidence.attacks:
        here = " A promise in a simulation protects nobody." if evidence.simulated else ""
        said.append(
            Sentence(
                f"No log covers these results: they are the word of whoever ran the attacks.{here}",
                Claim(PAGE, "what-the-sources-are"),
            )
        )
    return said


def _canaries(found: Mapping[str, Any], file: OfFile) -> list[Sentence]:
    said = []
    for arm in found["arms"]:
        audit, claim = arm["audit"], arm["claimed_epsilon"]
        verdict = "nothing is promised"
        if claim is not None:
            verdict = f"promised is {claim:g}, which this {'does not refute' if arm['holds'] else 'REFUTES'}"
        said.append(
            Sentence(
                f"Planted records, {label(arm['arm'])}: {audit['right']} of {audit['guesses']} guesses were right, so "
                f"epsilon is at least {audit['epsilon']:.2f} with 95 % confidence; {verdict}.",
                file,
                Claim("docs/attacks.md", "canaries-is-the-promise-kept"),
                epsilon_at_least=float(audit["epsilon"]),
            )
        )
    return said


def _membership(found: Mapping[str, Any], file: OfFile) -> list[Sentence]:
    said = []
    for arm in found["arms"]:
        for score, name in (("loss", "loss threshold"), ("lira", "LiRA"), ("blind", "a control that knows nothing")):
            auc, (low, high) = float(arm[score]["auc"]), arm[score]["interval"]
            said.append(
                Sentence(
                    f"Membership inference by {name}, {label(arm['arm'])}, target {arm['target']}: area under the ROC "
                    f"curve {auc:.3f}, 95 % interval {low:.3f} to {high:.3f}, where 0.5 is guessing.",
                    file,
                    Claim("docs/attacks.md", "membership-who-was-in-the-data"),
                    auc=auc,
                )
            )
    return said


def _reconstruction(found: Mapping[str, Any], file: OfFile) -> list[Sentence]:
    return [
        Sentence(
            f"Reconstruction from an update, {arm['arm']}: {100 * arm['recovered']:.1f} % of words were recovered, and "
            f"{100 * arm['control']:.1f} % by chance; {arm['records_exact']} of {arm['records']} records in full.",
            file,
            Claim("docs/attacks.md", "reconstruction-which-words-can-be-recovered"),
            recovered=float(arm["recovered"]),
        )
        for arm in found["arms"]
    ]


def _poisoning(found: Mapping[str, Any], file: OfFile) -> list[Sentence]:
    return [
        Sentence(
            f"Poisoning by {found['malicious']} of {found['sites']} sites, attack {arm['attack']}, defence "
            f"{arm['defence']}: accuracy {100 * arm['accuracy']:.1f} %, and the attack succeeds on "
            f"{100 * arm['success']:.1f} % of test records.",
            file,
            Claim("docs/attacks.md", "poisoning-what-can-malicious-sites-do"),
            accuracy=float(arm["accuracy"]),
        )
        for arm in found["arms"]
    ]


_RESULTS: Mapping[str, Callable[[Mapping[str, Any], OfFile], list[Sentence]]] = {
    "canaries": _canaries,
    "membership": _membership,
    "reconstruction": _reconstruction,
    "poisoning": _poisoning,
}


def measured(evidence: Evidence) -> list[Sentence]:
    """Return what the sites measured together on held-out units, of the last round that measured."""
    found = [(leaf, each) for leaf, each in evidence.all(RoundClose) if each.metrics]
    if evidence.study.counts:
        return []
    if not found:
        return [missing("how well the adapter does: the study holds out no units for validation")]
    leaf, end = found[-1]
    metrics = end.metrics or {}
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in sorted(metrics.items()))
    noise = " The figures carry the sites' noise." if evidence.study.private else ""
    return [
        Sentence(
            f"Measured on {evidence.study.privacy.unit}s that the sites hold out from training, all sites together, "
            f"before round {end.round}: {values}.{noise} What the last round added was not measured.",
            leaf,
            Claim("docs/privacy.md", "why-it-holds"),
            round=end.round,
            **{name: float(value) for name, value in metrics.items()},
        )
    ]


def training(evidence: Evidence) -> list[Sentence]:
    """Return how the adapter was made."""
    study = evidence.study
    if study.counts:
        return [Sentence("Nothing is trained: the one round counts or measures.", evidence.field("kind"))]
    full = f", and in full {', '.join(study.lora.modules_to_save)}" if study.lora.modules_to_save else ""
    return [
        Sentence(
            "What is trained is an adapter (LoRA): a small set of numbers that is added to a base model, which itself "
            f"does not change. Its rank, which sets its size, is {study.lora.ranks_text}; it changes the layers "
            f"{spoken(study.lora.targets)}{full}. Its task is {study.task.kind}.",
            evidence.field("lora.rank"),
            evidence.field("lora.targets"),
            evidence.field("task.kind"),
            **({"rank": float(study.lora.ranks_text)} if study.lora.ranks_text.isdecimal() else {}),
        ),
        Sentence(
            f"Training has {number_of(study.training.rounds, 'round')} of {number_of(study.training.steps, 'step')} "
            f"each. In a step, a site uses each {study.privacy.unit} with a probability of "
            f"{100 * study.training.sampling_rate:.3g} %. {_METHODS[study.aggregation.method]} "
            f"({study.aggregation.method}).",
            evidence.field("training.rounds"),
            evidence.field("training.sampling_rate"),
            evidence.field("aggregation.method"),
            Claim("docs/architecture.md", "one-round"),
            rounds=study.training.rounds,
            steps=study.training.steps,
            sampling_rate=study.training.sampling_rate,
        ),
        Sentence(
            f"The base model is {study.model.base}. The study names {number_of(len(study.model.sha256), 'file')} of it "
            "with their SHA-256, and a site refuses others.",
            evidence.field("model.sha256"),
            evidence.all(RunOpen)[-1][0],
            Claim("docs/bases.md", "pin-a-base"),
            files=len(study.model.sha256),
        ),
        missing("the base model's own training data, its licence and its terms", PROVIDER),
    ]


def rounds_in_time(evidence: Evidence) -> tuple[float, float] | None:
    """Return the times of the first and of the last round that opened; None before the first."""
    times = [each.time for _, each in evidence.all(RoundOpened)]
    return (min(times), max(times)) if times else None
