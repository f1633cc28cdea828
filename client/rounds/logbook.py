"""A site's side of the round log (Merkle): it cosigns checkpoints, checks each round, and states its part in it.

A site trains a round only if the log holds it, under a checkpoint that a quorum of witnesses cosigned, with the study,
the adapter and the cohort that the site received. One directory holds the durable files::

    witness/       checkpoints that this site cosigned, and evidence against the log (`privet.client.rounds.witness`)
    log.leaves     the site's copy of the log (`privet.client.rounds.history`)
    openings/      the values and salts behind the commitments in its statements, for its auditor
    refusals/      the refusals that it signed, as receipts (`privet.client.rounds.refusals`)
    account-salt   salt of the account's digest in the log, so that the digest does not reveal the dataset
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.client.rounds.history import Fetch, LogCopy, confirmed
from privet.client.rounds.refusals import keep_refusal, warn_of_omitted
from privet.client.rounds.witness import Stale, Witness
from privet.client.site import LogSection, SiteConfig
from privet.client.trust import Trusted, read_trusted
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.agreement import follows, keys_digest
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy, verify_leaf
from privet.common.log.encoding import one_line
from privet.common.log.envelope import SALT_BYTES, commit, sign_envelope, verify_envelope
from privet.common.log.epochs import KeyEpoch
from privet.common.log.merkle import HASH_BYTES, check_inclusion, leaf_hash
from privet.common.log.note import NoteKey, encode_lines
from privet.common.log.replay import Replay
from privet.common.log.statements import Charge, LedgerHead, Refusal, RunOpen, SeenCheckpoint, SiteRound, Statement
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.masking.isolation import Isolation, drawn_cohort
from privet.common.study.messages import Cosigned, RoundOpen, Shown
from privet.common.study.study import Study

WITNESS, OPENINGS, SALT, COPY, POLICY = "witness", "openings", "account-salt", "log.leaves", "log.policy"
_RESTORE = "restore the file from a backup"
_NO_ROUND = "take part in no round of this run until the coordinator's operator has explained the difference"
# A tree of 2^53 leaves needs fewer hashes. The site keeps a refused proof as evidence, which must not fill the disk.
_LONGEST_PROOF = 128 * HASH_BYTES


@dataclass(frozen=True)
class LoggedRound:
    """A round as the log holds it.

    Attributes:
        run: Name of its run.
        opened: Hash of its `round-open`.
        checkpoint: The cosigned checkpoint that holds it.
        ledger: Number of rows and head of this site's ledger in its last statement, by the site's own copy of the log;
            None before its first statement, or without a copy.
        lost: Numbers of the run's earlier rounds with this site that led to nothing, by the same copy.
    """

    run: str
    opened: str
    checkpoint: Checkpoint
    ledger: tuple[int, str] | None = None
    lost: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SitePart:
    """What a site states of its part in a round.

    Attributes:
        upload: Digest of what leaves.
        policy: Digest of the site's policy.
        ledger: Head of its ledger; None in a simulation.
        charge: What the round cost; None where the study is not private.
        values: The values that it commits to, by name.
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
        key: Signs its statements. It is the identity key, which signs nothing else that begins like a DSSE envelope.
            The witness's ML-DSA-65 key, if it has one, signs them as well.
        rule: Says whose checkpoints count, and who the coordinator is.
        witness: Cosigns checkpoints.
        directory: Holds the openings and the salt.
        clock: Unix seconds.
        classical: Whether the site takes part where the log or a witness signs with Ed25519 alone.
    """

    site: str
    key: Ed25519PrivateKey
    rule: Rule
    witness: Witness
    directory: Path
    clock: Callable[[], int] = lambda: int(time.time())
    classical: bool = True

    def cosign(self, shown: Shown) -> Cosigned:
        """Cosign a checkpoint that follows from the last one.

        Raises:
            ProtocolError: The message is malformed.
            VerificationError: The log did not sign it; or it does not follow, and the site keeps it as evidence.
        """
        if len(shown.proof) % HASH_BYTES or len(shown.proof) > _LONGEST_PROOF:
            raise ProtocolError(
                f"the coordinator's proof that the round log only grew: expected hashes of {HASH_BYTES} bytes, at most "
                f"{_LONGEST_PROOF} bytes in all, found {len(shown.proof)} bytes",
                "the message is malformed or was changed on the way; run the same version of privet on both sides",
            )
        proof = tuple(shown.proof[at : at + HASH_BYTES] for at in range(0, len(shown.proof), HASH_BYTES))
        answer = self.witness.add(shown.checkpoint, shown.old, proof, self.clock())
        return Cosigned("", answer.size) if isinstance(answer, Stale) else Cosigned(encode_lines(answer), 0)

    def check(self, study: Study, opened: RoundOpen, pins: Mapping[str, bytes]) -> LoggedRound:
        """Check a round against the log, before the site does anything for it.

        1. Its `round-open` and its run's `run-open` are in a checkpoint that a quorum cosigned, this site included.
           So the coordinator cannot send each site a different round, nor withdraw this one.
        2. The coordinator signed both. The run is for this very study, with the same privacy guarantee.
        3. The log holds what this site received of the round: number, nonce, adapter, cohort, and the identity keys
           from which masks are derived.

        A site that has a copy of the log also looks for its own refusals in it, and warns where one is missing.

        Raises:
            ProtocolError, VerificationError, TooFewSitesError: One of these does not hold.
            RefusedError: The log or a witness signs with Ed25519 alone, and the site does not accept it.
        """
        where = f"round {opened.round}"
        if not opened.evidence:
            raise VerificationError(
                f"{where}: expected proofs that the round log holds the round, found none in the coordinator's message",
                _NO_ROUND,
            )
        checkpoint, started, stated = self._both(opened)
        policy = self.rule.policy(checkpoint)
        if not self.classical and (refused := refusal_of((policy.log, *policy.witnesses))):
            raise refused
        if not follows(started, study):
            raise VerificationError(
                f"{where}: the round log opens run {started.run} for another study than the coordinator sent, or with "
                "another noise calibration",
                "install the coordinator's versions of privet and opacus: only equal versions calibrate the same "
                "noise. If they are equal, take part in no round until the operator has explained the difference",
            )
        # Masks are derived from the keys that this site pinned. Their digest in the log proves that every site of the
        # cohort pinned the same keys, so that the coordinator has put none of its own between two sites.
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
        for name, received, logged in zip(names, expected, found, strict=True):
            if received != logged:
                raise VerificationError(
                    f"{where}: the round log does not hold the {name} that this site expects", _NO_ROUND
                )
        copy = self.rule.copy if isinstance(self.rule, Confirmed) else None
        ledger, lost = None, frozenset[int]()
        if copy is not None:
            history = copy.history(checkpoint)
            warn_of_omitted(self.directory, history)
            ledger = history.ledger_of(self.site)
            self._check_standing(opened, history)
            run = history.runs[stated.run]
            tried = {each.statement.round for each in run.rounds.values() if self.site in each.statement.cohort}
            lost = frozenset(tried - run.published.keys() - {stated.round})
        self._check_draw(study, opened, stated, checkpoint)
        return LoggedRound(stated.run, f"sha256:{leaf_hash(opened.evidence.opened).hex()}", checkpoint, ledger, lost)

    def _check_standing(self, opened: RoundOpen, history: Replay) -> None:
        """Check that the round has not ended, and that the ledger that the coordinator states is not an older one.

        An update for a round that has ended would be in no sum that the log tells of. And a ledger that was restored
        from a backup would be taken for the true one.
        """
        where = f"round {opened.round}"
        stated = f"sha256:{leaf_hash(opened.evidence.opened).hex()}"
        if not any(run.open == stated for run in history.runs.values()):
            raise VerificationError(
                f"{where}: the round has ended, as this site's copy of the round log says", _NO_ROUND
            )
        # The log may hold a later statement than the copy, but never an earlier one.
        known = history.ledger_of(self.site)
        said = (opened.evidence.sequence, opened.evidence.head)
        if known is not None and (said[0] < known[0] or (said[0] == known[0] and said[1] != known[1])):
            raise VerificationError(
                f"{where}: the coordinator states {said[0]} entries of this site's ledger, but the site's last "
                f"statement in its copy of the round log has {known[0]}",
                _NO_ROUND,
            )

    def _check_draw(self, study: Study, opened: RoundOpen, stated: OpenedStatement, checkpoint: Checkpoint) -> None:
        """Check that the coordinator has not chosen the cohort: it follows from who took part, and a public seed.

        Two sums over sets that differ by one site would give that site's update away where there is no noise.
        """
        isolation = self.rule.isolation(stated.run, checkpoint)
        participants = stated.participants or stated.cohort
        if isolation is None or self.site not in participants:
            return
        if drawn_cohort(study, opened.round, participants, isolation) != stated.cohort:
            raise VerificationError(
                f"round {opened.round}: the cohort is not the one that the study's public seed draws from the "
                "participants in the round log",
                _NO_ROUND,
            )

    def _both(self, opened: RoundOpen) -> tuple[Checkpoint, RunOpen, OpenedStatement]:
        evidence = opened.evidence
        proofs = [LeafProof.parse(proof) for proof in (evidence.run_proof, evidence.opened_proof)]
        # The two leaves may be under different checkpoints: the run was opened before its first round.
        heads = [self.witness.open(proof.checkpoint)[0] for proof in proofs]
        # A quorum of other sites is not enough: this site's own record is what detects a fork of the log.
        if not all(self.witness.cosigned(each) for each in heads):
            where = f"round {opened.round}"
            raise VerificationError(
                f"{where}: the coordinator proves the round with a checkpoint of the round log that this site has not "
                "cosigned",
                "take part in no round until the coordinator has sent this checkpoint to the site for a cosignature",
            )
        policy = self.rule.policy(heads[1])
        checkpoint = verify_leaf(proofs[1], evidence.opened, policy)
        # The run's checkpoint is an earlier one of the same log, as this site cosigned both, so the quorum of the later
        # one vouches for it as well. Its own quorum may have been one of other members.
        if heads[0].size > heads[1].size:
            raise VerificationError(
                f"round {opened.round}: the coordinator proves the run with a later checkpoint than the round",
                _NO_ROUND,
            )
        check_inclusion(proofs[0].proof, proofs[0].index, heads[0].size, heads[0].root, leaf_hash(evidence.run))
        # A run goes on under other keys than those under which it was opened.
        started, stated = (
            _statement(leaf, *self.rule.coordinator(proof.index, heads[1]))
            for leaf, proof in zip((evidence.run, evidence.opened), proofs, strict=True)
        )
        if not (isinstance(started, RunOpen) and isinstance(stated, OpenedStatement)):
            raise ProtocolError(
                f"round {opened.round}: expected statements of the types run-open and round-open as proof of the "
                f"round, found {started.type} and {stated.type}",
                "the message is malformed or was changed on the way; run the same version of privet on both sides",
            )
        return checkpoint, started, stated

    def state(self, seen: LoggedRound, opened: RoundOpen, part: SitePart) -> bytes:
        """Sign this site's part in a round as a leaf for the log. The site can open its commitments from then on.

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
        return sign_envelope(statement, self.key, self.witness.pq)

    def _commit(self, seen: LoggedRound, values: Mapping[str, int]) -> dict[str, str]:
        """Store values with fresh salts, once per round, and return the commitments.

        Asked again, a site returns the same commitments: with new salts it could not open those in the log.
        """
        if not values:
            return {}
        if _openings(self.directory, seen.opened).exists():
            kept = read_openings(self.directory, seen.opened)
            return {name: commit(name, value, salt) for name, (value, salt) in kept.items()}
        salts = {name: os.urandom(SALT_BYTES) for name in values}
        document = {name: {"value": value, "salt": salts[name].hex()} for name, value in values.items()}
        path = _openings(self.directory, seen.opened)
        # On disk before the commitments are signed: a commitment in the log without its salt can never be opened.
        try:
            write_durably(path, canonical_json(document) + b"\n", mode=0o600)
        except OSError as error:
            raise StateError(
                f"{path}, which keeps the values and salts of commitments, cannot be written ({error.strerror})",
                "check the disk and the permissions of the directory; the site states nothing meanwhile",
            ) from None
        return {name: commit(name, value, salts[name]) for name, value in values.items()}

    def run_of(self, study: Study, opened: RoundOpen) -> str:
        """Return the run of this study that a round belongs to; empty where this site has not verified it in the log.

        Raises:
            StateError: The witness's directory cannot be read.
        """
        try:
            _, started, stated = self._both(opened)
        except (ProtocolError, VerificationError):
            return ""
        received = (started.run, study.digest, opened.round, opened.nonce)
        return started.run if (stated.run, started.study, stated.round, stated.nonce) == received else ""

    def refuse(self, study: Study, run: str, number: int, error: RefusedError, policy: str) -> bytes:
        """Sign a refusal of a run, or of a round of it: the rule, and nothing that depends on data.

        The site keeps it as a receipt. Raises as `keep_refusal`.
        """
        # A private text names the dataset or counts of it, so the public log gets the code alone.
        statement = Refusal(
            time=self.clock(),
            site=self.site,
            run=run,
            study=study.digest,
            round=number,
            code=error.code,
            rule=one_line(error.rule or ("" if error.private else error.message)),
            asked="" if error.private else one_line(error.asked),
            allowed="" if error.private else one_line(error.allowed),
            policy=policy,
        )
        signed = sign_envelope(statement, self.key, self.witness.pq)
        keep_refusal(self.directory, statement, signed)
        return signed

    def account(self, dataset: str, unit: str, delta: float) -> str:
        """Return the digest under which the log knows a dataset's privacy account at one delta.

        Raises:
            StateError: The salt cannot be read.
        """
        try:
            salt = (self.directory / SALT).read_bytes()
        except OSError as error:
            raise StateError(
                f"the salt file {self.directory / SALT} cannot be read ({error.strerror})", _RESTORE
            ) from None
        return digest(canonical_json({"salt": salt.hex(), "dataset": dataset, "unit": unit, "delta": delta}))


@lru_cache(maxsize=64)
def _statement(leaf: bytes, coordinator: bytes, pq: bytes) -> Statement:
    """Return the coordinator's statement in a leaf, after verifying its signatures."""
    return verify_envelope(leaf, (coordinator,), pq)[1]


def refusal_of(keys: Sequence[NoteKey]) -> RefusedError | None:
    """Return the refusal of a log where a key has no ML-DSA-65 part; None where all have one.

    Args:
        keys: That of the log, then those of its witnesses.
    """
    classical = [key.name for key in keys if not key.pq]
    if not classical:
        return None
    if not keys[0].pq:
        hint = "ask the coordinator's operator to run `privet coordinator rotate --keys`"
    else:
        hint = f"let the operator of {classical[0]} run `privet site renew SITE --keys` there"
    error = RefusedError(
        f"the round log is signed with Ed25519 alone by {', '.join(classical)}: who breaks it can forge the log later",
        f"{hint}; or set classical_signatures = true under [floor] of this site's file",
    )
    error.code, error.rule = "E_CLASSICAL_SIGNATURES", "floor.classical_signatures"
    error.asked, error.allowed = f"Ed25519 alone, by {len(classical)}", "Ed25519 and ML-DSA-65"
    return error


class Rule(Protocol):
    """Whom a site believes about the log."""

    @property
    def log(self) -> NoteKey:
        """The log's key."""

    def coordinator(self, leaf: int, checkpoint: Checkpoint) -> tuple[bytes, bytes]:
        """Return the coordinator's Ed25519 and ML-DSA-65 keys for the statement with this number.

        The second is empty if there is none. This site has cosigned the checkpoint, which contains the leaf.
        """

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """Return whose cosignatures a checkpoint needs. This site has cosigned it."""

    def isolation(self, run: str, checkpoint: Checkpoint) -> Isolation | None:
        """Return what the log's rounds of a run say about who spoils; None where the site has no copy of the log."""


@dataclass(frozen=True)
class Written:
    """The rule of a site file that names a policy: people brought it there by hand."""

    policy_file: Path
    key: str

    @property
    def log(self) -> NoteKey:
        """The policy's log. Raises as `read_policy`."""
        return read_policy(self.policy_file).log

    def coordinator(self, leaf: int, checkpoint: Checkpoint) -> tuple[bytes, bytes]:
        """Return the key in the site file, and the one in the policy. Raises as `read_policy`."""
        return bytes.fromhex(self.key), self.log.pq

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """Return the policy of the file. Raises as `read_policy`."""
        return read_policy(self.policy_file)

    def isolation(self, run: str, checkpoint: Checkpoint) -> None:
        """Return nothing: the site has no copy of the log."""


@dataclass(frozen=True)
class Confirmed:
    """The rule of a site that joined: all follows from what its operator confirmed, and from the site's own copy."""

    trusted: Path
    copy: LogCopy | None

    @property
    def log(self) -> NoteKey:
        """The charter's log. Raises StateError and VerificationError where no charter is confirmed."""
        return NoteKey.parse(confirmed(read_trusted(self.trusted)).log)

    def coordinator(self, leaf: int, checkpoint: Checkpoint) -> tuple[bytes, bytes]:
        """Return the keys that the replayed log has for that leaf. `policy` checks the keys. Raises as `policy`."""
        epoch = self._copied.history(checkpoint).epoch_at(leaf)
        return epoch.coordinator, epoch.log.pq

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """Return the policy that follows from the replayed log. Raises as `LogCopy.policy`."""
        found = self._copied.policy(checkpoint)
        if found.log == self.log:  # not that of an earlier checkpoint
            self.publish(found)
        return found

    @property
    def _copied(self) -> LogCopy:
        if self.copy is None:
            raise StateError(
                "this command has no connection to the coordinator, from which the site copies the round log",
                "run `privet site serve SITE`",
            )
        return self.copy

    def isolation(self, run: str, checkpoint: Checkpoint) -> Isolation | None:
        """Return what the replayed rounds say. Raises as `policy`."""
        found = None if self.copy is None else self.copy.history(checkpoint).runs.get(run)
        return None if found is None else found.isolation

    def publish(self, policy: Policy) -> None:
        """Keep the policy beside the confirmed keys, for `privet audit`.

        Raises:
            StateError: It cannot be written.
        """
        file, text = self.trusted.with_name(POLICY), policy.text.encode()
        try:
            if not file.exists() or file.read_bytes() != text:
                write_durably(file, text)
        except OSError as error:
            raise StateError(f"{file} cannot be written ({error.strerror})", "check the disk space") from None


def rule_of(
    site: SiteConfig, log: LogSection, witness: Witness | None = None, fetch: Fetch | None = None
) -> Written | Confirmed:
    """Return whom a site believes: what its operator confirmed, or the policy that its file names."""
    if site.trusted is not None:
        path, copy = site.trusted, None
        if witness is not None and fetch is not None:
            file = log.state / COPY
            copy = LogCopy(site.name, file, lambda: read_trusted(path), lambda: witness.last, fetch)
        return Confirmed(path, copy)
    if log.policy is None or log.coordinator is None:
        raise StateError("[log]: expected policy and coordinator", "complete the site file, or join a consortium")
    return Written(log.policy, log.coordinator)


def open_witness(
    site: SiteConfig, log: LogSection, *, durable: bool = True, known: Callable[[], Trusted] | None = None
) -> Witness:
    """Return a site's witness.

    Args:
        site: The site file.
        log: Its table about the log.
        durable: Whether the witness waits for the disk.
        known: Returns what the operator of a joined site has confirmed, if it is not in the file yet.

    Raises:
        StateError: The policy or the key cannot be read.
        VerificationError: The site's operator has confirmed no charter.
    """
    key, name, rule = site.cosigning_key(log), site.name, rule_of(site, log)
    if isinstance(rule, Written):
        public = key.public_key().public_bytes_raw()
        # A site that the policy does not list still cosigns, for itself alone and under its own name: it detects forks.
        listed = read_policy(rule.policy_file).witnesses
        name = next((each.name for each in listed if each.public == public), site.name)
        return Witness(log.state / WITNESS, rule.log, name, key, durable=durable, pq=site.mldsa_key())
    path = rule.trusted
    trusted = known or (lambda: read_trusted(path))
    own = NoteKey.parse(confirmed(trusted()).log)
    pq = site.mldsa_key()
    return Witness(log.state / WITNESS, own, name, key, durable=durable, epochs=lambda: _epochs(trusted()), pq=pq)


def _epochs(trusted: Trusted) -> Sequence[KeyEpoch]:
    """Return the keys that count. Raises as `confirmed`: the file may have been made anew while a process has it."""
    confirmed(trusted)
    return trusted.epochs


def open_logbook(site: SiteConfig, fetch: Fetch | None = None, *, durable: bool = True) -> Logbook | None:
    """Return a site's side of the log that its file names; None where it names none.

    Args:
        site: The site file.
        fetch: Returns leaves of the log from the coordinator, for the site's copy.
        durable: Whether the witness waits for the disk.

    Raises:
        StateError: Policy or keys cannot be read.
        VerificationError: The site's operator has confirmed no charter.
    """
    if site.log is None:
        return None
    key = site.identity_key()
    if key is None:
        raise StateError(
            f"the site file of {site.name} names no identity key; without it, the site cannot sign statements for the "
            "round log",
            "make a key with `privet site identity FILE`, then set `identity` in the site file",
        )
    witness = open_witness(site, site.log, durable=durable)
    rule = rule_of(site, site.log, witness, fetch)
    return Logbook(site.name, key, rule, witness, site.log.state, classical=site.classical_signatures)


def create_witness(site: SiteConfig) -> None:
    """Create the directory of a site's side of a log that the site has not seen yet. Once.

    Raises:
        StateError: The site file names no log, the directory is in use already, or it cannot be written.
    """
    if site.log is None:
        raise StateError(
            f"the site file of {site.name} names no round log",
            "run `privet site setup SITE`, which adds the `[log]` table",
        )
    witness = open_witness(site, site.log)
    Witness.create(witness.directory, witness.log, witness.name, witness.key, pq=witness.pq)
    try:
        (site.log.state / OPENINGS).mkdir(mode=0o700)
        write_durably(site.log.state / SALT, os.urandom(SALT_BYTES), mode=0o600)
    except OSError as error:
        raise StateError(
            f"log.state: {site.log.state} cannot be written ({error.strerror})",
            "check the disk and the permissions of the directory",
        ) from None


def read_policy(path: Path) -> Policy:
    """Read the round log's policy file.

    Raises:
        StateError: It is missing, or not a policy.
    """
    try:
        return _policy(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PrivetError) as error:
        raise StateError(
            f"log.policy: the policy file {path} of the round log is missing or malformed ({type(error).__name__})",
            "get it from the operators of the log, and compare its keys with them",
        ) from None


@lru_cache(maxsize=8)
def _policy(text: str) -> Policy:
    return Policy.parse(text)


def read_openings(directory: Path, opened: str) -> dict[str, tuple[int, bytes]]:
    """Return the values that a site committed to in a round, with the salts that open the commitments.

    Args:
        directory: The site's side of the log.
        opened: Hash of the `round-open`.

    Raises:
        StateError: No openings are stored for the round, or they cannot be read.
    """
    path = _openings(directory, opened)
    try:
        document = json.loads(path.read_bytes())
        return {name: (entry["value"], bytes.fromhex(entry["salt"])) for name, entry in document.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path}, which keeps the values and salts of commitments, cannot be read ({type(error).__name__})",
            _RESTORE,
        ) from None


def _openings(directory: Path, opened: str) -> Path:
    return directory / OPENINGS / f"{opened.removeprefix('sha256:')}.json"
