"""Purpose and permit of a study: part of it, shown, and an expired permit stops consent and rounds at both ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from privet.client.policy.agreement import LATER, advice, agreement
from privet.client.policy.rules import Facts, judge
from privet.client.site import SiteConfig
from privet.common.errors import RefusedError, StudyError
from privet.common.study.study import Study
from privet.common.study.terms import check_permit, check_until, purpose_text
from privet.server.rounds import rounds
from privet.server.studies import check_new
from tests.client.test_policy import NOON, policy_of
from tests.client.test_policy import study_of as agreed
from tests.support.consortium_world import make_coordinator
from tests.support.logged_world import world_of
from tests.support.masked_world import masked_study

PURPOSE: dict[str, Any] = {
    "text": "Sort notes by urgency",
    "legal_basis": "GDPR Art. 6(1)(e) and 9(2)(j)",
    "contacts": ["Dr Müller, controller, +49 30 1234", "dpo@north.example"],
}
PERMIT = {"number": "DE-2026-17", "purpose": "Research on triage", "expires": "2026-11-26"}
LAST = datetime(2026, 11, 26, 23, 59, 59, tzinfo=UTC)


def test_a_study_without_the_table_is_the_study_that_it_was() -> None:
    bare = masked_study()
    assert "purpose" not in bare.document()
    stated = Study.parse({**bare.document(), "purpose": PURPOSE})
    assert stated.digest != bare.digest
    assert "permit" not in stated.document()["purpose"]
    assert Study.parse(stated.document()) == stated


@pytest.mark.parametrize(
    "change",
    [
        {"contacts": []},
        {"text": "two\nlines"},
        {"text": "turned \u202e round"},
        {"legal_basis": " "},
        {"permit": {**PERMIT, "expires": "2026-02-30"}},
        {"permit": {**PERMIT, "expires": "26.11.2026"}},
        {"permit": {"number": "1", "purpose": "x"}},
        {"officer": "nobody"},
    ],
)
def test_what_is_no_purpose_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match="purpose"):
        Study.parse({**masked_study().document(), "purpose": {**PURPOSE, **change}})


def test_the_people_of_a_site_read_it_before_they_approve(tmp_path: Path) -> None:
    study = masked_study(purpose={**PURPOSE, "permit": PERMIT})
    site = SiteConfig(name="berlin", train=(tmp_path / "a.csv",))
    told = dict(agreement(site, study, "a study file.", None))["purpose"]
    assert told == purpose_text(study)
    for part in (
        "Sort notes by urgency. Legal basis: GDPR",
        "Dr Müller",
        "Permit DE-2026-17 until 2026-11-26 (UTC), for: Research on triage.",
    ):
        assert part in told
    assert "purpose" not in dict(agreement(site, masked_study(), "a study file.", None))


def test_a_site_refuses_after_the_permit_s_last_day_whatever_its_policy_says() -> None:
    study = agreed(purpose={**PURPOSE, "permit": PERMIT})
    facts = Facts(now=LAST, approved=True, declared=500, began_before=(), patient_column="patient")
    assert judge(policy_of(), study, facts) == ()
    after = Facts(**{**vars(facts), "now": LAST + timedelta(seconds=1)})
    (found,) = judge(policy_of(), study, after)
    assert (found.code, found.rule) == ("E_PERMIT", "purpose.permit.expires")
    assert found.code not in LATER
    site = SiteConfig(name="berlin", train=(Path("a.csv"),))
    assert advice(site, [found], "site.toml", "x")[0].startswith("no site can admit this")
    assert judge(policy_of(), agreed(purpose=PURPOSE), Facts(**{**vars(facts), "now": NOON})) == ()


def test_the_last_day_of_all_is_a_day_without_end() -> None:
    study = masked_study(
        purpose={**PURPOSE, "permit": {**PERMIT, "expires": "9999-12-31"}}, release={"until": "9999-12-31"}
    )
    check_permit(study, LAST)
    check_until(study, LAST)


@pytest.mark.parametrize("late", [4, 5])  # before sites are asked for round 3, and while they are waited for
def test_the_coordinator_begins_no_run_and_opens_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    study = masked_study(training={"rounds": 3}, purpose={**PURPOSE, "permit": PERMIT})
    times = iter([*[LAST] * late, LAST + timedelta(seconds=1)])
    monkeypatch.setattr(rounds, "now", lambda: next(times))
    world = world_of(tmp_path / "world", study)
    with pytest.raises(RefusedError, match=r"the permit of study .* has expired") as caught:
        world.play()
    assert (caught.value.code, caught.value.asked) == ("E_PERMIT", "a permit until 2026-11-26 (UTC)")
    assert [each["round"] for each in world.run.load().statements] == [1, 2]
    old = masked_study(purpose={**PURPOSE, "permit": {**PERMIT, "expires": "2020-02-29"}})
    with pytest.raises(RefusedError, match="has expired"):
        check_new(make_coordinator(tmp_path / "coordinator"), old)
    check_permit(masked_study(), LAST)
