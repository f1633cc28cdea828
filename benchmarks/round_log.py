"""The round log: time to verify 100,000 leaves offline, rate of durable appends, and cost of the log in a round."""

from __future__ import annotations

import hashlib
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from harness import Bench, Check, start
from studies import MEDQUAD, medquad_sites, require, write

from privet.client.rounds.witness import Stale, Witness
from privet.common.audit.verify import verify_bundle
from privet.common.canonical import digest
from privet.common.log import envelope, tiles
from privet.common.log.agreement import keys_digest
from privet.common.log.checkpoint import Policy, least_quorum, open_checkpoint
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import COSIGNATURE, ED25519, NoteKey, public_of
from privet.common.log.statements import (
    Charge,
    Genesis,
    Join,
    LedgerHead,
    Mechanism,
    Member,
    Privacy,
    RoundClose,
    RoundOpened,
    RunOpen,
    SeenCheckpoint,
    SiteRound,
    StatedFloor,
    Statement,
)
from privet.common.privacy.accounting import PrivacyEvent
from privet.server.log.roundlog import RoundLog, create_log, open_log

ORIGIN, RUN = "example.org/benchmark", "benchmark"
MECHANISM = Mechanism.model_validate(PrivacyEvent(1.1, 0.01, 10, "record").document())


def private(seed: int, name: str) -> Ed25519PrivateKey:
    """Return a key that the seed fixes; for measuring only."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())


def second(seed: int, name: str) -> MLDSA65PrivateKey:
    """Return the ML-DSA-65 key of a site or the coordinator, which the seed fixes; for measuring only."""
    return MLDSA65PrivateKey.from_seed_bytes(hashlib.sha256(f"{seed} second {name}".encode()).digest())


def vkey(seed: int, name: str, kind: int, *, hybrid: bool = False) -> NoteKey:
    """Return the public note key of `name`."""
    title = ORIGIN if kind == ED25519 else f"{name}.example"
    purpose = name if kind == ED25519 else f"witness {name}"
    owner = "coordinator" if kind == ED25519 else name
    return public_of(title, kind, private(seed, purpose), second(seed, owner) if hybrid else None)


def some(text: str) -> str:
    """Return the digest of something that the benchmark does not have."""
    return digest(text.encode())


@dataclass
class Consortium:
    """A log of rounds without end, in which every site states its part of every round."""

    seed: int
    sites: tuple[str, ...]
    frontier: Frontier = field(default_factory=Frontier)
    heads: dict[str, str | None] = field(default_factory=dict)
    adapter: str = field(default_factory=lambda: some("adapter 0"))
    hybrid: bool = False

    @property
    def policy(self) -> Policy:
        """Who has to cosign."""
        witnesses = tuple(vkey(self.seed, site, COSIGNATURE, hybrid=self.hybrid) for site in self.sites)
        log = vkey(self.seed, "log", ED25519, hybrid=self.hybrid)
        return Policy(log, witnesses, least_quorum(len(self.sites), 0))

    def second(self, name: str) -> MLDSA65PrivateKey | None:
        """Return the ML-DSA-65 key of a site or the coordinator, if they have one."""
        return second(self.seed, name) if self.hybrid else None

    def signed(self, statement: Statement, author: str = "coordinator") -> bytes:
        """Sign the next leaf."""
        leaf = envelope.sign_envelope(statement, private(self.seed, author), self.second(author))
        self.frontier, _ = self.frontier.append(leaf_hash(leaf))
        return leaf

    def rounds(self) -> Iterator[list[bytes]]:
        """Yield the leaves of the beginning, then those of one round after the other."""
        genesis = self.genesis()
        rest = enumerate(self.members[len(genesis.members) :], start=len(genesis.members) + 1)
        joins = [Join(time=0, member=member, quorum=least_quorum(count, 0)) for count, member in rest]
        yield [self.signed(genesis), *map(self.signed, joins), self.signed(self.run_open())]
        number = 1
        while True:
            yield self.round(number)
            number += 1

    @property
    def members(self) -> tuple[Member, ...]:
        """The sites with their keys."""
        return tuple(
            Member(
                site=site,
                key=private(self.seed, site).public_key().public_bytes_raw().hex(),
                witness=vkey(self.seed, site, COSIGNATURE, hybrid=self.hybrid).text,
            )
            for site in self.sites
        )

    def genesis(self) -> Genesis:
        """Name the members; of those with hybrid keys, as many as a leaf has room for."""
        members = self.members[:10] if self.hybrid else self.members
        coordinator = private(self.seed, "coordinator").public_key().public_bytes_raw().hex()
        return Genesis(
            time=0,
            consortium="benchmark",
            log=self.policy.log.text,
            coordinator=coordinator,
            members=members,
            quorum=least_quorum(len(members), 0),
            floor=StatedFloor(),
        )

    def run_open(self) -> RunOpen:
        """Open the run."""
        return RunOpen(
            time=0,
            run=RUN,
            study=some("study"),
            base=some("base"),
            tokenizer=some("tokenizer"),
            software=some("software"),
            adapter=self.adapter,
            rounds=1_000_000,
            min_sites=2,
            secure_aggregation="masked",
            privacy=Privacy(
                epsilon=8.0, delta=1e-5, clip_norm=1.0, accountant="prv", training=MECHANISM, validation=None
            ),
        )

    def round(self, number: int) -> list[bytes]:
        """Return the leaves of a round: open, one of each site, close."""
        opening = RoundOpened(
            time=number,
            run=RUN,
            round=number,
            nonce=f"{number:032x}",
            adapter=self.adapter,
            cohort=self.sites,
            parameters=keys_digest({member.site: member.key for member in self.members}),
        )
        leaves = [self.signed(opening)]
        opened = f"sha256:{leaf_hash(leaves[0]).hex()}"
        seen = SeenCheckpoint(size=self.frontier.size, root=self.frontier.root.hex())
        leaves += [self.signed(self.site_round(site, number, opened, seen), site) for site in self.sites]
        before, self.adapter = self.adapter, some(f"adapter {number}")
        closing = RoundClose(
            time=number,
            run=RUN,
            round=number,
            opened=opened,
            survivors=self.sites,
            failures={},
            adapter_before=before,
            adapter_after=self.adapter,
            adapter_published=self.adapter,
            aggregation="fedsvd",
            transcript=some(f"transcript {number}"),
            metrics={"validation_loss": 0.5},
            epsilon=dict.fromkeys(self.sites, number * 1e-6),
            ended=False,
        )
        return [*leaves, self.signed(closing)]

    def site_round(self, site: str, number: int, opened: str, seen: SeenCheckpoint) -> SiteRound:
        """Return a site's part in a round."""
        previous, self.heads[site] = self.heads.get(site), some(f"{site} ledger {number}")
        return SiteRound(
            time=number,
            site=site,
            run=RUN,
            round=number,
            opened=opened,
            policy=some(f"policy of {site}"),
            ledger=LedgerHead(sequence=number, head=str(self.heads[site]), previous=previous),
            charge=Charge(
                account=some(f"account of {site}"),
                training=MECHANISM,
                validation=None,
                delta=1e-5,
                epsilon=number * 1e-6,
                limit=8.0,
            ),
            upload=some(f"{site} {number}"),
            checkpoint=seen,
        )


def filled(directory: Path, consortium: Consortium, size: int) -> None:
    """Write a log of at least `size` leaves and publish it with every witness's cosignature."""
    create_log(directory / "log")
    sites = [
        Witness.create(directory / site, consortium.policy.log, key.name, private(consortium.seed, f"witness {site}"))
        for site, key in zip(consortium.sites, consortium.policy.witnesses, strict=True)
    ]
    with open_log(directory / "log", ORIGIN, private(consortium.seed, "log")) as log:
        for leaves in consortium.rounds():
            log.append(leaves)
            if log.size >= size:
                break
        witnessed(log, sites, consortium.policy)
        log.publish(directory / "public", consortium.policy)


def witnessed(log: RoundLog, sites: list[Witness], policy: Policy) -> None:
    """Have every site cosign the newest checkpoint."""
    note, size = log.checkpoint(), log.size
    starts = [site.last.size for site in sites]
    answers = [
        site.add(note, old, log.prove_consistency(old, size), int(time.time()))
        for site, old in zip(sites, starts, strict=True)
    ]
    log.cosign(size, [line for answer in answers if not isinstance(answer, Stale) for line in answer], policy)


def verification(directory: Path, policy: str) -> tuple[str, float, float, float]:
    """Verify a published log; return the verdict, seconds, seconds of one processor, and this process's peak in MB."""
    started, processor = time.perf_counter(), time.process_time()
    accepted = Policy.parse(policy)
    note = (directory / "checkpoint").read_bytes()
    size = open_checkpoint(note, accepted.log)[0].size

    def fetch(path: str) -> bytes:
        return (directory / path).read_bytes()

    verdict = verify_bundle(lambda: tiles.read_leaves(size, fetch), note, accepted)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return str(verdict), seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def append_rates(directory: Path, consortium: Consortium, seconds: float) -> dict[str, float]:
    """Return leaves per second, one to a commit and a round's to a commit, beside plain writes with fsync.

    All three in turn, so that whatever else the disk does falls on each alike.
    """
    rounds = consortium.rounds()
    batch = [next(rounds), next(rounds)][1]
    create_log(directory)
    with (
        open_log(directory, ORIGIN, private(consortium.seed, "log")) as log,
        (directory / "floor").open("wb", buffering=0) as file,
    ):

        def plain() -> None:
            file.write(batch[1])
            os.fsync(file.fileno())

        works: dict[str, Callable[[], object]] = {
            "floor": plain,
            "single": lambda: log.append(batch[1:2]),
            "grouped": lambda: log.append(batch),
        }
        spent, count, ends = dict.fromkeys(works, 0.0), 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            for name, work in works.items():
                started = time.perf_counter()
                work()
                spent[name] += time.perf_counter() - started
            count += 1
    rates = {name: count / total for name, total in spent.items()}
    return {**rates, "grouped": rates["grouped"] * len(batch)}


def round_cost(directory: Path, consortium: Consortium, count: int) -> float:
    """Return the median seconds that log and witnesses take for a round, all on this machine and one after another.

    Two checkpoints, each cosigned by every site, and one publication.
    """
    create_log(directory / "log")
    sites = [
        Witness.create(directory / site, consortium.policy.log, key.name, private(consortium.seed, f"witness {site}"))
        for site, key in zip(consortium.sites, consortium.policy.witnesses, strict=True)
    ]
    costs = []
    rounds = consortium.rounds()
    with open_log(directory / "log", ORIGIN, private(consortium.seed, "log")) as log:
        log.append(next(rounds))
        for _ in range(count):
            started = time.perf_counter()
            leaves = next(rounds)
            log.append(leaves[:1])
            witnessed(log, sites, consortium.policy)
            log.append(leaves[1:])
            witnessed(log, sites, consortium.policy)
            log.publish(directory / "public", consortium.policy)
            costs.append(time.perf_counter() - started)
    return statistics.median(costs)


@contextmanager
def timed(methods: Sequence[tuple[type, str]]) -> Iterator[list[float]]:
    """Collect the seconds that these methods take in this process; a call within another counts once."""
    spent: list[float] = []
    within = 0

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal within
            within += 1
            started = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                within -= 1
                if not within:
                    spent.append(time.perf_counter() - started)

        return call

    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(patch.object(owner, name, wrapped(getattr(owner, name))))
        yield spent


def study_share(directory: Path, quick: bool) -> float:
    """Return the percentage of a MedQuAD study's rounds that goes into the log, all sites' part included."""
    # Here, as what verifies the log in a process of its own imports this module, and needs no PyTorch.
    import medquad

    from privet.client.rounds.logbook import Logbook
    from privet.client.rounds.worker import Worker
    from privet.server.log.journal import Journal
    from privet.server.rounds.run_log import RunLog
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.runs.simulate import prepare, run_arm

    sites = medquad_sites()
    if quick:
        sites = {site: sites[site] for site in ("cdc", "nhlbi", "seniorhealth")}
    document = medquad.study(0, 2 if quick else 6, {"mode": "none"}, "masked")
    document["simulation"] = {"data": "files", "evaluate_every": 1000, "sites": sites}
    document["simulation"]["resources"] = {"threads": 1}
    directory.mkdir()
    simulated = prepare(write(directory / "study.toml", document), directory / "run")
    log: list[tuple[type, str]] = [(RunLog, "open"), (RunLog, "close"), (RunLog, "witness"), (Journal, "publish")]
    log += [(Journal, "hear_round"), (Journal, "flush"), (Journal, "for_site"), (Logbook, "check"), (Worker, "_state")]
    with timed(log) as spent:
        state = run_arm(RunDirectory.open(simulated.path), simulated.sites, "log", lambda statement, adapter: None)
    return 100 * sum(spent) / sum(float(statement["seconds"]) for statement in state.statements)


def measured(bench: Bench, directory: Path) -> tuple[list[Check], dict[str, float]]:
    """Take all figures; return the checks and what else is worth keeping."""
    size = 10_000 if bench.quick else 100_000
    names = tuple(f"site-{number:02d}" for number in range(20))
    bench.say(f"writing a log of {size} leaves, 20 sites")
    started = time.perf_counter()
    filled(directory / "large", Consortium(bench.seed, names), size)
    bench.say(f"written in {time.perf_counter() - started:.1f} s; verifying")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        policy = Consortium(bench.seed, names).policy.text
        verdict, seconds, processor, memory = pool.submit(verification, directory / "large" / "public", policy).result()
    bench.say(verdict[:120])
    started = time.perf_counter()
    with open_log(directory / "large" / "log", ORIGIN, private(bench.seed, "log")) as log:
        opened, leaves = time.perf_counter() - started, log.size
        leaf_bytes = statistics.mean(len(leaf) for leaf in log.leaves(leaves - 1000))
    rates = append_rates(directory / "rates", Consortium(bench.seed, names), 3.0 if bench.quick else 15.0)
    cost = round_cost(directory / "round", Consortium(bench.seed, names[:4]), 10 if bench.quick else 50)
    require(MEDQUAD)
    medquad_share = study_share(directory / "study", bench.quick)
    share = rates["single"] / rates["floor"]
    limit = 60.0 * size / 100_000
    checks = [
        Check("leaves verified", leaves, "", "all", verdict.startswith(f"verified: {leaves} leaves")),
        Check("verification, site signatures included", seconds, "s", f"< {limit:g}", seconds < limit),
        Check("verification, time of the one processor it uses", processor, "s", "", None),
        Check("verification, peak memory", memory, "MB", "< 500", memory < 500),
        Check("opening the log, which recomputes the tree", opened, "s", "", None),
        Check("write and fsync of this disk", rates["floor"], "/s", "", None),
        Check("appends, one leaf to a commit", rates["single"], "/s", "", None),
        Check("of what the disk allows", share, "", ">= 0.5", share >= 0.5),
        Check("appends, 22 leaves to a commit", rates["grouped"], "/s", ">= 1000", rates["grouped"] >= 1000),
        Check("log and witnesses, one round of 4 sites", cost * 1000, "ms", "", None),
        Check("of a MedQuAD round, nine sites", medquad_share, "%", "< 1", None if bench.quick else medquad_share < 1),
    ]
    return checks, {"sites": 20, "leaf_bytes": leaf_bytes, **rates}


def main() -> None:
    """Measure and print the checks."""
    bench = start("round_log", __doc__)
    with TemporaryDirectory() as name:
        checks, details = measured(bench, Path(name))
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
