"""The report: one self-contained HTML page for readers who do not program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from privet.client.pages.charts import Level, bar_chart, line_chart
from privet.client.pages.document import document
from privet.client.pages.html import Child, Html, bullets, element, facts, joined, paragraph, prose, table
from privet.client.pages.suppression import hidden
from privet.common.study.study import Study
from privet.simulations.reporting import counts, deployed
from privet.simulations.reporting.attacks import attacks_section
from privet.simulations.reporting.gather import RunFacts
from privet.simulations.runs.own_records import better_together
from privet.simulations.terminal import continued
from privet.simulations.terminal.figures import as_text, extremes
from privet.simulations.terminal.own_records import OwnRecords, hidden_rows, promise_of_baselines
from privet.simulations.terminal.sentences import counted_sentence

WATTS = 100.0
"""Assumed power of the machine, in watts."""

_ROUNDS_SHOWN = 60
_NAMED = 12
"""Sites that the top of a report names."""
_FEW = 3
"""Sites that do worse, and labels that are hardly found, that the first sentences name."""
_HARDLY = 0.2
"""A label of which a smaller part of the records is found is hardly found."""
_EXTREME = 5.0
"""A perplexity above this multiple of the result is left out of the figure, which it would flatten."""


def page(runs: Sequence[RunFacts], watts: float = WATTS) -> str:
    """Return the page of one run, or of several runs with a table of all at the top."""
    title = f"Report: {runs[0].study.name}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    overview = [element("h1", {}, title), _comparison(runs)] if len(runs) > 1 else []
    articles = [element("article", {"class": "run"}, _run(run, watts)) for run in runs]
    return document(title, [*overview, *articles])


def _run(run: RunFacts, watts: float) -> Html:
    if run.study.counts:
        return _counted_run(run)
    if run.deployed:
        return _deployed_run(run)
    sections: list[tuple[str, Html]] = [
        ("Results", _outcome(run)),
        ("Results by site", _sites(run)),
        ("Results by group", _groups(run)),
        ("Privacy spent", _privacy(run)),
        ("Attacks", attacks_section(run.attacks)),
        ("Settings", _asked(run.study)),
        ("Traffic, time and energy", _costs(run, watts)),
        ("Rounds", _rounds(run)),
        ("Appendix: privacy statement", _statement(run)),
        ("Appendix: technical identifiers", _identity(run)),
    ]
    return _article(run, [_lead(run), _tiles(run)], sections)


def _article(run: RunFacts, top: Sequence[Html], sections: Sequence[tuple[str, Html]]) -> Html:
    """Return a run's article: its name and conclusion, what stands at the top, and the sections."""
    parts: list[Child] = [
        element("h1", {}, run.study.name),
        element("p", {"class": "conclusion"}, conclusion(run)),
        *top,
    ]
    parts += [element("section", {}, element("h2", {}, name), content) for name, content in sections]
    return joined(parts)


def _counted_run(run: RunFacts) -> Html:
    sections: list[tuple[str, Html]] = [
        ("Result", counts.outcome(run)),
        ("Privacy spent", _privacy(run)),
        ("Settings", _asked(run.study)),
        ("Rounds", _rounds(run)),
        ("Appendix: privacy statement", _statement(run)),
        ("Appendix: technical identifiers", deployed.identity(run)),
    ]
    return _article(run, [deployed.lead(run), _epsilon_tile(run)], sections)


def _deployed_run(run: RunFacts) -> Html:
    sections: list[tuple[str, Html]] = [
        ("Results", deployed.outcome(run)),
        ("Privacy spent", _privacy(run)),
        ("Settings", _asked(run.study)),
        ("Traffic and time", deployed.costs(run)),
        ("Rounds", _rounds(run)),
        ("Appendix: privacy statement", _statement(run)),
        ("Appendix: technical identifiers", deployed.identity(run)),
    ]
    return _article(run, [deployed.lead(run), deployed.tiles(run), _epsilon_tile(run)], sections)


# --- at a glance -----------------------------------------------------------------------------------------


def conclusion(run: RunFacts) -> str:
    """Return the sentence that the report begins with: what training together was worth."""
    if run.study.counts:
        return counted_sentence(counts.result(run))
    if run.deployed:
        return deployed.conclusion(run)
    primary = run.summary["metric"]
    scores = run.summary[primary]
    together, alone, pooled = scores["federated"], scores.get("local_mean"), scores.get("pooled")
    count = len(run.summary["federated_per_site"])
    who = f"{count} sites" if count != 1 else "One site"
    words = f"{who} trained one model together: {primary} {as_text(primary, together)} on the test records of all sites"
    if alone is not None:
        words += f". There, a site alone reaches {as_text(primary, alone)} on average"
    if pooled is not None:
        words += (
            f", and all data in one place {as_text(primary, pooled)}"
            if alone is not None
            else (f". All data in one place reach {as_text(primary, pooled)}")
        )
    if alone is None and pooled is None:
        words += f". Before training, it was {as_text(primary, scores['before'])}"
    less = "Less is better." if primary == "perplexity" else ""
    own = OwnRecords.of(run.summary)
    return " ".join(part for part in (f"{words}.", less, own.gain, _losers(own), _hardly_found(run)) if part)


def _losers(own: OwnRecords) -> str:
    """Return what the sites lose that would do better alone, as a sentence; empty if there are none, or many."""
    rows = ((site, own.rows[site]["together"], own.rows[site]["alone"]) for site in own.losers)
    lost = [f"{site} ({as_text(own.metric, mine)}, alone {as_text(own.metric, alone)})" for site, mine, alone in rows]
    return f"Not better together: {', '.join(lost)}." if 0 < len(lost) <= _FEW else ""


def _hardly_found(run: RunFacts) -> str:
    """Return the labels that the model hardly ever finds, as a sentence; empty if there are none."""
    found = {name: (count, right) for name, count, right in run.groups.get("label", ())}
    secret = hidden({name: count for name, (count, _) in found.items()})
    rare = [name for name, (_, right) in found.items() if name not in secret and right < _HARDLY]
    more = f" and {len(rare) - _FEW} more" if len(rare) > _FEW else ""
    labels = f"label{'s' if len(rare) > 1 else ''} {', '.join(rare[:_FEW])}{more}"
    return f"The model finds hardly any record of the {labels}." if rare else ""


def _lead(run: RunFacts) -> Html:
    names = sorted(run.summary["federated_per_site"])
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")
    pairs: list[tuple[str, Child]] = [("Sites", shown)]
    if run.data:
        pairs.append(("Data", run.data))
    if (tested := run.summary.get("federated", {}).get("records")) is not None:
        pairs.append(("Measured on", f"{tested:,.0f} test records of all sites"))
    if lacking := _missing_labels(run):
        pairs.append(("No training record of the label", lacking))
    if run.statements and "started" in run.statements[0]:
        began = datetime.fromtimestamp(float(run.statements[0]["started"]), UTC)
        pairs.insert(0, ("Date", f"{began.day} {began:%B %Y}"))
    kind = "A simulation on one machine." if run.privacy["simulated"] else "The records of each site stayed there."
    rounds = run.summary["rounds"]
    return joined([element("p", {"class": "lead"}, f"{kind} {rounds} round{'s'[: rounds != 1]}."), facts(pairs)])


def _missing_labels(run: RunFacts) -> str:
    """Return which sites trained on no record of some labels, and of which, in words; of a simulation alone."""
    found = [
        f"{site}: {', '.join(each['missing_labels'])}"
        for site, each in sorted(run.summary.get("training_records", {}).items())
        if each.get("missing_labels")
    ]
    return "; ".join(found[:_NAMED]) + (f"; and {len(found) - _NAMED} other sites" if len(found) > _NAMED else "")


def _tiles(run: RunFacts) -> Html:
    primary = run.summary["metric"]
    scores = run.summary[primary]
    tiles = [("tile", as_text(primary, scores["federated"]), f"{primary} on all sites' records, trained together")]
    for name, key in (("a site alone, on average", "local_mean"), ("all data pooled", "pooled")):
        if scores.get(key) is not None:
            tiles.append(("tile", as_text(primary, scores[key]), f"{primary} on all sites' records, {name}"))
    own = OwnRecords.of(run.summary)
    if (found := better_together(own.shown, own.metric)) is not None:
        tiles.append(("tile", f"{found['better']} of {found['sites']}", "sites better together, on their own records"))
    word, _, _ = _verified(run)
    tiles.append(("tile", word, "round log"))
    boxes = [
        element("div", {"class": kind}, element("b", {}, value), element("span", {}, name))
        for kind, value, name in tiles
    ]
    return joined([element("div", {"class": "tiles"}, *boxes), _epsilon_tile(run)])


def _epsilon_tile(run: RunFacts) -> Html:
    """Return what was promised, on a scale, and what it is worth."""
    epsilon, unit = _spent(run), run.study.privacy.unit
    grade = "" if epsilon is None else strength(epsilon)
    if epsilon is None:
        value, words = "none", "no differential privacy: the adapter may reveal any record"
        explained = ["Nothing bounds what the adapter reveals."]
    else:
        words = f"epsilon per {unit}"
        odds = 100 / (1 + math.exp(-epsilon))
        value = f"{epsilon:.2f} · {grade}"
        explained = [
            f"What is proved: an attacker who begins with even odds that a {unit} is in the data becomes at most "
            f"{as_share(odds)} sure of it, except with probability {run.privacy['epsilon']['delta']:g}. No attack can "
            "do better, and known attacks may do much worse.",
        ]
        if unit == "record":
            explained.append(" A person with several records is protected less.")
    parts: list[Child] = [element("b", {}, value), element("span", {}, words), paragraph(*explained)]
    if epsilon is not None:
        parts.append(
            paragraph(
                f"What is a convention: the word “{grade}”. Epsilon up to 1 is called strong, up to 10 reasonable, "
                "above 10 weak or none (Ponomareva et al. 2023, How to DP-fy ML, JAIR 77). The word proves nothing."
            )
        )
    if run.privacy["simulated"]:
        parts.append(
            element(
                "p",
                {"class": "bad"},
                "A simulation protects nobody: its noise follows from a public seed. This epsilon would hold if real "
                "sites ran the same study with secret noise."
                if epsilon is not None
                else "A simulation protects nobody.",
            )
        )
    return element("div", {"class": "tile explained"}, *parts)


def _spent(run: RunFacts) -> float | None:
    """Return the largest epsilon that a site has spent; None for a study without privacy."""
    if not run.deployed:
        found: float | None = run.summary["epsilon"]
        return found
    return deployed.spent(run)


def strength(epsilon: float) -> str:
    """Return the strength of a promise in words: the three tiers of Ponomareva et al. (2023), section 5.

    How to DP-fy ML, JAIR 77, doi:10.1613/jair.1.14649: up to 1 strong, up to 10 reasonable, else weak or none.
    """
    return "strong" if epsilon <= 1 else "reasonable" if epsilon <= 10 else "weak or none"


def as_share(percent: float) -> str:
    """Return a percentage of at most 100 that is not rounded up to certainty."""
    return "more than 99.99 %" if percent > 99.99 else f"{percent:.2f} %" if percent > 99 else f"{percent:.0f} %"


def _verified(run: RunFacts) -> tuple[str, str, str]:
    """Return the verdict on the round log: in two words, in a sentence, and as a CSS class."""
    if run.deployed:
        sentence = "The consortium's signed log holds these rounds. `privet audit verify` checks a bundle of the run."
        return "signed", sentence, "note"
    found = run.summary.get("log_verified")
    if found is True:
        return "verified", "The signed round log was verified when the run ended.", "good"
    if found is False:
        return "FAILED", "The signed round log did not verify. Do not rely on this run.", "bad"
    return "not verified", "No signed round log was verified for this run.", "bad"


def _comparison(runs: Sequence[RunFacts]) -> Html:
    rows = []
    for run in runs:
        if run.deployed or run.study.counts:
            rows.append(deployed.row(run))
            continue
        primary, epsilon = run.summary["metric"], run.summary["epsilon"]
        cells = [run.name, run.study.name, f"{primary} {as_text(primary, run.summary[primary]['federated'])}"]
        rows.append([*cells, "none" if epsilon is None else f"{epsilon:.2f}", str(run.summary["rounds"])])
    head = ["run", "study", "federated result", "epsilon", "rounds"]
    return joined([table("All runs of this report", head, rows, numbers=(2, 3, 4)), counts.moved(runs)])


# --- the sections ----------------------------------------------------------------------------------------


def _training(study: Study) -> str:
    if study.counts:
        return "none: the one round counts"
    rounds = f"{study.training.rounds} rounds; steps of each site in a round: {study.training.steps}"
    if not study.training.starts_head:
        return rounds
    head = "1 round that computes the head from sums of features by class"
    return f"{head}, then {rounds}" if study.training.rounds else head


def _asked(study: Study) -> Html:
    kinds = {
        "text-classification": "choose the label of a text",
        "token-classification": "tag the words of a text",
        "causal-lm": "answer a prompt",
        "preference": "prefer the better of two answers to a prompt",
    }
    masked = study.secure_aggregation.mode == "masked"
    pairs: list[tuple[str, Child]] = [
        ("Task", kinds[study.task.kind]),
        ("Labels", ", ".join(study.task.labels) or "none"),
        (
            "Base model",
            study.model.base
            + ("" if study.counts else f"; training changes only an adapter of rank {study.lora.ranks_text}"),
        ),
        ("Training", _training(study)),
        (
            "Updates",
            "masked: the coordinator sees only sums over sites"
            if masked
            else "plain: the coordinator sees the update of each site",
        ),
        (
            "Privacy",
            f"epsilon {study.privacy.epsilon:g} at delta {study.privacy.delta:g} per {study.privacy.unit}, by noise "
            f"that {'the sites share' if study.distributed else 'each site adds by itself'}"
            if study.private
            else "none: the adapter may reveal any record",
        ),
    ]
    return facts(pairs)


def _outcome(run: RunFacts) -> Html:
    primary = run.summary["metric"]
    scores, intervals = run.summary[primary], run.summary["intervals"]
    scale, unit = (1.0, "") if primary == "perplexity" else (100.0, " in %")
    points = [(float(p["round"]), scale * p[primary]) for p in run.summary["curve"] if p.get(primary) is not None]
    points = [(0.0, scale * scores["before"]), *points]
    levels = [
        Level(name, scale * scores[key])
        for name, key in (("all data pooled", "pooled"), ("a site alone (mean)", "local_mean"))
        if scores.get(key) is not None
    ]
    beyond: list[str] = []
    if primary == "perplexity":
        points, levels, beyond = _without_extremes(points, levels, scores["federated"])
    last = as_text(primary, scores["federated"])
    tested, drawn = run.summary.get("federated", {}).get("records"), {p.get("records") for p in run.summary["curve"]}
    few = "" if drawn == {tested} else ". The curve is on a sample of the records, the dashed lines are on all"
    far = f". Beyond the axis: {', '.join(beyond)}" if beyond else ""
    chart = line_chart(
        f"{primary} on the test records of all sites, by round{few}{far}",
        points,
        name="trained together",
        x_name="round",
        y_name=f"{primary}{unit}",
        levels=levels,
        described=f"From {as_text(primary, scores['before'])} before training to {last} after the last round.",
    )
    arms = [("nothing (before)", "before", scores["before"])]
    arms += [(f"{site} alone", f"local-{site}", value) for site, value in scores["local"].items()]
    arms += [("together (federated)", "federated", scores["federated"])]
    if scores.get("pooled") is not None:
        arms.append(("all data pooled", "pooled", scores["pooled"]))
    rows = []
    for name, key, value in arms:
        low_high = intervals.get(key)
        between = f"{100 * low_high[0]:.1f} to {100 * low_high[1]:.1f} %" if low_high else "-"
        rows.append([name, as_text(primary, value), between])
    described = table(
        f"{primary} on the test records of all sites", ["trained on", primary, "95 % interval"], rows, numbers=(1, 2)
    )
    promise = [paragraph(line) for line in promise_of_baselines(run.summary)]
    return joined([chart if points else "", described, *promise])


def _without_extremes(
    points: Sequence[tuple[float, float]], levels: Sequence[Level], result: float
) -> tuple[list[tuple[float, float]], list[Level], list[str]]:
    """Return points and levels without those far above the result, which would flatten the rest, and these in words."""
    top = _EXTREME * result if math.isfinite(result) else math.inf
    left_out = [f"round {x:g} ({as_text('perplexity', y)})" for x, y in points if y > top]
    left_out += [f"{level.name} ({as_text('perplexity', level.value)})" for level in levels if level.value > top]
    return [point for point in points if point[1] <= top], [each for each in levels if each.value <= top], left_out


def _sites(run: RunFacts) -> Html:
    own = OwnRecords.of(run.summary)
    title = f"{own.metric} by site, each on its own test records"
    parts: list[Child] = [table(title, own.head, own.cells, numbers=range(1, len(own.head)))]
    parts += [paragraph(line) for line in own.sentences]
    if own.gain:
        parts.append(paragraph("On few test records, a difference may be chance."))
    if (found := run.summary.get("continued")) is not None:
        parts += [element("h3", {}, "Continued"), _continued(found)]
    if (used := run.summary.get("training_records")) is not None:
        parts += [element("h3", {}, "Records used"), _used(used)]
    return joined(parts)


def _continued(found: Mapping[str, Any]) -> Html:
    """Return what a run that continues another forgot and learned, and the budget of both."""
    rows = continued.cells(found)
    parts = [table(continued.title(found), continued.HEAD, rows, numbers=range(1, len(continued.HEAD)))]
    return joined([*parts, *map(paragraph, continued.sentences(found))])


def _used(found: Mapping[str, Mapping[str, int | None]]) -> Html:
    """Return a table of each site's training records and patients. Small numbers of either hide the row."""
    patients = {site: each["patients"] for site, each in found.items() if each["patients"] is not None}
    secret = hidden({site: each["records"] or 0 for site, each in found.items()}) | hidden(patients)
    rows = []
    for site, each in found.items():
        counts = [each["records"], *([each["patients"]] if patients else [])]
        rows.append([site, *("not shown" if site in secret else f"{count:,}" for count in counts)])
    head = ["site", "training records", *(["patients"] if patients else [])]
    parts: list[Child] = [table("Records in each site's training files", head, rows, numbers=range(1, len(head)))]
    if not patients:
        parts.append(paragraph("The study names no column of patients, so patients are not counted."))
    return joined([*parts, _hidden_note("records or patients") if secret else ""])


def _groups(run: RunFacts) -> Html:
    if not run.groups:
        return paragraph(f"Not computed: {run.no_groups or 'the run has no test records'}.")
    parts: list[Child] = []
    for kind, rows in run.groups.items():
        parts.append(element("h3", {}, f"By {kind}"))
        if len(rows) == 1:
            parts.append(paragraph("Not shown: all test records are in one group."))
        elif rows:
            parts.append(_cells({name: (count, right) for name, count, right in rows}, "fraction right", kind))
        else:
            parts.append(paragraph("Not shown: the column has so many values that one could identify a person."))
    return joined(parts)


def _cells(found: Mapping[str, tuple[int, float]], metric: str, kind: str) -> Html:
    """Return a table of counts and a metric without small cells, and the gap between the best and the worst row."""
    secret = hidden({name: count for name, (count, _) in found.items()})
    rows = []
    for name, (count, value) in found.items():
        rows.append([name, "not shown", "not shown"] if name in secret else [name, str(count), as_text(metric, value)])
    parts: list[Child] = [table(f"{metric} by {kind}", [kind, "test records", metric], rows, numbers=(1, 2))]
    open_ = {name: value for name, (_, value) in found.items() if name not in secret}
    if len(open_) > 1:
        parts.append(paragraph(f"By {kind}: {extremes(open_, metric, kind)}."))
    if secret:
        parts.append(_hidden_note())
    return joined(parts)


def _hidden_note(what: str = "records") -> Html:
    return element("p", {"class": "note"}, hidden_rows(what))


def _privacy(run: RunFacts) -> Html:
    if not run.privacy["private"]:
        return element("p", {"class": "bad"}, "This study promises no differential privacy.")
    costs, unit = run.privacy["epsilon"], run.privacy["unit"]["unit"]
    spent = {site: values["epsilon"] for site, values in costs["sites"].items()}
    rows = [
        [site, str(values["rounds"]), f"{values['epsilon']:.2f}", f"{costs['target'] - values['epsilon']:.2f}"]
        for site, values in costs["sites"].items()
    ]
    return joined(
        [
            paragraph(
                f"Epsilon measures how much the released adapters can reveal about one {unit}: it bounds how much more "
                f"likely any result becomes if the {unit} is added to the data or removed. Each round spends epsilon, "
                f"and it cannot be regained. The limit of the study is epsilon {costs['target']:g} at delta "
                f"{costs['delta']:g}."
            ),
            bar_chart(
                "Epsilon spent by each site, at most",
                spent,
                name="spent",
                limit=Level("limit of the study", costs["target"]),
                described=f"At most {max(spent.values(), default=0.0):.2f} of {costs['target']:g}.",
            ),
            table(
                f"Epsilon per {unit}, by site",
                ["site", "rounds invited", "epsilon spent, at most", "epsilon left in this study, at least"],
                rows,
                numbers=(1, 2, 3),
            ),
        ]
    )


def _costs(run: RunFacts, watts: float) -> Html:
    seconds = float(run.summary["seconds"])
    pairs: list[tuple[str, Child]] = [
        ("Adapters sent to sites", _megabytes(run.traffic.down)),
        ("Updates sent by sites", _megabytes(run.traffic.up)),
        ("Computing", f"{seconds:,.0f} seconds on one machine, including baselines and evaluation"),
        ("Memory", f"at most {run.summary['peak_memory_mb']:,} MB"),
    ]
    virtual = ((run.summary.get("scenario") or {}).get("virtual") or {}).get("seconds")
    if virtual is not None:
        pairs.append(("On the sites' networks", f"{virtual:,.0f} seconds on the virtual clock of the scenario"))
    energy = seconds * watts / 3600
    pairs.append(
        ("Energy", f"about {energy:,.1f} Wh, assuming that the machine draws {watts:g} W; it was not measured")
    )
    return facts(pairs)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB over all rounds and sites"


def _rounds(run: RunFacts) -> Html:
    _, sentence, kind = _verified(run)
    closed = [s for s in run.statements if s["type"] == "round-close"]
    alike = [
        (like, [statement["round"] for statement in found])
        for like, found in groupby(run.statements[-_ROUNDS_SHOWN:], key=_course)
    ]
    rows = [
        [f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0]), *like] for like, numbers in alike
    ]
    return joined(
        [
            element("p", {"class": kind}, prose(sentence)),
            paragraph(f"{len(closed)} of {len(run.statements)} rounds closed with a new adapter."),
            table(
                "Rounds" if len(run.statements) <= _ROUNDS_SHOWN else f"The last {_ROUNDS_SHOWN} rounds",
                ["round", "sites invited", "sites in the sum", "outcome"],
                rows,
                numbers=(1, 2),
            ),
        ]
    )


def _course(statement: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the number of sites that a round invited and summed, and its outcome."""
    if statement["type"] == "round-close":
        return str(len(statement["cohort"])), str(len(statement["survivors"])), "closed"
    return str(len(statement["cohort"])), "0", f"aborted: {statement['reason']}"


def _holds(document: Mapping[str, Any]) -> str:
    """Return what is differentially private, and against whom the promise holds."""
    trust = document["trust"]
    if trust["model"] == "distributed":
        conditions = ", or ".join(
            f"{each['corrupt']} of {each['sites']} sites, if {each['helpers']} or more of the others add their share"
            for each in trust["shares"]
        )
        return (
            "The sum over the sites of a round is differentially private, and so is everything computed from it. The "
            "update of one site is not differentially private by itself: masks hide it. The promise holds against the "
            f"coordinator together with {conditions}."
        )
    besides = (
        "In addition, the coordinator sees only sums over sites."
        if trust["secure_aggregation"] == "masked"
        else "The promise holds although the coordinator sees the update of each site."
    )
    return f"The update of each site is differentially private by itself, against everyone. {besides}"


def _statement(run: RunFacts) -> Html:
    document = run.privacy
    if not document["private"]:
        return paragraph("The study promises no differential privacy, so there is no privacy statement.")
    mechanism = document["mechanism"]
    training = mechanism["training_per_round"]
    clip = mechanism["clipping"]
    shared = document["trust"]["model"] == "distributed"
    where = "in the sum of a round: each site adds a share" if shared else "added at each site"
    parts: list[Child] = [
        paragraph(
            f"{_holds(document)} Neighbouring data sets differ in one {document['unit']['unit']}, added or removed."
        ),
        facts(
            [
                ("Noise multiplier", f"{training['noise_multiplier']:.4g}, {where}"),
                ("Clipping", f"{clip['kind']}, to norm {clip['norm']:g}"),
                ("Sampling", f"Poisson, rate {training['sampling_rate']:g}, steps per round: {training['steps']}"),
                ("Accountant", f"{document['accounting']['accountant']} of Opacus {document['accounting']['version']}"),
                ("Noise", document["randomness"]["noise"]),
            ]
        ),
    ]
    if document["simulated"]:
        parts.append(
            element(
                "p",
                {"class": "bad"},
                "The sites were simulated: their noise follows from a public seed and protects no "
                f"{document['unit']['unit']}. The figures of this statement would hold if real sites ran the same "
                "study with secret noise.",
            )
        )
    named = (("Not covered by these figures", "not_covered"), ("Side channels", "side_channels"))
    for title, key in named:
        items = [joined([element("b", {}, f"{name}. "), words]) for name, words in document[key].items()]
        parts += [element("h3", {}, title), bullets(items)]
    return joined(parts)


def _identity(run: RunFacts) -> Html:
    versions: Mapping[str, Any] = run.privacy["versions"]
    return facts(
        [
            ("Run directory", run.name),
            ("Study", run.study.digest),
            ("Adapter", str(run.summary["adapter_digest"])),
            ("Seed", str(run.study.seed)),
            (
                "Sampling",
                f"each step takes each {run.study.privacy.unit} with probability {run.study.training.sampling_rate:g}",
            ),
            ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ]
    )
