"""`privet site setup`: a guide from membership to a site that can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from privet.common.clock import now
from privet.common.errors import PrivetError
from privet.common.options import SiteFile, require_files
from privet.common.progress import doing, folded, printable


@doing("Setting up {site}")
def setup(
    site: SiteFile,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: take the defaults, and the options for what has none.")
    ] = False,
    charter: Annotated[
        str | None, typer.Option(help="The twelve words of the consortium, as the coordinator's operator read them.")
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(help="A member and the twelve words that its operator read out. May be repeated.", metavar="N=W"),
    ] = None,
    train: Annotated[list[Path] | None, typer.Option(help="A file of training data. May be repeated.")] = None,
    test: Annotated[list[Path] | None, typer.Option(help="A file of test data. May be repeated.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of the files, and the study's column that it is, such as Befund=note. May be repeated.",
            metavar="FILE=STUDY",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A label of the files, and the study's label that it means, such as J=yes. May be repeated.",
            metavar="FILE=STUDY",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="A study file or a proposed study, with whose columns and labels those of the files are compared. "
            "Without it: the studies that the coordinator proposes now."
        ),
    ] = None,
    unit: Annotated[
        Literal["patient", "record"] | None, typer.Option(help="Whom the limit protects: each patient or each record.")
    ] = None,
    patient_column: Annotated[str | None, typer.Option(help="The column that identifies patients.")] = None,
    patient_ids: Annotated[
        Literal["number", "text", "case"] | None, typer.Option(help="How the ids in this column are written.")
    ] = None,
    declared_count: Annotated[
        int | None, typer.Option(help="The number of units that the site declares; it is public.", min=1)
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Largest epsilon of all studies together.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the limit.")] = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            help="File on another disk that keeps the ledger's last head, or a directory for it. A name that ends with "
            "a slash, or has no suffix, is that of a directory.",
            metavar="PATH",
        ),
    ] = None,
    anchor_same_disk: Annotated[
        bool, typer.Option("--anchor-same-disk", help="Accept an anchor on the ledger's disk.")
    ] = False,
    shared_noise: Annotated[
        bool, typer.Option("--shared-noise", help="Let a first policy admit studies whose noise the sites share.")
    ] = False,
    validation: Annotated[
        bool | None,
        typer.Option(
            "--validation/--no-validation",
            help="Whether a first policy admits noisy sums of loss and accuracy on held-out units.",
            show_default="asks; with --yes, admits them",
        ),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="What the site trains on.")] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="The directory of a base model that studies name. May be repeated.", metavar="NAME=PATH"),
    ] = None,
) -> None:
    """Guide a site that has joined to where it can serve. Run it as often as you like: it goes on where it is.

    It asks for the words of the consortium and of each member, the data files, who a patient is, the limit, a place for
    the ledger's anchor, and which columns and labels of the files a study names otherwise; it creates ledger and
    witness, and a first policy. Each answer is written to the site file at once; comments and all other lines stay. An
    option answers a question in advance, and changes an earlier answer.
    It ends with the checks of `privet site doctor`.
    """
    require_files(train or (), "--train")
    require_files(test or (), "--test")
    if patient_column is not None and not column:
        _check_column(site, train or [], patient_column)
    from privet.client.commands import guide as steps
    from privet.client.commands.columns import ask_columns, take_columns
    from privet.client.commands.doctor import examine
    from privet.client.commands.enrolment import show_checks
    from privet.client.commands.labels import ask_labels
    from privet.client.network.lock import is_served, serves_former
    from privet.client.setup import other_owner, restore

    guide = steps.Guide(site, yes)
    if owner := other_owner(site.parent):
        typer.echo(
            f"WARNING: {site.parent} belongs to the user {owner}, and what this command makes will belong to another. "
            f"Run it as {owner}, or give {owner} all files before `privet site serve` runs.",
            err=True,
        )
    for line in restore(site):
        typer.echo(line)
    steps.ask_machine(guide, device, base or [])
    steps.ask_trust(guide, charter, steps.pairs_of("--member", member or []))
    steps.ask_data(guide, train, test)
    columns = steps.pairs_of("--column", column or [])
    take_columns(guide, columns)
    steps.ask_patients(guide, unit, columns.get(patient_column or "", patient_column), patient_ids)
    steps.ask_count(guide, declared_count)
    steps.ask_limit(guide, unit, epsilon, delta)
    steps.ask_anchor(guide, anchor, anchor_same_disk)
    steps.ask_books(guide)
    steps.ask_policy(guide, shared_noise, validation)
    apart = ask_columns(guide, study)
    ask_labels(guide, steps.pairs_of("--label", label or []), study)
    typer.echo()
    checks = examine(site, now)
    # What waits for this site is no fault of its set-up.
    waiting = next((check for check in checks if check.name == "studies" and not check.ok), None)
    checks = tuple(check for check in checks if check is not waiting)
    show_checks(checks)
    failing = [check for check in checks if not check.ok and check.name != "process"]
    if failing:
        typer.echo(f"\nnot complete: {', '.join(check.name for check in failing)}. Mend it as said above, then run")
        typer.echo(f"next: privet site setup {site}")
        raise typer.Exit(1)
    typer.echo("\nThe site is set up. It takes part in the studies that you approve.")
    if waiting is not None:
        typer.echo(folded(f"Proposed: {printable(waiting.text)}. Then: {waiting.hint}.", 2))
    if apart:
        named, needs = ("study", "needs") if len(apart) == 1 else ("the studies", "need")
        typer.echo(f"First map the columns that {named} {', '.join(apart)} {needs}, with the command above.")
    if serves_former(guide.site):
        typer.echo("A process serves this site with the former site file. Stop it, then run")
        typer.echo(f"next: privet site serve {site}")
        return
    typer.echo(f"next: privet site studies {site}")
    typer.echo(f"then: privet site approve {site} STUDY")
    if not is_served(guide.site):
        typer.echo(f"then: privet site serve {site}")


def _check_column(site: Path, train: list[Path], column: str) -> None:
    """Refuse a column of patients that a file lacks, before all other steps. A file that reads otherwise is left alone.

    Raises:
        StudyError: A training file has no such column.
    """
    from privet.client.site import load_site
    from privet.client.training.glance import check_column
    from privet.client.training.proposals import proposed

    try:
        config = load_site(site)
    except PrivetError:  # the set-up mends it, or says what is wrong
        return
    for path in train or config.train:
        if path.is_file() and not proposed(path, (), config.form_of(path.resolve())):
            mend = "nothing was changed: run the same command with the right --patient-column"
            check_column(config, path.resolve(), column, mend)
