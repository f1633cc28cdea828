"""The files of a dossier: a page for each document, an index, one JSON document, bills of materials, and the sources.

::

    index.html              what there is, and every gap
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from privet.client.pages.document import document
from privet.client.pages.html import Child, Html, bullets, element, facts, joined, link, paragraph, prose, table
from privet.common.canonical import digest
from privet.common.log.checkpoint import LeafProof
from privet.simulations.dossier import records, regulation
from privet.simulations.dossier.bom import MLBOM, SBOM, ml_bom, sbom
from privet.simulations.dossier.evidence import Evidence
from privet.simulations.dossier.glossary import words
from privet.simulations.dossier.sources import (
    Claim,
    Document,
    Gap,
    OfFile,
    OfLeaf,
    OfLog,
    OfStudy,
    Sentence,
    Source,
)

_READING = "reading"
_KINDS = (
    ("leaf 7", "an entry of the log: what its author signed. The page of leaves shows it; its proof is beside it"),
    ("log of 68 leaves", "all entries together: what was counted or computed over them, or is in none of them"),
    ("a file name", "a file of the run; this folder holds a copy"),
    ("study: privacy.epsilon", "a field of the study, to which every site that took part has agreed"),
    ("docs/privacy.md#accounting", "a section of privet's documentation, in the version that wrote this dossier"),
    ("gap: the controller", "nothing: privet does not know it. This is who has to state it"),
)
"""How sources are shown, and what they are."""

INDEX, LEAVES, WHOLE, SOURCES = "index.html", "leaves.html", "dossier.json", "sources/"
_CHECKPOINT, _STUDY = "checkpoint", "study.json"


def documents(evidence: Evidence) -> list[Document]:
    """Return all documents of a run's dossier."""
    permit = regulation.permit(evidence)
    return [
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


def dossier_files(evidence: Evidence) -> dict[str, bytes]:
    """Return the files of a dossier by name."""
    made = documents(evidence)
    cited = [source for each in made for sentence in each.sentences() for source in sentence.sources]
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
    files[WHOLE] = _json(_whole(evidence, made, files))
    files[INDEX] = _index(evidence, made).encode()
    return files


def _leaf_files(evidence: Evidence, cited: Sequence[int]) -> dict[str, bytes]:
    """Return each cited leaf as its author signed it, with the proof that it is in the log."""
    found, leaves, note = dict[str, bytes](), evidence.leaf_bytes(), evidence.files[_CHECKPOINT]
    for index in cited:
        found[f"{SOURCES}{_leaf_name(index)}.json"] = leaves[index]
        proof = LeafProof(index, evidence.report.verdict.tree.prove(index), note)
        found[f"{SOURCES}{_leaf_name(index)}.tlog-proof"] = proof.encode()
    return found


def _whole(evidence: Evidence, made: Sequence[Document], files: Mapping[str, bytes]) -> dict[str, Any]:
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
        "documents": [each.document() for each in made],
        "files": {name: digest(data) for name, data in sorted(files.items())},
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# --- pages -------------------------------------------------------------------------------------------------------


def _page(made: Document) -> str:
    sections = [
        element(
            "section", {}, element("h2", {}, each.title), element("ul", {}, *(_item(said) for said in each.sentences))
        )
        for each in made.sections
    ]
    lead = element(
        "p",
        {},
        link(INDEX, "All documents"),
        ". In brackets after a sentence stands its source: ",
        link(f"{INDEX}#{_READING}", "how to read it"),
        ".",
    )
    return document(made.title, [element("h1", {}, made.title), lead, *sections])


def _item(said: Sentence) -> Html:
    """Return a sentence with its sources."""
    marks = joined(part for source in said.sources for part in (" ", _mark(source)))
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
    parts: list[Child] = [
        element("h1", {}, "Leaves of the log that are cited"),
        element("p", {}, link(INDEX, "All documents")),
        paragraph(
            "Each leaf is shown as its author signed it. Its file holds the signed bytes, and the proof shows that it "
            "is in the log: both have open formats (DSSE, C2SP tlog-proof)."
        ),
    ]
    for index, leaf in sorted(cited.items()):
        name = f"{SOURCES}{_leaf_name(index)}"
        stated = told[index].model_dump(mode="json", exclude_none=True)
        pairs: list[tuple[str, Child]] = [
            ("Leaf hash", leaf.digest),
            ("Files", joined([link(f"{name}.json", "signed bytes"), ", ", link(f"{name}.tlog-proof", "proof")])),
            *((key, _shown(value)) for key, value in stated.items() if key != "type"),
        ]
        parts.append(
            element("section", {"id": f"leaf-{index}"}, element("h2", {}, f"Leaf {index}: {leaf.type}"), facts(pairs))
        )
    return document("Cited leaves", parts)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _index(evidence: Evidence, made: Sequence[Document]) -> str:
    rows = [[link(f"{each.name}.html", each.title), *_numbers(each)] for each in made]
    simulated = [element("p", {"class": "bad"}, "This run is a simulation: its noise protects nobody.")]
    parts: list[Child] = [
        element("h1", {}, f"Dossier: run {evidence.run} of study {evidence.study.name}"),
        element(
            "p",
            {"class": "conclusion"},
            "What privet can show about this run for a review, and what others have to state. It measures readiness, "
            "and finds no conformity.",
        ),
        *(simulated if evidence.simulated else []),
        facts(
            [
                ("Study", evidence.study.digest),
                ("Log", f"{evidence.log.origin}, {evidence.log.size} leaves, root {evidence.log.root}"),
                ("Cosigned by", ", ".join(evidence.report.verdict.cosigners)),
            ]
        ),
        element("h2", {}, "Documents"),
        table("Each sentence names its source", ["document", "sentences", "of them gaps"], rows, numbers=(1, 2)),
        bullets(
            [
                joined([link(SBOM, SBOM), ": the coordinator's software (CycloneDX 1.6)"]),
                joined([link(MLBOM, MLBOM), ": adapter, base and data (CycloneDX 1.6)"]),
                joined([link(WHOLE, WHOLE), ": every sentence with its sources, for programs"]),
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
        *_gaps(made),
    ]
    return document(f"Dossier of {evidence.run}", parts)


def _numbers(made: Document) -> list[str]:
    said = list(made.sentences())
    return [str(len(said)), str(sum(each.gap is not None for each in said))]


def _gaps(made: Iterable[Document]) -> list[Html]:
    """Return every gap once, by who has to fill it."""
    gaps: dict[str, dict[str, None]] = {}
    for each in made:
        for said in each.sentences():
            if said.gap is not None:
                gaps.setdefault(said.gap.who, {})[said.gap.what] = None
    parts = []
    for who, texts in gaps.items():
        parts += [element("h3", {}, _first_upper(who)), bullets([prose(_first_upper(text)) for text in texts])]
    return parts


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
