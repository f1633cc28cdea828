"""The parts of a report that differ for a deployed run: the coordinator has no records, so no test of its own.

Its figures of quality are the validation sums: what the sites measured together, in each round, on units that they
hold out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from privet.client.pages.charts import line_chart
from privet.client.pages.html import Child, Html, element, facts, joined, paragraph, table
from privet.server.rounds.quality import NONE, accuracy_within, course, quality
from privet.simulations.reporting.gather import RunFacts

ELSEWHERE = (
    "Not in this report: a test on each site's records, the same training at one site alone or on pooled data, and "
    "attacks. They need records, and the coordinator has none. Each site can test the release on its own records with "
    "`privet site evaluate SITE RUN`."
)


def sites_of(run: RunFacts) -> list[str]:
    """Return the sites that were in a cohort, by name."""
    return sorted({site for statement in run.statements for site in statement["cohort"]})


def conclusion(run: RunFacts) -> str:
    """Return the sentence that the report begins with."""
    closed = [statement for statement in run.statements if statement["type"] == "round-close"]
    ended = "" if run.ended else ", and the run has not ended"
    return f"{len(sites_of(run))} sites trained one model together in {len(closed)} rounds{ended}. {course(closed)}"


def lead(run: RunFacts) -> Html:
    """Return date and sites."""
    pairs: list[tuple[str, Child]] = [("Sites", ", ".join(sites_of(run)) or "none yet")]
    if run.statements:
        began = datetime.fromtimestamp(float(run.statements[0]["started"]), UTC)
        pairs.insert(0, ("Date", f"{began.day} {began:%B %Y}"))
    return joined([element("p", {"class": "lead"}, "The records of each site stayed there."), facts(pairs)])


def tiles(run: RunFacts) -> Html:
    """Return the figures at the top."""
    measured = [statement["metrics"] for statement in run.statements if statement["metrics"]]
    found = [("rounds closed", str(sum(each["type"] == "round-close" for each in run.statements)))]
    if measured:
        found.insert(0, ("validation accuracy before the last round", _percent(measured[-1])))
    return element(
        "div",
        {"class": "tiles"},
        *(
            element("div", {"class": "tile"}, element("b", {}, value), element("span", {}, name))
            for name, value in found
        ),
    )


def row(run: RunFacts) -> list[str]:
    """Return the run's row in a table of several runs."""
    measured = [statement["metrics"] for statement in run.statements if quality(statement["metrics"])]
    result = (
        "counts"
        if run.study.counts
        else f"validation accuracy {_percent(measured[-1])}"
        if measured
        else "not measured"
    )
    return [run.name, run.study.name, result, _epsilon(run), str(len(run.statements))]


def outcome(run: RunFacts) -> Html:
    """Return the validation of each round."""
    found = [(each["round"], each["metrics"]) for each in run.statements if each["metrics"]]
    if not found:
        return joined([paragraph(NONE), paragraph(ELSEWHERE)])
    rows = [[str(number), _percent(metrics), f"{metrics['validation_loss']:.4g}"] for number, metrics in found]
    masked = run.study.secure_aggregation.mode == "masked"
    hidden = "; the coordinator sees no single site's" if masked else ""
    noise = ""
    if run.study.private:
        noise = " They carry noise, as they are a release of their own; \u00b1 is half of a 95 % interval."
    return joined(
        [
            line_chart(
                "accuracy on the validation units of all sites, by round",
                [(float(number), 100 * metrics["validation_accuracy"]) for number, metrics in found],
                x_name="round",
                y_name="accuracy in %",
                name="all sites together",
                described=f"From {rows[0][1]} before round {rows[0][0]} to {rows[-1][1]} before round {rows[-1][0]}.",
            ),
            table("Validation by round", ["before round", "accuracy", "loss"], rows, numbers=(1, 2)),
            paragraph(
                "Each round validates the adapter that it starts from, so the last adapter is not validated. The "
                f"figures are sums over all sites{hidden}.{noise}"
            ),
            paragraph(ELSEWHERE),
        ]
    )


def costs(run: RunFacts) -> Html:
    """Return traffic and time."""
    seconds = sum(float(statement["seconds"]) for statement in run.statements)
    return joined(
        [
            facts(
                [
                    ("Adapters sent to sites", _megabytes(run.traffic.down)),
                    ("Updates sent by sites", _megabytes(run.traffic.up)),
                    ("Time", f"{seconds:,.0f} seconds in rounds, waiting included"),
                ]
            ),
            paragraph("Memory and energy at the sites are not known to the coordinator."),
        ]
    )


def identity(run: RunFacts) -> Html:
    """Return names and digests."""
    versions: Mapping[str, Any] = run.privacy["versions"]
    pairs: list[tuple[str, Child]] = [("Run", run.name), ("Study", run.study.digest)]
    if run.statements:
        pairs.append(("Adapter", str(run.statements[-1]["adapter_published"])))
    pairs.append(("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return facts(pairs)


def _percent(metrics: Mapping[str, float]) -> str:
    found = f"{100 * metrics['validation_accuracy']:.1f} %"
    if "validation_noise" not in metrics:
        return found
    within = accuracy_within(
        metrics["validation_accuracy"], metrics["validation_units"], metrics["validation_noise"]
    )  # fmt: skip
    return f"{found} (\u00b1 {100 * within:.0f})"


def spent(run: RunFacts) -> float | None:
    """Return the largest epsilon that a site has spent; None for a study without privacy."""
    if not run.privacy["private"]:
        return None
    costs_by_site: Sequence[Mapping[str, Any]] = list(run.privacy["epsilon"]["sites"].values())
    return max((float(each["epsilon"]) for each in costs_by_site), default=0.0)


def _epsilon(run: RunFacts) -> str:
    found = spent(run)
    return "none" if found is None else f"{found:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB over all rounds and sites"
