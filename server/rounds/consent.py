"""Find the participants: offer the study, check the replies, and draw each round's cohort."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privet.common.errors import ProtocolError, TooFewSitesError
from privet.common.progress import printable
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Consent, Failure, Message, Offer
from privet.common.study.sections import NAME_PATTERN
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.participants import Participant
from privet.server.rounds.run_log import RunLog, Unlogged
from privet.server.rounds.wait import CONSENT, Wait
from privet.server.rounds.watch import Watch

_POLL = 0.5
# Seconds for which one look waits for answers, before connections and refusals are looked at again.
_LOOK = 1.0
# Seconds after which a site that refused is offered the study again: its operator may have approved it meanwhile.
_AGAIN = 20.0
_AWAY = "not connected"
_START = "let the operators of these sites run `privet site serve SITE`"
_VERSION = "run the same version of privet at the site and at the coordinator"
# Seconds that a round waits for a further connected site's answer once there are enough: in a round that begins with
# enough, and in one that had to find them, where sites may still prepare their records.
_LATECOMER, _FIRST = 5.0, 600.0


def gather_participants(
    exchange: Exchange,
    log: RunLog | Unlogged,
    adapter: Adapter,
    timeout: float,
    known: Mapping[str, Participant],
    watch: Watch | None = None,
) -> dict[str, Participant]:
    """Offer the study to every node that is not `known`, and return all sites that consent to exactly this study.

    Called before each round, so that a site that starts late, or returns at another address, takes part from the next
    round on; a site that is offline is dropped. Waits for more nodes only while there are fewer sites than the study's
    minimum; each site that refused is asked again now and then, whether or not the others have answered. Where a log
    is kept, only its members take part.

    Raises:
        TooFewSitesError: Fewer than the minimum consent within `timeout` seconds.
    """
    study, watch = log.run.study, watch or Watch()
    needed = study.cohort.min_sites
    started = time.monotonic()
    deadline, limit = started + timeout, started + _LATECOMER
    participants = dict(known)
    refusals: dict[int, Failure] = {}  # shown until the site answers anew
    again: dict[int, float] = {}
    asked = log.listening(exchange)
    pending: set[int] = set()
    while True:
        nodes = exchange.nodes()
        participants = {name: each for name, each in participants.items() if each.node in nodes}
        # A site that comes back is asked at once: its operator may have restarted it after a change.
        refusals = {node: failure for node, failure in refusals.items() if node in nodes}
        names, looked = watch.names(nodes), time.monotonic()
        settled = {each.node for each in participants.values()}
        settled |= {node for node in refusals if again[node] > looked}
        # An offer that is repeated while its answer is due is not sent twice: the exchange goes on waiting for it.
        offers = {node: Offer(study.document(), log.name, str(node)) for node in nodes if node not in settled}
        if len(participants) < needed:
            limit = looked + _FIRST
        if len(participants) < needed or pending:
            watch.waits(_wait(log, participants, refusals, names, nodes))
        # One slow site must not delay the others: each look is short, and the next one asks whoever is due.
        left = max(min(deadline - looked, _LOOK), _POLL)
        pending = set(offers)
        # In the order of nodes, not of arrival: of two that use one name, the same one is admitted every time.
        for node, reply in sorted(asked.ask(offers, timeout=left), key=lambda item: item[0]):
            pending.discard(node)
            refusals.pop(node, None)
            try:
                consent = _admitted(reply, log, adapter, participants, str(node))
            except ProtocolError as error:
                refused = Failure(type(error).__name__, error.message, error.hint)
                refusals[node] = reply if isinstance(reply, Failure) else refused
                again[node] = time.monotonic() + _AGAIN
            else:
                participants[consent.site] = Participant(node, consent)
        now = time.monotonic()
        if len(participants) >= needed and (not pending or now >= min(limit, deadline)):
            return participants
        if len(participants) < needed:
            nodes = exchange.nodes()
            wait = _wait(log, participants, _of(nodes, refusals), watch.names(nodes), nodes)
            watch.waits(wait)
            if now >= deadline:
                raise _too_few_consented(study, wait, refusals)
        time.sleep(_POLL)


def _of(nodes: Sequence[int], failures: Mapping[int, Failure]) -> dict[int, Failure]:
    return {node: failure for node, failure in failures.items() if node in nodes}


def _wait(
    log: RunLog | Unlogged,
    participants: Mapping[str, Participant],
    refusals: Mapping[int, Failure],
    names: Mapping[int, str],
    online: Sequence[int],
) -> Wait:
    """Return who has not consented, and why: a refusal, or no connection; no reason where no answer has come yet."""
    study = log.run.study
    expected = study.cohort.sites or log.members
    waiting = {*online} - {participant.node for participant in participants.values()}
    missing = dict.fromkeys(expected, _AWAY) | {names[node]: "" for node in waiting if node in names}
    missing |= {names[node]: _why(refusal) for node, refusal in refusals.items()}
    missing = {name: why for name, why in sorted(missing.items()) if name not in participants}
    return Wait(CONSENT, 0, study.cohort.min_sites, tuple(sorted(participants)), missing)


def _why(refusal: Failure) -> str:
    """Return why a node is no participant; of what this coordinator refuses itself, also what to do about it."""
    own = refusal.error == ProtocolError.__name__ and refusal.hint
    return f"{refusal} ({printable(refusal.hint)})" if own else str(refusal)


def _too_few_consented(study: Study, wait: Wait, refusals: Mapping[int, Failure]) -> TooFewSitesError:
    count, away = len(wait.answered), _AWAY in wait.missing.values()
    return TooFewSitesError(
        f"{count} {'site' if count == 1 else 'sites'} consented to the study, but cohort.min_sites demands "
        f"{study.cohort.min_sites}"
        + "".join(f"\n  {name}: {why or 'did not answer in time'}" for name, why in wait.missing.items()),
        next((failure.hint for failure in refusals.values() if failure.hint), _START if away else ""),
    )


def _admitted(
    reply: Message, log: RunLog | Unlogged, adapter: Adapter, participants: Mapping[str, Participant], node: str
) -> Consent:
    """Return a reply to an offer as a consent that makes its site a participant.

    Raises:
        ProtocolError: It is none, or one of the checks fails.
    """
    if not isinstance(reply, Consent):
        raise ProtocolError(
            f"a site must answer the offer of a study with its consent, found a message of type {reply.kind}",
            _VERSION,
        )
    study = log.run.study
    _check_name(reply)
    _check_agreement(reply, study, adapter)
    _check_membership(reply, study, log)
    _check_weight(reply, study)
    _check_identity(reply, study, participants)
    _check_proof(reply, log.name, node)
    return reply


def _check_name(consent: Consent) -> None:
    """Check the name's characters: it becomes part of file names, log lines and terminal output."""
    if not re.fullmatch(NAME_PATTERN, consent.site):
        raise ProtocolError(
            "the name in a site's consent has a character that is not allowed in site names",
            _VERSION,
        )


def _check_agreement(consent: Consent, study: Study, adapter: Adapter) -> None:
    """Check that the site agreed to these terms: one with another study or layout would spoil the sum for all."""
    terms = (study.digest, adapter.spec.digest)
    if (consent.study_digest, consent.spec_digest) != terms or consent.weight < 1:
        raise ProtocolError(
            f"{consent.site}: the site consented to a different study or adapter layout, or declared no units",
            _VERSION,
        )


def _check_membership(consent: Consent, study: Study, log: RunLog | Unlogged) -> None:
    """Check that the site may take part: an outsider could send false updates, or make up a cohort on its own.

    The key counts as well as the name, so that an outsider cannot take the name of a member.
    """
    if study.cohort.sites and consent.site not in study.cohort.sites:
        raise ProtocolError(
            f"{consent.site}: the study's cohort.sites does not list this site",
            "list the site in cohort.sites of the study file, or stop its process",
        )
    if not log.admits(consent):
        raise ProtocolError(
            f"{consent.site}: no member of the consortium has this name and this identity key",
            "compare with `privet coordinator members`; a site that made new keys must join again",
        )


def _check_proof(consent: Consent, run: str, node: str) -> None:
    """Check that the site itself consents, to this run and at this node.

    Names and public keys are known to every member. Without a signature one could take part as another, shut that one
    out, and have the record charge it for rounds that it never took part in.
    """
    if not consent.identity:
        return
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(consent.identity))
        key.verify(bytes.fromhex(consent.proof), consent.signed(run, node))
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            f"{consent.site}: the consent is not signed with the site's identity key for this run and this node",
            "run the same version of privet at the site; if it is the same, somebody speaks in this site's name",
        ) from None


def _check_weight(consent: Consent, study: Study) -> None:
    """Check the declared units: a site that declares too many would outweigh all others in the mean."""
    if consent.weight > study.aggregation.largest_count:
        raise ProtocolError(
            f"{consent.site}: the site declared more units than the study's aggregation.largest_count allows",
            "raise aggregation.largest_count in the study file, or leave this site out",
        )


def _check_identity(consent: Consent, study: Study, participants: Mapping[str, Participant]) -> None:
    """Check that name and identity key are new: one site that counts as two could make up a cohort with itself.

    Secure aggregation would then take its two updates for those of two sites, and the sum would hide fewer.
    """
    if consent.site in participants:
        raise ProtocolError(
            f"{consent.site}: another process has consented under this site's name",
            "run one process per site; if only one runs, somebody else has a copy of the site's keys",
        )
    if study.secure_aggregation.mode == "masked" and not re.fullmatch("[0-9a-f]{64}", consent.identity):
        raise ProtocolError(
            f"{consent.site}: the site's consent has no valid identity key, which secure aggregation needs",
            "name the identity key in the site file",
        )
    if consent.identity and consent.identity in {each.consent.identity for each in participants.values()}:
        raise ProtocolError(
            f"{consent.site}: the site's consent has the same identity key as the consent of another site",
            "use a separate identity key at each site: `privet site identity FILE`",
        )
