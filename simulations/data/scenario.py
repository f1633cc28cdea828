"""What can happen to a simulated federation: how its data is split, what its networks carry, who drops out, who lies.

These are tables of `[simulation]`; every field is checked before anything starts. Nothing here is part of the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from privet.common.study.sections import Column, Name, Positive, Section
from privet.common.study.study import Study

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Positive, Positive]
Stage = Literal["advertise", "share", "train", "confirm", "reveal"]
STAGES: tuple[Stage, ...] = ("advertise", "share", "train", "confirm", "reveal")
"""The exchanges of a masked round, in order. A plain round has `train` alone."""


class Partition(Section):
    """One pool of records, dealt out to sites. All records of one unit of privacy go to one site."""

    split: Literal["iid", "dirichlet", "quantity", "column"]
    """iid: equal parts at random. dirichlet: each label's records by shares of their own, drawn from a symmetric
    Dirichlet distribution (Hsu, Qi and Brown 2019). quantity: at random, the i-th largest site in proportion to
    i^-exponent. column: a site for each value of `column`."""
    sites: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Number of sites. With split = "column", the values decide."""
    concentration: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """For dirichlet: small is one label per site, large is the same mix everywhere."""
    exponent: Annotated[float, Field(ge=0, le=10)] | None = None
    """For quantity."""
    column: Column | None = None
    """For column."""
    least_units: Annotated[int, Field(ge=1)] = 4
    """Units that every site gets, taken from the largest. Values of a column with fewer are left out, and said so."""
    train: tuple[Path, ...] = ()
    """For data = "files": the files that are pooled for training."""
    test: tuple[Path, ...] = ()
    """For data = "files": the files that are pooled for the test, and dealt out by the same shares."""
    patients: Annotated[int, Field(ge=2, le=100_000)] = 1600
    """For data = "notes": patients generated, each with 2.2 training notes on average."""

    @model_validator(mode="after")
    def _what_the_split_takes(self) -> Self:
        needed = {"iid": (), "dirichlet": ("concentration",), "quantity": ("exponent",), "column": ("column",)}[
            self.split
        ]
        for name in ("concentration", "exponent", "column"):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs it" if name in needed else "does not take it"
                raise ValueError(f'{name}: split = "{self.split}" {verb}')
        if (self.sites is None) != (self.split == "column"):
            verb = "does not take it" if self.split == "column" else "needs it"
            raise ValueError(f'sites: split = "{self.split}" {verb}')
        return self


class Network(Section):
    """The sites' lines and machines, for the virtual clock. Each site draws from each range once, log-uniformly."""

    down_mbit: Range = (20.0, 200.0)
    """Megabits per second towards a site."""
    up_mbit: Range = (5.0, 50.0)
    """Megabits per second from a site."""
    latency_ms: Range = (10.0, 60.0)
    """Milliseconds of a round trip."""
    records_per_second: Range = (5.0, 50.0)
    """Training records that a site's machine works through in a second."""
    coordinator_mbit: Positive = 1000.0
    """Megabits per second of the coordinator's line, each way, shared by all sites."""
    step_seconds: Positive = 120.0
    """How long the coordinator waits for an exchange without training."""
    training_seconds: Positive = 3600.0
    """How long it waits for the exchange in which sites train."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("down_mbit", "up_mbit", "latency_ms", "records_per_second"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the range [{low}, {high}] is empty")
        return self


class Faults(Section):
    """What goes wrong at honest sites. Each round draws anew."""

    dropout: dict[Stage, Probability] = Field(default={})
    """Probability by stage that a site is not reached by the stage's message; it stays away for the round."""
    stragglers: Probability = 0.0
    """Probability that a site is slow in a round."""
    slowdown: Annotated[float, Field(ge=1)] = 10.0
    """By how much a slow site's machine and line are slower."""


class Malicious(Section):
    """Sites that do not follow the study. They run privet's protocol on what they make of data or update."""

    attack: Literal["label-flip", "backdoor", "sign-flip", "scale", "nan"]
    """label-flip: every label becomes the next one. backdoor: part of the records gets `trigger` and the label
    `target`. sign-flip: the update's negative. scale: the update times `factor`. nan: an update that is no number."""
    sites: Annotated[int, Field(ge=1)] | tuple[Name, ...]
    """Which sites, or how many drawn by the study's seed."""
    factor: Annotated[float, Field(gt=1, le=1e6)] = 10.0
    """For scale."""
    trigger: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """For backdoor: words put before a record's text."""
    target: str | None = None
    """For backdoor: the label that the trigger is to give."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """For backdoor: share of the site's records that are poisoned."""

    @model_validator(mode="after")
    def _what_the_attack_takes(self) -> Self:
        for name in ("trigger", "target"):
            if (getattr(self, name) is not None) != (self.attack == "backdoor"):
                verb = "needs it" if self.attack == "backdoor" else "does not take it"
                raise ValueError(f'{name}: attack = "{self.attack}" {verb}')
        return self


def complaints(study: Study, malicious: Sequence[Malicious], sites: Sequence[str]) -> list[str]:
    """Return what a scenario over these sites cannot mean with this study, one line each."""
    found = []
    labelled = study.task.kind == "text-classification"
    if study.cohort.min_sites > len(sites):
        found.append(f"cohort.min_sites: the study demands {study.cohort.min_sites} sites, there are {len(sites)}")
    for number, entry in enumerate(malicious):
        where = f"simulation.malicious.{number}"
        if entry.attack in ("label-flip", "backdoor") and not labelled:
            found.append(f"{where}.attack: {entry.attack} is for text-classification, the study is {study.task.kind}")
        elif entry.target is not None and entry.target not in study.task.labels:
            found.append(f"{where}.target: the study has no label {entry.target!r}")
        if isinstance(entry.sites, int):
            if entry.sites > len(sites):
                found.append(f"{where}.sites: {entry.sites} of {len(sites)} sites")
        elif strangers := sorted(set(entry.sites) - set(sites)):
            found.append(f"{where}.sites: there is no site {', '.join(strangers)}")
    return found
