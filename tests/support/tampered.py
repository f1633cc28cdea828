"""Bundles that somebody tampered with, in every way that the tests of logs know."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from privet.common.audit.fields import FIELDS
from privet.common.audit.verify import Tree
from privet.common.canonical import canonical_json
from privet.common.log.checkpoint import Policy
from privet.common.log.envelope import PAYLOAD_TYPE, Envelope, pae
from privet.common.log.merkle import leaf_hash
from privet.common.log.statements import Revoke
from privet.common.log.tiles import bundle_bytes, tile_bytes, tiles
from tests.common.test_audit import LEAVES, POLICY, RULES, TAMPERS, WORLD, change, edited
from tests.support.lies import Archive, beside, changed, instead, relogged, unreleased, value_at
from tests.support.log_world import World, digest, flips, log_key, private, public, sign_head, story
from tests.support.rotated_log import place_of, rotate


@dataclass(frozen=True)
class Tampered:
    """A bundle, and the policy of its reader.

    Attributes:
        name: What was done to it.
        files: Its files.
        policy: The policy.
    """

    name: str
    files: dict[str, bytes]
    policy: Policy


def log_files(leaves: list[bytes], checkpoint: bytes, hashed: list[bytes] | None = None) -> dict[str, bytes]:
    """Return the files of a published log. Its tiles are of the leaves `hashed`, by default of its own."""
    tree = Tree()
    for leaf in hashed or leaves:
        tree.append(leaf_hash(leaf))
    files = {"checkpoint": checkpoint}
    for tile in tiles(len(leaves)):
        first = tile.number * 256
        if tile.level is None:
            files[tile.path] = bundle_bytes(leaves[first : first + tile.width])
        elif tile.level or len(hashed or leaves) >= first + tile.width:
            files[tile.path] = tile_bytes(tile, lambda places: [tree.hashes[place] for place in places])
    return files


def kinds_of(archive: Archive, rotated: Archive, seed: int) -> dict[str, Iterator[Tampered]]:
    """Return all kinds of tampering."""
    return {
        "lies": lies(archive, seed),
        "lies after a rotation": lies(rotated, seed + 1),
        "flipped": flipped(archive, seed),
        "rearranged": rearranged(archive, seed),
        "broken_rules": broken_rules(),
        "changed_leaves": changed_leaves(),
        "other_forms": other_forms(),
        "large": large(seed),
        "hybrid": hybrid(seed),
        "rotations": rotations(),
        "other_policies": other_policies(archive, rotated),
    }


def tampered(archive: Archive, rotated: Archive, seed: int, most: int) -> list[Tampered]:
    """Return so many bundles: all kinds of tampering in turn, each as often as it has something new."""
    kinds = list(kinds_of(archive, rotated, seed).values())
    found: list[Tampered] = []
    while kinds and len(found) < most:
        for kind in list(kinds):
            each = next(kind, None)
            if each is None:
                kinds.remove(kind)
            else:
                found.append(each)
    return found[:most]


def lies(archive: Archive, seed: int) -> Iterator[Tampered]:
    """Change a field of a statement; its author signs, and the whole log is made anew."""
    generator = random.Random(seed)
    early = unreleased(archive)
    of = [
        (holder, at, name)
        for kind in FIELDS
        for holder in (archive if kind in ("export", "adapter-state") else early,)
        for at, (statement, _) in enumerate(holder.said)
        if statement.type == kind
        for name in FIELDS[kind]
    ]
    generator.shuffle(of)
    for holder, at, name in of:
        true, author = holder.said[at]
        values = list(instead(value_at(true, name)))
        false = changed(true, name, generator.choice(values))
        if false is not None:
            said = [*holder.said[:at], (false, author), *holder.said[at + 1 :]]
            files = beside(relogged(holder, said), true, false)
            yield Tampered(f"leaf {at}, {true.type}.{name}", files, holder.policy)


def flipped(archive: Archive, seed: int) -> Iterator[Tampered]:
    """Flip one bit of one file."""
    generator = random.Random(seed)
    for _ in range(1000):
        name = generator.choice(sorted(archive.files))
        data = archive.files[name]
        (other,) = flips(data, iter([generator.randrange(8 * len(data))]))
        yield Tampered(f"a bit of {name}", {**archive.files, name: other}, archive.policy)


def rearranged(archive: Archive, seed: int) -> Iterator[Tampered]:
    """Take a file away, add one, or put one in another's place."""
    generator, names = random.Random(seed), sorted(archive.files)
    strange = (
        "averaged/evil",
        "averaged/0009.safetensors",
        "README",
        "rounds/evil.json",
        "release/x",
        "proofs/9.tlog-proof",
        "tile/0/001",
        "tile/0/000.p/5",
    )
    stated = json.loads(archive.files["rounds/0001.json"])
    bare = {key: value for key, value in stated.items() if key != "metrics"}
    for document in (bare, {**stated, "failures": []}, {**stated, "type": "x"}):
        files = {**archive.files, "rounds/0001.json": canonical_json(document)}
        yield Tampered("a round's statement of another form", files, archive.policy)
    for name in strange:
        yield Tampered(f"{name} added", {**archive.files, name: b"{}"}, archive.policy)
    generator.shuffle(names)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        rest = {each: data for each, data in archive.files.items() if each != name}
        yield Tampered(f"{name} taken away", rest, archive.policy)
        yield Tampered(f"{other} for {name}", {**archive.files, name: archive.files[other]}, archive.policy)
        yield Tampered(f"{name} with a line", {**archive.files, name: archive.files[name] + b"\n"}, archive.policy)


def broken_rules() -> Iterator[Tampered]:
    """State what cannot stand there; everything is signed and hashed as it has to be."""
    for name, (steps, _) in RULES.items():
        world = World()
        world.found()
        for step in steps:
            step(world)
        yield Tampered(name, log_files(world.leaves, world.checkpoint()), POLICY)


def changed_leaves() -> Iterator[Tampered]:
    """Change, remove or move leaves: under the true checkpoint, with true and with new tiles, and under a new one."""
    true = sign_head(LEAVES, WORLD.sites)
    # Right in itself: the tree alone tells it from what was cosigned.
    last = edited(len(LEAVES) - 1, change(upload=digest("another")))
    for name, (leaves, _) in {"say something else last": (last, None), **TAMPERS}.items():
        if b"" in leaves:
            continue  # no file can hold it
        yield Tampered(f"{name}, tiles kept", log_files(leaves, true, LEAVES), POLICY)
        yield Tampered(f"{name}, tiles new", log_files(leaves, true), POLICY)
        yield Tampered(f"{name}, all new", log_files(leaves, sign_head(leaves, WORLD.sites)), POLICY)


def other_forms() -> Iterator[Tampered]:
    """Write the last statement in another form than the one; its author signs it, and everybody cosigns the tree."""
    payload = Envelope.decode(LEAVES[-1]).payload
    assert b'"round":2,' in payload
    forms = {
        "a space": payload.replace(b'":', b'": ', 1),
        "a line": payload + b"\n",
        "a number with a fraction": payload.replace(b'"round":2,', b'"round":2.0,'),
        "a number with an exponent": payload.replace(b'"round":2,', b'"round":20e-1,'),
        "a number with a zero too many": re.sub(rb'"epsilon":[0-9.]+', rb"\g<0>0", payload),
        "a key twice": payload.replace(b'"round":2,', b'"round":1,"round":2,'),
        "an escape": payload.replace(b'"lyon"', b'"l\\u0079on"'),
        "another subject": payload.replace(b'"name":"upload"', b'"name":"adapter"'),
        "no subject": re.sub(rb'"subject":\[[^]]*\]', b'"subject":[]', payload),
        "another type outside": payload.replace(b"statement:site-round:1", b"statement:refusal:1"),
        "another format": payload.replace(b'"format":1', b'"format":2'),
        "a field too many": payload.replace(b'"format":1', b'"extra":null,"format":1'),
        "a field too few": re.sub(rb'"commitments":\{[^}]*\},', b"", payload),
        "a text for a number": payload.replace(b'"round":2,', b'"round":"2",'),
        "true for a number": payload.replace(b'"format":1', b'"format":true'),
        "an upper-case digest": re.sub(rb'"root":"[0-9a-f]+', lambda found: found[0].upper(), payload),
        "no text": b"\xff\xfe",
        "a list": b"[]",
        "nothing": b"null",
    }
    for name, form in forms.items():
        assert form != payload, name
        signature = private("lyon").sign(pae(PAYLOAD_TYPE, form))
        leaves = [*LEAVES[:-1], Envelope(form, public("lyon"), signature).encode()]
        yield Tampered(f"{name} in a statement", log_files(leaves, sign_head(leaves, WORLD.sites)), POLICY)


def large(seed: int) -> Iterator[Tampered]:
    """Change each file of a log of more than one tile, and add those of the log when it was shorter."""
    generator, world = random.Random(seed), World(private=False)
    world.found()
    for number in range(1, 52):
        world.play("flu", number)
    files = log_files(world.leaves, world.checkpoint())
    assert len(files) == 6
    yield Tampered("a log of 257 leaves", files, POLICY)
    for name, data in files.items():
        (other,) = flips(data, iter([generator.randrange(8 * len(data))]))
        yield Tampered(f"a bit of {name}, of 257 leaves", {**files, name: other}, POLICY)
    shorter = log_files(world.leaves[:200], b"")
    for name in sorted(shorter.keys() - {"checkpoint"}):
        yield Tampered(f"with the earlier {name}", {**files, name: shorter[name]}, POLICY)
        yield Tampered(f"with a wrong {name}", {**files, name: shorter[name][:-1] + b"?"}, POLICY)


def hybrid(seed: int) -> Iterator[Tampered]:
    """Change one letter of a log that is signed twice, in a leaf, the checkpoint or a second signature.

    Where leaves change, everybody cosigns the new tree.
    """
    generator, world = random.Random(seed), story(hybrid=True)
    checkpoint, last = world.checkpoint(), len(world.leaves) - 1
    for number in range(1000):
        at = generator.randrange(last) if number % 3 else last
        leaves, note = list(world.leaves), checkpoint
        if number % 3 == 1:
            note = changed_letter(note, generator.randrange(len(note)))
        else:
            data = leaves[at]
            second = data.index(b"mldsa65") + 80
            leaves[at] = changed_letter(data, generator.randrange(second if number % 3 == 0 else 0, len(data) - 10))
            note = sign_head(leaves, world.sites, hybrid=True)
        what = "the checkpoint" if number % 3 == 1 else f"leaf {at}"
        yield Tampered(f"hybrid, a letter of {what}", log_files(leaves, note), world.policy)


def rotations() -> Iterator[Tampered]:
    """Rotate the keys of a log that is signed twice, truly and falsely; another round follows, or not."""
    lies_about: dict[str, dict[str, Any]] = {
        "truly": {},
        "by Ed25519 alone": {"log_proof": "0" * 128},
        "by another's signature": {"coordinator_proof": "1" * 128},
        "to the present key of the log": {"log": "log"},
        "to a key without ML-DSA-65": {"hybrid": False},
        "to a member's key": {"coordinator": "oslo"},
    }
    for name, lie in lies_about.items():
        world = World(hybrid=True)
        world.found()
        world.play("flu", 1)
        world.say(rotate(place_of(world), **({"hybrid": True} | lie)))
        world.say(world.round_open("flu", 2), "coordinator 2")
        policy = replace(world.policy, log=log_key("log 2", hybrid=True))
        for signer in ("log 2", "log"):
            note = sign_head(world.leaves, world.sites, signer, hybrid=True)
            yield Tampered(f"rotated {name}, signed by {signer}", log_files(world.leaves, note), policy)
            yield Tampered(f"rotated {name}, signed by {signer}, before", log_files(world.leaves, note), world.policy)


def changed_letter(data: bytes, at: int) -> bytes:
    """Replace one byte by a letter of base64."""
    return data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]


def other_policies(archive: Archive, rotated: Archive) -> Iterator[Tampered]:
    """Verify under a policy of another time, of another log, of fewer witnesses; and with too few cosignatures."""
    yield Tampered("the policy before a rotation", rotated.files, archive.policy)
    yield Tampered("the policy after a rotation", archive.files, rotated.policy)
    yield Tampered("the policy of another log", archive.files, POLICY)
    for count in range(1, len(archive.policy.witnesses) + 1):
        policy = Policy(archive.policy.log, archive.policy.witnesses[:count], count)
        yield Tampered(f"a policy of {count} witnesses", archive.files, policy)
    for sites in ((), ("berlin",), ("berlin", "lyon"), ("mallory", "oslo")):
        yield Tampered(f"{len(sites)} cosignatures", log_files(LEAVES, sign_head(LEAVES, sites)), POLICY)
    yield Tampered("another signer", log_files(LEAVES, sign_head(LEAVES, WORLD.sites, "mallory")), POLICY)
    world = World()
    world.found()
    world.say(Revoke(time=2, site="lyon", key=public("lyon").hex(), reason="key-compromise", quorum=2))
    for sites in (("berlin", "lyon"), ("berlin", "oslo")):
        yield Tampered(f"cosigned by {sites} without lyon", log_files(world.leaves, world.checkpoint(sites)), POLICY)
