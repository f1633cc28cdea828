"""The auditor's commands. They need a bundle and a policy, and no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privet.common.audit.bundle import check_bundle, head_of, history_of, leaves_of, read_archive
from privet.common.audit.story import story
from privet.common.audit.verify import prove_leaf
from privet.common.errors import PrivetError, StateError
from privet.common.log.checkpoint import Policy
from privet.common.options import Json

Bundle = Annotated[Path, typer.Argument(help="A bundle, or the directory of a published log.")]
PolicyFile = Annotated[
    Path,
    typer.Option(
        "--policy",
        help="A C2SP policy file: the log and the witnesses that you trust. Get it from the consortium, "
        "not with the bundle.",
    ),
]

_FAILED, _COULD_NOT = 1, 2


def verify(bundle: Bundle, policy: PolicyFile, as_json: Json = False) -> None:
    """Verify a bundle. Exit code 0: every check passed, 1: a check failed, 2: it could not be checked.

    Checks the log first: signatures, quorum, tree, and the author and the order of every statement. Then checks study,
    rounds, privacy statement and release against the log. Names the first leaf or file that is wrong.
    """
    files, trusted = _open(bundle, policy)
    report = check_bundle(files, trusted)
    if as_json:
        verdict = report.verdict
        document = {
            "ok": report.ok,
            "reason": report.reason or verdict.reason,
            "leaf": verdict.leaf,
            "where": report.where,
            "leaves": verdict.size,
            "cosigners": list(verdict.cosigners),
            "checked": list(report.checked),
        }
        typer.echo(json.dumps(document))
    else:
        typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(_FAILED)


def show(bundle: Bundle, policy: PolicyFile) -> None:
    """Show the history of a log: who took part, when, what left each site, and its privacy cost.

    Verifies the log first. Exit code 1: the log is not valid.
    """
    files, trusted = _open(bundle, policy)
    verdict, told = history_of(files, trusted)
    for line in story(told):
        typer.echo(line)
    typer.echo(str(verdict))
    if not verdict.ok:
        raise typer.Exit(_FAILED)


def prove(
    bundle: Bundle,
    policy: PolicyFile,
    leaf: Annotated[int, typer.Option(min=0, help="Number of the leaf, from the first column of `privet audit show`.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the proof (.tlog-proof). Default: standard output.")
    ] = None,
) -> None:
    """Write a proof that one leaf is in the log.

    The proof has the format C2SP tlog-proof, which other tools can check without privet.
    """
    files, trusted = _open(bundle, policy)
    try:
        size = head_of(files, trusted).size
        proof = prove_leaf(lambda: leaves_of(files, size), files["checkpoint"], trusted, leaf).encode()
    except PrivetError as error:
        typer.echo(f"FAILED: {error.message}", err=True)
        raise typer.Exit(_FAILED) from None
    if out is None:
        typer.echo(proof.decode(), nl=False)
    else:
        out.write_bytes(proof)


def diff(first: Bundle, second: Bundle, policy: PolicyFile) -> None:
    """Compare two copies of a log: equal, one longer, or forked into two branches.

    Exit code 1: the log is forked, which proves that the coordinator signed two histories.
    """
    logs = []
    for bundle in (first, second):
        files, trusted = _open(bundle, policy)
        try:
            logs.append(list(leaves_of(files, head_of(files, trusted).size)))
        except PrivetError as error:
            typer.echo(f"FAILED: {bundle}: {error.message}")
            raise typer.Exit(_FAILED) from None
    one, two = logs
    common = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    if common < min(len(one), len(two)):
        typer.echo(f"FORKED: the two logs differ from leaf {common} on; the log signed a checkpoint of each branch")
        raise typer.Exit(_FAILED)
    if len(one) == len(two):
        typer.echo(f"equal: {len(one)} leaves")
    else:
        longer = first if len(one) > len(two) else second
        typer.echo(f"{longer} extends the other log: {abs(len(one) - len(two))} leaves after the first {common}")


def _open(bundle: Path, policy: Path) -> tuple[dict[str, bytes], Policy]:
    """Read bundle and policy. End the command with exit code 2 if one cannot be read."""
    try:
        try:
            trusted = Policy.parse(policy.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise StateError(
                f"{policy} cannot be read ({type(error).__name__})", "name a C2SP policy file with --policy"
            ) from None
        return read_archive(bundle), trusted
    except PrivetError as error:
        typer.echo(f"could not check: {error.message}", err=True)
        raise typer.Exit(_COULD_NOT) from None
