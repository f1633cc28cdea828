"""A site's commands about its policy and its releases."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from privet.common.errors import (
    DataError,
    Finding,
    PolicyError,
    PrivetError,
    RefusedError,
    SpentRoundError,
    StateError,
    StudyError,
    VerificationError,
)
from privet.common.files import most_like, write_new
from privet.common.options import Json, SiteFile
from privet.common.progress import doing, folded, number_of, on_one_line, printable

if TYPE_CHECKING:
    from privet.client.network.proposals import Proposed
    from privet.client.site import SiteConfig
    from privet.common.study.study import Study


@doing("Reading the policy of {site}")
def policy(
    site: SiteFile,
    first: Annotated[
        bool, typer.Option("--init", help="Create a first policy file, for you to read and edit.")
    ] = False,
    admit_base: Annotated[
        Path | None, typer.Option(help="A study file: add its base to `model.bases` of the policy.", metavar="STUDY")
    ] = None,
    admit: Annotated[
        Literal["validation", "statistics", "evaluate"] | None,
        typer.Option(help="Add this to `metrics.allow` of the policy: what studies may release besides updates."),
    ] = None,
) -> None:
    """Explain this site's policy in words.

    The site file names the policy file. With --init, the command first writes a policy there: a person approves each
    study, and studies are private, masked, and within the site's limit.
    """
    from privet.client.editing import change_file
    from privet.client.policy.consent import policy_digest
    from privet.client.policy.rules import SitePolicy, base_digest, load_policy
    from privet.client.policy.text import explain_patients, explain_policy, first_policy
    from privet.client.site import load_site
    from privet.common.study.reading import validate

    config = load_site(site)
    if config.policy is None:
        raise StateError(
            f"the site file {site} names no policy file, so this site refuses every study",
            "set `policy` in the site file to a path, then run `privet site policy SITE --init`",
        )
    if first and config.policy.exists():
        raise StateError(
            f"the policy {config.policy} exists already",
            f"edit it; or rename it, and run `privet site policy {site} --init` again",
        )
    if first:
        write_new(config.policy, first_policy(config).encode(), 0o644)
        typer.echo(f"written  {config.policy}: read it, and change the rules that your site decides differently")
    rules = load_policy(config.policy)
    if admit_base is not None and rules.model.bases != "any":
        from privet.common.study.study import load_study

        added = base_digest(load_study(admit_base))
        bases = [*rules.model.bases, *({added} - {*rules.model.bases})]
        change_file(config.policy, {"model.bases": bases}, partial(validate, SitePolicy, what="policy"))
        rules = load_policy(config.policy)
    if admit is not None and admit not in rules.metrics.allow:
        allowed = [*rules.metrics.allow, admit]
        change_file(config.policy, {"metrics.allow": allowed}, partial(validate, SitePolicy, what="policy"))
        rules = load_policy(config.policy)
    what = "of the policy, and of [limit], [floor], patient_column and patient_ids in the site file"
    lines = [*explain_policy(rules), explain_patients(config), f"digest  {policy_digest(config)} ({what})"]
    typer.echo(folded("\n".join(lines), 2))


_REFUSES, _DECLINED = "this site refuses it", "a person here has refused it"
Approver = Annotated[
    str | None, typer.Option("--as", help="Name of the approver who signs, if the site file names approvers.")
]
ApproverPassphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File that holds the passphrase of the approver's key.")
]


@doing("Judging {study} by the policy of {site}")
def check(
    site: SiteFile,
    study: Annotated[
        str,
        typer.Argument(
            help="A study file; or, of a proposed study, its run or 8 digits or more of its digest.",
            metavar="STUDY",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check whether this site would take part in a study, and list every reason against it.

    If policy and budget admit the study, it also reads the site's data files as the site does before it consents, and
    prints nothing of them but counts. It sends nothing. Exit code 3 if the site would refuse the study.
    """
    from privet.client.policy.opinion import judged, ran_before, rounds_done, unfit_of
    from privet.client.policy.rules import base_digest
    from privet.client.site import load_site

    config = load_site(site)
    asked, _ = named_study(site, config, study, read=True)
    opinion, done = judged(config, asked), rounds_done(config, asked)
    findings, budget = opinion.findings, opinion.budget or ran_before(asked, done)
    unfit = None if opinion.against or budget is not None else unfit_of(config, asked)
    if as_json:
        reasons = [vars(finding) for finding in findings]
        spoken = "" if budget is None else budget.message
        answer = {"study": asked.digest, "policy": opinion.digest, "findings": reasons, "budget": spoken}
        answer |= {} if unfit is None else {"data": unfit.message}
        typer.echo(json.dumps({"admitted": not (findings or budget or unfit), **answer}))
    else:
        typer.echo(f"study   {asked.digest}\nbase    {base_digest(asked)}")
        if 0 < done < asked.rounds:
            typer.echo(f"rounds  {done} of {asked.rounds} are in this site's ledger; the site runs none of them again")
        _show(findings, budget, unfit)
        for line in _ways(config, findings, (budget, unfit), site, study, asked):
            typer.echo(folded(f"to admit it  {on_one_line(line)}", 13))
        if opinion.waits and len(findings) == 1 and not (budget or unfit):
            typer.echo(f"next: privet site approve {site} {study}")
    if findings or budget or unfit:
        raise typer.Exit(3)


@doing("Judging {study} by the policy of {site}")
def approve(
    site: SiteFile,
    study: Annotated[
        str,
        typer.Argument(
            help="A study file; or, of a study that the coordinator proposes, its run or the beginning of its digest: "
            "8 digits or more, with --yes 32 or more.",
            metavar="STUDY",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without a question.")] = False,
    by: Approver = None,
    until: Annotated[
        datetime | None,
        typer.Option(help="Last day of the approval (UTC).", formats=["%Y-%m-%d"], show_default=False),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the signed approval.")] = "",
    passphrase_file: ApproverPassphrase = None,
) -> None:
    """Show what a study asks of this site, and record that you approve it.

    The approval is for exactly this study: a changed study needs a new one. The policy and the budget still apply, and
    the site's data files must fit the study: otherwise the command says what to change, records nothing, and ends with
    exit code 3.
    Where the site file names approvers, the approval is signed with the key of the one that --as names.
    On a terminal it asks before it records; --yes leaves the question out. There it also asks which columns and labels
    of the files are those of the study, where they differ, and writes the answers to the site file.
    """
    from privet.client.policy.decisions import end_of, needs_signature
    from privet.client.site import load_site

    config = load_site(site)
    if config.approvers and by is None:
        raise needs_signature(config)
    end = None if until is None else end_of(until)
    asked, who = named_study(site, config, study, read=not yes, ended=False)
    from privet.client.commands.columns import settle_columns
    from privet.client.commands.guide import Guide
    from privet.client.network.lock import is_served, serves_former
    from privet.client.policy.agreement import agreement
    from privet.client.policy.consent import record_approval as record
    from privet.client.policy.opinion import judged, price_of, said, unfit_of
    from privet.client.training.glance import lacking_columns

    lacking, _ = lacking_columns(config, asked)
    for name, text in agreement(config, asked, who, price_of(config, asked), lacking):
        typer.echo(_paragraph(name, text))
    terminal = sys.stdin.isatty()
    if lacking and terminal and not yes:
        settle_columns(Guide(site, yes=False), asked)
        config = load_site(site)
    opinion = judged(config, asked)
    against, budget = opinion.against, opinion.budget
    unfit = None if against or budget is not None else unfit_of(config, asked)
    if isinstance(unfit, DataError) and terminal and not yes and _map_labels(site, asked):
        config = load_site(site)
        unfit = unfit_of(config, asked)
    if against or budget or unfit:
        typer.echo("\nthis site would refuse the study now:")
        _show(against, budget, unfit)
        for line in _ways(config, against, (budget, unfit), site, study, asked):
            typer.echo(folded(f"to admit it  {on_one_line(line)}", 13))
        raise typer.Exit(PolicyError.exit_code)
    if not (yes or terminal or study_is_exact(study)):
        raise StudyError(
            f"there is no terminal to confirm the approval of {study}",
            f"name exactly what you approve, `privet site approve {site} {asked.digest}`, or add --yes",
        )
    if terminal and not yes and not typer.confirm("\nApprove this study for this site?"):
        typer.echo("not approved; no approval was recorded. The coordinator goes on waiting. To say no:")
        typer.echo(f"next: privet site refuse {site} {study} --reason TEXT{_signing(by)}")
        raise typer.Exit(1)
    if by is None:
        record(config, asked, datetime.now(UTC))
    else:
        _decide(config, asked, by, "approve", reason, end, passphrase_file)
    typer.echo(f"\napproved  {asked.name} {asked.digest}")
    opinion = judged(config, asked)
    if opinion.waits:
        typer.echo("not yet   the policy wants more people to approve it")
    for each in opinion.later:
        typer.echo(folded(f"not yet   {printable(said(each))}", 10))
    if serves_former(config):
        typer.echo("A process serves this site with the former site file, so what was changed does not count yet.")
        typer.echo("Stop it, then run")
        typer.echo(f"next: privet site serve {site}")
    elif is_served(config):
        yet = opinion.waits or opinion.later
        when = "once nothing of this stands against it" if yet else "from the coordinator's next message on"
        typer.echo(f"A process serves this site now: it takes part {when}.")
    else:
        typer.echo(f"next: privet site serve {site}")


@doing("Reading {study}")
def refuse(
    site: SiteFile,
    study: Annotated[
        str, typer.Argument(help="As `privet site approve` takes it: a file, a run, or a digest.", metavar="STUDY")
    ],
    reason: Annotated[str, typer.Option(help="Why. It stays at this site.")],
    by: Approver = None,
    passphrase_file: ApproverPassphrase = None,
) -> None:
    """Record that a person refuses a study, which also ends an earlier approval.

    The coordinator learns that the study was refused, and not why. The site takes part in it only once it is approved.
    Where the site file names approvers, the refusal is signed with the key of the one that --as names, and only the
    same person can take it back.
    """
    from privet.client.policy.consent import record_refusal
    from privet.client.policy.decisions import needs_signature
    from privet.client.site import load_site

    config = load_site(site)
    if config.approvers and by is None:
        raise needs_signature(config)
    asked, _ = named_study(site, config, study, read=False)
    if by is None:
        record_refusal(config, asked, reason, datetime.now(UTC))
    else:
        _decide(config, asked, by, "refuse", reason, None, passphrase_file)
    typer.echo(f"refused  {asked.name} {asked.digest}{'' if by is None else f', by {by}'}")
    typer.echo(f"To take it back: privet site approve {site} {study}{_signing(by)}")


@doing("Making the key of {name}")
def approver(
    site: SiteFile,
    name: Annotated[str, typer.Argument(help="Name of the person: lower-case letters, digits, dashes.")],
    passphrase_file: ApproverPassphrase = None,
) -> None:
    """Make the key of a person who approves studies, and name its public key in the site file.

    The key is encrypted under a passphrase that only this person knows. From then on, an approval counts only if an
    approver signed it: also studies that were approved before need a signature. How many people must approve a study
    says `persons` in the policy.
    """
    from privet.client.editing import change_file
    from privet.client.policy.decisions import make_approver
    from privet.client.site import SiteConfig, load_site
    from privet.common.pki.commands import new_passphrase
    from privet.common.study.reading import validate

    config = load_site(site)
    if name in config.approvers:
        raise StateError(f"this site has an approver {name} already", "choose another name")
    public = make_approver(config, name, new_passphrase(passphrase_file, f"the key of {name}", optional=False))
    change_file(site, {f"approvers.{name}": public}, partial(validate, SiteConfig, what="site file"))
    typer.echo(f"approver  {name} {public}")
    typer.echo("Restart `privet site serve` if it runs: from then on, approvals count only if an approver signed them.")


def _signing(by: str | None) -> str:
    """Return the option that names who signs, for a command."""
    return "" if by is None else f" --as {by}"


def _decide(
    config: SiteConfig,
    study: Study,
    by: str,
    decision: Literal["approve", "refuse"],
    reason: str,
    until: datetime | None,
    passphrase_file: Path | None,
) -> None:
    from privet.client.policy.decisions import decide
    from privet.common.pki.commands import ask_passphrase, read_passphrase

    passphrase = read_passphrase(passphrase_file) or ask_passphrase(f"the key of approver {by}")
    decide(config, study, by, passphrase, decision, reason=reason, until=until, now=datetime.now(UTC))


@doing("Asking the coordinator for its studies")
def studies(site: SiteFile, as_json: Json = False) -> None:
    """List the studies that the coordinator proposes, and say whether this site would take part in each.

    The studies come over the network. This site computes their digests, and compares them with the round log.
    Approve one with `privet site approve SITE RUN`.
    """
    from privet.client.network.proposals import proposed_studies
    from privet.client.site import load_site

    config = load_site(site)
    found = proposed_studies(site, config)
    rows = [_row(config, each) for each in found]
    if as_json:
        typer.echo(json.dumps({"studies": rows}))
        return
    if not rows:
        typer.echo("the coordinator proposes no study now: it has begun no run")
    for row in rows:
        state = f"{row['closed']} of {row['rounds']} rounds closed"
        state += f", {row['round'] - row['closed']} aborted" if row["round"] > row["closed"] else ""
        if row["ended"]:
            state = "ended" if row["round"] == row["rounds"] else f"withdrawn or stopped; {state}"
        log = "in the round log" if row["logged"] else "NOT in the round log yet"
        typer.echo(f"{row['run']}  {str(row['study'])[:19]}  {state}; {log}")
        typer.echo(f"  {row['task']}; {row['privacy']}")
        if row["purpose"]:
            typer.echo(folded(f"  purpose: {printable(str(row['purpose']))}", 4))
        for reason in row["reasons"]:
            typer.echo(folded(f"  {printable(str(reason))}", 4))
        if row["next"]:
            lead = "see what would admit it" if _REFUSES in row["reasons"] else "next"
            typer.echo(f"  {lead}: {str(row['next']).replace('SITE', str(site))}")


def _row(config: SiteConfig, proposed: Proposed) -> dict[str, Any]:
    """Return what is printed about a proposed study, as JSON values."""
    from privet.client.policy.opinion import judged, said
    from privet.client.policy.rules import PERSONAL
    from privet.common.study.terms import purpose_text

    study = proposed.study
    opinion = judged(config, study)
    waits = opinion.waits and len(opinion.findings) == 1 and opinion.budget is None
    reasons = [f"{each.code}: {said(each)}" for each in opinion.findings if waits or each.code not in PERSONAL]
    reasons += [f"E_BUDGET: {opinion.budget.message}"] if opinion.budget is not None else []
    private = f"epsilon {study.privacy.epsilon:g} for each {study.privacy.unit}" if study.private else "NO privacy"
    then = f"privet site approve SITE {proposed.run}" if reasons else ""
    verdict = "this site takes part"
    if reasons:
        verdict = _DECLINED if opinion.refused else "waits for your approval" if waits else _REFUSES
    return {
        "run": proposed.run,
        "name": study.name,
        "study": study.digest,
        "task": study.task.kind,
        "purpose": purpose_text(study),
        "privacy": private,
        "round": proposed.round,
        "rounds": study.rounds,
        "closed": proposed.round if proposed.closed is None else proposed.closed,
        "ended": proposed.ended,
        "logged": proposed.logged,
        "admitted": not reasons,
        "reasons": [] if proposed.ended else [verdict] if waits or not reasons else [verdict, *reasons],
        "next": "" if proposed.ended else then,
    }


def named_study(file: Path, config: SiteConfig, study: str, *, read: bool, ended: bool = True) -> tuple[Study, str]:
    """Return the study that an argument names, and who proposes it.

    Args:
        file: The site file.
        config: Its content.
        study: A study file; or, of a proposed study, its run or the beginning of its digest.
        read: Whether a person confirms what the study asks, or nothing that is kept follows from the name.
        ended: Whether a run that has ended may be named.

    Raises:
        RefusedError: The run has ended.
        PrivetError: As `load_study`, `consulted` and `chosen`.
    """
    from privet.client.network.enrolment import Enrolment
    from privet.client.network.proposals import chosen, proposed_studies
    from privet.common.study.study import load_study

    if study_is_exact(study) and not study.startswith("sha256:"):
        if not Path(study).exists():
            raise StudyError(
                f"there is no study file at {study}",
                f"check the path{most_like(Path(study))}; a site needs no study file: name the study's run, or 8 "
                f"digits or more of its digest, as `privet site studies {file}` lists them",
            )
        return load_study(Path(study)), "a study file; whether the coordinator proposes it was not asked."
    found = chosen(proposed_studies(file, config), study, read=read)
    if found.ended and not ended:
        raise RefusedError(
            f"the run {found.run} has ended, or was withdrawn: no approval is recorded, as one would also count where "
            "the same study is run again",
            f"wait until the coordinator proposes the study again: `privet site studies {file}` lists what it proposes",
        )
    log = "it is in the round log" if found.logged else "it is not in the round log yet"
    consortium = Enrolment(file.parent).terms.consortium
    return found.study, f"the coordinator of {consortium}, as run {found.run}; {log}."


def study_is_exact(study: str) -> bool:
    """Whether an argument names one study whatever the coordinator says: by its file, or by its whole digest."""
    return bool(re.fullmatch("sha256:[0-9a-f]{64}", study)) or study.endswith(".toml") or Path(study).is_file()


def _paragraph(name: str, text: str) -> str:
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    return textwrap.fill(
        printable(text), width, initial_indent=f"{name:<13} ", subsequent_indent=" " * 14, break_on_hyphens=False
    )


@doing("Reading what left {site}")
def receipts(
    site: SiteFile,
    out: Annotated[
        Path | None,
        typer.Option(help="Write this site's signed refusals to this file, for `privet audit verify --receipts FILE`."),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="A bundle or the directory of a published log: check that it has this site's refusals."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List every release from this site's dataset: time, round, study, size and digest. Also list its refusals.

    Exit code 1: with --log, the log lacks a refusal that this site signed; 5: the log is not valid.
    """
    from privet.client.budget.releases import open_ledger
    from privet.client.rounds.refusals import kept_refusals
    from privet.client.site import load_site
    from privet.common.audit.receipts import receipts_file, where_of

    config = load_site(site)
    ledger = open_ledger(config)
    found = ledger.receipts(str(config.dataset))
    refused = [] if config.log is None else kept_refusals(config.log.state)
    if out is not None:
        write_new(out, receipts_file(config.name, [data for _, data in refused]), 0o644)
    gone = [] if log is None else _omitted(config, log)
    if as_json:
        document = {"dataset": config.dataset, "receipts": [vars(receipt) for receipt in found]}
        if refused:
            document["refusals"] = [each.model_dump(mode="json") for each, _ in refused]
        typer.echo(json.dumps(document | ({} if log is None else {"omitted": gone})))
    else:
        for each in found:
            typer.echo(folded(f"{each.time}  round {each.round:>4}  {each.bytes:>10} bytes  {each.payload}", 6))
            typer.echo(f"      of study {each.study}")
        typer.echo(
            f"{number_of(len(found), 'release')}, {sum(each.bytes for each in found)} bytes in total before masking"
        )
        begun = sum(item.rounds for item in ledger.items(str(config.dataset)) if item.charged) - len(found)
        if begun:
            lost = f"{begun} more charged, of which nothing left: the update was lost, or is still being trained"
            typer.echo(folded(lost))
        for refusal, _ in refused:
            typer.echo(folded(f"refused  {where_of(refusal)}", 9))
        for what in gone:
            typer.echo(folded(f"FAILED: the log lacks the refusal of {what}", 9))
    if gone:
        raise typer.Exit(1)


def _omitted(config: SiteConfig, log: Path) -> list[str]:
    """Verify a log under the site's own policy, and return which of the site's refusals it lacks."""
    from privet.client.rounds.logbook import POLICY, read_policy
    from privet.client.rounds.refusals import omitted_refusals
    from privet.common.audit.bundle import history_of, read_archive

    if config.log is None:
        raise StateError(
            f"the site file of {config.name} names no round log",
            "run `privet site setup SITE`, which adds the `[log]` table",
        )
    # What a joined site derived from the keys that its operator confirmed, or the file that an operator wrote.
    derived = config.log.policy if config.trusted is None else config.trusted.with_name(POLICY)
    if derived is None:
        raise StateError("[log]: expected policy and coordinator", "complete the site file, or join a consortium")
    verdict, _ = history_of(read_archive(log), read_policy(derived))
    if not verdict.ok:
        raise VerificationError(f"the log is not valid: {verdict}", "compare it with `privet audit diff FIRST SECOND`")
    return omitted_refusals(config.log.state, verdict.history)


def _map_labels(file: Path, study: Study) -> bool:
    """Ask what the labels of the files mean that a study does not have; return whether the site file was changed."""
    from privet.client.commands.guide import Guide
    from privet.client.commands.labels import settle
    from privet.client.training.examination import labels_of

    return settle(Guide(file, yes=False), study, dict.fromkeys(labels_of(study)))


def _show(findings: Sequence[Finding], budget: PrivetError | None, unfit: PrivetError | None) -> None:
    from privet.client.policy.opinion import said

    for finding in findings:
        typer.echo(folded(f"{finding.code:<18} {printable(said(finding))}", 19))
    if budget is not None:
        code = budget.code if isinstance(budget, SpentRoundError) else "E_BUDGET"
        typer.echo(folded(f"{code:<18} {on_one_line(budget.message)}", 19))
    if unfit is not None:
        typer.echo(folded(f"{'data files':<18} {on_one_line(unfit.message)}", 19))
    refused = findings or budget or unfit
    typer.echo("refused" if refused else "admitted by the policy, within the budget, and the data files fit")


def _ways(
    config: SiteConfig,
    findings: Sequence[Finding],
    errors: Sequence[PrivetError | None],
    site: Path,
    study: str,
    asked: Study,
) -> list[str]:
    """Return what the site's people would change to admit a study, each in one sentence."""
    from privet.client.commands.columns import column_command, columns_said
    from privet.client.policy.agreement import advice
    from privet.client.training.examination import foreign_labels, label_command
    from privet.client.training.glance import lacking_columns

    needed, found = lacking_columns(config, asked)
    first, data = [], any(isinstance(each, DataError) for each in errors)
    if needed:
        # One of them may be the column of patients, and no data file fits before they are named.
        findings = [each for each in findings if each.code != "E_UNIT_COLUMN"]
        errors = [each for each in errors if not isinstance(each, DataError)]
        first = [f"{columns_said(asked, needed, found)} Say which column is which: {column_command(site, needed)}"]
    hints = [each.hint.replace("SITE", str(site)) for each in errors if each is not None and each.hint]
    if data and not needed and (labels := foreign_labels(asked, config)):
        hints.append(f"say what the labels {', '.join(labels)} mean: {label_command(site, labels, asked)}")
    if data:
        hints.append(f"see every fault, and the lines that mend it: `privet data {study} --site {site}`")
    return first + advice(config, findings, str(site), study) + hints
