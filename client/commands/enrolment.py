"""A site's commands about its consortium: joining, its certificate, who else is there, and what is amiss."""

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
from privet.common.pki.certificates import Token, due_for_renewal, fingerprint, root_bytes
from privet.common.pki.enrolment import JoinReply

_HERE = Path()
_POLL_SECONDS = 5.0


def join(
    token: Annotated[str, typer.Argument(help="The token; @FILE reads it from a file, and - from standard input.")],
    directory: Annotated[Path, typer.Argument(help="The site's directory; keys are made in it.")] = _HERE,
    offline: Annotated[Path | None, typer.Option(help="Write the request to this file, and use no network.")] = None,
    reply: Annotated[Path | None, typer.Option(help="Read the coordinator's answer from this file.")] = None,
    wait: Annotated[int, typer.Option(help="Wait so many seconds for the approval.")] = 0,
) -> None:
    """Join a consortium: make this site's keys, ask, and once approved write its papers and a site file.

    Run it again after the approval, with the same token and directory. Keys never leave the site.
    """
    invitation = Token.parse(_read_token(token))
    asked = prepare_request(directory, invitation)
    typer.echo(f"site         {invitation.site}\nroot         {fingerprint(root_bytes(invitation.certificate))}")
    typer.echo(f"fingerprint  {asked.keys.fingerprint}")
    if offline is not None:
        write_new(offline, asked.encode())
        typer.echo(f"request      {offline}: carry it to the coordinator. It holds the token: keep it from others")
        return
    answer = _from_file(reply) if reply is not None else ask(invitation, asked)
    end = time.monotonic() + wait
    while answer.state == "pending" and reply is None and time.monotonic() < end:
        time.sleep(min(_POLL_SECONDS, max(end - time.monotonic(), 0)))
        answer = ask(invitation, asked)
    if answer.state == "pending":
        typer.echo(
            "Waiting for the coordinator. Call its operator: read out the fingerprint, and have the root read to"
        )
        typer.echo("you, which must be the one above. Once the site was approved, run this command again.")
        return
    certificate = accept_membership(directory, answer, now())
    typer.echo(f"member       certificate until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    typer.echo(f"next         complete {directory / 'site.toml'}, then run `privet site doctor` on it")


def renew(
    site: SiteFile, force: Annotated[bool, typer.Option("--force", help="Also while there is time.")] = False
) -> None:
    """Get a new certificate, with a new key, once two thirds of the old one's life are over.

    Where the old one has expired, or the service does not take it any longer, the identity key speaks for the site.
    """
    service = _service(site)
    current = service.enrolment.certificate
    if due_for_renewal(current, now()) or force:
        current = _renewed(service)
        typer.echo(f"renewed: good until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    else:
        typer.echo(f"not due: good until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def _renewed(service: ConsortiumClient) -> Certificate:
    if service.clock() < service.enrolment.certificate.not_valid_after_utc:
        try:
            return service.renew()
        except RefusedError as error:
            typer.echo(f"{error.message}; the identity key asks instead", err=True)
    return service.come_back()


def roster(
    site: SiteFile,
    take: Annotated[bool, typer.Option("--accept", help="Take over the log's policy and the list of members.")] = False,
) -> None:
    """Show the members as the coordinator lists them, and where the site file differs.

    Compare each fingerprint with that site's own operator, by a way that the coordinator cannot change. [peers] in the
    site file is yours to edit: masks are agreed with these keys alone.
    """
    service, pinned = _service(site), load_site(site).peers
    terms = service.roster()
    for member in terms.members:
        same = pinned.get(member.site) == member.identity
        typer.echo(f"{member.site:<16} {'pinned' if same else 'NOT pinned, or with another key'}")
        typer.echo(f'{"":<16} {member.fingerprint}\n{"":<16} {member.site} = "{member.identity}"')
    for name in sorted(set(pinned) - {member.site for member in terms.members}):
        typer.echo(f"{name:<16} pinned, but no member any more")
    if take:
        take_terms(site.parent, terms)
        typer.echo("taken over: consortium/roster.json" + (" and consortium/log.policy" if terms.policy else ""))


def doctor(site: SiteFile, as_json: Json = False) -> None:
    """Look at everything this site needs, and say what to do about what is amiss. Ends with 1 if anything is."""
    checks = examine(site, now)
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
    """Return a token; as an argument of its own, others on the machine could see it in the list of processes."""
    if text == "-":
        return sys.stdin.readline()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{text[1:]} cannot be read ({type(error).__name__})", "check the path") from None


def _from_file(path: Path) -> JoinReply:
    try:
        return JoinReply.decode(path.read_bytes())
    except OSError as error:
        raise ProtocolError(f"{path} cannot be read ({error.strerror})", "check the path") from None
