"""The section of a report about attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from privet.client.pages.html import Html, bullets, element, joined, paragraph, table
from privet.common.errors import StateError
from privet.simulations.attacks.labels import label

Result = Mapping[str, Any]
_TARGETS = {"game": "trained on a half", "released": "released adapter"}
_MISSING = "No attack was tried on this run. The command `privet attack --help` lists the attacks."


def attacks_section(attacks: Mapping[str, Result]) -> Html:
    """Return the results of each attack, or a sentence that none was tried.

    Raises:
        StateError: A result file has not the fields that the attack writes.
    """
    if not attacks:
        return paragraph(_MISSING)
    intro = paragraph(
        "Each attack was also tried on a baseline without protection. If an attack fails on the baseline too, the "
        "attack is weak: its failure on the run with privacy does not show that the protection is strong."
    )
    parts = []
    for name, found in attacks.items():
        try:
            parts.append(_SECTIONS[name](found))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = f"the result of the attack {name} lacks a field or has a wrong value ({type(error).__name__})"
            raise StateError(problem, f"run the attack again: `privet attack {name} --help`") from None
    return joined([intro, *parts])


def _canaries(found: Result) -> Html:
    rows = []
    for arm in found["arms"]:
        audit, claim = arm["audit"], arm["claimed_epsilon"]
        verdict = "-" if claim is None else "consistent" if arm["holds"] else "REFUTED"
        bound = f"{audit['epsilon']:.2f}"
        guessed = f"{audit['right']} of {audit['guesses']}"
        rows.append([label(arm["arm"]), guessed, bound, "none" if claim is None else f"{claim:g}", verdict])
    return joined(
        [
            element("h3", {}, "Planted records (canaries)"),
            paragraph(
                f"The auditor made up {found['canaries']} records and tossed a coin for each: {found['included']} of "
                "them were added to the records of one site. From the released adapter, the auditor guesses which "
                "ones. The more guesses are right, the larger is the epsilon that the training must have spent, at "
                "95 % confidence (Steinke et al. 2023). A bound above the promised epsilon refutes the promise. A "
                "bound below it is consistent with the promise, but does not prove it."
            ),
            table(
                "Lower bound on epsilon, from one training run each",
                ["training", "right guesses", "epsilon at least", "promised epsilon", "the promise is"],
                rows,
                numbers=(1, 2, 3),
            ),
        ]
    )


def _membership(found: Result) -> Html:
    rows = []
    for arm in found["arms"]:
        for score, name in (("loss", "loss threshold"), ("lira", "LiRA"), ("blind", "control")):
            told = arm[score]
            low, high = told["interval"]
            cells = [
                f"{label(arm['arm'])}; {_TARGETS.get(arm['target'], arm['target'])}",
                name,
                f"{told['auc']:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
            rows.append([*cells, *(_rate(rate) for rate in told["rates"])])
    heads = [f"found at {100 * rate['at']:g} %" for rate in found["arms"][0]["loss"]["rates"]]
    return joined(
        [
            element("h3", {}, "Membership inference"),
            paragraph(
                "Two attacks guess whether a record was in the training data. An area of 0.5 is as good as guessing, "
                "and 1 is always right. For the first target, the study is trained again on a random half of the "
                "records, and the attack tells the two halves apart. For the second target, the attack tells the "
                "training records of the released adapter from its test records. These may differ by themselves: the "
                "control does not depend on the training of the target, and shows how well that difference alone "
                "tells them apart."
            ),
            table(
                f"Area under the ROC curve with 95 % interval; {found['scored']} records, {found['shadows']} shadow "
                "adapters for each training. Found at x %: members found at x % false alarms (* too few records to "
                "tell)",
                ["training; target", "attack", "area", "95 % interval", *heads],
                rows,
                numbers=(2, 3, 4, 5),
            ),
        ]
    )


def _rate(rate: Result) -> str:
    return f"{100 * rate['tpr']:.1f} %{'' if rate['resolved'] else ' *'}"


def _reconstruction(found: Result) -> Html:
    rows = []
    for arm in found["arms"]:
        low, high = arm["interval"]
        rows.append(
            [
                arm["arm"],
                f"{100 * arm['recovered']:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{arm['records_exact']} of {arm['records']}",
                f"{100 * arm['control']:.1f} %",
            ]
        )
    return joined(
        [
            element("h3", {}, "Reconstruction of words from an update"),
            paragraph(
                f"The attacker receives an update of rank {found['rank']}, trained on one short record of each site, "
                "and searches it for traces of words. The last column shows how many words of records outside the "
                "update the same search finds. That is the result of chance."
            ),
            table(
                "Words recovered, with 95 % interval",
                ["update", "words recovered", "95 % interval", "records recovered in full", "by chance"],
                rows,
                numbers=(1, 2, 3, 4),
            ),
        ]
    )


def _poisoning(found: Result) -> Html:
    rows = [
        [
            f"{_no(arm['attack'], 'attack')}, {_no(arm['defence'], 'defence')}",
            f"{100 * arm['accuracy']:.1f} %",
            f"{100 * arm['success']:.1f} %",
            str(arm["rounds_aborted"]),
            str(arm["groups_left_out"]),
        ]
        for arm in found["arms"]
    ]
    return joined(
        [
            element("h3", {}, "Poisoning by malicious sites"),
            paragraph(
                f"{found['malicious']} of {found['sites']} sites tried to damage the model, or to plant a backdoor: a "
                f"text with the trigger “{found['trigger']}” gets the label “{found['target']}”."
            ),
            table(
                "Accuracy of the model, and success of the attack on the test records",
                ["attack, defence", "accuracy", "attack succeeds", "rounds aborted", "groups left out"],
                rows,
                numbers=(1, 2, 3, 4),
            ),
            bullets(["The defences look only at the length of updates. Harmful updates of ordinary length pass them."]),
        ]
    )


def _no(name: str, what: str) -> str:
    return f"no {what}" if name == "none" else name


_SECTIONS: Mapping[str, Callable[[Result], Html]] = {
    "canaries": _canaries,
    "membership": _membership,
    "reconstruction": _reconstruction,
    "poisoning": _poisoning,
}
