"""The refusals that a site signed, kept as receipts: the log must have them, and an auditor can see that it does not.

One file for each run, round and study that the site refused, under `refusals/` in the directory of its side of the log.
A site that is asked again keeps its first refusal, as the log does.
"""

from __future__ import annotations

import logging
from pathlib import Path

from privet.common.audit.receipts import omitted, where_of
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, StateError
from privet.common.files import write_durably
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.replay import Replay
from privet.common.log.statements import Refusal

REFUSALS = "refusals"
_log = logging.getLogger("privet.site")
# A coordinator chooses names of runs, so it could fill the disk: of about 2 KB each.
_MOST = 4096


def keep_refusal(directory: Path, refusal: Refusal, envelope: bytes) -> None:
    """Keep a signed refusal, before it leaves. Durable on return. Beyond 4096 refusals nothing more is kept.

    Args:
        directory: The site's side of the log.
        refusal: What is refused.
        envelope: The signed refusal.

    Raises:
        StateError: It cannot be written.
    """
    path = _path(directory, refusal)
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not path.exists() and sum(1 for _ in folder.iterdir()) < _MOST:
            write_durably(path, envelope, mode=0o600)
    except OSError as error:
        raise StateError(
            f"{path}, which keeps a receipt of a refusal, cannot be written ({error.strerror})",
            "check the disk and the permissions of the directory; the site refuses without a statement meanwhile",
        ) from None


def kept_refusals(directory: Path) -> list[tuple[Refusal, bytes]]:
    """Return the refusals that a site keeps, with their envelopes, oldest first. Raises as `kept_files`."""
    found = [(refusal, path.read_bytes()) for path, refusal in kept_files(directory)]
    return sorted(found, key=lambda each: (each[0].time, each[0].run, each[0].round))


def kept_files(directory: Path) -> list[tuple[Path, Refusal]]:
    """Return the files of the refusals that a site keeps.

    Raises:
        StateError: One cannot be read.
    """
    found = []
    for path in sorted((directory / REFUSALS).glob("*.json")):
        try:
            statement = parse_statement(Envelope.decode(path.read_bytes()).payload)
        except (OSError, PrivetError) as error:
            raise StateError(
                f"{path}, the receipt of a refusal, cannot be read ({type(error).__name__})",
                "restore the file from a backup",
            ) from None
        if isinstance(statement, Refusal):
            found.append((path, statement))
    return found


def omitted_refusals(directory: Path, history: Replay) -> list[str]:
    """Return the runs and rounds of kept refusals that a log lacks although it went on. Raises as `kept_refusals`."""
    return [where_of(refusal) for refusal, _ in kept_refusals(directory) if omitted(history, refusal)]


def _forget_unknown(directory: Path, history: Replay) -> None:
    """Make room: forget refusals of runs that the log never had. Each is in the log before a site is asked about it."""
    kept = kept_refusals(directory)
    if len(kept) <= _MOST // 2:
        return
    for refusal, _ in kept:
        if refusal.run not in history.runs:
            _path(directory, refusal).unlink(missing_ok=True)


def _path(directory: Path, refusal: Refusal) -> Path:
    about = canonical_json({"run": refusal.run, "round": refusal.round, "study": refusal.study})
    return directory / REFUSALS / f"{digest(about).removeprefix('sha256:')}.json"


def warn_of_omitted(directory: Path, history: Replay) -> None:
    """Warn in the site's own log of kept refusals that the round log lacks. Raises as `kept_refusals`.

    A message may have been lost on the way, so the site goes on: a refusal stands, whatever the log has.
    """
    _forget_unknown(directory, history)
    gone = omitted_refusals(directory, history)
    if gone:
        _log.warning(
            "the round log lacks refusals that this site signed, although it went on: %s (write the receipts for an "
            "auditor with `privet site receipts SITE --out FILE`, and ask the coordinator's operator)",
            ", ".join(gone),
        )
