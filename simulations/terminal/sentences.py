"""The sentences that end a command: its result in figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from privet.simulations.terminal.figures import as_text
from privet.simulations.terminal.own_records import OwnRecords


def arm_name(arm: str) -> str:
    """Return the name of an arm for people: `together`, `NAME alone` or `all data pooled`."""
    if arm.startswith("local-"):
        return f"{arm.removeprefix('local-')} alone"
    return {"federated": "together", "pooled": "all data pooled"}.get(arm, arm)


def result_sentence(summary: Mapping[str, Any]) -> str:
    """Return the result of a run: the federation, beside the sites alone and all data pooled where they were trained.

    For example `Together 80.2 %, alone 45.4 % (mean of 4 sites), pooled 83.5 % accuracy.`
    """
    if "counts" in summary:
        return counted_sentence(summary["counts"])
    primary = summary["metric"]
    scores = summary[primary]
    parts = [f"Together {as_text(primary, scores['federated'])}"]
    if scores.get("local_mean") is not None:
        parts.append(f"alone {as_text(primary, scores['local_mean'])} (mean of {_sites(len(scores['local']))})")
    if scores.get("pooled") is not None:
        parts.append(f"pooled {as_text(primary, scores['pooled'])}")
    if len(parts) == 1:
        parts.append(f"before training {as_text(primary, scores['before'])}")
    lower = ", where less is better" if primary == "perplexity" else ""
    gain = OwnRecords.of(summary).gain
    return f"{', '.join(parts)} {primary}{lower}.{f' {gain}' if gain else ''}"


def counted_sentence(document: Mapping[str, Any]) -> str:
    """Return the result of a study that counts: its units, with their interval."""
    if not document["cells"]:
        return "No round was closed, so nothing was counted."
    units = document["cells"][0]
    what = "counted" if document["kind"] == "statistics" else "measured the adapter on"
    return (
        f"{_sites(document['sites'])} together {what} {units['value']:,.0f} {units['title']} ({units['low']:,.0f} to "
        f"{units['high']:,.0f}); nothing was trained."
    )


def _sites(number: int) -> str:
    return f"{number} site{'s'[: number != 1]}"


def check_sentence(meaning: Mapping[str, Any]) -> str:
    """Return what a checked study costs."""
    privacy = meaning["privacy"]
    cost = "no differential privacy" if privacy is None else f"epsilon {privacy['epsilon']:.2f} per {privacy['unit']}"
    return f"The study is valid: {meaning['rounds']} rounds, {cost}."


def sweep_sentence(result: Mapping[str, Any]) -> str:
    """Return the best run of a sweep."""
    done = f"{result['finished']} of {result['asked']} runs are done"
    best = next((row for row in result["rows"] if row["id"] == result["best"]), None)
    if best is None:
        return f"{done}; none of them has a result."
    settings = ", ".join(f"{name} = {value}" for name, value in best["fields"].items())
    return f"{done}; the best has {as_text(result['metric'], best['value'])} {result['metric']}, with {settings}."


def answer_sentence(answer: Mapping[str, Any]) -> str:
    """Return the answer to a consortium's first question: is it better to train together?"""
    method, metric = answer["best_aggregation"], answer["metric"]
    if method is None:
        return "No federation completed."
    values = {arm["arm"]: arm["value"] for arm in answer["arms"]}
    sites = answer["sites_better_off"]
    by_site = "" if sites is None else f"; {sites} sites do better together than alone, each on its own test records"
    return (
        f"Together {as_text(metric, values[f'federated, {method}'])} ({method}), "
        f"alone {as_text(metric, values['mean of the sites alone'])}, "
        f"pooled {as_text(metric, values['all data pooled'])} {metric}{by_site}."
    )


def runs_sentence(compared: Mapping[str, Any]) -> str:
    """Return the best of several runs, unless their figures cannot be compared."""
    rows = compared["rows"]
    if len({row["deployed"] for row in rows}) > 1:
        return "These runs cannot be ranked: some are simulations, and some were run by real sites."
    if any("different test records" in note for note in compared["notes"]):
        return "These runs cannot be ranked: they have different test records or metrics."
    metric = rows[0]["metric"]
    found = [row for row in rows if row["federated"] is not None]
    values = [row["federated"] for row in found]
    if not values:
        return "These runs cannot be ranked: none has a figure of quality."
    best = min(values) if metric == "perplexity" else max(values)
    names = [Path(row["run"]).name for row in found if row["federated"] == best]
    if rows[0]["deployed"]:
        lead = f"Highest {metric} before the last round: {', '.join(names)} with {as_text(metric, best)}."
        return f"{lead} The figures of private studies carry noise, and each run holds out its own units."
    return f"Best: {', '.join(names)} with {as_text(metric, best)} {metric}."


def path_text(path: Path) -> str:
    """Return a path as a word of a command line."""
    return quote(str(path))
