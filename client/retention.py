"""What a site keeps, for `privet site retention`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from privet.client.rounds.refusals import kept_files
from privet.client.site import SiteConfig
from privet.common.retention import Item, changed, kept_dossiers

CERTIFICATES, DOSSIERS = "certificates", "dossiers"
"""Directories beside the site file."""


def kept_by(site: SiteConfig, folder: Path) -> list[Item]:
    """Return what a site keeps, with its age.

    Args:
        site: The site file.
        folder: Its directory.

    Raises:
        StateError: A receipt cannot be read.
    """
    items = [] if site.ledger is None else [Item("ledger", (site.ledger,), changed(site.ledger))]
    if site.log is not None:
        items.append(Item("log", (site.log.state,), changed(site.log.state)))
        items += [
            Item("receipts", (path,), datetime.fromtimestamp(refusal.time, UTC))
            for path, refusal in kept_files(site.log.state)
        ]
    for file in sorted((folder / CERTIFICATES).glob("withdrawal-*.json")):
        texts = [text for text in (file.with_suffix(".txt"),) if text.is_file()]
        items.append(Item("receipts", (file, *texts), changed(file)))
    return items + kept_dossiers(sorted((folder / DOSSIERS).glob("*")))
