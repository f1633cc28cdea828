"""A consortium made up for tests: keys from names, and logs of any length that are right in every respect."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.log import envelope, note
from privet.common.log.agreement import keys_digest
from privet.common.log.checkpoint import Checkpoint, Policy, least_quorum
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import COSIGNATURE, ED25519, Note, NoteKey
from privet.common.log.statements import (
    Charge,
    Export,
    Genesis,
    LedgerHead,
    Mechanism,
    Member,
    Privacy,
    Refusal,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SeenCheckpoint,
    SiteRound,
    StatedFloor,
    Statement,
)

ORIGIN = "example.org/consortium"
MECHANISM = Mechanism(
    mechanism="poisson-subsampled-gaussian",
    version=1,
    neighbouring="add-or-remove-one-unit",
    unit="record",
    noise_multiplier=1.1,
    sampling_rate=0.01,
    steps=10,
)


def private(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"key of {name}".encode()).digest())


def public(name: str) -> bytes:
    return private(name).public_key().public_bytes_raw()


def second(name: str) -> MLDSA65PrivateKey:
    """Return the ML-DSA-65 key of a site, or of the coordinator, whose log has the same one."""
    owner = name.replace("log", "coordinator")
    return MLDSA65PrivateKey.from_seed_bytes(hashlib.sha256(f"second key of {owner}".encode()).digest())


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def log_key(name: str = "log", *, hybrid: bool = False) -> NoteKey:
    return note.public_of(ORIGIN, ED25519, private(name), second(name) if hybrid else None)


def witness_key(site: str, *, hybrid: bool = False) -> NoteKey:
    pq = second(site) if hybrid else None
    return note.public_of(f"{site}.example", COSIGNATURE, private(f"witness {site}"), pq)


def member(site: str, *, hybrid: bool = False) -> Member:
    return Member(site=site, key=public(site).hex(), witness=witness_key(site, hybrid=hybrid).text)


@dataclass
class World:
    """A log being written by the book. `say` adds a leaf; the rest says what a leaf should say next.

    `note` is for tests to remember a hash in. Where it is `hybrid`, everybody signs with ML-DSA-65 as well.
    """

    sites: tuple[str, ...] = ("berlin", "lyon", "oslo")
    private: bool = True
    leaves: list[bytes] = field(default_factory=list)
    said: list[tuple[Statement, str]] = field(default_factory=list)
    frontier: Frontier = field(default_factory=Frontier)
    roots: list[bytes] = field(default_factory=lambda: [Frontier().root])
    ledgers: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    note: str = ""
    hybrid: bool = False

    def say(self, statement: Statement, author: str = "coordinator") -> str:
        """Add a leaf, and return its hash as statements quote it."""
        data = envelope.sign_envelope(statement, private(author), second(author) if self.hybrid else None)
        self.leaves.append(data)
        self.said.append((statement, author))
        self.frontier, _ = self.frontier.append(leaf_hash(data))
        self.roots.append(self.frontier.root)
        return "sha256:" + leaf_hash(data).hex()

    @property
    def now(self) -> int:
        """A clock that ticks with each leaf."""
        return 1_800_000_000 + len(self.leaves)

    # Statements

    def genesis(self, **changes: Any) -> Genesis:
        given = {
            "time": self.now,
            "consortium": "north",
            "log": log_key(hybrid=self.hybrid).text,
            "coordinator": public("coordinator").hex(),
            "members": tuple(member(site, hybrid=self.hybrid) for site in sorted(self.sites)),
            "quorum": least_quorum(len(self.sites), 0),
            "floor": StatedFloor(max_epsilon=10.0 if self.private else None, min_sites=2),
        }
        return Genesis.model_validate(given | changes)

    def run_open(self, run: str, **changes: Any) -> RunOpen:
        promise = Privacy(
            epsilon=8.0, delta=1e-5, clip_norm=1.0, accountant="prv opacus 1.6.0", training=MECHANISM, validation=None
        )
        given = {
            "time": self.now,
            "run": run,
            "study": digest(f"study {run}"),
            "base": digest("base"),
            "tokenizer": digest("tokenizer"),
            "software": digest("software"),
            "adapter": digest(f"{run} adapter 0"),
            "rounds": 50_000,
            "min_sites": 2,
            "secure_aggregation": "masked",
            "privacy": promise if self.private else None,
        }
        self.adapters[run] = str(given["adapter"])
        return RunOpen.model_validate(given | changes)

    def round_open(self, run: str, number: int, **changes: Any) -> RoundOpened:
        given = {
            "time": self.now,
            "run": run,
            "round": number,
            "nonce": hashlib.sha256(f"{run} {number} {len(self.leaves)}".encode()).hexdigest()[:32],
            "adapter": self.adapters[run],
            "cohort": tuple(sorted(self.sites)),
        }
        # Of whoever is asked: a test may ask others than everybody.
        cohort = changes.get("cohort", given["cohort"])
        given["parameters"] = keys_digest({site: public(site).hex() for site in cohort})
        return RoundOpened.model_validate(given | changes)

    def site_round(self, site: str, run: str, number: int, opened: str, **changes: Any) -> SiteRound:
        """Return what a site states; its ledger and epsilon go on from there."""
        sequence, head = self.ledgers.get(site, (0, None))
        self.ledgers[site] = (sequence + 3, digest(f"{site} ledger {sequence + 3}"))
        self.epsilon[site] = self.epsilon.get(site, 0.0) + 1e-4
        charge = Charge(
            account=digest(f"account of {site}"),
            training=MECHANISM,
            validation=None,
            delta=1e-5,
            epsilon=self.epsilon[site],
            limit=20.0,
        )
        given = {
            "time": self.now,
            "site": site,
            "run": run,
            "round": number,
            "opened": opened,
            "policy": digest(f"policy of {site}"),
            "ledger": LedgerHead(sequence=sequence + 3, head=digest(f"{site} ledger {sequence + 3}"), previous=head),
            "charge": charge if self.private else None,
            "upload": digest(f"{site} {run} {number} upload"),
            "checkpoint": SeenCheckpoint(size=len(self.leaves), root=self.frontier.root.hex()),
            "commitments": {"units": envelope.commit("units", 100, hashlib.sha256(site.encode()).digest())},
        }
        return SiteRound.model_validate(given | changes)

    def round_close(self, run: str, number: int, opened: str, **changes: Any) -> RoundClose:
        before, after = self.adapters[run], digest(f"{run} adapter {number} {len(self.leaves)}")
        self.adapters[run] = changes.get("adapter_published", after)
        given = {
            "time": self.now,
            "run": run,
            "round": number,
            "opened": opened,
            "survivors": tuple(sorted(self.sites)),
            "failures": {},
            "adapter_before": before,
            "adapter_after": after,
            "adapter_published": after,
            "aggregation": "fedsvd",
            "transcript": digest(f"transcript {run} {number}"),
            "metrics": {"validation_loss": 0.25},
            "epsilon": dict.fromkeys(self.sites, 0.5) if self.private else None,
            "ended": False,
        }
        return RoundClose.model_validate(given | changes)

    def round_abort(self, run: str, number: int, opened: str, **changes: Any) -> RoundAbort:
        given = {
            "time": self.now,
            "run": run,
            "round": number,
            "opened": opened,
            "adapter": self.adapters[run],
            "failures": {"lyon": "deadline"},
            "reason": "too few sites",
            "epsilon": dict.fromkeys(self.sites, 0.5) if self.private else None,
        }
        return RoundAbort.model_validate(given | changes)

    def refusal(self, site: str, run: str, **changes: Any) -> Refusal:
        given = {
            "time": self.now,
            "site": site,
            "run": run,
            "study": digest(f"study {run}"),
            "round": 0,
            "code": "E_DP_NOISE_BELOW_FLOOR",
            "rule": "limits.min_noise_multiplier",
            "asked": "0.0",
            "allowed": ">= 0.8",
            "policy": digest(f"policy of {site}"),
        }
        return Refusal.model_validate(given | changes)

    def export(self, run: str, number: int, **changes: Any) -> Export:
        given = {
            "time": self.now,
            "run": run,
            "round": number,
            "adapter": self.adapters[run],
            "files": {"adapter_model.safetensors": self.adapters[run], "README.md": digest("card")},
        }
        return Export.model_validate(given | changes)

    # Whole stretches of history

    def found(self, run: str = "flu") -> None:
        """Write the genesis and open a run."""
        self.say(self.genesis())
        self.say(self.run_open(run))

    def play(self, run: str, number: int) -> None:
        """Write a whole round."""
        opened = self.say(self.round_open(run, number))
        for site in sorted(self.sites):
            self.say(self.site_round(site, run, number, opened), site)
        self.say(self.round_close(run, number, opened))

    # Checkpoints

    @property
    def policy(self) -> Policy:
        witnesses = sorted((witness_key(site, hybrid=self.hybrid) for site in self.sites), key=lambda key: key.name)
        return Policy(log_key(hybrid=self.hybrid), tuple(witnesses), least_quorum(len(self.sites), 0))

    @property
    def head(self) -> Checkpoint:
        return Checkpoint(ORIGIN, self.frontier.size, self.frontier.root)

    def checkpoint(self, cosigners: tuple[str, ...] | None = None) -> bytes:
        """Return the note of the whole log, cosigned by these sites or all."""
        return sign_head(self.leaves, self.sites if cosigners is None else cosigners, hybrid=self.hybrid)


def signed(head: Checkpoint, cosigners: tuple[str, ...] = (), signer: str = "log", *, hybrid: bool = False) -> bytes:
    """Sign any tree head whatever, as a lying log and its friends would."""
    lines = note.log_lines(head.text, ORIGIN, private(signer), second(signer) if hybrid else None)
    for site in cosigners:
        key, pq = private(f"witness {site}"), second(site) if hybrid else None
        lines += note.witness_lines(head.text, witness_key(site).name, key, 1_800_000_000, pq)
    return Note(head.text, lines).encode()


def sign_head(
    leaves: list[bytes], cosigners: tuple[str, ...] = (), signer: str = "log", *, hybrid: bool = False
) -> bytes:
    """Sign the head of these leaves."""
    frontier = Frontier()
    for leaf in leaves:
        frontier, _ = frontier.append(leaf_hash(leaf))
    return signed(Checkpoint(ORIGIN, frontier.size, frontier.root), cosigners, signer, hybrid=hybrid)


def story(*, hybrid: bool = False) -> World:
    """Return a log in which everything happens: 28 leaves, two runs, an abort, a refusal, an export."""
    world = World(hybrid=hybrid)
    world.found("flu")
    world.say(world.refusal("oslo", "flu"), "oslo")
    world.play("flu", 1)
    aborted = world.say(world.round_open("flu", 2))
    world.say(world.site_round("berlin", "flu", 2, aborted), "berlin")
    world.say(world.round_abort("flu", 2, aborted))
    world.play("flu", 3)
    world.say(world.run_open("copd"))
    world.say(world.export("flu", 3))
    world.play("copd", 1)
    opened = world.say(world.round_open("copd", 2))
    world.say(world.site_round("berlin", "copd", 2, opened), "berlin")
    world.say(world.site_round("oslo", "copd", 2, opened), "oslo")
    two = ("berlin", "oslo")
    world.say(world.round_close("copd", 2, opened, survivors=two, failures={"lyon": "deadline"}, ended=True))
    world.say(world.site_round("lyon", "copd", 2, opened), "lyon")
    return world


def flips(data: bytes, positions: Iterator[int]) -> Iterator[bytes]:
    """Yield copies of `data` with one bit changed."""
    for position in positions:
        changed = bytearray(data)
        changed[position // 8] ^= 1 << (position % 8)
        yield bytes(changed)


@contextmanager
def in_memory(directory: Path) -> Iterator[Path]:
    """Yield a directory in memory, where there is such a thing: a process that is killed loses nothing there either.

    No test here can tell whether fsync reaches a disk; waiting for it some ten thousand times shows nothing.
    """
    memory = Path("/dev/shm")  # noqa: S108 - a name that nobody else knows is made inside
    if not os.access(memory, os.W_OK):
        yield directory
        return
    with TemporaryDirectory(dir=memory, prefix="privet-") as name:
        yield Path(name)
