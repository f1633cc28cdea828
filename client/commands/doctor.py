"""`privet site doctor`: check everything that a site needs for a round, and say how to correct each fault.

Checks are independent, and an error is the result of its check, so one fault hides no other. Nothing is changed. What
fails comes with a command that mends it, or, where nothing can, with the command that shows what is left to do.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from privet.client.budget.chain import LOST_ANCHOR, on_one_disk
from privet.client.budget.releases import limit_of, open_ledger
from privet.client.budget.withdrawals import anybody_withdrawn, withdrawn_of
from privet.client.checks import Check
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, check_certificate
from privet.client.network.lock import is_served, serves_former
from privet.client.network.proposals import LogReader, compared
from privet.client.network.reach import reach
from privet.client.network.rotation import is_rotation
from privet.client.policy.consent import approved, policy_digest
from privet.client.policy.opinion import judged, said, unfit_of
from privet.client.policy.rules import load_policy
from privet.client.policy.text import explain_patients
from privet.client.rounds.logbook import open_witness, refusal_of
from privet.client.rounds.refusals import omitted_refusals
from privet.client.site import SiteConfig, load_site
from privet.client.trainer.confinement import available, require_unexposed
from privet.client.trainer.places import require_guarded
from privet.client.trainer.reviewed import require_reviewed
from privet.client.trainer.slurm import controller, missing
from privet.client.training.glance import columns_named, columns_of
from privet.client.trust import read_trusted
from privet.common.canonical import canonical_json, digest
from privet.common.doors.files import raise_limit
from privet.common.errors import PrivetError
from privet.common.log.note import NoteKey
from privet.common.log.replay import Replay
from privet.common.pki.certificates import due_for_renewal
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import Status
from privet.common.pki.keyfile import public_key
from privet.common.progress import number_of
from privet.common.study.sections import ModelSection
from privet.common.study.study import load_study

LedgerOf = tuple[int, str] | None
"""Rows and head of this site's ledger in its last statement; None where the log holds none."""

_CLOCK_SECONDS = 60
_FREE_BYTES = 2 * 2**30
# Open files of a site: its data, model and ledger, and what its libraries open.
_FILES = 512


_FIRST = "first correct the connection: `privet site doctor SITE --network`"
_MENDS = {
    "site file": "or start it anew: `mv SITE SITE.old`, then `privet site setup DIRECTORY`",
    "process": "stop it, then run `privet site serve SITE`",
    "data": "`privet site setup SITE` proposes how a file is written; `privet site setup SITE --train FILE` names one",
    "certificate": "`privet site renew SITE --force` gets another one",
    "connection": "`privet site doctor SITE --network` says which step fails",
    "clock": "`timedatectl set-ntp true` sets this machine's clock by NTP",
    "trust": "`privet site setup SITE` goes on with what is not confirmed",
    "log": "`privet site setup SITE` adds what is missing; `privet site doctor SITE --network` tests the network",
    "policy": "or start it anew: `mv POLICY POLICY.old`, then `privet site policy SITE --init`",
    "limit": "`privet site setup SITE` asks for it",
    "patients": "`privet site setup SITE --patient-column COLUMN`",
    "ledger": "if the site has never had one, `privet site setup SITE` creates it; if it had one, `cp BACKUP LEDGER`",
    "anchor": "`privet site setup SITE --anchor PATH`",
    "withdrawn": "`cp BACKUP FILE`, for each of the three files that is missing",
    "disk": "`df -h DIRECTORY` shows how full the disk is",
    "files": "`ulimit -n 65536` in the shell before the command",
    "trainer": "`squeue --me` shows what becomes of this user's jobs",
    "device": "`privet site setup SITE --device cpu` trains on the CPU",
    "bases": "`privet site setup SITE --base NAME=PATH` names another directory; `privet base PATH` reads one",
    "records": "`privet check STUDY` says more about the study's model",
    "studies": "`privet site studies SITE` says more",
}
"""By check: what mends it where the finding itself names no command."""


LOCAL = frozenset(
    {"site file", "process", "data", "trust", "policy", "limit", "patients", "ledger", "anchor", "withdrawn", "disk"}
)
"""The checks that need neither the coordinator nor the model, and take no time."""


def examine(
    file: Path, clock: Callable[[], datetime], study: Path | None = None, only: Collection[str] = ()
) -> tuple[Check, ...]:
    """Check everything that a site needs.

    Args:
        file: The site file. Its directory is the site's directory.
        clock: Returns the time.
        study: A study file, whose model is then opened and probed on this machine.
        only: Names of the checks to make; empty: all.
    """
    try:
        site = load_site(file)
    except PrivetError as error:
        return (_with_command(Check("site file", False, error.message, error.hint), file, None),)
    enrolment, status, stated, replayed = Enrolment(file.parent), list[Status](), list[LedgerOf](), list[Replay]()
    service = ConsortiumClient(enrolment, clock)
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("process", lambda: _process(site)),
        ("data", lambda: _data(site)),
        ("certificate", lambda: _certificate(enrolment, clock())),
        ("connection", lambda: _connection(site, enrolment, service, status)),
        ("clock", lambda: _clock(status, clock())),
        ("trust", lambda: _trust(site, enrolment)),
        ("log", lambda: _log(site, service, status, stated, replayed)),
        ("policy", lambda: _policy(site)),
        ("limit", lambda: _limit(site)),
        ("patients", lambda: _patients(site)),
        ("ledger", lambda: _ledger(site, stated)),
        ("anchor", lambda: _anchor(site)),
        *([("withdrawn", lambda: _withdrawn(site))] if anybody_withdrawn(site) else []),
        ("disk", lambda: _disk(file.parent)),
        ("files", _files),
        *([("trainer", lambda: _trainer(site))] if site.resources.trainer != "inside" else []),
        ("device", lambda: _device(site)),
        ("bases", lambda: _bases(site)),
        *([("records", lambda: _records(site, study))] if study is not None else []),
        ("studies", lambda: _studies(site, service, replayed)),
    )
    found = (
        Check("site file", True, str(file)),
        *(_tried(name, check) for name, check in checks if not only or name in only),
    )
    return tuple(_with_command(check, file, site) for check in found)


def _with_command(check: Check, file: Path, site: SiteConfig | None) -> Check:
    """Return a check whose hint, where it fails, names a whole command for this very site."""
    if check.ok:
        return check
    hint = check.hint
    if "`" not in hint:
        mend = _MENDS[check.name]
        joint = "; " if mend.startswith("or ") else ": "
        hint = f"{hint or 'correct the file'}{joint}{mend}" if hint or joint == "; " else mend
    places: dict[str, object] = {
        "SITE": file,
        "DIRECTORY": file.parent,
        "POLICY": (site and site.policy) or file.parent / "policy.toml",
        "LEDGER": (site and site.ledger) or file.parent / "state/ledger.db",
    }

    def filled(quoted: re.Match[str]) -> str:
        command = quoted.group()
        for word, path in places.items():
            command = re.sub(rf"(?<= ){word}\b", partial(_quoted, path), command)
        return command

    return replace(check, hint=re.sub("`[^`]*`", filled, hint))


def _quoted(path: object, match: re.Match[str]) -> str:
    return shlex.quote(str(path))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (PrivetError, OSError) as error:
        message = error.message if isinstance(error, PrivetError) else str(error.strerror)
        return Check(name, False, message, error.hint if isinstance(error, PrivetError) else "")


def _process(site: SiteConfig) -> Check:
    if serves_former(site):
        text = "a process serves this site with the former site file, so what was changed does not count yet"
        hint = "stop it, then run `privet site serve SITE`; under systemd, `systemctl restart privet-site` does both"
        return Check("process", False, text, hint)
    if is_served(site):
        return Check("process", True, "one serves this site, with this site file")
    return Check("process", True, "none serves this site now: `privet site serve` does")


def _data(site: SiteConfig) -> Check:
    missing = [str(path) for path in (*site.train, *site.test) if not path.is_file()]
    if missing:
        hint = "name the files: `privet site setup SITE --train FILE`"
        return Check("data", False, f"missing files: {', '.join(missing)}", hint)
    if site.declared_count is None:
        hint = "declare a round number near your number of units: `privet site setup SITE --declared-count NUMBER`"
        return Check("data", False, "the site declares no count; private studies need one", hint)
    for path in (*site.train, *site.test):
        columns_of(site, path)  # its first row
    files = number_of(len(site.train), "training file")
    return Check("data", True, f"{files}; {number_of(site.declared_count, 'unit')} declared")


def _withdrawn(site: SiteConfig) -> Check:
    found = withdrawn_of(site)
    left = "the whole dataset was withdrawn, and the site takes part in no round"
    text = left if found is not None and found.left else "the marks of those who were withdrawn can be read"
    return Check("withdrawn", True, text)


def _certificate(enrolment: Enrolment, now: datetime) -> Check:
    certificate = enrolment.certificate
    check_certificate(certificate, enrolment.root, enrolment.asked.keys.site, enrolment.tls, now)
    text = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if due_for_renewal(certificate, now):
        hint = "keep `privet site serve SITE` running, which renews it, or run `privet site renew SITE` now"
        return Check("certificate", False, f"{text}; renewal is due, as two thirds of its life are over", hint)
    return Check("certificate", True, text)


def _connection(site: SiteConfig, enrolment: Enrolment, service: ConsortiumClient, status: list[Status]) -> Check:
    status.append(service.status())
    stated = enrolment.terms.fleet
    own = stated if site.coordinator is None else site.coordinator.address
    if own != stated:  # a way of the site's own, such as a tunnel; or a slip
        fault = next((step for step in reach({"fleet": own}, enrolment.root, None) if not step.ok), None)
        if fault is not None:
            hint = (
                f"the coordinator states {stated}; if the site has no other way there, "
                f"`sed -i 's|{re.escape(own)}|{stated}|' SITE` corrects the line"
            )
            return Check("connection", False, f"[coordinator] address of the site file, {own}: {fault.text}", hint)
    text = f"the service knows this site; {status[0].members} members, {status[0].leaves} leaves in the round log"
    return Check("connection", True, text)


def _clock(status: list[Status], now: datetime) -> Check:
    if not status:
        return Check("clock", False, "not compared: the service did not answer", _FIRST)
    apart = now.timestamp() - status[0].time
    text = f"differs by {apart:+.0f} s from the coordinator's clock; at most {_CLOCK_SECONDS} s are allowed"
    return Check("clock", abs(apart) <= _CLOCK_SECONDS, text, "set this machine's clock: `timedatectl set-ntp true`")


def _trust(site: SiteConfig, enrolment: Enrolment) -> Check:
    key = site.identity_key()
    if site.trusted is None:
        hint = "run `privet site migrate SITE`, then `privet site trust SITE`"
        return Check(
            "trust", False, "the site file trusts what the coordinator wrote into it, not what was compared", hint
        )
    trusted, terms = read_trusted(site.trusted), enrolment.terms
    if key is None or trusted.pins.get(site.name) != bytes.fromhex(public_key(key)):
        hint = "`privet site setup SITE` puts back what names the key with which this site joined"
        return Check("trust", False, "the confirmed keys do not hold this site's own key", hint)
    if trusted.charter is None:
        hint = "have the coordinator's operator read out its words, then run `privet site trust SITE`"
        return Check("trust", False, "nobody has confirmed the charter of the consortium", hint)
    # The charter decides; the coordinator may state another one by now.
    claimed = Charter.claimed(terms, enrolment.root)
    if is_rotation(trusted, claimed):
        hint = "have its operator read out the words of the new charter, then run `privet site trust SITE`"
        return Check(
            "trust", False, "the coordinator has rotated its keys, and nobody has confirmed the new ones", hint
        )
    if trusted.charter != claimed:
        hint = (
            "take part in no round, and ask the coordinator's operator what has changed. If the change is meant, have "
            "the new words read out, and type them: `privet site trust SITE`"
        )
        return Check("trust", False, "the coordinator states another charter than the confirmed one", hint)
    missing = [member.site for member in terms.members if trusted.keys.get(member.site) != member]
    if missing:
        hint = f"have each operator read out the words of its keys, then run `privet site trust SITE {missing[0]}`"
        return Check("trust", False, f"not confirmed: {', '.join(missing)}", hint)
    keys = [NoteKey.parse(text) for text in (claimed.log, *(member.witness for member in trusted.members))]
    if not site.classical_signatures and (classical := refusal_of(keys)):
        return Check("trust", False, classical.message, classical.hint)
    return Check("trust", True, f"confirmed: the charter and {number_of(len(trusted.members), 'member')}")


def _log(
    site: SiteConfig,
    service: ConsortiumClient,
    status: list[Status],
    stated: list[LedgerOf],
    replayed: list[Replay],
) -> Check:
    """Check the round log. Say in `stated` what it holds of this site's ledger, and give its history to `replayed`."""
    if site.log is None:
        return Check("log", False, "the site file has no [log] table", "`privet site setup SITE` puts it back")
    witness = open_witness(site, site.log)
    seen = witness.last
    if witness.evidence:
        text = f"EVIDENCE of a fork or a rollback: {witness.evidence[0]}"
        hint = (
            "take part in no round, and show the file to the other sites; compare your copies of the log: "
            "`privet audit diff FIRST SECOND`"
        )
        return Check("log", False, text, hint)
    if site.trusted is None:
        hint = "run `privet site migrate SITE`, then `privet site trust SITE`"
        return Check("log", False, "its policy is what the coordinator wrote, not what was compared", hint)
    own = read_trusted(site.trusted).keys.get(site.name)
    if own is None or own.witness != witness.public.text:
        hint = (
            "set log.key and mldsa to the keys with which this site joined (keys/witness.pem, keys/mldsa65.pem), from "
            "a backup if a file was replaced: `cp BACKUP keys/witness.pem`. If one is lost, join anew: `privet site "
            "join @TOKEN NEW-DIRECTORY`"
        )
        return Check("log", False, "the cosigning keys are not those with which this site joined", hint)
    if not status:
        return Check("log", False, "not read: the service did not answer", _FIRST)
    # The whole history, from its first leaf, against all that was confirmed: also what no round has shown yet.
    log = LogReader(site).read(service)
    if log is None:
        hint = "the coordinator's operator founds it with `privet coordinator found`"
        return Check("log", not seen.size, "the round log is empty: the consortium is not founded yet", hint)
    stated.append(log.history.ledger_of(site.name))
    replayed.append(log.history)
    gone = omitted_refusals(site.log.state, log.history)
    if gone:
        hint = "write receipts with `privet site receipts SITE --out FILE`, and ask the coordinator's operator"
        return Check("log", False, f"it lacks refusals that this site signed: {', '.join(gone)}", hint)
    names = f"{log.policy.needed} of {len(log.policy.witnesses)} sites must cosign; this site is one of them"
    return Check("log", True, f"{names}; all {log.newest.size} leaves replayed, {seen.size} of them cosigned")


def _policy(site: SiteConfig) -> Check:
    if site.policy is None:
        hint = "`privet site setup SITE` writes a first one"
        return Check("policy", False, "none: this site refuses every study", hint)
    if not site.policy.exists():
        hint = "`privet site policy SITE --init` writes a first one"
        return Check("policy", False, f"there is no file {site.policy}: this site refuses every study", hint)
    policy, count = load_policy(site.policy), len(approved(site))
    if not policy.model.bases:
        hint = "admit the base of a study: `privet site policy SITE --admit-base STUDY`"
        return Check("policy", False, "it admits no base, so it refuses every study", hint)
    people = f"{count} {'study' if count == 1 else 'studies'} approved"
    if policy.approval != "person":
        people = "studies are approved by rule"
    return Check("policy", True, f"{policy_digest(site)}; {people}")


def _limit(site: SiteConfig) -> Check:
    limit = limit_of(site)
    if limit is None:
        hint = "say what the dataset may spend in its lifetime: `privet site setup SITE`"
        return Check("limit", False, "the site file has no [limit]; private studies need one", hint)
    return Check(
        "limit",
        True,
        f"epsilon {limit.epsilon:g} at delta {limit.delta:g} for each {limit.unit}, for the dataset's lifetime",
    )


def _patients(site: SiteConfig) -> Check:
    limit = limit_of(site)
    well = site.patient_column is not None or (limit is not None and limit.unit == "record")
    for path in (path for path in site.train if path.is_file() and site.patient_column is not None):
        columns = columns_of(site, path)
        if site.patient_column not in columns:
            text = f"{path.name} has no column {site.patient_column}; found {columns_named(site, path, columns)}"
            return Check("patients", False, text, "`privet site setup SITE --patient-column COLUMN`")
    hint = "name the column that identifies patients: `privet site setup SITE --patient-column COLUMN`"
    return Check("patients", well, explain_patients(site), hint)


def _ledger(site: SiteConfig, stated: list[LedgerOf]) -> Check:
    lost = site.ledger is not None and not site.ledger.exists()
    if lost and site.log is not None and open_witness(site, site.log).last.size:
        hint = "restore the newest copy, `cp BACKUP LEDGER`; never create a second one for the same data"
        return Check("ledger", False, f"{site.ledger} is missing, and this site has taken part in rounds", hint)
    ledger = open_ledger(site)
    try:
        ledger.verify()
        if stated and stated[0] is not None:
            ledger.check_anchor(*stated[0])
        rows = ledger.head[0]
    finally:
        ledger.close()
    if site.ledger is not None and (site.ledger_key or site.ledger).parent == site.ledger.parent:
        hint = 'move it, and set ledger_key = "keys/ledger.key" in the site file: `privet site setup SITE` does both'
        return Check("ledger", False, "its key belongs into another directory: one backup would hold both", hint)
    log = "no statement in the round log"
    if not stated:
        log = "not compared with the round log"
    elif stated[0] is not None:
        log = f"it holds row {stated[0][0]}, which this site last stated in the round log"
    return Check("ledger", True, f"verified, {number_of(rows, 'row')}; {log}")


def _anchor(site: SiteConfig) -> Check:
    if site.anchor is None:
        hint = "name a file on another disk than the ledger: `privet site setup SITE --anchor PATH`"
        return Check("anchor", False, "none: the site cannot detect a ledger that was restored from a backup", hint)
    if not site.anchor.exists():
        missing = site.anchor if site.anchor.parent.exists() else f"{site.anchor}, and its directory,"
        return Check("anchor", False, f"{missing} is missing", LOST_ANCHOR)
    if site.ledger is not None and on_one_disk(site.ledger, site.anchor):
        text = "present, but on the ledger's file system, so that one backup may restore both"
        if site.anchor_same_disk:
            return Check("anchor", True, f"{text}; the site file accepts this")
        hint = (
            "move it to another disk, `privet site setup SITE --anchor PATH`, or accept this, "
            "`privet site setup SITE --anchor-same-disk`"
        )
        return Check("anchor", False, text, hint)
    return Check("anchor", True, "present, on another disk than the ledger")


def _studies(site: SiteConfig, service: ConsortiumClient, replayed: Sequence[Replay]) -> Check:
    """Say of each run that the coordinator proposes whether this site would take part in it, as it is now."""
    if not replayed:
        return Check("studies", True, "not checked, as the round log could not be read", made=False)
    well, refused, waits, held = [], [], [], []
    for each in compared(service.proposals(), replayed[0]):
        if each.ended:
            continue
        opinion = judged(site, each.study)
        if opinion.refused:
            held.append(f"refused by a person here: {each.run}")
            continue
        against = [said(finding) for finding in opinion.against]
        unfit = None if against or opinion.budget is not None else unfit_of(site, each.study)
        against += [error.message for error in (opinion.budget, unfit) if error is not None]
        if against:
            refused.append((each.run, f"{each.run} is proposed, and this site would refuse it: {'; '.join(against)}"))
        elif opinion.waits:
            waits.append(each.run)
        elif opinion.later:
            held.append(f"not yet in {each.run}: {'; '.join(map(said, opinion.later))}")
        else:
            well.append(each.run)
    if refused:
        hint = f"`privet site approve SITE {refused[0][0]}` says what would admit it"
        return Check("studies", False, ". ".join(text for _, text in refused), hint)
    if well and not is_served(site):
        text = f"the coordinator asks this site for {', '.join(well)}, and no process serves the site"
        return Check("studies", False, text, "run `privet site serve SITE`")
    if waits:
        hint = f"read it; to take part, approve it: `privet site approve SITE {waits[0]}`"
        return Check("studies", False, f"not approved at this site: {', '.join(waits)}", hint)
    taken = [f"takes part in {', '.join(well)}"] if well else []
    return Check("studies", True, ". ".join([*taken, *held]) or "no run is proposed")


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    text = f"{free / 2**30:.1f} GiB free; at least {_FREE_BYTES / 2**30:.0f} GiB are needed"
    hint = "free disk space, as a site with a full disk releases nothing; `df -h DIRECTORY` shows how full it is"
    return Check("disk", free >= _FREE_BYTES, text, hint)


def _files() -> Check:
    limit = raise_limit()
    text = f"{limit} may be open; at least {_FILES} are needed" if limit >= 0 else "no limit on open files"
    hint = "set LimitNOFILE=65536 in the systemd unit, or run `ulimit -n 65536` in the shell before the command"
    return Check("files", limit < 0 or limit >= _FILES, text, hint)


def _trainer(site: SiteConfig) -> Check:
    """Check what a trainer apart needs, and say what is enforced on it. On a node of a cluster it says so itself."""
    require_reviewed(site)
    require_unexposed(site, [*map(str, (*site.train, *site.test, *site.resources.bases.values()))])
    section = site.resources.slurm
    if section is None:
        count, can = site.resources.devices, available()
        name = "a process" if count == 1 else f"{count} processes"
        text = f"{name} apart from the keys; {can.text}"
        hint = "update to Linux 5.13 or later, which has Landlock; `uname -r` prints the version"
        return Check("trainer", can.network and can.files, text, hint)
    if lacking := missing():
        hint = "run the site where jobs are submitted; on Debian `apt-get install slurm-client` installs them"
        return Check("trainer", False, f"programs of Slurm are missing: {', '.join(lacking)}", hint)
    if not (section.directory.is_dir() and os.access(section.directory, os.W_OK)):
        hint = f"make it, on a disk that the nodes see under this path: `mkdir -m 700 {section.directory}`"
        return Check("trainer", False, f"{section.directory} is no directory in which this user can write", hint)
    require_guarded(section.directory)
    answering = controller()
    text = f"jobs of Slurm, in {section.directory}; {answering or 'the controller answers'}"
    return Check("trainer", not answering, text, "`scontrol ping` says which controller does not answer")


def _device(site: SiteConfig) -> Check:
    if site.resources.trainer == "slurm":
        return Check("device", True, "that of the trainer's job; its probe runs there")
    import torch

    found = torch.cuda.is_available()
    wanted = site.resources.device
    if wanted == "cuda" and not found:
        hint = "check the driver with `nvidia-smi`, or train on the CPU: `privet site setup SITE --device cpu`"
        return Check("device", False, "the site file asks for a GPU, but PyTorch finds none", hint)
    return Check("device", True, torch.cuda.get_device_name(0) if found else "no GPU: this site trains on the CPU")


def _bases(site: SiteConfig) -> Check:
    """Verify that each mapped base is a model, and say which of them the policy admits, as far as it lists any."""
    from privet.client.bases.files import pins_of
    from privet.client.bases.opened import check_base

    found: list[str] = []
    if not site.resources.bases:
        return Check(
            "bases",
            True,
            "no model directory is named here: a study's base must be an installed package, or a "
            "model in this machine's cache",
        )
    admitted = load_policy(site.policy).model.bases if site.policy is not None else "any"
    for name, path in sorted(site.resources.bases.items()):
        if not path.is_dir():
            hint = f"copy the model there, or name its place: `privet site setup SITE --base {name}=PATH`"
            return Check("bases", False, f"{name}: there is no directory {path}", hint)
        pins = pins_of(path)
        check_base(ModelSection.model_construct(base=name, sha256=pins), path)
        known = admitted == "any" or digest(canonical_json(pins)) in admitted
        found.append(f"{name}: {len(pins)} files{'' if known else ', not admitted by the policy'}")
    return Check("bases", True, "; ".join(found))


def _records(site: SiteConfig, file: Path) -> Check:
    """Open a study's model, which probes whether this device keeps each record's gradient to itself."""
    from privet.client.training.model import check_terms, open_host
    from privet.client.training.verdicts import anew

    study = load_study(file)
    check_terms(study)
    with anew():
        host = open_host(study, site.resources)
    precision = "bf16" if host.autocast is not None else "fp32"
    where = f"({host.device.type}, {precision})"
    if host.verdict:
        return Check(
            "records", True, f"kept apart in passes of one record each, which is slower: {host.verdict} ({where})"
        )
    rows = ", ".join(str(size) for size in host.shape.sizes)
    return Check("records", True, f"kept apart, bit for bit, in passes of {rows} rows {where}")
