"""The documents in no regulation's order: NIST SP 800-226 statement, model card, data sheets of sites."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from privet.client.pages.suppression import SMALLEST, hidden
from privet.common.audit.counts import counts_document
from privet.common.log.statements import Genesis, Join, Revoke, RoundClose, RoundOpened, RunOpen, SiteRound
from privet.common.progress import number_of
from privet.simulations.dossier import parts, promise
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.sources import Claim, Document, OfLeaf, Section, Sentence, missing
from privet.simulations.dossier.words import day_of, plain, quoted, shown, spoken


def nist(evidence: Evidence) -> Document:
    """Return the statement in the order of the evaluation pyramid of NIST SP 800-226 (2025)."""
    study = evidence.study
    sections = [
        parts.head(evidence, "nist-sp-800-226"),
        Section("Epsilon and delta", (*promise.privacy(evidence), *_by_site(evidence), *promise.others(evidence))),
    ]
    if study.private:
        sections += [
            Section("Unit of privacy", tuple(_unit(evidence))),
            Section("Mechanism", tuple(_mechanism(evidence))),
            Section("Accounting", tuple(_accounting(evidence))),
        ]
    sections += [
        Section("Utility", tuple(parts.measured(evidence)) or tuple(_counted(evidence))),
        Section("Trust model", (*promise.hidden_sums(evidence), *_shares(evidence))),
        Section("Randomness", tuple(_randomness(evidence))),
        Section("Side channels", tuple(promise.side_channels(evidence))),
        Section("Not covered", tuple(promise.not_covered(evidence))),
        Section(
            "Base of the pyramid: access and collection",
            (
                missing("who may read the records at a site, and how they were collected", parts.EACH_SITE),
                Sentence(
                    "What privet claims about keys, machines and messages is written down with its tests.",
                    Claim("SECURITY.md", "what-is-claimed"),
                ),
            ),
        ),
    ]
    return Document("nist-sp-800-226", "Statement in the order of NIST SP 800-226", tuple(sections))


def _by_site(evidence: Evidence) -> list[Sentence]:
    sites = evidence.privacy.get("epsilon", {"sites": {}})["sites"]
    if not sites:
        return []
    source = promise.last_end(evidence)
    said = [
        Sentence(
            f"{site}: asked into {number_of(cost['rounds'], 'round')}, {promise.epsilon(evidence, cost['epsilon'])} at "
            "most.",
            source,
            evidence.log,
            rounds=cost["rounds"],
            epsilon=cost["epsilon"],
        )
        for site, cost in sites.items()
    ]
    coarse = max(cost["epsilon_rdp"] for cost in sites.values())
    said.append(
        Sentence(
            f"As a check, {promise.epsilon(evidence, coarse)} at most for any site by another method (Rényi). A "
            "coarser method gives a larger bound, as expected; both are upper bounds.",
            source,
            evidence.log,
            Claim("docs/privacy.md", "accounting"),
            epsilon_rdp=coarse,
        )
    )
    return said


def _unit(evidence: Evidence) -> list[Sentence]:
    return [
        Sentence(
            f"The unit of privacy is a {evidence.study.privacy.unit}: the promise compares results with one "
            f"{evidence.study.privacy.unit} and without it.",
            evidence.field("privacy.unit"),
            Claim("docs/privacy.md", "the-guarantee"),
        )
    ]


def _mechanism(evidence: Evidence) -> list[Sentence]:
    leaf, opened = evidence.all(RunOpen)[-1]
    claim = Claim("docs/privacy.md", "why-it-holds")
    said = []
    if opened.privacy is None:
        return [Sentence("The log states no mechanism.", leaf)]
    for name, each in (
        ("Training", opened.privacy.training if evidence.study.training.rounds else None),
        ("Validation", opened.privacy.validation),
        ("The first round, one sum over all units", opened.privacy.head),
    ):
        if each is not None:
            said.append(
                Sentence(
                    f"{name}: {number_of(each.steps, 'step')} in a round, in which each {each.unit} is used with a "
                    f"probability of {100 * each.sampling_rate:.3g} %. The noise has {each.noise_multiplier:.6g} times "
                    f"the size of the largest term of one {each.unit} (noise multiplier; mechanism "
                    f"{each.mechanism}).",
                    leaf,
                    claim,
                    noise_multiplier=each.noise_multiplier,
                    sampling_rate=each.sampling_rate,
                    steps=each.steps,
                )
            )
    said.append(
        Sentence(
            f"Before noise is added, what one {evidence.study.privacy.unit} adds to a sum is cut to a length (L2 norm) "
            f"of at most {opened.privacy.clip_norm:g}, by {evidence.study.privacy.clipping} clipping.",
            evidence.field("privacy.clip_norm"),
            evidence.field("privacy.clipping"),
            claim,
            clip_norm=opened.privacy.clip_norm,
        )
    )
    return said


def _accounting(evidence: Evidence) -> list[Sentence]:
    leaf, opened = evidence.all(RunOpen)[-1]
    accountant = "" if opened.privacy is None else opened.privacy.accountant
    said = [
        Sentence(
            f"Epsilon was computed by the method and library `{accountant}`. It is the cost of this run: every round "
            "that a site was asked into counts, also if its update was lost.",
            leaf,
            Claim("docs/privacy.md", "accounting"),
        )
    ]
    has = "would have" if evidence.simulated else "has"
    own = {each.site: leaf for leaf, each in evidence.all(SiteRound)}
    for cost in evidence.report.costs:
        if cost.site in own:
            limit = "no limit" if cost.limit is None else f"a limit of {cost.limit:g}"
            said.append(
                Sentence(
                    f"What {cost.site} {has} spent in all runs of this log: {promise.epsilon(evidence, cost.computed)} "
                    f"at delta {plain(cost.delta)}, as computed for this dossier. The site itself states "
                    f"{shown(cost.stated)}, and {limit}.",
                    own[cost.site],
                    evidence.log,
                    delta=cost.delta,
                    computed=cost.computed,
                    stated=cost.stated,
                )
            )
    said.append(missing("what the same people's data cost in studies outside this log", parts.EACH_SITE))
    return said


def _shares(evidence: Evidence) -> list[Sentence]:
    """Return what shared noise relies on; nothing where each site adds all of its noise."""
    trust, claim = evidence.privacy["trust"], Claim("docs/privacy.md", "noise-in-shares")
    said = [
        Sentence(
            f"Of {row['sites']} sites that are asked, a sum has at least {row['survivors']}. At most {row['corrupt']} "
            f"of them are corrupt, and at least {row['helpers']} add their share of the noise.",
            evidence.field("privacy.mode"),
            evidence.field("secure_aggregation.corrupt"),
            claim,
            **{name: float(value) for name, value in row.items()},
        )
        for row in trust.get("shares", ())
    ]
    if said:
        alone = trust["own_share_epsilon"]
        left = "nothing that counts" if alone is None else f"{promise.epsilon(evidence, alone)}, at the same delta"
        said.append(
            Sentence(
                f"If every other site is corrupt, a site's own share of the noise leaves: {left}.",
                evidence.log,
                claim,
            )
        )
    return said


def _randomness(evidence: Evidence) -> list[Sentence]:
    found = evidence.privacy.get("randomness")
    if found is None:
        return [Sentence("No noise is drawn.", evidence.field("privacy.mode"))]
    return [
        Sentence(
            f"The random numbers for sampling and noise come from {found['stream']}, whose key is from the "
            f"{found['key']}. The noise is a {found['noise']}.",
            evidence.log,
            Claim("docs/privacy.md", "noise-and-floating-point"),
        )
    ]


def model_card(evidence: Evidence) -> Document:
    """Return the model card."""
    return Document(
        "model-card",
        "Model card",
        (
            parts.head(evidence, "model-card"),
            Section("Model", (*parts.release(evidence), *parts.training(evidence))),
            Section("Intended use", (*parts.purpose(evidence), missing("uses that are out of scope", parts.PROVIDER))),
            Section("How it was made", tuple(parts.course(evidence))),
            Section("Privacy", tuple(promise.privacy(evidence))),
            Section(
                "Measured",
                (
                    *parts.measured(evidence),
                    *_counted(evidence),
                    missing("results by group, with intervals, on records that no site trained on", parts.EACH_SITE),
                ),
            ),
            Section("Attacks", tuple(parts.attacks(evidence))),
            Section(
                "Limits",
                (
                    missing("how well it does on data unlike the sites'", parts.PROVIDER),
                    parts.proved(evidence),
                ),
            ),
        ),
    )


def _counted(evidence: Evidence) -> list[Sentence]:
    """Return the result of a study that counts. Without noise, counts of few records are not shown."""
    if not evidence.study.counts:
        return []
    closed = evidence.all(RoundClose)
    if not closed:
        return [Sentence("No round was closed, so there is no result.", evidence.log)]
    document, leaf = counts_document(evidence.study, evidence.statements), closed[-1][0]
    cells = {each["name"]: each for each in document["cells"]}
    secret = frozenset[str]()
    if not evidence.study.private:
        secret = hidden({name: float(each["value"]) for name, each in cells.items()})
    said = [
        Sentence(
            f"Over all sites, {each['title']}: {each['value']:.1f}, 95 % interval {each['low']:.1f} to "
            f"{each['high']:.1f}.",
            leaf,
            value=float(each["value"]),
        )
        for name, each in cells.items()
        if name not in secret
    ]
    if secret:
        said.append(
            Sentence(
                f"{len(secret)} counts are not shown, as they are below {SMALLEST}, or such a count follows from them.",
                leaf,
                Claim("docs/dossier.md", "small-counts"),
            )
        )
    return said


def data_sheets(evidence: Evidence) -> Document:
    """Return the data sheets of the sites in one table: what the log shows of each, and what all have to add."""
    sheets = _sheets(evidence)
    return Document(
        "data-sheets",
        "Data sheets of the sites",
        (
            parts.head(evidence, "data-sheets"),
            Section(
                "All sites",
                (
                    Sentence(
                        "Here is what the log shows of each site. The log holds no count of records. A site may commit "
                        "to a count: the log then has a hash of it, which the site alone can open."
                        + (f" Counts below {SMALLEST} are not shown." if evidence.study.counts else ""),
                        evidence.log,
                        Claim("docs/dossier.md", "small-counts"),
                    ),
                    Sentence(
                        "The policy by which a site admitted the study stays at the site. It can be asked for, and "
                        "compared with its digest.",
                        evidence.log,
                        Claim("docs/site-policy.md", "the-sites-policy"),
                    ),
                    *_unlimited(evidence),
                    *_counted(evidence),
                    missing("the count that it declares, and the dates between which its records lie", parts.EACH_SITE),
                    missing(
                        "provenance, inclusion and exclusion, labels, and what was removed before training",
                        parts.EACH_SITE,
                    ),
                ),
            ),
            *([Section("Site by site", tuple(sheets), columns=_COLUMNS)] if sheets else []),
        ),
    )


def _unlimited(evidence: Evidence) -> list[Sentence]:
    """Return which sites limit nothing, by the last statement of each."""
    last = {each.site: (leaf, each.charge) for leaf, each in evidence.all(SiteRound) if each.charge is not None}
    free = {site: leaf for site, (leaf, charge) in last.items() if charge.limit is None}
    if not free:
        return []
    first, *more = _ends([free[site] for site in sorted(free)])
    every = len(free) == len(last) > 1
    who = f"All {len(last)} sites limit" if every else f"{spoken(sorted(free))} limit{'s' if len(free) == 1 else ''}"
    return [
        Sentence(
            f"{who} nothing: further studies may add any amount.",
            first,
            *more,
            evidence.log,
            **({"sites": len(last)} if every else {}),
        )
    ]


_COLUMNS = ("site", "member", "rounds: asked, stated, in results", "cost, as it states", "policy", "committed to")
_DIGITS = len("sha256:") + 16
"""Letters of a digest in the table. The sentence and the leaf have all."""


@dataclass
class _Seen:
    """What the log shows of one site: leaves by what they say of it, each in order."""

    asked: list[OfLeaf] = field(default_factory=list)
    stated: list[tuple[OfLeaf, SiteRound]] = field(default_factory=list)
    summed: list[OfLeaf] = field(default_factory=list)
    membership: list[tuple[str, OfLeaf]] = field(default_factory=list)


def _sheets(evidence: Evidence) -> list[Sentence]:
    """Return the row of each site that was asked into a round, in one pass over the log."""
    sites: defaultdict[str, _Seen] = defaultdict(_Seen)
    joins: list[tuple[OfLeaf, Genesis | Join]] = [*evidence.all(Genesis), *evidence.all(Join)]
    for leaf, joined in joins:
        for member in joined.joining:
            sites[member.site].membership.append((f"since {day_of(joined.time)}", leaf))
    for leaf, revoked in evidence.all(Revoke):
        text = f"revoked on {day_of(revoked.time)}: {quoted(revoked.reason)}"
        sites[revoked.site].membership.append((text, leaf))
    for leaf, opened in evidence.all(RoundOpened):
        for site in opened.cohort:
            sites[site].asked.append(leaf)
    for leaf, stated in evidence.all(SiteRound):
        sites[stated.site].stated.append((leaf, stated))
    for leaf, closed in evidence.all(RoundClose):
        for site in closed.survivors:
            sites[site].summed.append(leaf)
    return [_sheet(evidence, site, seen) for site, seen in sorted(sites.items()) if seen.asked]


def _sheet(evidence: Evidence, site: str, seen: _Seen) -> Sentence:
    """Return what the log shows of a site, as a sentence and as a row of a table."""
    member = "; ".join(text for text, _ in seen.membership) or "not in this log"
    rounds = len(seen.asked), len(seen.stated), len(seen.summed)
    sources = [leaf for _, leaf in seen.membership] + list(_ends(seen.asked))
    figures = dict(zip(("asked", "stated", "summed"), map(float, rounds), strict=True))
    text = (
        f"{site}: member {member}. It was asked into {number_of(rounds[0], 'round')}, signed a statement in "
        f"{rounds[1]}, and its update is in the result of {rounds[2]}."
    )
    cost, policy, committed = "nothing stated", "none stated", ""
    if seen.stated:
        leaf, last = seen.stated[-1]
        sources.append(leaf)
        policy, committed = last.policy, ", ".join(sorted(last.commitments))
        if last.charge is not None:
            figures |= {"epsilon": last.charge.epsilon, "delta": last.charge.delta}
            limit = "no limit" if last.charge.limit is None else f"limit {last.charge.limit:g}"
            cost = f"{promise.epsilon(evidence, last.charge.epsilon)}, {limit}"
            text += (
                f" By its own statement, its records cost {promise.epsilon(evidence, last.charge.epsilon)} at delta "
                f"{plain(last.charge.delta)} up to then; it has {limit}."
            )
        text += f" Digest of its policy: {policy}."
    if committed:
        text += f" It has committed to values of: {committed}."
    cells = (site, member, ", ".join(map(str, rounds)), cost, f"{policy[:_DIGITS]}…", committed or "none")
    return Sentence(text, evidence.log, *dict.fromkeys(sources), **figures).row(*cells)


def _ends(leaves: list[OfLeaf]) -> tuple[OfLeaf, *tuple[OfLeaf, ...]]:
    """Return the first and the last of some leaves."""
    return (leaves[0],) if len(leaves) == 1 else (leaves[0], leaves[-1])
