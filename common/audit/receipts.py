"""A site's receipts: the refusals that it signed, and whether they entered the log.

`privet site receipts SITE --out FILE` writes the file, and `privet audit verify BUNDLE --receipts FILE` reads it. It is
JSON: `{"type": "privet-receipts", "format": 1, "site": NAME, "refusals": [...]}`, each refusal a signed envelope.

A receipt proves that its site signed the refusal. It does not prove that the message arrived; a site is asked again
before every round, and refuses again, so a refusal that stays out of the log was left out, or never reached the
coordinator in any round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.replay import Replay
from privet.common.log.statements import Refusal

_KIND = "privet-receipts"
_AGAIN = "let the site write the file again: `privet site receipts SITE --out FILE`"


@dataclass(frozen=True)
class ReceiptReport:
    """What a site's receipts show of a log.

    Attributes:
        site: The site.
        logged: Number of receipts whose refusal the log has.
        omitted: Runs and rounds whose refusal the log lacks although it went on with them.
        later: Runs and rounds that this log has not come to, so that nothing follows.
    """

    site: str
    logged: int
    omitted: tuple[str, ...]
    later: tuple[str, ...]


def receipts_file(site: str, refusals: Sequence[bytes]) -> bytes:
    """Return the file of a site's signed refusals."""
    held = [data.decode("ascii") for data in refusals]
    return canonical_json({"type": _KIND, "format": 1, "site": site, "refusals": held}) + b"\n"


def check_receipts(data: bytes, history: Replay) -> ReceiptReport:
    """Compare a site's receipts with a log.

    Args:
        data: The file.
        history: The verified log.

    Raises:
        ProtocolError: It is not a file of receipts.
        VerificationError: A receipt is not signed by the site that it names, with a key that the log has for it.
    """
    try:
        document = json.loads(data)
        known = document.keys() == {"type", "format", "site", "refusals"} and document["type"] == _KIND
        site, held = document["site"], document["refusals"]
        signed = [each.encode("ascii") for each in held]
    except (ValueError, KeyError, TypeError, AttributeError):
        known, site, signed = False, "", []
    if not known or document["format"] != 1 or not isinstance(site, str):
        raise ProtocolError("expected a file of receipts of format 1", _AGAIN)
    refusals = [_refusal(each, site, history) for each in signed]
    found = [(each, omitted(history, each)) for each in refusals]
    return ReceiptReport(
        site,
        sum(gone is False for _, gone in found),
        tuple(where_of(each) for each, gone in found if gone),
        tuple(where_of(each) for each, gone in found if gone is None),
    )


def _refusal(data: bytes, site: str, history: Replay) -> Refusal:
    envelope = Envelope.decode(data)
    # A receipt of before its site's renewal has one signature. It is in no leaf, so nothing tells its age.
    before = envelope.second is None and envelope.key in history.renewed
    envelope.check(b"" if before else history.pq_of(envelope.key))
    statement = parse_statement(envelope.payload)
    if not isinstance(statement, Refusal):
        raise ProtocolError(f"a receipt must hold a statement of type refusal, found type {statement.type}", _AGAIN)
    if history.owners.get(envelope.key) != site or statement.site != site:
        raise VerificationError(
            f"a receipt must be signed by site {site} with a key that the log has for it, found key "
            f"{envelope.key.hex()[:16]} and site {statement.site}",
            _AGAIN,
        )
    return statement


def omitted(history: Replay, refusal: Refusal) -> bool | None:
    """Return whether a log lacks a refusal that it should have.

    A site is asked again before every round, and the log takes its refusal of a run or round once. So any refusal of
    the same site, study, run and round will do.

    Args:
        history: The log so far.
        refusal: What the site signed.

    Returns:
        False if the log has it; True if the log opened a round that the refusal precedes or is about, without having
        it; None if the log has not come to that.
    """
    found = history.refusals.get((refusal.site, refusal.run, refusal.round))
    if found is not None and found.study == refusal.study:
        return False
    run = history.runs.get(refusal.run)
    if run is None:
        return None
    # Of a round, its round-open; of a run, any.
    came = any(refusal.round in (0, each.statement.round) for each in run.rounds.values())
    return True if came else None


def where_of(refusal: Refusal) -> str:
    """Return the run and round that a refusal is about, for a message."""
    return f"run {refusal.run}" + (f", round {refusal.round}" if refusal.round else "") + f" ({refusal.code})"
