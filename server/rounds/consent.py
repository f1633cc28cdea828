"""Who takes part: offer the study, judge the replies, and draw each round's cohort."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import numpy as np

from privet.common.errors import TooFewSitesError
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Consent, Failure, Message, Offer
from privet.common.study.sections import NAME_PATTERN
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.log.journal import Listening
from privet.server.rounds.participants import Participant
from privet.server.rounds.run_log import RunLog

_POLL = 0.5
# Seconds that a round waits for a further site's consent once there are enough.
_LATECOMER = 5.0


def gather_participants(
    exchange: Exchange,
    study: Study,
    adapter: Adapter,
    timeout: float,
    known: Mapping[str, Participant],
    record: RunLog | None = None,
) -> dict[str, Participant]:
    """Offer the study to every node that is not `known`, and return all sites that consent to this very study.

    Called before each round, so that a site that comes late, or comes back at another address, takes part from the
    next round on; one that has gone is forgotten. Waits for more nodes only while there are fewer sites than the
    study's minimum. Where a log is kept, only its members are sites.

    Raises:
        TooFewSitesError: Fewer than the minimum consent within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    online = set(exchange.nodes()) if known else set()
    members = {name: member for name, member in known.items() if member.node in online}
    refusals: dict[int, Failure] = {}
    keys = None if record is None else record.keys
    offer = Offer(study.document(), "" if record is None else record.name)
    asked = exchange if record is None else Listening(exchange, record.journal)
    while True:
        settled = {member.node for member in members.values()} | set(refusals)
        offers = {node: offer for node in exchange.nodes() if node not in settled}
        enough = len(members) >= study.cohort.min_sites
        left = max(min(deadline - time.monotonic(), _LATECOMER if enough else timeout), _POLL)
        for node, reply in sorted(asked.ask(offers, timeout=left), key=lambda item: item[0]):
            problem = _objection(reply, study, adapter, members, keys)
            if isinstance(reply, Consent) and problem is None:
                members[reply.site] = Participant(node, reply)
            else:
                refusals[node] = problem or Failure("ProtocolError", "no consent", "")
        if len(members) >= study.cohort.min_sites:
            return members
        if time.monotonic() >= deadline:
            raise TooFewSitesError(
                f"{len(members)} sites consented, the study demands {study.cohort.min_sites}"
                + "".join(f"\n  node {node}: {failure}" for node, failure in refusals.items()),
                next((failure.hint for failure in refusals.values() if failure.hint), ""),
            )
        time.sleep(_POLL)


def _objection(
    reply: Message, study: Study, adapter: Adapter, members: Mapping[str, Participant], keys: Mapping[str, str] | None
) -> Failure | None:
    """Return why a reply to an offer makes no member, or None where it does."""
    if isinstance(reply, Failure):
        return reply
    if not isinstance(reply, Consent):
        return Failure("ProtocolError", f"answered an offer with {reply.kind}", "")
    if not re.fullmatch(NAME_PATTERN, reply.site):
        return Failure("ProtocolError", "a site's name has characters that names may not have", "")
    if reply.study_digest != study.digest or reply.spec_digest != adapter.spec.digest or reply.weight < 1:
        return Failure("ProtocolError", f"{reply.site}: consented to something else", "")
    if study.cohort.sites and reply.site not in study.cohort.sites:
        return Failure("ProtocolError", f"{reply.site}: the study does not name this site", "")
    if keys is not None and keys.get(reply.site) != reply.identity:
        return Failure("ProtocolError", f"{reply.site}: no member of the consortium has this name and key", "")
    if reply.weight > study.aggregation.largest_count:
        return Failure("ProtocolError", f"{reply.site}: declared more than aggregation.largest_count", "")
    if reply.site in members:
        return Failure("ProtocolError", f"{reply.site}: the name is taken", "")
    if study.secure_aggregation.mode == "masked" and not re.fullmatch("[0-9a-f]{64}", reply.identity):
        return Failure("ProtocolError", f"{reply.site}: named no identity key, which masking needs", "")
    if reply.identity and reply.identity in {member.consent.identity for member in members.values()}:
        return Failure("ProtocolError", f"{reply.site}: named another site's identity key", "")
    return None


def cohort_size(study: Study, members: int) -> int:
    """Return how many of so many members are asked into a round."""
    return min(members, max(study.cohort.min_sites, round(study.cohort.fraction * members)))


def draw_cohort(study: Study, round_number: int, members: Mapping[str, Participant]) -> dict[str, Participant]:
    """Draw a round's cohort: the study's fraction of the sites, at least its minimum, from the public seed."""
    names = sorted(members)
    size = cohort_size(study, len(names))
    if size < len(names):
        order = np.argsort(SeededRandomness(study.seed, "cohort", round_number).uniform(len(names)), kind="stable")
        names = sorted(names[index] for index in order[:size])
    return {name: members[name] for name in names}
