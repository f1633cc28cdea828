"""What simulations print: tables that fit a terminal of 80 columns, and sentences that end a command."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from privet.simulations.attacks.labels import attack_sentence
from privet.simulations.runs.compare import answer_of
from privet.simulations.terminal.figures import as_text
from privet.simulations.terminal.own_records import OwnRecords
from privet.simulations.terminal.report import own_table, result_parts, result_table
from privet.simulations.terminal.sentences import (
    answer_sentence,
    check_sentence,
    path_text,
    result_sentence,
    runs_sentence,
    sweep_sentence,
)
from privet.simulations.terminal.tables import answer_table, runs_tables, short_names, sweep_table, titled

ROW = {
    "deployed": False,
    "study": "triage",
    "base": "b",
    "aggregation": "fedsvd, fedavg",
    "secure_aggregation": "masked",
    "sites": 12,
    "rounds": 100,
    "outcome": "completed",
    "metric": "accuracy",
    "local_mean": 0.454,
    "federated": 0.802,
    "interval": [0.761, 0.839],
    "pooled": 0.832,
    "epsilon": 8.0,
    "unit": "patient",
}
SUMMARY: Mapping[str, Any] = {
    "metric": "accuracy",
    "accuracy": {
        "before": 0.16,
        "federated": 0.8025,
        "local": {"a": 0.4, "b": 0.5},
        "local_mean": 0.454,
        "pooled": 0.835,
    },
}


def drawn(*tables: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table, markup=False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 140])
def test_runs_side_by_side_fit_with_short_names_and_units(width: int) -> None:
    names = ("runs/first/epsilon-8", "runs/second/epsilon-8", "elsewhere/a-name-that-is-longer-than-thirty-letters")
    rows = [{**ROW, "run": name} for name in names]
    text = drawn(*tables(rows, "the runs have different base models"), width=width)
    assert "80.2 %" in text
    assert "76.1 to 83.9 %" in text
    assert "per patient" in text
    assert "first/epsilon-8" in text.replace("\n", "")
    assert "runs/first" not in text
    rows[0] |= {"unit": "record"}
    text = drawn(*tables(rows), width=width)
    assert "8.00 per record" in text
    assert "8.00 per patient" in text


def tables(rows: Sequence[Mapping[str, Any]], *notes: str, **differs: list[Any]) -> list[Any]:
    compared = {"rows": rows, "notes": notes, "differs": differs, "same": 1}
    return [each for table in runs_tables(compared) for each in titled(table)]


@pytest.mark.parametrize("runs", [2, 4, 5])
def test_settings_that_differ_fit_80_columns(runs: int) -> None:
    rows = [{**ROW, "run": f"runs/a-long-name-of-a-run-{number}"} for number in range(runs)]
    text = drawn(*tables(rows, rounds=[*range(runs - 1), None], labels=[["cardiology", "neurology"]] * runs))
    assert "in what their studies differ; 1 setting is the same" in text
    assert ("0, 1, 2, 3, -" in text) is (runs == 5)


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["x/a/run", "x/b/run"]) == ["a/run", "b/run"]
    assert short_names(["privacy.epsilon", "lora.rank"], ".") == ["epsilon", "rank"]
    assert short_names(["run", "run"]) == ["run", "run"]
    assert short_names([]) == []


def test_a_sweep_fits_80_columns() -> None:
    fields = {"privacy.epsilon": 8.0, "aggregation.method": "fedsvd"}
    row = {"id": "0123456789ab", "fields": fields, "value": 0.8, "interval": [0.7, 0.9], "epsilon": 8.0}
    result = {
        "study": "triage", "finished": 2, "asked": 2, "fields": list(fields), "metric": "accuracy",
        "best": row["id"], "tuning": {"says": "tuned on public data: choosing among the runs costs no privacy"},
        "rows": [{**row, "outcome": "completed"}, {**row, "id": "b", "outcome": "DivergedError", "value": None}],
    }  # fmt: skip
    text = drawn(sweep_table(result))
    assert "0123456789ab" in text
    assert sweep_sentence(result).startswith("2 of 2 runs are done; the best has 80.0 % accuracy, with privacy.epsilon")
    assert sweep_sentence({**result, "best": None}).endswith("none of them has a result.")


OWN: Mapping[str, Any] = {
    "leeds": {"records": 92.0, "together": 0.68, "alone": 0.6},
    "porto": {"records": 118.0, "together": 0.66, "alone": 0.68},
}
PERSONAL: Mapping[str, Any] = {
    "per_site": {site: {"chosen": 1.0, "share": 1.0, "shared": OWN[site]["together"]} for site in OWN}
}
COMPLETED = {"ended": "completed"}
FINISHED: Mapping[str, Any] = {
    **SUMMARY,
    "intervals": {},
    "epsilon": 2.99,
    "privacy": {"target": 3.0, "training": {"unit": "patient"}},
    "federated_per_site": {site: {"records": row["records"], "accuracy": row["together"]} for site, row in OWN.items()},
    "rounds": 4,
    "seconds": 9.0,
    "peak_memory_mb": 800,
    "secure_aggregation": "masked",
}


def words(*tables: object) -> str:
    return " ".join(drawn(*tables).split())


def test_figures_on_own_records_have_a_table_of_their_own() -> None:
    summary = {**FINISHED, "own_records": OWN, "personal": PERSONAL}
    assert "own" not in words(result_table(summary))
    said = words(*result_parts(summary))
    assert "keeps the same promise as together: at most epsilon 3 per patient." in said
    assert 'mode = "none" in [privacy]' in said  # which is no markup
    assert "accuracy by site, each on its own test records" in said
    assert "1 of 2 sites do better together than alone on their own test records. Not better together: porto." in said
    assert "Own adapter (no privacy): every site 100.0 %." in said
    assert "Together: worst porto (66.0 %), best leeds (68.0 %), gap 2.0 points." in said
    assert "All 2 sites chose their own adapter" in said
    assert "without privacy" in said
    assert result_sentence(summary).endswith("1 of 2 sites do better together than alone on their own test records.")


def test_a_summary_without_sites_alone_compares_nothing() -> None:
    assert own_table(FINISHED) is None
    assert OwnRecords.of({**FINISHED, "personal": PERSONAL}).head == [
        "site",
        "test records",
        "together",
        "own adapter (no privacy)",
    ]
    lone = {**SUMMARY["accuracy"], "local_mean": None, "pooled": None}
    assert "promise" not in words(*result_parts({**FINISHED, "accuracy": {**lone, "local": {}}}))


def test_small_sites_are_neither_shown_nor_counted() -> None:
    rows = {**OWN, "small": {"records": 9.0, "together": 0.123, "alone": 0.9}}
    own = OwnRecords.of({**FINISHED, "own_records": rows})
    said = words(*result_parts({**FINISHED, "own_records": rows}))
    assert "12.3" not in said
    assert own.secret == {"small", "leeds"}
    assert own.gain == "0 of 1 site shown does better together than alone on its own test records."
    assert own.spread == []
    assert "Rows of fewer than 10 records" in said


def test_less_is_better_where_the_metric_says_so() -> None:
    rows = {
        "a": {"records": 20.0, "together": 8.0, "alone": 9.0},
        "b": {"records": 20.0, "together": 7.0, "alone": 7.0},
    }
    own = OwnRecords("perplexity", rows)
    assert own.gain.startswith("1 of 2 sites do")
    assert own.spread[0] == "Together: worst a (8.00), best b (7.00), gap 1.00."


def test_results_end_in_one_sentence() -> None:
    assert result_sentence(SUMMARY) == "Together 80.2 %, alone 45.4 % (mean of 2 sites), pooled 83.5 % accuracy."
    only = {**SUMMARY["accuracy"], "local": {}, "local_mean": None, "pooled": None}
    assert result_sentence({**SUMMARY, "accuracy": only}) == "Together 80.2 %, before training 16.0 % accuracy."
    lower = {"metric": "perplexity", "perplexity": {**SUMMARY["accuracy"], "federated": 12.3}}
    assert result_sentence(lower).endswith("perplexity, where less is better.")
    privacy = {"epsilon": 7.994, "unit": "record"}
    assert check_sentence({"rounds": 4, "privacy": privacy}) == "The study is valid: 4 rounds, epsilon 7.99 per record."
    assert "no differential privacy" in check_sentence({"rounds": 4, "privacy": None})


def test_comparisons_end_in_one_sentence() -> None:
    rows = [{**ROW, "run": "runs/a"}, {**ROW, "run": "runs/b", "federated": 0.9}]
    assert runs_sentence({"rows": rows, "notes": []}) == "Best: b with 90.0 % accuracy."
    rows[0]["federated"] = 0.9
    assert runs_sentence({"rows": rows, "notes": []}) == "Best: a, b with 90.0 % accuracy."
    noted = {"rows": rows, "notes": ["the runs have different test records or metrics: do not compare their figures"]}
    assert "cannot be ranked" in runs_sentence(noted)
    arms = [("mean of the sites alone", 0.454), ("federated, ffa", 0.8), ("all data pooled", 0.83)]
    answer = {
        "metric": "accuracy", "epsilon": 8.0, "unit": "record", "best_aggregation": "ffa", "left_out": {},
        "sites_better_off": "3 of 3", "arms": [{"arm": name, "value": value, "interval": None} for name, value in arms],
    }  # fmt: skip
    told = "Together 80.0 % (ffa), alone 45.4 %, pooled 83.0 % accuracy; 3 of 3 sites do better together than alone"
    told += ", each on its own test records."
    assert answer_sentence(answer) == told
    assert answer_sentence({**answer, "best_aggregation": None}) == "No federation completed."
    assert "per record" in drawn(answer_table(answer))


def test_attacks_end_in_one_sentence() -> None:
    auc = {"auc": 0.61}
    membership = [{"arm": "no privacy", "target": "game", "loss": auc, "lira": {"auc": 0.7}}]
    assert "0.70 on the baseline without protection" in attack_sentence({"attack": "membership", "arms": membership})
    canary = {"arm": "epsilon 2", "claimed_epsilon": 2.0, "holds": False, "audit": {"epsilon": 3.3}}
    assert "refute the promise of epsilon 2" in attack_sentence({"attack": "canaries", "arms": [canary]})
    assert "at least 3.30" in attack_sentence({"attack": "canaries", "arms": [{**canary, "holds": True}]})
    words = [{"arm": "one site", "recovered": 0.5}]
    assert attack_sentence({"attack": "reconstruction", "arms": words}) == "Words recovered: one site 50.0 %."
    arms = [{"attack": name, "accuracy": 0.8, "success": share} for name, share in (("none", 0.0), ("backdoor", 0.4))]
    assert "backdoor, succeeds on 40.0 %" in attack_sentence({"attack": "poisoning", "arms": arms})


def test_figures_say_no_more_than_they_know() -> None:
    assert as_text("accuracy", None) == "-"
    assert [as_text("perplexity", value) for value in (12.345, 83000.0, 5e7, float("inf"), float("nan"))] == [
        "12.35", "83,000", "over 1,000,000", "over 1,000,000", "not a number",
    ]  # fmt: skip
    assert path_text(Path("my runs/a")) == "'my runs/a'"


def test_a_comparison_counts_sites_on_their_own_records() -> None:
    # On the records of all sites both do better together; on their own records, only leeds does.
    scores = {"before": 0.2, "federated": 0.8, "local": {"leeds": 0.4, "porto": 0.4}, "local_mean": 0.4, "pooled": 0.9}
    run = {**FINISHED, "study": "s", "accuracy": scores, "federated": {}, "own_records": OWN, "outcome": COMPLETED}
    assert answer_of({"ffa": run}, {})["sites_better_off"] == "1 of 2"
    # Another method's federation is held against the baselines of the first run.
    alone = {site: {**row, "alone": None, "together": 0.7} for site, row in OWN.items()}
    other = {**run, "accuracy": {**scores, "federated": 0.85}, "own_records": alone}
    assert answer_of({"ffa": run, "fedsvd": other}, {})["sites_better_off"] == "2 of 2"
    old = {key: value for key, value in run.items() if key != "own_records"}
    answer = answer_of({"ffa": old}, {})
    assert answer["sites_better_off"] is None
    assert answer_sentence(answer).endswith("pooled 90.0 % accuracy.")
    assert "do better" not in drawn(answer_table(answer))
