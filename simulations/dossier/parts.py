"""What several documents of a dossier say: purpose, release, privacy, attacks, and what the log shows as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from privet.common.audit.release import PRIVACY
from privet.common.errors import StateError
from privet.common.log.statements import Export, RoundAbort, RoundClose, RoundOpened, RunOpen
from privet.common.masking.groups import corrupt_sites
from privet.common.progress import number_of
from privet.common.study.terms import terms_text
from privet.simulations.attacks.labels import label
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.gate import candidate
from privet.simulations.dossier.sources import Claim, OfFile, Section, Sentence, Source, missing
from privet.simulations.dossier.words import day_of, factor_of, plain, quoted, sentence, shown, spoken

PAGE = "docs/dossier.md"
CONTROLLER = "the controller"
PROVIDER = "the provider"
EACH_SITE = "each site"

_METHODS = {
    "ffa": "The coordinator averages one of the adapter's two parts; the other stays as it began",
    "fedsvd": "The coordinator averages one of the adapter's two parts, and then writes both anew",
    "fedavg": "The coordinator averages both parts of the adapter",
}
_UNBOUNDED = "Nothing bounds what is learnt about one person, as there is no differential privacy."
_ATTACKS = {
    "canaries": "an audit with planted records, which bounds epsilon from below",
    "membership": "an attack that tells training records from others (membership inference)",
    "reconstruction": "an attack that reads words from a site's update (reconstruction)",
    "poisoning": "an attack by malicious sites on what the adapter answers (poisoning)",
}


def head(evidence: Evidence, anchor: str) -> Section:
    """Return the section with which each document begins: what it is, and that its evidence was verified."""
    report = evidence.report
    said = [
        Sentence(
            "privet is a program by which several sites, such as hospitals, train one model together. The records stay "
            "at their sites. A coordinator adds up what the sites send. A log that the sites witness holds each step.",
            Claim("docs/architecture.md", "one-round"),
            Claim(PAGE, "words"),
        ),
        Sentence(
            "This document collects what privet can show, and names what it cannot. It is input for people who decide, "
            "and a measure of readiness. It is no finding of conformity with any law.",
            Claim(PAGE, "what-it-is-and-what-it-is-not"),
            Claim(PAGE, anchor),
        ),
    ]
    if evidence.simulated:
        said.append(
            Sentence(
                "The run is a SIMULATION. Its sites were simulated on one machine, and its noise came from a public "
                "seed, which protects nobody. What is said of protection holds for sites with noise of their own, and "
                "not for this run.",
                evidence.log,
            )
        )
    said.append(
        Sentence(
            f"Before a sentence was written, run {evidence.run} was verified: all {report.verdict.size} entries "
            f"(leaves) of the log; the signatures of its witnesses, {spoken(report.verdict.cosigners)}; and the study, "
            "the rounds and any release against the log.",
            evidence.log,
            Claim("docs/audit.md", "the-verdict"),
            leaves=report.verdict.size,
        )
    )
    if not any(each.ended for _, each in evidence.all(RoundClose)) and not aborted_to_the_end(evidence):
        said.append(Sentence("The run has not ended: what follows is its state until now.", evidence.log))
    return Section("What this document is", tuple(said))


def aborted_to_the_end(evidence: Evidence) -> bool:
    """Whether the last round of the study was aborted, with which a run ends as well."""
    return any(each.round == evidence.study.rounds for _, each in evidence.all(RoundAbort))


def purpose(evidence: Evidence) -> list[Sentence]:
    """Return purpose, legal basis and contacts in the study's own words."""
    found = evidence.study.purpose
    if found is None:
        return [missing("the purpose, the legal basis and contacts, as the study has no table [purpose]")]
    return [
        Sentence(f"Purpose, in the study's words: {sentence(found.text)}", evidence.field("purpose.text")),
        Sentence(
            f"Legal basis, in the study's words: {sentence(found.legal_basis)}", evidence.field("purpose.legal_basis")
        ),
        Sentence(
            f"Contacts, in the study's words: {', '.join(map(quoted, found.contacts))}.",
            evidence.field("purpose.contacts"),
        ),
        Sentence(
            "privet shows these statements to the sites before they approve the study, and checks none of them.",
            Claim("docs/privacy-officer.md", "purpose-legal-basis-and-permit"),
        ),
    ]


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


def last_end(evidence: Evidence) -> Source:
    """Return the last end of a round, whose epsilons are those of the whole run; the log before the first one."""
    ends = [*evidence.all(RoundClose), *evidence.all(RoundAbort)]
    return max((leaf for leaf, _ in ends), key=lambda leaf: leaf.index, default=evidence.log)


def privacy(evidence: Evidence) -> list[Sentence]:
    """Return what the run promises for one unit, and what was spent."""
    study, document = evidence.study, evidence.privacy
    if not study.private:
        return [
            Sentence(
                "There is NO differential privacy: the study's privacy mode is none. Nothing bounds what the adapter "
                "tells about one person.",
                evidence.field("privacy.mode"),
            )
        ]
    costs, unit = document["epsilon"], study.privacy.unit
    factor, power = factor_of(costs["run"])
    delta = plain(costs["delta"])
    whom = {
        "record": "one record, which is one row of a site's files. A person with several rows is protected less",
        "patient": f"one patient, which is all rows of a site that share a value of column {study.data.unit}",
    }[unit]
    shared = study.privacy.mode == "distributed"
    claim = Claim("docs/privacy.md", "noise-in-shares" if shared else "the-guarantee")
    seen = "the coordinator and corrupt sites conclude from the sums" if shared else "anybody concludes from that"
    return [
        Sentence(
            "Differential privacy is noise by which results hardly depend on any one "
            f"{unit}. Epsilon and delta say how much they still depend on it: the smaller, the better protected.",
            claim,
            Claim("docs/glossary.md", "privacy"),
        ),
        Sentence(
            f"The study promises epsilon {costs['target']:g} at delta {delta} for {whom}.",
            evidence.field("privacy.epsilon"),
            evidence.field("privacy.delta"),
            evidence.field("privacy.unit"),
            promised=costs["target"],
            delta=costs["delta"],
        ),
        Sentence(
            f"Spent in this run, by any one site: epsilon {shown(costs['run'])} at most, rounded up. For this dossier "
            "it was computed again from the rounds in the log.",
            last_end(evidence),
            evidence.log,
            Claim("docs/privacy.md", "accounting"),
            spent=costs["run"],
        ),
        Sentence(
            f"That means: a site releases something with or without one {unit} in its files. The probability of "
            f"whatever {seen} differs by a factor of at most {power}, and by at most {delta} more. The closer the "
            f"factor is to 1, the less anybody can learn about the {unit}.",
            last_end(evidence),
            claim,
            factor=factor,
            delta=costs["delta"],
        ),
        Sentence(
            "The guarantee holds against the coordinator together with some corrupt sites, if the other sites add "
            "their shares of the noise."
            if shared
            else "Each site adds all of its noise itself. The guarantee holds against everybody else: the coordinator, "
            "the other sites, and whoever gets the adapter.",
            evidence.field("privacy.mode"),
            claim,
        ),
    ]


def not_covered(evidence: Evidence) -> list[Sentence]:
    """Return what the guarantee does not cover."""
    return _listed(
        evidence, "not_covered", "Epsilon does not cover this", Claim("docs/privacy.md", "what-local-privacy-cannot-do")
    )


def side_channels(evidence: Evidence) -> list[Sentence]:
    """Return the side channels around the mechanism."""
    claims = (Claim("docs/privacy.md", each) for each in ("noise-and-floating-point", "what-local-privacy-cannot-do"))
    return _listed(evidence, "side_channels", "Side channel", *claims)


def _listed(evidence: Evidence, field: str, lead: str, claim: Claim, *more: Claim) -> list[Sentence]:
    """Return one sentence for each point of a list in the privacy statement. The released one is cited if it agrees."""
    if not evidence.study.private:
        return [Sentence(_UNBOUNDED, evidence.field("privacy.mode"))]
    name = f"release/{PRIVACY}.json"
    released = json.loads(evidence.files[name]).get(field, {}) if name in evidence.files else {}
    said = []
    for point, text in evidence.privacy.get(field, {}).items():
        held = [evidence.file(name)] if released.get(point) == text else []
        said.append(Sentence(f"{lead} ({point}): {text}", claim, *more, *held))
    return said


def hidden_sums(evidence: Evidence) -> list[Sentence]:
    """Return what the coordinator sees of a single site."""
    study = evidence.study
    mode = evidence.field("secure_aggregation.mode")
    if study.secure_aggregation.mode != "masked":
        return [Sentence("Updates are not masked: the coordinator sees the update of each site by itself.", mode)]
    sizes = sorted({len(each.cohort) for _, each in evidence.all(RoundOpened)}) or [study.cohort.min_sites]
    least = corrupt_sites(study, sizes[0])
    return [
        Sentence(
            "Updates are masked: the coordinator sees sums over sites, and no single update, as long as no more than "
            f"{least} of the {sizes[0]} sites in a round help it against the others.",
            mode,
            evidence.field("secure_aggregation.corrupt"),
            evidence.log,
            Claim("docs/secure-aggregation.md", "1-parties-and-claims"),
            corrupt=least,
            asked=sizes[0],
        )
    ]


def attacks(evidence: Evidence) -> list[Sentence]:
    """Return the results of the attacks that were tried on the run, and which were not.

    Raises:
        StateError: A result has not the fields that the attack writes.
    """
    said = []
    for name, what in _ATTACKS.items():
        if name not in evidence.attacks:
            said.append(missing(f"the result of {what}", "whoever tests the adapter"))
            continue
        try:
            said += _RESULTS[name](evidence.attacks[name], evidence.file(f"attacks/{name}.json"))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StateError(
                f"the result of the attack {name} lacks a field or has a wrong value ({type(error).__name__})",
                f"run the attack again: `privet attack {name} --help`",
            ) from None
    if evidence.attacks:
        said.append(
            Sentence(
                "No log covers these results: they are the word of whoever ran the attacks.",
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
