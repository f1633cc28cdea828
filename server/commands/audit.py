"""The coordinator's commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from privet.common.canonical import canonical_json
from privet.common.errors import VerificationError
from privet.common.files import write_durably
from privet.common.options import Json, RunPath
from privet.server.rounds.state import RunDirectory


def privacy(run: RunPath, as_json: Json = False) -> None:
    """Say what a run's privacy guarantee is, to whom, and what it does not cover.

    RUN is a run directory, finished or not. Computes every number in the statements of its rounds again, writes
    privacy_statement.json and privacy_statement.md there, and prints the latter. Where a number is not what it
    must be, it writes nothing and ends with exit code 5.
    """
    from privet.common.audit.privacy_statement import privacy_document
    from privet.common.audit.privacy_text import privacy_markdown

    directory = RunDirectory.open(run)
    statements = directory.load().statements
    for statement in statements:
        _check_published(run, statement)
    document = privacy_document(directory.study, statements, simulated=directory.simulated)
    text = privacy_markdown(document)
    write_durably(run / "privacy_statement.json", canonical_json(document) + b"\n")
    write_durably(run / "privacy_statement.md", text.encode())
    typer.echo(json.dumps(document) if as_json else text, nl=as_json)


def bundle(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Where the bundle goes, e.g. run.tar; must not exist.")],
    with_weights: Annotated[bool, typer.Option(help="Include the adapter's weights, not their digest alone.")] = False,
    public: Annotated[
        Path | None, typer.Option(help="Where the log is published; RUN/public if the run has a log of its own.")
    ] = None,
) -> None:
    """Pack a run for an auditor: log, proofs, study, statements, privacy statement and model card in one archive.

    The archive verifies offline with `privet audit verify`, against a policy that the auditor has from elsewhere.
    """
    from privet.common.audit.bundle import write_archive
    from privet.server.rounds.archive import bundle_files

    files = bundle_files(RunDirectory.open(run), public or run / "public", with_weights=with_weights)
    write_archive(out, files)
    typer.echo(f"{out}: {len(files)} files, {sum(map(len, files.values()))} bytes")


def _check_published(run: Path, statement: Mapping[str, Any]) -> None:
    """Check that the statement of a round that readers see is the one that the run's state holds."""
    file = run / "rounds" / f"{statement['round']:04d}.json"
    if not file.is_file() or file.read_bytes() != canonical_json(statement) + b"\n":
        raise VerificationError(
            f"{file} is not the statement that the run recorded",
            "resume the run once: that writes its statements again",
        )
