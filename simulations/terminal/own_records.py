"""What training together is worth to each site, on its own test records: rows and sentences for table and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privet.client.pages.suppression import SMALLEST, hidden
from privet.simulations.runs.own_records import better_together
from privet.simulations.terminal.figures import as_text, extremes

NOISELESS = (
    "A site that trains only for itself and releases nothing needs no noise. Without noise it may do better alone than "
    'shown here. This run did not measure that. To measure it, simulate a copy of the study with mode = "none" in '
    "[privacy], and without epsilon, delta and clip_norm there."
)
PERSONAL = (
    "A site's own adapter is the shared one, trained further on the site's records without privacy. It may reveal any "
    "of these records. It never leaves the site, and that is why no privacy is needed for it."
)
_NO = {"better": 0, "sites": 1}
_NAMED = 12
_COLUMNS = {"together": "together", "alone": "alone", "own": "own adapter (no privacy)"}


@dataclass(frozen=True)
class OwnRecords:
    """Results by site, each on the site's own test records.

    Attributes:
        metric: The metric.
        rows: By site: `records`, and the metric `together`, `alone` and with the site's `own` adapter; None where a
            site has no such result.
        chose: Sites that chose an adapter of their own, and sites that had the choice; None without such adapters.
    """

    metric: str
    rows: Mapping[str, Mapping[str, Any]]
    chose: tuple[int, int] | None = None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> OwnRecords:
        """Return the results of a summary. Summaries of earlier versions lack those of sites alone."""
        metric = summary["metric"]
        per_site = summary.get("federated_per_site", {})
        found = summary.get("own_records") or {
            site: {"records": each["records"], "together": each[metric]} for site, each in per_site.items()
        }
        personal = summary.get("personal", {}).get("per_site", {})
        rows = {site: {**row, "own": personal.get(site, {}).get("chosen")} for site, row in found.items()}
        chose = sum(each["share"] > 0 for each in personal.values())
        return cls(metric, rows, (chose, len(personal)) if personal else None)

    @property
    def secret(self) -> frozenset[str]:
        """Return the sites of so few test records that their results are not shown, and those that would tell them."""
        return hidden({site: row["records"] for site, row in self.rows.items()})

    @property
    def shown(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the rows that are shown."""
        return {site: row for site, row in self.rows.items() if site not in self.secret}

    @property
    def columns(self) -> list[str]:
        """Return the keys of the results that any site has."""
        return [key for key in _COLUMNS if any(row.get(key) is not None for row in self.rows.values())]

    @property
    def compares(self) -> bool:
        """Whether there is more than the result of training together."""
        return len(self.columns) > 1

    @property
    def head(self) -> list[str]:
        """Return the names of the columns."""
        return ["site", "test records", *(_COLUMNS[key] for key in self.columns)]

    @property
    def cells(self) -> list[list[str]]:
        """Return the cells of each row."""
        found = []
        for site, row in self.rows.items():
            values = [f"{row['records']:.0f}", *(as_text(self.metric, row.get(key)) for key in self.columns)]
            found.append([site, *(["not shown"] * len(values) if site in self.secret else values)])
        return found

    @property
    def gain(self) -> str:
        """Return how many sites do better together than alone, as a sentence; empty if no site trained alone."""
        found = better_together(self.shown, self.metric)
        if found is None:
            return ""
        sites = f"{found['sites']} sites" if found["sites"] != 1 else "1 site"
        sites += " shown" if self.secret else ""
        do, their = ("do", "their") if found["sites"] != 1 else ("does", "its")
        return f"{found['better']} of {sites} {do} better together than alone on {their} own test records."

    @property
    def losers(self) -> list[str]:
        """Return the sites that do no better together than alone, of those that are shown."""
        return [site for site, row in self.shown.items() if better_together({site: row}, self.metric) == _NO]

    @property
    def spread(self) -> list[str]:
        """Return the best and the worst site of each column that two sites or more have."""
        found = []
        for key in self.columns:
            values = {site: row[key] for site, row in self.shown.items() if row.get(key) is not None}
            if len(values) > 1:
                found.append(f"{_COLUMNS[key].capitalize()}: {extremes(values, self.metric, 'site')}.")
        return found

    @property
    def sentences(self) -> list[str]:
        """Return what the table shows, in sentences."""
        lines = [self.gain] if self.gain else []
        lines += [f"Not better together: {', '.join(self.losers)}."] if 0 < len(self.losers) <= _NAMED else []
        lines += self.spread
        if self.chose is not None:
            lines.append(f"{_choice(*self.chose)} {PERSONAL}")
        if self.secret:
            lines.append(hidden_rows("records"))
        return lines


def hidden_rows(what: str) -> str:
    """Return why a table does not show all rows. `what` is counted."""
    return (
        f"Rows of fewer than {SMALLEST} {what} are not shown. Other rows are hidden if a small row would follow from "
        "them."
    )


def _choice(chose: int, sites: int) -> str:
    compared = "by records that training did not see"
    if chose == sites:
        return f"{f'All {sites} sites' if sites > 1 else 'The site'} chose their own adapter, {compared}."
    rest = sites - chose
    return (
        f"{chose} of {sites} sites chose their own adapter, {compared}; {rest} found it no better than the shared one."
    )


def promise_of_baselines(summary: Mapping[str, Any]) -> list[str]:
    """Return whether a site alone and all data pooled trained under the same promise; nothing without baselines."""
    scores = summary[summary["metric"]]
    alone, pooled = scores.get("local_mean") is not None, scores.get("pooled") is not None
    if not alone and not pooled:
        return []
    who = " and ".join(name for name, there in (("alone", alone), ("pooled", pooled)) if there)
    privacy = summary.get("privacy")
    if privacy is None:
        return [f"Training {who} has the same settings, and no differential privacy either."]
    unit, limit = privacy["training"]["unit"], privacy["target"]
    promise = f"Training {who} keeps the same promise as together: at most epsilon {limit:g} per {unit}."
    return [promise, NOISELESS] if alone else [promise]
