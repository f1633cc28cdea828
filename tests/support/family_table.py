"""The table of families and tasks in docs/families.md: what opens, what is refused, and how near gradients are.

`python -m tests.support.family_table --write` measures everything anew and writes the table.
`tests/client/test_families.py` measures everything too, and compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from privet.client.site import Resources
from privet.client.training.base import build_base
from privet.client.training.dp import per_sample_gradients
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.packing import pack
from privet.client.training.passes import backward, passes_of
from privet.common.errors import StudyError
from tests.support.families import FAMILIES, MORE, family_base, family_study
from tests.support.losses import one_by_one
from tests.support.tiny import random_adapter, records_of, rows_for

KINDS = ("text-classification", "token-classification", "causal-lm")
NAMES = tuple(FAMILIES | MORE)
CLOSE = 1e-5
"""Largest difference of a record's gradient from that of the record alone, relative to its norm, in float32."""
DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
_CPU = Resources(device="cpu", precision="fp32")


@dataclass(frozen=True)
class Outcome:
    """What a family and a task come to.

    Attributes:
        refused: Message of the refusal; empty if it trains.
        packed: Whether a pass takes several records.
        error: Largest relative difference of a record's gradient from that of the record alone.
        repeats: Whether a second pass, with the records in another order, gives the same bits.
        dropout: Whether a dropout rate changes what training computes, and nothing that evaluation computes; None for
            a family without dropout.
    """

    refused: str = ""
    packed: bool = False
    error: float = 0.0
    repeats: bool = True
    dropout: bool | None = None

    @property
    def cell(self) -> str:
        """The cell of the table."""
        if self.refused:
            return "refused"
        return "packed" if self.packed else "one record a pass"


@contextmanager
def built(name: str) -> Iterator[Path]:
    """Yield a random base of a family, in a directory of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield family_base(Path(folder) / "base", name, head=True)


def measure(base: Path, name: str, kind: str) -> Outcome:
    """Open a base for a task as a site does, and compare the gradients of its passes with those of single records.

    Raises:
        Exception: Anything but a refusal: a fault.
    """
    study = family_study(base, name, **{"task.kind": kind, "aggregation.method": "fedavg"})
    try:
        host = open_host(study, _CPU)
    except StudyError as refused:
        return Outcome(refused=refused.message)
    host.mount(random_adapter(host.spec))
    features = encode_records(study, host.tokenizer, records_of(study, rows_for(study, 5, seed=3)))
    trained = [parameter for _, parameter in host.train_only(host.spec.trained("fedavg"))]
    found = collect(host, features, trained)
    again = collect(host, features[::-1], trained).flip(0)
    references = [one_by_one(host, features, trained)]
    if kind != "text-classification" and _relative(found, references[0]) >= CLOSE:
        # Where a softmax is steep, plain autograd in float32 is itself farther than this from autograd in float64.
        host.model.double()
        references.append(one_by_one(host, features, trained).float())
        host.model.float()
    error = min(_relative(found, reference) for reference in references)
    return Outcome("", host.shape.packed, error, torch.equal(found, again), _dropout(base, host, kind, name))


def collect(host: ModelHost, features: Sequence[Feature], trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return per-sample gradients [n, P] as training takes them, in the order of `features`."""
    found: dict[int, torch.Tensor] = {}
    with (
        host.passing(training=True),
        per_sample_gradients(host.model, trained, packed=host.shape.packed) as collected,
    ):
        for passed in passes_of(host, features, pack(host.shape, features, range(len(features)), 64)):
            collected.begin(passed.layout)
            backward(host, passed)
            found |= dict(zip(passed.records, collected.take(), strict=True))
    return torch.stack([found[record] for record in range(len(features))])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@torch.no_grad()
def _dropout(base: Path, host: ModelHost, kind: str, name: str) -> bool | None:
    """Return whether dropout at rate 0.5 acts in training and not in evaluation; None where the family has none."""
    study = family_study(base, name, **{"task.kind": kind})
    model = build_base(base, study.task, 0.5, "sdpa", torch.float32)
    ids = torch.arange(4, 24)[None] % len(host.tokenizer)

    def run() -> torch.Tensor:
        part = model if kind == "causal-lm" else model.backbone
        output = part(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
        found: torch.Tensor = output.logits if kind == "causal-lm" else output.last_hidden_state
        return found

    model.eval()
    still = torch.equal(run(), run())
    model.train()
    moves = not torch.equal(run(), run())
    if still and not moves and not any("drop" in key for key in vars(model.config)):
        return None
    return still and moves


def table(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """Return the table and the refusals as Markdown."""
    lines = [f"| family | {' | '.join(KINDS)} | dropout |", "|---|---|---|---|---|"]
    sentences: dict[str, list[str]] = {}
    for name in NAMES:
        mine = [outcomes[name, kind] for kind in KINDS]
        honoured = {outcome.dropout for outcome in mine if not outcome.refused}
        word = "-" if not honoured else "none in the family" if honoured == {None} else "yes"
        lines.append(f"| {name} | {' | '.join(outcome.cell for outcome in mine)} | {word} |")
        for kind, outcome in zip(KINDS, mine, strict=True):
            if outcome.refused:
                sentence = re.sub(r"the family \S+", "the family NAME", outcome.refused)
                sentences.setdefault(f"`{sentence}`", []).append(f"{name} ({kind})")
    lines += ["", "Refusals:", ""]
    lines += [f"* {sentence}: {', '.join(who)}" for sentence, who in sorted(sentences.items())]
    return "\n".join(lines) + "\n"


def published() -> str:
    """Return the table that the documentation has."""
    return DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]


def main() -> None:
    """Measure every family and task, and print the table, or write it with `--write`."""
    outcomes = {}
    torch.set_num_threads(1)
    for name in NAMES:
        with built(name) as base:
            for kind in KINDS:
                outcomes[name, kind] = measure(base, name, kind)
    text = table(outcomes)
    if "--write" in sys.argv:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(_BEGIN)
        DOCUMENT.write_text(before + _BEGIN + text + _END + rest.partition(_END)[2], encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
