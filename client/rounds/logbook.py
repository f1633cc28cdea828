"""A site's side of the round log: it witnesses, checks each round against what was witnessed, and states its part.

No round is trained that does not stand in the log as accepted by the witnesses, with the adapter, the cohort and the
study that this site was told of. One directory holds what must last::

    witness/       what this site cosigned, and evidence against the log (`privet.client.rounds.witness`)
    openings/      the values and salts behind the commitments in its statements, for its auditor
    account-salt   keeps the account's digest in the log from telling which dataset it is
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.client.rounds.witness import Stale, Witness, Write
from privet.client.site import LogSection, SiteConfig
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.agreement import follows, keys_digest
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy, verify_leaf
from privet.common.log.encoding import one_line
from privet.common.log.envelope import SALT_BYTES, commit, sign_envelope, verify_envelope
from privet.common.log.merkle import HASH_BYTES, leaf_hash
from privet.common.log.statements import Charge, LedgerHead, Refusal, RunOpen, SeenCheckpoint, SiteRound, Statement
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.study.messages import Cosigned, RoundOpen, Shown
from privet.common.study.study import Study

WITNESS, OPENINGS, SALT = "witness", "openings", "account-salt"
_RESTORE = "restore it from a backup"
# A tree of 2^53 leaves needs fewer hashes. What is refused is kept as evidence, which must not fill the disk.
_LONGEST_PROOF = 128 * HASH_BYTES


@dataclass(frozen=True)
class LoggedRound:
    """A round as the log shows it.

    Attributes:
        run: Name of its run.
        opened: Hash of its `round-open`.
        checkpoint: The accepted checkpoint that holds it.
    """

    run: str
    opened: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class SitePart:
    """What a site states of its part in a round.

    Attributes:
        upload: Digest of what leaves.
        policy: Digest of the site's policy.
        ledger: Where its ledger stands; None in a simulation.
        charge: What the round cost; None where the study is not private.
        values: What it commits to, by name.
    """

    upload: str
    policy: str
    ledger: LedgerHead | None
    charge: Charge | None
    values: Mapping[str, int]


@dataclass(frozen=True)
class Logbook:
    """A site's side of one log.

    Attributes:
        site: The site's name.
        key: Signs its statements: its identity key, which signs nothing else that begins as a DSSE envelope does.
        policy: Whose checkpoints count.
        coordinator: The coordinator's public key for statements, 32 bytes.
        witness: Cosigns checkpoints.
        directory: Where openings and the salt are.
        clock: Unix seconds.
    """

    site: str
    key: Ed25519PrivateKey
    policy: Policy
    coordinator: bytes
    witness: Witness
    directory: Path
    clock: Callable[[], int] = lambda: int(time.time())

    def cosign(self, shown: Shown) -> Cosigned:
        """Cosign a checkpoint that follows from the last one.

        Raises:
            ProtocolError: The message is malformed.
            VerificationError: The log did not sign it; or it does not follow, and is kept as evidence.
        """
        if len(shown.proof) % HASH_BYTES or len(shown.proof) > _LONGEST_PROOF:
            raise ProtocolError(
                f"consistency proof: expected at most {_LONGEST_PROOF} bytes, in hashes of {HASH_BYTES}, got "
                f"{len(shown.proof)}"
            )
        proof = tuple(shown.proof[at : at + HASH_BYTES] for at in range(0, len(shown.proof), HASH_BYTES))
        answer = self.witness.add(shown.checkpoint, shown.old, proof, self.clock())
        return Cosigned("", answer.size) if isinstance(answer, Stale) else Cosigned(answer.line, 0)

    def check(self, study: Study, opened: RoundOpen, pins: Mapping[str, bytes]) -> LoggedRound:
        """Check a round against the log, before anything is done for it.

        1. Its `round-open` and its run's `run-open` are in a checkpoint that a quorum cosigned, this site among them:
           the coordinator cannot show each site another round, nor take this one back.
        2. The coordinator signed both, and the run is one of this very study, with the same promise.
        3. What this site was told of the round is what stands there: number, nonce, adapter, cohort, and the keys that
           its masks are agreed with.

        Raises:
            ProtocolError, VerificationError, TooFewSitesError: One of these is not so.
        """
        where = f"round {opened.round}"
        if not opened.evidence:
            raise VerificationError(f"{where}: expected proof that it stands in the round log, found none")
        checkpoint, started, stated = self._both(opened)
        if not follows(started, study):
            raise VerificationError(
                f"{where}: the log opens run {started.run} for another study, or with another promise",
                "the same versions of privet and opacus calibrate alike",
            )
        masked = study.secure_aggregation.mode == "masked"
        keys = {name: pins[name].hex() for name in opened.cohort if name in pins}
        expected = (
            started.run,
            opened.round,
            opened.nonce,
            opened.adapter_digest,
            opened.cohort,
            keys_digest(keys) if masked else None,
        )
        found = (stated.run, stated.round, stated.nonce, stated.adapter, stated.cohort, stated.parameters)
        names = ("run", "round", "nonce", "adapter", "cohort", "identity keys of the cohort")
        for name, told, logged in zip(names, expected, found, strict=True):
            if told != logged:
                raise VerificationError(f"{where}: the {name} that the log holds is not the one this site was told")
        return LoggedRound(stated.run, f"sha256:{leaf_hash(opened.evidence.opened).hex()}", checkpoint)

    def _both(self, opened: RoundOpen) -> tuple[Checkpoint, RunOpen, OpenedStatement]:
        evidence = opened.evidence
        before = verify_leaf(LeafProof.parse(evidence.run_proof), evidence.run, self.policy)
        checkpoint = verify_leaf(LeafProof.parse(evidence.opened_proof), evidence.opened, self.policy)
        if not all(self.witness.cosigned(each) for each in {before, checkpoint}):
            where = f"round {opened.round}"
            raise VerificationError(f"{where}: stands under a checkpoint that this site has not cosigned")
        started, stated = _said(evidence.run, self.coordinator), _said(evidence.opened, self.coordinator)
        if not (isinstance(started, RunOpen) and isinstance(stated, OpenedStatement)):
            raise ProtocolError(f"round {opened.round}: its evidence is a {started.type} and a {stated.type}")
        return checkpoint, started, stated

    def state(self, seen: LoggedRound, opened: RoundOpen, part: SitePart) -> bytes:
        """Sign this site's part in a round, ready to be a leaf. What it commits to can be opened from then on.

        Raises:
            StateError: The openings cannot be written.
        """
        statement = SiteRound(
            time=self.clock(),
            site=self.site,
            run=seen.run,
            round=opened.round,
            opened=seen.opened,
            policy=part.policy,
            ledger=part.ledger,
            charge=part.charge,
            upload=part.upload,
            checkpoint=SeenCheckpoint(size=seen.checkpoint.size, root=seen.checkpoint.root.hex()),
            commitments=self._commit(seen, part.values),
        )
        return sign_envelope(statement, self.key)

    def _commit(self, seen: LoggedRound, values: Mapping[str, int]) -> dict[str, str]:
        """Write down values with fresh salts, once per round, and return the commitments.

        Asked again, a site states what it stated: new salts in their place would leave those in the log without.
        """
        if not values:
            return {}
        if _openings(self.directory, seen.opened).exists():
            kept = read_openings(self.directory, seen.opened)
            return {name: commit(name, value, salt) for name, (value, salt) in kept.items()}
        salts = {name: os.urandom(SALT_BYTES) for name in values}
        document = {name: {"value": value, "salt": salts[name].hex()} for name, value in values.items()}
        path = _openings(self.directory, seen.opened)
        try:
            write_durably(path, canonical_json(document) + b"\n", mode=0o600)
        except OSError as error:
            raise StateError(f"log: {path} cannot be written ({error.strerror})", "check the disk") from None
        return {name: commit(name, value, salts[name]) for name, value in values.items()}

    def run_of(self, study: Study, opened: RoundOpen) -> str:
        """Return the run of this study that a round belongs to; empty where this site has not seen that in the log.

        Raises:
            StateError: What it has seen cannot be read.
        """
        try:
            _, started, stated = self._both(opened)
        except (ProtocolError, VerificationError):
            return ""
        told = (started.run, study.digest, opened.round, opened.nonce)
        return started.run if (stated.run, started.study, stated.round, stated.nonce) == told else ""

    def refuse(self, study: Study, run: str, number: int, error: RefusedError, policy: str) -> bytes:
        """Sign a refusal of a run, or of a round of it: the rule, and nothing that depends on data."""
        statement = Refusal(
            time=self.clock(),
            site=self.site,
            run=run,
            study=study.digest,
            round=number,
            code=error.code,
            rule=one_line(error.rule or ("" if error.private else error.message)),
            asked=one_line(error.asked),
            allowed=one_line(error.allowed),
            policy=policy,
        )
        return sign_envelope(statement, self.key)

    def account(self, dataset: str, unit: str, delta: float) -> str:
        """Return the digest under which the log knows a dataset's privacy account at one delta.

        Raises:
            StateError: The salt cannot be read.
        """
        try:
            salt = (self.directory / SALT).read_bytes()
        except OSError as error:
            raise StateError(
                f"log: no salt in {self.directory} ({error.strerror})", "restore it from a backup"
            ) from None
        return digest(canonical_json({"salt": salt.hex(), "dataset": dataset, "unit": unit, "delta": delta}))


@lru_cache(maxsize=64)
def _said(leaf: bytes, coordinator: bytes) -> Statement:
    """Return what the coordinator states in a leaf, verified."""
    return verify_envelope(leaf, (coordinator,))[1]


def open_witness(site: SiteConfig, log: LogSection, write: Write = write_durably) -> Witness:
    """Return a site's witness, which keeps what it cosigned by `write`.

    Raises:
        StateError: The policy or the key cannot be read.
    """
    policy, key = read_policy(log.policy), site.cosigning_key(log)
    public = key.public_key().public_bytes_raw()
    # A site that the policy does not list witnesses for itself alone, under its own name.
    name = next((each.name for each in policy.witnesses if each.public == public), site.name)
    return Witness(log.state / WITNESS, policy.log, name, key, write=write)


def open_logbook(site: SiteConfig, write: Write = write_durably) -> Logbook | None:
    """Return a site's side of the log that its file names; None where it names none.

    Raises:
        StateError: Policy or keys cannot be read.
    """
    if site.log is None:
        return None
    key = site.identity_key()
    if key is None:
        raise StateError(f"site {site.name} has no identity, with which it signs statements", "set `identity`")
    policy, witness = read_policy(site.log.policy), open_witness(site, site.log, write)
    return Logbook(site.name, key, policy, bytes.fromhex(site.log.coordinator), witness, site.log.state)


def create_witness(site: SiteConfig) -> None:
    """Make the directory of a site's side of a log that it has seen nothing of, once.

    Raises:
        StateError: The site names no log; there is one already; or it cannot be written.
    """
    if site.log is None:
        raise StateError(f"site {site.name} names no round log", "set `[log]` in the site file")
    witness = open_witness(site, site.log)
    Witness.create(witness.directory, witness.log, witness.name, witness.key, witness.write)
    try:
        (site.log.state / OPENINGS).mkdir(mode=0o700)
        write_durably(site.log.state / SALT, os.urandom(SALT_BYTES), mode=0o600)
    except OSError as error:
        raise StateError(f"log: {site.log.state} cannot be written ({error.strerror})", "check the disk") from None


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        StateError: It is missing or no policy.
    """
    try:
        return _policy(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PrivetError) as error:
        raise StateError(
            f"log: {path} is not a policy ({type(error).__name__})", "get it from the consortium"
        ) from None


@lru_cache(maxsize=8)
def _policy(text: str) -> Policy:
    return Policy.parse(text)


def read_openings(directory: Path, opened: str) -> dict[str, tuple[int, bytes]]:
    """Return what a site committed to in a round, with the salts that open it.

    Args:
        directory: The site's side of the log.
        opened: Hash of the `round-open`.

    Raises:
        StateError: Nothing is kept for it.
    """
    path = _openings(directory, opened)
    try:
        document = json.loads(path.read_bytes())
        return {name: (entry["value"], bytes.fromhex(entry["salt"])) for name, entry in document.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"log: no openings in {path} ({type(error).__name__})", _RESTORE) from None


def _openings(directory: Path, opened: str) -> Path:
    return directory / OPENINGS / f"{opened.removeprefix('sha256:')}.json"
