"""A run's archive whose authors lie consistently: statements changed, signed again, and the whole log made anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.common.audit.bundle import PROVED, Report, check_bundle, proof_name
from privet.common.audit.verify import Tree
from privet.common.canonical import canonical_json, digest
from privet.common.log import mldsa, note
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope, sign_envelope
from privet.common.log.epochs import KeyEpoch, RotationPlace
from privet.common.log.merkle import leaf_hash
from privet.common.log.mldsa import Use
from privet.common.log.note import Note, NoteKey
from privet.common.log.proofs import prove
from privet.common.log.renewal import renewal_text
from privet.common.log.statements import (
    AdapterState,
    EgressReview,
    Export,
    Genesis,
    Join,
    Member,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RoundAbort,
    RoundClose,
    RoundOpened,
    SiteRound,
    Statement,
)
from privet.common.log.tiles import bundle_bytes, read_leaves, tile_bytes, tiles
from privet.server.log.journal import rotation
from privet.server.log.keys import Keys
from privet.server.rounds.archive import bundle_files
from tests.support.log_world import ORIGIN, World, private, public, second
from tests.support.logged_world import RELEASE_KEY, pass_gate, world_of
from tests.support.masked_world import masked_study
from tests.support.secagg_world import identity

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
Document = dict[str, Any]


@dataclass(frozen=True)
class Archive:
    """A true archive: its files, and its statements with the names of their authors ('' is the coordinator)."""

    files: dict[str, bytes]
    said: tuple[tuple[Statement, str], ...]
    policy: Policy
    signer: str = "log"

    def first(self, kind: str, holds: Callable[[Statement], bool] = lambda _: True) -> int:
        return next(n for n, (each, _) in enumerate(self.said) if each.type == kind and holds(each))


def archive_of(folder: Path) -> Archive:
    """Return a run of three rounds, one refused and aborted, which passes its gate; then a site joins and leaves."""
    study = masked_study(training={"rounds": 3}, privacy=PRIVATE, gate={"signatures": 2, "canaries": 20})
    world = world_of(folder, study, 4)
    for site in list(world.sites.values())[1:]:
        site.refuses_rounds = (2,)
    world.play()
    pass_gate(world, (0, 1))
    world.play()
    files = bundle_files(world.run, world.folder / "run" / "public", with_weights=True)
    assert check_bundle(files, world.policy).ok
    size = Checkpoint.parse(note.parse_note(files["checkpoint"]).text).size
    said = [(parse_statement(Envelope.decode(data).payload)) for data in read_leaves(size, files.__getitem__)]
    guest = Member(site="zealand", key=public("zealand").hex(), witness=None)
    said += [
        Join(time=1, member=guest, quorum=3),
        Revoke(time=1, site="zealand", key=guest.key, reason="left", quorum=3),
    ]
    export = next(each for each in said if isinstance(each, Export))
    said.append(
        AdapterState(time=1, run=export.run, adapter=export.adapter, state="revoked", by=None, reason="wrong labels")
    )
    said.append(renewal(next(each for each in said if isinstance(each, Genesis))))
    return Archive(
        files, tuple((each, getattr(each, "site", "") if signs(each) else "") for each in said), world.policy
    )


def renewal(genesis: Genesis) -> Renew:
    """Return what gives the first site an ML-DSA-65 key: the coordinator states it, the site's keys have signed it."""
    present, pq = genesis.members[0], second("site-0001")
    vkey = replace(NoteKey.parse(str(present.witness)), pq=mldsa.public_of(pq)).text
    renewed = present.model_copy(update={"witness": vkey})
    text = renewal_text(genesis.consortium, present, renewed)
    return Renew(time=1, member=renewed, proof=prove(text, key_of(present.site), pq, Use.RENEWAL))


def rotated_of(archive: Archive) -> Archive:
    """Return the same, where keys are rotated before the site joins: all after that is signed with the new keys."""
    at = archive.first("join")
    keys = {"log": NoteKey(ORIGIN, note.ED25519, public("log 2")).text, "coordinator": public("coordinator 2").hex()}
    empty = {"log_proof": "0" * 128, "coordinator_proof": "0" * 128}
    rotate = Rotate.model_validate({"time": 1, "charter": digest(b"charter"), **keys, **empty})
    said = [*archive.said[:at], (rotate, ""), *((each, "2") for each, _ in archive.said[at:])]
    made = Archive(archive.files, tuple(said), replace(archive.policy, log=NoteKey.parse(keys["log"])), "log 2")
    files = relogged(made, made.said)
    assert check_bundle(files, made.policy).ok
    size = Checkpoint.parse(note.parse_note(files["checkpoint"]).text).size
    stated = [parse_statement(Envelope.decode(data).payload) for data in read_leaves(size, files.__getitem__)]
    return replace(made, said=tuple(zip(stated, (who for _, who in said), strict=True)), files=files)


def proved(draft: Rotate, true: Statement, said: Sequence[tuple[Statement, str]], index: int, root: bytes) -> Rotate:
    """Return a rotation with the proofs that holders of the two new keys can give, where it lies about none itself."""
    genesis = said[0][0]
    if not isinstance(genesis, Genesis) or not isinstance(true, Rotate):
        return draft
    present = KeyEpoch(0, NoteKey.parse(genesis.log), bytes.fromhex(genesis.coordinator))
    place = RotationPlace(genesis.consortium, index, root, present)
    keys = Keys(ORIGIN, private("log 2"), private("coordinator 2"), RELEASE_KEY)
    fresh = rotation(place, keys, draft.charter, draft.time)
    proofs = {n: getattr(fresh, n) for n in ("log_proof", "coordinator_proof") if getattr(draft, n) == getattr(true, n)}
    return draft.model_copy(update=proofs)


def signs(statement: Statement) -> bool:
    return isinstance(statement, SiteRound | Refusal | EgressReview)


def key_of(author: str) -> Ed25519PrivateKey:
    if author in ("", "2"):
        return private(f"coordinator {author}".strip())
    return identity(int(author[-4:])).key


def relogged(archive: Archive, said: Sequence[tuple[Statement, str]]) -> dict[str, bytes]:
    """Return the archive whose log holds these statements, with every reference between them made anew."""
    leaves: list[bytes] = []
    tree, hashes, before = Tree(), dict[str, str](), [each for each, _ in archive.said]
    for number, (statement, author) in enumerate(said):
        changes: Document = {}
        if isinstance(statement, Rotate):
            statement = proved(statement, before[number], said, number, tree.frontier.root)
        opened = getattr(statement, "opened", None)
        if opened in hashes:
            changes["opened"] = hashes[opened]
        if isinstance(statement, SiteRound) and statement.checkpoint.size <= len(leaves):
            true = before[number]
            root = tree.root_at(statement.checkpoint.size).hex()
            if isinstance(true, SiteRound) and true.checkpoint.root == statement.checkpoint.root:
                changes["checkpoint"] = statement.checkpoint.model_copy(update={"root": root})
        data = sign_envelope(statement.model_copy(update=changes), key_of(author))
        old = sign_envelope(before[number], key_of(archive.said[number][1]))
        hashes[f"sha256:{leaf_hash(old).hex()}"] = f"sha256:{leaf_hash(data).hex()}"
        leaves.append(data)
        tree.append(leaf_hash(data))
    size = len(leaves)
    head = Checkpoint(ORIGIN, size, tree.frontier.root)
    lines = [note.sign_note(head.text, ORIGIN, private(archive.signer))]
    lines += [note.cosign(head.text, w.name, private(f"witness {w.name}"), 1) for w in archive.policy.witnesses]
    signed = Note(head.text, tuple(lines)).encode()
    files = {name: data for name, data in archive.files.items() if not name.startswith(("tile/", "proofs/"))}
    files["checkpoint"] = signed
    for tile in tiles(size):
        first = tile.number * 256
        files[tile.path] = (
            bundle_bytes(leaves[first : first + tile.width])
            if tile.level is None
            else tile_bytes(tile, lambda places: [tree.hashes[place] for place in places])
        )
    for number, (statement, _) in enumerate(said):
        if isinstance(statement, PROVED):
            files[proof_name(number, statement.type)] = LeafProof(number, tree.prove(number), signed).encode()
    return files


# What the coordinator would change beside the log to go with its lie.
_BESIDE = {
    "survivors": "survivors",
    "failures": "failures",
    "adapter_before": "adapter_before",
    "adapter_after": "adapter_after",
    "adapter_published": "adapter_published",
    "aggregation": "aggregation",
    "metrics": "metrics",
    "reason": "reason",
    "adapter": "adapter_before",
    "cohort": "cohort",
    "nonce": "nonce",
}


def beside(files: dict[str, bytes], true: Statement, false: Statement) -> dict[str, bytes]:
    """Return the files with the run's own statement of a round changed as the log's is."""
    if not isinstance(true, RoundOpened | RoundClose | RoundAbort):
        return files
    name = f"rounds/{true.round:04d}.json"
    document = json.loads(files[name])
    for field, key in _BESIDE.items():
        if getattr(true, field, None) != getattr(false, field, None):
            value = getattr(false, field)
            document[key] = list(value) if isinstance(value, tuple) else value
    stated = getattr(false, "epsilon", None)
    if stated != getattr(true, "epsilon", None) and document["privacy"]:
        document["privacy"]["epsilon"] = stated
    return {**files, name: canonical_json(document) + b"\n"}


def unreleased(archive: Archive) -> Archive:
    """Return the archive before its release, whose privacy statement would have to be made anew with a lie."""
    files = {name: data for name, data in archive.files.items() if not name.startswith("release/")}
    return replace(
        archive,
        files=files,
        said=tuple(each for each in archive.said if not isinstance(each[0], Export | AdapterState)),
    )


def told_instead(archive: Archive, at: int, false: Statement) -> Report:
    """Return what a verification says where the statement at this leaf is another."""
    true, author = archive.said[at]
    said = [*archive.said[:at], (false, author), *archive.said[at + 1 :]]
    return check_bundle(beside(relogged(archive, said), true, false), archive.policy)


def changed(statement: Statement, path: str, value: Any) -> Statement | None:
    """Return a statement with another value at a path; None if no statement can say that."""
    document = json.loads(statement.model_dump_json())
    *way, last = path.split(".")
    part = document
    for step in way:
        part = part.get(step)
        if isinstance(part, list):
            part = part[0]
        if part is None:
            return None
    part[last] = value
    try:
        found = type(statement).model_validate_json(json.dumps(document))
    except ValueError:
        return None
    return found if found != statement else None


def value_at(statement: Statement, path: str) -> Any:
    part = json.loads(statement.model_dump_json())
    for step in path.split("."):
        part = part[0] if isinstance(part, list) else part
        if part is None:
            return None
        part = part.get(step)  # left out of the bytes where it says nothing
    return part


def instead(value: Any) -> Iterator[Any]:
    """Yield other values of the kind of a value."""
    yield None
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (0, value - 1, value + 1, value * 0.5, value * 1.5, 1e-9)
    elif isinstance(value, str):
        yield from ("other", "site-0001", "site-0003", "zealand", "patient", "plain", "ffa", "expelled", "E_OTHER", "")
        yield from (digest(b"other"), digest(b"other")[7:], digest(b"other")[7:39])
        yield from ("poisson-subsampled-shared-gaussian", NoteKey("other", 4, public("other")).text)
    elif isinstance(value, list):
        yield from (value[1:], value[:-1], [*value, "zealand"])
    elif isinstance(value, dict):
        yield dict(list(value.items())[1:])
        yield from ({**value, name: next(iter(value.values()), "gone")} for name in ("zealand", "site-0003"))
        for name, other in value.items():
            yield from ({**value, name: each} for each in instead(other))
    else:
        mechanism = json.loads(World().run_open("x").model_dump_json())["privacy"]["training"]
        yield from (mechanism, digest(b"other"), 1e-9, 1e9, {"validation_loss": 0.1}, ["site-0001"], [["site-0001"]])
