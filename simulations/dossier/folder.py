"""The files of a dossier: a page for each document, an index, one JSON document, bills of materials, and the sources.

::

    index.html              the first page: what happened, what there is, and every gap
    annex-iv.html ...       one page for each document
    leaves.html             the leaves that are cited, as their authors signed them
    dossier.json            all sentences with their sources, for programs
    sbom.cdx.json           the coordinator's software (CycloneDX 1.6)
    ml-bom.cdx.json         adapter, base and data (CycloneDX 1.6)
    sources/...             copies of the files that are cited, and each cited leaf with its proof

The same run gives the same bytes: no clock is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from privet.client.pages.document import document
from privet.client.pages.html import Child, Html, bullets, element, facts, joined, link, paragraph, prose, table
from privet.common.canonical import digest
from privet.common.log.checkpoint import LeafProof
from privet.simulations.dossier import parts, records, regulation
from privet.simulations.dossier.bom import MLBOM, SBOM, ml_bom, sbom
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.front import front
from privet.simulations.dossier.glossary import words
from privet.simulations.dossier.sources import (
    Claim,
    Document,
    Gap,
    OfFile,
    OfLeaf,
    OfLog,
    OfStudy,
    Section,
    Sentence,
    Source,
)
from privet.simulations.dossier.words import second_of

_READING = "reading"
_KINDS = (
    ("leaf 7", "an entry of the log: what its author signed. The page of leaves shows it; its proof is beside it"),
    ("log of 68 leaves", "all entries together: what was counted or computed over them, or is in none of them"),
    ("a file name", "a file of the run; this folder holds a copy"),
    ("study: privacy.epsilon", "a field of the study, to which a site agrees before it takes part"),
    ("docs/privacy.md#accounting", "a section of privet's documentation, in the version that wrote this dossier"),
    ("gap: the controller", "nothing: privet does not know it. This is who has to state it"),
)
"""How sources are shown, and what they are."""

INDEX, LEAVES, WHOLE, SOURCES = "index.html", "leaves.html", "dossier.json", "sources/"
_CHECKPOINT, _STUDY = "checkpoint", "study.json"
_TIMES = ("time", "expires")
_MEANINGS = {
    "time": "by the clock of the author of the statement",
    "adapter_before": "the adapter from which the round started",
    "adapter_after": "the adapter that the round made",
    "adapter_published": "the adapter that the next round starts from, or with which the run ends; the coordinator has "
    "its file, and sites receive it. It does not say that the adapter was released",
    "export": "the statement that releases an adapter; without one, none was released",
}
"""What fields of a leaf mean that a reader may take for something else."""


def documents(evidence: Evidence) -> list[Document]:
    """Return all documents of a run's dossier. Those of a simulation begin with a warning."""
    permit = regulation.permit(evidence)
    found = [
        regulation.annex_iv(evidence),
        regulation.dpia(evidence),
        regulation.anonymity(evidence),
        records.nist(evidence),
        records.model_card(evidence),
        records.data_sheets(evidence),
        regulation.hipaa_activity(evidence),
        regulation.hipaa_expert(evidence),
        *([] if permit is None else [permit]),
        words(),
    ]
    return [_warned(evidence, each) for each in found]


def first_page(evidence: Evidence) -> Document:
    """Return what the index says of the run."""
    return _warned(evidence, front(evidence))


def _warned(evidence: Evidence, made: Document) -> Document:
    warning = (parts.simulation(evidence),) if evidence.simulated else ()
    return replace(made, sections=(*warning, *made.sections))


def dossier_files(evidence: Evidence) -> dict[str, bytes]:
    """Return the files of a dossier by name."""
    made, first = documents(evidence), first_page(evidence)
    cited = [source for each in (first, *made) for sentence in each.sentences() for source in sentence.sources]
    leaves = {each.index: each for each in cited if isinstance(each, OfLeaf)}
    held = {_CHECKPOINT, _STUDY} | {each.path for each in cited if isinstance(each, OfFile)}
    files = {f"{SOURCES}{name}": evidence.files[name] for name in held}
    files |= _leaf_files(evidence, sorted(leaves))
    files |= {
        SBOM: _json(sbom(evidence)),
        MLBOM: _json(ml_bom(evidence)),
        LEAVES: _leaves_page(evidence, leaves).encode(),
    }
    files |= {f"{each.name}.html": _page(each).encode() for each in made}
    files[INDEX] = _index(evidence, first, made).encode()
    files[WHOLE] = _json(_whole(evidence, first, made, files))  # last: it has the digests of all others
    return files


def _leaf_files(evidence: Evidence, cited: Sequence[int]) -> dict[str, bytes]:
    """Return each cited leaf as its author signed it, with the proof that it is in the log."""
    found, leaves, note = dict[str, bytes](), evidence.leaf_bytes(), evidence.files[_CHECKPOINT]
    for index in cited:
        found[f"{SOURCES}{_leaf_name(index)}.json"] = leaves[index]
        proof = LeafProof(index, evidence.report.verdict.tree.prove(index), note)
        found[f"{SOURCES}{_leaf_name(index)}.tlog-proof"] = proof.encode()
    return found


def _whole(evidence: Evidence, first: Document, made: Sequence[Document], files: Mapping[str, bytes]) -> dict[str, Any]:
    log = evidence.log
    return {
        "type": "dossier",
        "format": 1,
        "run": evidence.run,
        "study": evidence.study.digest,
        "log": {"origin": log.origin, "size": log.size, "root": log.root},
        "policy": digest(evidence.policy.text.encode()),
        "simulated": evidence.simulated,
        "checked": list(evidence.report.checked),
        "unchecked": list(evidence.report.unchecked),
        "first": first.document(),
        "documents": [each.document() for each in made],
        "files": {name: digest(data) for name, data in sorted(files.items())},
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# --- pages -------------------------------------------------------------------------------------------------------


def _page(made: Document) -> str:
    lead = element(
        "p",
        {},
        link(INDEX, "All documents"),
        ". In brackets after a sentence stands its source: ",
        link(f"{INDEX}#{_READING}", "how to read it"),
        ".",
    )
    warnings = [_section(each) for each in made.sections if each.warning]
    rest = [_section(each) for each in made.sections if not each.warning]
    return document(made.title, [*warnings, element("h1", {}, made.title), lead, *rest])


def _section(made: Section) -> Html:
    said = _rows(made) if made.columns else _bullets(made)
    return element("section", {"class": "warning"} if made.warning else {}, element("h2", {}, made.title), said)


def _bullets(made: Section) -> Html:
    return element("ul", {}, *(_item(each) for each in made.sentences))


def _rows(made: Section) -> Html:
    """Return sentences as rows of a table. What differs from the most frequent value of its column is marked."""
    usual = [
        Counter(column).most_common(1)[0][0] for column in zip(*(each.cells for each in made.sentences), strict=True)
    ]
    rows = [
        [
            each.cells[0],
            *(
                cell if cell == most else element("span", {"class": "bad"}, "differs: ", cell)
                for cell, most in zip(each.cells[1:], usual[1:], strict=True)
            ),
            element("span", {"class": "note"}, _marks(each)),
        ]
        for each in made.sentences
    ]
    return table("What is unlike most other rows is marked", [*made.columns, "sources"], rows)


def _marks(said: Sentence) -> Html:
    return joined(part for source in said.sources for part in (" ", _mark(source)))


def _item(said: Sentence) -> Html:
    """Return a sentence with its sources."""
    marks = _marks(said)
    words = {"class": "bad"} if said.gap is not None else {}
    return element("li", {}, element("span", words, prose(said.text)), element("span", {"class": "note"}, marks))


def _mark(source: Source) -> Html:
    """Return a source, with a link to where the dossier holds it."""
    match source:
        case OfLeaf():
            return _bracket(link(f"{LEAVES}#leaf-{source.index}", f"leaf {source.index}"))
        case OfLog():
            return _bracket(link(f"{SOURCES}{_CHECKPOINT}", f"log of {source.size} leaves"))
        case OfFile():
            return _bracket(link(f"{SOURCES}{source.path}", source.path))
        case OfStudy():
            return _bracket(link(f"{SOURCES}{_STUDY}", f"study: {source.field}"))
        case Claim():
            return _bracket(f"{source.page}#{source.anchor}")
        case Gap():
            return _bracket(f"gap: {source.who}")


def _bracket(shown: Child) -> Html:
    return element("span", {"class": "source"}, "[", shown, "]")


def _leaf_name(index: int) -> str:
    return f"leaf-{index:06d}"


def _leaves_page(evidence: Evidence, cited: Mapping[int, OfLeaf]) -> str:
    told = {leaf.index: statement for leaf, statement in evidence.told}
    shown: list[Child] = [
        *([_section(parts.simulation(evidence))] if evidence.simulated else []),
        element("h1", {}, "Leaves of the log that are cited"),
        element("p", {}, link(INDEX, "All documents")),
        paragraph(
            "Each leaf is shown as its author signed it. Its file holds the signed bytes, and the proof shows that it "
            "is in the log: both have open formats (DSSE, C2SP tlog-proof)."
        ),
        facts(list(_MEANINGS.items())),
    ]
    for index, leaf in sorted(cited.items()):
        name = f"{SOURCES}{_leaf_name(index)}"
        stated = told[index].model_dump(mode="json", exclude_none=True)
        pairs: list[tuple[str, Child]] = [
            ("Leaf hash", leaf.digest),
            ("Files", joined([link(f"{name}.json", "signed bytes"), ", ", link(f"{name}.tlog-proof", "proof")])),
            *((key, _shown(key, value)) for key, value in stated.items() if key != "type"),
        ]
        shown.append(
            element("section", {"id": f"leaf-{index}"}, element("h2", {}, f"Leaf {index}: {leaf.type}"), facts(pairs))
        )
    return document("Cited leaves", shown)


def _shown(key: str, value: Any) -> str:
    if key in _TIMES and isinstance(value, int | float):
        return f"{second_of(value)} ({value} seconds since 1970)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _index(evidence: Evidence, first: Document, made: Sequence[Document]) -> str:
    rows = [[link(f"{each.name}.html", each.title), *_numbers(each)] for each in made]
    by = "Cosigned by simulated witnesses (all keys on one machine)" if evidence.simulated else "Cosigned by"
    return document(
        f"Dossier of {evidence.run}",
        [
            *(_section(each) for each in first.sections if each.warning),
            element("h1", {}, first.title),
            element(
                "p",
                {"class": "conclusion"},
                "What privet can show about this run for a review, and what others have to state. It finds no "
                "conformity.",
            ),
            facts([(each.title, _bullets(each)) for each in first.sections if not each.warning]),
            element("h2", {}, "The log"),
            facts(
                [
                    ("Study", evidence.study.digest),
                    ("Log", f"{evidence.log.origin}, {evidence.log.size} leaves, root {evidence.log.root}"),
                    (by, ", ".join(evidence.report.verdict.cosigners)),
                ]
            ),
            element("h2", {}, "Documents"),
            table(
                "Number of sentences, each of which names its source",
                ["document", "about this run", "about privet in general", "missing"],
                rows,
                numbers=(1, 2, 3),
            ),
            bullets(
                [
                    joined([link(SBOM, SBOM), ": the coordinator's software (CycloneDX 1.6)"]),
                    joined([link(MLBOM, MLBOM), ": adapter, base and data (CycloneDX 1.6)"]),
                    joined(
                        [
                            link(WHOLE, WHOLE),
                            ": every sentence with its sources, and the SHA-256 of each other file here, for programs",
                        ]
                    ),
                    joined([link(LEAVES, "cited leaves"), ": as their authors signed them, with proofs"]),
                ]
            ),
            element("h2", {"id": _READING}, "How to read the sources"),
            table("In brackets after each sentence", ["source", "what it is"], _KINDS),
            element("h2", {}, "Verified"),
            bullets([_first_upper(each) for each in evidence.report.checked]),
            element("h2", {}, "Not verified"),
            bullets([_first_upper(each) for each in evidence.report.unchecked] or ["Nothing is left out."]),
            element("h2", {}, "Gaps: what others have to state"),
            paragraph("privet does not know these points. A review needs them from whom a heading names."),
            *_gaps([first, *made]),
        ],
    )


def _numbers(made: Document) -> list[str]:
    """Return how many sentences are about this run, about privet in general, and missing."""
    said = list(made.sentences())
    missing, general = sum(each.gap is not None for each in said), sum(each.general for each in said)
    return [str(len(said) - missing - general), str(general), str(missing)]


def _gaps(made: Iterable[Document]) -> list[Html]:
    """Return every gap once, by who has to fill it."""
    gaps: dict[str, dict[str, None]] = {}
    for each in made:
        for said in each.sentences():
            if said.gap is not None:
                gaps.setdefault(said.gap.who, {})[said.gap.what] = None
    found = []
    for who, texts in gaps.items():
        found += [element("h3", {}, _first_upper(who)), bullets([prose(_first_upper(text)) for text in texts])]
    return found


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
