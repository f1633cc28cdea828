"""The study: one validated, frozen file that states what the sites agree to.

The study holds every setting that changes what is computed or released, and no other setting. Device, precision
and batch shape belong to the site (`privet.client.site.Resources`). So the study digest, the SHA-256 of the
canonical JSON of all fields with defaults, identifies the agreement. Consents, messages and statements quote it.

A study is read from TOML. Unknown keys are errors. Only the table `[simulation]` does not belong to the study:
`privet.simulations` reads it, and it is ignored here.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from privet.common.canonical import canonical_json, digest
from privet.common.errors import StudyError
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import (
    FORMS,
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

if TYPE_CHECKING:
    from privet.common.study.adapter import AdapterSpec, TensorSpec

_OUTSIDE = "simulation"
_ROUNDING = 1e-12


class Study(Section):
    """Everything that the sites of one study agree to."""

    format: Literal[1] = 1
    """Version of the study format. Leave it out."""
    name: Name
    """Name of the study: lower-case letters, digits and dashes, at most 63. It is the default name of a run."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Seed of everything public: the adapter's initial values, the cohorts, and in a simulation the data order and the
    noise. Change it to repeat a study with other random draws."""
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
        forms = FORMS[self.task.kind]
        if not any(form.fits(self.data.columns) for form in forms):
            raise ValueError(
                f"data.columns: {self.task.kind} needs exactly {'; or '.join(map(str, forms))}, "
                f"got {', '.join(sorted(self.data.columns)) or 'none'}"
            )
        if self.task.kind == "preference" and (self.lora.dropout or self.training.dropout):
            raise ValueError(
                "lora.dropout, training.dropout: preference compares the model with its base, which drops nothing; "
                "set 0"
            )
        if self.private and self.privacy.unit == "patient" and self.data.unit is None:
            raise ValueError("privacy.unit: patient needs data.unit, the column that names the patient")
        if len(set(self.cohort.sites)) != len(self.cohort.sites):
            raise ValueError("cohort.sites: a site is named twice; name each site once")
        if self.cohort.sites and len(self.cohort.sites) < self.cohort.min_sites:
            raise ValueError(
                f"cohort.sites: must name at least cohort.min_sites = {self.cohort.min_sites} sites, "
                f"got {len(self.cohort.sites)}"
            )
        if self.secure_aggregation.groups == 2:
            raise ValueError("secure_aggregation.groups: with 2 groups, neither is the outlier; set 1, or 3 or more")
        least = self.secure_aggregation.corrupt + 2
        if self.secure_aggregation.mode == "masked" and self.cohort.min_sites < least:
            raise ValueError(
                f"cohort.min_sites: a sum hides a site only among {least} or more sites, as secure_aggregation.corrupt "
                f"is {self.secure_aggregation.corrupt}; got {self.cohort.min_sites}"
            )
        if not self.rounds:
            raise ValueError(
                "training.rounds: expected 1 or more, found 0; only a study with a head start may have no round that "
                'trains: raise it, or set training.head_start = "class-means"'
            )
        if self.aggregation.average != "none" and (self.training.patience is not None or not self.training.rounds):
            raise ValueError(
                "aggregation.average: an early stop (training.patience) publishes the best adapter, and a study "
                "without rounds that train has nothing to average; remove one of the keys"
            )
        if self.training.starts_head and self.task.generates:
            raise ValueError(
                f"training.head_start: {self.task.kind} has no classes whose means could start a head; remove the key"
            )
        if self.training.starts_head and self.aggregation.weighting != "declared":
            raise ValueError(
                "training.head_start: its sums count units, so sites weigh by their counts; set "
                'aggregation.weighting = "declared"'
            )
        if self.privacy.head_clip_share is not None and (self.task.generates or not self.training.train_head):
            raise ValueError(
                "privacy.head_clip_share: there is no head beside the adapter, as the task has none or "
                "training.train_head is false; remove the key"
            )
        rates = (self.training.head_learning_rate, self.aggregation.head_learning_rate)
        if not self.training.train_head and any(rates) and not self.lora.modules_to_save:
            raise ValueError("head_learning_rate: with training.train_head = false no head is trained; remove the key")
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
                "training: in privacy.mode distributed a round is one step, which the coordinator takes; set "
                'local_steps = 1, optimizer = "sgd" and learning_rate = 1.0, remove all other optimizer keys, and '
                "choose the optimizer under aggregation"
            )
        if self.secure_aggregation.mode != "masked" or self.secure_aggregation.groups != 1:
            raise ValueError(
                "secure_aggregation: in privacy.mode distributed only the sum over all sites is private; set mode = "
                '"masked" and groups = 1'
            )
        if self.aggregation.weighting != "declared":
            raise ValueError("aggregation.weighting: in privacy.mode distributed all units count equally; set declared")
        if self.data.validation_fraction:
            raise ValueError("data.validation_fraction: privacy.mode distributed releases only gradients; set 0")
        return self

    @model_validator(mode="after")
    def _band_fits(self) -> Self:
        band = self.privacy.band
        if band is None:
            return self
        if self.cohort.fraction < 1:
            raise ValueError(
                "cohort.fraction: banded noise needs the same sites in every round, to take their noise back; set 1"
            )
        if band > self.training.rounds:
            raise ValueError(f"privacy.band: expected at most training.rounds = {self.training.rounds}, found {band}")
        if band * self.training.sampling_rate > 1 + _ROUNDING:
            raise ValueError(
                f"privacy.band: a unit is drawn with band times training.sampling_rate, {band} * "
                f"{self.training.sampling_rate:g}, which exceeds 1; lower one of them"
            )
        return self

    @property
    def distributed(self) -> bool:
        """Whether sites share the noise. A round is then one optimizer step."""
        return self.privacy.mode == "distributed"

    @property
    def rounds(self) -> int:
        """Number of rounds of a run: those that train, and the head start before them."""
        return self.training.rounds + self.training.starts_head

    def trained(self, spec: AdapterSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of an adapter that sites train, and release the changes of."""
        return spec.trained(self.aggregation.method, head=self.training.train_head)

    def is_head_start(self, number: int) -> bool:
        """Whether round `number`, from 1, is the head start."""
        return self.training.starts_head and number == 1

    def trained_before(self, number: int) -> int:
        """Return how many rounds that train come before round `number`."""
        return number - 1 - self.training.starts_head

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a site that takes part in every round."""
        return self.training.rounds * self.training.steps

    @property
    def draws(self) -> tuple[float, int]:
        """The probability with which a unit is drawn, and the steps of the study in which it may be."""
        if self.privacy.band is None:
            return self.training.sampling_rate, self.total_steps
        # Written as a decimal, 1/27 times 27 may miss 1 by a rounding.
        rate = self.privacy.band * self.training.sampling_rate
        return 1.0 if abs(rate - 1) <= _ROUNDING else rate, -(-self.total_steps // self.privacy.band)

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
            StudyError: The study is not valid. The message names each wrong field, the value found and what is allowed.
        """
        inside = {key: value for key, value in document.items() if key != _OUTSIDE}
        return validate(cls, inside, what="study")


@lru_cache(maxsize=64)
def _digest(document: str) -> str:
    return digest(canonical_json(json.loads(document)))


def check_shareable(study: Study) -> None:
    """Check that a study's base means the same at every site: a name, and all of its files pinned.

    The base itself need not be here: each site compares its directory with the pins.

    Raises:
        StudyError: `model.base` is a path, or the pins lack the configuration or a vocabulary.
    """
    if study.model.is_path:
        raise StudyError(
            f"model.base: expected a name that is the same at every site, found the path {study.model.base!r}",
            "run `privet base DIRECTORY`, and paste the table into the study; each site maps the name to a directory",
        )
    pins = study.model.sha256
    words = any("token" in name or "vocab" in name or name.endswith((".model", "merges.txt")) for name in pins)
    if not words or "config.json" not in pins:
        raise StudyError(
            "model.sha256: expected every file that decides a token, found "
            f"{'no vocabulary' if 'config.json' in pins else 'no config.json'} among {', '.join(sorted(pins))}",
            "run `privet base DIRECTORY`, and paste the table into the study",
        )


def load_study(path: Path) -> Study:
    """Read and validate the study file at `path`.

    Raises:
        StudyError: The file is missing, is not TOML or does not describe a valid study.
    """
    return Study.parse(read_toml(path, what="study"))


def kept_study(file: Path) -> Study:
    """Return the study that a run or a release keeps as canonical JSON.

    Raises:
        StudyError: It is no study of this version of privet.
        OSError, ValueError, AttributeError: The file cannot be read, or is no JSON object.
    """
    document = json.loads(file.read_bytes())
    try:
        return Study.parse(document)
    except StudyError as error:
        raise StudyError(
            f"{file}: {error.message}",
            "if another version of privet wrote this, use the version of privet that wrote it; otherwise restore it "
            "from a backup",
        ) from None
