"""The tables of a study file, each a frozen and strict model."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privet.common.errors import StudyError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# JSON holds integers exactly below 2^53, and the digest is one of JSON.
Count = Annotated[int, Field(ge=1, lt=2**53)]
Column = Annotated[str, Field(min_length=1, max_length=128)]

# Server optimizers that keep squared gradients.
SQUARING = ("fedadam", "fedyogi", "adam")

# The data columns that each task needs, by the role they play.
ROLES: dict[str, tuple[str, ...]] = {
    "text-classification": ("text", "label"),
    "token-classification": ("tokens", "tags"),
    "causal-lm": ("prompt", "answer"),
}


class Section(BaseModel):
    """A table of the study file: frozen, and strict about keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Schedule(Section):
    """Learning-rate schedule over the whole study, not over one round."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up: not at all, or to `floor` along a line or half a cosine."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of all steps over which the rate rises linearly from 0."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final rate as a fraction of the learning rate."""


class ModelSection(Section):
    """The pretrained base, pinned so that every site starts from the same bytes."""

    base: Annotated[str, Field(min_length=1)]
    """A local directory, `package:NAME` for one that an installed Python package carries, or a Hugging Face id."""
    sha256: Annotated[dict[str, Sha256], Field(min_length=1)]
    """SHA-256 of every weight file (`*.safetensors`), and of any other file to pin, by file name."""
    revision: str = "main"
    """Revision of a Hugging Face id; unused for directories and packages."""


class TaskSection(Section):
    """What the model learns to do."""

    kind: Literal["text-classification", "token-classification", "causal-lm"]
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The classes, in the order of the model's outputs. For tokens: `O` and `B-x`/`I-x` tags (IOB2)."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How a text classifier turns token vectors into one: mean for sentence encoders, last for decoders."""
    system_prompt: str = ""
    """For causal-lm: the system message, where the tokenizer has a chat template."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """For causal-lm: length of a greedy answer in evaluation and prediction."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.kind == "causal-lm":
            if self.labels:
                raise ValueError("labels: causal-lm has none; remove the key")
        elif len(self.labels) < 2:
            raise ValueError(f"labels: {self.kind} needs at least 2, got {len(self.labels)}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: each may stand once")
        if self.kind == "token-classification":
            kinds = {label[2:] for label in self.labels if label[:2] in ("B-", "I-")}
            expected = {"O"} | {f"{p}-{k}" for p in "BI" for k in kinds}
            if set(self.labels) != expected:
                raise ValueError("labels: token-classification takes O and a B-x and I-x for each kind x")
        return self


class DataSection(Section):
    """The data contract: what a site's files must hold, and how rows become records."""

    columns: dict[str, Column]
    """Column by role: text and label; tokens and tags; or prompt and answer."""
    unit: Column | None = None
    """Column that names the patient, document or person a row belongs to; None: every row stands for itself."""
    max_length: Annotated[int, Field(ge=4, le=131072)] = 128
    """Tokens per record; longer ones are cut."""
    unicode: Literal["NFC", "NFKC", "none"] = "NFKC"
    """Unicode normalisation of text."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Expected fraction of units held out for validation at each site."""


class LoraSection(Section):
    """Shape of the adapter (Hu et al. 2022)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the linear layers that get an adapter, e.g. query, value."""
    layers: Count | None = None
    """Adapt only this many top layers; None adapts all."""
    modules_to_save: tuple[str, ...] = ()
    """Further modules trained in full. A task's own head is always trained and need not be named."""


class OptimizerSection(Section):
    """What local and server optimizers have in common."""

    learning_rate: Positive
    head_learning_rate: Positive | None = None
    """Rate of the modules trained in full (the head); None: the same."""
    schedule: Schedule = Schedule()


class TrainingSection(OptimizerSection):
    """What each site does in a round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    local_steps: Count | None = None
    """Optimizer steps per round. Give this or `local_epochs`."""
    local_epochs: Positive | None = None
    """Expected passes over the site's records per round: rounds to local_epochs / sampling_rate steps."""
    sampling_rate: Fraction
    """Probability with which each unit enters a step's batch (Poisson sampling), the same at every site."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For sgd."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """For adamw."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the frozen base."""
    fedprox_mu: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the proximal term mu/2 |w - w_round|^2 (Li et al. 2020)."""
    patience: Count | None = None
    """Stop after this many rounds without a better federated validation loss; None: never."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of local_steps and local_epochs")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("momentum: is for optimizer sgd; adamw takes betas")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps a site takes in one round."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, round((self.local_epochs or 0.0) / self.sampling_rate))


class AggregationSection(OptimizerSection):
    """How the sites' updates become the next adapter."""

    method: Literal["fedsvd", "ffa", "fedavg"] = "fedsvd"
    """fedsvd: train B, refactor B·A by SVD at the server. ffa: train B, keep A. fedavg: average A and B apart."""
    refactor_every: Count = 1
    """For fedsvd: rounds between two refactorisations."""
    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "adam"] = "fedavg"
    """Server optimizer on the pseudo-gradient (Reddi et al. 2021): SGD, SGD with momentum, and the paper's adaptive
    ones. adam is that of Kingma and Ba (2015), which corrects its bias: for many short rounds."""
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For fedavgm."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """For fedadam, fedyogi and adam."""
    tau: Positive = 1e-3
    """For fedadam, fedyogi and adam: their degree of adaptivity, the epsilon of the denominator."""
    weighting: Literal["declared", "equal"] = "declared"
    """Weight of a site: the count it declared, or 1."""
    largest_count: Annotated[int, Field(ge=1, lt=2**48)] = 10_000
    """Largest count that a site may declare. The scale of masked values follows from it, whoever takes part."""
    max_norm: Positive | None = None
    """Largest L2 norm of a round's mean update; a larger one ends the round. None: what the sites' bounds allow."""

    @model_validator(mode="after")
    def _basis(self) -> Self:
        if self.method == "fedsvd" and self.optimizer in SQUARING:
            raise ValueError(
                f"optimizer: {self.optimizer} keeps squared gradients, which cannot follow the change of basis "
                "that fedsvd makes; use method ffa, or optimizer fedavg or fedavgm"
            )
        return self


class CohortSection(Section):
    """Which sites take part in a round."""

    fraction: Fraction = 1.0
    """Fraction of the consenting sites drawn for each round."""
    sites: tuple[Name, ...] = ()
    """The sites that may take part; empty: whoever consents and is known to the other sites."""
    min_sites: Count = 3
    """Fewer deliveries than this abort the round."""


class Promise(NamedTuple):
    """What a private study promises for one unit, and the bound on a unit's gradient that the noise is scaled to.

    Attributes:
        epsilon: Of the whole study, for a site that takes part in every round.
        delta: Probability with which epsilon may be exceeded.
        clip_norm: Largest L2 norm of one unit's gradient.
    """

    epsilon: float
    delta: float
    clip_norm: float


class PrivacySection(Section):
    """Differential privacy of what each site releases, for one unit, under addition or removal of that unit.

    `local`: what a site releases over the whole study is (epsilon, delta)-differentially private against everyone
    including the coordinator. `distributed`: a round is one optimizer step, sites share the noise, and the same
    holds against the coordinator together with the corrupt sites of `secure_aggregation`, if at least the others
    that `dropouts` leaves add their share.
    """

    mode: Literal["local", "distributed", "none"]
    unit: Literal["record", "patient"] = "record"
    """One row, or all rows that share a value of `data.unit`."""
    epsilon: Positive | None = None
    delta: Annotated[float, Field(ge=1e-12, lt=0.1)] | None = None
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """L2 norm to which each unit's gradient is clipped."""
    dropouts: Annotated[int, Field(ge=0, le=4096)] = 1
    """For distributed: sites that a step may lose. The others' shares make up for them; if more go, it has no sum."""
    dropout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The same as a fraction of the cohort, rounded down; the larger counts."""
    epsilon_alone: Positive | None = None
    """For distributed: what a site's own shares of the noise are to be worth by themselves, against everybody. A share
    that would have less noise than that takes has more. None leaves shares as small as the sum allows."""
    max_records_per_unit: Count = 4
    """For unit patient: rows of one unit that enter one step at most, drawn at random."""
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    """flat: longer gradients are cut to the clip norm. automatic: every gradient is scaled to about the clip norm.
    adaptive: flat, and within a round the clip norm follows a private quantile, from `clip_norm` on."""
    stability: Annotated[float, Field(ge=1e-6, le=1)] = 0.01
    """For automatic: what is added to the gradient's norm before dividing by it."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """For adaptive: fraction of units whose gradients are to be within the clip norm."""
    quantile_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    """For adaptive: by how much a step moves the clip norm's logarithm at most."""
    quantile_share: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.02
    """For adaptive: share of the noise budget, in 1/z^2, that counting costs; it raises the gradients' noise."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = {name: getattr(self, name) for name in ("epsilon", "delta", "clip_norm")}
        if self.epsilon_alone is not None and (self.mode != "distributed" or self.epsilon_alone <= (self.epsilon or 0)):
            raise ValueError('epsilon_alone: for mode distributed, and above epsilon; below it take mode = "local"')
        if self.mode != "none":
            missing = [name for name, value in given.items() if value is None]
            if missing:
                raise ValueError(f"mode {self.mode} needs {', '.join(missing)}")
            if self.mode == "distributed" and self.clipping == "adaptive":
                raise ValueError("clipping: adaptive is for mode local; shares of noise need a clip norm that stays")
        else:
            extra = [name for name, value in given.items() if value is not None]
            if extra:
                raise ValueError(f'mode none takes no {", ".join(extra)}; did you mean mode = "local"?')
            if self.clipping != "flat":
                raise ValueError("clipping: mode none does not clip; remove the key")
        return self

    @property
    def promise(self) -> Promise:
        """Epsilon, delta and clip norm of a private study.

        Raises:
            StudyError: The study is not private.
        """
        if self.epsilon is None or self.delta is None or self.clip_norm is None:
            raise StudyError("privacy: a study of mode none has no epsilon, delta and clip norm")
        return Promise(self.epsilon, self.delta, self.clip_norm)


class SecureAggregationSection(Section):
    """How updates reach the coordinator, and what the masking has to withstand (docs/secure-aggregation.md)."""

    mode: Literal["masked", "plain"] = "masked"
    """masked: the coordinator learns sums alone. plain: it sees each site's update; for comparison."""
    corrupt: Annotated[int, Field(ge=0, le=4096)] = 1
    """Sites that may be in league with the coordinator, at least."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The same as a fraction of the cohort, rounded down; the larger counts."""
    dropout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Drop-outs that the sparse masking graph of cohorts above 64 sites is made for. Smaller cohorts lose as many
    sites as a safe quorum allows."""
    security: Annotated[int, Field(ge=80, le=255)] = 80
    """Statistical security of the sparse masking graph of cohorts above 64 sites, in bits."""
    bits: Annotated[int, Field(ge=14, le=24)] | None = None
    """Resolution of one value. None: as many as fit three sums to a 64-bit word (two above 32 sites)."""
    bound: Positive | None = None
    """Largest change of one LoRA value in a round; what lies beyond is cut, and counted. None: 4 times learning rate
    times steps, for SGD under privacy times the clip norm, for SGD without it a fourth of that."""
    head_bound: Positive | None = None
    """The same for modules trained in full. None: derived from their learning rate, or `bound` if that is given."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 1
    """Groups summed apart in cohorts of 30 sites and more, so that a group with an outlying sum can be left out. The
    coordinator learns each group's sum. Fewer are made where a group would be too small. Not two, of which neither is
    the outlying one."""
