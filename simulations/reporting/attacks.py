"""The part of a report that shows what attacks found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from privet.common.errors import StateError
from privet.simulations.reporting.html import Html, bullets, element, joined, paragraph, table

Result = Mapping[str, Any]
_MISSING = "No attack was tried on this run. `privet attack --help` lists them."


def attacks_section(attacks: Mapping[str, Result]) -> Html:
    """Return what each attack found, or that none was tried.

    Raises:
        StateError: A result is not what the attack writes.
    """
    if not attacks:
        return paragraph(_MISSING)
    intro = paragraph(
        "Each attack was also tried without protection. A protected arm that does as badly as an unprotected one shows "
        "that the attack is weak, not that the protection is strong."
    )
    parts = []
    for name, found in attacks.items():
        try:
            parts.append(_SECTIONS[name](found))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = f"the result of the attack {name} cannot be read ({type(error).__name__})"
            raise StateError(problem, "run the attack again") from None
    return joined([intro, *parts])


def _canaries(found: Result) -> Html:
    rows = []
    for arm in found["arms"]:
        audit, claim = arm["audit"], arm["claimed_epsilon"]
        verdict = "-" if claim is None else "holds" if arm["holds"] else "REFUTED"
        bound = f"{audit['epsilon']:.2f}"
        guessed = f"{audit['right']} of {audit['guesses']}"
        rows.append([arm["arm"], guessed, bound, "none" if claim is None else f"{claim:g}", verdict])
    return joined(
        [
            element("h3", {}, "Planted records"),
            paragraph(
                f"Of {found['canaries']} made-up records, {found['included']} were hidden among the records of one "
                "site, by the toss of a coin each. From the released adapter, the auditor guesses which. The more "
                "guesses are right, the larger the epsilon that the training must have spent, at 95 % confidence "
                "(Steinke et al. 2023). A promise holds as long as that bound lies below it."
            ),
            table(
                "Lower bound on epsilon from one run of each arm",
                ["arm", "right guesses", "epsilon at least", "promised", "the promise"],
                rows,
                numbers=(1, 2, 3),
            ),
        ]
    )


def _membership(found: Result) -> Html:
    rows = []
    for arm in found["arms"]:
        for score, name in (("loss", "loss threshold"), ("lira", "LiRA"), ("blind", "without looking")):
            told = arm[score]
            low, high = told["interval"]
            cells = [f"{arm['arm']}, {arm['target']}", name, f"{told['auc']:.3f}", f"{low:.3f} to {high:.3f}"]
            rows.append([*cells, *(_rate(rate) for rate in told["rates"])])
    heads = [f"hits at {100 * rate['at']:g} %" for rate in found["arms"][0]["loss"]["rates"]]
    return joined(
        [
            element("h3", {}, "Who was in the training data?"),
            paragraph(
                "Two attacks guess whether a record was trained on; 0.5 is guessing blindly, 1 is always right. In the "
                "game, a copy of the study trains on a random half of the records. The released adapter is compared on "
                "its training and its test records, which may differ by themselves: the row without looking shows how "
                "far that alone carries."
            ),
            table(
                f"Area under the curve with 95 % interval; {found['scored']} records, {found['shadows']} shadow "
                "adapters an arm; hits: members found at that rate of false alarms, * from too few records to tell",
                ["arm, target", "attack", "area", "interval", *heads],
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
            element("h3", {}, "Reading words off an update"),
            paragraph(
                f"Whoever receives one site's update of rank {found['rank']}, trained on one short record, looks for "
                "the words whose traces it holds. The last column is what the same search finds of records that were "
                "not in the update: chance."
            ),
            table(
                "Words read, with 95 % interval",
                ["update", "words read", "interval", "records read whole", "chance"],
                rows,
                numbers=(1, 2, 3, 4),
            ),
        ]
    )


def _poisoning(found: Result) -> Html:
    rows = [
        [
            f"{arm['attack']}, {arm['defence']}",
            f"{100 * arm['accuracy']:.1f} %",
            f"{100 * arm['success']:.1f} %",
            str(arm["rounds_aborted"]),
            str(arm["groups_left_out"]),
        ]
        for arm in found["arms"]
    ]
    return joined(
        [
            element("h3", {}, "Sites that mean harm"),
            paragraph(
                f"{found['malicious']} of {found['sites']} sites tried to spoil the model, or to plant the trigger "
                f"“{found['trigger']}” that makes it say “{found['target']}”."
            ),
            table(
                "Accuracy, and how often the attack has its way",
                ["attack, defence", "accuracy", "attack succeeds", "rounds ended", "groups left out"],
                rows,
                numbers=(1, 2, 3, 4),
            ),
            bullets(["Defences look at the length of updates. Poison of honest length passes them."]),
        ]
    )


_SECTIONS: Mapping[str, Callable[[Result], Html]] = {
    "canaries": _canaries,
    "membership": _membership,
    "reconstruction": _reconstruction,
    "poisoning": _poisoning,
}
