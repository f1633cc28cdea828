"""The privacy statement: its numbers are other accountants', its words fit the study, and no false number passes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from accountants import RELATION, googles
from dp_accounting.pld import PLDAccountant
from typer.testing import CliRunner

from privet.common.audit.bundle import _agree
from privet.common.audit.privacy_statement import privacy_document, rounds_by_site
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, StateError, StudyError, VerificationError
from privet.common.privacy.accounting import plan
from privet.common.study.study import Study
from privet.server.commands.audit import privacy
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.timing import Timing
from tests.support.synthetic import NAMES, PEFT_CONFIG, Site, exchange_of, optima, start_adapter, study_of, towards

PRIVATE = {"mode": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
PATIENT = {**PRIVATE, "unit": "patient", "max_records_per_unit": 3}

MESH = 1e-3  # of the accountant that checks: it rounds up by less than 0.001 in all
HEADINGS = [
    "Epsilon and delta",
    "Unit of privacy",
    "Mechanism",
    "Accounting",
    "Metrics",
    "Trust model",
    "Randomness and implementation",
    "Side channels",
    "Not covered",
]
NOT_COVERED = [
    "Tuning",
    "Pre-processing",
    "Choice of study",
    "Declared counts",
    "Failures and timing",
    "Validation split",
    "Other studies",
]

Statements = list[dict[str, Any]]


def of(rate: float = 1.0, **sections: dict[str, Any]) -> Study:
    return study_of(**{"training": {"sampling_rate": rate}, **sections})


def run(path: Path, study: Study) -> RunDirectory:
    """Run a whole study over four synthetic sites."""
    adapter = start_adapter()
    validates = study.data.validation_fraction > 0
    sites = [
        Site(NAMES[i], towards(x), weight=10, metrics=lambda number: (10.0, 1.0, 5.0) if validates else ())
        for i, x in enumerate(optima(study, 4))
    ]
    directory = RunDirectory.create(path, study, adapter, PEFT_CONFIG)
    run_study(Unlogged(directory), exchange_of(*sites), timing=Timing(gathering=0.0, round=5.0))
    return directory


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


HALF: dict[str, Any] = {
    "privacy": PRIVATE,
    "cohort": {"fraction": 0.5},
    "data": {"validation_fraction": 0.1},
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A private run that asks two of four sites in each round, and validates. Read only.

    It takes all units in every step, which is calibrated fast; a slow test samples.
    """
    return run(tmp_path_factory.mktemp("half") / "run", of(**HALF))


def statements_of(directory: RunDirectory) -> Statements:
    return [json.loads(json.dumps(statement)) for statement in directory.load().statements]


def headings(text: str) -> list[str]:
    return re.findall(r"^## \d+\. (.*)$", text, flags=re.MULTILINE)


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def said(study: Study, statements: Statements) -> str:
    return one_line(privacy_markdown(privacy_document(study, statements)))


# --- what it says ----------------------------------------------------------------------------------------


def check_costs(directory: RunDirectory) -> None:
    """Compare every site's cost with what Google's accountant computes from the mechanism that is stated."""
    statements = statements_of(directory)
    document = privacy_document(directory.study, statements)
    costs, mechanism = document["epsilon"], document["mechanism"]
    counts = {site: sum(site in statement["cohort"] for statement in statements) for site in NAMES}
    assert {site: cost["rounds"] for site, cost in costs["sites"].items()} == {s: n for s, n in counts.items() if n}
    assert len({*counts.values()}) > 1  # the draw of cohorts makes a difference
    for cost in costs["sites"].values():
        bounds = []
        for event in (mechanism["training_per_round"], mechanism["validation_per_round"]):
            history = [(event["noise_multiplier"], event["sampling_rate"], event["steps"] * cost["rounds"])]
            bounds.append(googles(history, costs["delta"], PLDAccountant(RELATION, MESH)))
        assert max(bounds) - 1e-3 <= cost["epsilon"] <= max(bounds) + 0.0125
        assert cost["epsilon_rdp"] > cost["epsilon"] - 0.01
    assert costs["run"] == max(cost["epsilon"] for cost in costs["sites"].values())
    assert costs["run"] <= costs["target"] == 3.0


def test_every_site_is_charged_what_another_accountant_computes(half: RunDirectory) -> None:
    check_costs(half)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_so_it_is_where_units_are_sampled(unit: str, tmp_path: Path) -> None:
    sections = {**HALF, "privacy": {**PRIVATE, "unit": unit}}
    sections["data"] = {**sections["data"], "unit": "subject_id"}
    directory = run(tmp_path / "run", of(0.1, **sections))
    check_costs(directory)
    assert f"draws each {unit} independently with probability 0.1" in said(directory.study, statements_of(directory))


def test_a_unit_at_every_site_is_charged_the_composition_of_all(half: RunDirectory) -> None:
    document = privacy_document(half.study, statements_of(half))
    mechanism, sites = document["mechanism"], document["epsilon"]["sites"]
    rounds = sum(cost["rounds"] for cost in sites.values())
    events = mechanism["training_per_round"], mechanism["validation_per_round"]
    history = [(e["noise_multiplier"], e["sampling_rate"], e["steps"] * rounds) for e in events]
    bound = googles(history, 1e-5, PLDAccountant(RELATION, MESH))
    assert bound - 1e-3 <= document["epsilon"]["at_every_site"] <= bound + 0.0125
    assert document["epsilon"]["run"] < document["epsilon"]["at_every_site"]


def test_the_mechanism_is_the_studys(half: RunDirectory) -> None:
    mechanism = privacy_document(half.study, statements_of(half))["mechanism"]
    training, validation = mechanism["training_per_round"], mechanism["validation_per_round"]
    assert mechanism["sampling"] == "poisson"
    assert mechanism["clipping"] == {"kind": "flat", "norm": 1.0}
    assert (training["sampling_rate"], training["steps"], training["unit"]) == (1.0, 2, "record")
    assert (validation["sampling_rate"], validation["steps"]) == (1.0, 1)
    assert training["neighbouring"] == "add-or-remove-one-unit"


def test_the_text_has_all_headings_in_the_order_of_the_guideline(half: RunDirectory) -> None:
    document = privacy_document(half.study, statements_of(half))
    text = privacy_markdown(document)
    assert headings(text) == HEADINGS
    assert re.findall(r"^\* \*\*(.*?)\.\*\*", text.partition("Not covered")[2], flags=re.MULTILINE)[:7] == NOT_COVERED
    assert not re.search(r"[{}]", text)
    assert all(len(line) <= 100 or line.startswith("* ") for line in text.splitlines())


def test_the_text_shows_the_numbers_rounded_up(half: RunDirectory) -> None:
    document = privacy_document(half.study, statements_of(half))
    text, costs = privacy_markdown(document), document["epsilon"]
    for site, cost in costs["sites"].items():
        found = re.search(rf"^\| {site} \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
        assert found
        assert int(found[1]) == cost["rounds"]
        assert cost["epsilon"] <= float(found[2]) < cost["epsilon"] + 1e-4
        assert cost["epsilon_rdp"] <= float(found[3]) < cost["epsilon_rdp"] + 1e-4
    promise = re.search(r"is \(([\d.]+), 1e-05\)-differentially private", one_line(text))
    assert promise
    assert costs["run"] <= float(promise[1]) < costs["run"] + 1e-4
    factor = re.search(r"factor of at most ([\d.]+), and", one_line(text))
    assert factor
    assert math.exp(costs["run"]) <= float(factor[1]) < math.exp(costs["run"]) + 1e-4
    assert f"Noise multiplier {document['mechanism']['training_per_round']['noise_multiplier']:.6g}" in text
    assert "with probability 1 (Poisson sampling" in one_line(text)
    assert "the 4 rounds of this run" in one_line(text)


def test_replacing_a_unit_is_stated_by_group_privacy_and_at_the_same_delta(half: RunDirectory) -> None:
    document = privacy_document(half.study, statements_of(half))
    costs, found = document["epsilon"], document["epsilon"]["replacing"]
    assert found["epsilon"] == 2 * costs["run"]
    assert found["delta"] == (1 + math.exp(costs["run"])) * 1e-5
    # All units are in every step here: half the noise multiplier, by Google's accountant.
    events = document["mechanism"]["training_per_round"], document["mechanism"]["validation_per_round"]
    rounds = max(cost["rounds"] for cost in costs["sites"].values())
    bounds = [
        googles([(e["noise_multiplier"] / 2, 1.0, e["steps"] * rounds)], 1e-5, PLDAccountant(RELATION, MESH))
        for e in events
    ]
    assert max(bounds) - 1e-3 <= found["epsilon_at_same_delta"] <= max(bounds) + 0.0125
    assert found["epsilon_at_same_delta"] > found["epsilon"]
    text = one_line(privacy_markdown(document))
    pair = re.search(r"removing and adding together are \(([\d.]+), ([\de.-]+)\)-differentially private", text)
    assert pair
    assert found["epsilon"] <= float(pair[1]) < found["epsilon"] + 1e-4
    assert found["delta"] <= float(pair[2]) < found["delta"] * 1.01
    assert "up to twice" not in text


def test_where_replacing_a_unit_is_not_covered_the_statement_says_so() -> None:
    study = of(**{**SHARED, "privacy": {**SHARED["privacy"], "epsilon": 40.0}})
    statements = shared_statements(study, 9, 8)
    statements = [{**statements[0], "round": number + 1} for number in range(4)]
    mechanism = plan(study)
    assert mechanism is not None
    for number, statement in enumerate(statements, 1):
        cost = dict.fromkeys(statement["cohort"], mechanism.spent(number))
        statement["privacy"] = {**statement["privacy"], "epsilon": cost}
    document = privacy_document(study, statements)
    assert document["epsilon"]["replacing"]["delta"] is None
    assert "group privacy promises nothing at this epsilon and delta" in one_line(privacy_markdown(document))


def test_statements_of_earlier_formats_are_made_as_they_were(half: RunDirectory) -> None:
    statements = statements_of(half)
    first, second, third = (privacy_document(half.study, statements, form=form) for form in (1, 2, 3))
    assert third == privacy_document(half.study, statements)
    old, new = (each["not_covered"].pop("validation split") for each in (second, third))
    assert second == third | {"format": 2}
    assert old.startswith("Units that go by several names")
    assert new.startswith("Units whose name varies.")
    assert first["not_covered"].pop("validation split") == old
    assert second["epsilon"].pop("replacing")
    assert first == second | {"format": 1}
    text = one_line(privacy_markdown(privacy_document(half.study, statements, form=1)))
    assert list(first["not_covered"]) == list(third["not_covered"])  # in the same order, as its text lists them
    assert "Replacing one is both, and costs up to twice the epsilon." in text
    assert "Rényi" not in text


def test_units_are_called_what_they_are() -> None:
    patients = of(privacy=PATIENT, data={"unit": "subject_id"})
    text = said(patients, [])
    assert "one patient: all rows of a site that share a value of the column `subject_id`" in text
    assert "draws each patient independently" in text
    assert "at most 3 of its rows" in text
    assert not re.search(r"\brecords?\b", text.partition("## 8.")[0])
    records = said(of(privacy=PRIVATE), [])
    assert "one record: one row of a site's files" in records
    assert "patient" not in records


@pytest.mark.parametrize(
    ("clipping", "words"),
    [
        ("flat", "clipped to L2 norm 0.5"),
        ("automatic", "scaled to an L2 norm just below 0.5"),
        ("adaptive", "begins each round at 0.5 and follows a noised quantile"),
    ],
)
def test_clipping_is_described_as_the_study_does_it(clipping: str, words: str) -> None:
    study = of(privacy={**PRIVATE, "clip_norm": 0.5, "clipping": clipping})
    document = privacy_document(study, [])
    assert words in one_line(privacy_markdown(document))
    assert document["mechanism"]["clipping"]["kind"] == clipping


def test_a_head_that_is_clipped_apart_is_named() -> None:
    document = privacy_document(of(privacy={**PRIVATE, "clip_norm": 0.5, "head_clip_share": 0.3}), [])
    assert document["mechanism"]["clipping"] == {"kind": "flat", "norm": 0.5, "head_share": 0.3}
    text = one_line(privacy_markdown(document))
    assert "clipped to L2 norm 0.5, of whose square the head, clipped apart, has 0.3" in text


def test_the_trust_model_is_local_and_says_what_secure_aggregation_adds() -> None:
    plain = said(of(privacy=PRIVATE), [])
    masked_study = of(privacy=PRIVATE, secure_aggregation={"mode": "masked", "corrupt": 2}, cohort={"min_sites": 4})
    masked = said(masked_study, [])
    for text in (plain, masked):
        assert "Local: each site adds all of its noise itself" in text
    assert "the coordinator sees each site's update by itself" in plain
    assert "with up to 2 sites in league with it, learns sums" in masked
    assert "Epsilon does not count on it" in masked


SHARED: dict[str, Any] = {
    "privacy": {**PRIVATE, "mode": "distributed"},
    "training": {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "sampling_rate": 1.0},
    "secure_aggregation": {"mode": "masked"},
    "cohort": {"min_sites": 3},
}


def shared_statements(study: Study, asked: int, stayed: int, kind: str = "round-close") -> Statements:
    """Return the statement of a first round that asked so many sites and closed over so many."""
    mechanism = plan(study)
    assert mechanism is not None
    cohort = [f"site-{number}" for number in range(asked)]
    privacy = {
        "unit": "record", "delta": mechanism.delta, "target": mechanism.target, "accountant": "prv",
        "training": mechanism.training.document(), "validation": None,
        "epsilon": dict.fromkeys(cohort, mechanism.spent(1)),
    }  # fmt: skip
    common = {"type": kind, "study": study.digest, "round": 1, "privacy": privacy}
    return [{**common, "cohort": cohort, "survivors": cohort[:stayed]}]


def test_shared_noise_is_promised_against_named_parties_under_named_conditions() -> None:
    study = of(**SHARED)
    document = privacy_document(study, shared_statements(study, 9, 8))
    trust, mechanism = document["trust"], document["mechanism"]
    assert trust["model"] == "distributed"
    assert trust["shares"] == [{"sites": 9, "survivors": 8, "corrupt": 1, "helpers": 7}]
    assert mechanism["training_per_round"]["mechanism"] == "poisson-subsampled-shared-gaussian"
    # A share by itself is a Gaussian of a seventh of the variance: the exact epsilon of one release of all units.
    alone = mechanism["training_per_round"]["noise_multiplier"] / 7**0.5
    exact = googles([(alone, 1.0, 1)], 1e-5, PLDAccountant(RELATION, MESH))
    assert exact - 1e-3 <= trust["own_share_epsilon"] <= exact + 0.0125
    assert document["epsilon"]["at_every_site"] is None
    text = one_line(privacy_markdown(document))
    for words in (
        "private for one record against the coordinator together with the sites that section 6 allows for",
        "A record with data at several sites is not covered",
        "Distributed: each site adds a share of the noise",
        "A site that adds none counts as corrupt",
        "| 9 | 8 | 1 | 7 |",
        "Against everybody, by each site's own noise alone: epsilon",
        "Secure aggregation carries the guarantee",
    ):
        assert words in text
    assert "Epsilon does not count on it" not in text
    assert "adds all of its noise itself" not in text


def test_a_step_that_closed_over_fewer_sites_than_its_noise_needs_is_no_statement_of_privacy() -> None:
    study = of(**SHARED)
    with pytest.raises(
        VerificationError, match="7 of 9 sites are in the sum, but at least 8 are needed for enough noise"
    ):
        privacy_document(study, shared_statements(study, 9, 7))
    assert privacy_document(study, shared_statements(study, 9, 0, "round-abort"))["private"]


def test_own_noise_does_not_pass_for_shared_noise_in_a_statement_nor_the_other_way_round() -> None:
    study = of(**SHARED)
    statements = shared_statements(study, 9, 8)
    statements[0]["privacy"]["training"]["mechanism"] = "poisson-subsampled-gaussian"
    with pytest.raises(VerificationError, match="another mechanism"):
        privacy_document(study, statements)


def test_metrics_are_off_or_releases(half: RunDirectory) -> None:
    assert "Sites release no metrics." in said(of(privacy=PRIVATE), [])
    text = said(half.study, statements_of(half))
    assert "one validation sum per round" in text
    assert "pays for one of the two" in text


def test_before_the_first_round_nothing_is_spent() -> None:
    document = privacy_document(of(privacy=PRIVATE), [])
    assert document["epsilon"]["run"] == document["epsilon"]["at_every_site"] == 0.0
    text = privacy_markdown(document)
    assert "nothing was released, and epsilon is 0" in text
    assert headings(text) == HEADINGS


def test_a_study_without_privacy_says_so(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", of())
    document = privacy_document(directory.study, statements_of(directory))
    text = privacy_markdown(document)
    assert document["private"] is False
    assert "epsilon" not in document
    assert "There is no differential-privacy guarantee." in text
    assert "epsilon is infinite for the 4 rounds" in one_line(text)
    assert headings(text) == ["Epsilon and delta", "Trust model", "Not covered"]


def test_a_simulation_says_that_it_protects_nobody() -> None:
    for study in (of(privacy=PRIVATE), of()):
        assert "protects nobody" in privacy_markdown(privacy_document(study, [], simulated=True))
        assert "protects nobody" not in privacy_markdown(privacy_document(study, []))
    assert privacy_document(of(privacy=PRIVATE), [], simulated=True)["randomness"]["key"] == "public seed"


# --- rounds that came to nothing -------------------------------------------------------------------------


def abort(study: Study, number: int, cohort: Sequence[str], **more: Any) -> dict[str, Any]:
    return {"type": "round-abort", "study": study.digest, "round": number, "cohort": list(cohort), **more}


def test_an_aborted_round_costs_its_cohort_even_if_it_states_no_cost(half: RunDirectory) -> None:
    statements = statements_of(half)
    before = privacy_document(half.study, statements[:2])
    after = privacy_document(half.study, [*statements[:2], abort(half.study, 3, NAMES)])
    assert after["run"]["rounds_aborted"] == 1
    for site in NAMES:
        paid = before["epsilon"]["sites"].get(site, {"rounds": 0, "epsilon": 0.0})
        assert after["epsilon"]["sites"][site]["rounds"] == paid["rounds"] + 1
        assert after["epsilon"]["sites"][site]["epsilon"] > paid["epsilon"]
    assert "the 3 rounds of this run" in one_line(privacy_markdown(after))


def test_an_aborted_round_that_states_a_cost_is_checked(half: RunDirectory) -> None:
    first, second = statements_of(half)[:2]
    aborted = {**second, "type": "round-abort", "reason": "TooFewSitesError: one"}
    assert privacy_document(half.study, [first, aborted])["run"]["rounds_aborted"] == 1
    aborted["privacy"]["epsilon"] = {site: cost / 2 for site, cost in aborted["privacy"]["epsilon"].items()}
    with pytest.raises(VerificationError, match=r"round 2: site alder spent epsilon .* but the statement says"):
        privacy_document(half.study, [first, aborted])


def test_an_aborted_round_nobody_was_asked_into_costs_nothing(half: RunDirectory) -> None:
    statements = statements_of(half)
    nobody = {"type": "round-abort", "study": half.study.digest, "round": 4}
    assert rounds_by_site([*statements, nobody]) == rounds_by_site(statements)


# --- what is found ---------------------------------------------------------------------------------------


def set_privacy(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        inner = statement["privacy"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value

    return change


def scale_costs(factor: float) -> Callable[[dict[str, Any]], None]:
    return set_privacy("epsilon", value=lambda costs: {site: cost * factor for site, cost in costs.items()})


def without_a_site(statement: dict[str, Any]) -> None:
    statement["privacy"]["epsilon"].popitem()


def with_a_stranger(statement: dict[str, Any]) -> None:
    statement["privacy"]["epsilon"]["stranger"] = 0.1


def one_fewer_asked(statement: dict[str, Any]) -> None:
    statement["cohort"].pop()


def without_privacy(statement: dict[str, Any]) -> None:
    statement["privacy"] = None


def without_the_key(statement: dict[str, Any]) -> None:
    del statement["privacy"]


def of_another_study(statement: dict[str, Any]) -> None:
    statement["study"] = digest(b"another")


TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "epsilon a little lower": scale_costs(1 - 1e-4),
    "epsilon a little higher": scale_costs(1 + 1e-4),
    "epsilon as text": set_privacy("epsilon", value=lambda costs: dict.fromkeys(costs, "0.1")),
    "epsilon no number": set_privacy("epsilon", value=lambda costs: dict.fromkeys(costs, math.nan)),
    "no epsilon": set_privacy("epsilon", value=None),
    "a site left out": without_a_site,
    "a site too many": with_a_stranger,
    "a cohort too small": one_fewer_asked,
    "more noise": set_privacy("training", "noise_multiplier", value=lambda z: z * 1.01),
    "less noise": set_privacy("training", "noise_multiplier", value=lambda z: z * 0.99),
    "noise as text": set_privacy("training", "noise_multiplier", value=str),
    "a lower rate": set_privacy("training", "sampling_rate", value=0.5),
    "fewer steps": set_privacy("training", "steps", value=1),
    "another unit": set_privacy("training", "unit", value="patient"),
    "another neighbour": set_privacy("training", "neighbouring", value="replace-one-unit"),
    "a later version": set_privacy("training", "version", value=2),
    "no training": set_privacy("training", value=None),
    "no validation": set_privacy("validation", value=None),
    "quieter validation": set_privacy("validation", "noise_multiplier", value=lambda z: z * 1.01),
    "a larger delta": set_privacy("delta", value=1e-4),
    "a larger target": set_privacy("target", value=4.0),
    "another accountant": set_privacy("accountant", value="gdp"),
    "the run's unit": set_privacy("unit", value="patient"),
    "no privacy": without_privacy,
    "no privacy key": without_the_key,
    "another study": of_another_study,
}


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_statement_is_found(
    half: RunDirectory, tamper: Callable[[dict[str, Any]], None], number: int
) -> None:
    statements = statements_of(half)
    tamper(statements[number - 1])
    with pytest.raises(VerificationError, match=f"round {number}:"):
        privacy_document(half.study, statements)


def test_a_round_left_out_is_found(half: RunDirectory) -> None:
    statements = statements_of(half)
    with pytest.raises(VerificationError):
        privacy_document(half.study, statements[1:])


def test_more_rounds_than_promised_are_found(half: RunDirectory) -> None:
    # A coordinator that goes on after the study's four rounds, and honestly says what that cost.
    study, last = half.study, statements_of(half)[-1]
    silent = [abort(study, number, ["alder"]) for number in (1, 2, 3, 4, 5)]
    cost = privacy_document(study, silent)["epsilon"]["sites"]["alder"]["epsilon"]
    fifth = {**last, "round": 5, "cohort": ["alder"], "privacy": {**last["privacy"], "epsilon": {"alder": cost}}}
    with pytest.raises(
        VerificationError, match=r"round 5: site alder spent epsilon .*, but the study allows at most 3"
    ):
        privacy_document(study, [*silent[:4], fifth])


def test_a_cost_in_a_study_without_privacy_is_found(half: RunDirectory) -> None:
    study = of(cohort={"fraction": 0.5}, data={"validation_fraction": 0.1})
    claims = [{**statement, "study": study.digest} for statement in statements_of(half)]
    with pytest.raises(VerificationError, match="privacy cost, but the study is not private"):
        privacy_document(study, claims)


# --- what no study can ask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value", "rule"),
    [
        ("privacy", "noise_multiplier", 0.01, "privacy.noise_multiplier: unknown key"),
        ("privacy", "accountant", "gdp", "privacy.accountant: unknown key"),
        ("privacy", "sampling", "shuffle", "privacy.sampling: unknown key"),
        ("training", "batch_size", 32, "training.batch_size: unknown key"),
        ("privacy", "neighbouring", "replace-one-unit", "privacy.neighbouring: unknown key"),
        ("privacy", "epsilon", 0.0, "privacy.epsilon"),
        ("privacy", "epsilon", math.inf, "privacy.epsilon"),
        ("privacy", "delta", 0.0, "privacy.delta"),
        ("privacy", "delta", 0.5, "privacy.delta"),
        ("privacy", "clip_norm", 0.0, "privacy.clip_norm"),
        ("privacy", "mode", "none", "mode none takes no epsilon, delta, clip_norm"),
        ("privacy", "mode", "central", "privacy.mode"),
        ("privacy", "unit", "patient", "privacy.unit: patient needs data.unit"),
        ("training", "sampling_rate", 0.0, "training.sampling_rate"),
    ],
)
def test_a_study_that_would_weaken_its_promise_is_refused_with_the_rule_named(
    section: str, key: str, value: Any, rule: str
) -> None:
    training = {"sampling_rate": 1.0}
    sections: dict[str, dict[str, Any]] = {"privacy": dict(PRIVATE), "training": training}
    sections[section][key] = value
    with pytest.raises(StudyError, match=re.escape(rule)):
        study_of(**sections)


def test_a_promise_that_noise_cannot_keep_is_refused_before_anything_runs() -> None:
    with pytest.raises(StudyError, match=r"privacy.epsilon: 0.001 at delta 1e-05 cannot be reached"):
        privacy_document(of(privacy={**PRIVATE, "epsilon": 0.001}), [])


# --- the command -----------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    """Run the command as `privet.common.cli` would build it."""
    app = typer.Typer(rich_markup_mode=None)
    app.callback()(lambda: None)
    app.command(name="privacy")(privacy)
    return CliRunner().invoke(app, ["privacy", *map(str, arguments)])


def failure(*arguments: object) -> PrivetError:
    error = command(*arguments).exception
    assert isinstance(error, PrivetError)
    return error


@pytest.fixture
def finished(half: RunDirectory, tmp_path: Path) -> Path:
    """A copy of the run's directory, to be changed."""
    path = tmp_path / "run"
    directory = RunDirectory.create(path, half.study, start_adapter(), PEFT_CONFIG)
    directory.commit(half.load())
    directory.publish(half.load(), every=True)
    return path


def test_the_command_writes_both_files_and_prints_the_text(half: RunDirectory, finished: Path) -> None:
    done = command(finished)
    assert done.exit_code == 0, done.output
    document = privacy_document(half.study, statements_of(half))
    text = (finished / "privacy_statement.md").read_text(encoding="utf-8")
    assert done.output == text == privacy_markdown(document)
    written = (finished / "privacy_statement.json").read_bytes()
    assert written == canonical_json(document) + b"\n"
    printed = command(finished, "--json")
    assert canonical_json(json.loads(printed.output)) + b"\n" == written
    assert len(printed.output.splitlines()) == 1


def test_the_command_says_the_same_every_time(finished: Path) -> None:
    assert command(finished).output == command(finished).output


@pytest.mark.parametrize("number", [1, 2])
def test_a_changed_or_missing_published_statement_is_found(finished: Path, number: int) -> None:
    file = finished / "rounds" / f"{number:04d}.json"
    document = json.loads(file.read_bytes())
    document["privacy"]["epsilon"] = dict.fromkeys(document["privacy"]["epsilon"], 0.01)
    file.write_bytes(canonical_json(document) + b"\n")
    assert isinstance(failure(finished), VerificationError)
    assert failure(finished).exit_code == 5
    assert f"{number:04d}.json" in failure(finished).message
    file.unlink()
    assert isinstance(failure(finished), VerificationError)
    assert not (finished / "privacy_statement.json").exists()


def test_a_false_number_in_the_state_itself_is_found(half: RunDirectory, finished: Path) -> None:
    statements = statements_of(half)
    scale_costs(0.5)(statements[2])
    directory = RunDirectory.open(finished)
    directory.commit(replace(directory.load(), statements=tuple(statements)))
    directory.publish(directory.load(), every=True)
    assert "round 3: site alder spent epsilon" in failure(finished).message
    assert not (finished / "privacy_statement.md").exists()


def test_the_command_knows_a_simulation_and_refuses_what_is_no_run(finished: Path, tmp_path: Path) -> None:
    assert "protects nobody" not in command(finished).output
    (finished / "study.toml").write_text("")
    assert "protects nobody" in command(finished).output
    assert isinstance(failure(tmp_path / "nowhere"), StateError)


def test_the_help_says_what_the_command_does() -> None:
    text = one_line(command("--help").output)
    for words in ("the run need not be finished", "does not cover", "privacy_statement.json", "exit code 5"):
        assert words in text


def test_numbers_agree_up_to_what_another_order_of_additions_makes_of_them() -> None:
    stated = {"epsilon": {"run": 7.997496708441556, "sites": [1, None, "x"]}, "simulated": True}
    rounded = {"epsilon": {"run": 7.997496708441558, "sites": [1, None, "x"]}, "simulated": True}
    assert _agree(stated, rounded)
    for path, value in (("run", 7.9975), ("run", 8), ("sites", [1, None]), ("sites", [True, None, "x"])):
        assert not _agree(stated, {**stated, "epsilon": {**rounded["epsilon"], path: value}})  # type: ignore[dict-item]
    assert not _agree(stated, {**rounded, "simulated": 1})
    assert not _agree(3, 3.0000000001)  # a count that was computed as an integer is one
    assert not _agree(3, 3.0)
    assert _agree(8.0, 8)  # as JSON writes it
    assert not any(_agree(8.0, other) for other in (float("nan"), float("inf"), True, "8", None))
    assert not _agree(stated, {"epsilon": rounded["epsilon"]})
