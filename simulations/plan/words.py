"""A planner's advice in words and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from privet.common.progress import number_of
from privet.simulations.plan.declared import Declared
from privet.simulations.plan.search import Advice, Estimate
from privet.simulations.plan.world import MOST_HIDDEN, MOST_WIDTH
from privet.simulations.terminal.explain import NETWORKS, bytes_up, exchanges_of, seconds_on

_UNKNOWN = (
    "How well your classes come apart is not known before records are read; the three columns assume it.",
    "The stand-in is a classifier with a low-rank adapter on Gaussian clusters, shaped after a sentence encoder's "
    "features of generated triage notes. It has no tokens, and sites differ in nothing but their size.",
    "Its accuracy is not a forecast. Differences between settings on equal data are what it is for.",
    "Intervals are over draws of synthetic records and noise, and not over kinds of data.",
)


def _traffic(advice: Advice, declared: Declared) -> tuple[int, int]:
    """Return the bytes that a site sends and receives in a round that trains, about."""
    consortium, study = declared.consortium, advice.study
    adapter = consortium.modules * advice.choice.rank * consortium.width
    head = consortium.values[1]
    trained = adapter + head * study.training.train_head if study.training.rounds else head
    return bytes_up(study, trained), 4 * (adapter + head)


def advice_document(advice: Advice, declared: Declared) -> dict[str, Any]:
    """Return the advice as plain JSON values."""
    consortium = declared.consortium
    sent, received = _traffic(advice, declared)
    return {
        "units": list(consortium.units),
        "records_per_unit": consortium.records,
        "classes": consortium.classes,
        "width": consortium.width,
        "modules": consortium.modules,
        "base_known": declared.known,
        "choice": advice.choice.document(),
        "tried": advice.tried,
        "accuracy": {name: each.document() for name, each in advice.accuracy.items()},
        "without_privacy": {name: each.document() for name, each in advice.without.items()},
        "noise_to_signal": round(advice.ratio, 2),
        "costs": {name: each.document() for name, each in advice.costs.items()},
        "promises": {name: each.document() for name, each in advice.promises.items()},
        "bytes_up_per_round_and_site": sent,
        "bytes_down_per_round_and_site": received,
        "not_known": _notes(declared),
    }


def advice_sentence(advice: Advice) -> str:
    """Return the advice in one sentence."""
    choice = advice.choice
    if not choice.rounds:
        return "Recommended: the head start alone, with all of epsilon; training does not pay for its noise here."
    parts = [f"{number_of(choice.rounds, 'round')} of one step at sampling rate {choice.rate:g}"]
    if choice.start != "zero":
        parts.insert(0, f"a head start with {choice.share:g} of epsilon")
    parts.append(
        {"fixed": "the head stays as it starts", "apart": "head and adapter clipped apart"}.get(choice.head, "")
    )
    if choice.band:
        parts.append(f"noise correlated over {choice.band} steps")
    if choice.average != "none":
        parts.append("the average of the last adapters published")
    parts.append(f"rank {choice.rank}, Adam at {choice.speed:g}")
    return f"Recommended: {', '.join(filter(None, parts))}."


def advice_lines(advice: Advice, declared: Declared) -> Iterator[str]:
    """Yield the lines that a terminal shows."""
    consortium, study = declared.consortium, advice.study
    promise = study.privacy.promise
    yield (
        f"promise     epsilon {promise.epsilon:g} at delta {promise.delta:g} per {study.privacy.unit}, "
        f"mode {study.privacy.mode}: as the study says"
    )
    yield (
        f"sites       {len(consortium.units)} with {consortium.total} units, {consortium.records:g} records each; "
        f"{consortium.classes} classes"
    )
    yield (
        f"model       width {consortium.width}, {number_of(consortium.modules, 'adapted layer')}"
        + ("" if declared.known else "; the base is not on this machine, so these are those of a small encoder")
    )
    yield f"tried       {advice.tried} settings, the better ones in more draws"
    yield ""
    yield f"{'accuracy of the stand-in, in %':<44}" + "".join(f"{name:>14}" for name in advice.accuracy)
    yield f"{'  as recommended':<44}" + "".join(f"{_text(each):>14}" for each in advice.accuracy.values())
    yield f"{'  without privacy':<44}" + "".join(f"{_text(each):>14}" for each in advice.without.values())
    if advice.promises:
        yield ""
        yield f"{'with another promise, usual':<44}"
        yield from (f"  {words:<42}{_text(each):>14}" for words, each in advice.promises.items())
    if advice.costs:
        yield ""
        yield "one setting changed, in points"
        yield from (
            f"  {words:<42}{_text(each, signed=True):>14}"
            for words, each in sorted(advice.costs.items(), key=lambda item: -item[1].value)
        )
    yield ""
    if advice.choice.rounds:
        yield f"noise       {advice.ratio:.1f} times the mean gradient of a round, in norm"
    sent, received = _traffic(advice, declared)
    times = (
        f"{seconds_on(*network, exchanges_of(study, len(declared.consortium.units)), sent + received):.2g} s at {name}"
        for name, network in NETWORKS.items()
    )
    yield f"traffic     about {sent / 1e6:.2f} MB up and {received / 1e6:.2f} MB down per site and round"
    yield f"            {'; '.join(times)}"
    yield ""
    yield "what it does not know"
    yield from (f"  {line}" for line in _notes(declared))


def _notes(declared: Declared) -> list[str]:
    consortium = declared.consortium
    found = list(_UNKNOWN)
    if consortium.width > MOST_WIDTH or consortium.modules * consortium.rank > MOST_HIDDEN:
        found.append(
            f"The stand-in has at most {MOST_WIDTH} values in a feature and {MOST_HIDDEN} rows of A; yours is larger, "
            "and its noise weighs more."
        )
    return found


def _text(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.1f} ±{estimate.half:.1f}"
