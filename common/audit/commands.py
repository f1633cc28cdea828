"""The auditor's commands. They need a bundle and a policy, and no network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.errors import LOG_ALONE, PrivetError
from privet.common.files import write_new
from privet.common.options import Json
from privet.common.progress import closing, doing

if TYPE_CHECKING:
    from privet.common.audit.bundle import Report
    from privet.common.audit.receipts import ReceiptReport
    from privet.common.log.checkpoint import Checkpoint, Policy

Bundle = Annotated[Path, typer.Argument(help="A bundle, or the directory of a published log.")]
PolicyFile = Annotated[
    Path,
    typer.Option(
        "--policy",
        help="A C2SP policy file: the log and the witnesses that you trust. Get it from the consortium, "
        "not with the bundle.",
    ),
]

_FAILED, _LOG_ALONE = 1, LOG_ALONE
_NAME_BUNDLE = "name a file that `privet audit bundle RUN --out FILE` wrote, or the directory of a published log"


@doing("Verifying {bundle}")
def verify(
    bundle: Bundle,
    policy: PolicyFile,
    receipts: Annotated[
        Path | None,
        typer.Option(help="A site's receipts, from `privet site receipts SITE --out FILE`: were its refusals logged?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle. Exit code 0: verified, 1: failed, 2: could not be checked, 7: a valid log and nothing else.

    Checks the log first: signatures, quorum, tree, the author and the order of every statement, and the privacy costs.
    Then checks study, rounds, privacy statement and release against the log. Names the first leaf or file that is
    wrong. With --json, also says of every field of every statement how it is checked, or that it is its author's word.
    """
    from privet.common.audit.bundle import check_bundle
    from privet.common.audit.fields import authors_word

    files, trusted = _open(bundle, policy)
    report = check_bundle(files, trusted)
    told = _receipts(receipts, report) if receipts is not None and report.holds else None
    if told is not None and told.omitted:
        reason = f"site {told.site} has signed a refusal that the log lacks, although it went on: "
        report = replace(report, reason=reason + ", ".join(told.omitted), where="receipts")
    if as_json:
        typer.echo(json.dumps(_document(report, told)))
    else:
        typer.echo(str(report))
        if told is not None and report.holds:
            typer.echo(f"checked: {told.logged} refusals of site {told.site} are in the log")
            for what in told.later:
                typer.echo(f"not checked: the refusal of {what}, as the log has not come to it")
        if report.holds:
            words = sum(map(len, authors_word().values()))
            typer.echo(
                f"author's word: {words} kinds of entries state what no log can prove, such as the time on a site's "
                "clock. It proves only who stated them; --json lists them"
            )
    if not report.holds:
        raise typer.Exit(_FAILED)
    if report.alone:
        raise typer.Exit(_LOG_ALONE)


def _document(report: Report, receipts: ReceiptReport | None) -> dict[str, Any]:
    from privet.common.audit.fields import authors_word, table

    verdict = report.verdict
    return {
        "ok": report.ok,
        "verdict": "failed" if not report.holds else "log-alone" if report.alone else "verified",
        "reason": report.reason or verdict.reason,
        "leaf": verdict.leaf,
        "where": report.where,
        "leaves": verdict.size,
        "cosigners": list(verdict.cosigners),
        "ed25519_alone": list(verdict.classical),
        "checked": list(report.checked),
        "unchecked": list(report.unchecked),
        "accounts": [_finite(asdict(cost)) for cost in report.costs],
        "together": _finite(dict(report.together)),
        "receipts": None if receipts is None else asdict(receipts),
        "fields": table(),
        "authors_word": authors_word(),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with null for what is infinite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _receipts(path: Path, report: Report) -> ReceiptReport:
    """Compare a file of receipts with a log. Raises `UncheckedError` if it cannot be read or trusted."""
    from privet.common.audit.receipts import check_receipts

    try:
        return check_receipts(path.read_bytes(), report.verdict.history)
    except (OSError, PrivetError) as error:
        hint = "name a file that `privet site receipts SITE --out FILE` wrote"
        raise _could_not(path, error, hint) from None


@doing("Verifying {bundle}")
def show(bundle: Bundle, policy: PolicyFile) -> None:
    """Show the history of a log: who took part, when, what left each site, and its privacy cost.

    Verifies the log first. Exit code 1: the log is not valid.
    """
    from privet.common.audit.bundle import history_of
    from privet.common.audit.story import story

    files, trusted = _open(bundle, policy)
    verdict, told = history_of(files, trusted)
    for line in story(told):
        typer.echo(line)
    typer.echo(str(verdict))
    if not verdict.ok:
        raise typer.Exit(_FAILED)


@doing("Verifying {bundle}")
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
    from privet.common.audit.bundle import head_of, leaves_of
    from privet.common.audit.verify import prove_leaf

    files, trusted = _open(bundle, policy)
    try:
        size = head_of(files, trusted.log).size
        proof = prove_leaf(lambda: leaves_of(files, size), files["checkpoint"], trusted, leaf).encode()
    except PrivetError as error:
        typer.echo(f"FAILED: {error.message}", err=True)
        raise typer.Exit(_FAILED) from None
    if out is None:
        typer.echo(proof.decode(), nl=False)
    else:
        out.write_bytes(proof)


@doing("Comparing {first} with {second}")
def diff(first: Bundle, second: Bundle, policy: PolicyFile) -> None:
    """Compare two copies of a log: equal, one longer, or forked into two branches.

    Exit code 1: the log is forked, which proves that the coordinator signed two histories. If the log's keys were
    rotated between the two copies, give the policy of the later one.
    """
    from privet.common.audit.bundle import leaves_of

    logs = []
    copies = [_open(bundle, policy) for bundle in (first, second)]
    for bundle, (files, trusted), (others, _) in zip((first, second), copies, copies[::-1], strict=True):
        try:
            logs.append(list(leaves_of(files, _head(files, others, trusted).size)))
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


@doing("Writing the page of {bundle}")
def page(
    bundle: Bundle,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file to write; it must not exist.  [default: the bundle's name with .html]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML file that verifies a bundle in a browser, offline, and shows rounds, lineage and members.

    The page checks hashes, Ed25519 signatures and the order of statements, and names the first leaf that is wrong. It
    says what it does not check: `privet audit verify` does that. It needs no policy: its reader compares words with a
    site, or chooses a policy file in it. Weights are left out. The same bundle gives the same file.
    """
    from privet.common.audit.bundle import read_archive
    from privet.common.audit.page import page as page_of
    from privet.common.canonical import digest

    name = bundle.resolve().name
    try:
        data = page_of(read_archive(bundle), name)
    except PrivetError as error:
        raise _could_not(bundle, error, _NAME_BUNDLE) from None
    target = out or Path(f"{name.removesuffix('.tar')}.html")
    write_new(target, data, 0o644)
    result = f"{target}: {len(data)} bytes, SHA-256 {digest(data)[7:]}."
    result += ' It says "Not yet verified" until its reader has compared the log with a site.'
    typer.echo(closing(result, f"open {target} in a browser, and type the words that a site reads out"))


def _head(files: dict[str, bytes], others: dict[str, bytes], policy: Policy) -> Checkpoint:
    """Return the checkpoint of a copy. It may be from before a rotation that another copy, if it verifies, states."""
    from privet.common.audit.bundle import head_of, history_of
    from privet.common.log.checkpoint import OtherKeyError

    try:
        return head_of(files, policy.log)
    except OtherKeyError:
        verdict, _ = history_of(others, policy)
        if not verdict.ok:
            raise
        return head_of(files, lambda size: verdict.history.epoch_at(size).log)


def _open(bundle: Path, policy: Path) -> tuple[dict[str, bytes], Policy]:
    """Read bundle and policy. Raises `UncheckedError` if one cannot be read."""
    from privet.common.audit.bundle import read_archive
    from privet.common.log.checkpoint import Policy

    try:
        trusted = Policy.parse(policy.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PrivetError) as error:
        hint = "name the log's policy (a C2SP policy file) with --policy: a site keeps one in consortium/log.policy"
        raise _could_not(policy, error, hint) from None
    try:
        return read_archive(bundle), trusted
    except PrivetError as error:
        raise _could_not(bundle, error, _NAME_BUNDLE) from None


class UncheckedError(PrivetError):
    """A log, a policy or receipts cannot be read or trusted, so nothing was checked."""

    exit_code = 2


def _could_not(path: Path, error: Exception, hint: str) -> UncheckedError:
    found = error.message if isinstance(error, PrivetError) else f"it cannot be read ({type(error).__name__})"
    what = "" if str(path) in found else f"{path}: "
    return UncheckedError(f"could not check: {what}{found}", (isinstance(error, PrivetError) and error.hint) or hint)
