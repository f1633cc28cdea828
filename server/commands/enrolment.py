"""The coordinator's commands about who belongs to the consortium."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from privet.common.clock import now
from privet.common.errors import ProtocolError, StateError
from privet.common.files import write_new
from privet.common.log.statements import StatedFloor
from privet.common.options import HERE, Directory, Json, Passphrase
from privet.common.pki.certificates import fingerprint, root_bytes
from privet.common.pki.enrolment import JoinRequest
from privet.common.study.reading import validate
from privet.server.consortium import coordinator
from privet.server.consortium.coordinator import Coordinator, Settings, log_members, open_coordinator
from privet.server.consortium.members import Reason
from privet.server.consortium.membership import next_quorum
from privet.server.log.journal import open_journal


def init(
    directory: Annotated[Path, typer.Argument(help="A new directory for the coordinator's keys, members and log.")],
    name: Annotated[str, typer.Option(help="The consortium's name: lower-case letters, digits, dashes.")],
    address: Annotated[str, typer.Option(help="HOST:PORT at which members reach the service, as sites see it.")],
    enrolment: Annotated[
        str | None, typer.Option(help="HOST:PORT at which sites join; default: the next port.")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option(help="HOST:PORT at which sites' nodes connect; default: the port after that.")
    ] = None,
    colluding: Annotated[int, typer.Option(help="Sites that may lie together with the coordinator.")] = 0,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a consortium: its root of trust, its keys, an empty log and an empty list of members.

    Then invite and approve sites, and `privet coordinator found` writes the first of them into the log.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ProtocolError(f"--address: expected HOST:PORT, got {address!r}")
    terms = {"name": name, "origin": f"{host.lower()}/{name}", "address": address, "colluding": colluding}
    terms |= {"enrolment": enrolment or f"{host}:{int(port) + 1}", "fleet": fleet or f"{host}:{int(port) + 2}"}
    settings = validate(Settings, terms, what="consortium")
    root = coordinator.create(directory, settings, read_passphrase(passphrase_file), now())
    typer.echo(f"consortium  {name}\nmembers     {settings.address}\njoining     {settings.enrolment}")
    typer.echo(f"studies     {settings.fleet}")
    typer.echo(f"root        {fingerprint(root_bytes(root))}")
    typer.echo("Keep ca/ and keys/ in a backup that nobody else can read: they cannot be made again.")


def invite(
    site: Annotated[str, typer.Argument(help="The name that the site will have.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Print a token with which a site can join, once and within 24 hours.

    Give it to the site's operator in private: whoever has it can ask to join under this name. Nobody becomes a member
    by it before you have compared fingerprints.
    """
    made = _open(directory, passphrase_file)
    token = made.invite(site, now())
    typer.echo(token.text)
    typer.echo(f"root  {fingerprint(token.root)}", err=True)


def approve(
    site: Annotated[str, typer.Argument(help="A site that has asked to join.")],
    told: Annotated[str, typer.Option("--fingerprint", help="As the site's operator read it to you over the phone.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a site a member: its operator reads the fingerprint of its keys to you, you type what you hear."""
    made = _open(directory, passphrase_file)
    row = made.approve(site, told, now())
    until = row.certificate.not_valid_after_utc if row.certificate else now()
    typer.echo(f"member      {site}\ncertificate until {until:%Y-%m-%d %H:%M} UTC")
    _write_log(made)


def found(
    directory: Directory = HERE,
    max_epsilon: Annotated[float | None, typer.Option(help="No run of the consortium may cost more.")] = None,
    max_delta: Annotated[float | None, typer.Option(help="Nor have a larger delta.")] = None,
    min_sites: Annotated[int, typer.Option(help="Nor sum fewer sites.")] = 1,
    passphrase_file: Passphrase = None,
) -> None:
    """Write the genesis: the log's first leaf, with the members so far and the quorum they make.

    Done once. Sites approved later join the log by themselves, and the sites are given the log's policy.
    """
    made = _open(directory, passphrase_file)
    floor = StatedFloor(max_epsilon=max_epsilon, max_delta=max_delta, min_sites=min_sites)
    genesis = made.members.found(floor, now())
    typer.echo(f"members  {', '.join(member.site for member in genesis.members)}")
    typer.echo(f"quorum   {genesis.quorum} of {len(genesis.members)} cosignatures")
    _write_log(made)


def revoke(
    site: Annotated[str, typer.Argument(help="A member.")],
    reason: Annotated[Reason, typer.Option(help="Stands in the log.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """End a site's membership at once: its certificates and keys count for nothing from the next call on."""
    made = _open(directory, passphrase_file)
    made.members.revoke(site, reason, now())
    typer.echo(f"revoked  {site}: {reason}")
    _write_log(made)


def members(
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """List who has asked to join, who is a member, and who was revoked."""
    made = _open(directory, passphrase_file)
    rows = made.members.rows()
    listed = [
        {
            "site": row.keys.site,
            "state": row.state,
            "since": row.since,
            "reason": row.reason,
            # Of keys that wait, it has to come from the site: what is shown here could be typed back unheard.
            "fingerprint": None if row.state == "pending" else row.keys.fingerprint,
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
        typer.echo(
            f"{'':<16} {entry['fingerprint'] or 'waits for approval: let its operator read the fingerprint out'}"
        )
    typer.echo(f"{count} members; with them the log needs {quorum} cosignatures")


def sign(
    request: Annotated[Path, typer.Argument(help="What `privet site join TOKEN --offline` wrote at the site.")],
    reply: Annotated[Path, typer.Argument(help="Where the answer goes; carry it back to the site.")],
    directory: Directory = HERE,
    passphrase_file: Passphrase = None,
) -> None:
    """Answer a site's request to join that came as a file: the same as over the network.

    Run it once to take the request in, approve the site, and run it again for the certificate.
    """
    made = _open(directory, passphrase_file)
    try:
        asked = JoinRequest.decode(request.read_bytes())
    except OSError as error:
        raise ProtocolError(f"{request} cannot be read ({error.strerror})", "check the path") from None
    answer = made.answer(asked, now())
    typer.echo(f"site     {asked.keys.site}\nstate    {answer.state}")
    if answer.state == "pending":
        typer.echo(
            "Let the site's operator read the fingerprint out, run `privet coordinator approve`, and sign again."
        )
        return
    write_new(reply, answer.encode(), 0o644)
    typer.echo(f"written  {reply}")


def _open(directory: Path, passphrase_file: Path | None) -> Coordinator:
    return open_coordinator(directory, read_passphrase(passphrase_file))


def read_passphrase(file: Path | None) -> bytes | None:
    """Return the passphrase in a file, or None where there is no file. Raises `StateError` where it cannot be read."""
    if file is None:
        return None
    try:
        found = file.read_bytes().strip()
    except OSError as error:
        raise StateError(f"{file} cannot be read ({error.strerror})", "check --passphrase-file") from None
    if not found:
        raise StateError(f"{file} is empty", "write the passphrase into it")
    return found


def _write_log(made: Coordinator) -> None:
    """Write to the log what is due. While another process has the log open, it waits in the members' file."""
    due = len(made.members.statements())
    if not due:
        return
    try:
        with open_journal(made.log_directory, made.keys) as journal:
            typer.echo(f"log         {log_members(made, journal)} statements written")
    except StateError as error:
        typer.echo(f"log         {due} statements wait: {error.message}")
