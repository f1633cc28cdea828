"""Signing what lasts with ML-DSA-65 as well: a site's processor time for each round, and bytes of the round log.

A site's part of a round, as the log goes: it cosigns two checkpoints, verifies a quorum's cosignatures and the two
statements that open the round, and signs its own. Everybody's keys are Ed25519 alone, then hybrid. No site trains.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Check, start
from round_log import ORIGIN, Consortium, private

from privet.client.rounds.witness import Stale, Witness
from privet.common.audit.verify import verify_bundle
from privet.common.log.checkpoint import least_quorum, verify_leaf
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope, sign_envelope, verify_envelope
from privet.common.log.note import witness_lines
from privet.server.log.journal import NEWCOMERS
from privet.server.log.roundlog import RoundLog, create_log, lean, open_log

SITES = (9, 30)


@dataclass(frozen=True)
class Costs:
    """What a round costs.

    Attributes:
        milliseconds: Of a site's processor.
        statements: Their bytes.
        checkpoint: Bytes of a cosigned checkpoint.
        before: Bytes of the checkpoints that a site would get in a round, if both proofs had all cosignatures.
        sent: Bytes of those that it gets: one to cosign, and one with each proof.
        verification: Milliseconds of an auditor's processor, for each statement of the whole log.
    """

    milliseconds: float
    statements: int
    checkpoint: int
    before: int
    sent: int
    verification: float


def cosigned(log: RoundLog, consortium: Consortium, number: int) -> None:
    """Have all sites but the first cosign the newest checkpoint: their time is not measured."""
    text = log.checkpoint().decode().partition("\n\n")[0] + "\n"
    for site in consortium.sites[1:]:
        key = private(consortium.seed, f"witness {site}")
        lines = witness_lines(text, f"{site}.example", key, number, consortium.second(site))
        log.cosign(log.size, lines, consortium.policy)


def costs(directory: Path, consortium: Consortium, rounds: int) -> Costs:
    """Play rounds, and return the medians of what one costs the first site."""
    create_log(directory / "log")
    seed, site, policy = consortium.seed, consortium.sites[0], consortium.policy
    key = private(seed, f"witness {site}")
    witness = Witness.create(
        directory / site, policy.log, f"{site}.example", key, durable=False, pq=consortium.second(site)
    )
    coordinator, pq = private(seed, "coordinator").public_key().public_bytes_raw(), policy.log.pq
    spent, sizes = list[float](), list[int]()
    notes, sent, before = list[int](), list[int](), list[int]()
    history = consortium.rounds()
    with open_log(directory / "log", ORIGIN, private(seed, "log"), pq=consortium.second("coordinator")) as log:
        begun = next(history)
        log.append(begun)
        whole = [*begun]
        for number in range(rounds):
            leaves = next(history)
            log.append(leaves[:1])
            cosigned(log, consortium, number)
            seconds = cosign(log, witness, policy.needed)
            proof = log.prove_leaf(log.size - 1, policy)
            full, few = proof.checkpoint, least_quorum(len(policy.witnesses) + NEWCOMERS, 0)
            bare = len(lean(full, policy.log, (), 0))
            proof = replace(proof, checkpoint=lean(full, policy.log, policy.witnesses, few))
            sent.append(2 * bare + len(proof.checkpoint))
            before.append(bare + 2 * len(full))
            started = time.process_time()
            verify_leaf(proof, leaves[0], policy)
            for leaf in (begun[-1], leaves[0]):
                verify_envelope(leaf, (coordinator,), pq)
            seconds += time.process_time() - started
            statement = parse_statement(Envelope.decode(leaves[1]).payload)
            started = time.process_time()
            sign_envelope(statement, private(seed, site), consortium.second(site))
            seconds += time.process_time() - started
            log.append(leaves[1:])
            whole += leaves
            seconds += cosign(log, witness, policy.needed)
            spent.append(seconds)
            sizes.append(sum(map(len, leaves)))
            notes.append(len(full))
        cosigned(log, consortium, rounds)
        started = time.process_time()
        verdict = verify_bundle(lambda: whole, log.note(log.size), policy)
        verification = (time.process_time() - started) / len(whole)
        if not verdict.ok:
            raise ValueError(str(verdict))
    spent_on_a_round = 1000 * statistics.median(spent)
    leaves_of_a_round, note, with_all, with_few = (
        round(statistics.mean(each)) for each in (sizes, notes, before, sent)
    )
    return Costs(spent_on_a_round, leaves_of_a_round, note, with_all, with_few, 1000 * verification)


def cosign(log: RoundLog, witness: Witness, number: int) -> float:
    """Have the first site cosign the newest checkpoint; return its seconds."""
    note, old = log.checkpoint(), witness.last.size
    proof = log.prove_consistency(old, log.size)
    started = time.process_time()
    answer = witness.add(note, old, proof, number)
    seconds = time.process_time() - started
    if isinstance(answer, Stale):
        raise TypeError("the witness is behind")
    return seconds


def main() -> None:
    """Measure and print the checks."""
    bench = start("hybrid_signatures", __doc__)
    rounds = 10 if bench.quick else 60
    checks, details = list[Check](), dict[str, dict[str, float]]()
    for count in SITES:
        names = tuple(f"site-{number:02d}" for number in range(count))
        found = {}
        for hybrid in (False, True):
            with TemporaryDirectory() as folder:
                consortium = Consortium(bench.seed, names, hybrid=hybrid)
                found[hybrid] = costs(Path(folder), consortium, rounds)
            details[f"{count} sites, {'hybrid' if hybrid else 'Ed25519 alone'}"] = vars(found[hybrid])
        old, new = found[False], found[True]
        more = new.milliseconds - old.milliseconds
        checks += [
            Check(f"{count} sites: processor time of a site, added", more, "ms", "< 100", more < 100),
            Check(f"{count} sites: statements of a round", new.statements / 1000, "kB", "", None),
            Check(f"{count} sites: with Ed25519 alone", old.statements / 1000, "kB", "", None),
            Check(f"{count} sites: verification of a statement", new.verification, "ms", "", None),
            Check(f"{count} sites: with Ed25519 alone", old.verification, "ms", "", None),
            Check(f"{count} sites: a cosigned checkpoint", new.checkpoint / 1000, "kB", "", None),
            Check(f"{count} sites: with Ed25519 alone", old.checkpoint / 1000, "kB", "", None),
            Check(f"{count} sites: checkpoints to a site in a round", new.sent / 1000, "kB", "", None),
            Check(f"{count} sites: saved by sending few cosignatures", (new.before - new.sent) / 1000, "kB", "", None),
        ]
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
