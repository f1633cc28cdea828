"""Output of a simulation for people: live progress, tables, and a figure of the curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from privet.client.training.features import length_lines
from privet.common.audit.counts import count_rows
from privet.common.masking.isolation import cohort_size
from privet.common.progress import Stages
from privet.simulations.engines.evaluation import PRIMARY
from privet.simulations.runs.simulate import FEDERATED, RoundReport, Simulated
from privet.simulations.terminal import continued
from privet.simulations.terminal.figures import as_text
from privet.simulations.terminal.own_records import OwnRecords, promise_of_baselines
from privet.simulations.terminal.sentences import arm_name

_EXTREME = 5.0
"""Where a perplexity is this multiple of the result, the axis of the figure is logarithmic."""


class Screen:
    """Progress of a simulation: one bar over the training of all arms, and a line for each federated round."""

    def __init__(self, stages: Stages, simulated: Simulated) -> None:
        plan, sites = simulated.plan, len(simulated.sites)
        self._stages = stages
        self._primary = PRIMARY[plan.study.task.kind]
        self._federated = cohort_size(plan.study, sites)
        arms = self._federated
        arms += sites if "local" in plan.simulation.baselines else 0
        arms += 1 if "pooled" in plan.simulation.baselines else 0
        self._total = arms * plan.study.rounds
        self._rounds: dict[str, int] = {}
        self._skipped = 0

    def watch(self, report: RoundReport) -> None:
        """Show that a round has closed. The work of a round is the number of sites that train in it."""
        weight = self._federated if report.arm == FEDERATED else 1
        if report.arm not in self._rounds:  # A resumed arm begins at a later round: what lies before took no time.
            self._skipped += weight * (report.round - 1)
        self._rounds[report.arm] = weight * report.round
        if report.arm == FEDERATED:
            self._stages.line(round_line(report, self._primary))
        elif report.round == report.rounds:
            self._stages.line(f"{arm_name(report.arm)}: {report.rounds} rounds", style="dim")
        where = f"{arm_name(report.arm)}, round {report.round} of {report.rounds}"
        if report.training is not None and report.training["tokens_per_second"]:
            where += f", {report.training['tokens_per_second']:.0f} tokens/s"
        done = sum(self._rounds.values()) - self._skipped
        self._stages.tell("training", done, self._total - self._skipped, where)


def round_line(report: RoundReport, primary: str) -> str:
    """Return one line about a closed round. Ordinary figures fit 80 characters."""
    parts = [f"round {report.round:>3}/{report.rounds}", f"{report.sites} sites"]
    if report.training is not None and report.training.get("loss") is not None:
        parts.append(f"training loss {report.training['loss']:.3f}")
    if report.metrics is not None:
        parts += [
            f"test loss {report.metrics['loss']:.3f}",
            f"{primary} {as_text(primary, report.metrics[primary])}",
        ]
    if report.epsilon is not None:
        parts.append(f"epsilon {report.epsilon:.2f}")
    return "  ".join(parts)


def counts_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of a study that counts: each count and figure, with an interval that covers the noise."""
    epsilon, document = summary["epsilon"], summary["counts"]
    promise = "without noise" if epsilon is None else f"epsilon {epsilon:.2f} per {document['unit']}"
    table = Table(title=f"all {document['sites']} sites together, {promise}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column(f"{document['confidence']:.0%} interval")
    for row in count_rows(document):
        table.add_row(*row)
    return table


def result_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of results: before training, each site alone, the federation, and all data pooled."""
    primary = summary["metric"]
    scores, intervals = summary[primary], summary["intervals"]
    epsilon = summary["epsilon"]
    promise = (
        "without differential privacy"
        if epsilon is None
        else f"epsilon {epsilon:.2f} per {summary['privacy']['training']['unit']}"
    )
    table = Table(title=f"{primary} on the test records of all sites, {promise}", title_justify="left")
    table.add_column("trained on")
    table.add_column(primary, justify="right")
    if intervals:
        table.add_column("95 % interval", justify="right")

    def row(name: str, value: float | None, arm: str | None = None, style: str | None = None) -> None:
        cells = [escape(name), as_text(primary, value)]
        if intervals:
            low_high = intervals.get(arm or "")
            cells.append(f"{100 * low_high[0]:.1f} to {100 * low_high[1]:.1f} %" if low_high else "")
        table.add_row(*cells, style=style)

    row("nothing (before)", scores["before"], "before")
    for site, value in scores["local"].items():
        row(f"{site} alone", value, f"local-{site}")
    if scores["local_mean"] is not None:
        row("mean of the sites alone", scores["local_mean"])
    row("together (federated)", scores["federated"], FEDERATED, "bold green")
    if scores["pooled"] is not None:
        row("all data pooled", scores["pooled"], "pooled")
    sites = len(summary["federated_per_site"])
    plain = " (the coordinator sees the update of each site)" if summary["secure_aggregation"] == "plain" else ""
    table.caption = (
        f"{sites} sites, {summary['rounds']} rounds, {summary['seconds']} s, at most {summary['peak_memory_mb']} MB of "
        f"memory; updates {summary['secure_aggregation']}{plain}"
    )
    table.caption_justify = "left"
    return table


def own_table(summary: Mapping[str, Any]) -> Table | None:
    """Return the table of each site's results on its own test records; None if there is nothing to compare."""
    own = OwnRecords.of(summary)
    if not own.compares:
        return None
    title = f"{own.metric} by site, each on its own test records"
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(own.head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for cells in own.cells:
        table.add_row(*map(escape, cells))
    return table


def result_parts(summary: Mapping[str, Any]) -> list[Table | str]:
    """Return the tables of results, and after each the sentences that explain it."""
    if "counts" in summary:
        return [counts_table(summary)]
    parts: list[Table | str] = [result_table(summary), *promise_of_baselines(summary)]
    if (own := own_table(summary)) is not None:
        parts += [own, *OwnRecords.of(summary).sentences]
    if (found := summary.get("continued")) is not None:
        parts += [continued_table(found), *continued.sentences(found)]
    return parts


def continued_table(found: Mapping[str, Any]) -> Table:
    """Return the table of what a run that continues another forgot and learned."""
    table = Table(title=continued.title(found), title_justify="left")
    for number, name in enumerate(continued.HEAD):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for cells in continued.cells(found):
        table.add_row(*map(escape, cells))
    return table


def _holds_against(meaning: Mapping[str, Any]) -> str:
    """Return against whom the promise of a private study holds, and how much noise sharing saves."""
    if meaning["privacy"]["mode"] == "local":
        return "everyone, including the coordinator: each site adds all of its noise itself"
    shared = meaning["shared_noise"]
    alone = shared["epsilon_of_a_share_alone"]
    return (
        f"the coordinator together with {shared['corrupt']} of {shared['sites']} sites, if {shared['helpers']} other "
        f"sites add their share of the noise. A step needs {shared['survivors']} sites. Noise of a step: "
        f"{shared['noise_of_a_step']} clip norms ({shared['noise_of_a_step_if_local']} if each site added all of its "
        "noise). One share alone gives " + ("no promise" if alone is None else f"epsilon {alone}") + _banded(shared)
    )


def _banded(shared: Mapping[str, Any]) -> str:
    """Return what correlated noise is expected to do; nothing where noise is independent."""
    band = shared.get("band")
    if band is None:
        return ""
    said = (
        f". Noise is correlated over {band['steps']} steps: by linear theory the error of the summed steps is "
        f"{band['error_lower_by']} times smaller than with independent noise"
    )
    if band["error_lower_by"] <= 1:
        return said + ', so independent noise is better: set privacy.noise = "independent"'
    if not band["linear_server"]:
        return said + ". The server's optimizer is not linear, and gains less: compare it with fedavgm"
    return said


def meaning_table(meaning: Mapping[str, Any]) -> Table:
    """Return the table that `privet check` prints."""
    table = Table(title=f"study {meaning['study']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    privacy = meaning["privacy"]
    if "cells" in meaning:
        cost = "none: the counts have no noise"
        if privacy is not None:
            cost = (
                f"epsilon {privacy['epsilon']} at delta {privacy['delta']} per {privacy['unit']}; noise multiplier "
                f"{privacy['noise_multiplier']}, no sampling"
            )
        table.add_row("digest", meaning["digest"])
        table.add_row("training", "none: the one round counts")
        table.add_row("counts", "\n".join(meaning["cells"]))
        table.add_row("privacy", cost)
        deviation = meaning["deviation_of_a_count"]
        table.add_row("noise", f"standard deviation of each count over {meaning['sites']} sites: {deviation:,.1f}")
        return table
    table.add_row("digest", meaning["digest"])
    table.add_row("task", meaning["task"])
    few = f" in {meaning['quantisation']}" if "quantisation" in meaning else ""
    table.add_row("base", f"{meaning['base']}, {meaning['base_parameters']:,} parameters{few}, verified")
    table.add_row(
        "adapter",
        f"{meaning['adapter_parameters']:,} parameters, {meaning['trainable_parameters']:,} trained at sites",
    )
    table.add_row("training", _training(meaning))
    table.add_row("aggregation", meaning["aggregation"])
    if meaning["secure_aggregation"] == "plain":
        table.add_row("updates", "plain: the coordinator sees the update of each site", style="bold red")
    else:
        withstands = f"even if it colludes with {meaning['corrupt_sites']} of the sites"
        table.add_row("updates", f"masked: the coordinator sees only sums over sites, {withstands}")
    table.add_row(
        "traffic",
        f"per round and site {_mb(meaning['bytes_down_per_round_and_site'])} down, "
        f"{_mb(meaning['bytes_up_per_round_and_site'])} up",
    )
    table.add_row(
        "network",
        f"{meaning['exchanges_per_round']:.3g} exchanges per round: "
        + "; ".join(f"{seconds} s at {name}" for name, seconds in meaning["network_seconds_per_round"].items()),
    )
    table.add_row(
        "memory",
        f"about {_mb(meaning['memory_bytes'])} at a site ({meaning['device']}, {meaning['precision']})",
    )
    if meaning["token_lengths"] is not None:
        table.add_row("tokens", "\n".join(length_lines(meaning["token_lengths"])))
    objection = meaning["passes"]["objection"]
    table.add_row(
        "computing",
        f"one record at a time, which is slower: {objection}"
        if objection
        else "records are computed in batches; checked: that changes no result",
    )
    if privacy is None:
        table.add_row("privacy", "none: the updates of the sites are not differentially private", style="bold red")
    else:
        table.add_row(
            "privacy",
            f"epsilon {privacy['epsilon']} at delta {privacy['delta']} per {privacy['unit']} "
            f"(limit {privacy['target']}); after one round {privacy['epsilon_after_one_round']}",
        )
        head = privacy.get("noise_multiplier_head_start")
        sampled = f"Poisson sampling at rate {privacy['sampling_rate']}" if meaning["total_steps"] else "no sampling"
        table.add_row(
            "mechanism",
            f"noise multiplier {privacy['noise_multiplier']}, clip norm {privacy['clip_norm']}, {sampled}"
            + ("" if head is None else f"; head start: noise multiplier {head}, no sampling"),
        )
        table.add_row("holds against", _holds_against(meaning))
    return table


def _training(meaning: Mapping[str, Any]) -> str:
    each, head = meaning["steps_per_round"], "1 round of a head start, in which every unit takes part"
    starts = meaning.get("head_start", False)
    rounds = meaning["rounds"] - starts
    steps = (
        f"{rounds} round{'s'[: rounds != 1]} of {each} step{'s'[: each > 1]}: {meaning['total_steps']} in total, "
        f"{meaning['passes_over_data']} expected passes over the data"
    )
    return ", then ".join(([head] if starts else []) + ([steps] if rounds else []))


def _mb(size: float) -> str:
    return f"{size / 1e6:,.2f} MB" if size < 1e8 else f"{size / 1e9:,.2f} GB"


def save_figure(summary: Mapping[str, Any], directory: Path) -> Path | None:
    """Save the curves as `curves.png`; return None if matplotlib is not installed or no round was evaluated."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    points = summary.get("curve")
    if not points:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    primary, scores = summary["metric"], summary[summary["metric"]]
    scale = 1.0 if primary == "perplexity" else 100.0
    private = points[-1]["epsilon"] is not None
    figure, axes = pyplot.subplots(1, 2 if private else 1, figsize=(10 if private else 6, 3.6), squeeze=False)
    left = axes[0][0]
    rounds = [0, *(p["round"] for p in points)]
    values = [scale * v for v in (scores["before"], *(p[primary] for p in points))]
    left.plot(rounds, values, "o-", color="#0b6e4f", label="together (federated)")
    left.set(xlabel="round", ylabel=primary + (" [%]" if scale > 1 else ""), title="test records of all sites")
    for name, key, color, style in (
        ("all data pooled", "pooled", "#444444", "--"),
        ("a site alone (mean)", "local_mean", "#b3541e", ":"),
    ):
        if scores[key] is not None:
            left.axhline(scale * scores[key], linestyle=style, linewidth=1.5, color=color, label=name)
    if primary == "perplexity" and max(values) > _EXTREME * values[-1]:
        left.set(yscale="log")  # or the first rounds would flatten the rest
    else:
        left.set(
            ylim=(0, 1.1 * max(*values, *(scale * scores[key] for key in ("pooled", "local_mean") if scores[key])))
        )
    left.legend(frameon=False, fontsize="small")
    if private:
        right = axes[0][1]
        right.plot([p["round"] for p in points], [p["epsilon"] for p in points], "o-", color="#5b4b8a", label="spent")
        right.axhline(
            summary["privacy"]["target"], linestyle="--", linewidth=1.5, color="#444444", label="limit of the study"
        )
        right.legend(frameon=False, fontsize="small", loc="lower right")
        right.set(
            xlabel="round",
            ylabel=f"epsilon per {summary['privacy']['training']['unit']}",
            title=f"privacy spent, at delta {summary['privacy']['delta']:g}",
            ylim=(0, summary["privacy"]["target"] * 1.1),
        )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    path = directory / "curves.png"
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
