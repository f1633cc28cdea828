"""Bundles that somebody tampered with, in every way that the tests of logs know."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from privet.common.audit.fields import FIELDS
from privet.common.audit.verify import Tree
from privet.common.log.checkpoint import Policy
from privet.common.log.merkle import leaf_hash
from privet.common.log.tiles import bundle_bytes, tile_bytes, tiles
from tests.common.test_audit import LEAVES, POLICY, RULES, TAMPERS, WORLD
from tests.support.lies import Archive, beside, changed, instead, relogged, unreleased, value_at
from tests.support.log_world import World, flips, sign_head, story


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


def tampered(archive: Archive, rotated: Archive, seed: int, most: int) -> list[Tampered]:
    """Return so many bundles: all kinds of tampering in turn, each as often as it has something new."""
    kinds = [
        lies(archive, seed),
        lies(rotated, seed + 1),
        flipped(archive, seed),
        rearranged(archive, seed),
        broken_rules(),
        changed_leaves(),
        hybrid(seed),
        other_policies(archive, rotated),
    ]
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
    strange = ("README", "rounds/evil.json", "release/x", "proofs/9.tlog-proof", "tile/0/001", "tile/0/000.p/5")
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
    for name, (leaves, _) in TAMPERS.items():
        if b"" in leaves:
            continue  # no file can hold it
        yield Tampered(f"{name}, tiles kept", log_files(leaves, true, LEAVES), POLICY)
        yield Tampered(f"{name}, tiles new", log_files(leaves, true), POLICY)
        yield Tampered(f"{name}, all new", log_files(leaves, sign_head(leaves, WORLD.sites)), POLICY)


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


def changed_letter(data: bytes, at: int) -> bytes:
    """Replace one byte by a letter of base64."""
    return data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]


def other_policies(archive: Archive, rotated: Archive) -> Iterator[Tampered]:
    """Verify under a policy of another time, of another log, and of fewer witnesses."""
    yield Tampered("the policy before a rotation", rotated.files, archive.policy)
    yield Tampered("the policy after a rotation", archive.files, rotated.policy)
    yield Tampered("the policy of another log", archive.files, POLICY)
    for count in range(1, len(archive.policy.witnesses) + 1):
        policy = Policy(archive.policy.log, archive.policy.witnesses[:count], count)
        yield Tampered(f"a policy of {count} witnesses", archive.files, policy)
