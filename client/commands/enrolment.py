"""A site's commands about its consortium: join, renew, roster and doctor."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from cryptography.x509 import Certificate

from privet.client.commands.doctor import examine
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.consortium import request_membership as ask
from privet.client.network.enrolment import Enrolment, accept_membership, prepare_request, take_terms
from privet.client.site import load_site
from privet.common.clock import now
from privet.common.errors import ProtocolError, RefusedError
from privet.common.files import write_new
from privet.common.options import Json, SiteFile
from privet.common.pki.certificates import due_for_renewal, fingerprint, root_bytes
from privet.common.pki.enrolment import JoinReply
from privet.common.pki.token import Token

_HERE = Path()
_POLL_SECONDS = 5.0


def join(
    token: Annotated[
        str, typer.Argument(help="The invitation token. @FILE reads it from a file, - from standard input.")
    ],
    directory: Annotated[
        Path, typer.Argument(help="The site's directory. The command makes the site's keys there.")
    ] = _HERE,
    offline: Annotated[
        Path | None,
        typer.Option(help="Write the request to this file for the coordinator's operator, and do not use the network."),
    ] = None,
    reply: Annotated[
        Path | None,
        typer.Option(help="Read the coordinator's reply from this file (`privet coordinator sign` writes it)."),
    ] = None,
    wait: Annotated[int, typer.Option(help="Number of seconds to wait for the approval. 0: do not wait.")] = 0,
) -> None:
    """Join a consortium: make this site's keys and send its request.

    Run the command again after the approval, with the same token and directory. It then writes the certificate, the
    roster and a site file. Private keys never leave the site.
    """
    invitation = Token.parse(_read_token(token))
    asked = prepare_request(directory, invitation)
    typer.echo(f"site         {invitation.site}\nroot         {fingerprint(root_bytes(invitation.certificate))}")
    typer.echo(f"fingerprint  {asked.keys.fingerprint}")
    if offline is not None:
        write_new(offline, asked.encode())
        typer.echo(f"request      {offline}: take it to the coordinator. It contains the token: keep it secret")
        return
    answer = _from_file(reply) if reply is not None else ask(invitation, asked)
    end = time.monotonic() + wait
    while answer.state == "pending" and reply is None and time.monotonic() < end:
        time.sleep(min(_POLL_SECONDS, max(end - time.monotonic(), 0)))
        answer = ask(invitation, asked)
    if answer.state == "pending":
        typer.echo(
            "The coordinator has not approved this site yet. Call its operator and read out the fingerprint above."
        )
        typer.echo(
            "Compare the root above with the one that the operator reads out. Run this command again after that."
        )
        return
    certificate = accept_membership(directory, answer, now())
    typer.echo(f"member       certificate valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    typer.echo(
        f"next         complete {directory / 'site.toml'}, then run `privet site doctor {directory / 'site.toml'}`"
    )


def renew(
    site: SiteFile,
    force: Annotated[
        bool, typer.Option("--force", help="Renew the certificate even if less than two thirds of its life are over.")
    ] = False,
) -> None:
    """Renew this site's certificate, with a new key, if two thirds of its life are over.

    If the certificate has expired, or the service no longer accepts it, the request is signed with the identity key.
    `privet site serve` renews the certificate by itself while it runs.
    """
    service = _service(site)
    current = service.enrolment.certificate
    if due_for_renewal(current, now()) or force:
        current = _renewed(service)
        typer.echo(f"renewed: valid until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    else:
        typer.echo(f"not due: valid until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def _renewed(service: ConsortiumClient) -> Certificate:
    if service.clock() < service.enrolment.certificate.not_valid_after_utc:
        try:
            return service.renew()
        except RefusedError as error:
            typer.echo(f"{error.message}; asking again with the identity key", err=True)
    return service.come_back()


def roster(
    site: SiteFile,
    take: Annotated[
        bool, typer.Option("--accept", help="Accept and store the list of members and the log's policy.")
    ] = False,
) -> None:
    """List the members that the coordinator names, and compare them with [peers] in the site file.

    Compare each fingerprint with the operator of that site, over a channel that the coordinator does not control, such
    as the telephone. Then edit [peers] yourself. Only the keys in [peers] are used to derive masks.
    """
    service, pinned = _service(site), load_site(site).peers
    terms = service.roster()
    for member in terms.members:
        same = pinned.get(member.site) == member.identity
        typer.echo(f"{member.site:<16} {'pinned' if same else 'NOT pinned, or pinned with another key'}")
        typer.echo(f'{"":<16} {member.fingerprint}\n{"":<16} {member.site} = "{member.identity}"')
    for name in sorted(set(pinned) - {member.site for member in terms.members}):
        typer.echo(f"{name:<16} pinned, but no longer a member")
    if take:
        take_terms(site.parent, terms)
        typer.echo("accepted: consortium/roster.json" + (" and consortium/log.policy" if terms.policy else ""))


def doctor(
    site: SiteFile,
    study: Annotated[
        Path | None,
        typer.Option(help="A study file. Its model is opened, and probed: does this device keep records apart?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check everything that this site needs, and say how to correct each fault.

    Exit code 1 if a check fails. Nothing is changed.
    """
    checks = examine(site, now, study)
    well = all(check.ok for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": well, "checks": [vars(check) for check in checks]}))
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12} {check.text}")
            if not check.ok and check.hint:
                typer.echo(f"{'':<19}{check.hint}")
    if not well:
        raise typer.Exit(1)


def _service(site: Path) -> ConsortiumClient:
    return ConsortiumClient(Enrolment(site.parent), now)


def _read_token(text: str) -> str:
    """Return a token. As a plain argument, other users of the machine could read it in the list of processes."""
    if text == "-":
        return sys.stdin.readline()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the token file {text[1:]} cannot be read ({type(error).__name__})", "check the path after the @"
        ) from None


def _from_file(path: Path) -> JoinReply:
    try:
        return JoinReply.decode(path.read_bytes())
    except OSError as error:
        raise ProtocolError(f"the reply file {path} cannot be read ({error.strerror})", "check the path") from None
