"""A site's commands about the adapters that its consortium released: list, receive, and try them on its own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.clock import now
from privet.common.errors import StateError
from privet.common.options import Json, SiteFile, require_files
from privet.common.progress import Stages, closing, doing, folded, printable

if TYPE_CHECKING:
    from privet.client.network.adapters import Offered

RunName = Annotated[str, typer.Argument(help="Name of a run of the consortium, as `privet site adapters` lists it.")]


@doing("Asking for the adapters of the consortium")
def adapters(site: SiteFile, as_json: Json = False) -> None:
    """List the adapters that the consortium released, what became of them, and candidates that wait for this site.

    The list follows from the round log, which this site replays. An adapter that this site has received, and that was
    revoked since, is refused by all commands from now on.
    """
    from privet.client.network import candidates
    from privet.client.network.adapters import FOLDER, follow, offered
    from privet.client.network.proposals import consulted
    from privet.client.site import load_site

    config, folder = load_site(site), site.resolve().parent / FOLDER
    _, log = consulted(site, config, now)
    if log is not None:
        follow(log.history, folder)
    rows = [] if log is None else [_row(each, folder) for each in offered(log.history, config.name, folder)]
    found = () if log is None else candidates.waiting(log.history, config.name, now())
    gated = [{"run": each.name, "adapter": each.adapter, "signatures": each.gate.terms.signatures} for each in found]
    lacking = () if log is None else candidates.omitted(log.history, site.resolve().parent / candidates.FOLDER)
    if as_json:
        typer.echo(json.dumps({"adapters": rows, "candidates": gated, "omitted_reviews": lacking}))
        return
    for name in lacking:
        said = (
            f"WARNING: the candidate of run {name} was decided about, and the round log lacks this site's review of it"
        )
        typer.echo(folded(f"{said}; ask the coordinator's operator to explain", 2))
    for each in found:
        typer.echo(f"{each.name}  {each.adapter[7:19]}  candidate: {each.gate.terms.signatures} sites have to sign it")
        typer.echo(f"  next: test it with `privet gate test {site} {each.name}`")
    if not rows and not found:
        typer.echo("the consortium has released no adapter yet")
    for row in rows:
        typer.echo(f"{row['run']}  {row['adapter'][7:19]}  {row['state']}; {row['privacy']}")
        if row["reason"]:
            typer.echo(folded(f"  {printable(row['reason'])}", 4))
        typer.echo(f"  {'with' if row['own'] else 'without'} this site's records; {row['here']}")
    waiting = [row["run"] for row in rows if not row["path"] and row["state"] in ("released", "superseded")]
    if waiting:
        typer.echo(f"next: receive one with `privet site get {site} {waiting[0]}`")


def _row(each: Offered, folder: Path) -> dict[str, Any]:
    privacy, change = each.run.statement.privacy, each.released.change
    path = "" if each.kept is None else str(folder / each.name)
    return {
        "run": each.name,
        "round": each.released.statement.round,
        "study": each.run.statement.study,
        "adapter": each.released.statement.adapter,
        "state": each.released.state,
        "reason": "" if change is None else change.reason,
        "by": None if change is None else change.by,
        "own": each.own,
        "epsilon": None if privacy is None else privacy.epsilon,
        "privacy": "not private" if privacy is None else f"epsilon at most {privacy.epsilon:g}",
        "path": path,
        "here": f"received: {path}" if path else "not received",
    }


@doing("Fetching the adapter of {run}")
def get(site: SiteFile, run: RunName) -> None:
    """Receive the adapter that a run released, after verifying it against the round log.

    It is kept in the directory `adapters` beside the site file, with the proof that a quorum of members has cosigned
    its release. The coordinator is not needed to use it.
    """
    from privet.client.network.adapters import FOLDER, receive
    from privet.client.network.proposals import consulted
    from privet.client.site import load_site

    config = load_site(site)
    service, log = consulted(site, config, now)
    if log is None:
        raise StateError("the round log is empty, so there is no release", "wait until a study has ended")
    with Stages() as stages:
        path = receive(config, site.resolve().parent / FOLDER, run, log, service, now(), stages.tell)
    typer.echo(
        closing(
            f"The adapter of run {run} is verified, and lies in {path}.",
            f"compare it with its base on records of yours that were not trained on: `privet site evaluate {site} {run}"
            f"{'' if config.test else ' --data FILE'}`",
        )
    )


@doing("Evaluating the adapter of {run} on records of {site}")
def evaluate(
    site: SiteFile,
    run: RunName,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File of records. Give the option once for each file. Default: `test` of the site file."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Column of the files to group results by. Give the option once for each column."),
    ] = None,
    smallest: Annotated[
        int, typer.Option(min=1, help="Least number of units (patients, documents) of a group that is shown.")
    ] = 10,
    answers: Annotated[int, typer.Option(min=0, help="For answers: most records to answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides resampling, and which records are drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for evaluation.json and evaluation.html. It is created.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a received adapter with its base on this site's own records, with intervals. Nothing leaves the site.

    The files are read as the site file says. `privet evaluate` on the adapter's directory has more options.
    """
    from privet.client.budget.withdrawals import withdrawn_of
    from privet.client.commands.evaluate import show_evaluation
    from privet.client.network.adapters import FOLDER, adapter_at
    from privet.client.release.opened import open_release
    from privet.client.site import load_site

    config = load_site(site)
    files = tuple(data or config.test)
    if not files:
        raise StateError(
            f"the site file {site} names no test files",
            f"name a file of records: `privet site evaluate {site} {run} --data FILE`",
        )
    require_files(files, "--data" if data else "test in the site file")
    release = open_release(adapter_at(site.resolve().parent / FOLDER, run))
    from privet.client.release.asking import Asked  # PyTorch, which takes seconds
    from privet.client.release.material import PLAINLY, UNNAMED

    asked = Asked(
        files=tuple((UNNAMED, path) for path in files),
        by=tuple(dict.fromkeys(by or ())),
        seed=seed,
        smallest=smallest,
        answers=answers,
        openings=answers,
        forms=config.format or PLAINLY,
        withdrawn=withdrawn_of(config),
        own=config.train,
    )
    show_evaluation(release, asked, config.resources, out, as_json=as_json)


@doing("Training the adapter of {run} further, for {site} alone")
def personalise(site: SiteFile, run: RunName, as_json: Json = False) -> None:
    """Train a received adapter further on this site's own records, for this site alone.

    It is compared with the shared one, and with what lies between, on a fifth of the units, which training does not
    see. The shared one is kept where no other is clearly better. Nothing leaves the site, so no budget is charged. A
    copy that leaves would be a release without noise.
    """
    from privet.client.network.adapters import FOLDER, adapter_at
    from privet.client.release.opened import open_release
    from privet.client.site import load_site

    config = load_site(site)
    release = open_release(adapter_at(site.resolve().parent / FOLDER, run))
    from privet.client.release.personal import document, keep_personal, personalise_release

    with Stages(quiet=as_json) as stages:
        found = personalise_release(release, config, stages.tell)
    better = found.chosen.share > 0
    path = keep_personal(release, config.name, found) if better else None
    if as_json:
        typer.echo(json.dumps({**document(release, config.name, found), "path": None if path is None else str(path)}))
        return
    for name, each in (("shared", found.shared), ("trained", found.trained), ("chosen", found.chosen)):
        mixture = "" if each.share in (0, 1) else f", {each.share:.0%} of the training mixed in"
        typer.echo(f"{name:<9}loss {each.loss:.4f}, {each.correct:.1%} right on {found.units[1]} units{mixture}")
    if path is None:
        typer.echo(closing("No adapter is clearly better here than the shared one.", f"go on with run {run}'s adapter"))
        return
    typer.echo(
        closing(
            f"This site's own adapter lies in {path}. It must not leave the site.",
            f"compare it with its base on held-out records: `privet evaluate {path} --data FILE --format {site}`",
        )
    )
