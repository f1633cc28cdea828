"""The site's policy: it admits exactly what every rule admits, says why not, and fails closed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.policy.agreement import advice
from privet.client.policy.consent import (
    approved,
    began_before,
    check_policy,
    policy_digest,
    record_approval,
    record_refusal,
    standing,
    verdict,
)
from privet.client.policy.rules import (
    Facts,
    SitePolicy,
    base_digest,
    judge,
    largest_clip_norm,
    load_policy,
    opening_threshold,
    refuse,
)
from privet.client.site import FloorSection, SiteConfig
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PolicyError, StateError, StudyError
from privet.common.log.statements import Refusal
from privet.common.privacy.accounting import plan
from privet.common.secagg.terms import Floor
from privet.common.study.study import Study
from tests.support.tiny import policy_document, write_policy

NOON = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
STUDY: dict[str, Any] = {
    "name": "agreed",
    "model": {"base": "bases/encoder", "sha256": {"model.safetensors": "ab" * 32, "tokenizer.json": "cd" * 32}},
    "task": {"kind": "text-classification", "labels": ["a", "b"]},
    "data": {"columns": {"text": "t", "label": "l"}, "unit": "patient", "validation_fraction": 0.2},
    "lora": {"rank": 8, "targets": ["query", "value"]},
    "training": {"rounds": 10, "local_steps": 4, "sampling_rate": 0.1, "learning_rate": 0.1},
    "cohort": {"min_sites": 5},
    "privacy": {"mode": "local", "unit": "patient", "epsilon": 2.0, "delta": 1e-6, "clip_norm": 1.0},
}
WEAKER: dict[str, tuple[dict[str, Any], str, str]] = {
    "another base": ({"model": {"sha256": {"model.safetensors": "ef" * 32}}}, "E_BASE", "model.bases"),
    "an unpinned tokenizer": ({"model": {"sha256": {"model.safetensors": "ab" * 32}}}, "E_BASE", "model.bases"),
    "another layer": ({"lora": {"targets": ["query", "dense"]}}, "E_TARGETS", "model.targets"),
    "a module in full": ({"lora": {"modules_to_save": ["embeddings"]}}, "E_FULL_MODULES", "model.full_modules"),
    "a larger adapter": ({"lora": {"rank": 9}}, "E_RANK", "model.max_rank"),
    "a larger adapter of one layer": ({"lora": {"rank_pattern": {"query": 9}}}, "E_RANK", "model.max_rank"),
    "another task": (
        {
            "task": {"kind": "causal-lm", "labels": []},
            "data": {"columns": {"prompt": "p", "answer": "a"}},
        },
        "E_TASK",
        "tasks.allow",
    ),
    "no privacy": ({"privacy": {"mode": "none"}}, "E_NOT_PRIVATE", "privacy.required"),
    "another unit": ({"privacy": {"unit": "record"}}, "E_UNIT", "privacy.unit"),
    "more epsilon": ({"privacy": {"epsilon": 2.01}}, "E_EPSILON", "privacy.max_epsilon"),
    "more delta": ({"privacy": {"delta": 1.1e-6}}, "E_DELTA", "privacy.max_delta"),
    "less noise": ({"training": {"sampling_rate": 0.01}}, "E_NOISE", "privacy.min_noise_multiplier"),
    "a larger clip norm": ({"privacy": {"clip_norm": 1.001}}, "E_CLIP_NORM", "privacy.max_clip_norm"),
    "a clip norm that may grow": ({"privacy": {"clipping": "adaptive"}}, "E_CLIP_NORM", "privacy.max_clip_norm"),
    "a smaller cohort": ({"cohort": {"min_sites": 4}}, "E_COHORT", "cohort.min_sites"),
    "small groups": (
        {"cohort": {"min_sites": 30}, "secure_aggregation": {"groups": 6, "corrupt_fraction": 0.0, "corrupt": 0}},
        "E_THRESHOLD",
        "cohort.min_threshold",
    ),
    "fewer shares": (
        {"secure_aggregation": {"corrupt": 0, "corrupt_fraction": 0.0}},
        "E_THRESHOLD",
        "cohort.min_threshold",
    ),
    "no masks": ({"secure_aggregation": {"mode": "plain"}}, "E_NOT_MASKED", "cohort.secure_aggregation"),
    "validation": ({"data": {"validation_fraction": 0.3}}, "E_METRICS", "metrics.allow"),
    "more rounds": ({"training": {"rounds": 11}}, "E_ROUNDS", "limits.max_rounds"),
}


def study_of(**tables: Any) -> Study:
    """Return the agreed study with some keys of its tables changed."""
    document = {name: dict(value) if isinstance(value, dict) else value for name, value in STUDY.items()}
    for name, changes in tables.items():
        document[name] = {**document.get(name, {}), **changes}
        if changes.get("mode") == "none":
            document[name] = changes
    return Study.parse(document)


def policy_of(**changes: Any) -> SitePolicy:
    """Return the policy that admits the agreed study and nothing weaker."""
    rules = {
        "approval": "rule",
        "model.bases": [base_digest(study_of())],
        "model.targets": ["query", "value"],
        "model.max_rank": 8,
        "tasks.allow": ["text-classification"],
        "privacy.required": True,
        "privacy.unit": "patient",
        "privacy.max_epsilon": 2.0,
        "privacy.max_delta": 1e-6,
        "privacy.min_noise_multiplier": 1.0,
        "privacy.max_clip_norm": 1.0,
        "privacy.min_units": 500,
        "cohort.secure_aggregation": "required",
        "cohort.min_sites": 5,
        "cohort.min_threshold": 4,
        "limits.max_rounds": 10,
        "limits.max_studies_per_day": 2,
        "limits.max_upload_bytes": 1000,
        "limits.hours_utc": ["09:00-17:00", "22:00-02:00"],
    }
    return SitePolicy.model_validate_json(json.dumps(policy_document(**rules | changes)), strict=True)


def facts(**changes: Any) -> Facts:
    began = (NOON - timedelta(hours=1),)
    known = Facts(NOON, False, 500, began_before=began, upload_bytes=1000, patient_column="patient")
    return replace(known, **changes)


def codes(policy: SitePolicy, study: Study, **changes: Any) -> list[str]:
    return [finding.code for finding in judge(policy, study, facts(**changes))]


def test_the_floor_of_the_site_file_decides_about_suites() -> None:
    suites = (None, "x25519", "x25519-mlkem768", "p256-mlkem768")
    studies = [study_of(**({} if name is None else {"secure_aggregation": {"suite": name}})) for name in suites]

    def refused(floor: Floor) -> list[bool]:
        return [codes(policy_of(), study, floor=floor) == ["E_SUITE"] for study in studies]

    assert refused(Floor()) == [False, True, False, False]
    assert refused(Floor(classical=True)) == [False] * 4
    assert refused(Floor(fips=True)) == [True, True, True, False]
    # The study that names no suite has the digest of an earlier version.
    assert "suite" not in studies[0].document()["secure_aggregation"]
    assert len({study.digest for study in studies}) == 4


def test_the_rank_that_counts_is_the_one_that_the_study_gives_this_site() -> None:
    lower = {"lora": {"rank": 16, "site_ranks": {"north": 8}}, "aggregation": {"method": "ffa"}}
    study = study_of(**lower)
    assert codes(policy_of(), study, site="north") == []
    assert codes(policy_of(), study, site="south") == ["E_RANK"]
    (finding,) = judge(policy_of(), study, facts(site="south"))
    site = SiteConfig(name="south", train=(Path("x"),))
    (line,) = advice(site, [finding], "site.toml", "study.toml")
    assert "site_ranks = { south = 8 }" in line


def test_the_agreed_study_passes() -> None:
    assert codes(policy_of(), study_of()) == []
    assert codes(policy_of(), study_of(), upload_bytes=None) == []


@pytest.mark.parametrize("name", WEAKER)
def test_no_study_that_weakens_one_thing_passes(name: str) -> None:
    change, code, rule = WEAKER[name]
    policy = policy_of(**({"metrics.allow": []} if code == "E_METRICS" else {}))
    found = {finding.code: finding for finding in judge(policy, study_of(**change), facts())}
    assert code in found
    assert found[code].rule == rule
    assert hasattr(getattr(policy, rule.split(".")[0]), rule.split(".")[1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"patient_column": "note_id"}, "E_UNIT_COLUMN"),
        ({"patient_column": "Patient"}, "E_UNIT_COLUMN"),
        ({"patient_column": None}, "E_UNIT_COLUMN"),
        ({"declared": 499}, "E_UNITS"),
        ({"declared": None}, "E_UNITS"),
        ({"began_before": (NOON - timedelta(hours=2), NOON - timedelta(hours=1))}, "E_STUDIES_PER_DAY"),
        ({"upload_bytes": 1001}, "E_UPLOAD"),
        ({"now": NOON.replace(hour=8, minute=59)}, "E_HOURS"),
        ({"now": NOON.replace(hour=17)}, "E_HOURS"),
        ({"now": NOON.replace(hour=2)}, "E_HOURS"),
    ],
)
def test_facts_refuse_as_well(change: dict[str, Any], code: str) -> None:
    assert codes(policy_of(), study_of(), **change) == [code]


def test_a_study_without_room_for_the_declared_count_is_refused_and_tells_nobody_else_the_count() -> None:
    study = study_of(aggregation={"largest_count": 499})
    first, *_ = judge(policy_of(), study, facts())
    assert (first.code, first.rule) == ("E_LARGEST_COUNT", "declared_count")
    assert "at most 499 units" in first.asked
    assert "500" not in str(first)
    site = SiteConfig(name="north", train=(Path("x"),), declared_count=500)
    (line,) = advice(site, [first], "site.toml", "study.toml")
    assert "declares 500 units" in line
    assert "largest_count = 500 or more" in line
    assert codes(policy_of(), study_of(aggregation={"largest_count": 500})) == []
    # Attack: whoever sends studies bisects the count of a site that has approved none of them.
    waits = policy_of(approval="person")
    assert [each.code for each in judge(waits, study, facts(), thorough=False)] == ["E_NOT_APPROVED"]
    assert "E_LARGEST_COUNT" in [each.code for each in judge(waits, study, facts(approved=True), thorough=False)]


@settings(deadline=None)
@given(minute=st.integers(0, 24 * 60 - 1), offset=st.integers(-12, 12))
def test_hours_are_utc_and_windows_may_pass_midnight(minute: int, offset: int) -> None:
    now = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)).astimezone(timezone(timedelta(hours=offset)))
    inside = 9 * 60 <= minute < 17 * 60 or minute >= 22 * 60 or minute < 2 * 60
    assert (codes(policy_of(), study_of(), now=now) == []) is inside
    assert codes(policy_of(**{"limits.hours_utc": ["00:00-00:00"]}), study_of(), now=now) == []
    assert codes(policy_of(**{"limits.hours_utc": []}), study_of(), now=now) == ["E_HOURS"]


def test_noise_that_others_must_add_is_admitted_only_as_far_as_a_share_is_worth_something() -> None:
    step = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0}
    shared = {"privacy": {"mode": "distributed"}, "training": step, "data": {"validation_fraction": 0.0}}
    kept = {**shared, "privacy": {"mode": "distributed", "epsilon_alone": 20.0}}
    for most, without, with_promise in (("any", [], []), (20.0, ["E_ALONE"], []), (19.9, ["E_ALONE"], ["E_ALONE"])):
        policy = policy_of(**{"privacy.max_epsilon_alone": most, "privacy.min_noise_multiplier": 0.0})
        assert codes(policy, study_of(**shared)) == without
        assert codes(policy, study_of(**kept)) == with_promise
    (said,) = judge(policy_of(**{"privacy.max_epsilon_alone": 5.0}), study_of(**shared), facts())
    assert "noise that other sites must add" in str(said)
    assert codes(policy_of(**{"privacy.max_epsilon_alone": 1.9}), study_of()) == ["E_ALONE"]


@settings(deadline=None)  # a mechanism is calibrated once for each promise and length
@given(
    epsilon=st.sampled_from([2.0, 4.0]),
    rank=st.integers(1, 12),
    sites=st.integers(3, 9),
    rounds=st.sampled_from([10, 11]),
    clip=st.sampled_from([0.1, 1.0, 1.5]),
    declared=st.integers(1, 1000),
)
def test_a_study_passes_exactly_if_every_rule_holds(
    epsilon: float, rank: int, sites: int, rounds: int, clip: float, declared: int
) -> None:
    study = study_of(
        privacy={"epsilon": epsilon, "clip_norm": clip},
        lora={"rank": rank},
        cohort={"min_sites": sites},
        training={"rounds": rounds},
    )
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.validation is not None
    expected = {
        "E_EPSILON": epsilon > 2,
        "E_RANK": rank > 8,
        "E_COHORT": sites < 5,
        "E_THRESHOLD": (sites + 1) // 2 + 1 < 4,
        "E_ROUNDS": rounds > 10,
        "E_CLIP_NORM": clip > 1,
        "E_UNITS": declared < 500,
        "E_NOISE": min(mechanism.training.noise_multiplier, mechanism.validation.noise_multiplier) < 1,
    }
    assert set(codes(policy_of(), study, declared=declared)) == {code for code, broken in expected.items() if broken}


def test_the_rules_judge_what_a_study_comes_to() -> None:
    grown = study_of(privacy={"clipping": "adaptive", "clip_norm": 0.5})
    assert largest_clip_norm(grown) == pytest.approx(0.5 * math.exp(0.2 * 4))
    endless = study_of(privacy={"clipping": "adaptive"}, training={"local_steps": 100_000, "rounds": 1})
    assert largest_clip_norm(endless) == math.inf
    assert opening_threshold(study_of()) == 4
    assert opening_threshold(study_of(cohort={"min_sites": 100}, secure_aggregation={"groups": 5})) < 100 // 5


@pytest.mark.parametrize(("groups", "smallest"), [(1, 30), (3, 7), (5, 5)])
def test_min_sites_bounds_the_sum_over_the_survivors_of_the_smallest_group(groups: int, smallest: int) -> None:
    study = study_of(cohort={"min_sites": 30}, secure_aggregation={"groups": groups})
    for least in (smallest, smallest + 1):
        policy = policy_of(cohort={"min_sites": least})
        assert ("E_COHORT" in codes(policy, study)) == (least > smallest), least


# --- approval --------------------------------------------------------------------------------------------------


def test_a_person_refuses_a_study_until_a_person_approves_it(tmp_path: Path) -> None:
    for policy in (policy_of(approval="person"), policy_of()):
        assert codes(policy, study_of(), approved=False, refused=True) == ["E_REFUSED"]
    # Who sends a study that was refused learns nothing of the count, and costs no calibration.
    small = study_of(aggregation={"largest_count": 1})
    assert [each.code for each in judge(policy, small, facts(refused=True), thorough=False)] == ["E_REFUSED"]
    site = SiteConfig(name="north", train=(Path("x.csv"),), approvals=tmp_path / "approvals")
    study = study_of()
    record_approval(site, study, NOON)
    record_refusal(site, study, "pat\u00e9 \u4e0d\nsha256:" + "0" * 64, NOON)
    assert standing(site) == (frozenset(), frozenset({study.digest}))
    assert len((tmp_path / "approvals").read_text(encoding="utf-8").splitlines()) == 2
    record_approval(site, study, NOON)
    assert standing(site) == (frozenset({study.digest}), frozenset())
    other = study_of(lora={"rank": 4})
    record_refusal(site, other, "", NOON)
    assert standing(site) == (frozenset({study.digest}), frozenset({other.digest}))
    error = refuse("north", study, "sha256:0", judge(policy_of(), study, facts(refused=True)))
    assert error.message.startswith("a person at site north has refused study ")


def test_a_person_approves_one_study_and_no_other(tmp_path: Path) -> None:
    policy = policy_of(approval="person")
    assert codes(policy, study_of()) == ["E_NOT_APPROVED"]
    assert codes(policy, study_of(), approved=True) == []
    assert codes(policy, study_of(lora={"rank": 9}), approved=True) == ["E_RANK"]  # nobody approves what rules forbid
    site = SiteConfig(name="north", train=(Path("x.csv"),), approvals=tmp_path / "approvals")
    assert approved(site) == frozenset()
    record_approval(site, study_of(), NOON)
    record_approval(site, study_of(), NOON)
    record_approval(site, study_of(lora={"rank": 4}), NOON)
    assert approved(site) == {study_of().digest, study_of(lora={"rank": 4}).digest}
    assert len((tmp_path / "approvals").read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["sha256:abc 2026 x", "# a comment", "", f"sha256:{'0' * 64}"])
def test_approvals_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    site = SiteConfig(name="north", train=(Path("x.csv"),), approvals=tmp_path / "approvals")
    record_approval(site, study_of(), NOON)
    with (tmp_path / "approvals").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(StateError, match="line 2"):
        approved(site)


def test_approvals_that_others_may_write_count_for_nothing(tmp_path: Path) -> None:
    site = SiteConfig(name="north", train=(Path("x.csv"),), approvals=tmp_path / "approvals")
    record_approval(site, study_of(), NOON)
    (tmp_path / "approvals").chmod(0o660)
    with pytest.raises(StateError, match="others"):
        approved(site)


def test_studies_per_day_count_what_began_before() -> None:
    began = {"a": NOON, "b": NOON - timedelta(hours=1), "c": NOON - timedelta(hours=25)}
    assert began_before(began, "new", NOON) == (began["b"], NOON)
    assert began_before(began, "a", NOON + timedelta(days=9)) == (began["b"],)  # it began when it began
    assert began_before(began, "b", NOON) == ()
    assert began_before(began, "c", NOON) == ()


def test_a_site_says_from_when_on_the_next_study_may_begin() -> None:
    times = tuple(NOON - timedelta(hours=hours) for hours in (7, 5, 2))
    (finding,) = judge(policy_of(), study_of(), facts(began_before=times))
    assert "the next one from 2026-11-27 07:00 UTC on" in finding.allowed
    again = times[-2] + timedelta(days=1)
    began = dict(zip("abc", times, strict=True))
    for now, least in ((again - timedelta(seconds=1), 2), (again, 1)):
        assert len(began_before(began, "new", now)) == least


# --- failing closed --------------------------------------------------------------------------------------------


def site_with(policy: Path | None, **more: Any) -> SiteConfig:
    known: dict[str, Any] = {"declared_count": 900, "patient_column": "patient", **more}
    return SiteConfig(name="north", train=(Path("nowhere.csv"),), policy=policy, **known)


def test_a_real_site_without_a_policy_refuses_everything() -> None:
    with pytest.raises(PolicyError) as caught:
        check_policy(site_with(None), study_of(), dict)
    assert [finding.code for finding in caught.value.findings] == ["E_NO_POLICY"]
    assert caught.value.policy == policy_digest(site_with(None))


def test_every_key_has_to_be_there_and_no_other(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.toml")
    load_policy(path)
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        rest = lines[:number] + lines[number + 1 :]
        path.write_text("\n".join(rest))
        with pytest.raises(StudyError):
            load_policy(path)
        if not line.startswith("["):
            path.write_text("\n".join([*lines[: number + 1], f"x{line}", *lines[number + 1 :]]))
            with pytest.raises(StudyError, match="unknown key"):
                load_policy(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"approval": "nobody"},
        {"approval": "rule"},  # with "any" base
        {"limits.hours_utc": ["24:00-06:00"]},
        {"limits.hours_utc": ["9:00-17:00"]},
        {"limits.max_rounds": 1.5},
        {"limits.max_rounds": 0},
        {"privacy.max_epsilon": 0},
        {"privacy.max_epsilon": "2"},
        {"privacy.required": 1},
        {"metrics.allow": ["accuracy-of-each-site"]},
        {"model.bases": ["sha256:xyz"]},
    ],
)
def test_a_policy_that_says_something_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_policy(tmp_path / "policy.toml", **change)
    with pytest.raises(StudyError) as caught:
        load_policy(path)
    assert caught.value.private


def test_a_policy_that_others_may_write_is_none(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy.toml")
    path.chmod(0o666)
    with pytest.raises(StateError, match="others"):
        load_policy(path)
    with pytest.raises(StudyError, match="no policy file"):
        load_policy(tmp_path / "none.toml")


# --- what is said ----------------------------------------------------------------------------------------------


def test_a_refusal_is_a_statement_and_holds_no_count(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.toml", **{"privacy.min_units": 5000, "privacy.max_epsilon": 1.0})
    digest, findings = verdict(site_with(policy), study_of(), dict)
    error = refuse("north", study_of(), digest, findings)
    assert [finding.code for finding in findings] == ["E_UNIT", "E_EPSILON", "E_UNITS", "E_NOT_APPROVED"]
    assert "900" not in error.message
    for finding in findings:
        fields = {**vars(finding), "policy": error.policy}
        refusal = Refusal(time=0, site="north", run="r", study=study_of().digest, round=0, **fields)
        assert refusal.policy == policy_digest(site_with(policy))


def test_what_a_study_says_cannot_disturb_who_reads_the_refusal() -> None:
    hostile = study_of(lora={"targets": ["\x1b[2Jquery\n", "ü" * 500]})
    (finding,) = judge(policy_of(), hostile, facts())
    more = {"study": hostile.digest, "policy": policy_digest(site_with(None)), **vars(finding)}
    Refusal(time=0, site="north", run="r", round=0, **more)


def test_the_digest_changes_with_every_rule(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"model.max_rank": 9},
        {"privacy.max_delta": 2e-6},
        {"metrics.allow": []},
        {"limits.max_lost_rounds": 3},
    ]
    digests = {policy_digest(site_with(write_policy(tmp_path / "policy.toml", **change))) for change in changes}
    floor = FloorSection(cohort=9)
    digests |= {policy_digest(site_with(tmp_path / "policy.toml", floor=floor)), policy_digest(site_with(None))}
    columns: list[dict[str, Any]] = [
        {"patient_column": None},
        {"patient_column": "mrn"},
        {"patient_ids": "number"},
        {"patient_ids": "text"},
    ]
    digests |= {policy_digest(site_with(tmp_path / "policy.toml", **change)) for change in columns}
    assert len(digests) == len(changes) + 2 + len(columns)


def test_the_digest_without_later_rules_is_as_it_was(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.toml")
    site = site_with(policy, patient_column=None)
    rules = site.model_dump(mode="json", include={"limit", "floor"})
    stated = load_policy(policy).model_dump(mode="json")
    assert stated["limits"].pop("max_lost_rounds") is None
    before = {**rules, "policy": stated}
    assert policy_digest(site) == digest(canonical_json(before))
