"""The tables of a study file, each a frozen and strict model."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from privet.common.errors import StudyError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
ADAPTER_PATTERN = r"^(base|sha256:[0-9a-f]{64})$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Quantisation = Literal["nf4", "int8"]
Positive = Annotated[float, Field(gt=0)]
# Far above every useful rate. Below it, float32 holds every step, for gradients within the largest clip norm.
Rate = Annotated[float, Field(gt=0, le=1e4)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# JSON holds integers exactly below 2^53, and the digest is one of JSON.
Count = Annotated[int, Field(ge=1, lt=2**53)]
Column = Annotated[str, Field(min_length=1, max_length=128)]


def _one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("expected one line without control characters, and without blanks at its ends")
    return text


def _day(text: str) -> str:
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise ValueError(f"expected a day as YYYY-MM-DD, found {text!r}")


Line = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_one_line)]
"""A text for people. It is shown at sites and in documents, so nothing in it steers a terminal."""
Day = Annotated[str, AfterValidator(_day)]
"""A day as YYYY-MM-DD, which ends at midnight UTC."""

# Server optimizers that keep a running mean of squared gradients.
SQUARING = ("fedadam", "fedyogi", "adam")


class Form(NamedTuple):
    """A form in which a site's files may hold records: the roles of its columns.

    Attributes:
        needed: Roles that the study must name a column for.
        optional: Roles that it may name a column for.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def fits(self, roles: Collection[str]) -> bool:
        """Return whether `roles` are those of this form."""
        return set(self.needed) <= set(roles) <= {*self.needed, *self.optional}

    def __str__(self) -> str:
        """Return the roles in words."""
        optional = f" (optional: {', '.join(self.optional)})" if self.optional else ""
        return ", ".join(sorted(self.needed)) + optional


FORMS: dict[str, tuple[Form, ...]] = {
    "text-classification": (Form(("text", "label")),),
    "token-classification": (Form(("tokens", "tags")), Form(("text", "spans"))),
    "causal-lm": (
        Form(("prompt", "answer")),
        Form(("messages",)),
        Form(("instruction", "output"), ("input",)),
    ),
    "preference": (Form(("prompt", "chosen", "rejected")), Form(("messages", "chosen", "rejected"))),
}
"""The forms of records that each task takes. A study uses one of them."""

GENERATING = frozenset({"causal-lm", "preference"})
"""The tasks that train a language model to write answers."""

HEAD_START_SHARE = 0.5
"""Share of epsilon of a head start where a study sets none."""
VALIDATION_LOSS_CAP = 10.0
"""Largest validation loss of a unit. Losses are cut to it and sent as a fraction of it: their noise is proportional to
the largest contribution of a unit, which must be bounded."""
VALIDATION_SENSITIVITY = 3**0.5
"""Largest L2 norm that one unit adds to the validation sums: each of the three values lies in [0, 1]."""
MOST_BAND = 64
"""Largest number of steps that noise may be correlated over."""
MOST_CANARIES = 100_000
"""Largest number of canaries that a site plants: a bound from more would take everybody who replays a log too long."""

BETA = 0.1
"""Beta of preference tuning where a study sets none."""

ROLES: dict[str, tuple[str, ...]] = {kind: forms[0].needed for kind, forms in FORMS.items()}
"""The roles of each task's first form."""


class Section(BaseModel):
    """A table of the study file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class SimulationOnly:
    """Marks a field, in its `Annotated` type, that only simulations may set. `simulation_fields` finds such fields."""


def simulation_fields(section: BaseModel) -> tuple[str, ...]:
    """Return the dotted names of the fields for simulations alone that a section sets, other than to their default.

    A real site refuses them, in a study and in its own file.
    """
    found: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if any(isinstance(mark, SimulationOnly) for mark in field.metadata):
            found += [name] if field.is_required() or value != field.get_default(call_default_factory=True) else []
            continue
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        found += [f"{name}.{each}" for part in parts if isinstance(part, BaseModel) for each in simulation_fields(part)]
    return tuple(found)


class Schedule(Section):
    """Learning-rate schedule over the whole study, not over one round."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate changes after the warm-up. constant: it stays. linear, cosine: it falls to `floor`, along a line or
    half a cosine."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of all steps of the study over which the rate rises linearly to its full value, from 0 up to below 1.
    Raise it if the first rounds diverge."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For linear and cosine: the rate after the last step, as a fraction of the learning rate, 0 to 1."""


class ModelSection(Section):
    """The pretrained base model, pinned by digests so that every site starts from the same bytes.

    `privet base DIRECTORY` prints this table for a model directory.
    """

    base: Annotated[str, Field(min_length=1)]
    """Name of the base model, the same on every machine: each site maps it to a directory under `[resources.bases]`.
    `package:NAME` is a model inside an installed Python package, and an id of the Hugging Face Hub one in its local
    cache. A simulation may give a directory, whose name is then the base's."""
    sha256: Annotated[dict[str, Sha256], Field(min_length=1)]
    """SHA-256 in hexadecimal by file name, of every file that decides a token: weights, configurations, vocabularies,
    chat templates."""
    revision: str = "main"
    """Revision of a Hugging Face id. Directories and packages ignore it."""
    quantisation: Annotated[Quantisation | None, Field(exclude_if=lambda value: value is None)] = None
    """Keep the base's linear layers in few bits, so that a large base fits a small accelerator: nf4 takes 4.5 bits a
    value, int8 takes 8. The base computes a little less exactly, and each pass takes longer. Adapters are trained as
    before. `privet base DIRECTORY --quantisation nf4` prints both keys."""
    quantised: Annotated[Sha256 | None, Field(exclude_if=lambda value: value is None)] = None
    """With quantisation: SHA-256 in hexadecimal of the quantised layers, so that every site trains on the same
    values."""

    @model_validator(mode="after")
    def _quantised_is_pinned(self) -> Self:
        if (self.quantisation is None) != (self.quantised is None):
            raise ValueError(
                "quantisation: expected it together with quantised, found one alone; `privet base DIRECTORY "
                "--quantisation nf4` prints both"
            )
        return self

    @property
    def is_path(self) -> bool:
        """Whether `base` is a path of some machine, and not a name."""
        return self.base.startswith((".", "/", "~", "\\")) or self.base[1:3] in (":\\", ":/")


class TaskSection(Section):
    """What the model learns to do."""

    kind: Literal["text-classification", "token-classification", "causal-lm", "preference"]
    """text-classification: one label for a text. token-classification: one tag for each word. causal-lm: an answer to
    a prompt. preference: the better of two answers to a prompt (DPO)."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The classes, in the order of the model's outputs. For token-classification: `O`, and `B-x` and `I-x` for each
    kind x (IOB2). For causal-lm and preference: leave it out."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How a text classifier turns the token vectors into one. mean: for sentence encoders. cls: the first token's.
    last: for decoders."""
    head: Annotated[Literal["library"] | None, Field(exclude_if=lambda value: value is None)] = None
    """For text-classification: "library" classifies as Hugging Face's own AutoModelForSequenceClassification does, so
    that exports load there. It needs pooling cls (BERT) or last (decoders). Without it, a text's vector is normalised
    first, which trains more evenly."""
    head_reads: Annotated[Literal["all-layers"] | None, Field(exclude_if=lambda value: value is None)] = None
    """For token-classification: "all-layers" has the head read each token's vectors of all layers and of the
    embeddings. Without it, it reads the last layer's alone, which says little of a single word where the base is a
    sentence encoder. With it, the result is used with `privet predict` alone: no other library has such a head."""
    system_prompt: str = ""
    """For causal-lm and preference: the system message. It is used if the tokenizer has a chat template."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """For causal-lm and preference: largest length of a greedy answer in evaluation and prediction, in tokens. Raise it
    if answers are cut."""
    train_on: Annotated[Literal["all", "last"] | None, Field(exclude_if=lambda value: value is None)] = None
    """For causal-lm: the assistant's turns that are learnt, of a conversation with several. all: each of them, the
    default. last: the last one."""
    template_date: Annotated[
        str | None, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", exclude_if=lambda value: value is None)
    ] = None
    """For causal-lm and preference: the date, as YYYY-MM-DD, that a chat template writes where it asks for today's.
    Without it, such a template writes 2024-07-26, or a date of its own."""
    beta: Annotated[float | None, Field(gt=0, le=100, exclude_if=lambda value: value is None)] = None
    """For preference: how closely the model is held to the base, above 0 up to 100. Without it, it is 0.1. A smaller
    value lets it move further."""

    @property
    def generates(self) -> bool:
        """Whether a language model is trained to write answers."""
        return self.kind in GENERATING

    @property
    def last_only(self) -> bool:
        """Whether only the last answer of a conversation is learnt."""
        return self.train_on == "last" or self.kind == "preference"

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.beta is not None and self.kind != "preference":
            raise ValueError(f"beta: {self.kind} compares no answers; remove the key")
        if self.train_on is not None and self.kind == "preference":
            raise ValueError("train_on: preference compares last answers; remove the key")
        if self.generates:
            if self.labels:
                raise ValueError(f"labels: {self.kind} has no labels; remove the key")
            if self.template_date is not None:
                try:
                    date.fromisoformat(self.template_date)
                except ValueError:
                    raise ValueError(f"template_date: there is no day {self.template_date}; correct it") from None
        elif self.train_on is not None or self.template_date is not None:
            raise ValueError(f"train_on, template_date: {self.kind} writes no turns; remove the keys")
        elif len(self.labels) < 2:
            raise ValueError(f"labels: {self.kind} needs at least 2, got {len(self.labels)}")
        if self.head is not None and (self.kind != "text-classification" or self.pooling == "mean"):
            raise ValueError("head: needs kind text-classification, and pooling cls or last")
        if self.head_reads is not None and self.kind != "token-classification":
            raise ValueError(f"head_reads: needs kind token-classification, found {self.kind}; remove the key")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a label is named twice; name each label once")
        if self.kind == "token-classification":
            kinds = {label[2:] for label in self.labels if label[:2] in ("B-", "I-")}
            expected = {"O"} | {f"{p}-{k}" for p in "BI" for k in kinds}
            if set(self.labels) != expected:
                raise ValueError("labels: token-classification needs O, and both B-x and I-x for each kind x")
        return self


class DataSection(Section):
    """The data contract: what a site's files must hold, and how rows become records.

    `privet data STUDY FILE` checks files against it.
    """

    columns: dict[str, Column]
    """Name of the column for each role. text-classification needs text and label. token-classification needs tokens and
    tags, or text and spans. causal-lm needs prompt and answer, or messages, or instruction and output; there, input is
    optional. preference needs prompt, chosen and rejected, or messages, chosen and rejected."""
    unit: Column | None = None
    """Column that names the patient, document or person that a row belongs to. Without it, every row is a unit of its
    own. Set it to protect a patient with several rows."""
    max_length: Annotated[int, Field(ge=4, le=131072)] = 128
    """Largest number of tokens in a record; longer records are cut. Memory and time grow with it."""
    unicode: Literal["NFC", "NFKC", "none"] = "NFKC"
    """Unicode normalisation of text before tokenisation. Use the one that the base model was trained with."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Expected fraction of units that each site holds out for validation, 0 to 0.5. In a private study the validation
    metrics get noise, too."""


ALL_LINEAR = "all-linear"
"""Target that means every linear layer."""
_Rank = Annotated[int, Field(ge=1, le=512)]
_Layer = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)]


class LoraSection(Section):
    """Shape of the adapter (Hu et al. 2022)."""

    rank: _Rank = 8
    """Rank r of the update B·A of a layer. Size of the adapter and bytes per round grow in proportion. 8 is a good
    start; a larger rank learns more without privacy, and gets more noise with it."""
    alpha: Positive = 16.0
    """Scale of the adapter: a layer adds alpha / rank times B·A to its output. Twice the rank is a good start."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of the adapter is set to 0 in training; 0 in a private study."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the linear layers that get an adapter, such as query and value. all-linear: every linear layer of the
    transformer layers, without experts and heads."""
    layers: Count | None = None
    """Number of top layers that get an adapter. Without it, all layers do. Set it to shrink the adapter."""
    modules_to_save: tuple[str, ...] = ()
    """Further modules that are trained in full. The task's own head is always trained and need not be named."""
    rank_pattern: Annotated[dict[_Layer, _Rank], Field(exclude_if=lambda value: not value)] = {}
    """Ranks of layers that differ from `rank`, by name: a layer's own name, or the end of its full name from a dot on.
    Only one entry may name a layer."""
    alpha_pattern: Annotated[dict[_Layer, Positive], Field(exclude_if=lambda value: not value)] = {}
    """The same for `alpha`."""
    site_ranks: Annotated[dict[Name, _Rank], Field(exclude_if=lambda value: not value)] = {}
    """Ranks of sites that train less than the rest, by name of the site: such a site trains and sends the first so many
    columns of each B alone. The mean of a column is over the sites that train it. Needs aggregation method ffa."""
    start: Annotated[Literal["random", "inputs"] | None, Field(exclude_if=lambda value: value is None)] = None
    """Rows of A at the start. random, the default: orthonormal. inputs: the directions in which the layer's inputs vary
    most, taken from the base on random tokens. They let a private study learn several times as much under the same
    noise where A stays fixed (aggregation method ffa)."""
    rslora: Annotated[bool | None, Field(exclude_if=lambda value: value is None)] = None
    """true: the scale is alpha divided by the square root of the rank (Kalajdzievski 2023), which keeps updates of
    large ranks from shrinking."""

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank that a layer may have."""
        every = (self.rank, *self.rank_pattern.values())
        return min(every), max(every)

    @property
    def ranks_text(self) -> str:
        """The rank, or the smallest and the largest: "8", "4 to 16"."""
        least, largest = self.ranks
        return str(least) if least == largest else f"{least} to {largest}"


class OptimizerSection(Section):
    """Settings that the optimizers of sites and of the server share."""

    learning_rate: Rate
    """Learning rate, above 0 up to 10000. Lower it if training diverges."""
    head_learning_rate: Rate | None = None
    """Learning rate of the modules that are trained in full (the head). Without it, it is `learning_rate`."""
    schedule: Schedule = Schedule()
    """How the learning rate changes over the study."""


class TrainingSection(OptimizerSection):
    """What each site does in a round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer at the sites. It must be sgd in privacy mode distributed."""
    rounds: Annotated[int, Field(ge=0, le=100_000)]
    """Number of rounds that train. In a private study, more rounds need more noise in each. 0: the head start alone."""
    local_steps: Count | None = None
    """Optimizer steps of a site in a round. Set either this or `local_epochs`."""
    local_epochs: Positive | None = None
    """Expected passes over the site's records in a round: local_epochs / sampling_rate steps, rounded."""
    sampling_rate: Fraction
    """Probability with which each unit enters a step's batch (Poisson sampling), above 0 up to 1. It is the same at
    every site, so batches grow with the site. A lower rate needs less noise per step."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight decay of the optimizer, per step and learning rate, from 0 to 100. With the learning rate it must not
    shrink a value by more than itself in a step."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For sgd: momentum, from 0 up to below 1."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """For adamw: decay rates of the running means of the gradient and of its square."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which the frozen base model drops a value in training; 0 in a private study."""
    fedprox_mu: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight mu of the proximal term mu/2 |w - w_round|^2 (Li et al. 2020), from 0 to 1000. Raise it if sites with
    different data drift apart within a round."""
    patience: Count | None = None
    """Number of rounds without a better federated validation loss after which the run stops early. Without it, the run
    never stops early."""
    head_start: Annotated[Literal["none", "class-means"], Field(exclude_if=lambda value: value == "none")] = "none"
    """class-means: one round before training sums the features of each class, and the head starts as the classifier by
    these means. It helps most where units are few or epsilon is small. none: the head starts at zero."""
    head_start_share: Annotated[float | None, Field(gt=0, lt=1, exclude_if=lambda value: value is None)] = None
    """For a head start in a private study: epsilon that this round alone costs, as a fraction of the study's. Without
    it, it is 0.5. Training gets what composition leaves."""

    train_head: Annotated[bool, Field(exclude_if=lambda value: value)] = True
    """false: after a head start, rounds train the adapter alone, and the head stays what the head start made it. Then
    the clip norm and the noise are the adapter's alone."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if not self.train_head and not (self.starts_head and self.rounds):
            raise ValueError(
                "train_head: false needs a head start, which makes the head, and 1 or more rounds; set head_start = "
                '"class-means" and rounds, or remove train_head'
            )
        if self.head_start_share is not None and not (self.starts_head and self.rounds):
            raise ValueError("head_start_share: needs a head start and 1 or more rounds to share with; remove the key")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("set exactly one of local_steps and local_epochs")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError('momentum: optimizer adamw has none; set betas, or optimizer = "sgd"')
        # A pull of more than 1 overshoots, and of more than 2 grows from step to step until float32 overflows. AdamW
        # normalises the pull of the proximal term.
        pull = self.weight_decay + (self.fedprox_mu if self.optimizer == "sgd" else 0.0)
        rate = max(self.learning_rate, self.head_learning_rate or 0.0)
        if rate * pull > 1:
            named = "weight_decay + fedprox_mu" if self.optimizer == "sgd" else "weight_decay"
            raise ValueError(
                f"learning_rate: expected a learning rate times {named} of at most 1, found {rate:g} * {pull:g}; lower "
                "one of them"
            )
        return self

    @property
    def starts_head(self) -> bool:
        """Whether a round before training computes the head."""
        return self.head_start != "none"

    @property
    def steps(self) -> int:
        """Optimizer steps a site takes in one round."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, round((self.local_epochs or 0.0) / self.sampling_rate))


class StatisticsSection(Section):
    """What a study of kind statistics counts besides units, labels and missing values."""

    lengths: Annotated[tuple[Count, ...], Field(min_length=1, max_length=64)] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    """Upper ends of the bins of records' lengths in tokens, ascending, at most 64. A further bin holds longer records.
    More bins do not raise epsilon, and each gets its own noise."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError("lengths: expected numbers of tokens in ascending order, none of them twice; sort them")
        return self


class EvaluationSection(Section):
    """What a study of kind evaluate measures."""

    adapter: Annotated[str, Field(pattern=ADAPTER_PATTERN)]
    """Digest of the adapter, `sha256:` and 64 hexadecimal digits: of a run's release, as `privet registry list`
    shows it, or of another adapter in PEFT's format; a wrong digest is answered with the right one. base: the base
    without an adapter."""
    files: Literal["train", "test"] = "train"
    """Which of a site's files are measured on. train: its training files, on which the adapter may have been trained.
    test: its test files, which a site file must then name."""


class AggregationSection(OptimizerSection):
    """How the sites' updates become the next adapter."""

    method: Literal["fedsvd", "ffa", "fedavg"] = "fedsvd"
    """fedsvd: sites train B, and the server refactors B·A by SVD. ffa: sites train B, and A stays fixed. fedavg: sites
    train A and B, and the server averages each. fedsvd for several local steps, ffa for one."""
    refactor_every: Count = 1
    """For fedsvd: number of rounds from one refactorisation to the next."""
    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "adam"] = "fedavg"
    """Optimizer at the server, applied to the mean update as a pseudo-gradient (Reddi et al. 2021). fedavg: SGD.
    fedavgm: SGD with momentum. fedadam, fedyogi: the paper's adaptive ones. adam: that of Kingma and Ba (2015) with
    bias correction; choose it for many short rounds."""
    learning_rate: Rate = 1.0
    """Learning rate of the server, above 0 up to 10000. At 1.0, fedavg takes the mean update as it is."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For fedavgm: momentum, from 0 up to below 1."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """For fedadam, fedyogi and adam: decay rates of the running means of the update and of its square."""
    tau: Positive = 1e-3
    """For fedadam, fedyogi and adam: constant that is added to the denominator. The smaller it is, the more the step of
    a value adapts to the size of its updates."""
    weighting: Literal["declared", "equal"] = "declared"
    """Weight of a site in the mean. declared: the count that it declares. equal: 1."""
    weight_power: Annotated[float | None, Field(gt=0, lt=1, exclude_if=lambda value: value is None)] = None
    """For declared: the weight is the count to this power, so that small sites count for more than their share. 0.5 is
    the root. Under privacy.mode local it costs accuracy of the mean: small sites have the most noise for each unit."""
    largest_count: Annotated[int, Field(ge=1, lt=2**48)] = 10_000
    """Largest count of units that a site may declare. The scale of masked values follows from it, so set it near the
    count of the largest site."""
    average: Annotated[Literal["none", "tail", "exponential"], Field(exclude_if=lambda value: value == "none")] = "none"
    """What the last round publishes. none: its adapter. tail: the average of the adapters after the second half of the
    rounds that train. exponential: the average after all of them; each counts 10 % less than the next. It costs no
    privacy."""
    max_norm: Positive | None = None
    """Largest L2 norm of a round's mean update. A longer one ends the round. Without it, the limit is what the bounds
    on the sites' values allow."""

    def weight(self, declared: int) -> float:
        """Return the weight of a site that declares so many units. It is public, and the same on every machine."""
        if self.weighting == "equal":
            return 1.0
        # Rounded, as libraries of mathematics differ in the last digit of a power.
        return float(declared) if self.weight_power is None else round(declared**self.weight_power, 6)

    @model_validator(mode="after")
    def _power(self) -> Self:
        if self.weight_power is not None and self.weighting == "equal":
            raise ValueError('weight_power: weighting = "equal" takes no count; remove one of the keys')
        return self

    @model_validator(mode="after")
    def _basis(self) -> Self:
        if self.average != "none" and self.method == "fedavg":
            raise ValueError(
                "average: method fedavg trains A and B, and averages of both apart are not the average of B·A; set "
                "method ffa or fedsvd, or remove average"
            )
        if self.method == "fedsvd" and self.optimizer in SQUARING:
            raise ValueError(
                f"optimizer: {self.optimizer} keeps squared gradients, which are wrong after fedsvd changes the basis; "
                "set method ffa, or optimizer fedavg or fedavgm"
            )
        return self


class CohortSection(Section):
    """Which sites take part in a round."""

    fraction: Fraction = 1.0
    """Fraction of the consenting sites that is drawn for each round, above 0 up to 1; never fewer than `min_sites`."""
    sites: tuple[Name, ...] = ()
    """Names of the sites that may take part. Empty: every site that consents and that the other sites know."""
    min_sites: Count = 3
    """Least number of sites that must deliver. With fewer, the round is aborted."""


class ReleaseSection(Section):
    """Terms of the adapter that the study releases. Sites agree to them with the study.

    Without the table, every member that may see the study may receive the adapter, for any purpose and without end.
    """

    to: Literal["members", "participants"] = "members"
    """Who may receive it. members: every member that may see the study. participants: of these, the sites that answered
    a round."""
    purpose: Annotated[str, Field(pattern=r"^[ -~]{1,256}$")] | None = None
    """What it may be used for, in words. A site's policy may list the purposes for which it receives adapters."""
    until: Day | None = None
    """Last day on which it may be received and used, as YYYY-MM-DD, in UTC."""


class PermitSection(Section):
    """A permit to use the data, as of a health data access body (EHDS). After its last day, no round begins."""

    number: Line
    """Its number, as it was issued."""
    purpose: Line
    """The purpose that it permits, in its own words."""
    expires: Day
    """Last day on which it holds, as YYYY-MM-DD, in UTC. After it, sites refuse the study and its rounds, each by its
    own clock, and the coordinator opens no round."""


class PurposeSection(Section):
    """Why the study is run, on which legal basis, and whom to ask. Shown to a site's people before they approve it.

    privet checks no sentence of it. It is part of the study, so its digest covers it, and `privet dossier RUN` cites
    it.
    """

    text: Line
    """What the study is for, in one or two sentences."""
    legal_basis: Line
    """The legal basis on which the sites use their records for it."""
    contacts: Annotated[tuple[Line, ...], Field(min_length=1, max_length=16)]
    """Whom to ask: names with a role, an address or a telephone number, such as of the controller and of the data
    protection officer."""
    permit: Annotated[PermitSection | None, Field(exclude_if=lambda value: value is None)] = None


class GateSection(Section):
    """The egress gate: the conditions under which the study's adapter leaves (docs/decisions/0023).

    With the table, a run ends with a candidate. Sites that took part test it and sign or refuse it, and it is released
    when all conditions are met. Without the table, a run ends with a release.
    """

    signatures: Count
    """Number of sites that must sign the candidate after a test of their own."""
    days: Annotated[int, Field(ge=1, le=3650)] = 30
    """Days that a signature counts, 1 to 3650. The release must be made before the first one ends."""
    canaries: Annotated[int, Field(ge=20, le=MOST_CANARIES)] | None = None
    """Least number of canaries of a site's audit, 20 to 100 000. A site plants them where its file sets `canaries`. At
    least one signer must have audited them. Without the key, canaries are no condition."""
    epsilon: Positive | None = None
    """Largest lower bound on epsilon that canaries may show. Without it: the study's epsilon. A study without privacy
    must set it."""
    membership: Annotated[float, Field(gt=0.5, le=1)] | None = None
    """Largest AUC of membership inference at a signer, above 0.5: the upper end of its 95 % interval must not exceed
    it. Without the key, membership is no condition."""
    repeated: Annotated[float, Field(gt=0, le=1)] | None = None
    """For tasks that generate: largest fraction of a signer's training answers of which the adapter repeats 8 words in
    a row and the base does not. The upper end of its 95 % interval must not exceed it."""
    metric: Literal["validation_accuracy", "validation_loss"] | None = None
    """Metric of the quality floor, of all sites together, in the last round that validated. A loss is compared as its
    negative value."""
    least: float | None = None
    """Least value of the metric. For validation_loss: minus the largest loss."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.metric is None) != (self.least is None):
            raise ValueError("metric: needs `least`, its least value, and the other way round; set both or neither")
        if self.epsilon is not None and self.canaries is None:
            raise ValueError("epsilon: is the bound of canaries; set canaries, or remove it")
        return self


class Promise(NamedTuple):
    """What a private study promises for one unit, and the clip norm that the noise is scaled to.

    Attributes:
        epsilon: Of the whole study, for a site that takes part in every round.
        delta: Of the whole study: how far a probability may change beyond the factor exp(epsilon).
        clip_norm: Largest L2 norm of one unit's gradient.
    """

    epsilon: float
    delta: float
    clip_norm: float


class PrivacySection(Section):
    """Differential privacy of what each site releases, for one unit, under addition or removal of that unit.

    `local`: everything that a site releases over the whole study is (epsilon, delta)-differentially private against
    everyone, the coordinator included. `distributed`: a round is one optimizer step, and sites share the noise. The
    same then holds against the coordinator together with the corrupt sites of `secure_aggregation`, provided that all
    other sites, less the drop-outs that `dropouts` admits, add their share.
    """

    mode: Literal["local", "distributed", "none"]
    """local: each site adds all the noise that it needs. distributed: the sites of a step share the noise, so the sum
    has less of it. none: no differential privacy."""
    unit: Literal["record", "patient"] = "record"
    """Unit of privacy. record: one row. patient: all rows that share a value of `data.unit`."""
    epsilon: Positive | None = None
    """Epsilon of the whole study for a site that takes part in every round. Smaller is more private and needs more
    noise. Needed unless mode is none."""
    delta: Annotated[float, Field(ge=1e-12, lt=0.1)] | None = None
    """Delta of the whole study: adding or removing a unit changes no probability by more than the factor exp(epsilon)
    and delta. Set it well below 1 / units of a site. Needed unless mode is none."""
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """L2 norm to which each unit's gradient is clipped. The noise is proportional to it. 1.0 is a good start for a
    classifier, 0.3 for a language model. Needed unless mode is none."""
    dropouts: Annotated[int, Field(ge=0, le=4096)] = 1
    """For distributed: number of sites that a step may lose. The shares of the other sites make up for their noise. If
    more sites drop out, the step has no sum."""
    dropout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """For distributed: the same as a fraction of the cohort, rounded down. The larger of the two counts."""
    noise: Annotated[Literal["independent", "banded"], Field(exclude_if=lambda value: value == "independent")] = (
        "independent"
    )
    """independent: the noise of each step is fresh. banded: for distributed, sites take back, in later steps, part of
    the noise that they added in the last `band` steps, so that the adapter moves less at random under the same epsilon
    (docs/correlated-noise.md). It pays with aggregation.optimizer fedavg or fedavgm, at epsilon 3 and above, with 10
    rounds or more and few drop-outs."""
    band: Annotated[int | None, Field(ge=2, le=MOST_BAND, exclude_if=lambda value: value is None)] = None
    """For banded: number of steps that noise is correlated over, 2 to 64. A unit is drawn in one of so many steps only,
    with `band` times the sampling rate, which may be at most 1. Choose one that divides the number of rounds."""
    epsilon_alone: Positive | None = None
    """For distributed: epsilon that a site's own shares of the noise must reach without the other sites, against
    everyone. Shares get more noise where that is needed. Without it, shares are as small as the sum allows."""
    max_records_per_unit: Count = 4
    """For unit patient: largest number of rows of one unit that enter one step, drawn at random."""
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    """flat: gradients longer than the clip norm are scaled to it. automatic: every gradient is scaled to about the clip
    norm. adaptive: as flat, and within a round the clip norm follows a private quantile; it starts at `clip_norm`."""
    stability: Annotated[float, Field(ge=1e-6, le=1)] = 0.01
    """For automatic: constant that is added to a gradient's norm before dividing by it."""
    head_clip_share: Annotated[float | None, Field(gt=0, lt=1, exclude_if=lambda value: value is None)] = None
    """Part of the squared clip norm that the head's gradient gets. Adapter and head are then clipped apart: the head to
    the root of this part times the clip norm, the adapter to the root of the rest. Noise and guarantee stay. Without
    it, they are clipped together, and the larger gradient, most often the head's, takes the clip norm."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """For adaptive: fraction of units whose gradients should be within the clip norm."""
    quantile_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    """For adaptive: largest change of the clip norm's natural logarithm in one step."""
    quantile_share: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.02
    """For adaptive: share of the noise budget, in 1/z^2, that the private count takes. A larger share makes the count
    more precise and the gradients noisier."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = {name: getattr(self, name) for name in ("epsilon", "delta", "clip_norm")}
        if self.epsilon_alone is not None and (self.mode != "distributed" or self.epsilon_alone <= (self.epsilon or 0)):
            raise ValueError(
                'epsilon_alone: needs mode distributed and a value above epsilon; for a lower one, set mode = "local"'
            )
        if self.mode != "none":
            missing = [name for name, value in given.items() if value is None]
            if missing:
                raise ValueError(f"mode {self.mode} needs {', '.join(missing)}")
            if self.mode == "distributed" and self.clipping == "adaptive":
                raise ValueError(
                    "clipping: adaptive needs mode local, as shared noise needs a fixed clip norm; set flat"
                )
            if self.head_clip_share is not None and self.clipping == "adaptive":
                raise ValueError("head_clip_share: adaptive moves one clip norm; set clipping flat or automatic")
        else:
            extra = [name for name, value in given.items() if value is not None]
            if extra:
                raise ValueError(f'mode none takes no {", ".join(extra)}; did you mean mode = "local"?')
            if self.clipping != "flat":
                raise ValueError("clipping: mode none does not clip; remove the key")
            if self.head_clip_share is not None:
                raise ValueError("head_clip_share: mode none does not clip; remove the key")
        return self

    @model_validator(mode="after")
    def _band_fits(self) -> Self:
        if (self.noise == "banded") != (self.band is not None):
            raise ValueError('band: needs noise = "banded", which needs a band; set both or neither')
        if self.noise == "banded" and self.mode != "distributed":
            raise ValueError(f"noise: banded needs mode distributed, found {self.mode}; remove noise and band")
        return self

    @property
    def promise(self) -> Promise:
        """Epsilon, delta and clip norm of a private study.

        Raises:
            StudyError: The study is not private.
        """
        if self.epsilon is None or self.delta is None or self.clip_norm is None:
            raise StudyError(
                "privacy: a study without privacy (mode = none) has no epsilon, no delta and no clip norm",
                'set privacy.mode = "local" or "distributed" in the study, with epsilon, delta and clip_norm',
            )
        return Promise(self.epsilon, self.delta, self.clip_norm)


class SecureAggregationSection(Section):
    """How updates reach the coordinator, and what secure aggregation must withstand (docs/secure-aggregation.md)."""

    mode: Literal["masked", "plain"] = "masked"
    """masked: the coordinator learns only sums. plain: the coordinator sees each site's update; for comparisons."""
    corrupt: Annotated[int, Field(ge=0, le=4096)] = 1
    """Number of sites that may collude with the coordinator. The sum stays hidden from them. Sites refuse a study with
    fewer than their own file demands: 1 by default."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The same as a fraction of the cohort, rounded down. The larger of the two counts."""
    dropout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the cohort that may drop out, for cohorts above 64 sites, whose masking graph is sparse. A smaller
    cohort may lose as many sites as a safe quorum allows."""
    security: Annotated[int, Field(ge=80, le=255)] = 80
    """Statistical security of the sparse masking graph of cohorts above 64 sites, in bits."""
    bits: Annotated[int, Field(ge=14, le=24)] | None = None
    """Resolution of one value, in bits. Without it: the most with which three sums fit a 64-bit word (two above 32
    sites)."""
    bound: Positive | None = None
    """Largest change of one LoRA value in a round. A larger change is cut, and counted. Without it: 4 times learning
    rate times steps; for SGD with privacy also times the clip norm, for SGD without it a fourth of that. Raise it if
    many values are cut."""
    head_bound: Positive | None = None
    """The same for modules that are trained in full. Without it: `bound` if that is set, or else derived from their
    learning rate."""
    suite: Annotated[
        Literal["x25519", "x25519-mlkem768", "p256-mlkem768"] | None, Field(exclude_if=lambda value: value is None)
    ] = None
    """The key agreement. Without it: x25519-mlkem768. p256-mlkem768: FIPS-approved algorithms alone. x25519: the rounds
    of earlier versions; whoever records them can read them once X25519 is broken, so sites refuse it by default."""
    block: Annotated[int | None, Field(ge=1, le=65_535, exclude_if=lambda value: value is None)] = None
    """Number of rounds with one set-up of secure aggregation, for privacy.mode = "distributed". A set-up takes three
    exchanges. If no site may drop out, a round takes one exchange instead of five, and one that a site misses has no
    result. With drop-outs, a round takes two exchanges, and three if a site is missing. Without it: a set-up for each
    round."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of groups that are summed separately in cohorts of 30 sites and more, so that a group with an outlying sum
    can be left out. The coordinator learns each group's sum. Fewer are formed if a group would be too small. Two are
    not allowed: neither would be the outlier."""
