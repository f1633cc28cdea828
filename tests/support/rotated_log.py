"""A log whose keys are replaced once, for tests of whoever reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from privet.common.log.checkpoint import Policy
from privet.common.log.epochs import KeyEpoch, RotationPlace, possession_text
from privet.common.log.mldsa import Use
from privet.common.log.note import parse_note
from privet.common.log.proofs import prove
from privet.common.log.statements import Rotate
from privet.server.log.roundlog import create_log, open_log
from tests.support.log_world import ORIGIN, World, digest, log_key, private, public, second, sign_head


def place_of(world: World, present: str = "") -> RotationPlace:
    """Return where the next leaf of a world will be; `present` is the number of the keys there."""
    log = log_key(f"log {present}".strip(), hybrid=world.hybrid)
    keys = KeyEpoch(0, log, public(f"coordinator {present}".strip()))
    return RotationPlace("north", len(world.leaves), world.frontier.root, keys)


def rotate(
    place: RotationPlace, log: str = "log 2", coordinator: str = "coordinator 2", *, hybrid: bool = False, **lies: Any
) -> Rotate:
    """Return a rotation to the keys of these names, with the proofs that their holders give for this place."""
    given = {
        "time": 1,
        "log": log_key(log, hybrid=hybrid).text,
        "coordinator": public(coordinator).hex(),
        "charter": digest("charter"),
        "log_proof": "0" * 128,
        "coordinator_proof": "0" * 128,
    }
    draft = Rotate.model_validate(given)
    text = possession_text(place, draft)
    proof = prove(text, private(log), second(log) if hybrid else None, Use.ROTATION)
    proofs = {"log_proof": proof, "coordinator_proof": private(coordinator).sign(text).hex()}
    return Rotate.model_validate(given | proofs | lies)


@dataclass
class Rotated:
    """A log whose keys are replaced once, at `leaf`, between two rounds of a run."""

    world: World = field(default_factory=World)
    leaf: int = 0

    def __post_init__(self) -> None:
        self.world.found()
        self.world.play("flu", 1)
        self.leaf = len(self.world.leaves)
        self.world.say(rotate(place_of(self.world)))

    def goes_on(self) -> Rotated:
        """Play another round, whose statements the coordinator signs with the new key."""
        world, number = self.world, 2
        opened = world.say(world.round_open("flu", number), "coordinator 2")
        for site in sorted(world.sites):
            world.say(world.site_round(site, "flu", number, opened), site)
        world.say(world.round_close("flu", number, opened), "coordinator 2")
        return self

    @property
    def policy(self) -> Policy:
        return replace(self.world.policy, log=log_key("log 2"))

    def publish(self, folder: Path) -> Iterator[tuple[Policy, Path]]:
        """Publish the log before and after the rotation, each cosigned by all. Yield each policy and its directory."""
        create_log(folder / "log")
        for policy, name, size in (
            (self.world.policy, "log", self.leaf),
            (self.policy, "log 2", len(self.world.leaves)),
        ):
            with open_log(folder / "log", ORIGIN, private(name), one_key=False) as log:
                log.follow(lambda size: log_key("log 2" if size > self.leaf else "log"))
                log.append(self.world.leaves[log.size : size])
                log.checkpoint()
                head = sign_head(self.world.leaves[:size], self.world.sites, name)
                log.cosign(size, parse_note(head).signatures[1:], policy)
                log.publish(folder / "public" / name, policy)
            yield policy, folder / "public" / name
