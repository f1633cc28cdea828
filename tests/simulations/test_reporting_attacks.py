"""The attacks in a report: each figure is there, beside its baseline, and a result that is broken is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from privet.common.errors import StateError
from privet.simulations.attacks.labels import BASELINE, label
from privet.simulations.reporting.attacks import attacks_section
from privet.simulations.reporting.gather import ATTACK_KINDS

RATES = [{"at": 0.001, "tpr": 0.004, "resolved": False}, {"at": 0.01, "tpr": 0.053, "resolved": True}]
SCORE = {"auc": 0.612, "interval": [0.512, 0.699], "rates": RATES}
FOUND: dict[str, Any] = {
    "canaries": {
        "canaries": 1000,
        "included": 497,
        "arms": [
            {
                "arm": BASELINE,
                "claimed_epsilon": None,
                "holds": None,
                "audit": {"epsilon": 3.337, "guesses": 100, "right": 99},
            },
            {
                "arm": "epsilon 2",
                "claimed_epsilon": 2.0,
                "holds": True,
                "audit": {"epsilon": 0.5, "guesses": 50, "right": 31},
            },
            {
                "arm": "epsilon 1",
                "claimed_epsilon": 1.0,
                "holds": False,
                "audit": {"epsilon": 1.25, "guesses": 60, "right": 55},
            },
        ],
    },
    "membership": {
        "scored": 1234,
        "shadows": 6,
        "arms": [
            {"arm": BASELINE, "target": "game", "loss": SCORE, "lira": {**SCORE, "auc": 0.912}, "blind": SCORE},
            {"arm": "epsilon 8", "target": "released", "loss": SCORE, "lira": SCORE, "blind": {**SCORE, "auc": 0.503}},
        ],
    },
    "reconstruction": {
        "rank": 64,
        "arms": [
            {
                "arm": "one site, no protection",
                "recovered": 0.987,
                "interval": [0.95, 0.999],
                "records": 5,
                "records_exact": 4,
                "control": 0.021,
            }
        ],
    },
    "poisoning": {
        "malicious": 1,
        "sites": 30,
        "trigger": "quartz lantern",
        "target": "skin",
        "arms": [
            {
                "attack": "none",
                "defence": "none",
                "accuracy": 0.81,
                "success": 0.02,
                "rounds_aborted": 0,
                "groups_left_out": 0,
            },
            {
                "attack": "backdoor",
                "defence": "max norm",
                "accuracy": 0.79,
                "success": 0.934,
                "rounds_aborted": 3,
                "groups_left_out": 7,
            },
        ],
    },
}


def test_no_attack_is_said_and_the_command_is_named() -> None:
    assert "No attack was tried on this run" in attacks_section({})
    assert "privet attack --help" in attacks_section({})


def test_every_kind_of_attack_has_a_section() -> None:
    assert set(FOUND) == set(ATTACK_KINDS)
    page = attacks_section(FOUND)
    assert page.count("<h3>") == len(FOUND)
    assert "baseline without protection" in page
    assert page.count("<table>") == len(FOUND)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("canaries", ["99 of 100", "3.34", "31 of 50", "497", "consistent", "REFUTED", "run with privacy, epsilon 2"]),
        (
            "membership",
            ["0.612", "0.912", "0.512 to 0.699", "0.4 % *", "5.3 %", "1234", "6 shadow", "released adapter"],
        ),
        ("reconstruction", ["98.7 %", "95.0 to 99.9 %", "4 of 5", "2.1 %", "rank 64", "one site, no protection"]),
        ("poisoning", ["no attack, no defence", "backdoor, max norm", "93.4 %", "1 of 30", "quartz lantern", "skin"]),
    ],
)
def test_a_section_shows_the_figures_of_its_result(attack: str, words: list[str]) -> None:
    page = attacks_section({attack: FOUND[attack]})
    assert [word for word in words if word not in page] == []


def test_a_refuted_promise_is_shown_in_the_row_of_that_promise_alone() -> None:
    page = attacks_section({"canaries": FOUND["canaries"]})
    bare, kept, broken = page.split("<tbody>")[1].split("</tr>")[:3]
    assert "REFUTED" in broken
    assert "REFUTED" not in bare + kept
    assert "consistent" in kept
    assert "baseline without protection" in bare
    assert "consistent" not in bare  # nothing was promised


def test_only_rates_from_too_few_records_have_a_star() -> None:
    page = attacks_section({"membership": FOUND["membership"]})
    assert "5.3 % *" not in page
    assert page.count("0.4 % *") == 6


@pytest.mark.parametrize("attack", ATTACK_KINDS)
@pytest.mark.parametrize("broken", ["no arms", "arms are a number", "an arm lacks a field", "an arm is text"])
def test_a_result_that_no_attack_writes_is_refused_with_the_command_to_repeat(attack: str, broken: str) -> None:
    found = copy.deepcopy(FOUND[attack])
    if broken == "no arms":
        del found["arms"]
    elif broken == "arms are a number":
        found["arms"] = 5
    elif broken == "an arm lacks a field":
        found["arms"][0].popitem()
    else:
        found["arms"][0] = "x"
    with pytest.raises(StateError, match=attack) as caught:
        attacks_section({attack: found})
    assert f"privet attack {attack}" in caught.value.hint


def test_an_attack_of_another_name_is_refused() -> None:
    with pytest.raises(StateError, match="bribery"):
        attacks_section({"bribery": {}})


def test_names_in_a_result_are_text_and_never_markup() -> None:
    found = copy.deepcopy(FOUND["poisoning"])
    found["trigger"] = "<script>alert(1)</script>"
    found["arms"][0]["attack"] = "<img src=x>"
    page = attacks_section({"poisoning": found})
    assert "<script>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_the_baseline_is_named_as_one_and_another_run_by_its_privacy() -> None:
    assert label(BASELINE) == "baseline without protection"
    assert label("epsilon 8") == "run with privacy, epsilon 8"
