"""`task.head = "library"`: a classifier as the library's own, whose records stay apart; other studies are as before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from privet.client.training.model import open_host
from privet.common.errors import StudyError
from tests.support.released import CPU
from tests.support.tiny import tiny_study


def test_a_study_without_it_has_the_digest_of_before(bert: Path) -> None:
    study = tiny_study(bert)
    assert "head" not in study.document()["task"]
    assert tiny_study(bert, **{"task.head": "library", "task.pooling": "cls"}).digest != study.digest


@pytest.mark.parametrize(("family", "pooling"), [("bert", "cls"), ("llama", "last")])
def test_records_stay_apart_in_packed_passes(bases: Mapping[str, Path], family: str, pooling: str) -> None:
    """Opening the host compares losses and gradients of packed records with those of each alone."""
    host = open_host(tiny_study(bases[family], **{"task.head": "library", "task.pooling": pooling}), CPU)
    assert host.verdict == ""
    assert host.shape.packed
    names = [name for name in host.spec.names if "classifier" in name]
    assert [name.rsplit(".", 1)[1] for name in names] == (["bias", "weight"] if family == "bert" else ["weight"])
    assert not any("pooler" in name for name in host.spec.names)


def test_no_name_gives_the_pooler_an_adapter(bert: Path) -> None:
    change = {"task.head": "library", "task.pooling": "cls", "lora.targets": ["dense"]}
    host = open_host(tiny_study(bert, **change), CPU)
    assert not any("pooler" in name for name in host.spec.names)


def test_what_the_library_computes_otherwise_is_refused(bases: Mapping[str, Path]) -> None:
    with pytest.raises(StudyError, match="needs kind text-classification, and pooling cls or last"):
        tiny_study(bases["bert"], **{"task.head": "library"})
    with pytest.raises(StudyError, match="pooling cls or last"):
        tiny_study(bases["bert"], **{"task.head": "library", "task.kind": "token-classification"})
    for family, pooling in (("bert", "last"), ("llama", "cls")):
        study = tiny_study(bases[family], **{"task.head": "library", "task.pooling": pooling})
        with pytest.raises(StudyError, match="does not compute what pooling"):
            open_host(study, CPU)
