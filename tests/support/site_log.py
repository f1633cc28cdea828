"""A round log for tests of real sites: it says whatever it is told to, and has the sites cosign it.

Unlike the coordinator's journal it asks nobody whether a statement may stand where it stands, so that sites can be
shown what a lying coordinator would show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from privet.client.rounds.logbook import create_witness
from privet.client.rounds.worker import Worker
from privet.client.site import load_site
from privet.common.log.agreement import round_opened, run_opened
from privet.common.log.checkpoint import Policy, least_quorum
from privet.common.log.envelope import sign_envelope
from privet.common.log.note import COSIGNATURE, ED25519, NoteKey, Signature
from privet.common.log.statements import Statement
from privet.common.pki.keyfile import make_key, public_key, write_key
from privet.common.study.messages import Evidence, RoundOpen, Shown
from privet.common.study.study import Study
from privet.server.log.roundlog import create_log, open_log
from tests.support.log_world import ORIGIN, private

NOW = 1_800_000_000


def log_table(folder: Path, name: str, names: Iterable[str] = ()) -> dict[str, str]:
    """Return the `[log]` table of a site's file in `folder`, whose log all `names` witness; `name` alone if none."""
    path = folder / "log.policy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        keys = []
        for each in sorted(names) or [name]:
            key = private(f"witness {each}")
            write_key(folder / f"{each}.witness.pem", key)
            keys.append(NoteKey(each, COSIGNATURE, bytes.fromhex(public_key(key))))
        log = NoteKey(ORIGIN, ED25519, bytes.fromhex(public_key(private("log"))))
        path.write_text(Policy(log, tuple(keys), least_quorum(len(keys), 0)).text)
        create_log(folder / "log")
    return {
        "policy": "log.policy",
        "coordinator": public_key(private("coordinator")),
        "state": f"{name}.state",
        "key": f"{name}.witness.pem",
    }


def with_log(path: Path, names: Iterable[str] = ()) -> Path:
    """Add the log to a site's file, and begin to witness it. A site without an identity gets one."""
    site = load_site(path)
    if site.identity is None:
        if not (path.parent / f"{site.name}.pem").exists():
            make_key(path.parent / f"{site.name}.pem")
        path.write_text(f'identity = "{site.name}.pem"\n' + path.read_text())
    table = log_table(path.parent, site.name, names)
    lines = ["[log]", *(f'{key} = "{value}"' for key, value in table.items())]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    if not (path.parent / table["state"]).exists():
        create_witness(load_site(path))
    return path


def logged(workers: Mapping[str, Worker], opened: RoundOpen, run: str = "run", **lies: Any) -> RoundOpen:
    """Return a round with evidence of its own: logged, and cosigned by all `workers`.

    Args:
        workers: Sites whose files lie in one folder, by name.
        opened: The round.
        run: The run's name.
        lies: Fields of the `round-open` that differ from what the round says.
    """
    study = Study.parse(dict(opened.study))
    keys = None
    if study.secure_aggregation.mode == "masked":
        pins = next(iter(workers.values())).site.config.peers
        keys = {name: pins[name] for name in opened.cohort if name in pins}
    stated = round_opened(run, opened, keys, NOW).model_copy(update=lies)
    return shown(workers, opened, run_opened(run, study, opened.adapter_digest, NOW), stated)


def shown(
    workers: Mapping[str, Worker],
    opened: RoundOpen,
    run: Statement,
    stated: Statement,
    speaker: str = "coordinator",
) -> RoundOpen:
    """Return a round with these two statements as its evidence, signed with the key of that name."""
    log = next(iter(workers.values())).site.config.log
    assert log is not None
    assert log.policy is not None
    policy = Policy.parse(log.policy.read_text())
    with open_log(log.policy.parent / "log", ORIGIN, private("log")) as book:
        leaves = [sign_envelope(each, private(speaker)) for each in (run, stated)]
        first, second = book.append(leaves)
        note = book.checkpoint()
        lines = []
        for worker in workers.values():
            answer = worker.cosign(Shown(note, 0, b""))
            if not answer.line:
                proof = b"".join(book.prove_consistency(answer.size, book.size))
                answer = worker.cosign(Shown(note, answer.size, proof))
            lines.append(Signature.parse(answer.line))
        book.cosign(book.size, lines, policy)
        proofs = [book.prove_leaf(index, policy).encode() for index in (first, second)]
    return replace(opened, evidence=Evidence(leaves[0], proofs[0], leaves[1], proofs[1]))
