"""Commands about a run: its privacy statement, and its bundle for an auditor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.errors import StateError, VerificationError
from privet.common.files import write_durably
from privet.common.options import Json, PublicLog, RunPath
from privet.common.progress import doing

if TYPE_CHECKING:
    from privet.server.rounds.state import RunDirectory


@doing("Computing the privacy costs of {run}")
def privacy(run: RunPath, as_json: Json = False) -> None:
    """Print the privacy guarantee of a run: for whom it holds, and what it does not cover.

    RUN is a run directory; the run need not be finished. The command recomputes every number in the statements of the
    rounds. It writes privacy_statement.json and privacy_statement.md into the directory and prints the second one. If a
    number is wrong, it writes nothing and ends with exit code 5. It works on a deployed run, and on a copy of it.
    """
    from privet.common.audit.privacy_statement import privacy_document
    from privet.common.audit.privacy_text import privacy_markdown
    from privet.common.canonical import canonical_json
    from privet.server.rounds.state import RunDirectory

    directory = RunDirectory.open(run)
    statements = directory.load().statements
    for statement in statements:
        if statement is statements[-1] and _awaits_cosignatures(directory, statement):
            typer.echo(
                f"Round {statement['round']} is counted, but not published yet: a quorum has to cosign its end.",
                err=True,
            )
        else:
            _check_published(run, statement)
    document = privacy_document(directory.study, statements, simulated=directory.simulated)
    text = privacy_markdown(document)
    try:
        write_durably(run / "privacy_statement.json", canonical_json(document) + b"\n")
        write_durably(run / "privacy_statement.md", text.encode())
    except OSError as error:
        typer.echo(f"The statement is not written into {run} ({error.strerror}); it is printed here.", err=True)
    typer.echo(json.dumps(document) if as_json else text, nl=as_json)


@doing("Packing {run}")
def bundle(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The file to write, for example run.tar; it must not exist.")],
    with_weights: Annotated[bool, typer.Option(help="Include the adapter's weights, not only their digest.")] = False,
    public: PublicLog = None,
) -> None:
    """Pack a run into one archive for an auditor: log, proofs, study, statements, privacy statement and model card.

    The auditor verifies the archive offline with `privet audit verify`. The log's policy is not in it: the auditor must
    get the policy from the consortium.
    """
    from privet.common.audit.bundle import write_archive
    from privet.server.rounds.archive import bundle_files, own_policy, published_log
    from privet.server.rounds.state import RunDirectory

    directory = RunDirectory.open(run)
    files = bundle_files(directory, public or published_log(run), with_weights=with_weights)
    write_archive(out, files)
    typer.echo(f"{out}: {len(files)} files, {sum(map(len, files.values()))} bytes")
    try:
        policy = quote(str(own_policy(run)))
    except StateError:  # a copy of a run has none beside it
        policy = "log.policy"
    typer.echo(f"next: privet audit verify {quote(str(out))} --policy {policy}")
    typer.echo(f"then: privet audit show {quote(str(out))} --policy {policy}")


def _awaits_cosignatures(run: RunDirectory, statement: Mapping[str, Any]) -> bool:
    """Whether the last round of a deployed run has ended, and its statement is published with the next round."""
    from privet.common.audit.bundle import SOFTWARE

    return not run.simulated and (run.path / SOFTWARE).is_file() and not _file_of(run.path, statement).exists()


def _file_of(run: Path, statement: Mapping[str, Any]) -> Path:
    return run / "rounds" / f"{statement['round']:04d}.json"


def _check_published(run: Path, statement: Mapping[str, Any]) -> None:
    """Check that the published statement of a round is the one in the run's state."""
    from privet.common.canonical import canonical_json

    file = _file_of(run, statement)
    if not file.is_file() or file.read_bytes() != canonical_json(statement) + b"\n":
        raise VerificationError(
            f"{file} is missing, or differs from the statement of this round in the run directory's state",
            "resume the run once: that writes all statements again",
        )
