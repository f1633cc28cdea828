"""A site's own configuration: who it is, where its files are, what machine it has.

This file never leaves the site and the coordinator has no say in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from privet.common.errors import StateError, StudyError
from privet.common.pki.keyfile import read_key
from privet.common.secagg.terms import Floor
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Name, Section


class FloorSection(Section):
    """What this site demands of secure aggregation, whatever the coordinator proposes (`secagg.terms.Floor`)."""

    cohort: Annotated[int, Field(ge=2)] = 3
    """Least number of sites whose updates are summed."""
    survivors: Annotated[int, Field(ge=2)] = 3
    """Least number of sites that stay to the end."""
    threshold: Annotated[int, Field(ge=2)] = 2
    """Least number of shares that reconstruct a secret."""
    corrupt: Annotated[int, Field(ge=0)] = 1
    """Sites that may be in league with the coordinator, at least."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The same as a fraction of the cohort."""
    security: Annotated[int, Field(ge=40, le=255)] = 80
    """Statistical security of a sparse masking graph in bits."""
    bits: Annotated[int, Field(ge=14, le=24)] = 14
    """Least resolution of a value."""

    def terms(self) -> Floor:
        """Return the floor as the protocol takes it."""
        return Floor(**self.model_dump())


class LimitSection(Section):
    """The site's promise to the people in its dataset, over all studies and for good."""

    unit: Literal["record", "patient"]
    """Whom the promise protects; a study must protect the same."""
    epsilon: Annotated[float, Field(gt=0)]
    """What all releases together may cost."""
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    """Of the composed guarantee."""


class LogSection(Section):
    """The round log that this site witnesses. Relative paths are relative to the site file."""

    policy: Path
    """Policy file (C2SP tlog-policy): the log's key, the witnesses, and how many of them must cosign."""
    coordinator: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """The key with which the coordinator signs statements, in hexadecimal."""
    state: Path
    """Directory of what must last: what this site cosigned, and what it committed to. `privet site init` makes it."""
    key: Path | None = None
    """File of this site's cosigning key (PEM, PKCS 8), another than its identity."""


class CoordinatorSection(Section):
    """How this site reaches its coordinator. Connections go out from here only."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$|^\[[0-9a-fA-F:]+\]:[0-9]{1,5}$")]
    """Host and port of the coordinator's fleet API."""
    root: Path
    """File of the one root certificate (PEM) that the coordinator's certificate must come from."""
    key: Path
    """File of this site's node key (OpenSSH, on P-384), readable by its owner alone; the coordinator has the
    public half. Beside it `privet site serve` keeps its lock and the message under way."""
    largest_message: Annotated[int, Field(ge=2**20)] = 2**30
    """Most bytes that one answer of the coordinator may have."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1 that serves Prometheus metrics; 0 serves none."""


class Resources(Section):
    """The machine a site trains on: settings that change neither the mechanism nor what is released.

    They are a type of their own, so that no privacy decision can come to depend on them.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first CUDA device where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the base; auto takes bf16 where the hardware computes in it. Adapters stay in fp32."""
    physical_batch: Annotated[int, Field(ge=1)] = 32
    """Records per forward pass; a larger logical batch is accumulated."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of PyTorch; None leaves its default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


class SiteConfig(Section):
    """One site, read from TOML. Relative paths are relative to the file."""

    name: Name
    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Training files: CSV, JSON Lines or Parquet."""
    test: tuple[Path, ...] = ()
    """Test files, for evaluation at the site or in a simulation."""
    declared_count: Annotated[int, Field(ge=1)] | None = None
    """The count this site declares: its weight, and public. Private studies need it; otherwise None takes the
    number of units, rounded to two digits."""
    policy: Path | None = None
    """What this site admits (docs/site-policy.md); `privet site policy --init` writes a first one. Without a policy
    file, a site refuses every study."""
    approvals: Path | None = None
    """File of the studies that someone at this site has read and agreed to; `privet site approve` adds to it."""
    dataset: Name | None = None
    """The dataset's lasting name, by which the ledger keeps what was spent. A new version of the data keeps it: the
    people in it are the same."""
    ledger: Path | None = None
    """File of the site's privacy ledger, on a local disk; `privet site init` creates it once."""
    anchor: Path | None = None
    """File that keeps the ledger's last entry, in another directory, better on another disk: a ledger that was put
    back from a backup is then recognised."""
    limit: LimitSection | None = None
    """What the dataset may spend in its lifetime; private studies need it, and others are refused where it is set."""
    identity: Path | None = None
    """File of this site's Ed25519 private key (PEM, PKCS 8), readable by its owner alone; `privet site identity`
    makes it."""
    peers: dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default={})
    """Public identity key of every site of the consortium, in hexadecimal, as its operator told this one's."""
    floor: FloorSection = FloorSection()
    log: LogSection | None = None
    """The round log. A site without one takes part in nothing."""
    coordinator: CoordinatorSection | None = None
    """Where `privet site serve` connects to."""
    resources: Resources = Resources()

    def identity_key(self) -> Ed25519PrivateKey | None:
        """Return the site's private key, or None where its file names none.

        Raises:
            StateError: The key file is missing or no such key, or others on this machine may read it.
        """
        return None if self.identity is None else read_key(self.identity, "identity")

    def cosigning_key(self, log: LogSection) -> Ed25519PrivateKey:
        """Return the key with which the site cosigns checkpoints.

        Raises:
            StateError: The key file is missing or no such key, or others on this machine may read it.
        """
        if log.key is None:
            raise StateError("log: the site file names no cosigning key", "set `key` under `[log]`")
        return read_key(log.key, "log.key")

    def pins(self) -> Mapping[str, bytes]:
        """Return the peers' identity keys, 32 bytes each, by name."""
        return _pins(tuple(self.peers.items()))


S = TypeVar("S", bound=SiteConfig)


@lru_cache(maxsize=8)
def _pins(peers: tuple[tuple[str, str], ...]) -> Mapping[str, bytes]:
    return {name: bytes.fromhex(key) for name, key in peers}


def load_site(path: Path) -> SiteConfig:
    """Read a site's configuration.

    Raises:
        StudyError: The file is missing or not valid.
    """
    return read_site(SiteConfig, path)


def read_site(kind: type[S], path: Path) -> S:
    """Read a site file as one kind of configuration, its paths made absolute. Raises as `load_site`."""
    site = validate(kind, read_toml(path, what="site"), what=f"site file {path.name}")
    root = path.parent
    log = site.log and site.log.model_copy(
        update={
            "policy": (root / site.log.policy).resolve(),
            "state": (root / site.log.state).resolve(),
            "key": None if site.log.key is None else (root / site.log.key).resolve(),
        }
    )
    return site.model_copy(
        update={
            "log": log,
            "policy": None if site.policy is None else (root / site.policy).resolve(),
            "approvals": None if site.approvals is None else (root / site.approvals).resolve(),
            "train": tuple((root / file).resolve() for file in site.train),
            "test": tuple((root / file).resolve() for file in site.test),
            "identity": None if site.identity is None else (root / site.identity).resolve(),
            "ledger": None if site.ledger is None else (root / site.ledger).resolve(),
            "anchor": None if site.anchor is None else (root / site.anchor).resolve(),
            "coordinator": None if site.coordinator is None else _resolved(site.coordinator, root),
        }
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
        raise StudyError("a site without units cannot declare a count")
    scale = int(10 ** max(0, len(str(units)) - 2))
    return (units + scale // 2) // scale * scale
