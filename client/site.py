"""A site's own configuration: its name, its files and its machine.

The site file never leaves the site. The coordinator cannot change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from pydantic import Field, field_validator, model_validator

from privet.client.formats import Formatted
from privet.client.trust import read_trusted
from privet.common.errors import StateError, StudyError
from privet.common.pki.keyfile import read_key, read_mldsa_key
from privet.common.retention import RetentionSection
from privet.common.secagg.terms import Floor
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import MOST_CANARIES, Column, Name, Section

JOINED = "consortium/roster.json"
"""Path in a site's directory. The file exists as soon as the site is a member."""
ASKED = "consortium/request.json"
"""Path in a site's directory: its request to join. It holds the token, so only its owner may read it."""
BaseName = Annotated[str, Field(min_length=1, max_length=200)]
ApproverKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
IdRule = Literal["number", "text", "case"]
"""How the ids of patients are written (`privet.client.training.ids`)."""


class FloorSection(Section):
    """Minima that a site requires of secure aggregation, whatever the coordinator proposes (`secagg.terms.Floor`)."""

    cohort: Annotated[int, Field(ge=2)] = 3
    """Least number of sites whose updates are summed."""
    survivors: Annotated[int, Field(ge=2)] = 3
    """Least number of sites that stay until the end of a round."""
    threshold: Annotated[int, Field(ge=2)] = 2
    """Least number of shares that reconstruct a secret."""
    corrupt: Annotated[int, Field(ge=0)] = 1
    """Least number of sites that are assumed to collude with the coordinator."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The same, as a fraction of the cohort."""
    security: Annotated[int, Field(ge=40, le=255)] = 80
    """Least statistical security of a sparse masking graph, in bits."""
    bits: Annotated[int, Field(ge=14, le=24)] = 14
    """Least resolution of a value."""
    classical: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether to accept studies whose masks rest on X25519 alone. Whoever records such a round can read this site's
    update once X25519 is broken."""
    fips: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether to accept only studies whose masks use FIPS-approved algorithms: `suite = "p256-mlkem768"`."""

    classical_signatures: Annotated[bool | None, Field(exclude_if=lambda value: value is None)] = None
    """Whether to take part where the log, or a member that cosigns it, signs with Ed25519 alone. None: only if this
    site has no ML-DSA-65 key itself, as it joined with an earlier version."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.classical and self.fips:
            raise ValueError("classical: set either classical or fips, as they exclude each other")
        return self

    def terms(self) -> Floor:
        """Return the floor in the form that the protocol uses."""
        return Floor(**self.model_dump(exclude={"classical_signatures"}))


class LimitSection(Section):
    """What the site's dataset may spend in its lifetime, over all studies."""

    unit: Literal["record", "patient"]
    """Unit of privacy that the limit protects. A study must protect the same unit."""
    epsilon: Annotated[float, Field(gt=0)]
    """Largest epsilon of all releases together."""
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    """Delta of the composed guarantee."""


class LogSection(Section):
    """The round log that this site witnesses. Relative paths are relative to the site file."""

    policy: Path | None = None
    """Policy file (C2SP tlog-policy): the log's key, the witnesses, and how many of them must cosign. Only where the
    site file names no `trusted`: otherwise the policy follows from the keys that were confirmed."""
    coordinator: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Public key that verifies the coordinator's statements, in hexadecimal. Only where there is no `trusted`."""
    state: Path
    """Directory of durable files: the checkpoints that this site cosigned, and the openings of its commitments.
    `privet site init` makes it."""
    key: Path | None = None
    """File of this site's cosigning key (PEM, PKCS 8). It is not the identity key."""


class CoordinatorSection(Section):
    """How this site reaches its coordinator. The site opens every connection and accepts none."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$|^\[[0-9a-fA-F:]+\]:[0-9]{1,5}$")]
    """Host and port of the coordinator's fleet API."""
    root: Path
    """File of the root certificate (PEM). The coordinator's certificate must chain to this root."""
    key: Path
    """File of this site's node key (OpenSSH, on P-384), readable by its owner alone. The coordinator has the public
    half. `privet site serve` keeps its lock and the message in progress in the same directory."""
    largest_message: Annotated[int, Field(ge=2**20)] = 2**30
    """Largest size of one answer of the coordinator, in bytes."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1 for Prometheus metrics; 0 for none."""


_SBATCH = frozenset({
    "account", "begin", "comment", "constraint", "cores-per-socket", "cpus-per-gpu", "cpus-per-task", "deadline",
    "exclude", "exclusive", "gpus", "gpus-per-node", "gpus-per-task", "hint", "licenses", "mem", "mem-per-cpu",
    "mem-per-gpu", "nice", "nodelist", "oversubscribe", "prefer", "priority", "qos", "reservation", "sockets-per-node",
    "switches", "threads-per-core", "tmp", "wckey",
})  # fmt: skip
"""Options of `sbatch` that change where and when a job runs, and nothing of what it does."""


class SlurmSection(Section):
    """How the trainer's job is submitted to Slurm (`trainer = "slurm"`)."""

    directory: Path
    """A directory that this site and the nodes of the cluster see under the same path, on a disk that both can write.
    Each job has a directory of its own in it, readable by its owner alone."""
    partition: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,-]*$")] | None = None
    """Partition, or several with commas. Without it: the cluster's default."""
    gres: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:=-]*$")] | None = None
    """Generic resources of the job, such as "gpu:1"."""
    time: Annotated[str, Field(pattern=r"^[0-9]+(-[0-9]+)?(:[0-9]{2}){0,2}$")] | None = None
    """Longest time of the job, as Slurm writes it: minutes, "hours:minutes:seconds" or "days-hours"."""
    idle: Annotated[int, Field(ge=30, le=86400)] = 600
    """Seconds that the job waits for a request before it ends. Rounds that follow within them need no new job."""
    extra: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f]*)?$")], ...] = ()
    """Further options of `sbatch`, one a string, such as "--account=oncology": those that say which machines run the
    job, when, and on whose account."""

    @field_validator("extra")
    @classmethod
    def _leaves_the_job_alone(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        # Whole names of these alone: `sbatch` takes the first letters of a name for it, so a list of others leaks.
        if found := [option for option in extra if option[2:].partition("=")[0] not in _SBATCH]:
            raise ValueError(f"extra: expected options of {', '.join(sorted(_SBATCH))}, found {', '.join(found)}")
        return extra


# A type of its own, so that no privacy decision can depend on it.
class Resources(Section):
    """The machine that a site trains on. These settings change neither the mechanism nor what is released."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first CUDA device, or the CPU where no CUDA device is visible."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the base. auto: bf16 where the hardware computes in bf16. Adapters stay in fp32."""
    physical_batch: Annotated[int, Field(ge=1)] = 32
    """Most records of a forward pass. A step of more records takes several passes, and gives the same sum."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of PyTorch. Without it: PyTorch's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    trainer: Annotated[Literal["inside", "process", "slurm"], Field(exclude_if=lambda value: value == "inside")] = (
        "inside"
    )
    """Where records are used. inside: in the site's process. process: in one of its own, which has no keys, no ledger
    and no network (docs/decisions/0019-trainer.md). slurm: in a job of a Slurm cluster."""
    devices: Annotated[int, Field(ge=1, le=64, exclude_if=lambda value: value == 1)] = 1
    """With `trainer = "process"`: number of trainers that share the units of a step, one for each CUDA device. The
    result is the same, bit for bit."""
    slurm: Annotated[SlurmSection | None, Field(exclude_if=lambda value: value is None)] = None
    """With `trainer = "slurm"`: how its job is submitted."""
    bases: Annotated[dict[BaseName, Path], Field(exclude_if=lambda value: not value)] = Field(default={})
    """The directory of each base model on this machine, by the name that studies give it."""

    @model_validator(mode="after")
    def _trainer_is_complete(self) -> Self:
        if (self.trainer == "slurm") != (self.slurm is not None):
            raise ValueError('trainer: expected "slurm" together with a table [resources.slurm], or neither')
        if self.devices > 1 and self.trainer != "process":
            raise ValueError('devices: expected 1, unless trainer = "process"')
        return self

    def __hash__(self) -> int:
        return hash((self.model_dump_json(exclude={"bases"}), tuple(sorted(self.bases.items()))))

    def knowing(self, bases: Mapping[str, Path]) -> Self:
        """Return these settings with further bases; those that are mapped already keep their directories."""
        return self.model_copy(update={"bases": {**bases, **self.bases}}) if bases else self

    def within(self, root: Path) -> Self:
        """Return these settings with the paths that are relative to `root` made absolute."""
        bases = {name: (root / path.expanduser()).resolve() for name, path in self.bases.items()}
        slurm = self.slurm and self.slurm.model_copy(update={"directory": (root / self.slurm.directory).resolve()})
        return self.model_copy(update={"bases": bases, "slurm": slurm}) if bases or slurm else self

    @property
    def inside(self) -> Self:
        """These settings for a process that trains itself."""
        return self.model_copy(update={"trainer": "inside", "devices": 1, "slurm": None})


class SiteConfig(Formatted):
    """One site, read from TOML. Relative paths are relative to the file."""

    name: Name
    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Training files: CSV, TSV, JSON Lines, JSON arrays or Parquet; all but Parquet also compressed with gzip."""
    test: tuple[Path, ...] = ()
    """Test files, for evaluation at the site or in a simulation."""
    canaries: Annotated[int, Field(ge=20, le=MOST_CANARIES)] | None = None
    """Number of canaries that this site plants in studies whose gate asks for them: made-up records, each of which
    enters the training with probability 1/2. At most `declared_count`. They cost records no privacy. None: none."""
    declared_count: Annotated[int, Field(ge=1)] | None = None
    """The number of units that this site declares. It is the site's weight, and it is public. Private studies need
    it. None: the number of units, rounded to two digits."""
    patient_column: Column | None = None
    """Name of the column that identifies patients, in all of the site's files. A study that protects patients must
    name this column in `data.unit`. Without it, the site refuses every such study."""
    patient_ids: IdRule | None = None
    """How the ids in `patient_column` are written. number: whole numbers; 101, "0101" and 101.0 are one patient. text:
    text in which upper and lower case do not matter. case: text in which they do. Without it, the site refuses files
    with two spellings that may be one patient."""
    policy: Path | None = None
    """Policy file: which studies this site admits (docs/site-policy.md). `privet site policy SITE --init` writes a
    first one. Without a policy file, a site refuses every study."""
    approvals: Path | None = None
    """File of the studies that a person at this site approved. `privet site approve` adds to it."""
    approvers: Annotated[dict[Name, ApproverKey], Field(exclude_if=lambda value: not value)] = Field(default={})
    """Public keys of the people who approve studies, in hexadecimal, by name. `privet site approver SITE NAME` adds
    one. With this table, an approval counts only if it is signed with the key of one of them."""
    dataset: Name | None = None
    """The dataset's lasting name. The ledger records spending under it. A new version of the data keeps the name,
    because it holds the same people."""
    ledger: Path | None = None
    """File of the site's privacy ledger, on a local disk. `privet site init` creates it once."""
    ledger_key: Path | None = None
    """File of the key that encrypts the updates in the ledger, in another directory. `privet site init` makes it. None:
    beside the ledger."""
    anchor: Path | None = None
    """File that keeps the ledger's last head, on another file system than the ledger. With it, the site detects a
    ledger that was restored from an old backup. A site without one takes part in nothing."""
    anchor_same_disk: bool = False
    """Accept an anchor on the ledger's own file system. One backup or snapshot may then restore both."""
    withdrawals: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether people, or the dataset, were withdrawn here (`privet site withdraw` writes it). Then nothing is read
    without the marks beside the ledger."""
    limit: LimitSection | None = None
    """What the dataset may spend in its lifetime. Private studies need it. With it, other studies are refused."""
    identity: Path | None = None
    """File of this site's Ed25519 private key (PEM, PKCS 8), readable by its owner alone. `privet site identity FILE`
    makes it."""
    mldsa: Annotated[Path | None, Field(exclude_if=lambda value: value is None)] = None
    """File of this site's ML-DSA-65 private key (PEM, PKCS 8), which signs statements and cosignatures beside the
    Ed25519 keys. `privet site join` makes it. A site that joined with an earlier version has none."""
    trusted: Path | None = None
    """File of the keys that this site's operator confirmed over the telephone: the consortium's and each member's.
    `privet site join` makes it, and `privet site trust SITE NAME` adds to it."""
    peers: dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default={})
    """Public identity key of every site, in hexadecimal, at a site that has not joined by `privet site join`. Get each
    key from that site's operator."""
    floor: FloorSection = FloorSection()
    log: LogSection | None = None
    """The round log. Without it, a site takes part in no study."""
    coordinator: CoordinatorSection | None = None
    """The coordinator that `privet site serve` connects to."""
    retention: Annotated[RetentionSection | None, Field(exclude_if=lambda value: value is None)] = None
    """How long this site keeps what (`privet site retention`)."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _canaries_are_few(self) -> Self:
        # Sums have room for some times the declared count.
        if self.canaries is not None and self.declared_count is not None and self.canaries > self.declared_count:
            raise ValueError(f"canaries: expected at most declared_count, {self.declared_count}, found {self.canaries}")
        return self

    @model_validator(mode="after")
    def _rule_has_a_column(self) -> Self:
        if self.patient_ids is not None and self.patient_column is None:
            raise ValueError("patient_ids: needs patient_column, the name of the column that identifies patients")
        return self

    @model_validator(mode="after")
    def _one_root_of_trust(self) -> Self:
        if self.trusted is not None:
            if self.peers or (self.log is not None and (self.log.policy or self.log.coordinator)):
                raise ValueError(
                    "trusted: expected no [peers], log.policy or log.coordinator beside it, as it replaces them"
                )
        elif self.log is not None and (self.log.policy is None or self.log.coordinator is None):
            raise ValueError("log: expected policy and coordinator, or the file `trusted` instead of both")
        return self

    def rule_for(self, column: str | None) -> IdRule | None:
        """Return how the ids in a study's unit column are written; None where the site file does not say."""
        return self.patient_ids if column is not None and column == self.patient_column else None

    def identity_key(self) -> Ed25519PrivateKey | None:
        """Return the site's private key, or None where its file names none.

        Raises:
            StateError: The key file is missing, holds no such key, or is readable by other users of this machine.
        """
        return None if self.identity is None else read_key(self.identity, "identity")

    def cosigning_key(self, log: LogSection) -> Ed25519PrivateKey:
        """Return the key with which the site cosigns checkpoints.

        Raises:
            StateError: The key file is missing, holds no such key, or is readable by other users of this machine.
        """
        if log.key is None:
            raise StateError(
                "log.key: the site file names no cosigning key, which a witness of the round log needs",
                "set `key` under `[log]` in the site file",
            )
        return read_key(log.key, "log.key")

    def mldsa_key(self) -> MLDSA65PrivateKey | None:
        """Return the site's ML-DSA-65 key, or None where its file names none.

        Raises:
            StateError: The key file is missing, holds no such key, or is readable by other users of this machine.
        """
        return None if self.mldsa is None else read_mldsa_key(self.mldsa, "mldsa")

    @property
    def classical_signatures(self) -> bool:
        """Whether this site takes part where others sign with Ed25519 alone."""
        own = self.floor.classical_signatures
        return self.mldsa is None if own is None else own

    def pins(self) -> Mapping[str, bytes]:
        """Return the identity keys of all sites that this site trusts, 32 bytes each, by name.

        Raises:
            StateError: The file of confirmed keys cannot be read.
        """
        if self.trusted is not None:
            return read_trusted(self.trusted).pins
        return _pins(tuple(self.peers.items()))


S = TypeVar("S", bound=SiteConfig)


@lru_cache(maxsize=8)
def _pins(peers: tuple[tuple[str, str], ...]) -> Mapping[str, bytes]:
    return {name: bytes.fromhex(key) for name, key in peers}


def load_site(path: Path) -> SiteConfig:
    """Read a site's configuration.

    Raises:
        StudyError: The file is missing or not valid.
        StateError: It is missing, because the site waits for the coordinator's approval.
    """
    if not path.exists():
        check_member(path.parent)
    return read_site(SiteConfig, path)


def read_site(kind: type[S], path: Path) -> S:
    """Read a site file as one kind of configuration, and make its paths absolute. Raises as `load_site`."""
    site = validate(kind, read_toml(path, what="site"), what=f"site file {path.name}")
    root = path.parent
    log = site.log and site.log.model_copy(
        update={
            "policy": None if site.log.policy is None else (root / site.log.policy).resolve(),
            "state": (root / site.log.state).resolve(),
            "key": None if site.log.key is None else (root / site.log.key).resolve(),
        }
    )
    return site.within(root).model_copy(
        update={
            "log": log,
            "resources": site.resources.within(root),
            "trusted": None if site.trusted is None else (root / site.trusted).resolve(),
            "policy": None if site.policy is None else (root / site.policy).resolve(),
            "approvals": None if site.approvals is None else (root / site.approvals).resolve(),
            "identity": None if site.identity is None else (root / site.identity).resolve(),
            "mldsa": None if site.mldsa is None else (root / site.mldsa).resolve(),
            "ledger": None if site.ledger is None else (root / site.ledger).resolve(),
            "ledger_key": None if site.ledger_key is None else (root / site.ledger_key).resolve(),
            "anchor": None if site.anchor is None else (root / site.anchor).resolve(),
            "coordinator": None if site.coordinator is None else _resolved(site.coordinator, root),
        }
    )


def check_member(directory: Path) -> None:
    """Check that a site is not one that has asked to join, and is not approved yet. Raises `StateError`."""
    if (directory / ASKED).exists() and not (directory / JOINED).exists():
        raise StateError(
            f"the site in {directory} has asked to join, and the coordinator has not approved it yet",
            "call the coordinator's operator, read out the twelve words, and then run the same command again: "
            f"`privet site join @TOKEN {directory}`",
        )


def _resolved(coordinator: CoordinatorSection, root: Path) -> CoordinatorSection:
    paths = {"root": (root / coordinator.root).resolve(), "key": (root / coordinator.key).resolve()}
    return coordinator.model_copy(update=paths)


def rounded_count(units: int) -> int:
    """Return a count rounded to two significant digits; below 100 that is the count itself.

    Raises:
        StudyError: There are no units.
    """
    if units < 1:
        raise StudyError(
            f"the declared count (units in the site's training data): expected 1 or more, found {units}",
            "check the files that `train` names in the site file",
        )
    scale = int(10 ** max(0, len(str(units)) - 2))
    return (units + scale // 2) // scale * scale
