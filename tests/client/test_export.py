"""`privet export`: plain libraries compute what was trained, and an export that differs does not exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from privet.client.release import exports
from privet.client.release.exports import PROOF, export_release
from privet.client.release.gguf_file import write_gguf
from privet.client.release.opened import mounted, open_release
from privet.common.audit.release import CARD, STUDY
from privet.common.errors import RefusedError, StateError, StudyError, VerificationError
from tests.conftest import Run
from tests.support.released import CPU, run_of
from tests.support.tiny import tiny_base, tiny_tokenizer

IDS = [5, 9, 17, 30, 12, 44]


def logits_of(run: Path, ids: list[int]) -> torch.Tensor:
    """What the adapter computes as privet opens it."""
    with mounted(open_release(run), CPU) as host, torch.no_grad():
        tokens = torch.tensor([ids])
        output = host.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        logits: torch.Tensor = (output if isinstance(output, torch.Tensor) else output.logits)[0]
        return logits


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([ids])
        logits: torch.Tensor = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
        return logits


@pytest.fixture(scope="module")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, a byte-level tokenizer and a chat template, as SmolLM2 is."""
    path = tiny_base(tmp_path_factory.mktemp("bases") / "byte-llama", "llama")
    tokenizer = tiny_tokenizer("gpt2", chat=True)
    config = transformers.AutoConfig.from_pretrained(path)
    config.tie_word_embeddings, config.vocab_size = True, len(tokenizer) + 3
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    (path / "LICENSE").write_text("do as you like\n")
    return path


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_language_model_loads_merged_and_as_an_adapter(
    tmp_path: Path, bases: Mapping[str, Path], family: str
) -> None:
    run, _ = run_of(tmp_path / "run", bases[family], "causal-lm", {"task.system_prompt": "Be kind."})
    expected = logits_of(run, IDS)
    proof = export_release(open_release(run), tmp_path / "merged", "merged")
    assert proof["largest_difference"] <= 1e-4
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(plain(merged, IDS), expected, atol=1e-4, rtol=0)
    export_release(open_release(run), tmp_path / "peft", "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    assert (plain(base, IDS) - expected).abs().max() > 0.01, "the adapter changes nothing"
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft")
    torch.testing.assert_close(plain(adapted, IDS), expected, atol=1e-4, rtol=0)
    assert 'SYSTEM """Be kind."""' in (tmp_path / "merged" / "Modelfile").read_text()
    for name in ("merged", "peft"):
        card = (tmp_path / name / CARD).read_text()
        assert "> Be kind." in card
        assert str(bases[family]) not in card
        asked = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        own = transformers.AutoTokenizer.from_pretrained(bases[family])
        assert asked("Na\u00efve: 37.5 times")["input_ids"] == own("Na\u00efve: 37.5 times")["input_ids"]
        assert (tmp_path / name / STUDY).read_bytes() == (run / STUDY).read_bytes()
        assert json.loads((tmp_path / name / PROOF).read_text())["largest_difference"] <= 1e-4


def test_rounded_weights_have_a_bound_of_their_own(tmp_path: Path, llama: Path) -> None:
    run, _ = run_of(tmp_path / "run", llama, "causal-lm")
    proof = export_release(open_release(run), tmp_path / "half", "merged", "bf16")
    assert proof["relative"]
    assert 1e-4 < proof["largest_difference"] <= 5e-2
    assert transformers.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_taggers_load_in_the_library_s_own_class(tmp_path: Path, bases: Mapping[str, Path], family: str) -> None:
    run, study = run_of(tmp_path / "run", bases[family], "token-classification")
    expected, kind = logits_of(run, IDS), transformers.AutoModelForTokenClassification
    export_release(open_release(run), tmp_path / "merged", "merged")
    merged = kind.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(merged, IDS), expected, atol=1e-4, rtol=0)
    assert [merged.config.id2label[number] for number in range(3)] == list(study.task.labels)
    export_release(open_release(run), tmp_path / "peft", "peft")
    adapted = PeftModel.from_pretrained(kind.from_pretrained(bases[family], num_labels=3), tmp_path / "peft")
    torch.testing.assert_close(plain(adapted, IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "last")])
def test_text_classifiers_load_in_sentence_transformers(
    tmp_path: Path, bases: Mapping[str, Path], family: str, pooling: str
) -> None:
    from sentence_transformers import SentenceTransformer

    run, study = run_of(tmp_path / "run", bases[family], "text-classification", {"task.pooling": pooling})
    proof = export_release(open_release(run), tmp_path / "out", "sentence-transformers")
    assert proof["largest_difference"] <= 1e-4
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    text = "man chest pain since monday " * 20  # longer than the study's length
    with mounted(open_release(run), CPU) as host:
        ids = host.tokenizer(text, truncation=True, max_length=study.data.max_length)["input_ids"]
    found = torch.tensor(model.encode([text, "itchy rash"]))[0]
    torch.testing.assert_close(found, logits_of(run, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "pooling"), [("bert", "cls"), ("llama", "last"), ("gpt2", "last"), ("qwen2", "last")]
)
def test_the_library_s_head_loads_in_the_library_s_own_class(
    tmp_path: Path, bases: Mapping[str, Path], family: str, pooling: str
) -> None:
    change = {"task.head": "library", "task.pooling": pooling}
    run, _ = run_of(tmp_path / "run", bases[family], "text-classification", change)
    expected, kind = logits_of(run, IDS), transformers.AutoModelForSequenceClassification
    export_release(open_release(run), tmp_path / "merged", "merged")
    torch.testing.assert_close(plain(kind.from_pretrained(tmp_path / "merged"), IDS), expected, atol=1e-4, rtol=0)
    export_release(open_release(run), tmp_path / "peft", "peft")
    bare = kind.from_pretrained(bases[family], num_labels=3, pad_token_id=0)
    adapted = PeftModel.from_pretrained(bare, tmp_path / "peft")
    torch.testing.assert_close(plain(adapted, IDS), expected, atol=1e-4, rtol=0)
    with pytest.raises(RefusedError, match="the library's head"):
        export_release(open_release(run), tmp_path / "more", "sentence-transformers")


@pytest.mark.parametrize("family", ["byte-llama", "qwen2"])
def test_gguf_holds_model_tokenizer_and_template(
    tmp_path: Path, bases: Mapping[str, Path], byte_llama: Path, family: str
) -> None:
    from gguf import GGUFReader

    base = byte_llama if family == "byte-llama" else bases[family]
    targets = {"lora.targets": ["q_proj", "k_proj", "up_proj"]}
    run, _ = run_of(tmp_path / "run", base, "causal-lm", targets, scale=0.1)
    proof = export_release(open_release(run), tmp_path / "out", "gguf")
    assert 0 < proof["largest_difference"] <= 1e-2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    expected = logits_of(run, IDS)
    assert (plain(loaded, IDS) - expected).abs().max() <= 1e-2 * expected.abs().max()
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == {"byte-llama": "gpt-2", "qwen2": "qwen2"}[family]
    assert ("tokenizer.chat_template" in fields) == (family == "byte-llama")
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    if family == "byte-llama":
        assert "output.weight" not in [tensor.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors]
        assert fields["tokenizer.ggml.token_type"].contents()[-3:] == [5, 5, 5]
        assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like\n"


REFUSED = [
    ("gguf", "text-classification", "bert", "--format sentence-transformers"),
    ("merged", "text-classification", "bert", "--format sentence-transformers"),
    ("peft", "text-classification", "llama", "--format sentence-transformers"),
    ("sentence-transformers", "token-classification", "bert", "--format merged"),
    ("gguf", "causal-lm", "gpt2", "supported are llama"),
    ("gguf", "causal-lm", "llama", "byte-level BPE"),
]


@pytest.mark.parametrize(("form", "kind", "family", "says"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, bases: Mapping[str, Path], form: str, kind: str, family: str, says: str
) -> None:
    run, _ = run_of(tmp_path / "run", bases[family], kind)
    with pytest.raises(RefusedError) as refused:
        export_release(open_release(run), tmp_path / "out", form)
    assert says in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_head_that_reads_all_layers_is_used_with_privet_alone(tmp_path: Path, bert: Path, form: str) -> None:
    run, _ = run_of(tmp_path / "run", bert, "token-classification", {"task.head_reads": "all-layers"})
    with pytest.raises(RefusedError, match="reads all layers"):
        export_release(open_release(run), tmp_path / "out", form)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_an_export_that_differs_is_deleted(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_of(tmp_path / "run", llama, "causal-lm")

    def spoiled(trained: Any, out: Path, dtype: str) -> None:
        with torch.no_grad():
            trained.plain.lm_head.weight[3] += 0.01
        write(trained, out, dtype)

    write = exports._WRITERS["merged"]
    monkeypatch.setitem(exports._WRITERS, "merged", spoiled)
    with pytest.raises(VerificationError, match="the export was deleted"):
        export_release(open_release(run), tmp_path / "out", "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    monkeypatch.setitem(exports._WRITERS, "merged", write)
    export_release(open_release(run), tmp_path / "out", "merged")  # the host's own model was not touched
    with pytest.raises(StateError, match="exists already"):
        export_release(open_release(run), tmp_path / "out", "merged")
    with pytest.raises(StudyError, match="--dtype"):
        export_release(open_release(run), tmp_path / "more", "peft", "bf16")


def test_what_a_library_raises_is_one_sentence(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(trained: Any, out: Path, dtype: str) -> None:
        raise KeyError("layers.0")

    run, _ = run_of(tmp_path / "run", llama, "causal-lm")
    monkeypatch.setitem(exports._WRITERS, "merged", fails)
    with pytest.raises(RefusedError, match="the installed libraries cannot write"):
        export_release(open_release(run), tmp_path / "out", "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_wrong_or_unsafe_base_is_refused(tmp_path: Path, llama: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    run, _ = run_of(tmp_path / "run", base, "causal-lm")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "x.Y"},', 1))
    with pytest.raises((RefusedError, VerificationError)):
        export_release(open_release(run), tmp_path / "out", "merged")
    (base / "config.json").write_text(config)
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(VerificationError, match="SHA-256"):
        export_release(open_release(run), tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_the_order_of_rotary_rows_is_its_inverse(byte_llama: Path, tmp_path: Path) -> None:
    """Against the rule itself: row 2i of a head is row i, and row 2i + 1 is row i + width / 2."""
    from gguf import GGUFReader

    model = transformers.AutoModelForCausalLM.from_pretrained(byte_llama, dtype=torch.float32)
    write_gguf(model, transformers.AutoTokenizer.from_pretrained(byte_llama), tmp_path / "m.gguf", "m")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    own = model.model.layers[0].self_attn.q_proj.weight.detach().numpy().reshape(4, 8, 32)
    found = tensors["blk.0.attn_q.weight"].reshape(4, 8, 32)
    np.testing.assert_array_equal(found[:, 0::2], own[:, :4].astype(np.float16))
    np.testing.assert_array_equal(found[:, 1::2], own[:, 4:].astype(np.float16))


def test_the_command_says_how_equal_it_is(privet: Run, tmp_path: Path, bert: Path) -> None:
    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    code, out, err = privet("export", run, tmp_path / "out")
    assert code == 0, err
    assert "sentence-transformers, largest difference of logits" in out
    assert "SentenceTransformer(HERE)" in (tmp_path / "out" / CARD).read_text()
    code, _, err = privet("export", run, tmp_path / "more", "--format", "onnx")
    assert code == 2
    assert "expected a format" in err


def test_an_export_holds_no_file_of_another_place(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    (tmp_path / "secret").write_text("of whoever exports\n")
    (base / "merges.txt").symlink_to(tmp_path / "secret")
    run, _ = run_of(tmp_path / "run", base, "causal-lm")
    with pytest.raises(RefusedError, match=r"merges\.txt .* is a link to a file outside"):
        export_release(open_release(run), tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
