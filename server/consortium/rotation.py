"""New keys of log, statements and releases, without a new consortium (docs/decisions/0013-rotation.md).

In this order, each step durable before the next::

    keys/next/         the new keys, all or none
    the round log      a statement of type rotate, signed with the old key: from here on the new ones count
    keys/former.txt    the old public keys
    keys/              each new key takes the place of the old one, which is gone
    the round log      a checkpoint under the new key
    public/            log.vkey, log.policy

After a crash, the command does what is missing. Between the statement and the last file, a command that opens the log
finds that its keys do not count, and says so: nothing is signed with an old key.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from privet.common.canonical import digest
from privet.common.errors import RefusedError, StateError
from privet.common.files import Step, sync_directory, write_durably
from privet.common.pki.charter import Charter
from privet.common.pki.keyfile import MLDSA_KEY, public_key, read_key, read_mldsa_key, read_release_key
from privet.server.consortium.coordinator import FORMER, KEYS, NEXT, Coordinator, log_members, new_keys
from privet.server.log.journal import FormerKeysError, Journal, open_journal
from privet.server.log.keys import COORDINATOR_KEY, LOG_KEY, RELEASE_KEY, Keys, read_keys_of, write_keys

# Until the last is in its place, no command opens the log. So the release key, which no history names, is first.
_NAMES = (RELEASE_KEY, MLDSA_KEY, LOG_KEY, COORDINATOR_KEY)
_ALWAYS = (RELEASE_KEY, LOG_KEY, COORDINATOR_KEY)  # an earlier version made no other


@dataclass(frozen=True)
class Rotation:
    """A finished rotation.

    Attributes:
        leaf: Number of the leaf that states it.
        charter: The charter with the new keys.
        needed: How many of `members` have to cosign before a round opens.
        members: Number of members.
    """

    leaf: int
    charter: Charter
    needed: int
    members: int


def rotate_keys(
    made: Coordinator, end_rounds: Callable[[Journal], None] = lambda journal: None, step: Step = lambda name: None
) -> Rotation:
    """Replace the keys of log, statements and releases, or finish a rotation that was interrupted.

    Args:
        made: The coordinator.
        end_rounds: Ends the rounds that the log has open: keys are replaced between rounds.
        step: Called with the name of each step.

    Raises:
        RefusedError: The consortium is not founded, or a round is open.
        StateError: Another process has the log open, or a file cannot be read or written.
    """
    try:
        # Other keys than the present ones in keys/: the statement is in the log, and files are missing.
        with suppress(FormerKeysError):
            _announce(made, end_rounds, step)
        return _switch(made, step)
    except OSError as error:
        raise StateError(
            f"{made.directory / KEYS} cannot be written ({error.strerror})",
            "check the disk space and the permissions, then repeat the command",
        ) from None


def _announce(made: Coordinator, end_rounds: Callable[[Journal], None], step: Step) -> None:
    """Make the new keys, and say in the log that they replace the old ones."""
    following = made.directory / KEYS / NEXT
    with open_journal(made.log_directory, made.keys) as journal:
        if following.exists() and not all((following / name).exists() for name in _ALWAYS):
            return  # the files were being replaced, and those in keys/ are the new ones already
        end_rounds(journal)
        _check_free(journal)
        # Under the old key, as a later look for them would be in vain.
        log_members(made, journal)
        _make_keys(following, made.settings.origin)
        step("rotation:made")
        keys = read_keys_of(following, made.settings.origin)
        journal.rotate(keys, digest(_charter(made, keys).encode()))
    step("rotation:stated")


def _check_free(journal: Journal) -> None:
    if journal.history.genesis is None:
        raise RefusedError(
            "the consortium is not founded: its keys are in no log yet",
            "found it with `privet coordinator found`, or make a new directory with `privet coordinator init`",
        )
    for name, run in journal.history.runs.items():
        if run.open is not None:
            raise RefusedError(
                f"round {run.rounds[run.open].statement.round} of run {name} is open: keys are replaced between rounds",
                f"end it with `privet coordinator resume {name}`, or give up the run with `privet coordinator withdraw "
                f"{name}`",
            )


def _make_keys(directory: Path, origin: str) -> None:
    """Make new keys in a directory, complete or not at all.

    Keys of an attempt that stated nothing are not used: they may have lain there for long, and be in a backup by now.
    """
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a rotation that was interrupted
    if directory.exists():
        directory.rename(staging)  # at once: one that lacks some keys would be one from which they were moved
        shutil.rmtree(staging)
    staging.mkdir(mode=0o700)
    write_keys(staging, new_keys(origin))
    sync_directory(staging)
    staging.rename(directory)
    sync_directory(directory.parent)


def _switch(made: Coordinator, step: Step) -> Rotation:
    """Put the new keys in the place of the old ones, and sign with them."""
    own, following = made.directory / KEYS, made.directory / KEYS / NEXT
    with open_journal(made.log_directory, _mixed(own, following, made.settings.origin)) as journal:
        ended = journal.history.epochs[:-1]
        former = "".join(f"{key.hex()}\n" for epoch in ended for key in (*epoch.log.publics, epoch.coordinator))
        write_durably(own / FORMER, former.encode("ascii"))
        step("rotation:former")
        for name in _NAMES:
            # The old key is overwritten: nothing may be signed with it again, so it could only be stolen.
            with suppress(FileNotFoundError):
                (following / name).replace(own / name)
            sync_directory(own)
            step(f"rotation:{name}")
        journal.sign_head()
        step("rotation:signed")
        made.follow_keys()
        log_members(made, journal)
        write_durably(made.directory / "public/log.vkey", f"{journal.keys.public.text}\n".encode())
        step("rotation:published")
        shutil.rmtree(following, ignore_errors=True)
        leaf = journal.history.epochs[-1].since - 1
        return Rotation(leaf, made.charter, journal.policy.needed, len(journal.policy.witnesses))


def _mixed(own: Path, following: Path, origin: str) -> Keys:
    """Return the new keys: each is still in `following`, or was moved."""
    release, pq, log, statements = (following / name if (following / name).exists() else own / name for name in _NAMES)
    second = read_mldsa_key(pq, "coordinator") if pq.exists() else None
    return Keys(origin, read_key(log, "log"), read_key(statements, "coordinator"), read_release_key(release), second)


def _charter(made: Coordinator, keys: Keys) -> Charter:
    return made.charter.model_copy(update={"log": keys.public.text, "coordinator": public_key(keys.coordinator)})
