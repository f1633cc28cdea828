"""A site's commands about its consortium: join, renew, roster and doctor."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from privet.common.clock import now
from privet.common.errors import ProtocolError, RefusedError, StateError, VerificationError
from privet.common.files import write_new
from privet.common.options import Json, SiteFile
from privet.common.progress import doing, folded, on_one_line

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from privet.client.checks import Check
    from privet.client.network.consortium import ConsortiumClient
    from privet.client.network.enrolment import Enrolment
    from privet.common.pki.enrolment import JoinReply, JoinRequest, Terms
    from privet.common.pki.token import Token

_HERE = Path()
_POLL_SECONDS, _TELL_SECONDS = 5.0, 60.0
_INTERRUPTED = 130


@doing("Asking the consortium for membership")
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
    wait: Annotated[
        int | None,
        typer.Option(
            help="Number of seconds to wait for the approval; 0: do not wait.  [default: as long as it takes]", min=0
        ),
    ] = None,
) -> None:
    """Join a consortium: make this site's keys, send its request, and wait for the approval.

    Read the twelve words to the coordinator's operator over the telephone. After the approval, the command writes the
    certificate, the roster and a site file. Ctrl-C is safe: run the command again, with the same token and directory,
    and it continues. Private keys never leave the site.
    """
    from privet.client.network.consortium import request_membership as ask
    from privet.client.network.enrolment import Enrolment, accept_membership, prepare_request
    from privet.common.pki.addresses import port_lines
    from privet.common.pki.token import Token

    invitation = Token.parse(_read_token(token, f"privet site join @{token} {directory}"))
    asked = prepare_request(directory, invitation)
    typer.echo(folded(f"site         {invitation.site}\nwords        {asked.keys.words}", 13))
    typer.echo(folded(f"fingerprint  {asked.keys.fingerprint}", 13))
    if offline is not None:
        write_new(offline, asked.encode())
        typer.echo(f"request      {offline}: take it to the coordinator. It contains the token: keep it secret")
        return
    answer = _from_file(reply) if reply is not None else ask(invitation, asked)
    if answer.state == "pending":
        typer.echo("The coordinator has not approved this site yet.")
        typer.echo("Call its operator and read out the words above.")
    if answer.state == "pending" and reply is None and wait != 0:
        answer = _approved(invitation, asked, wait)
    if answer.state == "pending":
        typer.echo("Run this command again after that.")
        return
    certificate = accept_membership(directory, answer, now())
    typer.echo(f"member       certificate valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    terms = Enrolment(directory).terms
    typer.echo("This site connects out to three ports of the coordinator:")
    for line in port_lines(terms.address, terms.enrolment, terms.fleet):
        typer.echo(folded(f"  {line}", 18))
    typer.echo(f"next: privet site setup {directory}")


def _approved(invitation: Token, asked: JoinRequest, wait: int | None) -> JoinReply:
    """Ask until the site is a member, or `wait` seconds are over; return the last reply. Raises as `ask`."""
    from privet.client.network.consortium import request_membership as ask
    from privet.common.pki.enrolment import JoinReply

    since, began, told = now(), time.monotonic(), time.monotonic()
    end = math.inf if wait is None else began + wait
    typer.echo("Waiting for the approval. Ctrl-C is safe: the same command goes on later.")
    answer = JoinReply(state="pending", fingerprint=asked.keys.fingerprint)
    try:
        while answer.state == "pending" and time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, max(end - time.monotonic(), 0)))
            try:
                answer = ask(invitation, asked)
            except ProtocolError as error:
                typer.echo(f"{error.message}; trying again", err=True)
            if time.monotonic() - told >= _TELL_SECONDS:
                told = time.monotonic()
                typer.echo(f"still waiting, since {since:%Y-%m-%d %H:%M} UTC ({(told - began) / 60:.0f} min)")
    except KeyboardInterrupt:
        typer.echo("\nStopped waiting. The request stays with the coordinator: run the same command again to go on.")
        raise typer.Exit(_INTERRUPTED) from None
    return answer


@doing("Asking for a new certificate of {site}")
def renew(
    site: SiteFile,
    force: Annotated[
        bool, typer.Option("--force", help="Renew the certificate even if less than two thirds of its life are over.")
    ] = False,
    keys: Annotated[
        bool, typer.Option("--keys", help="Instead, give a site that signs with Ed25519 alone an ML-DSA-65 key.")
    ] = False,
) -> None:
    """Renew this site's certificate, with a new key, if two thirds of its life are over.

    If the certificate has expired, or the service no longer accepts it, the request is signed with the identity key.
    `privet site serve` renews the certificate by itself while it runs.

    With --keys, a site that joined with an earlier version gets an ML-DSA-65 key beside its keys, and stays a member.
    Read the words to the coordinator's operator, who approves them. Run the command again: it takes the key into use
    once the round log states it. Then read the words to the other sites' operators, who confirm them.
    """
    from privet.common.pki.certificates import due_for_renewal

    service = _service(site)
    if keys:
        _gain_second_key(site, service)
        return
    current = _usable(service.enrolment)
    if current is None or due_for_renewal(current, now()) or force:
        current = _renewed(service, current)
        typer.echo(f"renewed: valid until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    else:
        typer.echo(f"not due: valid until {current.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def _gain_second_key(site: Path, service: ConsortiumClient) -> None:
    from privet.client.second_key import gain_second_key, has_second_key
    from privet.common.log.note import NoteKey

    if has_second_key(site):
        typer.echo("This site has an ML-DSA-65 key already, and signs with it. There is nothing to do.")
        return
    own, used = gain_second_key(site, service)
    typer.echo(folded(f"words        {own.words}", 13))
    if not used:
        typer.echo("The round log does not state the new key yet.")
        typer.echo(folded("Call the coordinator's operator and read out the words: "
                          f"`privet coordinator approve {own.site} --words WORDS`."))  # fmt: skip
        typer.echo("Run this command again after that.")
        return
    typer.echo("in use       statements and cosignatures are signed with Ed25519 and with ML-DSA-65 from here on")
    others = [each.site for each in service.enrolment.terms.members if not NoteKey.parse(each.witness).pq]
    if others:
        typer.echo(
            folded(
                f"still        with Ed25519 alone: {', '.join(others)}. Until they have renewed theirs, this site "
                "takes part only with classical_signatures = true under [floor] of its file",
                13,
            )
        )
    typer.echo("next: restart `privet site serve`, and read the words to each other site's operator: each types them")
    typer.echo(f"into `privet site trust {site} {own.site}`, and takes part in no round before")


def _usable(enrolment: Enrolment) -> Certificate | None:
    """Return the site's certificate; None if it is missing, or is for another key."""
    try:
        return enrolment.certificate
    except (StateError, VerificationError, ProtocolError) as error:
        typer.echo(f"{error.message}; asking for another one", err=True)
        return None


def _renewed(service: ConsortiumClient, current: Certificate | None) -> Certificate:
    if current is not None and service.clock() < current.not_valid_after_utc:
        try:
            return service.renew()
        except (RefusedError, VerificationError) as error:
            typer.echo(f"{error.message}; asking again with the identity key", err=True)
    return service.come_back()


@doing("Asking for the members of the consortium")
def roster(site: SiteFile) -> None:
    """List the members that the coordinator names, and say whom this site trusts.

    Read your own words to the other sites' operators, and have them read theirs to you, over a channel that the
    coordinator does not control, such as the telephone. Then confirm each with `privet site trust SITE NAME`.
    """
    from privet.client.network.enrolment import Enrolment
    from privet.client.trust import read_trusted
    from privet.common.pki.charter import Charter

    trusted = read_trusted(_trusted_file(site))
    terms = newest_terms(site.parent)
    confirmed = trusted.charter is not None and trusted.charter == Charter.claimed(terms, Enrolment(site.parent).root)
    said = "confirmed" if confirmed else f"NOT confirmed: `privet site trust {site}`"
    typer.echo(f"{terms.consortium:<16} {said} (the consortium)")
    own = Enrolment(site.parent).asked.keys.site
    for member in terms.members:
        # No words of those who are not confirmed: an operator could copy them from here instead of calling.
        if trusted.keys.get(member.site) == member:
            typer.echo(
                f"{member.site:<16} {'this site' if member.site == own else 'confirmed'}\n{'':<16} {member.words}"
            )
        else:
            typer.echo(f"{member.site:<16} NOT confirmed: `privet site trust {site} {member.site}`")
    for name in sorted(set(trusted.keys) - {member.site for member in terms.members}):
        typer.echo(f"{name:<16} confirmed, but the coordinator does not name it as a member")


@doing("Reading the list of members")
def trust(
    site: SiteFile,
    name: Annotated[str | None, typer.Argument(help="A member. Without it, the charter of the consortium.")] = None,
    words: Annotated[
        str | None,
        typer.Option(help="The words that the other side's operator read out. Default: you are asked for them."),
    ] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Trust the member no longer.")] = False,
) -> None:
    """Confirm the consortium, or a member, by twelve words that its operator reads out over the telephone.

    The operator of the coordinator finds the words with `privet coordinator charter`, that of a member with `privet
    site roster`. Type what you hear. A site takes part in rounds as soon as the consortium and all members are
    confirmed: from these keys alone follow whose statements, cosignatures and masks it accepts.

    If the coordinator has rotated its keys, the command says what changes, and checks with the coordinator's service
    that the round log leads from the confirmed keys to the new ones. Until then the site takes part in nothing.
    """
    from privet.client.network.enrolment import Enrolment, confirm, member_of
    from privet.client.network.rotation import confirm_charter, is_rotation
    from privet.client.trust import changing, read_trusted, write_trusted
    from privet.common.pki.charter import Charter

    file = _trusted_file(site)
    if withdraw:
        if name is None:
            raise ProtocolError(
                "--withdraw: expected the name of a member", "add the name: `privet site trust SITE NAME`"
            )
        if name == Enrolment(site.parent).asked.keys.site:
            hint = (
                "withdraw another member; a site that leaves is revoked: "
                f"`privet coordinator revoke {name} --reason left`"
            )
            raise ProtocolError(f"--withdraw: {name} is this site itself", hint)
        with changing(file):
            write_trusted(file, read_trusted(file).without(name))
        typer.echo(f"{name} is not trusted any longer")
        return
    terms = newest_terms(site.parent)
    if name is not None:
        member_of(terms, name)  # before anybody types twelve words
    rotates = name is None and is_rotation(read_trusted(file), Charter.claimed(terms, Enrolment(site.parent).root))
    if rotates:
        typer.echo("rotation     the coordinator names new keys for the consortium that this site has confirmed")
        typer.echo("changes      the key of the log, and the key of the coordinator's statements")
        typer.echo("stays        name, root certificate and tolerated collusion; members; what this site has cosigned")
    asked = f"the words of site {name}" if name is not None else f"the words of the charter of {terms.consortium}"
    told = _typed(asked) if words is None else words
    trusted = confirm_charter(site, _service(site), told) if name is None else confirm(site.parent, name, told)
    typer.echo(f"confirmed    {name or terms.consortium}")
    if rotates:
        typer.echo(f"followed     the new keys count from leaf {trusted.epochs[-1].since} of the round log on")
    missing = [member.site for member in terms.members if trusted.keys.get(member.site) != member]
    if trusted.charter is None:
        typer.echo(f"next         the consortium: `privet site trust {site}`")
    elif missing:
        typer.echo(f"next         {', '.join(missing)}: `privet site trust {site} {missing[0]}`")
    else:
        typer.echo(f"all members  confirmed; next: `privet site setup {site}`")


def _typed(asked: str) -> str:
    """Return the words that a person types."""
    try:
        return str(typer.prompt(f"Type {asked}, as you hear them"))
    except click.Abort:
        raise StateError(
            f"nobody typed {asked}: nothing was confirmed",
            "run the command at a terminal, or add --words 'TWELVE WORDS'",
        ) from None


def migrate(site: SiteFile) -> None:
    """Change the file of a site that joined with an earlier version, so that it trusts confirmed keys alone.

    [peers] and the log's policy, which the coordinator had filled in, go; `trusted` comes. The old file is kept beside
    the new one. Then confirm the consortium and each member with `privet site trust`.
    """
    from privet.client.network.enrolment import migrate_site

    kept = migrate_site(site)
    typer.echo(f"changed      {site}; the old file is {kept}")
    typer.echo(
        f"next         have the coordinator's operator read out the charter, then run `privet site trust {site}`"
    )


def newest_terms(directory: Path) -> Terms:
    """Return the newest list of members that the coordinator states; the stored one where it cannot be reached."""
    from privet.client.network.consortium import ConsortiumClient
    from privet.client.network.enrolment import Enrolment, keep_terms

    try:
        terms = ConsortiumClient(Enrolment(directory), now).roster()
    except (ProtocolError, VerificationError) as error:
        typer.echo(f"{error.message}; this is the list that the coordinator gave before", err=True)
        return Enrolment(directory).terms
    keep_terms(directory, terms)
    return terms


def _trusted_file(site: Path) -> Path:
    from privet.client.network.opening import check_migrated
    from privet.client.site import load_site

    check_migrated(site)
    trusted = load_site(site).trusted
    if trusted is None:
        raise StateError(f"{site} names no file `trusted`", "join a consortium with `privet site join TOKEN`")
    return trusted


@doing("Examining {site}")
def doctor(
    site: SiteFile,
    study: Annotated[
        Path | None,
        typer.Option(help="A study file. Its model is opened, and probed: does this device keep records apart?"),
    ] = None,
    network: Annotated[
        bool,
        typer.Option(
            "--network",
            help="Check only the way to the coordinator's three ports: DNS, proxy, firewall, TLS. Before "
            "the site has joined, give the invitation token as @FILE in place of SITE.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check everything that this site needs, and say how to correct each fault.

    Exit code 1 if a check fails. Nothing is changed.
    """
    from privet.client.commands.doctor import examine

    checks = _network(site) if network else examine(site, now, study)
    well = all(check.ok for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": well, "checks": [vars(check) for check in checks]}))
    else:
        show_checks(checks)
    if not well:
        raise typer.Exit(1)


def show_checks(checks: Sequence[Check]) -> None:
    """Print checks, each that fails with what mends it."""
    width = max(12, *(len(check.name) for check in checks))
    for check in checks:
        found = "FAIL" if not check.ok else "ok  " if check.made else "-   "
        line = f"{found}  {check.name:<{width}} {on_one_line(check.text)}"
        typer.echo(folded(line, width + 7))
        if not check.ok and check.hint:
            typer.echo(folded(f"{'':<{width + 7}}{on_one_line(check.hint)}", width + 7))


def _network(site: Path) -> tuple[Check, ...]:
    """Return the checks of the way to each port; of the one in the token where the site has not joined."""
    from privet.client.network.consortium import ConsortiumClient
    from privet.client.network.enrolment import Enrolment
    from privet.client.network.reach import reach
    from privet.client.site import load_site
    from privet.common.pki.token import Token

    if str(site).startswith("@") or (site.is_file() and not site.suffix):
        token = Token.parse(_read_token(str(site), f"privet site doctor @{site} --network"))
        return tuple(reach({"enrolment": token.address}, token.certificate, None))
    enrolment = Enrolment(site.parent)
    terms, coordinator = enrolment.terms, load_site(site).coordinator
    addresses = {"address": terms.address, "enrolment": terms.enrolment}
    addresses["fleet"] = terms.fleet if coordinator is None else coordinator.address
    return tuple(reach(addresses, enrolment.root, ConsortiumClient(enrolment, now)))


def _service(site: Path) -> ConsortiumClient:
    from privet.client.network.consortium import ConsortiumClient
    from privet.client.network.enrolment import Enrolment

    return ConsortiumClient(Enrolment(site.parent), now)


def _read_token(text: str, command: str) -> str:
    """Return a token. As a plain argument, other users of the machine could read it in the list of processes.

    `command` is what reads it from a file of this name.
    """
    if text == "-":
        return sys.stdin.readline()
    if not text.startswith("@"):
        if os.path.isfile(text):  # noqa: PTH113 - a token is too long for a path, which `Path.is_file` raises
            raise ProtocolError(
                f"expected a token, found the name of the file {text}",
                f"put an @ before the name of the file that holds the token: `{command}`",
            )
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the token file {text[1:]} cannot be read ({type(error).__name__})", "check the path after the @"
        ) from None


def _from_file(path: Path) -> JoinReply:
    from privet.common.pki.enrolment import JoinReply

    try:
        return JoinReply.decode(path.read_bytes())
    except OSError as error:
        raise ProtocolError(f"the reply file {path} cannot be read ({error.strerror})", "check the path") from None
