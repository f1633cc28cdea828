"""What a site reads out to the reader of an audit page: the words of a checkpoint that it cosigned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import SiteFile
from privet.common.progress import closing, doing


@doing("Reading what {site} cosigned")
def head(
    site: SiteFile,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of leaves of the checkpoint.  [default: the newest]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the checkpoint to this file, which the reader can choose in the page.")
    ] = None,
) -> None:
    """Print the words of the head of the round log, as this site cosigned it.

    The reader of an audit page (`privet audit page BUNDLE`) types them into it. They are twelve words for the log's
    name, its number of leaves and its root hash, so they stand for every leaf. Nothing is changed.
    """
    from privet.client.rounds.logbook import WITNESS
    from privet.client.rounds.memory import Memory
    from privet.client.site import load_site
    from privet.common.files import write_new
    from privet.common.log.checkpoint import Checkpoint
    from privet.common.log.note import parse_note
    from privet.common.pki.words import words_of

    config = load_site(site)
    if config.log is None:
        raise StateError(f"{site} has no [log] table", f"complete the set-up: `privet site setup {site}`")
    with Memory(config.log.state / WITNESS).rows() as rows:
        notes = rows.notes()[1:]  # the first is of the empty log
    heads = {Checkpoint.parse(parse_note(note).text): note for note in notes}
    chosen = [head for head in heads if size in (None, head.size)]
    if not chosen:
        what = f"no checkpoint of {size} leaves" if heads else "no checkpoint yet"
        last = ", ".join(str(head.size) for head in list(heads)[-5:])
        hint = f"its last ones have {last} leaves; choose one with --size" if heads else "wait for its first round"
        raise StateError(f"site {config.name} has cosigned {what}", hint)
    checkpoint = chosen[-1]
    if out is not None:
        write_new(out, heads[checkpoint], 0o644)
    typer.echo(f"{checkpoint.origin}, {checkpoint.size} leaves:")
    typer.echo(words_of(checkpoint.text.encode()))
    typer.echo(
        closing(
            f"Site {config.name} cosigned this head.",
            f"read the words out to the reader of an audit page of {checkpoint.size} leaves",
        )
    )
