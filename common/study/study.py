"""The study: one validated, frozen file that says what the sites agree to.

Everything that changes what is computed or released is here, and nothing else is: device, precision and
batch shape are `privet.client.site.Resources`. The study digest (SHA-256 of the canonical JSON of all
fields, defaults included) therefore identifies the agreement; it stands in consents, messages and statements.

A study is read from TOML. Unknown keys are errors. The one table that does not belong to the study,
`[simulation]`, is read by `privet.simulations` and left out here.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from privet.common.canonical import canonical_json, digest
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import (
    ROLES,
    AggregationSection,
    CohortSection,
    DataSection,
    LoraSection,
    ModelSection,
    Name,
    PrivacySection,
    Schedule,
    Section,
    SecureAggregationSection,
    TaskSection,
    TrainingSection,
)

_OUTSIDE = "simulation"


class Study(Section):
    """Everything the sites of one study agree to."""

    format: Literal[1] = 1
    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Seed of everything public: the adapter's initial values, the cohorts, data order in a simulation."""
    model: ModelSection
    task: TaskSection
    data: DataSection
    lora: LoraSection
    training: TrainingSection
    aggregation: AggregationSection = AggregationSection()
    cohort: CohortSection = CohortSection()
    privacy: PrivacySection
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        needed = set(ROLES[self.task.kind])
        if set(self.data.columns) != needed:
            raise ValueError(
                f"data.columns: {self.task.kind} needs exactly {', '.join(sorted(needed))}, "
                f"got {', '.join(sorted(self.data.columns)) or 'none'}"
            )
        if self.private and self.privacy.unit == "patient" and self.data.unit is None:
            raise ValueError("privacy.unit: patient needs data.unit, the column that names the patient")
        if len(set(self.cohort.sites)) != len(self.cohort.sites):
            raise ValueError("cohort.sites: a site stands twice")
        if self.cohort.sites and len(self.cohort.sites) < self.cohort.min_sites:
            raise ValueError(f"cohort.sites: names fewer than the {self.cohort.min_sites} of cohort.min_sites")
        if self.secure_aggregation.groups == 2:
            raise ValueError("secure_aggregation.groups: of two, neither is the outlying one; take 1, or 3 and more")
        least = self.secure_aggregation.corrupt + 2
        if self.secure_aggregation.mode == "masked" and self.cohort.min_sites < least:
            raise ValueError(
                f"cohort.min_sites: a sum hides a site only among {least} or more, with secure_aggregation.corrupt = "
                f"{self.secure_aggregation.corrupt}; got {self.cohort.min_sites}"
            )
        if self.training.patience is not None and self.data.validation_fraction == 0:
            raise ValueError("training.patience: needs data.validation_fraction above 0")
        return self

    @model_validator(mode="after")
    def _one_step_a_round(self) -> Self:
        if not self.distributed:
            return self
        training = self.training
        stated = (training.local_steps, training.optimizer, training.learning_rate, training.schedule)
        plain = not (training.head_learning_rate or training.momentum or training.weight_decay or training.fedprox_mu)
        if stated != (1, "sgd", 1.0, Schedule()) or not plain:
            raise ValueError(
                "training: in privacy.mode distributed a round is one step, and the coordinator takes it; set "
                'local_steps = 1, optimizer = "sgd", learning_rate = 1.0 and nothing else of the optimizer here, and '
                "the optimizer of the study under aggregation"
            )
        if self.secure_aggregation.mode != "masked" or self.secure_aggregation.groups != 1:
            raise ValueError(
                "secure_aggregation: in privacy.mode distributed only the sum over all sites is private; set mode = "
                '"masked" and groups = 1'
            )
        if self.aggregation.weighting != "declared":
            raise ValueError("aggregation.weighting: in privacy.mode distributed each unit counts alike; use declared")
        if self.data.validation_fraction:
            raise ValueError("data.validation_fraction: privacy.mode distributed releases gradients alone; set 0")
        return self

    @property
    def distributed(self) -> bool:
        """Whether sites share the noise, so that a round is one optimizer step."""
        return self.privacy.mode == "distributed"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a site that takes part in every round."""
        return self.training.rounds * self.training.steps

    @property
    def private(self) -> bool:
        """Whether what a site releases is differentially private."""
        return self.privacy.mode != "none"

    def document(self) -> dict[str, Any]:
        """Return all fields, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON of `document()`."""
        return _digest(self.model_dump_json())

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Study:
        """Validate a study given as plain values.

        Raises:
            StudyError: Naming each wrong field, the value found and what is allowed.
        """
        inside = {key: value for key, value in document.items() if key != _OUTSIDE}
        return validate(cls, inside, what="study")


@lru_cache(maxsize=64)
def _digest(document: str) -> str:
    return digest(canonical_json(json.loads(document)))


def load_study(path: Path) -> Study:
    """Read and validate the study file at `path`.

    Raises:
        StudyError: The file is missing, is not TOML or does not describe a study.
    """
    return Study.parse(read_toml(path, what="study"))
