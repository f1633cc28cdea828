"""A site follows new keys of log and coordinator: its operator typed the words, and the site's log leads there.

Nothing else makes a site follow (docs/decisions/0013-rotation.md). The words say that the keys are the coordinator's.
The log, up to its newest checkpoint under the new key, has to extend what this site has cosigned under the old one, and
to replace the confirmed keys by these. So the witness cosigns that checkpoint at once.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from privet.client.network.consortium import ConsortiumClient
from privet.client.rounds.history import LogCopy, confirmed, policy_of
from privet.client.rounds.logbook import Confirmed, open_witness
from privet.client.rounds.witness import Witness
from privet.client.site import SiteConfig, load_site
from privet.client.trust import Trusted, changing, read_trusted, write_trusted
from privet.common.errors import StateError, VerificationError
from privet.common.log.checkpoint import Checkpoint, OtherKeyError, open_checkpoint
from privet.common.log.note import NoteKey
from privet.common.log.replay import Replay
from privet.common.pki.charter import Charter


def is_rotation(trusted: Trusted, claimed: Charter) -> bool:
    """Return whether the coordinator names new keys for the consortium that was confirmed, and all else as before."""
    return trusted.charter is not None and claimed.renews(trusted.charter)


def confirm_rotation(file: Path, service: ConsortiumClient, told: str) -> Trusted:
    """Confirm the charter with new keys, by the words that the coordinator's operator read out.

    Args:
        file: The site file.
        service: The consortium service, which has given the roster that names the new keys.
        told: The words.

    Returns:
        All that is confirmed now.

    Raises:
        VerificationError: The words are others; or the log does not extend what this site has cosigned, or does not
            lead to these keys. Nothing is changed; evidence of a fork is kept.
        PrivetError: As the service. StateError: A file cannot be read or written.
    """
    site, claimed = load_site(file), Charter.claimed(service.enrolment.terms, service.enrolment.root)
    if site.trusted is None:
        raise StateError(f"{file} names no file `trusted`", "run `privet site migrate SITE`")
    with changing(site.trusted):
        trusted = read_trusted(site.trusted)
        # Before anything is asked of a coordinator whose keys nobody has compared.
        trusted.check_words(claimed, told)
        note = service.checkpoint()
        head = _newest(note, claimed)
        history = _replayed(site, trusted, head, service)
        followed = trusted.with_rotation(claimed, told, history.epochs)
        witness = _witness(site, followed)
        if witness is not None:
            # What it has cosigned stays: a log that does not extend it is refused here, and kept as evidence.
            last = witness.last
            proof = service.consistency(last.size, head.size) if 0 < last.size < head.size else ()
            witness.check(note, proof)
        write_trusted(site.trusted, followed)
    if witness is not None:
        witness.add(note, last.size, proof, int(service.clock().timestamp()))
    with suppress(VerificationError):  # a member that nobody has confirmed yet
        Confirmed(site.trusted, None).publish(policy_of(history, followed, site.name, head.size))
    return followed


def _newest(note: bytes, claimed: Charter) -> Checkpoint:
    try:
        return open_checkpoint(note, NoteKey.parse(claimed.log))[0]
    except OtherKeyError as error:
        raise VerificationError(
            f"{error.message}: the log has no checkpoint under the new key yet",
            "ask the coordinator's operator to run `privet coordinator rotate --keys` again: it was interrupted",
        ) from None


def _replayed(site: SiteConfig, trusted: Trusted, head: Checkpoint, service: ConsortiumClient) -> Replay:
    """Return the history up to the newest checkpoint, in a copy of its own: the site's is changed by nothing yet."""
    with TemporaryDirectory() as folder:
        copy = LogCopy(site.name, Path(folder) / "leaves", lambda: trusted, lambda: head, service.leaves)
        history = copy.history(head)
    genesis, charter = history.genesis, confirmed(trusted)
    if genesis is None or genesis.consortium != charter.consortium:
        raise VerificationError(
            f"the round log is not that of the consortium {charter.consortium}",
            "take part in no round, and ask the operators of coordinator and sites",
        )
    return history


def _witness(site: SiteConfig, trusted: Trusted) -> Witness | None:
    """Return the site's witness as it will be with the new keys; None where the site has not begun to witness."""
    if site.log is None:
        return None
    witness = open_witness(site, site.log)
    return replace(witness, epochs=lambda: trusted.epochs) if witness.directory.exists() else None
