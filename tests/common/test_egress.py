"""The egress gate: what is never released, who may say what, and the one place that answers for files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.network.adapters import receive
from privet.common.audit.egress import check_carried, check_logged, check_origin
from privet.common.errors import PrivetError, RefusedError, StudyError, VerificationError
from privet.common.log.agreement import gate_of, run_opened
from privet.common.log.envelope import sign_envelope
from privet.common.log.gate import DAY, Gate, quality_of, stated_bound
from privet.common.log.merkle import leaf_hash
from privet.common.log.replay import Leaf, Replay
from privet.common.log.statements import (
    CanaryCounts,
    EgressDecision,
    EgressReview,
    Export,
    Join,
    Member,
    Revoke,
    StatedGate,
    Statement,
)
from privet.common.study.study import Study
from tests.support.log_world import World, digest, member, private, public
from tests.support.synthetic import study_of

SITES = ("berlin", "lyon", "oslo")
TERMS = StatedGate(
    signatures=2,
    days=30,
    canaries=100,
    epsilon=3.0,
    membership=0.6,
    repeated=0.2,
    metric="validation_accuracy",
    least=0.7,
)
WEAK, STRONG = CanaryCounts(planted=200, guesses=20, right=12), CanaryCounts(planted=1000, guesses=500, right=500)
"""Canaries that show nothing, and canaries that show an epsilon above 3."""


@dataclass
class Town(World):
    """A log whose statements are admitted as they are said."""

    history: Replay = field(default_factory=Replay)

    def say(self, statement: Statement, author: str = "coordinator") -> str:
        data = sign_envelope(statement, private(author))
        leaf = Leaf(len(self.leaves), f"sha256:{leaf_hash(data).hex()}", public(author))
        self.history.admit(leaf, statement, lambda size: self.roots[size])
        return super().say(statement, author)

    @property
    def gate(self) -> Gate:
        found = self.history.runs["flu"].gate
        assert found is not None
        return found


def town(*, terms: StatedGate = TERMS, epsilon: float = 2.5, accuracy: float = 0.8, private: bool = True) -> Town:
    """Return a log in which run flu has ended with a candidate."""
    found = Town(private=private)
    found.say(found.genesis())
    found.say(found.run_open("flu", gate=terms, rounds=1))
    opened = found.say(found.round_open("flu", 1))
    for site in SITES:
        said = found.site_round(site, "flu", 1, opened)
        found.say(said if private else said.model_copy(update={"charge": None}), site)
    spent = dict.fromkeys(SITES, epsilon) if private else None
    metrics = {"validation_loss": 0.4, "validation_accuracy": accuracy}
    found.say(found.round_close("flu", 1, opened, epsilon=spent, metrics=metrics, ended=True))
    return found


def review(world: Town, site: str, **changes: Any) -> EgressReview:
    given: dict[str, Any] = {
        "time": world.now,
        "site": site,
        "run": "flu",
        "study": digest("study flu"),
        "adapter": world.adapters["flu"],
        "verdict": "signed",
        "tested": ("canary", "membership", "repeated"),
        "failed": (),
        "canaries": WEAK,
        "test": digest("figures"),
        "reason": "",
        "expires": world.now + 10 * DAY,
    }
    return EgressReview.model_validate(given | changes)


def refusal(world: Town, site: str, **changes: Any) -> EgressReview:
    return review(world, site, **({"verdict": "refused", "reason": "our committee says no"} | changes))


def decision(world: Town, verdict: str = "accepted", **changes: Any) -> EgressDecision:
    """Return what a coordinator says that computes every figure rightly."""
    time = changes.get("time", world.now)
    facts = world.gate.facts(time)
    given: dict[str, Any] = {
        "time": time,
        "run": "flu",
        "study": digest("study flu"),
        "adapter": world.adapters["flu"],
        "verdict": verdict,
        "epsilon": facts.epsilon,
        "bound": stated_bound(facts.bound),
        "quality": facts.quality,
        "signed": facts.signed,
        "refused": facts.refused,
        "reason": "" if verdict == "accepted" else "the committee of the consortium says no",
        "expires": (facts.expires or world.now + DAY) if verdict == "accepted" else None,
    }
    return EgressDecision.model_validate(given | changes)


def signed_by(world: Town, *sites: str) -> Town:
    for site in sites:
        world.say(review(world, site), site)
    return world


def never_released(world: Town) -> bool:
    """Whether neither an honest nor a lying coordinator gets the candidate out."""
    for statement in (decision(world), world.export("flu", 1)):
        with pytest.raises(VerificationError):
            world.say(statement)
    with pytest.raises(RefusedError):
        check_logged(world.history.runs["flu"], world.now)
    with pytest.raises(RefusedError):
        check_origin(world.history, world.adapters["flu"])
    with pytest.raises(VerificationError, match="withholds adapter"):
        world.say(world.run_open("copd", adapter=world.adapters["flu"]))
    return not world.gate.exported


# What is released, and what never is


def test_a_candidate_that_meets_every_condition_is_released() -> None:
    world = town()
    assert world.gate.state(world.now) == "candidate"
    with pytest.raises(VerificationError, match="no egress decision has accepted it"):
        world.say(world.export("flu", 1))
    signed_by(world, "berlin", "oslo")
    world.say(decision(world))
    check_logged(world.history.runs["flu"], world.now)
    assert world.gate.state(world.now) == "accepted"
    world.say(world.export("flu", 1))
    check_origin(world.history, world.adapters["flu"])
    world.say(world.run_open("copd", adapter=world.adapters["flu"]))
    later = world.now + 100 * DAY
    check_logged(world.history.runs["flu"], later)  # it has left: the terms of the release say how long it is used
    world.say(world.export("flu", 1, time=later))


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """Draw what a run and its sites say, and which conditions that breaks."""
    broken = draw(st.sets(st.sampled_from(["privacy", "canary", "membership", "repeated", "quality", "signatures"])))
    return {
        "epsilon": 8.0001 if "privacy" in broken else draw(st.floats(0, 8)),
        "accuracy": draw(st.floats(0, 0.69)) if "quality" in broken else draw(st.floats(0.7, 1)),
        "signers": draw(st.sets(st.sampled_from(SITES), max_size=1)) if "signatures" in broken
        else draw(st.sets(st.sampled_from(SITES), min_size=2)),
        "canaries": draw(st.sampled_from(["few", "none"])) if "canary" in broken else "many",
        "fails": tuple(sorted(broken & {"membership", "repeated"})),
    }, broken  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(cases())
def test_what_fails_any_condition_is_never_released(case: tuple[dict[str, Any], set[str]]) -> None:
    given, broken = case
    world = town(epsilon=given["epsilon"], accuracy=given["accuracy"])
    counts = {"many": WEAK, "few": CanaryCounts(planted=99, guesses=20, right=10), "none": None}[given["canaries"]]
    tested = ("membership", "repeated") if counts is None else ("canary", "membership", "repeated")
    for site in sorted(given["signers"]):
        world.say(review(world, site, canaries=counts, tested=tested), site)
    if given["fails"]:
        site = next((each for each in SITES if each not in given["signers"]), SITES[0])
        world.say(refusal(world, site, failed=given["fails"]), site)
        broken = broken | ({"signatures"} if len(set(given["signers"]) - {site}) < 2 else set())
    facts = world.gate.facts(world.now)
    # Without a signature there is nobody whose canaries count.
    expected = broken | ({"canary"} if not facts.signed else set())
    assert set(world.gate.unmet(facts)) == expected
    if expected:
        assert never_released(world)
    else:
        world.say(decision(world))
        world.say(world.export("flu", 1))


@pytest.mark.parametrize("verdict", ["signed", "refused"])
def test_canaries_above_the_claim_stop_it(verdict: str) -> None:
    world = signed_by(town(), "berlin", "oslo")
    if verdict == "signed":
        with pytest.raises(VerificationError, match=r"canaries show an epsilon of at least 4\.\d+, above 3"):
            world.say(review(world, "lyon", canaries=STRONG), "lyon")
        return
    # A person who refuses for another reason, and sends the counts with it, cannot hide what they show.
    world.say(refusal(world, "lyon", canaries=STRONG), "lyon")
    assert set(world.gate.unmet(world.gate.facts(world.now))) == {"canary"}
    assert never_released(world)


def test_a_run_without_privacy_is_held_to_the_epsilon_of_its_gate() -> None:
    world = town(private=False, accuracy=0.9)
    for site in ("berlin", "oslo"):
        world.say(review(world, site), site)
    assert world.gate.facts(world.now).epsilon is None
    world.say(decision(world))
    with pytest.raises(VerificationError, match="canaries show an epsilon"):
        town(private=False).say(review(world, "lyon", canaries=STRONG), "lyon")


@pytest.mark.parametrize(
    ("owner", "rule", "nothing"),
    [
        (Gate, "unmet", lambda self, facts: {}),
        (Gate, "withheld", lambda self, time: ""),
        (Replay, "withholding", lambda self, adapter, own=None: None),
    ],
)
def test_a_rule_that_is_left_out_is_missed(
    monkeypatch: pytest.MonkeyPatch, owner: type, rule: str, nothing: Callable[..., Any]
) -> None:
    world = signed_by(town(), "berlin")
    assert never_released(world)
    monkeypatch.setattr(owner, rule, nothing)
    with pytest.raises(pytest.fail.Exception):
        never_released(world)


# Who may say what, and when


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapter": digest("other")}, "digest of the adapter"),
        ({"study": digest("other")}, "digest of the study"),
        ({"run": "other"}, "no run-open statement"),
        ({"tested": ("canary", "repeated")}, "signs without a test of membership"),
        ({"expires": 1_800_000_000 + 31 * DAY}, "at most 30 days"),
    ],
)
def test_a_signature_of_something_else_is_refused(change: dict[str, Any], why: str) -> None:
    world = town()
    with pytest.raises(VerificationError, match=why):
        world.say(review(world, "berlin", **change), "berlin")


def test_a_signature_is_replayed_into_no_other_run() -> None:
    world = signed_by(town(), "berlin", "oslo")
    again = world.said[-1][0]
    other = town()
    opened = other.history.runs["flu"]
    assert opened.gate is not None
    opened.gate.candidate = digest("another candidate of the same study")
    with pytest.raises(VerificationError, match="digest of the adapter"):
        other.say(again, "oslo")


@pytest.mark.parametrize("author", ["lyon", "coordinator", "stranger"])
def test_nobody_signs_for_another_site(author: str) -> None:
    world = town()
    with pytest.raises(VerificationError, match="not the current identity key of site berlin"):
        world.say(review(world, "berlin"), author)


def test_a_site_speaks_once_and_may_take_its_signature_back() -> None:
    world = signed_by(town(), "berlin", "oslo")
    with pytest.raises(VerificationError, match="has signed already"):
        world.say(review(world, "berlin"), "berlin")
    world.say(refusal(world, "berlin"), "berlin")
    for statement in (review(world, "berlin"), refusal(world, "berlin")):
        with pytest.raises(VerificationError, match="has refused already"):
            world.say(statement, "berlin")
    assert never_released(world)
    late = world.now + 11 * DAY  # after its refusal has ended, it may look again; until then the refusal stands
    assert world.gate.facts(late).refused == ("berlin",)
    world.say(review(world, "berlin", time=late, expires=late + DAY), "berlin")
    assert world.gate.facts(late).signed == ("berlin",)


def test_a_signature_that_has_expired_does_not_count() -> None:
    world = signed_by(town(), "berlin", "oslo")
    late = world.now + 11 * DAY
    with pytest.raises(VerificationError, match="fails the condition"):
        world.say(decision(world, time=late, expires=late + DAY))
    stale = decision(world, time=world.now)
    assert stale.expires is not None
    with pytest.raises(VerificationError, match="signed: expected"):
        world.say(stale.model_copy(update={"time": late}))
    world.say(stale)
    with pytest.raises(VerificationError, match="has expired"):
        world.say(world.export("flu", 1, time=stale.expires))
    # Nothing was released in time: sites may sign anew, and it is decided anew.
    for site in ("berlin", "lyon"):
        world.say(review(world, site, time=late, expires=late + DAY), site)
    world.say(decision(world, time=late))
    world.say(world.export("flu", 1, time=late))


def test_a_member_that_left_does_not_count_but_its_refusal_stands() -> None:
    world = signed_by(town(), "berlin", "oslo")
    world.say(refusal(world, "lyon", failed=("membership",)), "lyon")
    world.say(Revoke(time=world.now, site="lyon", key=public("lyon").hex(), reason="expelled", quorum=2))
    assert set(world.gate.unmet(world.gate.facts(world.now))) == {"membership"}
    assert never_released(world)
    with pytest.raises(VerificationError, match="not the current identity key"):
        world.say(review(world, "lyon"), "lyon")
    world = signed_by(town(), "berlin", "oslo")
    world.say(Revoke(time=world.now, site="oslo", key=public("oslo").hex(), reason="left", quorum=2))
    assert world.gate.facts(world.now).signed == ("berlin",)
    assert never_released(world)


def replaced(world: Town, site: str) -> None:
    """Let a site leave, and a stranger join under its name."""
    world.say(Revoke(time=world.now, site=site, key=public(site).hex(), reason="expelled", quorum=2))
    stranger = Member(site=site, key=public(f"new {site}").hex(), witness=member(f"new-{site}").witness)
    world.say(Join(time=world.now, member=stranger, quorum=2))


def test_a_stranger_under_the_name_of_a_site_that_left_has_no_say() -> None:
    """Else a coordinator would expel who refuses, and let somebody of its own take the name."""
    world = signed_by(town(), "berlin", "oslo")
    world.say(refusal(world, "lyon", failed=("membership",)), "lyon")
    replaced(world, "lyon")
    late = world.now + 11 * DAY
    with pytest.raises(VerificationError, match="answered no round"):
        world.say(review(world, "lyon", time=late, expires=late + DAY), "new lyon")
    assert set(world.gate.unmet(world.gate.facts(world.now))) == {"membership"}
    assert never_released(world)
    world = signed_by(town(), "berlin", "oslo")
    replaced(world, "oslo")  # nor does it inherit a signature
    assert world.gate.facts(world.now).signed == ("berlin",)
    with pytest.raises(VerificationError, match="answered no round"):
        world.say(review(world, "oslo"), "new oslo")
    assert never_released(world)


def test_signatures_that_never_held_at_one_time_do_not_count_together() -> None:
    """Whatever time the coordinator writes into its decision."""
    world = signed_by(town(), "berlin")
    late = world.now + 20 * DAY
    world.say(review(world, "oslo", time=late, expires=late + DAY), "oslo")
    for time in (world.now, late, late + DAY):
        with pytest.raises(VerificationError, match="fails the condition"):
            world.say(decision(world, time=time))


def test_the_epsilon_of_a_site_cannot_be_left_out() -> None:
    world = signed_by(town(), "berlin", "oslo")
    world.gate.spent = {"berlin": 0.1, "lyon": 0.1}
    assert set(world.gate.unmet(world.gate.facts(world.now))) == {"privacy"}
    assert never_released(world)


def test_a_form_of_counts_bounds_what_a_bound_costs_everybody() -> None:
    with pytest.raises(ValueError, match="planted"):
        CanaryCounts(planted=2**31 - 1, guesses=2**31 - 1, right=2**31 - 1)


def test_what_no_gate_asked_about_never_leaves() -> None:
    """Adapters of earlier rounds, and the last one where an earlier one was published, also after the release."""
    world = Town()
    world.say(world.genesis())
    world.say(world.run_open("flu", gate=TERMS, rounds=2))
    world.play("flu", 1)
    first = world.adapters["flu"]
    opened = world.say(world.round_open("flu", 2))
    for site in SITES:
        world.say(world.site_round(site, "flu", 2, opened), site)
    spent, metrics = dict.fromkeys(SITES, 2.5), {"validation_accuracy": 0.8}
    last = world.round_close("flu", 2, opened, epsilon=spent, metrics=metrics, ended=True)
    world.say(last.model_copy(update={"adapter_published": first}))
    world.adapters["flu"] = first
    before, after = world.history.runs["flu"].statement.adapter, last.adapter_after
    signed_by(world, "berlin", "oslo")
    world.say(decision(world))
    world.say(world.export("flu", 1))
    assert world.history.withholding(first) is None
    assert world.history.withholding(before) is None
    with pytest.raises(VerificationError, match="withholds adapter"):
        world.say(world.run_open("copd", adapter=after))
    # The same adapter, made again by a run whose gate refuses it, is still the one that a gate has let out.
    world.history.runs["again"] = replace(
        world.history.runs["flu"], gate=Gate(world.gate.run, TERMS, candidate=first, made={first})
    )
    assert world.history.withholding(first) is None


def test_a_site_that_took_no_part_has_no_say() -> None:
    world = town()
    world.gate.answered.discard("oslo")
    with pytest.raises(VerificationError, match="answered no round"):
        world.say(review(world, "oslo"), "oslo")


@pytest.mark.parametrize("first", ["accepted", "refused"])
def test_a_candidate_is_decided_about_once(first: str) -> None:
    """Two coordinators, or one that changes its mind."""
    world = signed_by(town(), "berlin", "oslo")
    world.say(decision(world, first))
    for verdict in ("accepted", "refused"):
        with pytest.raises(VerificationError, match="decided about already"):
            world.say(decision(world, verdict))
    with pytest.raises(VerificationError, match="decided about already"):
        world.say(refusal(world, "lyon"), "lyon")
    if first == "refused":
        assert never_released(world)
        with pytest.raises(RefusedError, match="was refused at its gate: the committee") as caught:
            check_logged(world.history.runs["flu"], world.now)
        assert "begin a new study" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 1.0},
        {"epsilon": None},
        {"bound": 0.01},
        {"bound": None},
        {"quality": 0.99},
        {"signed": ("berlin", "lyon")},
        {"signed": ("berlin", "lyon", "oslo")},
        {"refused": ("lyon",)},
        {"expires": 1_800_000_000 + 29 * DAY},
        {"adapter": digest("other")},
        {"study": digest("other")},
        {"run": "copd"},
    ],
)
def test_every_figure_of_a_decision_follows_from_the_log(change: dict[str, Any]) -> None:
    world = signed_by(town(), "berlin", "oslo")
    world.say(world.run_open("copd"))
    with pytest.raises(VerificationError):
        world.say(decision(world).model_copy(update=change))
    world.say(decision(world))


def test_there_is_no_candidate_before_the_end_and_none_without_a_gate() -> None:
    world = Town()
    world.say(world.genesis())
    world.say(world.run_open("flu", gate=TERMS, rounds=2))
    world.play("flu", 1)
    for statement, author in ((review(world, "berlin"), "berlin"), (decision(world, "refused"), "coordinator")):
        with pytest.raises(VerificationError, match="has not ended"):
            world.say(statement, author)
    with pytest.raises(VerificationError, match="has to pass a gate"):
        world.say(world.export("flu", 1))
    with pytest.raises(VerificationError, match="withholds adapter"):  # nor does another run begin from a round's
        world.say(world.run_open("copd", adapter=world.adapters["flu"]))
    opened = world.say(world.round_open("flu", 2))
    world.say(world.round_abort("flu", 2, opened))
    assert world.gate.candidate == world.adapters["flu"]  # the last round led to nothing, and no number is left
    world.say(world.run_open("copd"))
    with pytest.raises(VerificationError, match="has no gate"):
        world.say(review(world, "berlin", run="copd"), "berlin")
    check_logged(world.history.runs["copd"], world.now)


def test_no_round_changes_what_was_reviewed() -> None:
    """A plain round that was aborted may be opened again: then there is a candidate that is none any more."""
    world = town()
    run = world.history.runs["flu"]
    run.ended, run.next, run.skips = False, 1, True
    world.say(review(world, "berlin"), "berlin")
    with pytest.raises(VerificationError, match="after sites had reviewed"):
        world.say(world.round_open("flu", 1))


def test_no_other_run_exports_it() -> None:
    world = town()
    world.say(world.run_open("copd"))
    opened = world.say(world.round_open("copd", 1))
    for site in SITES:
        world.say(world.site_round(site, "copd", 1, opened), site)
    same = world.adapters["flu"]
    world.say(world.round_close("copd", 1, opened, adapter_after=same, adapter_published=same))
    with pytest.raises(VerificationError, match="the gate of run flu withholds"):
        world.say(world.export("copd", 1, adapter=same))


def test_no_site_receives_what_another_run_was_said_to_have_made_before() -> None:
    """A coordinator that holds the sum states it in a run without a gate, and only then closes the round."""
    world = Town()
    world.say(world.genesis())
    opened = {}
    for run, terms in (("flu", TERMS), ("copd", None)):
        world.say(world.run_open(run, gate=terms, rounds=1))
        opened[run] = world.say(world.round_open(run, 1))
        for site in SITES:
            world.say(world.site_round(site, run, 1, opened[run]), site)
    made = world.round_close("flu", 1, opened["flu"], epsilon=dict.fromkeys(SITES, 2.5), ended=True)
    same = made.adapter_after
    world.say(world.round_close("copd", 1, opened["copd"], adapter_after=same, adapter_published=same, ended=True))
    world.say(world.export("copd", 1, adapter=same))
    world.say(made)
    check_logged(world.history.runs["copd"], world.now)
    log: Any = SimpleNamespace(history=world.history)
    nothing: Any = None
    with pytest.raises(RefusedError, match="the gate of run flu withholds this adapter"):
        receive(nothing, Path("adapters"), "copd", log, nothing, datetime.now(UTC), nothing)


# Files


def test_files_without_an_accepted_decision_are_a_candidate() -> None:
    study = study_of(gate={"signatures": 1})
    world = signed_by(town(), "berlin", "oslo")
    true = decision(world).model_copy(update={"study": study.digest, "adapter": digest("a")})

    def carried(statement: Statement | None) -> None:
        leaf = None if statement is None else sign_envelope(statement, private("coordinator"))
        check_carried(study, digest("a"), leaf, "runs/flu")

    carried(true)
    check_carried(study_of(), digest("a"), None, "runs/flu")  # no gate
    refused = decision(world, "refused").model_copy(update={"study": study.digest, "adapter": digest("a")})
    for wrong in (
        None,
        refused,
        true.model_copy(update={"study": digest("other")}),
        true.model_copy(update={"adapter": digest("other")}),
        Export(time=1, run="flu", round=1, adapter=digest("a"), files={"a": digest("a")}),
    ):
        with pytest.raises(RefusedError, match="runs/flu") as caught:
            carried(wrong)
        assert "privet gate test SITE RUN" in caught.value.hint
    leaf = bytearray(sign_envelope(true, private("coordinator")))
    leaf[40] ^= 1
    with pytest.raises(RefusedError, match="not a signed egress decision"):
        check_carried(study, digest("a"), bytes(leaf), "runs/flu")


# The study


def test_a_study_without_a_gate_is_the_same_study_and_a_gate_is_in_the_run_open() -> None:
    bare, gated = study_of(), study_of(gate={"signatures": 2, "canaries": 100, "epsilon": 4.0})
    assert "gate" not in bare.document()
    assert bare.digest != gated.digest
    assert gate_of(bare) is None
    assert "gate" not in run_opened("flu", bare, digest("a"), 1).model_dump(mode="json")
    opened = run_opened("flu", gated, digest("a"), 1)
    assert opened.gate is not None
    assert (opened.gate.signatures, opened.gate.days, opened.gate.epsilon) == (2, 30, 4.0)


def test_canaries_are_compared_with_the_epsilon_of_a_private_study() -> None:
    private = {"mode": "local", "epsilon": 6.0, "delta": 1e-5, "clip_norm": 1.0}
    found = gate_of(study_of(gate={"signatures": 1, "canaries": 100}, privacy=private))
    assert found is not None
    assert found.epsilon == 6.0
    with pytest.raises(StudyError, match=r"gate.epsilon|at most the study's epsilon 6"):
        study_of(gate={"signatures": 1, "canaries": 100, "epsilon": 7.0}, privacy=private)


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({}, "signatures"),
        ({"signatures": 0}, "signatures"),
        ({"signatures": 1, "canaries": 100}, "claims none"),
        ({"signatures": 1, "canaries": 19, "epsilon": 3.0}, "canaries"),
        ({"signatures": 1, "epsilon": 3.0}, "set canaries"),
        ({"signatures": 1, "membership": 0.5}, "membership"),
        ({"signatures": 1, "repeated": 0.1}, "generates no text"),
        ({"signatures": 1, "metric": "validation_loss"}, "least"),
        ({"signatures": 1, "metric": "validation_loss", "least": -0.5}, "validation_fraction"),
        ({"signatures": 1, "days": 0}, "days"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(gate: dict[str, Any], why: str) -> None:
    with pytest.raises(StudyError, match=why):
        study_of(gate=gate)
    with pytest.raises(StudyError, match="signatures: expected at most the 3 sites"):
        study_of(gate={"signatures": 4}, cohort={"sites": list(SITES)})


def test_a_loss_is_compared_as_its_negative() -> None:
    assert quality_of({"validation_loss": 0.25}, "validation_loss") == -0.25
    assert quality_of({"validation_loss": 0.25}, "validation_accuracy") is None
    assert quality_of(None, "validation_loss") is None
    assert quality_of({"validation_loss": 0.25}, None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"failed": ("membership",)},
        {"reason": "why"},
        {"canaries": None},
        {"test": None},
        {"expires": 1},
        {"tested": ("membership", "canary")},
        {"verdict": "refused", "reason": "why", "tested": ("canary",), "failed": ("membership",)},
        {"verdict": "refused"},
    ],
)
def test_a_review_that_contradicts_itself_is_no_review(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|ascending"):
        review(town(), "berlin", **change)


def test_errors_are_ours() -> None:
    """No content of a statement makes a rule raise anything but our errors."""
    world = signed_by(town(), "berlin", "oslo")
    calls: list[Callable[[], Any]] = [
        lambda: world.say(review(world, "berlin", canaries=CanaryCounts(planted=20, guesses=0, right=0)), "berlin"),
        lambda: world.say(decision(world, "refused", bound=1e300)),
    ]
    for call in calls:
        with pytest.raises(PrivetError):
            call()


def test_the_study_of_a_kind_that_counts_has_no_gate() -> None:
    document = study_of().document()
    document |= {"kind": "statistics", "gate": {"signatures": 1}}
    document.pop("training")
    document.pop("lora")
    with pytest.raises(StudyError, match="releases no adapter"):
        Study.parse(document)
