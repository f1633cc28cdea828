"""A site's commands about candidates: test one, sign it, or refuse it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.clock import now
from privet.common.errors import StateError, StudyError
from privet.common.options import Json, SiteFile
from privet.common.progress import Stages, closing, doing, folded

if TYPE_CHECKING:
    from privet.client.network.candidates import Waiting
    from privet.client.network.consortium import ConsortiumClient
    from privet.client.network.proposals import NewestLog
    from privet.client.site import SiteConfig
    from privet.common.log.statements import EgressReview

RunName = Annotated[str, typer.Argument(help="Name of a run with a candidate, as `privet site adapters` lists it.")]


@doing("Testing the candidate of {run} on records of {site}")
def examine(site: SiteFile, run: RunName, as_json: Json = False) -> None:
    """Fetch the candidate of a run, and test it on this site's own records against the gate of its study.

    The figures stay at the site, in `candidates` beside the site file. Nothing is sent. `privet evaluate` on the
    candidate's directory compares its quality with the base.
    """
    config, service, _, found = _opened(site, run)
    from privet.client.network.candidates import FOLDER, fetch_candidate, keep_test
    from privet.client.release.candidate import outcome_of
    from privet.client.release.opened import open_release
    from privet.client.rounds.planted import planting_of
    from privet.client.rounds.site import RealSite

    with Stages(quiet=as_json) as stages:
        path = fetch_candidate(config, site.resolve().parent / FOLDER, found, service.candidate, now(), stages.tell)
        release = open_release(path, testing=True)
        planting = planting_of(config, release.study)
        outcome = outcome_of(release, config, RealSite(config).split_key(), planting, stages.tell)
    keep_test(path, found, outcome)
    if as_json:
        typer.echo(json.dumps({"run": run, "tested": outcome.tested, "failed": outcome.failed, **outcome.figures}))
        return
    for name in outcome.tested:
        said = "fails" if name in outcome.failed else "holds"
        typer.echo(folded(f"{name:<12}{said}: {_figure(name, outcome.figures[name])}", 12))
    if found.gate.terms.canaries is not None and planting is None:
        typer.echo(folded("canary      not tested: this site planted no canaries in the study", 12))
    typer.echo(folded(f"Nothing was sent. The figures lie in {path}, and stay at this site."))
    if outcome.failed:
        said = f"The candidate fails {', '.join(outcome.failed)}."
        typer.echo(closing(said, f"`privet gate refuse {site} {run} --reason REASON`"))
        return
    typer.echo(closing("The candidate meets what this site can test.", f"`privet gate sign {site} {run}`"))


def _figure(name: str, found: dict[str, Any]) -> str:
    if name == "canary":
        return (
            f"epsilon is at least {found['epsilon']:.2f} at 95 % confidence; {found['right']} of {found['guesses']} "
            f"guesses about {found['canaries']} canaries are right"
        )
    if name == "membership":
        area, (low, high) = found["loss"]["auc"], found["loss"]["interval"]
        return f"AUC {area:.3f} (95 %: {low:.3f} to {high:.3f}); upper end of both attacks {found['upper']:.3f}"
    return f"{found['repeated']} of {found['answers']} answers; upper end of the 95 % interval {found['upper']:.3f}"


@doing("Signing the candidate of {run}")
def sign(site: SiteFile, run: RunName) -> None:
    """Sign the candidate of a run for the round log: this site's test holds, and the adapter may leave.

    The statement names which conditions were tested. Of figures it holds the counts of canaries alone, and a commitment
    to the others. It counts for the days of the study's gate.
    """
    from privet.client.network.candidates import FOLDER, signature

    config, service, log, found = _opened(site, run)
    folder = site.resolve().parent / FOLDER / run
    _send(config, service, log, signature(config, folder, found, now()), folder)
    typer.echo(
        closing(
            f"Site {config.name} has signed the candidate of run {run}; the coordinator enters it in the round log.",
            f"when it is released, receive it: `privet site get {site} {run}`",
        )
    )


@doing("Refusing the candidate of {run}")
def refuse(
    site: SiteFile,
    run: RunName,
    reason: Annotated[
        str, typer.Option(help="Why, without a word about a record. All sites can read it in the round log.")
    ],
) -> None:
    """Refuse the candidate of a run, for the round log. A signature of this site is taken back by it.

    If this site's test found a condition broken, the statement names it, and the candidate cannot be accepted.
    """
    from privet.client.network.candidates import FOLDER, refusal

    config, service, log, found = _opened(site, run)
    folder = site.resolve().parent / FOLDER / run
    try:
        review = refusal(config, folder, found, reason, now())
    except ValueError:
        raise StudyError(
            "--reason: expected 1 to 300 printable ASCII characters", "write such a reason in one line"
        ) from None
    _send(config, service, log, review, folder)
    failed = f", naming {', '.join(review.failed)}" if review.failed else ""
    typer.echo(f"Site {config.name} has refused the candidate of run {run}{failed}.")


def _opened(site: Path, run: str) -> tuple[SiteConfig, ConsortiumClient, NewestLog, Waiting]:
    from privet.client.network.candidates import waiting_as
    from privet.client.network.proposals import consulted
    from privet.client.site import load_site

    config = load_site(site)
    service, log = consulted(site, config, now)
    if log is None:
        raise StateError("the round log is empty, so there is no candidate", "wait until a study has ended")
    return config, service, log, waiting_as(log.history, config.name, run, now())


def _send(config: SiteConfig, service: ConsortiumClient, log: NewestLog, review: EgressReview, folder: Path) -> None:
    from privet.client.network.candidates import keep_signed, signed

    leaf = signed(config, log, review)
    keep_signed(folder, review, leaf)
    service.review(leaf)
