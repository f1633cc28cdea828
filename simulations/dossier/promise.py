"""What a dossier says of differential privacy: what is promised, what that is worth, and what it leaves open.

A simulated run has protected nobody, so each of its epsilons says so, and sentences about sites are about the design.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from privet.common.audit.release import PRIVACY
from privet.common.log.statements import RoundAbort, RoundClose, RoundOpened
from privet.common.masking.groups import corrupt_sites
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.sources import Claim, Sentence, Source
from privet.simulations.dossier.words import factor_of, plain, shown, up

_UNBOUNDED = "Nothing bounds what is learnt about one person, as there is no differential privacy."
_GUARANTEE = Claim("docs/privacy.md", "the-guarantee")
_SHARES = Claim("docs/privacy.md", "noise-in-shares")
_PLAIN: Mapping[str, str] = {
    "validation split": "If a patient has two names or numbers in the files, each counts as a person of its own, and "
    "the protection is lower.",
    "errors": "Their texts name rules and shapes, never a record.",
}
"""Points of the privacy statement in easier words. The statement keeps its bytes: auditors compute them."""
_CERTAIN, _MOST_EXPONENT = 100.0, 700.0
"""Per cent; an exponent whose power is a float64."""


def epsilon(evidence: Evidence, value: float | str) -> str:
    """Return an epsilon in words, which say of a simulated run that it protects nobody."""
    number = value if isinstance(value, str) else shown(value)
    return f"epsilon {number}{' (simulated: protects nobody)' if evidence.simulated else ''}"


def of_group(one: float, delta: float, size: int) -> tuple[float, float]:
    """Return epsilon and delta for `size` units together, if each alone has these.

    Take the units away one after another: P(S) <= exp(e) P'(S) + d, at each of the steps. Together that is
    k·e and d·(1 + exp(e) + ... + exp((k-1)·e)). Vadhan 2017, The Complexity of Differential Privacy, Lemma 2.2.
    """
    if one == 0:
        return 0.0, size * delta
    try:
        return size * one, delta * math.expm1(size * one) / math.expm1(one)
    except OverflowError:
        return size * one, math.inf


def _last_group(one: float, delta: float) -> int:
    """Return from how many units on the delta of a group is 1 or more, so that it promises nothing."""
    if one == 0:
        return math.ceil(1 / delta)
    if not one < _MOST_EXPONENT:
        return 2
    return max(2, math.ceil(math.log1p(math.expm1(one) / delta) / one))


def last_end(evidence: Evidence) -> Source:
    """Return the last end of a round, whose epsilons are those of the whole run; the log before the first one."""
    ends = [*evidence.all(RoundClose), *evidence.all(RoundAbort)]
    return max((leaf for leaf, _ in ends), key=lambda leaf: leaf.index, default=evidence.log)


def privacy(evidence: Evidence) -> list[Sentence]:
    """Return what the run promises for one unit, what was spent, and what that bounds."""
    study, costs = evidence.study, evidence.privacy.get("epsilon", {})
    if not study.private:
        return [
            Sentence(
                "There is NO differential privacy: the study's privacy mode is none. Nothing bounds what the adapter "
                "tells about one person.",
                evidence.field("privacy.mode"),
            )
        ]
    unit, delta = study.privacy.unit, plain(costs["delta"])
    whom = {
        "record": "one record, which is one row of a site's files. A person with several rows is protected less",
        "patient": f"one patient, which is all rows of a site that share a value of column {study.data.unit}",
    }[unit]
    spent, promised = epsilon(evidence, costs["run"]), f"{costs['target']:g}"
    return [
        Sentence(
            f"Differential privacy is noise that limits how much results can depend on any one {unit}. Epsilon and "
            "delta are the limit: the smaller, the better protected.",
            _claim(evidence),
            Claim("docs/glossary.md", "privacy"),
        ),
        Sentence(
            f"The study promises {epsilon(evidence, promised)} at delta {delta} for {whom}.",
            evidence.field("privacy.epsilon"),
            evidence.field("privacy.delta"),
            evidence.field("privacy.unit"),
            promised=costs["target"],
            delta=costs["delta"],
        ),
        Sentence(
            f"Computed from the rounds in the log: a real site with noise of its own would have spent {spent} at most, "
            "rounded up. The simulated ones had no such noise."
            if evidence.simulated
            else f"Spent in this run, by any one site: {spent} at most, rounded up. For this dossier it was computed "
            "again from the rounds in the log.",
            last_end(evidence),
            evidence.log,
            Claim("docs/privacy.md", "accounting"),
            spent=costs["run"],
        ),
        *_meaning(evidence),
        _against(evidence),
    ]


def _claim(evidence: Evidence) -> Claim:
    return _SHARES if evidence.study.distributed else _GUARANTEE


def _meaning(evidence: Evidence) -> list[Sentence]:
    """Return what epsilon bounds: a factor, and how sure somebody can become."""
    costs, unit = evidence.privacy["epsilon"], evidence.study.privacy.unit
    (factor, power), delta = factor_of(costs["run"]), plain(costs["delta"])
    seen = (
        "the coordinator and corrupt sites conclude from the sums"
        if evidence.study.distributed
        else "anybody concludes from that"
    )
    sure = 1 / (1 + math.exp(-min(costs["run"], _MOST_EXPONENT)))
    percent = math.ceil(1e4 * sure) / 100
    certain, may = percent >= _CERTAIN, "would let" if evidence.simulated else "lets"
    return [
        Sentence(
            f"That {'would mean at real sites' if evidence.simulated else 'means'}: a site releases something with or "
            f"without one {unit} in its files. The probability of whatever {seen} differs by a factor of at most "
            f"{power}, and by at most {delta} more. The closer the factor is to 1, the less anybody can learn about "
            f"the {unit}.",
            last_end(evidence),
            _claim(evidence),
            factor=factor,
            delta=costs["delta"],
        ),
        Sentence(
            f"In the worst case, the limit {may} somebody who thought it 50 : 50 that a {unit} is in a site's files "
            + ("become practically certain" if certain else f"become {percent:.2f} % sure")
            + ", apart from delta. That is a limit and no measurement, and no document here shows that it suffices.",
            last_end(evidence),
            _claim(evidence),
            **({} if certain else {"sure": sure}),
        ),
    ]


def _against(evidence: Evidence) -> Sentence:
    """Return against whom the guarantee holds, by the design: no log shows it."""
    text = (
        "By its design, the guarantee holds against the coordinator together with some corrupt sites, if the other "
        "sites add their shares of the noise."
        if evidence.study.distributed
        else "By its design, each site adds all of its noise itself. The guarantee then holds against everybody else: "
        "the coordinator, the other sites, and whoever gets the adapter."
    )
    if evidence.simulated:
        text += " In this simulation it holds against nobody."
    return Sentence(text, evidence.field("privacy.mode"), _claim(evidence))


def others(evidence: Evidence) -> list[Sentence]:
    """Return what the promise is worth in other cases: data at every site, a replaced unit, and several units."""
    if not evidence.study.private or not evidence.privacy["epsilon"]["sites"]:
        return []
    return [*everywhere(evidence), replaced(evidence), _group(evidence)]


def everywhere(evidence: Evidence) -> list[Sentence]:
    """Return the epsilon of a unit in the files of every site; nothing where noise is shared."""
    cost = evidence.privacy["epsilon"].get("at_every_site")
    if cost is None:
        return []
    text = (
        f"If the same {evidence.study.privacy.unit} were in the files of every site, all of them together: "
        f"{epsilon(evidence, cost)} at most. This counts where several sites hold data of one person."
    )
    return [Sentence(text, last_end(evidence), _GUARANTEE, at_every_site=cost)]


def replaced(evidence: Evidence) -> Sentence:
    """Return what replacing one unit by another costs."""
    costs, unit = evidence.privacy["epsilon"], evidence.study.privacy.unit
    same, delta = costs["replacing"]["epsilon_at_same_delta"], plain(costs["delta"])
    means = f"This counts where somebody knows that a {unit} is there, and asks what it says."
    if same is None:
        text = f"Nothing is promised for replacing one {unit} by another, at delta {delta}. {means}"
        return Sentence(text, last_end(evidence), _GUARANTEE)
    text = (
        f"Replacing one {unit} by another is removing one and adding one, and costs more: {epsilon(evidence, same)} at "
        f"most, at delta {delta}. {means}"
    )
    return Sentence(text, last_end(evidence), _GUARANTEE, replacing=float(same), delta=float(costs["delta"]))


def _group(evidence: Evidence) -> Sentence:
    """Return the guarantee for several units of one person."""
    costs = evidence.privacy["epsilon"]
    one, delta = costs["run"], costs["delta"]
    who, what = {
        "record": ("a person with several rows at a site", "rows"),
        "patient": ("a person with several numbers at a site", "numbers"),
    }[evidence.study.privacy.unit]
    last = _last_group(one, delta)
    ends = f"with {last} {what}, delta would be 1 or more, and this rule promises nothing"
    lead = f"For {who}, epsilon is at most as many times as large as there are {what}, at a delta that grows as well"
    if last == 2:
        return Sentence(f"{lead}: {ends}.", last_end(evidence), _GUARANTEE, vacuous=last)
    two, more = of_group(one, delta, 2)
    return Sentence(
        f"{lead}: with 2 {what}, {epsilon(evidence, two)} at a delta of {up(more)}; {ends}.",
        last_end(evidence),
        _GUARANTEE,
        units=2,
        units_epsilon=two,
        units_delta=more,
        vacuous=last,
    )


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
        said.append(Sentence(f"{lead} ({point}): {_PLAIN.get(point, text)}", claim, *more, *held))
    return said


def hidden_sums(evidence: Evidence) -> list[Sentence]:
    """Return what the coordinator sees of a single site, by the design."""
    study = evidence.study
    mode = evidence.field("secure_aggregation.mode")
    if study.secure_aggregation.mode != "masked":
        return [Sentence("Updates are not masked: the coordinator sees the update of each site by itself.", mode)]
    sizes = sorted({len(each.cohort) for _, each in evidence.all(RoundOpened)}) or [study.cohort.min_sites]
    least = corrupt_sites(study, sizes[0])
    here = " In this simulation, one machine held all updates and all keys." if evidence.simulated else ""
    return [
        Sentence(
            "By its design, updates are masked: the coordinator sees sums over sites, and no single update, as long as "
            f"no more than {least} of the {sizes[0]} sites in a round help it against the others.{here}",
            mode,
            evidence.field("secure_aggregation.corrupt"),
            evidence.log,
            Claim("docs/secure-aggregation.md", "1-parties-and-claims"),
            corrupt=least,
            asked=sizes[0],
        )
    ]
