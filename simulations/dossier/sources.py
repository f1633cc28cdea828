"""Sentences and their sources. A sentence without a source cannot be made.

A source is a leaf of the verified log, the log as a whole, a file of the run, a field of the study, a claim that
privet's documentation argues and its tests check, or a gap: that privet does not know it, and who has to state it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class OfLeaf:
    """One leaf of the log.

    Attributes:
        index: Its number.
        type: Type of its statement.
        digest: Its leaf hash as ``sha256:<hex>``.
    """

    kind: ClassVar[str] = "leaf"
    index: int
    type: str
    digest: str


@dataclass(frozen=True)
class OfLog:
    """All leaves together: what was counted or computed over them, or is in none of them.

    Attributes:
        origin: The log's name.
        size: Number of leaves.
        root: Root hash in hexadecimal, to which the witnesses' checkpoint commits.
    """

    kind: ClassVar[str] = "log"
    origin: str
    size: int
    root: str


@dataclass(frozen=True)
class OfFile:
    """A file of the run, of which the dossier holds a copy.

    Attributes:
        path: Its name in the run's directory or bundle.
        sha256: Of its bytes, in hexadecimal.
    """

    kind: ClassVar[str] = "file"
    path: str
    sha256: str


@dataclass(frozen=True)
class OfStudy:
    """A field or a table of the study, which every site that took part has agreed to.

    Attributes:
        field: Its dotted name.
        study: Digest of the study.
    """

    kind: ClassVar[str] = "study"
    field: str
    study: str


@dataclass(frozen=True)
class Claim:
    """What privet's documentation argues; the same page names the tests.

    Attributes:
        page: Path of the page in privet's repository.
        anchor: Of the section in it.
    """

    kind: ClassVar[str] = "claim"
    page: str
    anchor: str


@dataclass(frozen=True)
class Gap:
    """What is not known to privet.

    Attributes:
        who: Who has to state it.
        what: What has to be stated.
    """

    kind: ClassVar[str] = "gap"
    who: str
    what: str = ""


Source = OfLeaf | OfLog | OfFile | OfStudy | Claim | Gap


@dataclass(frozen=True, init=False)
class Sentence:
    """One sentence of a document, or a few that belong together, with at least one source.

    Attributes:
        text: What is said.
        sources: What it rests on.
        figures: The numbers in the text, unrounded, by name.
        cells: The same as a row of a table, where the section is shown as one.
    """

    text: str
    sources: tuple[Source, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    cells: tuple[str, ...] = ()

    def __init__(self, text: str, source: Source, *more: Source, **figures: float) -> None:
        sources = (source, *more)
        if not text.strip() or not all(isinstance(each, Source) for each in sources):
            raise TypeError("a sentence needs a text, and each source must be one of the kinds of sources")
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "figures", figures)

    def row(self, *cells: str) -> Sentence:
        """Return the same sentence with the cells of a table's row."""
        source, *more = self.sources
        made = Sentence(self.text, source, *more, **self.figures)
        object.__setattr__(made, "cells", cells)
        return made

    @property
    def general(self) -> bool:
        """Whether it rests on privet's documentation alone, so that it says the same of every run."""
        return all(isinstance(each, Claim) for each in self.sources)

    @property
    def gap(self) -> Gap | None:
        """The gap that the sentence names; None if it states a fact."""
        return next((each for each in self.sources if isinstance(each, Gap)), None)

    def document(self) -> dict[str, Any]:
        """Return the sentence as plain JSON values; a figure that is infinite is None."""
        sources = [{"kind": each.kind, **vars(each)} for each in self.sources]
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        return {"text": self.text, "sources": sources, **({"figures": figures} if figures else {})}


def missing(what: str, who: str = "the consortium") -> Sentence:
    """Return the sentence about something that privet does not know."""
    return Sentence(f"Not known to privet: {what}. {who[0].upper()}{who[1:]} has to state it.", Gap(who, what))


@dataclass(frozen=True)
class Section:
    """A part of a document.

    Attributes:
        title: Its heading.
        sentences: What it says: at least one sentence.
        warning: Whether a page shows it as a warning.
        columns: Where a page shows it as a table, the names of the columns. Each sentence then has a cell for each.
    """

    title: str
    sentences: tuple[Sentence, ...]
    warning: bool = False
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sentences:
            raise ValueError(f"the section {self.title!r} says nothing: it needs a fact or a gap")
        if any(len(each.cells) != len(self.columns) for each in self.sentences if self.columns):
            raise ValueError(f"the section {self.title!r} is a table: each sentence needs {len(self.columns)} cells")


@dataclass(frozen=True)
class Document:
    """One document of a dossier.

    Attributes:
        name: Its name, which is also that of its file.
        title: Its title.
        sections: Its sections.
    """

    name: str
    title: str
    sections: tuple[Section, ...]

    def sentences(self) -> Iterator[Sentence]:
        """Yield all sentences, in order."""
        for section in self.sections:
            yield from section.sentences

    def document(self) -> dict[str, Any]:
        """Return the document as plain JSON values."""
        sections = [
            {"title": section.title, "sentences": [each.document() for each in section.sentences]}
            for section in self.sections
        ]
        return {"name": self.name, "title": self.title, "sections": sections}
