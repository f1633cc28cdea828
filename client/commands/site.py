"""Commands about bases, data files, and a site's identity key and ledger."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import RefusedError, StateError, StudyError
from privet.common.jsonlog import log_as_json
from privet.common.options import BaseDirectory, Json, SiteFile, StudyFile
from privet.common.progress import doing, folded, number_of

if TYPE_CHECKING:
    from privet.client.budget.accounts import Spending
    from privet.client.site import SiteConfig


def identity(
    file: Annotated[Path, typer.Argument(help="New file for the private key, e.g. identity.pem. It must not exist.")],
) -> None:
    """Make this site's identity key, and print its public key.

    The private key never leaves the site. Give the public key to the operators of the other sites, over a channel that
    the coordinator does not control. Every site lists it under [peers] in its site file, this site included.
    """
    from privet.common.pki.keyfile import make_key, public_key

    key = make_key(file)
    typer.echo(public_key(key))


def init(
    site: SiteFile,
    ledger_key: Annotated[
        bool,
        typer.Option("--ledger-key", help="Only make another key for the ledger, in place of one that was lost."),
    ] = False,
    anchor: Annotated[
        bool, typer.Option("--anchor", help="Only start the anchor of a ledger that was created without one.")
    ] = False,
) -> None:
    """Create the site's privacy ledger and its witness of the round log. Run it once; no command resets them.

    The ledger does not know what was spent before it was created. Start with a dataset that has no earlier releases.
    The anchor keeps the ledger's last head on another disk. If the key of the ledger is lost, --ledger-key makes
    another; the updates that have not arrived are lost with it.
    """
    from privet.client.budget.releases import ANCHOR_LINE
    from privet.client.setup import check_anchor, create_books, start_anchor
    from privet.client.site import load_site

    config = load_site(site)
    if config.ledger is None or config.dataset is None:
        raise StudyError(
            f"the site file {site} names no {'ledger' if config.ledger is None else 'dataset'}, which a privacy "
            "ledger needs",
            "put the lines back with `privet site setup SITE`, or set `dataset` and `ledger` in the site file",
        )
    if ledger_key:
        _replace_key(config)
        return
    if config.anchor is None:
        raise StudyError(
            f"the site file {site} names no anchor, which reveals an old copy of the ledger",
            f"name one with `privet site setup SITE --anchor PATH`, or add a line such as {ANCHOR_LINE} to the site "
            "file; the path is on another disk than the ledger",
        )
    if check_anchor(config, config.anchor) and not config.anchor_same_disk:
        raise StudyError(
            f"the anchor {config.anchor} is on the file system of the ledger, so that one backup may restore both",
            "set `anchor` in the site file to a path on another disk, or accept this with the line "
            "anchor_same_disk = true",
        )
    if anchor:
        typer.echo(f"anchor   {config.anchor}, from row {start_anchor(config, config.anchor)} of the ledger on")
        return
    made = create_books(config)
    if not made:
        raise StateError(
            f"ledger {config.ledger}, its anchor and the witness exist already",
            "keep them: they are created once and never replaced. For another dataset, set another path in `ledger` in "
            f"the site file; `privet site doctor {site}` checks them",
        )
    typer.echo("\n".join(made))
    if config.log is None:
        typer.echo("witness  none: without [log], the site takes part in no study")


def _replace_key(config: SiteConfig) -> None:
    from privet.client.budget.releases import open_ledger

    ledger = open_ledger(config)
    try:
        lost = ledger.replace_key()
    finally:
        ledger.close()
    typer.echo(f"new key of the ledger; {lost} stored updates cannot be read any more, and their rounds are sat out")


@doing("Reading the ledger of {site}")
def budget(
    site: SiteFile,
    study: Annotated[
        Path | None, typer.Option(help="A study file (TOML): also print what the study would cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the site's dataset has spent, by study, and its limit.

    The epsilons of studies do not add up to the total: mechanisms are composed, and then converted to one epsilon.
    Where sites shared noise, there are two totals: against the coordinator with corrupt sites, and against everybody.
    Several studies count more against the limit, because a later one may depend on the results of an earlier one.
    """
    from privet.client.budget.ledger import cost_of
    from privet.client.budget.releases import cost_of_study, limit_of, open_ledger
    from privet.client.site import load_site
    from privet.common.study.study import load_study

    config = load_site(site)
    limit = limit_of(config)
    if limit is None:
        raise StudyError(
            f"the site file {site} sets no limit for the epsilon of its dataset",
            "set unit, epsilon and delta under [limit] in the site file",
        )
    ledger = open_ledger(config)
    found = ledger.statement(str(config.dataset), limit)
    document = found.document() | {"after": None, "after_counted": None}
    planned = None if study is None else load_study(study)
    if planned is not None:
        costs = cost_of_study(planned, config)
        if not costs:
            raise RefusedError(
                f"the study {study} is not private, but the site file limits the epsilon of dataset {config.dataset}",
                "make the study private: a dataset with a limit admits only private studies",
            )
        after, counted, needed = cost_of(ledger, found.dataset, limit, costs)
        document |= {"after": after, "after_counted": counted}
    if as_json:
        typer.echo(json.dumps(document))
        return
    lines = [f"dataset  {found.dataset}"]
    lines.append(
        f"limit    epsilon {limit.epsilon:g} at delta {limit.delta:g} for each {limit.unit}, for the dataset's lifetime"
    )
    lines += _totals(found)
    for entry in found.studies:
        reserved = f", {entry.reserved} more reserved" if entry.reserved else ""
        lines.append(
            f"         epsilon {entry.epsilon:.4f}  {number_of(entry.charged, 'round')}{reserved}  study {entry.study}"
        )
    if found.committed > limit.epsilon:
        lines.append("counted  more than the limit: no further study that costs epsilon is admitted")
    elif len(found.studies) > 1:
        lines.append(
            f"counted  epsilon {_shown(found.counted)} of the limit, reserved rounds included. This is what the limit "
            "compares. It may be more than what is spent, because a study may depend on the results of an earlier one"
        )
    if planned is not None:
        verdict = "within the limit" if counted <= limit.epsilon else "REFUSED: beyond the limit; "
        if counted > limit.epsilon:
            verdict += "no limit admits it" if needed is None else f"the least limit that admits it is {needed:g}"
        more = f", counted as {_shown(counted)}" if after < counted <= limit.epsilon else ""
        lines.append(f"after    epsilon {_shown(after)} with study {planned.digest}{more}: {verdict}")
    lines.append(f"head     {found.head[0]} {found.head[1]}")
    typer.echo(folded("\n".join(lines), 9))


def _totals(found: Spending) -> list[str]:
    """Return the lines about what a dataset has spent: one total, or two where sites shared noise."""
    total = f"epsilon {_shown(found.epsilon)}{{}}; reserved rounds included, {_shown(found.committed)}"
    if not found.shared:
        return ["spent    " + total.format("")]
    allowed = "the corrupt sites that each study allows for"
    if found.corrupt is not None:
        allowed = f"up to {found.corrupt} corrupt site{'' if found.corrupt == 1 else 's'}"
    return [
        "spent    " + total.format(f" against the coordinator with {allowed}"),
        f"         epsilon {_shown(found.everybody)} against everybody, by this site's own noise alone; reserved "
        f"rounds included, {_shown(found.everybody_committed)}",
    ]


def _shown(epsilon: float) -> str:
    return f"{epsilon:.4f}" if math.isfinite(epsilon) else "infinite"


def serve(site: SiteFile) -> None:
    """Take part in the coordinator's studies until stopped.

    The site opens all connections, to the one address in the site file, and accepts none. It takes part only in studies
    that its policy admits. Stop it with SIGTERM or Ctrl-C. After a restart, also after a crash, it continues.
    """
    log_as_json()  # the first line too, which comes before the imports that take seconds
    logging.getLogger("privet").info("opening %s", site)
    from privet.client.network.lock import check_unserved
    from privet.client.site import load_site

    check_unserved(load_site(site))
    from privet.client.network.serve import serve_site  # PyTorch, which takes seconds

    _note_faults(site)
    serve_site(site)


def _note_faults(site: Path) -> None:
    """Log what keeps a site that has joined from taking part. It serves all the same: each fault may be mended now."""
    from privet.client.commands.doctor import LOCAL, examine
    from privet.client.site import JOINED
    from privet.common.clock import now

    if not (site.parent / JOINED).exists():
        return
    for check in examine(site, now, only=LOCAL):
        if not check.ok:
            logging.getLogger("privet").warning(
                "this site is not complete: %s: %s; %s", check.name, check.text, check.hint
            )


@doing("Making the first adapter of {study}")
def adapter(
    study: StudyFile,
    directory: Annotated[Path, typer.Argument(help="New directory for the adapter. It must not exist.")],
    base: BaseDirectory = None,
) -> None:
    """Make the adapter that a study starts from.

    It follows from the base and the study's seed, so it is the same on every machine. The coordinator holds no base
    model: give it this directory with `privet coordinator run --adapter DIRECTORY`.
    """
    from privet.client.site import Resources
    from privet.client.training.model import initial_adapter, open_host, peft_config_text
    from privet.common.files import make_directory, require_free
    from privet.common.study.study import check_shareable, load_study

    chosen = load_study(study)
    check_shareable(chosen)
    require_free(directory, f"name a new directory: `privet adapter {study} DIRECTORY`")
    known = {} if base is None else {chosen.model.base: base.resolve()}
    host = open_host(chosen, Resources(device="cpu", bases=known), begun=True)
    made = initial_adapter(chosen, host)
    make_directory(directory)
    (directory / "adapter_model.safetensors").write_bytes(made.data)
    (directory / "adapter_config.json").write_text(peft_config_text(host, chosen), encoding="utf-8")
    typer.echo(f"{made.digest}")


@doing("Checking data files against {study}")
def data(
    study: Annotated[
        str,
        typer.Argument(
            help="The study file (TOML); with --site also the run of a proposed study, or 8 digits or more of its "
            "digest.",
            metavar="STUDY",
        ),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The site's data files: CSV, TSV, JSON or Parquet. Default: those that --site or the study's "
            "simulated sites name."
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(help="The site file: it says how files are written, and who a patient is.", metavar="SITE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a site's data files against what a study requires: columns, types, labels, and spellings of ids.

    It prints counts, and never contents: for each file, and for all files of the site together. It names the rows of
    every problem in every file, warns of records that are in training and test files, and proposes lines for the site
    file: `[format]`, for files that are written otherwise, and `declared_count`. Where the base model is on this
    machine, it prints how long records are in tokens, and how many `data.max_length` cuts.
    """
    from privet.client.commands.data import report_data

    report_data(study, files or (), site, as_json=as_json)
