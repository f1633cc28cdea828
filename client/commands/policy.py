"""A site's commands about its policy and its releases."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import Finding, PrivetError, StateError, VerificationError
from privet.common.files import write_new
from privet.common.options import Json, SiteFile, StudyFile
from privet.common.progress import doing

if TYPE_CHECKING:
    from privet.client.site import SiteConfig
    from privet.common.study.study import Study


def policy(
    site: SiteFile,
    first: Annotated[
        bool, typer.Option("--init", help="Create a restrictive policy file as a starting point, for you to edit.")
    ] = False,
) -> None:
    """Explain this site's policy in words.

    The site file names the policy file. With --init, the command first writes a restrictive policy there.
    """
    from privet.client.policy.consent import policy_digest
    from privet.client.policy.rules import load_policy
    from privet.client.policy.text import EXAMPLE, explain_patients, explain_policy
    from privet.client.site import load_site

    config = load_site(site)
    if config.policy is None:
        raise StateError(
            f"the site file {site} names no policy file, so this site refuses every study",
            "set `policy` in the site file to a path, then run `privet site policy SITE --init`",
        )
    if first:
        write_new(config.policy, EXAMPLE.encode(), 0o644)
        typer.echo(f"written  {config.policy}: read it, and change the rules that your site decides differently")
    rules = load_policy(config.policy)
    typer.echo("\n".join(explain_policy(rules)))
    typer.echo(explain_patients(config))
    typer.echo(
        f"digest  {policy_digest(config)} (of the policy, and of [limit], [floor], patient_column and patient_ids in "
        "the site file)"
    )


@doing("Judging {study} by the policy of {site}")
def check(
    site: SiteFile,
    study: StudyFile,
    as_json: Json = False,
) -> None:
    """Check whether this site would take part in a study, and list every reason against it.

    It opens no data and sends nothing. Exit code 3 if the site would refuse the study.
    """
    from privet.client.policy.rules import base_digest
    from privet.client.site import load_site
    from privet.common.study.study import load_study

    config, asked = load_site(site), load_study(study)
    digest, findings, budget = _judge(config, asked)
    if as_json:
        reasons = [vars(finding) for finding in findings]
        answer = {"study": asked.digest, "policy": digest, "findings": reasons, "budget": budget}
        typer.echo(json.dumps({"admitted": not findings and not budget, **answer}))
    else:
        typer.echo(f"study   {asked.digest}\nbase    {base_digest(asked)}")
        _show(findings, budget)
    if findings or budget:
        raise typer.Exit(3)


@doing("Judging {study} by the policy of {site}")
def approve(site: SiteFile, study: StudyFile) -> None:
    """Record that you have read a study and approve it.

    The approval is for exactly this study: a changed study needs a new one. The policy and the budget still apply.
    """
    from privet.client.policy.consent import record_approval as record
    from privet.client.site import load_site
    from privet.common.study.study import load_study

    config, asked = load_site(site), load_study(study)
    record(config, asked, datetime.now(UTC))
    typer.echo(f"approved  {asked.name} {asked.digest}")
    _, findings, budget = _judge(config, asked)
    if findings or budget:
        typer.echo("but this site would refuse the study now:")
        _show(findings, budget)


@doing("Reading the refusals of {site}")
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
            typer.echo(f"{each.time}  round {each.round:>4}  {each.bytes:>10} bytes  {each.payload}")
            typer.echo(f"{'':<27}of study {each.study}")
        typer.echo(f"{len(found)} releases, {sum(each.bytes for each in found)} bytes in total before masking")
        begun = sum(item.rounds for item in ledger.items(str(config.dataset)) if item.charged) - len(found)
        if begun:
            typer.echo(f"{begun} more charged, of which nothing left: the update was lost, or is still being trained")
        for refusal, _ in refused:
            typer.echo(f"refused  {where_of(refusal)}")
        for what in gone:
            typer.echo(f"FAILED: the log lacks the refusal of {what}")
    if gone:
        raise typer.Exit(1)


def _omitted(config: SiteConfig, log: Path) -> list[str]:
    """Verify a log under the site's own policy, and return which of the site's refusals it lacks."""
    from privet.client.rounds.logbook import POLICY, read_policy
    from privet.client.rounds.refusals import omitted_refusals
    from privet.common.audit.bundle import history_of, read_archive

    if config.log is None:
        raise StateError(
            f"the site file of {config.name} names no round log", "add a `[log]` table to the site file, as for a round"
        )
    # What a joined site derived from the keys that its operator confirmed, or the file that an operator wrote.
    derived = config.log.policy if config.trusted is None else config.trusted.with_name(POLICY)
    if derived is None:
        raise StateError("[log]: expected policy and coordinator", "complete the site file, or join a consortium")
    verdict, _ = history_of(read_archive(log), read_policy(derived))
    if not verdict.ok:
        raise VerificationError(f"the log is not valid: {verdict}", "compare it with `privet audit diff FIRST SECOND`")
    return omitted_refusals(config.log.state, verdict.history)


def _judge(config: SiteConfig, study: Study) -> tuple[str, tuple[Finding, ...], str]:
    """Return the digest of the site's rules, the findings of its policy against a study, and that of its ledger."""
    from privet.client.budget.releases import Releases
    from privet.client.policy.consent import verdict

    releases = Releases(config)
    digest, findings = verdict(config, study, releases.began)
    try:
        releases.check(study)
    except PrivetError as error:
        return digest, findings, error.message
    return digest, findings, ""


def _show(findings: tuple[Finding, ...], budget: str) -> None:
    for finding in findings:
        typer.echo(f"{finding.code:<18} {finding.rule}: asked {finding.asked}, allowed {finding.allowed}")
    if budget:
        typer.echo(f"{'E_BUDGET':<18} {budget}")
    typer.echo("refused" if findings or budget else "admitted by the policy and within the budget")
