"""Output of scenarios, sweeps and comparisons for people: lines, tables, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from privet.simulations.runs.sweep import field_values, named
from privet.simulations.terminal.figures import as_text

_SIDE_BY_SIDE = 4
"""Most runs that have a column each."""
_GREEN = "#0b6e4f"
_MISSING = {"dropped": "sites dropped out", "late": "answers after the deadline"}


def titled(part: Any) -> list[Any]:
    """Return what to print for a part of a result: of a table, first its title, on lines as wide as the terminal.

    A table folds its title to its own width, which may be that of two short columns.
    """
    if not isinstance(part, Table) or part.title is None:
        return [part]
    title, part.title = part.title, None
    return [Text(str(title), style="italic"), part]


def scenario_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines about the scenario of a run: how it ended, its time and traffic, and its malicious sites."""
    outcome, scenario = summary["outcome"], summary["scenario"]
    lines = []
    if outcome["ended"] != "completed":
        lines.append(f"the federation ended early, after {summary['rounds']} rounds: {outcome['reason']}")
    if outcome["aborted_rounds"]:
        lines.append(f"{outcome['aborted_rounds']} rounds were aborted")
    if (virtual := scenario.get("virtual")) is not None:
        sizes = f"{virtual['bytes_down'] / 1e6:.1f} MB down, {virtual['bytes_up'] / 1e6:.1f} MB up"
        lines.append(
            f"on the networks of the scenario: {virtual['seconds']:.0f} s on the virtual clock; "
            f"{sizes}, all sites together"
        )
        lines += [
            f"{text}: " + ", ".join(f"{n} at {s}" for s, n in virtual[kind].items())
            for kind, text in _MISSING.items()
            if virtual[kind]
        ]
    lines += [f"malicious site {site}: {attack}" for site, attack in scenario["malicious"].items()]
    lines += [
        f"backdoor: with the trigger, the model labels {100 * found['success']:.0f} % of {found['records']} records as "
        f"{found['target']}; without the trigger, {100 * found['without_trigger']:.0f} %"
        for found in summary.get("backdoors", ())
        if found["records"]
    ]
    return lines


def sweep_line(row: Mapping[str, Any]) -> str:
    """Return one line about a run of a sweep: its settings, how it ended, and its result."""
    value = as_text(row["metric"], row["value"]) if "metric" in row else "no result"
    return f"{named(row['fields'])}: {row['outcome']}, {value}"


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Return the runs of a sweep, one per row, in the order of the sweep file. Fields have their shortest names."""
    metric = result["metric"] or "result"
    title = f"{result['study']}: {result['finished']} of {result['asked']} runs"
    table = Table(title=title, title_justify="left", caption=result["tuning"]["says"], caption_justify="left")
    for name in short_names(result["fields"], "."):
        table.add_column(name, justify="right")
    for name in (metric, "95 % interval", "epsilon spent"):
        table.add_column(name, justify="right")
    table.add_column("run", overflow="fold")
    for row in result["rows"]:
        cells = [_cell(row["fields"][name]) for name in result["fields"]]
        cells += [as_text(metric, row["value"]), _interval(row["interval"]), _epsilon(row["epsilon"])]
        ended = "" if row["outcome"] == "completed" else f" ({row['outcome']})"
        style = "bold green" if row["id"] == result["best"] else None
        table.add_row(*cells, escape(row["id"] + ended), style=style)
    return table


def short_names(names: Sequence[str], parting: str = "/") -> list[str]:
    """Return for each name its last parts: as few as tell all names apart."""
    parts = [name.split(parting) for name in names]
    for kept in range(1, max(map(len, parts), default=1) + 1):
        found = [parting.join(each[-kept:]) for each in parts]
        if len(set(found)) == len(set(names)):
            return found
    return list(names)


def answer_table(answer: Mapping[str, Any]) -> Table:
    """Return the comparison of a study's aggregation methods with each site alone and all data pooled."""
    metric = answer["metric"]
    promise = (
        "without differential privacy"
        if answer["epsilon"] is None
        else f"epsilon {answer['epsilon']:.2f} per {answer['unit']}"
    )
    table = Table(title=f"{metric} on the test records of all sites, {promise}", title_justify="left")
    table.add_column("trained on")
    table.add_column(metric, justify="right")
    table.add_column("95 % interval", justify="right")
    for arm in answer["arms"]:
        federated = arm["arm"].startswith("federated")
        name = f"{arm['arm']} ({arm['ended']})" if "ended" in arm else arm["arm"]
        style = "bold green" if federated else None
        table.add_row(escape(name), as_text(metric, arm["value"]), _interval(arm["interval"]), style=style)
    lines = [f"federated, {method}, was not run: {why}" for method, why in answer["left_out"].items()]
    if answer["sites_better_off"] is not None:
        lines.append(
            f"{answer['sites_better_off']} sites do better with {answer['best_aggregation']} than alone, each on its "
            "own test records"
        )
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table


def runs_tables(compared: Mapping[str, Any]) -> list[Table]:
    """Return runs side by side: their figures, how they were trained, in what their studies differ. All fit 80 columns.

    Simulated and deployed runs have figures of different kinds, so each kind has a table of its own.
    """
    rows = compared["rows"]
    names = short_names([row["run"].rstrip("/") for row in rows])
    named_rows = list(zip(names, rows, strict=True))
    units = {row["unit"] for row in rows if row["unit"] is not None}
    unit = f"\nper {units.pop()}" if len(units) == 1 else ""
    simulated = [each for each in named_rows if not each[1]["deployed"]]
    deployed = [each for each in named_rows if each[1]["deployed"]]
    results = [_tested(simulated, unit)] if simulated else []
    results += [_validated(deployed, unit)] if deployed else []
    results[-1].caption, results[-1].caption_justify = "\n".join(compared["notes"]), "left"
    settings = Table(title="how they were trained", title_justify="left")
    settings.add_column("run", overflow="fold")
    settings.add_column("study", overflow="fold")
    settings.add_column("aggregation")
    settings.add_column("sites", justify="right")
    settings.add_column("rounds", justify="right")
    for name, row in named_rows:
        way = f"{row['aggregation']}, {row['secure_aggregation']}"
        settings.add_row(escape(name), escape(row["study"]), way, str(row["sites"]), str(row["rounds"]))
    return [*results, settings, *_differences(compared, names)]


def _tested(rows: Sequence[tuple[str, Mapping[str, Any]]], unit: str) -> Table:
    """Return the results of simulated runs, which are tested on records."""
    metrics = {row["metric"] for _, row in rows}
    metric = metrics.pop() if len(metrics) == 1 else "result"
    results = Table(title=f"{metric} on the test records of all sites", title_justify="left")
    results.add_column("run", overflow="fold")
    for name in (f"epsilon{unit}", "alone\n(mean)", "together", "95 % interval", "pooled"):
        results.add_column(name, justify="right", no_wrap=True)
    for name, row in rows:
        results.add_row(
            _run_cell(name, row),
            _spent(row, unit),
            as_text(row["metric"], row["local_mean"]),
            as_text(row["metric"], row["federated"]),
            _interval(row["interval"]),
            as_text(row["metric"], row["pooled"]),
        )
    return results


def _validated(rows: Sequence[tuple[str, Mapping[str, Any]]], unit: str) -> Table:
    """Return the results of deployed runs, whose coordinator has no records to test on."""
    results = Table(
        title="validation accuracy that the sites measured together, on the units that they hold out",
        title_justify="left",
    )
    results.add_column("run", overflow="fold")
    for name in (f"epsilon{unit}\n(at most)", "rounds", "before the\nfirst round", "before the\nlast round"):
        results.add_column(name, justify="right", no_wrap=True)
    for name, row in rows:
        results.add_row(
            _run_cell(name, row),
            _spent(row, unit),
            f"{row['rounds']} of {row['planned']}",
            as_text(row["metric"], row["before"]),
            as_text(row["metric"], row["federated"]),
        )
    return results


def _differences(compared: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """Return the table of the settings that differ; none for one run, or where all settings are the same."""
    differs = compared["differs"]
    if not differs:
        return []
    many = "setting is" if compared["same"] == 1 else "settings are"
    title = f"in what their studies differ; {compared['same']} {many} the same"
    table = Table(title=title, title_justify="left")
    table.add_column("setting", overflow="fold")
    for name in names if len(names) <= _SIDE_BY_SIDE else ("values",):
        table.add_column(escape(name), overflow="fold")
    for name, values in differs.items():
        cells = ["-" if value is None else escape(_cell(value)) for value in values]
        table.add_row(name, *(cells if len(names) <= _SIDE_BY_SIDE else [", ".join(dict.fromkeys(cells))]))
    return [table]


def _run_cell(name: str, row: Mapping[str, Any]) -> str:
    return escape(name if row["outcome"] == "completed" else f"{name} ({row['outcome']})")


def _spent(row: Mapping[str, Any], unit: str) -> str:
    own = "" if unit or row["unit"] is None else f" per {row['unit']}"
    return _epsilon(row["epsilon"]) + own


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _epsilon(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def save_sweep_figure(result: Mapping[str, Any], path: Path) -> Path | None:
    """Save a figure with one panel for each field: the result of every run, and the mean result of each value.

    Returns:
        The path; None if matplotlib is not installed, or if no field has results at two values or more.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    panels = [(name, field_values(result["rows"], name)) for name in result["fields"]]
    panels = [(name, values) for name, values in panels if len(values) > 1]
    if not panels:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = 1.0 if result["metric"] == "perplexity" else 100.0
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, sharey=True)
    for axis, (name, values) in zip(axes[0], panels, strict=True):
        _draw_panel(axis, name, values, scale)
    axes[0][0].set(ylabel=result["metric"] + (" [%]" if scale > 1 else ""))
    bottom = axes[0][0].get_ylim()[0]
    if bottom > 0:
        axes[0][0].set(ylabel=f"{axes[0][0].get_ylabel()}, from {bottom:.3g}")  # the axis does not begin at 0
    figure.suptitle(f"{result['study']}, {result['tuning']['data']} data: each run, and the mean by value", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def _draw_panel(axis: Any, name: str, values: Sequence[tuple[Any, list[float]]], scale: float) -> None:
    """Draw the results of one field. Positive numbers that span a factor of ten get a logarithmic axis."""
    keys = [value for value, _ in values]
    numbers = _are_numbers(keys)
    places = keys if numbers else list(range(len(keys)))
    for place, (_, scores) in zip(places, values, strict=True):
        axis.plot([place] * len(scores), [scale * score for score in scores], "o", color=_GREEN, alpha=0.45)
    means = [scale * sum(scores) / len(scores) for _, scores in values]
    axis.plot(places, means, "-" if numbers else "_", color=_GREEN, markersize=18)
    if not numbers:
        axis.set_xticks(places, [str(key) for key in keys])
    elif min(keys) > 0 and max(keys) >= 10 * min(keys):
        axis.set_xscale("log")
    axis.set(xlabel=name)
    axis.spines[["top", "right"]].set_visible(False)


def _are_numbers(values: Sequence[Any]) -> bool:
    # Python counts True as an integer; on an axis it is a name.
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
