"""The coordinator's commands about the members of the consortium."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.clock import now
from privet.common.errors import ProtocolError, RefusedError, StateError, StudyError
from privet.common.files import write_durably, write_new
from privet.common.options import HERE, Directory, Json, Passphrase
from privet.common.pki.addresses import port_lines
from privet.common.pki.commands import ask_passphrase, new_passphrase, read_passphrase
from privet.common.progress import doing, folded, in_directory
from privet.server.consortium.reasons import Reason

if TYPE_CHECKING:
    from privet.common.log.statements import StatedFloor
    from privet.server.consortium.coordinator import Coordinator


def init(
    directory: Annotated[Path, typer.Argument(help="A new directory for the coordinator's keys, members and log.")],
    name: Annotated[str, typer.Option(help="The consortium's name: lower-case letters, digits, dashes.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of the service for members, as sites connect to it.")],
    enrolment: Annotated[
        str | None, typer.Option(help="HOST:PORT at which sites enrol.  [default: the port of --address plus 1]")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option(help="HOST:PORT for studies.  [default: the port of --address plus 2]")
    ] = None,
    colluding: Annotated[
        int, typer.Option(help="Number of sites assumed to collude with the coordinator. More need more cosignatures.")
    ] = 0,
    passphrase_file: Passphrase = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Keep the root's key unencrypted: for demonstrations and tests.")
    ] = False,
) -> None:
    """Create a consortium: its root certificate, its keys, an empty round log and an empty list of members.

    The root's key is encrypted under a passphrase, from --passphrase-file or typed twice. Whoever approves sites or
    starts the service needs it; studies do not.

    Next, start the service, invite sites and approve them. The first `privet coordinator run` founds the consortium: it
    writes the members into the log.
    """
    from privet.common.study.reading import validate
    from privet.server.consortium import coordinator
    from privet.server.consortium.coordinator import Settings

    host, _, port = address.rpartition(":")
    most = 65_535 - (2 if fleet is None else 1 if enrolment is None else 0)
    if not port.isdecimal() or not 0 < int(port) <= most:
        raise StudyError(
            f"--address: expected HOST:PORT with a port from 1 to {most}, found {address!r}",
            f"give a port, as in `privet coordinator init {quote(str(directory))} --name {name} --address "
            f"{host or address}:9443`",
        )
    terms = {"name": name, "origin": f"{_origin(host)}/{name}", "address": address, "colluding": colluding}
    terms |= {"enrolment": enrolment or f"{host}:{int(port) + 1}", "fleet": fleet or f"{host}:{int(port) + 2}"}
    settings = validate(Settings, terms, what="consortium")
    coordinator.require_new(directory)  # before anybody types a passphrase
    coordinator.create(directory, settings, None if no_passphrase else new_passphrase(passphrase_file), now())
    typer.echo(f"consortium      {name}")
    for line in port_lines(settings.address, settings.enrolment, settings.fleet):
        typer.echo(folded(line, 16))
    secret = "" if passphrase_file is None or no_passphrase else f" --passphrase-file {quote(str(passphrase_file))}"
    typer.echo(folded("Open these three ports inbound. Sites connect out to them; nothing connects to a site."))
    typer.echo(folded("Keep a backup of ca/ and keys/ that only you can read: these keys cannot be made again."))
    typer.echo(
        folded(
            f"next: `privet coordinator serve -C {directory}{secret}`, and in another terminal "
            f"`privet coordinator invite SITE... -C {directory}`",
            6,
        )
    )


def _origin(host: str) -> str:
    """Return a host as the name of a round log may hold it: an IPv6 address has no brackets and colons there."""
    return re.sub("[^a-z0-9.-]+", "-", host.lower()).strip("-")


def charter(directory: Directory = HERE, passphrase_file: Passphrase = None, as_json: Json = False) -> None:
    """Print the charter of the consortium, and the twelve words that stand for it.

    Read the words to the operator of each site, over the telephone. The operator types them into `privet site trust`.
    The charter is the root certificate, the keys of the log and of the coordinator's statements, and how many sites may
    collude; a site believes nothing else about them. Of keys with ML-DSA-65, which are long, the digest is printed.
    """
    from privet.common.log.note import NoteKey

    found = _open(directory, passphrase_file).charter
    if as_json:
        typer.echo(json.dumps({**found.model_dump(mode="json"), "words": found.words}))
        return
    typer.echo(f"consortium   {found.consortium}\nroot         {found.root}")
    typer.echo(f"log          {NoteKey.parse(found.log).shown}")
    meant = "sites that may collude with the coordinator without harm to the round log; of sums, a study says it itself"
    typer.echo(f"coordinator  {found.coordinator}")
    typer.echo(folded(f"colluding    {found.colluding}: {meant}", 13))
    typer.echo(folded(f"words        {found.words}", 13))


@doing("Inviting {sites}")
def invite(
    sites: Annotated[list[str], typer.Argument(help="Names of the new sites.", metavar="SITE...")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for one file per token, SITE.token, which only you can read. It may be new."),
    ] = None,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Make an invitation token for each site, with which the site can ask to join once, within 24 hours.

    Send each token to its site's operator over a private channel: anyone who has it can ask to join under this name.
    The token alone makes no member; before you approve a site, have its operator read the words of its keys to you.

    Prints the token of one site, and a line `SITE TOKEN` for each of several. With --out, writes them to files.
    """
    made = _open(directory, passphrase_file)
    if out is not None:
        _make_directory(out)  # before an invitation withdraws an earlier one
    replaced = made.members.invited(sites, now())
    tokens = made.invite_all(sites, now())
    if replaced:
        text = f"Of {', '.join(replaced)}, the earlier token, or a request made with it, is not valid any more."
        typer.echo(folded(text, err=True), err=True)
    if out is not None:
        for name, token in tokens.items():
            file = out / f"{name}.token"
            write_durably(file, f"{token.text}\n".encode(), 0o600)
            typer.echo(f"{name:<16} {file}")
    else:
        for name, token in tokens.items():
            typer.echo(token.text if len(tokens) == 1 else f"{name} {token.text}")
    whose, which = ("the site's operator", sites[0]) if len(tokens) == 1 else ("each site's operator", " ".join(sites))
    text = (
        f"Send each token in private to {whose}: it is valid once, for 24 hours. Then call, and read out the words of "
        f"the charter: {made.charter.words}"
    )
    typer.echo(folded(text, err=True), err=True)
    text = f"next: with the words that {whose} reads to you, `privet coordinator approve {which}`"
    typer.echo(folded(in_directory(text, directory), 6, err=True), err=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise StateError(f"{path} cannot be written to ({error.strerror})", "choose another --out") from None


@doing("Comparing the words of {sites}")
def approve(
    sites: Annotated[list[str], typer.Argument(help="Names of sites that have asked to join.", metavar="SITE...")],
    told: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            "--fingerprint",
            help="The words, or digits, of a site's keys, as its operator reads them to you. For several sites once "
            "each, in their order.  [default: asks for each]",
        ),
    ] = None,
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Make sites members, after comparing the words of their keys.

    A site's operator reads twelve words to you, for example by phone. Type what you hear: this detects an attacker who
    used the token with other keys. A site whose words differ does not hold up the others.
    """
    if told is not None and len(told) != len(sites):
        raise StudyError(
            f"--words: expected it once for each of {len(sites)} sites, found {len(told)}",
            "give it once for each site, in their order, or leave it out and type the words when asked",
        )
    made = _open(directory, passphrase_file)
    if told is None:
        _check_waiting(made, sites)  # before anybody types twelve words
    refused: dict[str, RefusedError] = {}
    for site, heard in zip(sites, map(_ask_words, sites) if told is None else told, strict=True):
        try:
            row = made.approve(site, heard, now())
        except RefusedError as error:
            refused[site] = error
            if len(sites) > 1:
                typer.echo(folded(f"refused  {site}: {error.message}", 9))
            continue
        until = row.certificate.not_valid_after_utc if row.certificate else now()
        typer.echo(f"member   {site}, with a certificate until {until:%Y-%m-%d %H:%M} UTC")
    _write_log(made)
    if not refused:
        typer.echo(in_directory("next: privet coordinator run STUDY, when all sites have joined", directory))
        return
    first = next(iter(refused.values()))
    if len(sites) == 1:
        raise first
    again = f"`privet coordinator approve {' '.join(refused)}` asks for their words once more"
    raise RefusedError(f"{len(refused)} of {len(sites)} sites are not approved: {', '.join(refused)}",
                       f"{again}. {first.hint}")  # fmt: skip


def _check_waiting(made: Coordinator, sites: list[str]) -> None:
    """Raise `RefusedError` for a site that has not asked to join, and `StateError` without a terminal."""
    if not _at_terminal():
        raise StateError(
            "no words are given, and there is no terminal to type them at", "add --words WORDS for each site"
        )
    for site in sites:
        made.members.check_asked(site)


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _ask_words(site: str) -> str:
    return str(typer.prompt(f"Type the words of site {site}, as you hear them"))


def found(
    directory: Directory = HERE,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Largest epsilon that a run may have. Default: no limit.")
    ] = None,
    max_delta: Annotated[
        float | None, typer.Option(help="Largest delta that a run may have. Default: no limit.")
    ] = None,
    min_sites: Annotated[int, typer.Option(help="Smallest number of sites that a study may sum in a round.")] = 1,
    passphrase_file: Passphrase = None,
) -> None:
    """Found the consortium: write its members, and how many must cosign, as the first leaf of the round log.

    Run it once, after approving the first sites. Sites that are approved later are added to the log automatically. All
    sites receive the log's policy from the service.
    """
    from privet.common.log.statements import StatedFloor

    made = _open(directory, passphrase_file)
    write_genesis(made, StatedFloor(max_epsilon=max_epsilon, max_delta=max_delta, min_sites=min_sites))


def write_genesis(made: Coordinator, floor: StatedFloor) -> None:
    """Found the consortium with its members so far, and say so. Raises as `Members.found`."""
    founded = made.members.found(floor, now())
    members = [member.site for statement in founded for member in statement.joining]
    typer.echo(f"members  {', '.join(members)}")
    typer.echo(f"quorum   {founded[-1].quorum} of {len(members)} cosignatures")
    _write_log(made)


def revoke(
    site: Annotated[str, typer.Argument(help="Name of a member.")],
    reason: Annotated[Reason, typer.Option(help="Why the site is revoked. The round log shows it to all sites.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """End a site's membership at once: the service refuses its next call.

    The site's certificates and keys become invalid. A running study drops the site before its next round.
    """
    made = _open(directory, passphrase_file)
    made.members.revoke(site, reason, now())
    typer.echo(f"revoked  {site}: {reason}")
    _write_log(made)


def members(
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """List the sites that asked to join, that are members, and that were revoked."""
    from privet.server.consortium.membership import next_quorum

    made = _open(directory, passphrase_file)
    rows = made.members.rows()
    listed = [
        {
            "site": row.keys.site,
            "state": row.state,
            "since": row.since,
            "reason": row.reason,
            # Not for pending keys: an operator could copy it from here into `approve` without asking the site.
            "fingerprint": None if row.state == "pending" else row.keys.fingerprint,
            "words": None if row.state == "pending" else row.keys.words,
            "certificate_until": int(row.certificate.not_valid_after_utc.timestamp()) if row.certificate else None,
        }
        for row in rows
    ]
    count = sum(row.state == "member" for row in rows)
    quorum = next_quorum(count, made.settings.colluding)
    if as_json:
        typer.echo(json.dumps({"sites": listed, "members": count, "quorum": quorum}))
        return
    for entry in listed:
        since = datetime.fromtimestamp(int(str(entry["since"])), UTC)
        typer.echo(f"{entry['site']:<16} {entry['state']:<8} since {since:%Y-%m-%d %H:%M}  {entry['reason']}")
        if entry["words"] is None:
            typer.echo(f"{'':<16} waits for approval: ask its operator to read out the words")
        else:
            typer.echo(folded(f"{'':<16} {entry['fingerprint']}\n{'':<16} {entry['words']}", 17))
    typer.echo(f"members: {count}; cosignatures that the round log needs: {quorum}")


def sign(
    request: Annotated[
        Path, typer.Argument(help="The file that `privet site join TOKEN --offline REQUEST` wrote at the site.")
    ],
    reply: Annotated[Path, typer.Argument(help="The file to write for the site; it must not exist.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Answer a site's request to join that you received as a file.

    Run it once to take the request, approve the site with `privet coordinator approve`, and run it again to write the
    reply with the certificate. The site reads it with `privet site join TOKEN --reply REPLY`.
    """
    from privet.common.pki.enrolment import JoinRequest

    made = _open(directory, passphrase_file)
    try:
        asked = JoinRequest.decode(request.read_bytes())
    except OSError as error:
        raise ProtocolError(f"{request} cannot be read ({error.strerror})", "check the path") from None
    except ProtocolError:
        raise ProtocolError(
            f"{request} is not a site's request to join",
            "name the file that `privet site join TOKEN --offline REQUEST` wrote, with the same version of privet",
        ) from None
    answer = made.answer(asked, now())
    typer.echo(f"site     {asked.keys.site}\nstate    {answer.state}")
    if answer.state == "pending":
        typer.echo("Ask the site's operator to read out the words of its keys.")
        following = f"next: privet coordinator approve {asked.keys.site} --words WORDS, then run this command again"
        typer.echo(in_directory(following, directory))
        return
    write_new(reply, answer.encode(), 0o644)
    typer.echo(f"written  {reply}")


def _open(directory: Path, passphrase_file: Path | None) -> Coordinator:
    from privet.server.consortium.coordinator import open_coordinator

    return open_coordinator(directory, read_passphrase(passphrase_file), ask_passphrase)


def _write_log(made: Coordinator) -> None:
    """Write due statements to the log. While another process has the log open, they wait in the members' file."""
    from privet.server.consortium.coordinator import log_due

    due, late = log_due(made)
    if late is not None:
        typer.echo(f"log      statements that are written later: {due}; {late.message}")
    elif due:
        typer.echo(f"log      statements written: {due}")
