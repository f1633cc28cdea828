"""The commands that scan data files for identifiers and faults of texts before a study trains on them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import PolicyError
from privet.common.files import write_durably
from privet.common.options import Json, SiteFile
from privet.common.progress import doing, number_of, printable

if TYPE_CHECKING:
    from privet.client.scan.scanning import Places, Scan, Source

_Names = Annotated[
    list[Path] | None,
    typer.Option(help="File of names to look for, one a line. Give the option once for each file."),
]
_Recognisers = Annotated[
    list[str] | None,
    typer.Option(help="Name of an installed recogniser of further identifiers, such as names."),
]
_Page = Annotated[Path | None, typer.Option("--html", help="Also write a page to this file.")]
_Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Print counts of few records too, and the first rows of each kind. Only for who mends the files.",
    ),
]


@doing("Scanning {files}")
def scan_files(
    files: Annotated[list[Path], typer.Argument(help="Data files: CSV, TSV, JSON or Parquet.", metavar="FILES")],
    study: Annotated[
        Path | None, typer.Option(help="A study file (TOML): scan only the columns that it trains on.")
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(help="Test file, to find training texts in it. Give it once for each file.")
    ] = None,
    names: _Names = None,
    recogniser: _Recognisers = None,
    page: _Page = None,
    exact: _Exact = False,
    as_json: Json = False,
) -> None:
    """Count direct identifiers, near-duplicates and other faults in the texts of data files.

    It prints counts by column and kind, and never contents. Counts below 10 are not shown without --exact. A site scans
    the files of its site file with `privet site scan SITE`.
    """
    from privet.client.scan.scanning import Source, load_recognisers
    from privet.common.study.study import load_study

    contract = None if study is None else load_study(study)
    source = Source(
        tuple(files),
        tuple(test or ()),
        study=contract,
        unit=None if contract is None else contract.data.unit,
        names=_named(names),
        recognisers=load_recognisers(recogniser or ()),
    )
    found, places = _scanned(source, as_json)
    _print(found, places, [], page, exact, as_json)


@doing("Scanning the data files of {site}")
def scan_site(
    site: SiteFile,
    study: Annotated[
        str | None,
        typer.Option(
            help="A study file; or, of a proposed study, its run or 8 digits or more of its digest: scan only the "
            "columns that it trains on, and compare labels.",
            metavar="STUDY",
        ),
    ] = None,
    names: _Names = None,
    recogniser: _Recognisers = None,
    page: _Page = None,
    exact: _Exact = False,
    as_json: Json = False,
) -> None:
    """Scan this site's data files for direct identifiers and faults of texts, and keep the result.

    It prints counts by column and kind, and never contents. Counts below 10 are not shown without --exact. The result
    is kept beside the file of approvals, with the digests of the files. Where the policy has `[scan]`, the site trains
    only on files with such a scan, within its limits. Exit code 3 if a limit is exceeded.
    """
    from privet.client.budget.withdrawals import withdrawn_of
    from privet.client.commands.policy import named_study
    from privet.client.policy.rules import load_policy
    from privet.client.policy.scanned import broken, record_path, save
    from privet.client.scan.scanning import Source, load_recognisers, text_columns
    from privet.client.site import load_site

    config = load_site(site)
    rules = None if config.policy is None or not config.policy.exists() else load_policy(config.policy).scan
    contract = None if study is None else named_study(site, config, study, read=True)[0]
    source = Source(
        config.train,
        config.test,
        form_of=config.form_of,
        study=contract,
        unit=config.patient_column if contract is None else contract.data.unit,
        names=_named(names),
        recognisers=load_recognisers(recogniser or ()),
        withdrawn=withdrawn_of(config),
    )
    found, places = _scanned(source, as_json)
    path = record_path(config)
    if path is not None:
        save(path, found)
    columns = None if contract is None else text_columns(contract)
    faults = [] if rules is None else [str(each) for each in broken(found, rules.max_rate, columns)]
    _print(found, places, faults, page, exact, as_json)
    if not as_json:
        kept = "not kept: the site file names no file for approvals" if path is None else f"kept in {path}"
        typer.echo(
            kept if rules is not None or path is None else f"{kept}; the policy has no [scan], so it decides nothing"
        )
        if not faults and rules is not None:
            typer.echo(f"next: privet site approve {site} STUDY")
    if faults:
        raise typer.Exit(PolicyError.exit_code)


def _named(files: list[Path] | None) -> frozenset[str]:
    from privet.client.scan.scanning import read_names

    return frozenset(name for path in files or () for name in read_names(path))


def _scanned(source: Source, as_json: bool) -> tuple[Scan, Places]:
    from privet.client.scan.scanning import scan

    def progress(rows: int) -> None:
        if not as_json and not rows % 20_000:
            typer.echo(f"{number_of(rows, 'record')} scanned", err=True)

    return scan(source, datetime.now(UTC).isoformat(timespec="seconds"), progress)


def _print(found: Scan, places: Places, faults: list[str], page: Path | None, exact: bool, as_json: bool) -> None:
    from privet.client.scan.page import json_of, lines_of, page_of

    if page is not None:
        write_durably(page, page_of(found, faults).encode(), 0o600)
    if as_json:
        typer.echo(json.dumps(json_of(found, places, faults, exact=exact)))
        return
    typer.echo("\n".join(map(printable, lines_of(found, places, faults, exact=exact))))
    if page is not None:
        typer.echo(f"written  {page}")
