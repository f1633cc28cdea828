"""What enters the masked vector: everything follows from the study, and nothing of it is the coordinator's choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import DivergedError, PrivetError, ProtocolError, RefusedError, StudyError
from privet.common.masking import vector
from privet.common.masking.bounds import bound_of
from privet.common.masking.groups import corrupt_sites, groups_of, smallest_sum, survivors_of
from privet.common.masking.isolation import Isolation, drawn_cohort
from privet.common.masking.noise_shares import bits_of
from privet.common.masking.parameters import check_proposal, inputs_of, parameters_of, session_of
from privet.common.masking.vector import VALIDATION_SUMS, read_sums, segments_of, vector_of
from privet.common.privacy.accounting import PrivacyEvent, PrivacyPlan
from privet.common.secagg import graph, quantize
from privet.common.secagg.messages import CohortMember, Parameters
from privet.common.secagg.quantize import Layout, Segment
from privet.common.secagg.suites import Suite
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study
from tests.support.masked_world import masked_study
from tests.support.secagg_world import Drbg, identity, pins
from tests.support.synthetic import HEAD, SPEC, A, B, start_adapter

PRIVATE = {"mode": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 0.5}
DERIVED = {"bound": None}


def names_of(count: int) -> tuple[str, ...]:
    return tuple(identity(index).name for index in range(count))


def round_of(study: Study, count: int, number: int = 1) -> RoundOpen:
    adapter = start_adapter()
    return RoundOpen(study.document(), number, "nonce", adapter.digest, names_of(count), adapter.data)


def proposal(study: Study, count: int, number: int = 1) -> Parameters:
    """What an honest coordinator proposes to a cohort that is one group."""
    return parameters_of(study, SPEC, round_of(study, count, number), pins(count))


def counting(largest: int, **aggregation: Any) -> dict[str, Any]:
    return {"aggregation": {"largest_count": largest, **aggregation}}


# The vector's parts


@pytest.mark.parametrize(
    ("training", "privacy", "section", "lora", "head"),
    [
        # 4 x 0.1 x 2 steps; each by hand.
        ({}, {}, {}, 0.8, 0.8),
        ({"head_learning_rate": 0.05}, {}, {}, 0.8, 0.4),
        ({"local_steps": 5}, {}, {}, 2.0, 2.0),
        ({"head_learning_rate": 0.05}, {}, {"bound": 0.3}, 0.3, 0.3),
        ({"head_learning_rate": 0.05}, {}, {"bound": 0.3, "head_bound": 0.7}, 0.3, 0.7),
        ({}, {}, {"head_bound": 0.7}, 0.8, 0.7),
        ({"optimizer": "sgd"}, {}, {}, 0.2, 0.2),
        ({"optimizer": "sgd", "momentum": 0.75}, {}, {}, 0.8, 0.8),
        ({"optimizer": "sgd"}, PRIVATE, {}, 0.4, 0.4),
        ({"optimizer": "sgd", "momentum": 0.75}, PRIVATE, {}, 1.6, 1.6),
        ({}, PRIVATE, {}, 0.8, 0.8),
    ],
)
def test_bounds_follow_from_rates_steps_and_clip_norm(
    training: Mapping[str, Any], privacy: Mapping[str, Any], section: Mapping[str, Any], lora: float, head: float
) -> None:
    study = masked_study(training=training, privacy=privacy, secure_aggregation={**DERIVED, **section})
    assert bound_of(study, "lora_A") == bound_of(study, "lora_B") == pytest.approx(lora, rel=1e-12)
    assert bound_of(study, "full") == pytest.approx(head, rel=1e-12)


def test_the_vector_holds_cuts_and_the_trained_tensors_and_nothing_public() -> None:
    study = masked_study(secure_aggregation=DERIVED, **counting(40))
    cut, *tensors = segments_of(study, SPEC)
    assert (cut.name, cut.size, cut.count) == ("cut", 1, True)
    assert cut.bound >= 11
    assert tensors == [Segment(HEAD, 3, 40 * bound_of(study, "full")), Segment(B, 8, 40 * bound_of(study, "lora_B"))]
    with_a = segments_of(masked_study(aggregation={"method": "fedavg"}), SPEC)
    assert [(s.name, s.size) for s in with_a[1:]] == [(HEAD, 3), (A, 10), (B, 8)]
    assert with_a[0].bound >= 21


def test_equal_weights_need_no_room_for_counts() -> None:
    study = masked_study(aggregation={"weighting": "equal"})
    assert {s.bound for s in segments_of(study, SPEC) if not s.count} == {8.0}


def test_validation_sums_have_room_for_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    validating: dict[str, Any] = {"data": {"validation_fraction": 0.1}, **counting(40)}
    exact = segments_of(masked_study(**validating), SPEC)[1]
    assert (exact.name, exact.size, exact.count) == ("validation", VALIDATION_SUMS, False)
    assert exact.bound >= 40
    noise = PrivacyPlan(PrivacyEvent(1.0, 0.1, 2, "record"), PrivacyEvent(2.0, 1.0, 1, "record"), 1e-5, 3.0)
    monkeypatch.setattr(vector, "plan", lambda study: noise)
    bound = segments_of(masked_study(**validating, privacy=PRIVATE), SPEC)[1].bound
    # Multiplier times sensitivity is one deviation; eight of them are passed once in 10^15 values.
    assert 8 * 2.0 * math.sqrt(3) < bound - exact.bound < 12 * 2.0 * math.sqrt(3)


def test_a_validation_sum_beyond_the_largest_count_does_not_go_unnoticed() -> None:
    # With validation_fraction 0.5 that is every other site; a site declares its training units.
    study = masked_study(data={"validation_fraction": 0.5}, **counting(100))
    layout = Layout(segments_of(study, SPEC), 19, 3)
    sent = Contribution("s", 1, "n", 100.0, np.zeros(11, np.float32), np.array([120.0, 30.0, 90.0]))
    words = quantize.quantise(layout, vector_of(study, SPEC, sent, layout), Drbg(b"x")).words
    cut, _, metrics = read_sums(study, SPEC, quantize.dequantise(layout, words, 1))
    assert cut > 0 or metrics == pytest.approx([120.0, 30.0, 90.0], abs=0.01)


@given(st.integers(2, 4096))
def test_values_have_all_bits_that_three_or_two_lanes_leave(sites: int) -> None:
    study = masked_study()
    layout = Layout((Segment("x", 1, 1.0),), bits_of(study, sites), sites)
    assert layout.lanes == (3 if sites <= 32 else 2)
    # No carry, and one more bit would carry or cost a lane, where the format has one more.
    assert quantize.largest_sum(layout.bits, sites) < 2 ** (64 // layout.lanes)
    if layout.bits < quantize.MAX_BITS:
        assert Layout((Segment("x", 1, 1.0),), layout.bits + 1, sites).lanes < layout.lanes


def test_bits_by_hand_and_by_the_study() -> None:
    study = masked_study()
    assert [bits_of(study, n) for n in (2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 256, 257, 4096)] == [
        20, 19, 19, 18, 18, 17, 17, 16, 16, 24, 24, 23, 20,
    ]  # fmt: skip
    fixed = masked_study(secure_aggregation={"bits": 15})
    assert {bits_of(fixed, n) for n in (2, 33, 4096)} == {15}
    assert proposal(fixed, 5).bits == 15


# What names a round


def test_the_session_is_the_studys_alone() -> None:
    study = masked_study()
    first = proposal(study, 5)
    assert first.session == bytes.fromhex(study.digest.removeprefix("sha256:")) == session_of(study.digest)
    later = parameters_of(study, SPEC, replace(round_of(study, 6, 3), nonce="other"), pins(6))
    assert later.session == first.session
    assert proposal(masked_study(training={"rounds": 5}), 5).session != first.session


def test_inputs_differ_by_study_round_and_adapter() -> None:
    adapters = [start_adapter(seed).digest for seed in (0, 1)]
    studies = [masked_study().digest, masked_study(training={"rounds": 5}).digest]
    found = {inputs_of(s, r, a) for s in studies for r in (1, 2, 12) for a in adapters}
    assert len(found) == 12
    assert {len(digest) for digest in found} == {32}
    study = masked_study()
    assert proposal(study, 5).inputs == inputs_of(study.digest, 1, start_adapter().digest)


# Parameters


@settings(deadline=None, max_examples=60)
@given(sites=st.integers(3, 80), corrupt=st.integers(0, 8), fraction=st.sampled_from([0.0, 0.1, 0.29, 0.5]))
def test_parameters_are_safe_for_the_corrupt_sites_that_the_study_names(
    sites: int, corrupt: int, fraction: float
) -> None:
    section = {"corrupt": corrupt, "corrupt_fraction": fraction, "dropout_fraction": 0.0}
    study = masked_study(secure_aggregation=section, cohort={"min_sites": 10})
    c = max(corrupt, {0.0: 0, 0.1: sites // 10, 0.29: sites * 29 // 100, 0.5: sites // 2}[fraction])
    assert corrupt_sites(study, sites) == c
    if c > sites - 2:
        with pytest.raises(StudyError, match=f"{sites} sites cannot withstand {c} corrupt sites"):
            proposal(study, sites)
        return
    found = proposal(study, sites)
    assert found.corrupt == c
    assert found.min_survivors >= max((sites + c) // 2 + 1, c + 2, min(10, sites))
    assert found.threshold >= graph.least_threshold(sites, c, found.degree, found.security)
    assert (found.degree == 0) or sites > 64
    assert [member.name for member in found.cohort] == list(names_of(sites))
    assert found.segments == segments_of(study, SPEC)


def test_a_group_may_lose_sites_where_the_rounds_minimum_is_larger_than_a_group() -> None:
    study = masked_study(cohort={"min_sites": 20}, secure_aggregation={"groups": 3})
    group = groups_of(study, 1, names_of(30))[0]
    found = parameters_of(study, SPEC, round_of(study, 30), {name: pins(30)[name] for name in group})
    assert len(group) == 10
    assert found.min_survivors == (10 + 3) // 2 + 1


# What a site checks


def check(study: Study, opened: RoundOpen, proposed: Parameters, declared: int = 50) -> None:
    check_proposal(study, SPEC, opened, proposed, declared)


def test_what_follows_from_the_study_is_accepted() -> None:
    for count, study in ((3, masked_study()), (5, masked_study()), (70, masked_study(aggregation={"method": "ffa"}))):
        check(study, round_of(study, count), proposal(study, count))


def values(name: str, *numbers: int | Suite) -> list[Any]:
    return [lambda p, changes={name: number}: replace(p, **changes) for number in numbers]


def first_segment(**changes: Any) -> Any:
    return lambda p: replace(p, segments=(replace(p.segments[0], **changes), *p.segments[1:]))


def last_segment(**changes: Any) -> Any:
    return lambda p: replace(p, segments=(*p.segments[:-1], replace(p.segments[-1], **changes)))


# For each field of the parameters, every way in which a coordinator could want it otherwise.
CHANGES: dict[str, list[Any]] = {
    "session": [lambda p: replace(p, session=bytes(32)), lambda p: replace(p, session=p.session[::-1])],
    "round": [lambda p: replace(p, round=p.round + 1), lambda p: replace(p, round=0)],
    "inputs": [lambda p: replace(p, inputs=bytes(32))],
    "cohort": [
        lambda p: replace(p, cohort=p.cohort[:-1]),
        lambda p: replace(p, cohort=p.cohort[1:]),
        lambda p: replace(p, cohort=p.cohort[:1]),
        lambda p: replace(p, cohort=()),
        lambda p: replace(p, cohort=(*p.cohort, CohortMember("zz-sybil", bytes(32)))),
        lambda p: replace(p, cohort=(*p.cohort[:-1], CohortMember("zz-sybil", bytes(32)))),
        lambda p: replace(p, cohort=p.cohort[::-1]),
    ],
    "degree": values("degree", 2, 4, 8),
    "threshold": values("threshold", 0, 1, 4, 6, 7),
    "corrupt": values("corrupt", 0, 2, 5),
    "security": values("security", 0, 40, 79, 81),
    "min_survivors": values("min_survivors", 1, 2, 4, 6, 7),
    "bits": values("bits", 14, 17, 19, 24),
    "suite": values("suite", Suite.X25519, Suite.P256_MLKEM768),
    "segments": [
        lambda p: replace(p, segments=()),
        lambda p: replace(p, segments=p.segments[1:]),
        lambda p: replace(p, segments=p.segments[:-1]),
        lambda p: replace(p, segments=p.segments[::-1]),
        lambda p: replace(p, segments=(*p.segments, Segment("more", 1, 1.0))),
        first_segment(bound=59.0),
        first_segment(bound=61.0),
        first_segment(size=2),
        first_segment(name="count"),
        first_segment(count=False),
        last_segment(bound=1e6),
        last_segment(bound=1e-6),
        last_segment(size=7),
        last_segment(name="m.lora_C.weight"),
    ],
}
NAMED = [(name, change) for name, changes in CHANGES.items() for change in changes]


def test_every_field_of_the_parameters_is_among_those_changed_below() -> None:
    assert set(CHANGES) == {field.name for field in fields(Parameters)}


@pytest.mark.parametrize(("name", "change"), NAMED, ids=[f"{name}-{number}" for number, (name, _) in enumerate(NAMED)])
def test_no_single_field_may_differ_from_what_follows_from_the_study(name: str, change: Any) -> None:
    study = masked_study()
    honest = proposal(study, 7)
    assert (honest.degree, honest.threshold, honest.corrupt, honest.min_survivors, honest.bits) == (0, 5, 1, 5, 18)
    changed = change(honest)
    assert [f.name for f in fields(Parameters) if getattr(changed, f.name) != getattr(honest, f.name)] == [name]
    with pytest.raises(PrivetError) as caught:
        check(study, round_of(study, 7), changed)
    assert isinstance(caught.value, ProtocolError | RefusedError | StudyError)


@settings(max_examples=40)
@given(
    st.sampled_from(["round", "degree", "threshold", "corrupt", "security", "min_survivors", "bits"]),
    st.integers(0, 2**16 - 1),
)
def test_no_number_may_differ(name: str, value: int) -> None:
    study = masked_study()
    honest = proposal(study, 7)
    if value != getattr(honest, name):
        changed: dict[str, Any] = {name: value}
        with pytest.raises(ProtocolError, match="do not follow from the study"):
            check(study, round_of(study, 7), replace(honest, **changed))


def test_another_adapter_round_or_study_than_the_opened_one_is_refused() -> None:
    study, other = masked_study(), masked_study(training={"rounds": 5})
    opened = round_of(study, 5)
    for proposed in (
        proposal(study, 5, number=2),
        proposal(other, 5),
        parameters_of(study, SPEC, replace(opened, adapter_digest=start_adapter(1).digest), pins(5)),
    ):
        with pytest.raises(ProtocolError, match="do not follow from the study"):
            check(study, opened, proposed)


@pytest.mark.parametrize("cohort", [names_of(4), names_of(6), names_of(5)[1:], (*names_of(4), "site-0009"), ()])
def test_a_cohort_that_is_not_the_rounds_is_refused(cohort: tuple[str, ...]) -> None:
    study = masked_study()
    opened = replace(round_of(study, 5), cohort=cohort)
    with pytest.raises((ProtocolError, RefusedError), match="cohort"):
        check(study, opened, proposal(study, 5))


def test_a_group_is_the_one_that_the_study_deals() -> None:
    study = masked_study(secure_aggregation={"groups": 3})
    opened, known = round_of(study, 30), pins(30)
    dealt = groups_of(study, 1, names_of(30))
    for group in dealt:
        check(study, opened, parameters_of(study, SPEC, opened, {name: known[name] for name in group}))
    swapped = (*dealt[0][:-1], dealt[1][0])
    # The whole cohort, a group with one site exchanged, and a group of the round before.
    for chosen in (names_of(30), swapped, groups_of(study, 2, names_of(30))[0]):
        proposed = parameters_of(study, SPEC, opened, {name: known[name] for name in chosen})
        with pytest.raises(ProtocolError, match="not a group of the round's cohort"):
            check(study, opened, proposed)


@settings(max_examples=40)
@given(largest=st.integers(1, 200), declared=st.integers(1, 200))
def test_the_vector_must_have_room_for_what_the_site_declared(largest: int, declared: int) -> None:
    study = masked_study(**counting(largest))
    if declared <= largest:
        check(study, round_of(study, 5), proposal(study, 5), declared)
    else:
        with pytest.raises(
            RefusedError, match=f"this site declares {declared} units, the study allows at most {largest}"
        ):
            check(study, round_of(study, 5), proposal(study, 5), declared)


def test_a_cohort_smaller_than_the_studys_minimum_is_refused() -> None:
    # The sites agreed to be summed among ten; the coordinator opens the round for three of them.
    study = masked_study(cohort={"min_sites": 10})
    for count in (3, 9):
        with pytest.raises(
            RefusedError, match=f"at least 10 different sites in name order .cohort.min_sites., got {count}"
        ):
            check(study, round_of(study, count), proposal(study, count))
    check(study, round_of(study, 10), proposal(study, 10))


def test_a_cohort_in_which_a_site_stands_twice_is_refused() -> None:
    # Eight sites, named four times each, pass for a cohort of 32; a group of them may well hold eight names once.
    study = masked_study(cohort={"min_sites": 30}, secure_aggregation={"groups": 4})
    for number in range(1, 400):
        opened = replace(round_of(study, 8, number), cohort=tuple(sorted(names_of(8) * 4)))
        for group in groups_of(study, number, opened.cohort):
            if len(set(group)) == len(group):
                known = {name: pins(8)[name] for name in group}
                with pytest.raises(RefusedError, match="30 different sites in name order"):
                    check(study, opened, parameters_of(study, SPEC, opened, known))


def test_a_site_that_the_study_does_not_name_is_in_no_cohort() -> None:
    study = masked_study(cohort={"sites": names_of(5)})
    check(study, round_of(study, 5), proposal(study, 5))
    check(study, round_of(study, 4), proposal(study, 4))
    with pytest.raises(RefusedError, match=r"holds 2 sites that cohort\.sites of the study does not name"):
        check(study, round_of(study, 7), proposal(study, 7))


# Groups


@settings(max_examples=60)
@given(
    count=st.integers(3, 120),
    groups=st.integers(1, 40).filter(lambda groups: groups != 2),
    corrupt=st.integers(0, 12),
    number=st.integers(1, 1000),
    seed=st.integers(0, 2**53 - 1),
)
def test_groups_part_the_cohort_and_none_is_small(
    count: int, groups: int, corrupt: int, number: int, seed: int
) -> None:
    section = {"groups": groups, "corrupt": corrupt, "corrupt_fraction": 0.1}
    study = masked_study(secure_aggregation=section, cohort={"min_sites": 14}).model_copy(update={"seed": seed})
    names = names_of(count)
    found = groups_of(study, number, names)
    assert sorted(name for group in found for name in group) == list(names)
    assert all(list(group) == sorted(group) for group in found)
    assert len(found) <= groups
    if count < 30 or groups == 1:
        assert found == [names]
    if len(found) > 1:
        sizes = [len(group) for group in found]
        assert min(sizes) >= max(5, max(corrupt, count // 10) + 3)
        assert max(sizes) - min(sizes) <= 1
    elif count >= 30 and groups > 1:
        assert count < 3 * max(5, max(corrupt, count // 10) + 3)
    assert groups_of(study, number, names[::-1]) == found


@settings(max_examples=40, deadline=None)
@given(
    least=st.integers(14, 60),
    more=st.integers(0, 60),
    groups=st.integers(1, 40).filter(lambda groups: groups != 2),
    corrupt=st.integers(0, 12),
    fraction=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_no_cohort_and_no_dropout_makes_a_sum_smaller_than_the_smallest(
    least: int, more: int, groups: int, corrupt: int, fraction: float
) -> None:
    """Attack: 30 sites in 5 groups, whose sums may be over 5, pass a policy that demands 6."""
    section = {"groups": groups, "corrupt": corrupt, "corrupt_fraction": fraction}
    names = names_of(least + more)
    study = masked_study(secure_aggregation=section, cohort={"min_sites": least, "sites": names})
    found = min(
        survivors_of(study, len(group), count)
        for count in range(least, len(names) + 1)
        for group in groups_of(study, 1, names[:count])
    )
    assert smallest_sum(study) == found
    anybody = masked_study(secure_aggregation=section, cohort={"min_sites": least})
    assert smallest_sum(anybody) <= found


@pytest.mark.parametrize("spoilers", [0, 1, 4])
def test_a_cohort_without_those_who_spoiled_sums_no_fewer_sites(spoilers: int) -> None:
    study = masked_study(secure_aggregation={"groups": 5}, cohort={"min_sites": 30})
    names, left_out = names_of(36), names_of(36)[:spoilers]
    for number in range(1, 40):
        cohort = drawn_cohort(study, number, names, Isolation(left_out=left_out))
        assert len(cohort) == 36 - spoilers
        for group in groups_of(study, number, cohort):
            assert survivors_of(study, len(group), len(cohort)) >= smallest_sum(study) == 5


def test_no_cohort_is_parted_in_two() -> None:
    # Of two groups neither is the outlying one: the coordinator learns finer sums, and nobody gains.
    study = masked_study(secure_aggregation={"groups": 3, "corrupt": 9}, cohort={"min_sites": 11})
    assert [len(group) for group in groups_of(study, 1, names_of(30))] == [30]


def test_groups_differ_by_round_and_seed_and_treat_sites_alike() -> None:
    study = masked_study(secure_aggregation={"groups": 5})
    names = names_of(30)
    rounds = [groups_of(study, number, names) for number in range(1, 301)]
    assert len({tuple(groups) for groups in rounds}) == 300
    assert groups_of(study.model_copy(update={"seed": 1}), 1, names) != rounds[0]
    together = np.zeros((30, 30))
    for groups in rounds:
        for group in groups:
            inside = [names.index(name) for name in group]
            together[np.ix_(inside, inside)] += 1
    # Two sites meet with probability 5 / 29: in 300 rounds 51.7 times, standard deviation 6.5.
    meetings = together[np.triu_indices(30, 1)]
    assert np.abs(meetings - 51.7).max() < 5 * 6.5


# There and back

Factors = st.lists(
    st.floats(-3, 3, width=32).filter(lambda x: abs(abs(x) - 1) > 1e-4 and (x == 0 or abs(x) > 1e-30)),
    min_size=11,
    max_size=11,
)


@settings(deadline=None, max_examples=60)
@given(
    vectors=st.lists(st.tuples(st.integers(1, 1000), Factors), min_size=1, max_size=5),
    weighting=st.sampled_from(["declared", "equal"]),
    head=st.sampled_from([None, 0.25, 40.0]),
    validates=st.booleans(),
)
def test_sums_are_those_of_the_cut_values_and_every_cut_is_counted(
    vectors: list[tuple[int, list[float]]], weighting: str, head: float | None, validates: bool
) -> None:
    largest = max(count for count, _ in vectors)
    study = masked_study(
        data={"validation_fraction": 0.1 if validates else 0.0},
        secure_aggregation={"head_bound": head},
        **counting(largest, weighting=weighting),
    )
    layout = Layout(segments_of(study, SPEC), bits_of(study, 8), 8)
    top = largest if weighting == "declared" else 1
    bounds = top * np.repeat([bound_of(study, "full"), 8.0], [3, 8])
    words = np.zeros(layout.words, np.uint64)
    expected, weight, cut, sums = np.zeros(11), 0.0, 0, np.zeros(3 * validates)
    for number, (count, factors) in enumerate(vectors):
        w = float(count) if weighting == "declared" else 1.0
        own = bounds * w / top  # what the site may send: the room is for the largest count
        update = (np.array(factors) * own).astype(np.float32)
        metrics = np.array([count, 0.3 * count, 0.0]) if validates else np.empty(0)
        sent = Contribution("s", 1, "n", w, update, metrics)
        words += quantize.quantise(layout, vector_of(study, SPEC, sent, layout), Drbg(b"%d" % number)).words
        cut += sum(abs(factor) > 1 for factor in factors)
        expected += np.clip(update.astype(np.float64), -own, own)
        weight, sums = weight + w, sums + metrics
    found = read_sums(study, SPEC, quantize.dequantise(layout, words, len(vectors)))
    assert found[0] == cut
    # Each site's part is off by less than one level (`quantize.decode`), and single precision by far less.
    assert np.all(np.abs(found[1] - expected) <= len(vectors) * bounds / layout.level * (1 + 1e-5))
    assert found[2].shape == (3 * validates,)
    assert np.all(np.abs(found[2] - sums) <= len(vectors) * layout.segments[1].bound / layout.level)


def test_a_light_site_is_cut_at_its_own_weight_times_the_bound() -> None:
    study = masked_study(secure_aggregation={"bound": 0.5}, **counting(1000))
    layout = Layout(segments_of(study, SPEC), 18, 5)
    sent = Contribution("s", 1, "n", 10.0, np.full(11, 10 * 9.0, np.float32), np.empty(0))  # each value changed by 9
    words = quantize.quantise(layout, vector_of(study, SPEC, sent, layout), Drbg(b"x")).words
    cut, update, _ = read_sums(study, SPEC, quantize.dequantise(layout, words, 1))
    assert cut == 11
    assert update / sent.weight == pytest.approx(np.full(11, 0.5), abs=1e-2)


def encoded(study: Study, sent: Contribution) -> quantize.Encoded:
    layout = Layout(segments_of(study, SPEC), 18, 5)
    return quantize.quantise(layout, vector_of(study, SPEC, sent, layout), Drbg(b"x"))


SENT = Contribution("s", 1, "n", 60.0, np.zeros(11, np.float32), np.empty(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_does_not_enter_a_sum(value: float) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        encoded(masked_study(), replace(SENT, update=np.full(11, value, np.float32)))


@pytest.mark.parametrize("weight", [61.0, -1.0, 0.5, np.nan])
def test_a_weight_beyond_the_declared_ones_does_not_enter_a_sum(weight: float) -> None:
    with pytest.raises(DivergedError, match="weight"):
        encoded(masked_study(), replace(SENT, weight=weight))


@pytest.mark.parametrize("size", [0, 10, 12])
def test_an_update_of_another_size_does_not_enter_a_sum(size: int) -> None:
    with pytest.raises(ProtocolError, match=r"segment m\.\S+ of the site's vector: expected"):
        encoded(masked_study(), replace(SENT, update=np.zeros(size, np.float32)))


def test_validation_sums_enter_exactly_where_the_study_validates() -> None:
    validating = masked_study(data={"validation_fraction": 0.1})
    with pytest.raises(ProtocolError, match="validation"):
        encoded(validating, SENT)
    with pytest.raises((ProtocolError, KeyError), match="validation"):
        encoded(masked_study(), replace(SENT, metrics=np.ones(3)))
    with pytest.raises(ProtocolError, match="segment validation of the site's vector: expected 3 values, got 2"):
        encoded(validating, replace(SENT, metrics=np.ones(2)))
    encoded(validating, replace(SENT, metrics=np.ones(3)))
