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
    EvaluationSection,
    GateSection,
    LoraSection,
    ModelSection,
    Name,
    PrivacySection,
    PurposeSection,
    ReleaseSection,
    Schedule,
    Section,
    SecureAggregationSection,
    StatisticsSection,
    TaskSection,
    TrainingSection,
)

if TYPE_CHECKING:
    from privet.common.study.adapter import AdapterSpec, TensorSpec

_UNTRAINED: dict[str, Any] = {
    "optimizer": "sgd",
    "rounds": 0,
    "local_steps": 1,
    "sampling_rate": 1.0,
    "learning_rate": 1.0,
}
_NO_ADAPTER: dict[str, Any] = {"rank": 1, "targets": ["none"]}
"""The tables of a study that trains nothing, in place of those that it may not have."""
_OUTSIDE = "simulation"
_ROUNDING = 1e-12


class Study(Section):
    """Everything that the sites of one study agree to."""

    format: Literal[1] = 1
    """Version of the study format. Leave it out."""
    kind: Annotated[Literal["train", "statistics", "evaluate"], Field(exclude_if=lambda value: value == "train")] = (
        "train"
    )
    """train: sites train an adapter. statistics: they count units, labels, lengths and missing values. evaluate: they
    measure an adapter. The latter two train nothing, take one round, and have no table `[training]`."""
    name: Name
    """Name of the study: lower-case letters, digits and dashes, at most 63. It is the default name of a run with real
    sites; a simulation has that of the study file."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Seed of everything public: the adapter's initial values, the cohorts, and in a simulation the data order and the
    noise. Change it to repeat a study with other random draws."""
    model: ModelSection
    task: TaskSection
    data: DataSection
    lora: LoraSection
    training: TrainingSection
    statistics: Annotated[StatisticsSection | None, Field(exclude_if=lambda value: value is None)] = None
    evaluation: Annotated[EvaluationSection | None, Field(exclude_if=lambda value: value is None)] = None
    aggregation: AggregationSection = AggregationSection()
    cohort: CohortSection = CohortSection()
    privacy: PrivacySection
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()
    release: Annotated[ReleaseSection | None, Field(exclude_if=lambda value: value is None)] = None
    gate: Annotated[GateSection | None, Field(exclude_if=lambda value: value is None)] = None
    purpose: Annotated[PurposeSection | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        for kind, table, given in (
            ("statistics", "statistics", self.statistics),
            ("evaluate", "evaluation", self.evaluation),
        ):
            if (self.kind == kind) != (given is not None):
                raise ValueError(
                    f"{table}: a study of kind {kind} needs this table, and no other kind has it; found kind "
                    f'"{self.kind}"'
                )
        if not self.counts:
            return self
        base = self.evaluation is not None and self.evaluation.adapter == "base"
        if base and (not self.task.generates or self.lora.modules_to_save):
            raise ValueError(
                f"evaluation.adapter: the base alone has no head for {self.task.kind} and no module trained in full; "
                "set the digest of an adapter"
            )
        wrong = [
            name
            for name, differs in (
                ("training", self.training != TrainingSection(**_UNTRAINED)),
                ("lora", self.kind == "statistics" and self.lora != LoraSection(**_NO_ADAPTER)),
                ("lora.site_ranks", self.kind == "evaluate" and self.lora.site_ranks),
                ("data.validation_fraction", self.data.validation_fraction),
                ("aggregation.average", self.aggregation.average != "none"),
                ("aggregation.weighting", self.aggregation.weighting != "declared"),
                # A sum over units is cut at the site's weight times a bound, and would not fit under a power of it.
                ("aggregation.weight_power", self.aggregation.weight_power is not None),
                ("privacy.clipping", self.privacy.clipping != "flat"),
                ("privacy.head_clip_share", self.privacy.head_clip_share is not None),
                ("privacy.noise", self.privacy.noise != "independent"),
            )
            if differs
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: a study of kind {self.kind} trains nothing; remove from the study")
        return self

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
        if self.training.starts_head and self.aggregation.weight_power is not None:
            raise ValueError(
                "training.head_start: its sums count units, so sites weigh by their counts; remove "
                "aggregation.weight_power"
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
    def _gate_fits(self) -> Self:
        gate, sites = self.gate, self.cohort.sites
        if gate is None:
            return self
        if self.counts:
            raise ValueError(f"gate: a study of kind {self.kind} releases no adapter; remove the table")
        if sites and gate.signatures > len(sites):
            raise ValueError(
                f"gate.signatures: expected at most the {len(sites)} sites of cohort.sites, found {gate.signatures}"
            )
        if gate.canaries is not None and gate.epsilon is None and not self.private:
            raise ValueError(
                "gate.epsilon: a study without privacy claims none; set the largest epsilon that canaries may show"
            )
        if gate.epsilon is not None and self.private and gate.epsilon > self.privacy.promise.epsilon:
            raise ValueError(
                f"gate.epsilon: expected at most the study's epsilon {self.privacy.promise.epsilon:g}, found "
                f"{gate.epsilon:g}"
            )
        if gate.repeated is not None and not self.task.generates:
            raise ValueError(f"gate.repeated: {self.task.kind} generates no text; remove the key")
        if gate.metric is not None and not self.data.validation_fraction:
            raise ValueError("gate.metric: needs data.validation_fraction above 0, as rounds then measure it")
        return self

    @model_validator(mode="after")
    def _site_ranks_fit(self) -> Self:
        ranks, largest = self.lora.site_ranks, self.lora.ranks[1]
        if not ranks:
            return self
        if self.aggregation.method != "ffa":
            why = "fedavg trains A as well" if self.aggregation.method == "fedavg" else "fedsvd turns the columns of B"
            raise ValueError(
                "lora.site_ranks: a mean by column is exact only if all sites keep one A, and "
                f'{why}; set aggregation.method = "ffa", or remove lora.site_ranks'
            )
        above = sorted(name for name, rank in ranks.items() if rank > largest)
        if above:
            raise ValueError(
                f"lora.site_ranks: expected ranks of at most {largest}, the adapter's own, found "
                + ", ".join(f"{name} = {ranks[name]}" for name in above)
            )
        strangers = sorted(set(ranks) - set(self.cohort.sites)) if self.cohort.sites else []
        if strangers:
            raise ValueError(f"lora.site_ranks: cohort.sites does not name {', '.join(strangers)}; correct one of them")
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
        if self.aggregation.weight_power is not None:
            raise ValueError(
                "aggregation.weight_power: in privacy.mode distributed all units count equally; remove it, or set "
                "privacy.mode = local"
            )
        if self.data.validation_fraction:
            raise ValueError("data.validation_fraction: privacy.mode distributed releases only gradients; set 0")
        return self

    @model_validator(mode="after")
    def _block_fits(self) -> Self:
        if self.secure_aggregation.block is None:
            return self
        privacy = self.privacy
        if not self.distributed:
            raise ValueError(
                'secure_aggregation.block: only rounds of privacy.mode = "distributed" are short enough to share a '
                "set-up; set this mode, or remove block"
            )
        if self.secure_aggregation.suite == "x25519" and (privacy.dropouts or privacy.dropout_fraction):
            raise ValueError(
                "secure_aggregation.block: the suite x25519 has no blocks that tolerate drop-outs; remove suite, or "
                "set privacy.dropouts = 0 and privacy.dropout_fraction = 0"
            )
        if privacy.band is not None:
            raise ValueError(
                "secure_aggregation.block: in a block a site does not learn whether a round's noise is in a sum, which "
                'privacy.noise = "banded" needs; remove one of the two'
            )
        if self.cohort.fraction < 1:
            raise ValueError(
                "secure_aggregation.block: a block needs the same sites in every round; set cohort.fraction = 1"
            )
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
    def counts(self) -> bool:
        """Whether the study trains nothing: its one round counts or measures."""
        return self.kind != "train"

    @property
    def rounds(self) -> int:
        """Number of rounds of a run: those that train, and the head start before them; or the one that counts."""
        return self.training.rounds + self.sums_units(1)

    def sums_units(self, number: int) -> bool:
        """Whether round `number`, from 1, is one sum over all units and no training: a head start, or counts."""
        return (self.counts or self.training.starts_head) and number == 1

    def rank_at(self, site: str) -> int:
        """Return the largest rank of a layer that a site trains."""
        return min(self.lora.ranks[1], self.lora.site_ranks.get(site, self.lora.ranks[1]))

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
        return validate(cls, _completed(inside), what="study")


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a study's plain values with the tables that a study which trains nothing leaves out."""
    if document.get("kind") not in ("statistics", "evaluate"):
        return document
    filled = {"training": _UNTRAINED, **document}
    if filled["kind"] == "statistics":
        filled = {"lora": _NO_ADAPTER, "statistics": {}, **filled}
    privacy = filled.get("privacy")
    if isinstance(privacy, dict) and privacy.get("mode", "none") != "none":
        filled["privacy"] = {"clip_norm": 1.0, **privacy}  # which only sets the scale
    return filled


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
