"""What a site would say to a study: its policy's verdict, its ledger's objection, its files, and the price.

Commands and the console ask the same functions. Nothing here decides, and nothing is recorded or sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from privet.client.policy.agreement import LATER, Price
from privet.client.policy.consent import verdict
from privet.client.policy.rules import PASSING, PERSONAL
from privet.client.site import SiteConfig
from privet.common.errors import Finding, PrivetError, SpentRoundError
from privet.common.study.study import Study


@dataclass(frozen=True)
class Opinion:
    """What a site's policy and its ledger say to a study, as they are now.

    Attributes:
        digest: Digest of the site's rules.
        findings: Of the policy against the study.
        budget: The ledger's objection; None if it has none.
    """

    digest: str
    findings: tuple[Finding, ...]
    budget: PrivetError | None = None

    @property
    def against(self) -> tuple[Finding, ...]:
        """The findings that stay, whoever approves the study and however long the site waits."""
        return tuple(each for each in self.findings if each.code not in LATER)

    @property
    def later(self) -> tuple[Finding, ...]:
        """The findings that pass with time."""
        return tuple(each for each in self.findings if each.code in PASSING)

    @property
    def waits(self) -> bool:
        """Whether the study lacks the approval of a person."""
        return any(each.code in PERSONAL for each in self.findings)

    @property
    def refused(self) -> bool:
        """Whether a person here has refused the study."""
        return any(each.code == "E_REFUSED" for each in self.findings)


def judged(config: SiteConfig, study: Study, *, thorough: bool = True) -> Opinion:
    """Return what the site's policy and its ledger say to a study.

    `thorough`: as `privet.client.policy.rules.judge`; without it, the ledger is not asked, either.
    """
    from privet.client.budget.releases import Releases

    releases = Releases(config)
    digest, findings = verdict(config, study, releases.began, thorough=thorough)
    if not thorough:
        return Opinion(digest, findings)
    try:
        releases.check(study)
    except PrivetError as error:
        return Opinion(digest, findings, error)
    return Opinion(digest, findings)


def rounds_done(config: SiteConfig, study: Study) -> int:
    """Return how many rounds of a study the site's ledger holds. The site runs none of them again."""
    from privet.client.budget.releases import open_ledger

    if config.ledger is None or config.dataset is None:
        return 0
    ledger = open_ledger(config)
    try:
        return sum(item.rounds for item in ledger.items(str(config.dataset)) if item.study == study.digest)
    finally:
        ledger.close()


def ran_before(study: Study, done: int) -> SpentRoundError | None:
    """Return why the site can run no further round of a study, of which `done` rounds are in its ledger."""
    if done < study.rounds:
        return None
    return SpentRoundError(
        f"this site has run all {study.rounds} rounds of this very study before, and runs each round once",
        "ask the coordinator for the same study with another seed: `privet new --from STUDY --seed NUMBER`",
    )


def said(finding: Finding) -> str:
    """Return a finding in one line."""
    return f"{finding.rule}: asked {finding.asked}, allowed {finding.allowed}"


def unfit_of(config: SiteConfig, study: Study) -> PrivetError | None:
    """Return what is wrong with the files that a study reads, as the site finds it before it consents."""
    from privet.client.policy.scanned import check_scan
    from privet.client.training.data import counted_files, site_records

    try:
        if config.train:
            site_records(counted_files(config, study), study)
            check_scan(config, study, files=True)
    except PrivetError as error:
        return error
    return None


def price_of(config: SiteConfig, study: Study) -> Price | None:
    """Return what a study would cost the site's dataset; None where no limit of that unit is set."""
    from privet.client.budget.ledger import cost_of
    from privet.client.budget.releases import cost_of_study, limit_of, open_ledger

    limit, costs = limit_of(config), cost_of_study(study, config)
    if limit is None or not costs or costs[0][0].unit != limit.unit:
        return None
    ledger = open_ledger(config)
    try:
        dataset = str(config.dataset)
        counted, begun = ledger.statement(dataset, limit).counted, study.digest in ledger.began(dataset)
        after, needed = cost_of(ledger, dataset, limit, () if begun else costs)[1:]
    finally:
        ledger.close()
    return Price(dataset, limit, counted, after, needed)
