"""What stands between a site and its next round: each thing looked at, with what to do about it.

Every check stands alone and an error becomes its finding, so one broken thing hides no other. Nothing is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from privet.client.budget.releases import limit_of, open_ledger
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, check_certificate
from privet.client.policy.consent import approved, policy_digest
from privet.client.policy.rules import load_policy
from privet.client.rounds.logbook import open_witness, read_policy
from privet.client.site import SiteConfig, load_site
from privet.common.errors import PrivetError
from privet.common.pki.certificates import due_for_renewal
from privet.common.pki.enrolment import Status
from privet.common.pki.keyfile import public_key

_CLOCK_SECONDS = 60
_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What.
        ok: Whether it is well.
        text: What was found.
        hint: What to do, where it is not.
    """

    name: str
    ok: bool
    text: str
    hint: str = ""


def examine(file: Path, clock: Callable[[], datetime]) -> tuple[Check, ...]:
    """Look at everything that a site needs.

    Args:
        file: The site file; the site's directory is the one that holds it.
        clock: Returns the time.
    """
    try:
        site = load_site(file)
    except PrivetError as error:
        return (Check("site file", False, error.message, error.hint),)
    enrolment, status = Enrolment(file.parent), list[Status]()
    service = ConsortiumClient(enrolment, clock)
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("data", lambda: _data(site)),
        ("certificate", lambda: _certificate(enrolment, clock())),
        ("connection", lambda: _connection(service, status)),
        ("clock", lambda: _clock(status, clock())),
        ("pins", lambda: _pins(site, enrolment)),
        ("log", lambda: _log(site)),
        ("policy", lambda: _policy(site)),
        ("limit", lambda: _limit(site)),
        ("ledger", lambda: _ledger(site)),
        ("anchor", lambda: _anchor(site)),
        ("disk", lambda: _disk(file.parent)),
        ("device", lambda: _device(site)),
    )
    return (Check("site file", True, str(file)), *(_tried(name, check) for name, check in checks))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (PrivetError, OSError) as error:
        message = error.message if isinstance(error, PrivetError) else str(error.strerror)
        return Check(name, False, message, error.hint if isinstance(error, PrivetError) else "check the path")


def _data(site: SiteConfig) -> Check:
    missing = [str(path) for path in (*site.train, *site.test) if not path.is_file()]
    if missing:
        return Check("data", False, f"missing: {', '.join(missing)}", "correct `train` and `test` in the site file")
    if site.declared_count is None:
        hint = "set `declared_count` to a round number near your units"
        return Check("data", False, "the site declares no count, which private studies need", hint)
    return Check("data", True, f"{len(site.train)} training files, {site.declared_count} units declared")


def _certificate(enrolment: Enrolment, now: datetime) -> Check:
    certificate = enrolment.certificate
    check_certificate(certificate, enrolment.root, enrolment.asked.keys.site, enrolment.tls, now)
    text = f"good until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if due_for_renewal(certificate, now):
        hint = "`privet site serve` renews it while it runs; `privet site renew` does so at once"
        return Check("certificate", False, f"{text}; two thirds of its life are over", hint)
    return Check("certificate", True, text)


def _connection(service: ConsortiumClient, status: list[Status]) -> Check:
    status.append(service.status())
    text = f"the consortium service knows this site; {status[0].members} members, {status[0].leaves} leaves in the log"
    return Check("connection", True, text)


def _clock(status: list[Status], now: datetime) -> Check:
    if not status:
        return Check("clock", False, "not compared: the consortium service did not answer", "first mend the connection")
    apart = now.timestamp() - status[0].time
    text = f"{apart:+.0f} s from the coordinator's"
    return Check("clock", abs(apart) <= _CLOCK_SECONDS, text, "set this machine's clock, best by NTP")


def _pins(site: SiteConfig, enrolment: Enrolment) -> Check:
    key = site.identity_key()
    if key is None or site.peers.get(site.name) != public_key(key):
        hint = "set `identity`, and list its public key under [peers]"
        return Check("pins", False, "[peers] does not hold this site's own key", hint)
    roster = {member.site: member.identity for member in enrolment.terms.members}
    differing = sorted(name for name in roster | site.peers if roster.get(name) != site.peers.get(name))
    if differing:
        hint = "`privet site roster` shows both; compare fingerprints with that site's operator, then correct [peers]"
        return Check("pins", False, f"[peers] and the roster differ for {', '.join(differing)}", hint)
    return Check("pins", True, f"{len(site.peers)} sites pinned, as in the roster")


def _log(site: SiteConfig) -> Check:
    if site.log is None:
        return Check("log", False, "the site file has no [log]", "`privet site join` writes one; copy it from there")
    if not site.log.policy.exists():
        hint = "once the consortium was founded, run `privet site roster --accept`"
        return Check("log", False, "there is no policy of the log yet", hint)
    policy, witness = read_policy(site.log.policy), open_witness(site, site.log)
    if witness.public not in policy.witnesses:
        hint = "`privet site roster --accept` takes over the newest policy"
        return Check("log", False, "this site's cosigning key is not in the policy of the log", hint)
    seen = witness.last.size
    if witness.evidence:
        text = f"EVIDENCE of a fork or a rollback: {witness.evidence[0]}"
        return Check("log", False, text, "take part in nothing, and show it to the other sites")
    names = f"{policy.needed} of {len(policy.witnesses)} sites have to cosign, this one among them"
    return Check("log", True, f"{names}; it has seen {seen} leaves")


def _policy(site: SiteConfig) -> Check:
    if site.policy is None:
        return Check("policy", False, "none: this site refuses everything", "run `privet site policy SITE --init`")
    policy, count = load_policy(site.policy), len(approved(site))
    if not policy.model.bases:
        hint = "list digests under model.bases; `privet site check` prints a study's"
        return Check("policy", False, "it admits no base, and so no study", hint)
    people = f"{count} studies approved" if policy.approval == "person" else "studies are approved by rule"
    return Check("policy", True, f"{policy_digest(site)}; {people}")


def _limit(site: SiteConfig) -> Check:
    limit = limit_of(site)
    if limit is None:
        hint = "set unit, epsilon and delta under [limit]: what the dataset may spend in its lifetime"
        return Check("limit", False, "no [limit], which private studies need", hint)
    return Check("limit", True, f"epsilon {limit.epsilon:g} at delta {limit.delta:g} for each {limit.unit}, for good")


def _ledger(site: SiteConfig) -> Check:
    ledger = open_ledger(site)
    try:
        ledger.verify()
        return Check("ledger", True, f"whole, {ledger.head[0]} rows")
    finally:
        ledger.close()


def _anchor(site: SiteConfig) -> Check:
    if site.anchor is None:
        return Check("anchor", False, "none: a ledger restored from a backup would not be noticed", "set `anchor`")
    if site.ledger is not None and site.anchor.stat().st_dev == site.ledger.stat().st_dev:
        return Check("anchor", True, "in place, though on the ledger's own disk")
    return Check("anchor", True, "in place, on another disk than the ledger")


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    text = f"{free / 2**30:.1f} GB free"
    return Check("disk", free >= _FREE_BYTES, text, "free some: a site whose disk is full releases nothing")


def _device(site: SiteConfig) -> Check:
    import torch

    found = torch.cuda.is_available()
    wanted = site.resources.device
    if wanted == "cuda" and not found:
        return Check(
            "device", False, "the site file asks for a GPU, and PyTorch finds none", "check driver and PyTorch"
        )
    return Check("device", True, torch.cuda.get_device_name(0) if found else "no GPU: training on the processor")
