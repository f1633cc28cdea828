"""The settings that a planner chooses among, and the study that follows from a choice."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from privet.common.study.study import Study

Start = Literal["zero", "class means", "class means alone"]
Head = Literal["with the adapter", "apart", "fixed"]

# With Adam at the server, clipping to any norm below most gradients gives the same steps.
_CLIP_NORM = 1.0
_HEAD_SHARE = 0.3
# Adam steps by the size of each value's updates, noise included.
_TAU = 1e-8


@dataclass(frozen=True)
class Choice:
    """One choice of settings.

    Attributes:
        start: Where the head starts. "class means alone" trains nothing else.
        share: Part of epsilon of a head start before training.
        head: How the head's gradient is clipped; "fixed" does not train it.
        rounds: Rounds that train, of one step each.
        rate: Sampling rate.
        speed: Learning rate of the server's Adam for the adapter.
        head_speed: The same for the head, over `speed`.
        band: Steps that noise is correlated over; 0: it is independent.
        average: What the last round publishes.
        rank: Rank of the adapter.
    """

    start: Start
    share: float
    head: Head
    rounds: int
    rate: float
    speed: float
    head_speed: float
    band: int
    average: Literal["none", "tail"]
    rank: int

    def document(self) -> dict[str, Any]:
        """Return the choice as plain JSON values."""
        return asdict(self)


def grid(study: Study) -> Iterator[Choice]:
    """Yield every choice for a study that makes sense."""
    yield alone(study)
    ranks = sorted({study.lora.rank, 4})
    starts: tuple[tuple[Start, float], ...] = (("zero", 0.0), ("class means", 0.5))
    steps = ((20, 0.2), (40, 0.1), (40, 0.2), (80, 0.2), (40, 0.5))
    speeds = ((1e-3, 1.0), (3e-3, 1.0), (3e-3, 3.0), (6e-3, 1.0))
    for (start, share), head, (rounds, rate), (speed, over), banded, average, rank in product(
        starts, ("with the adapter", "apart", "fixed"), steps, speeds, (False, True), ("none", "tail"), ranks
    ):
        band = round(1 / rate) if banded else 0
        if (head == "fixed" and (start == "zero" or over != 1)) or (banded and (not study.distributed or band < 2)):
            continue
        yield Choice(start, share, head, rounds, rate, speed, over, band, average, rank)  # type: ignore[arg-type]


def alone(study: Study) -> Choice:
    """Return the head start that nothing follows."""
    return Choice("class means alone", 1.0, "fixed", 0, 0.1, 1e-3, 1.0, 0, "none", study.lora.rank)


def neighbours(choice: Choice, study: Study) -> Iterator[tuple[str, Choice]]:
    """Yield choices that differ in one respect, with that respect in words."""
    if not choice.rounds:
        return
    yield "head start alone, no training", alone(study)
    if choice.start == "zero":
        yield "with a head start", replace(choice, start="class means", share=0.5)
    else:
        fixed = choice.head == "fixed"
        yield (
            "without a head start",
            replace(choice, start="zero", share=0.0, head="with the adapter" if fixed else choice.head),
        )
        other = 0.25 if choice.share == 0.5 else 0.5
        yield f"{other:g} of epsilon for the head start", replace(choice, share=other)
        yield ("head trained, too", replace(choice, head="with the adapter")) if fixed else (
            "head fixed after its start", replace(choice, head="fixed", head_speed=1.0)
        )  # fmt: skip
    if choice.head == "apart":
        yield "head and adapter clipped together", replace(choice, head="with the adapter")
    elif choice.head == "with the adapter":
        yield "head and adapter clipped apart", replace(choice, head="apart")
    yield "half the rounds", replace(choice, rounds=max(1, choice.rounds // 2), band=0)
    yield "twice the rounds", replace(choice, rounds=2 * choice.rounds)
    if choice.band == 0:
        yield "half the sampling rate", replace(choice, rate=choice.rate / 2)
    yield "a third of the learning rate", replace(choice, speed=choice.speed / 3)
    yield "three times the learning rate", replace(choice, speed=3 * choice.speed)
    band = round(1 / choice.rate)
    if choice.band:
        yield "independent noise", replace(choice, band=0)
    elif study.distributed and 2 <= band <= choice.rounds:
        yield "correlated noise", replace(choice, band=band)
    yield (
        ("the average of the last adapters", replace(choice, average="tail"))
        if choice.average == "none"
        else ("the last adapter, no average", replace(choice, average="none"))
    )


def changed(document: Mapping[str, Any], choice: Choice, largest: int) -> dict[str, Any]:
    """Return a study file's values with a choice in them; what the study promises, and its data, stay.

    Args:
        document: The values, with tables other than the study's.
        choice: The choice.
        largest: Largest count of units that a site declares.
    """
    found = copy.deepcopy(dict(document))
    trains = choice.rounds > 0
    found["lora"] = {**found["lora"], "rank": choice.rank, "dropout": 0.0, "start": "inputs"}
    found["lora"].setdefault("alpha", 2.0 * choice.rank)
    training: dict[str, Any] = {
        "rounds": choice.rounds, "local_steps": 1, "sampling_rate": choice.rate, "optimizer": "sgd",
        "learning_rate": 1.0,
    }  # fmt: skip
    if choice.start != "zero":
        training |= {"head_start": "class-means", **({"head_start_share": choice.share} if trains else {})}
        if trains and choice.head == "fixed":
            training["train_head"] = False
    given = found.get("aggregation", {})
    aggregation: dict[str, Any] = {
        "method": "ffa", "optimizer": "adam", "learning_rate": choice.speed, "tau": _TAU,
        "schedule": {"shape": "linear", "floor": 0.1},
        "largest_count": max(largest, given.get("largest_count", 2 * largest)),
    }  # fmt: skip
    if trains and choice.head != "fixed":
        aggregation["head_learning_rate"] = choice.speed * choice.head_speed
    if trains and choice.average != "none":
        aggregation["average"] = choice.average
    dropped = (
        "noise",
        "band",
        "clipping",
        "stability",
        "head_clip_share",
        "quantile",
        "quantile_rate",
        "quantile_share",
    )
    privacy = {key: value for key, value in found["privacy"].items() if key not in dropped}
    if privacy["mode"] != "none":
        privacy["clip_norm"] = _CLIP_NORM
        if trains and choice.head == "apart":
            privacy |= {"head_clip_share": _HEAD_SHARE, "clipping": "automatic"}
        if trains and choice.band:
            privacy |= {"noise": "banded", "band": min(choice.band, choice.rounds)}
    return found | {"training": training, "aggregation": aggregation, "privacy": privacy}


def with_promise(document: Mapping[str, Any], **promise: Any) -> dict[str, Any]:
    """Return a study file's values with another mode or epsilon; mode none drops what it does not take."""
    found = copy.deepcopy(dict(document))
    found["privacy"] = {**found["privacy"], **promise}
    if found["privacy"]["mode"] == "none":
        found["privacy"] = {"mode": "none"}
    return found
