"""A head start in the study, the accounting and the log: one release of its own, and nothing changes without it."""

from __future__ import annotations

from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from privet.common.audit.accounts import Accounts
from privet.common.audit.privacy_statement import check_statements, privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.errors import StudyError, VerificationError
from privet.common.log.agreement import promise_of
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.vector import segments_of, step_segments
from privet.common.privacy.accounting import PrivacyEvent, PrivacyPlan, epsilon, noise_multiplier, plan
from privet.common.study.adapter import AdapterSpec, TensorSpec
from privet.common.study.study import Study
from tests.support.synthetic import study_of

DELTA = 1e-4
LOCAL = {"mode": "local", "epsilon": 3.0, "delta": DELTA, "clip_norm": 0.5}
# What is not sampled is accounted fast.
HEAD: dict[str, Any] = {"head_start": "class-means", "sampling_rate": 1.0}
SHARED: dict[str, Any] = {
    "privacy": {**LOCAL, "mode": "distributed"},
    "secure_aggregation": {"mode": "masked"},
    "cohort": {"min_sites": 3},
    "aggregation": {"largest_count": 300},
}
STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0}
SPEC = AdapterSpec.of(
    [
        TensorSpec("m.classifier.bias", (3,), "full"),
        TensorSpec("m.classifier.weight", (3, 4), "full"),
        TensorSpec("m.lora_A.weight", (2, 4), "lora_A"),
        TensorSpec("m.lora_B.weight", (4, 2), "lora_B"),
    ]
)


def planned(study: Study) -> PrivacyPlan:
    """Return the plan of a private study."""
    found = plan(study)
    assert found is not None
    return found


# --- the study -------------------------------------------------------------------------------------------


def test_a_study_without_one_is_the_study_that_it_was() -> None:
    # Recorded before head starts were known.
    assert study_of().digest == "sha256:912415d2a4e808d5952383231ce86dadf271671d85fc881b47ff5136dbf45bda"
    assert study_of(training={"head_start": "none"}).digest == study_of().digest
    assert study_of(training={"train_head": True}).digest == study_of().digest
    assert "head" not in (promise_of(study_of(privacy=LOCAL)) or study_of()).model_dump()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"training": {"rounds": 0}}, "training.rounds: expected 1 or more"),
        ({"training": {"head_start_share": 0.3}}, "needs a head start"),
        ({"training": {"rounds": 0, **HEAD, "head_start_share": 0.3}}, "1 or more rounds to share with"),
        ({"training": {**HEAD, "head_start_share": 1.0}}, "less than 1"),
        ({"training": {"train_head": False}}, "false needs a head start"),
        ({"training": {**HEAD, "rounds": 0, "train_head": False}}, "1 or more rounds"),
        ({"training": {**HEAD, "train_head": False}, "aggregation": {"head_learning_rate": 0.1}}, "no head is trained"),
        (
            {"training": {**HEAD, "train_head": False}, "privacy": {**LOCAL, "head_clip_share": 0.5}},
            "no head beside the adapter",
        ),
        ({"training": HEAD, "aggregation": {"weighting": "equal"}}, 'aggregation.weighting = "declared"'),
        (
            {
                "training": HEAD,
                "task": {"kind": "causal-lm", "labels": []},
                "data": {"columns": {"prompt": "p", "answer": "a"}},
            },
            "causal-lm has no classes whose means could start a head",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError) as raised:
        study_of(**sections)
    assert says in str(raised.value)


def test_round_1_is_the_head_start_and_the_rest_train() -> None:
    study = study_of(training={**HEAD, "rounds": 4})
    assert study.rounds == 5
    assert [study.is_head_start(number) for number in (1, 2, 5)] == [True, False, False]
    assert [study.trained_before(number) for number in (2, 5)] == [0, 3]
    assert study_of(training={**HEAD, "rounds": 0}).rounds == 1
    plain = study_of()
    assert not plain.is_head_start(1)
    assert (plain.rounds, plain.trained_before(1)) == (4, 0)


# --- accounting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_head_start_and_training_together_cost_epsilon(target: float) -> None:
    study = study_of(
        privacy={**LOCAL, "epsilon": target}, training={**HEAD, "sampling_rate": 0.1, "head_start_share": 0.3}
    )
    found = planned(study)
    assert found.head is not None
    z, z_head = found.training.noise_multiplier, found.head.noise_multiplier
    assert (found.head.sampling_rate, found.head.steps) == (1.0, 1)
    assert 0.97 * target < found.spent(study.rounds) <= target
    assert epsilon([found.head], DELTA) <= 0.3 * target
    # And by an accountant of others.
    other = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    other.compose(GaussianDpEvent(z_head))
    other.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(z)), study.total_steps)
    assert other.get_epsilon(DELTA) <= target
    # Half the noise at either place would break the promise.
    assert epsilon([found.head, *[PrivacyEvent(z / 2, 0.1, 2, "record")] * 4], DELTA) > target
    assert epsilon([PrivacyEvent(z_head / 2, 1.0, 1, "record"), *[found.training] * 4], DELTA) > target


def test_a_site_that_missed_it_pays_for_its_steps_alone() -> None:
    found = planned(study_of(privacy=LOCAL, training=HEAD))
    assert found.head is not None
    assert found.spent(range(2, 6)) == epsilon([found.training] * 4, DELTA) < found.spent(5)
    assert found.spent(1) == epsilon([found.head], DELTA)
    assert found.spent(0) == 0
    assert found.sides(3) == [[found.head, found.training, found.training]]


def test_without_training_it_has_all_of_epsilon() -> None:
    study = study_of(privacy=LOCAL, training={**HEAD, "rounds": 0})
    found = planned(study)
    assert found.head is None
    assert found.training == PrivacyEvent(noise_multiplier(3.0, DELTA, 1.0, 1), 1.0, 1, "record")
    assert found.event(head=True) == found.training


def test_validation_units_pay_for_every_round_with_the_head_start() -> None:
    found = planned(study_of(privacy=LOCAL, training=HEAD, data={"validation_fraction": 0.2}))
    assert found.validation is not None
    assert found.sides(5)[1] == [found.validation] * 5
    assert epsilon([found.validation] * 5, DELTA) <= 3.0


# --- what is masked --------------------------------------------------------------------------------------


def test_its_vector_is_that_of_the_class_sums() -> None:
    study = study_of(privacy=LOCAL, training=HEAD)
    found = planned(study)
    assert found.head is not None
    _, sums = segments_of(study, SPEC, head=True)
    # Ten units or more: their terms, and ten deviations of the noise.
    assert (sums.name, sums.size) == ("class-sums", 3 * 5)
    assert sums.bound == 10_000 * 0.5 * (1 + found.head.noise_multiplier)
    assert [segment.name for segment in segments_of(study, SPEC)[1:]] == [
        "m.classifier.bias",
        "m.classifier.weight",
        "m.lora_B.weight",
    ]


def test_shares_are_of_the_noise_of_the_round() -> None:
    study = study_of(**SHARED, training={**HEAD, **STEP})
    found = planned(study)
    assert found.head is not None
    head, step = shared_noise(study, 4, head=True), shared_noise(study, 4)
    assert head.noise_multiplier == found.head.noise_multiplier
    assert step.noise_multiplier == found.training.noise_multiplier
    (segment,) = step_segments(study, SPEC, 4, head=True)
    assert segment.size == 15
    # All units of all sites may point the same way, and fit.
    lane = 2 * segment.bound / head.level
    assert (300 * 4 * 0.5 + 12 * 2 * head.deviation) / head.level < lane / 2


def test_a_sites_own_shares_reach_epsilon_alone_with_the_head_start() -> None:
    study = study_of(**{**SHARED, "privacy": {**SHARED["privacy"], "epsilon_alone": 4.0}}, training={**HEAD, **STEP})
    events = [
        PrivacyEvent(shared_noise(study, 4, head=True).own_multiplier, 1.0, 1, "record"),
        PrivacyEvent(shared_noise(study, 4).own_multiplier, 1.0, 4, "record"),
    ]
    assert epsilon(events, DELTA) <= 4.0


# --- statements ------------------------------------------------------------------------------------------


def statement(study: Study, number: int, cohorts: list[list[str]]) -> dict[str, Any]:
    """Return the privacy part of a round's statement, as the coordinator makes it."""
    mechanism = planned(study)
    sites = sorted({site for cohort in cohorts for site in cohort})
    rounds = {site: [n for n, cohort in enumerate(cohorts, start=1) if site in cohort] for site in sites}
    head = {} if mechanism.head is None else {"head": mechanism.head.document()}
    return {
        "type": "round-close",
        "round": number,
        "study": study.digest,
        "cohort": cohorts[-1],
        "survivors": cohorts[-1],
        "privacy": {
            "unit": "record",
            "delta": mechanism.delta,
            "target": mechanism.target,
            "accountant": "prv",
            "training": mechanism.training.document(),
            "validation": None,
            **head,
            "epsilon": {site: mechanism.spent(numbers) for site, numbers in rounds.items()},
        },
    }


def test_the_privacy_statement_names_it_and_counts_it_where_it_was() -> None:
    study = study_of(privacy=LOCAL, training=HEAD)
    mechanism = planned(study)
    cohorts = [["alder", "birch"], ["alder", "birch", "cedar"]]
    statements = [statement(study, number + 1, cohorts[: number + 1]) for number in range(2)]
    assert check_statements(study, statements) == mechanism
    document = privacy_document(study, statements)
    assert document["mechanism"]["head_start"]["noise_multiplier"] == mechanism.head.noise_multiplier  # type: ignore[union-attr]
    spent = {site: cost["epsilon"] for site, cost in document["epsilon"]["sites"].items()}
    assert spent == {"alder": mechanism.spent(2), "birch": mechanism.spent(2), "cedar": mechanism.spent([2])}
    text = " ".join(privacy_markdown(document).split())
    assert "Round 1 is a head start" in text
    assert f"noise multiplier {mechanism.head.noise_multiplier:.6g}" in text  # type: ignore[union-attr]


@pytest.mark.parametrize("lie", ["another mechanism", "none", "as a step"])
def test_a_false_cost_of_it_is_found(lie: str) -> None:
    study = study_of(privacy=LOCAL, training=HEAD)
    mechanism, stated = planned(study), statement(study, 1, [["alder", "birch"]])
    if lie == "another mechanism":
        stated["privacy"]["head"]["noise_multiplier"] *= 1.1
    elif lie == "none":
        del stated["privacy"]["head"]
    else:
        stated["privacy"]["epsilon"] = dict.fromkeys(("alder", "birch"), mechanism.spent([2]))
    with pytest.raises(VerificationError):
        check_statements(study, [stated])


def test_an_auditor_composes_it_with_the_rounds_that_train() -> None:
    study = study_of(privacy=LOCAL, training=HEAD)
    promise, accounts, found = promise_of(study), Accounts(), planned(study)
    assert promise is not None
    assert promise.of_round(1) == (promise.head, None)
    assert promise.of_round(2) == promise.of_round(5) == (promise.training, None)

    class Opened:
        privacy = promise

    for rounds in (1, 2, 5):
        assert accounts._spent(Opened, rounds, head=True) == pytest.approx(found.spent(rounds))  # type: ignore[arg-type]
    assert accounts._spent(Opened, 3, head=False) == pytest.approx(found.spent([2, 3, 4]))  # type: ignore[arg-type]
