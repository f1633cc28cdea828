"""The certificate of a withdrawal: what was done, what earlier studies cost, what that bounds, and what it does not.

It is a DSSE envelope of canonical JSON, signed with the site's identity key, which the round log names for the site. A
person's certificate holds the person's mark and no id: the site alone can show that the mark is theirs, with its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.client.budget.ledger import Ledger
from privet.client.budget.releases import limit_of
from privet.client.budget.withdrawals import Entry
from privet.client.site import SiteConfig
from privet.common.audit.privacy_text import rounded_up
from privet.common.errors import StateError
from privet.common.files import write_durably
from privet.common.signed import open_document, sign_document

TYPE = "application/vnd.privet.withdrawal+json"

_PERSON = (
    "From now on, the records with this person's id are left out of every file that this site reads: of training, "
    "counts, scans and evaluation, in the next round of a running study as well.",
    "Records without this id, or with another id of the same person, are not known to be theirs.",
)
_DATASET = (
    "From now on, this site takes part in no round of any study with this dataset. That cannot be undone.",
    "The site's membership ends when the coordinator revokes it, which the round log states.",
)
_PAST = (
    "Nothing can be taken back from what has left: updates are in sums of several sites, and adapters that were "
    "released stay with those who received them.",
    "Which records a step drew is not recorded, so nobody can tell in which updates these records are.",
    "An update that was made before, and has not arrived yet, may still be sent.",
    "What these studies have spent stays in the site's ledger: it gives no budget back.",
)
_PRIVATE = (
    "What differential privacy bounds: with or without the records of one unit, the probability of whatever anybody "
    "makes of this site's releases differs by a factor of at most exp(epsilon), and by at most delta more.",
    "What it does not bound: what a model tells about people in general, also tells about people like this one. And it "
    "says nothing about copies of the records, other studies, other sites, or results that a site computed for itself.",
)
_SHARED = (
    "Where sites shared the noise, this bound holds against the coordinator together with some corrupt sites, if the "
    "other sites added their shares.",
)
_OPEN = ("Some of these studies, or all, had NO differential privacy: nothing bounds what their results tell.",)
_AGAIN = (
    "Only training anew without the records removes them from a result. A new study may continue from an adapter that "
    "was released before these records were used.",
    "An adapter that this site trained for itself (`privet site personalise`) may repeat records: train it again.",
)


def certificate(site: SiteConfig, ledger: Ledger, entry: Entry) -> dict[str, Any]:
    """Return what a certificate states, as plain JSON values.

    Args:
        site: The site.
        ledger: Its ledger, for what earlier studies of the dataset cost.
        entry: The withdrawal.
    """
    studies, shared = _studies(site, ledger)
    private = [each for each in studies if each["epsilon"] is not None]
    said = [*(_PERSON if entry.mark else _DATASET)]
    if studies:
        said += [*_PAST, *(_PRIVATE if private else ()), *(_SHARED if shared else ())]
        said += [*(_OPEN if len(private) < len(studies) else ()), *_AGAIN]
    else:
        said.append("No study has used this dataset before, as the site's ledger shows: no update made of it has left.")
    limit = limit_of(site)
    return {
        "type": "withdrawal-certificate",
        "format": 1,
        "site": site.name,
        "dataset": site.dataset,
        "whole_dataset": not entry.mark,
        "mark": entry.mark or None,
        "recorded": {"row": entry.row, "head": entry.head, "time": entry.time},
        "unit": None if limit is None else limit.unit,
        "delta": None if limit is None else limit.delta,
        "studies": studies,
        "together": _finite(ledger.statement(str(site.dataset), limit).epsilon) if limit and private else None,
        "statements": said,
    }


def _studies(site: SiteConfig, ledger: Ledger) -> tuple[list[dict[str, Any]], bool]:
    """Return what each study of the dataset cost, and whether noise was shared in one."""
    limit, dataset = limit_of(site), str(site.dataset)
    if limit is None:
        rounds: dict[str, int] = {}
        for receipt in ledger.receipts(dataset):
            rounds[receipt.study] = rounds.get(receipt.study, 0) + 1
        return [{"study": study, "rounds": count, "epsilon": None} for study, count in rounds.items()], False
    found = ledger.statement(dataset, limit)
    return [
        {"study": each.study, "rounds": each.charged, "epsilon": _finite(each.epsilon)}
        for each in found.studies
        if each.charged
    ], found.shared


def certificate_text(document: Mapping[str, Any]) -> str:
    """Return a certificate for people."""
    whom = "The whole dataset" if document["whole_dataset"] else "One person"
    recorded = document["recorded"]
    lines = [
        "Certificate of a withdrawal",
        "",
        f"Site: {document['site']}. Dataset: {document['dataset']}.",
        f"{whom} was withdrawn on {recorded['time']}, by the clock of the site.",
        f"The site's record: row {recorded['row']}, head {recorded['head']}.",
        *([] if document["mark"] is None else [f"The person's mark, in place of an id: {document['mark']}."]),
        "",
    ]
    if document["studies"]:
        lines.append("Studies of this dataset in the site's ledger when this certificate was written:")
        for each in document["studies"]:
            cost = "no differential privacy, or none for this unit"
            if each["epsilon"] is not None:
                cost = (
                    f"epsilon {rounded_up(each['epsilon'])} at delta {document['delta']:g} for each {document['unit']}"
                )
            lines.append(f"  {each['study']}: {each['rounds']} rounds begun, {cost}")
        if document["together"] is not None:
            lines.append(f"  all of them together: epsilon {rounded_up(document['together'])}")
        lines.append("")
    return "\n".join([*lines, *document["statements"]]) + "\n"


def signed(site: SiteConfig, document: Mapping[str, Any]) -> bytes:
    """Return a certificate as a signed envelope.

    Raises:
        StateError: The site file names no identity key, or it cannot be read.
    """
    key = site.identity_key()
    if key is None:
        raise StateError(
            f"the site file of {site.name} names no identity key, which signs certificates",
            "make a key with `privet site identity FILE`, then set `identity` in the site file",
        )
    return sign_document(document, TYPE, key)


def verified(data: bytes, public: bytes) -> dict[str, Any]:
    """Return what a signed certificate states.

    Args:
        data: The envelope.
        public: The site's public identity key, 32 bytes, as the round log names it.

    Raises:
        VerificationError: It is not a certificate that this key has signed.
    """
    return open_document(data, TYPE, public)


def write_certificate(site: SiteConfig, ledger: Ledger, entry: Entry, folder: Path) -> Path:
    """Write a certificate, signed, and beside it as text; return the signed file. Raises as `signed`.

    That of an earlier withdrawal stays: another one would name studies that were begun since, without these records.
    """
    path = folder / f"withdrawal-{entry.row:06d}.json"
    if entry.again and path.exists() and path.with_suffix(".txt").exists():
        return path
    document = certificate(site, ledger, entry)
    data = signed(site, document)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, data, 0o600)
    write_durably(path.with_suffix(".txt"), certificate_text(document).encode(), 0o600)
    return path


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
