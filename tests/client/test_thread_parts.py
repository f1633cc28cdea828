"""Where a thread's part of an operation ends, a record must not differ: whatever other code does to threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from privet.client.site import Resources
from privet.client.training import packing
from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.packing import place
from privet.client.training.probe import _scatter, _terms, most_threads
from tests.support.tiny import TARGETS, tiny_study, tiny_tokenizer


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def opened(path: Path, model: Any, targets: list[str], number: int) -> ModelHost:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, model.config.model_type, targets)
        model.save_pretrained(path)
        tiny_tokenizer("llama").save_pretrained(path)
        study = tiny_study(path)
    host = open_host(study, Resources(device="cpu", precision="fp32", threads=number))
    _scatter(host, 0.3)
    return host


def sizes(intermediate: int) -> dict[str, int]:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return {"vocab_size": len(tiny_tokenizer("llama")), "intermediate_size": intermediate, **small, **ids}


def differing(host: ModelHost) -> int:
    """Return how many places of full passes give a record another term than the first place."""
    stream, found = np.random.default_rng(0), 0
    for size in host.shape.sizes:
        for _ in range(4):
            ids = tuple(int(token) for token in stream.integers(0, len(host.tokenizer), 8))
            copies = [Feature(ids, 0)] * (size // 8)
            terms = _terms(host, copies, place(host.shape, copies, [[i] for i in range(len(copies))], 0, size))
            found += sum(not terms[i].equals(terms[0]) for i in range(len(copies)))
    return found


@pytest.mark.slow
def test_fewer_threads_than_probed_change_no_term(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(640)))
    host = opened(tmp_path, model, ["q_proj", "v_proj"], 4)
    assert host.shape.packed
    torch.set_num_threads(3)  # as opening a host of another site file, or any library, may do
    assert differing(host) == 0


@pytest.mark.slow
def test_halves_of_wider_rows_are_whole_in_each_threads_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes(72)))
    host = opened(tmp_path, model, ["qkv_proj", "o_proj"], 3)
    assert host.shape.packed
    assert differing(host) == 0


@pytest.mark.slow
def test_gelu_divides_few_values_among_all_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes(64), hidden_act="gelu_pytorch_tanh"))
    host = opened(tmp_path, model, ["query", "value"], 7)
    assert host.shape.packed  # with fewer threads, not one record at a time
    assert differing(host) == 0


def test_within_records_is_of_each_thread() -> None:
    first, second, left = (threading.Event() for _ in range(3))

    def one() -> None:
        with packing.within_records():
            first.set()
            second.wait(10)
        left.set()

    def other() -> None:
        first.wait(10)
        assert not packing.is_within_records()
        with packing.within_records():
            second.set()
            left.wait(10)

    both = [threading.Thread(target=each) for each in (one, other)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not packing.is_within_records()
    seen: list[bool] = []
    later = threading.Thread(target=lambda: seen.append(packing.is_within_records()))
    later.start()
    later.join()
    assert seen == [False]


def test_one_number_of_threads_fits_passes_of_every_size() -> None:
    # 640, 1152 and 1664 rows of 512 values: 14 threads fit none, 10 the first alone, 13 the last alone.
    vectors = {(rows * 512, 64) for rows in (640, 1152, 1664)}
    assert [most_threads({each}, 14) for each in sorted(vectors)] == [10, 12, 13]
    assert most_threads(vectors, 14) == 8
