"""The privacy statement as Markdown, for people: prose around the values of `privet.common.audit.privacy_statement`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

_PRIVATE = """\
# Privacy statement: {name}
{simulation}
## 1. Epsilon and delta

{promise}

{table}

## 2. Unit of privacy

The unit is {meaning}

Neighbouring data sets differ by adding or removing one {unit} at a site. {replacing}

## 3. Mechanism

{releases}

## 4. Accounting

Accountant: {accountant} of {package} {version}, numerical composition of privacy loss (Gopi et al. 2021), its upper
bound; {check}, which is looser, stands beside it. Epsilons are not added up: mechanisms are composed.{proven}

Composition scope: the {rounds} of this run, and nothing else. A site pays for each round that it was asked into,
whether or not its update arrived. The rounds are those that the coordinator recorded; a site has its own ledger to
compare them with.

## 5. Metrics

{metrics}

## 6. Trust model

{trust}

{secure_aggregation}

## 7. Randomness and implementation

Sampling and noise come from {stream}, keyed by the {key}. The noise is a {noise}, and what it is added to is rounded to
the same lattice first, so that the low bits of numbers do not show. Made with {versions}.

## 8. Side channels

{side_channels}

## 9. Not covered

{not_covered}
"""

_STEPS = """\
Poisson-subsampled Gaussian mechanism (DP-SGD). Each step draws each {drawn} independently with probability {rate:g}
(Poisson sampling, which is also what is accounted){rows}. Empty draws release noise and count like any other.

Each {unit}'s gradient is {clipping}. Their sum {summed}, and is divided by a public constant.

Noise multiplier {multiplier:.6g}, {steps} steps per round; calibrated once, for the whole study.{correlated}"""

_HEAD_START = """\
Round 1 is a head start, a Gaussian mechanism without sampling: every {unit} takes part. Its term, the features and
counts of its classes, is scaled to an L2 norm of at most {norm:g}. The sum of terms {summed}, with noise multiplier
{head:.6g}. The coordinator computes the head from it."""

_COUNTS = """\
Nothing is trained. The one round {what}: a Gaussian mechanism without sampling, in which every {unit} takes part{rows}.
A {unit} adds a vector of counts of an L2 norm of at most {bound:.6g}, which is multiplied by {scale:.6g}, so that its
norm is at most {norm:g}. The sum of vectors {summed}, with noise multiplier {multiplier:.6g}. The noise on each count
has a standard deviation of at least {deviation:.6g}. What is counted: {cells}."""

_COUNTED = {"statistics": "counts records", "evaluate": "measures an adapter"}

_PROVEN = """ It
is proven for mechanisms that are fixed before the first round, as a study fixes them; what a step computes may depend
on earlier steps. For studies that were designed after the results of this one it is not: there, a site's ledger counts
by Rényi divergence."""

_FIRST_REPLACING = "Replacing one is both, and costs up to twice the epsilon."
"""What statements of format 1 say. It is false at the same delta; kept so that they can be verified."""

_SUM = {
    "local": "gets Gaussian noise of clip norm times noise multiplier",
    "distributed": "over all sites of a round gets Gaussian noise of at least clip norm times noise multiplier, of "
    "which each site adds a share, rounded to integers, before anything leaves it",
}

_TRUST = {
    "local": """\
Local: each site adds all of its noise itself, before anything leaves it. The guarantee holds against everybody else:
the coordinator, the other sites, and whoever reads adapters or statements. It trusts the site's own machine, software
and files.""",
    "distributed": """\
Distributed: each site adds a share of the noise, and only the sum of a round's sites is private. The guarantee holds
against the coordinator together with the corrupt sites of the table below, and against whoever reads adapters or
statements, if at least the sites in its last column add their noise. A site that adds none counts as corrupt. It also
trusts secure aggregation against attackers of limited computing power, the site's own machine, software and files, and
that all sites' keys are those that their operators told each other.

Compared with a local guarantee of the same epsilon, the trained adapter has less noise in it, and the promise has more
conditions. Without any of them, if every other site is corrupt, a site's own share remains: {own}.

| sites asked | in a sum at least | of them corrupt at most | adding noise at least |
|---|---|---|---|
{shares}""",
}

_CORRELATED = """

Noise is correlated over {band} steps: a site takes back part of the noise of its earlier steps. A hash of a {unit}'s
own name decides its class. Each class is drawn in one of {band} steps, so that a {unit} pays for its class's steps
alone. The noise multiplier is that of all the noise that hides one draw. A site that is corrupt in any step of the
study counts as corrupt in all."""

_OPEN = """\
# Privacy statement: {name}
{simulation}
## 1. Epsilon and delta

**There is no differential-privacy guarantee.** The study's privacy mode is none: sites added no noise, and epsilon is
infinite for the {rounds} of this run. Updates, adapters and metrics may reveal single records.

## 2. Trust model

{secure_aggregation}

## 3. Not covered

Everything: nothing here bounds what can be learnt about one person.
"""

_SIMULATION = """
**A simulation.** Its noise follows from a public seed and protects nobody. The numbers are those that sites with noise
of their own would have.
"""

_MEANING = {
    "record": "one record: one row of a site's files. A person with several rows is protected less.",
    "patient": "one patient: all rows of a site that share a value of the column `{column}`.",
}

_CLIPPING = {
    "flat": "clipped to L2 norm {norm:g}",
    "automatic": "scaled to an L2 norm just below {norm:g} (automatic clipping, Bu et al. 2023)",
    "adaptive": "clipped to an L2 norm that begins each round at {norm:g} and follows a noised quantile (Andrew et al. "
    "2021), whose cost is within the noise multiplier",
}


def _clipping(clipping: Mapping[str, Any]) -> str:
    found = _CLIPPING[clipping["kind"]].format(**clipping)
    share = clipping.get("head_share")
    return found if share is None else f"{found}, of whose square the head, clipped apart, has {share:g}"


def privacy_markdown(document: Mapping[str, Any]) -> str:
    """Return a privacy statement as Markdown."""
    fields = {
        "name": document["study"]["name"],
        "simulation": _SIMULATION if document["simulated"] else "",
        "rounds": _rounds(document["run"]["rounds_closed"] + document["run"]["rounds_aborted"]),
        "secure_aggregation": _secure_aggregation(document["trust"]),
    }
    if not document["private"]:
        return _wrapped(_OPEN.format(**fields))
    mechanism, training = document["mechanism"], document["mechanism"]["training_per_round"]
    unit = training["unit"]
    fields |= {
        "promise": _promise(document, unit),
        "table": _table(document["epsilon"]["sites"]),
        "unit": unit,
        "drawn": f"{unit} of its class" if "band" in training else unit,
        "correlated": _CORRELATED.format(unit=unit, band=training["band"]) if "band" in training else "",
        "replacing": _replacing(document, unit),
        "proven": "" if document["format"] == 1 else _PROVEN,
        "meaning": _MEANING[unit].format(column=document["unit"]["column"]),
        "rate": training["sampling_rate"],
        "norm": mechanism["clipping"]["norm"],
        "steps": training["steps"],
        "multiplier": training["noise_multiplier"],
        "rows": f", and at most {mechanism['records_per_unit_and_step']} of its rows" if unit == "patient" else "",
        "clipping": _clipping(mechanism["clipping"]),
        "summed": _SUM[document["trust"]["model"]],
        "trust": _trust(document),
        "metrics": _metrics(mechanism["validation_per_round"]),
        "versions": ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
        "side_channels": _listed(document["side_channels"]),
        "not_covered": _listed(document["not_covered"]),
    }
    # Without rounds that train, the head start is the only round.
    if "counts" in mechanism:
        fields["releases"] = _counts(mechanism["counts"], fields)
        fields["metrics"] = "The counts of section 3 are all that sites release."
        return _wrapped(_PRIVATE.format(**fields, **document["accounting"], **document["randomness"]))
    parts = [] if "head_start" in mechanism and document["run"]["rounds_planned"] == 1 else [_STEPS.format(**fields)]
    if "head_start" in mechanism:
        parts.append(_HEAD_START.format(**fields, head=mechanism["head_start"]["noise_multiplier"]))
    fields["releases"] = "\n\n".join(parts)
    return _wrapped(_PRIVATE.format(**fields, **document["accounting"], **document["randomness"]))


def _counts(counted: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    rows = f"{fields['rows'].removeprefix(', and').rstrip()}" if counted["kind"] == "statistics" else ""
    return _COUNTS.format(
        **{**fields, "rows": rows and f", with{rows}"},
        what=_COUNTED[counted["kind"]],
        bound=counted["bound"],
        scale=counted["scale"],
        deviation=fields["multiplier"] * fields["norm"] / counted["scale"],
        cells="; ".join(counted["cells"]),
    )


def _promise(document: Mapping[str, Any], unit: str) -> str:
    costs = document["epsilon"]
    planned = f"The study promised epsilon {costs['target']:g} over {_rounds(document['run']['rounds_planned'])}."
    if not costs["sites"]:
        return f"No round has ended yet: nothing was released, and epsilon is 0. {planned}"
    run, delta = rounded_up(costs["run"]), f"{costs['delta']:g}"
    shared = document["trust"]["model"] == "distributed"
    against = " against the coordinator together with the sites that section 6 allows for" if shared else ""
    whose = "they make" if shared else "anybody makes"
    alone = document["trust"].get("own_share_epsilon")
    left = "nothing that counts" if alone is None else f"epsilon {rounded_up(alone)}, at the same delta"
    everybody = f" Against everybody, by each site's own noise alone: {left}." if shared else ""
    everywhere = (
        f"A {unit} with data at several sites is not covered: its gradients meet in one sum."
        if shared
        else f"For a {unit} with data at every site, at most {rounded_up(costs['at_every_site'])}."
    )
    return (
        f"What any one site released in this run is ({run}, {delta})-differentially private for one {unit}{against}. "
        f"With or without that {unit}'s data, the probability of whatever {whose} of it differs by a factor of at most "
        f"{rounded_up(math.exp(costs['run']))}, and by at most {delta} more. {planned}\n\n"
        f"For the run: epsilon {run} for a {unit} whose data lie at one site. {everywhere}"
        + ("" if document["format"] == 1 else everybody)
    )


def _replacing(document: Mapping[str, Any], unit: str) -> str:
    if document["format"] == 1:
        return _FIRST_REPLACING
    if not document["epsilon"]["sites"]:
        return f"Replacing one {unit} by another is both, and can cost more than twice the epsilon at the same delta."
    found = document["epsilon"]["replacing"]
    pair, same = found["epsilon"], found["epsilon_at_same_delta"]
    group = (
        f"removing and adding together are ({rounded_up(pair)}, {_up_digits(found['delta'])})-differentially private"
        if pair is not None
        else "group privacy promises nothing at this epsilon and delta"
    )
    alike = (
        f"At delta {document['epsilon']['delta']:g}, replacing one costs an epsilon of at most {rounded_up(same)}."
        if same is not None
        else f"At delta {document['epsilon']['delta']:g} nothing is promised for replacing one."
    )
    return f"Replacing one {unit} by another is both: {group}. {alike}"


def _trust(document: Mapping[str, Any]) -> str:
    trust = document["trust"]
    if trust["model"] == "local":
        return _TRUST["local"]
    own = trust["own_share_epsilon"]
    left = "nothing that counts" if own is None else f"epsilon {rounded_up(own)}, at the same delta"
    rows = [[row[key] for key in ("sites", "survivors", "corrupt", "helpers")] for row in trust["shares"]]
    lines = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return _TRUST["distributed"].format(own=left, shares=lines)


def _table(sites: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| site | rounds | epsilon | epsilon by rdp |", "|---|---|---|---|"]
    lines += [
        f"| {site} | {c['rounds']} | {rounded_up(c['epsilon'])} | {rounded_up(c['epsilon_rdp'])} |"
        for site, c in sites.items()
    ]
    return "\n".join(lines)


def _metrics(validation: Mapping[str, Any] | None) -> str:
    if validation is None:
        return "Sites release no metrics."
    return (
        "Sites release one validation sum per round: units, capped losses and hits, with Gaussian noise of noise "
        f"multiplier {validation['noise_multiplier']:.6g} over all held-out units. A {validation['unit']} is either "
        "trained on or held out, so that it pays for one of the two, and epsilon is the larger cost."
    )


def _secure_aggregation(trust: Mapping[str, Any]) -> str:
    if trust["secure_aggregation"] == "plain":
        return "Secure aggregation is off: the coordinator sees each site's update by itself."
    league = trust["sites_in_league"]
    if trust["model"] == "distributed":
        return (
            "Secure aggregation carries the guarantee: the coordinator learns a round's sum and no single site's part. "
            "Sites reveal nothing for a sum over fewer sites than the table says; the round then ends without one."
        )
    return (
        "Secure aggregation comes on top: the coordinator, with up to "
        f"{league} site{'' if league == 1 else 's'} in league with it, learns sums and no single other update. Epsilon "
        "does not count on it."
    )


def _listed(points: Mapping[str, str]) -> str:
    return "\n".join(f"* **{name.capitalize()}.** {text}" for name, text in points.items())


def _wrapped(text: str) -> str:
    """Return Markdown with paragraphs filled to 100 columns. Headings, tables and lists stay as they are."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(b if b.startswith(("#", "|", "* ")) else textwrap.fill(b, 100) for b in blocks) + "\n"


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"


def rounded_up(number: float) -> str:
    """Return a number with four decimals, rounded up: a rounded bound must stay a bound."""
    return f"{math.ceil(number * 1e4) / 1e4:.4f}"


def _up_digits(number: float) -> str:
    """Return a number with three significant digits, rounded up: a rounded bound must stay a bound."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / unit) * unit:.3g}"
