"""What a run waits for, for the person who started it: the stage, and the sites that have not answered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from privet.common.log.encoding import shown
from privet.common.progress import duration

CONSENT = "consent"
# Names in a line; the others are counted.
_NAMED = 5


@dataclass(frozen=True)
class Wait:
    """What a run waits for.

    Attributes:
        stage: What the sites are asked to do, as the end of a sentence: `train`.
        round: Number of the round; 0 between rounds.
        needed: How many sites the stage needs; 0 if it waits for each until its deadline.
        answered: Names of the sites that have done it.
        missing: The other sites by name, each with the reason if it is known, such as a refusal; otherwise empty.
        since: When the stage began, in Unix seconds.
    """

    stage: str
    round: int = 0
    needed: int = 0
    answered: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    since: float = 0.0


def several(names: Sequence[str]) -> str:
    """Return names as a list; of many, the first few and the number of the others."""
    first = ", ".join(names[:_NAMED])
    return first if len(names) <= _NAMED else f"{first} and {len(names) - _NAMED} others"


def sentence(wait: Wait, now: float) -> str:
    """Return in one line who is waited for, for what, and since when."""
    where = f"round {wait.round}: " if wait.round else ""
    since = f"since {time.strftime('%H:%M', time.localtime(wait.since))} ({duration(now - wait.since)})"
    done, missing = len(wait.answered), list(wait.missing)
    if not missing and not wait.needed:
        return f"{where}every site has answered; computing, {since}"
    count = f"{done} of {done + len(missing)} have"
    if wait.needed:  # only consent needs a number
        agreed = f"{done} of the {wait.needed} sites needed have agreed"
        count = agreed if done else f"none of the {wait.needed} sites needed has agreed yet"
    return f"{where}waiting for {several(missing) or 'sites'} to {wait.stage}, {since}; {count}"


def details(wait: Wait) -> list[str]:
    """Return a line for each site that is missing for a reason."""
    reasons = [(name, shown(why)) for name, why in wait.missing.items()]
    if wait.stage == CONSENT:
        reasons = [(name, why or "connected, has not answered yet") for name, why in reasons]
    return [f"  {name}: {why}" for name, why in reasons if why]
