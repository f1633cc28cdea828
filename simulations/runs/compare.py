"""Compare ways to train: each site alone, all data pooled, or federated with each aggregation method.

`compare_runs` puts finished runs side by side. `ask` runs one study file with each aggregation method; the run with the
study's own method also has the baselines, each site alone and all data pooled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.common.canonical import canonical_json, digest
from privet.common.errors import StateError, StudyError
from privet.common.files import write_durably
from privet.common.study.reading import read_toml
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory, metrics_of, unfinished
from privet.simulations.runs.own_records import better, better_together
from privet.simulations.runs.simulate import Watcher
from privet.simulations.runs.sweep import SweepRun, claimed, entry_of, run_entry

METHODS = ("fedsvd", "ffa", "fedavg")
VALIDATION = "validation accuracy"
"""The metric of a deployed run."""
NO_UNITS = "as its study holds out no units for validation (data.validation_fraction = 0)"


@dataclass(frozen=True)
class Question:
    """A study with each aggregation method.

    Attributes:
        entries: The runs by method. The study's own method comes first; its run has the baselines.
        left_out: By method: why the study is not valid with it.
    """

    entries: Mapping[str, SweepRun]
    left_out: Mapping[str, str]


def load_question(path: Path) -> Question:
    """Read a study file, and check it with each aggregation method.

    Raises:
        StudyError: The study is not valid with its own method.
    """
    document = read_toml(path, what="study")
    root = path.resolve().parent
    own = entry_of(document, {}, root).plan.study.aggregation.method
    entries: dict[str, SweepRun] = {}
    left_out: dict[str, str] = {}
    # The study itself comes first: `answer_of` takes the baselines from the first run.
    for method in (own, *(other for other in METHODS if other != own)):
        baselines = ["local", "pooled"] if method == own else []
        try:
            fields = {"aggregation.method": method, "simulation.baselines": baselines}
            entries[method] = entry_of(document, fields, root)
        except StudyError as error:
            left_out[method] = error.message.replace("\n", " ")
    return Question(entries, left_out)


def ask(question: Question, out: Path, watch: Callable[[str], Watcher], workers: int = 1) -> dict[str, Any]:
    """Run each method that has no result yet, and return and write the comparison.

    Args:
        question: The runs.
        out: Directory of the runs: a new one, or the one of the same question. `compare.json` is written there.
        watch: Returns the watcher of a method's rounds.
        workers: Processes that train.

    Raises:
        StateError: `out` holds another question, or is in use.
        PrivetError: As `run_entry`.
    """
    out = out.resolve()
    asked = {"question": {method: entry.identity for method, entry in question.entries.items()}}
    with claimed(out, asked):
        summaries = {
            method: run_entry(entry, out, watch(method), workers) for method, entry in question.entries.items()
        }
        answer = answer_of(summaries, question.left_out)
        write_durably(out / "compare.json", (json.dumps(answer, indent=2) + "\n").encode())
    return answer


def answer_of(summaries: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return all results side by side. The first summary belongs to the study's own method and has the baselines.

    Raises:
        StateError: The run with the study's own method failed, so there are no baselines.
    """
    own = next(iter(summaries.values()))
    if "metric" not in own:
        raise StateError(
            "the comparison needs a complete run with the aggregation method of the study file, but this run failed: "
            f"{own['outcome']['reason']}",
            "change the study so that this run completes, and choose another --out",
        )
    metric = own["metric"]
    scores, intervals = own[metric], own["intervals"]
    arms = [{"arm": "nothing (before)", "value": scores["before"], "interval": intervals.get("before")}]
    arms += [
        {"arm": f"{site} alone", "value": value, "interval": intervals.get(f"local-{site}")}
        for site, value in scores["local"].items()
    ]
    arms.append({"arm": "mean of the sites alone", "value": scores["local_mean"], "interval": None})
    best = None
    for method, summary in summaries.items():
        found = summary[metric]["federated"] if "metric" in summary else None
        interval = summary["intervals"].get("federated") if "metric" in summary else None
        arms.append({"arm": f"federated, {method}", "value": found, "interval": interval, **_ended(summary)})
        if found is not None and (best is None or better(metric, found, best[1])):
            best = (method, found)
    arms.append({"arm": "all data pooled", "value": scores["pooled"], "interval": intervals.get("pooled")})
    return {
        "study": own["study"],
        "metric": metric,
        "epsilon": own["epsilon"],
        "unit": None if own["privacy"] is None else own["privacy"]["training"]["unit"],
        "records": own["federated"].get("records"),
        "arms": arms,
        "left_out": dict(left_out),
        "best_aggregation": None if best is None else best[0],
        "gain_over_mean_alone": None if best is None else best[1] - scores["local_mean"],
        "behind_pooled": None if best is None else scores["pooled"] - best[1],
        "sites_better_off": None if best is None else _better_off(metric, own, summaries[best[0]]),
    }


def _ended(summary: Mapping[str, Any]) -> dict[str, str]:
    ended = summary["outcome"]["ended"]
    return {} if ended == "completed" else {"ended": ended}


def _better_off(metric: str, own: Mapping[str, Any], best: Mapping[str, Any]) -> str | None:
    """Return how many sites the best federation serves better than training alone, each on its own test records.

    None if an earlier version wrote a summary, which lacks these results.
    """
    alone, together = own.get("own_records", {}), best.get("own_records", {})
    rows = {site: {**row, "alone": alone[site]["alone"]} for site, row in together.items() if site in alone}
    found = better_together(rows, metric)
    return None if found is None else f"{found['better']} of {found['sites']}"


def compare_runs(runs: Sequence[Path]) -> dict[str, Any]:
    """Return runs side by side: their figures, and in what their studies differ.

    Simulated runs must have ended. Deployed ones, in a coordinator's directory or copied from there, need not.

    Raises:
        StateError: One is not a run directory, has no round yet, or is a simulation without a summary.
    """
    opened = [RunDirectory.open(run) for run in runs]
    rows = [_deployed_row(each) if each.deployed else _row(each) for each in opened]
    differs, same = differing([each.study for each in opened])
    return {"rows": rows, "notes": _notes(rows), "differs": differs, "same": same}


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if len({row["deployed"] for row in rows}) > 1:
        notes.append(
            "simulations are tested on test records, deployed runs are validated at their sites: do not compare their "
            "figures"
        )
    if len({(row["metric"], row["records"]) for row in rows if not row["deployed"]}) > 1:
        notes.append("the runs have different test records or metrics: do not compare their figures")
    if len({row["base"] for row in rows}) > 1:
        notes.append("the runs have different base models")
    if missing := [Path(row["run"]).name for row in rows if row["deployed"] and row["federated"] is None]:
        notes.append(f"{', '.join(missing)}: no figure of quality, {NO_UNITS}")
    return notes


def differing(studies: Sequence[Study]) -> tuple[dict[str, list[Any]], int]:
    """Return the settings in which studies differ, each with its value in every study, and how many are the same.

    The name of a study is no setting. A setting that a study does not have is None.
    """
    found = [_settings(study.document()) for study in studies]
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [each.get(name) for each in found] for name in names}
    differs = {name: each for name, each in values.items() if any(value != each[0] for value in each)}
    return differs, len(values) - len(differs)


def _settings(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the settings of a study by dotted name. The digests of a base's files are one setting."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and name != "model.sha256":
            found |= _settings(value, f"{name}.")
        elif name != "name":
            found[name] = digest(canonical_json(value)) if name == "model.sha256" else value
    return found


def _deployed_row(run: RunDirectory) -> dict[str, Any]:
    """Return the row of a run of real sites. Its only figures of quality are the validation sums of its rounds."""
    study, state = run.study, run.load()
    if not state.statements:
        raise StateError(f"{run.path} has no round yet", unfinished(run))
    closed = [each for each in state.statements if each["type"] == "round-close"]
    measured = [each["metrics"]["validation_accuracy"] for each in state.statements if each["metrics"]]
    aborted = len(state.statements) - len(closed)
    ended = "stopped early" if state.stopped else "not ended"
    if len(closed) == study.rounds:
        ended = "completed"
    elif state.stopped and len(state.statements) >= study.rounds:
        ended = f"ended; {aborted} of {study.rounds} rounds aborted"
    return _settings_of(run) | {
        "deployed": True,
        "sites": len({site for each in state.statements for site in each["cohort"]}),
        "rounds": len(closed),
        "outcome": ended,
        "metric": VALIDATION,
        "before": measured[0] if measured else None,
        "federated": measured[-1] if measured else None,
        "epsilon": metrics_of(state.statements[-1]).get("epsilon"),
    }


def _settings_of(run: RunDirectory) -> dict[str, Any]:
    """Return what a row says of a run's study; figures that a run may lack are None."""
    study = run.study
    return {
        "run": str(run.path),
        "study": study.name,
        "base": study.model.base,
        "aggregation": f"{study.aggregation.method}, {study.aggregation.optimizer}",
        "secure_aggregation": study.secure_aggregation.mode,
        "planned": study.rounds,
        "records": None,
        "local_mean": None,
        "interval": None,
        "pooled": None,
        "unit": study.privacy.unit if study.private else None,
        "virtual_seconds": None,
    }


def _row(run: RunDirectory) -> dict[str, Any]:
    file = run.path / "summary.json"
    if not file.is_file():
        raise StateError(f"{run.path} has no summary.json: the run is not finished", unfinished(run))
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    metric = summary["metric"]
    scores = summary[metric]
    scenario = summary.get("scenario", {})
    virtual = scenario.get("virtual")
    return _settings_of(run) | {
        "deployed": False,
        "sites": scenario.get("sites", len(summary["federated_per_site"])),
        "rounds": summary["rounds"],
        "outcome": summary.get("outcome", {}).get("ended", "completed"),
        "metric": metric,
        "records": summary["federated"].get("records"),
        "before": scores["before"],
        "local_mean": scores["local_mean"],
        "federated": scores["federated"],
        "interval": summary["intervals"].get("federated"),
        "pooled": scores["pooled"],
        "epsilon": summary["epsilon"],
        "virtual_seconds": None if virtual is None else virtual["seconds"],
    }
