"""Scenarios as tables of `[simulation]`: the split of the data, networks, drop-outs and malicious sites.

Every field is checked before the simulation starts. A scenario is not part of the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from privet.client.formats import Formatted
from privet.common.study.sections import Column, Name, Positive, Section
from privet.common.study.study import Study

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Positive, Positive]
Stage = Literal["advertise", "share", "train", "confirm", "reveal"]
STAGES: tuple[Stage, ...] = ("advertise", "share", "train", "confirm", "reveal")
"""The exchanges of a masked round, in order. A plain round has only `train`."""


class Partition(Formatted):
    """The split of one pool of records over the sites. All records of a unit of privacy go to one site."""

    split: Literal["iid", "dirichlet", "quantity", "column"]
    """iid: equal parts at random. dirichlet: for each label, the sites' shares of its records are drawn from a
    symmetric Dirichlet distribution (Hsu, Qi and Brown 2019). quantity: at random; the size of the i-th largest site is
    proportional to i^-exponent. column: one site for each value of `column`."""
    sites: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Number of sites. Leave it out with split = "column"."""
    concentration: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """For dirichlet: a small value gives about one label per site, a large value the same mix at every site."""
    exponent: Annotated[float, Field(ge=0, le=10)] | None = None
    """For quantity: 0 gives equal sizes."""
    column: Column | None = None
    """For column: name of the column in the data files."""
    least_units: Annotated[int, Field(ge=1)] = 4
    """Least number of units of a site; the largest sites give units away. For column: values with fewer units are left
    out, and a line reports it."""
    train: tuple[Path, ...] = ()
    """For data = "files": files to pool for training."""
    test: tuple[Path, ...] = ()
    """For data = "files": files to pool for the test; they are dealt out by the same shares."""
    patients: Annotated[int, Field(ge=2, le=100_000)] = 1600
    """For data = "notes": number of patients to generate, each with 2.2 training notes on average."""

    @model_validator(mode="after")
    def _what_the_split_takes(self) -> Self:
        needed = {"iid": (), "dirichlet": ("concentration",), "quantity": ("exponent",), "column": ("column",)}[
            self.split
        ]
        for name in ("concentration", "exponent", "column"):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs this field" if name in needed else "does not take this field: remove it"
                raise ValueError(f'{name}: split = "{self.split}" {verb}')
        if (self.sites is None) != (self.split == "column"):
            verb = "does not take this field: remove it" if self.split == "column" else "needs this field"
            raise ValueError(f'sites: split = "{self.split}" {verb}')
        return self


class Network(Section):
    """Lines and machines of the sites, for the virtual clock. Each site draws once from each range, log-uniformly."""

    down_mbit: Range = (20.0, 200.0)
    """Megabits per second towards a site."""
    up_mbit: Range = (5.0, 50.0)
    """Megabits per second from a site."""
    latency_ms: Range = (10.0, 60.0)
    """Milliseconds of a round trip."""
    records_per_second: Range = (5.0, 50.0)
    """Training records that the machine of a site processes per second."""
    coordinator_mbit: Positive = 1000.0
    """Megabits per second of the coordinator's line in each direction; all sites share it."""
    step_seconds: Positive = 120.0
    """Seconds that the coordinator waits for the answers of an exchange without training."""
    training_seconds: Positive = 3600.0
    """Seconds that the coordinator waits for the answers of the exchange in which sites train."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("down_mbit", "up_mbit", "latency_ms", "records_per_second"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected a range [low, high] with low <= high, got [{low}, {high}]")
        return self


class Faults(Section):
    """Faults of honest sites. They are drawn again in each round."""

    dropout: dict[Stage, Probability] = Field(default={})
    """Probability, by stage, that a site drops out: the message of the stage does not reach it, and it stays away for
    the round."""
    stragglers: Probability = 0.0
    """Probability that a site is slow in a round."""
    slowdown: Annotated[float, Field(ge=1)] = 10.0
    """Factor by which the machine and the line of a slow site are slower."""


class Malicious(Section):
    """Malicious sites. They change their data or their update, and run privet's protocol on the result."""

    attack: Literal["label-flip", "backdoor", "sign-flip", "scale", "nan"]
    """label-flip: every label becomes the next one. backdoor: a share of the records gets `trigger` and the label
    `target`. sign-flip: the update is negated. scale: the update is multiplied by `factor`. nan: the update is NaN."""
    sites: Annotated[int, Field(ge=1)] | tuple[Name, ...]
    """Names of the sites, or a number of sites to draw with the study's seed."""
    factor: Annotated[float, Field(gt=1, le=1e6)] = 10.0
    """For scale: factor of the update."""
    trigger: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """For backdoor: words to put before the text of a record."""
    target: str | None = None
    """For backdoor: label that the attacker wants for records with the trigger."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """For backdoor: share of the site's records that are poisoned."""

    @model_validator(mode="after")
    def _what_the_attack_takes(self) -> Self:
        for name in ("trigger", "target"):
            if (getattr(self, name) is not None) != (self.attack == "backdoor"):
                verb = "needs this field" if self.attack == "backdoor" else "does not take this field: remove it"
                raise ValueError(f'{name}: attack = "{self.attack}" {verb}')
        return self


def complaints(study: Study, malicious: Sequence[Malicious], sites: Sequence[str]) -> list[str]:
    """Return the errors of a scenario over these sites with this study, one line each; none if it is valid."""
    found = []
    labelled = study.task.kind == "text-classification"
    if study.cohort.min_sites > len(sites):
        found.append(
            f"cohort.min_sites: the study demands {study.cohort.min_sites} sites, the simulation has {len(sites)}"
        )
    if study.cohort.sites and len(set(study.cohort.sites) & set(sites)) < study.cohort.min_sites:
        found.append(
            f"cohort.sites: the study demands {study.cohort.min_sites} of the sites that it lists; the simulation has "
            f"{len(set(study.cohort.sites) & set(sites))} of them"
        )
    if strangers := sorted(set(study.lora.site_ranks) - set(sites)):
        found.append(
            f"lora.site_ranks: the simulation has no site {', '.join(strangers)}; its sites are {', '.join(sites[:20])}"
        )
    for number, entry in enumerate(malicious):
        where = f"simulation.malicious.{number}"
        if entry.attack in ("label-flip", "backdoor") and not labelled:
            found.append(
                f"{where}.attack: {entry.attack} is for text-classification, "
                f"but the task of the study is {study.task.kind}"
            )
        elif entry.target is not None and entry.target not in study.task.labels:
            found.append(f"{where}.target: expected one of the study's labels, got {entry.target!r}")
        if isinstance(entry.sites, int):
            if entry.sites > len(sites):
                found.append(f"{where}.sites: expected at most {len(sites)} sites, got {entry.sites}")
        elif strangers := sorted(set(entry.sites) - set(sites)):
            found.append(f"{where}.sites: the simulation has no site {', '.join(strangers)}")
    return found
