"""Kept verdicts of the probe: found again for the same host alone, and never taken from another user."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from privet.client.training import model, verdicts
from privet.client.training.packing import Shape
from privet.client.training.verdicts import Verdict, anew, keep, name_of, recall

FOUND = Verdict(packed=False, objection="a record changes others", threads=2, in_parts=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start with nothing known, and with a directory for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_known", {})
    return tmp_path / "cache" / "privet" / "probes"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_known", {})


def test_a_verdict_is_found_again_by_a_later_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recall(name_of(["a"])) is None
    keep(name_of(["a"]), FOUND)
    forget(monkeypatch)
    assert recall(name_of(["a"])) == FOUND
    assert recall(name_of(["b"])) is None
    with anew():
        assert recall(name_of(["a"])) is None
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_long_probe_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def choose(*_: object) -> tuple[Shape, str]:
        time.sleep(0.1)
        return Shape(), ""

    monkeypatch.setattr(model, "choose_shape", choose)
    monkeypatch.setattr(model, "_SAID", 0.02)
    host: Any = SimpleNamespace(threads=1, vocabulary=None, shape=Shape(), verdict="")
    with caplog.at_level("INFO", logger="privet.site"):
        model._probe(host, name_of(["slow"]), 8, 2)
    first, *others = caplog.messages
    assert "checking that this device computes" in first
    assert len(others) > 1
    assert set(others) == {"still checking this device, for 1 s so far"}


def test_other_threads_variables_or_software_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> str:
        verdicts._machine.cache_clear()
        return name_of(["a"])

    names = {name()}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    names.add(name())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.add(name())
    monkeypatch.setattr(verdicts, "software", lambda: {"sources": {}, "versions": {}})
    names.add(name())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    names.add(name())
    monkeypatch.setenv("LD_PRELOAD", "/elsewhere/libblas.so")
    names.add(name())
    assert len(names) == 6
    monkeypatch.undo()
    verdicts._machine.cache_clear()


@pytest.mark.parametrize("place", ["file", "folder", "above"])
def test_what_others_can_write_is_not_believed(place: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(name_of(["a"]), FOUND)
    forget(monkeypatch)
    (file,) = cache.iterdir()
    {"file": file, "folder": cache, "above": cache.parent}[place].chmod(0o777)
    assert recall(name_of(["a"])) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"packed": "yes", "objection": "", "threads": 1, "in_parts": true}']
)
def test_a_damaged_file_has_the_probe_run_again(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(name_of(["a"]), FOUND)
    forget(monkeypatch)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert recall(name_of(["a"])) is None


def test_without_a_directory_nothing_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    keep(name_of(["a"]), FOUND)
    assert recall(name_of(["a"])) == FOUND
    forget(monkeypatch)
    assert recall(name_of(["a"])) is None
