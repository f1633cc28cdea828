"""Importing a base: the same bytes every time, values written once, and pickles that reach nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from privet.client.bases import importing, written
from privet.client.bases.files import SUMMARY, pins_of
from privet.client.bases.gguf import Description
from privet.client.bases.importing import import_base
from privet.client.release.card import licence_files
from privet.common.errors import PrivetError, RefusedError, StateError, StudyError
from tests.conftest import Run
from tests.support.tiny import tiny_base


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A decoder whose output layer is tied to its embeddings."""
    base = tiny_base(tmp_path / "source", "llama", chat=True)
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**document, "tie_word_embeddings": True}))
    values = load_file(base / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return base


def pickled(base: Path) -> Path:
    """Replace a base's weights by pickled ones of the same values; tied tensors share memory in them."""
    values = load_file(base / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    torch.save(values, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def names_in(base: Path) -> list[str]:
    found: list[str] = []
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += opened.keys()
    return sorted(found)


# --- safetensors and pickles -----------------------------------------------------------------------------


def test_tied_weights_are_written_once_and_the_model_computes_the_same(tied: Path, tmp_path: Path) -> None:
    made = import_base(str(tied), tmp_path / "small")
    assert "lm_head.weight" not in names_in(made.directory)
    assert "model.embed_tokens.weight" in names_in(made.directory)
    assert made.pins == pins_of(made.directory)
    ids = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (tied, made.directory)]
    assert torch.equal(*logits)
    chats = [AutoTokenizer.from_pretrained(path).chat_template for path in (tied, made.directory)]
    assert chats[0] == chats[1] is not None


def test_weights_that_are_equal_and_not_tied_are_both_written(tied: Path, tmp_path: Path) -> None:
    document = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**document, "tie_word_embeddings": False}))
    assert "lm_head.weight" in names_in(import_base(str(tied), tmp_path / "small").directory)


def test_an_import_gives_the_same_bytes_from_shards_pickles_and_again(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = import_base(str(tied), tmp_path / "first").pins
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert import_base(str(tied), tmp_path / "again").pins == first
    torch.set_num_threads(before)
    values = load_file(tied / "model.safetensors")
    sharded = Path(shutil.copytree(tied, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    for number, names in enumerate((sorted(values)[::2], sorted(values)[1::2]), 1):
        file = sharded / f"model-0000{number}-of-00002.safetensors"
        save_file({name: values[name] for name in reversed(names)}, file, metadata={"format": "pt"})
    places = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(values))}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    # Not in the index: another program's copy of the same weights.
    save_file(values, sharded / "consolidated.safetensors")
    assert import_base(str(sharded), tmp_path / "merged").pins == first
    assert import_base(str(pickled(tied)), tmp_path / "unpickled").pins == first
    # Cut again, with a smaller bound: several files and an index that the libraries read.
    monkeypatch.setattr(importing, "write_weights", partial(written.write_weights, largest=20_000))
    cut = import_base(str(sharded), tmp_path / "cut").directory
    assert len(list(cut.glob("model-*-of-*.safetensors"))) > 2
    assert names_in(cut) == names_in(tmp_path / "merged")
    index = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == names_in(cut)
    AutoModelForCausalLM.from_pretrained(cut)


def test_the_number_format_can_be_chosen(tied: Path, tmp_path: Path) -> None:
    made = import_base(str(tied), tmp_path / "small", "bf16")
    assert {value.dtype for value in load_file(made.directory / "model.safetensors").values()} == {torch.bfloat16}
    assert "bfloat16" in made.summary["conversion"]
    with pytest.raises(StudyError, match="--dtype"):
        import_base(str(tied), tmp_path / "other", "int4")


def test_the_summary_says_what_the_base_is(tied: Path, tmp_path: Path) -> None:
    made = import_base(str(tied), tmp_path / "small")
    summary = json.loads((made.directory / SUMMARY).read_text())
    assert summary["licence"] == "apache-2.0"
    assert list(summary["source"]["sha256"]) == ["model.safetensors"]
    assert str(tmp_path) not in json.dumps(summary)
    assert SUMMARY not in made.pins


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_runs_nothing(tied: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Evil(tmp_path / "executed")}, tied / "pytorch_model.bin")
    (tied / "model.safetensors").unlink()
    with pytest.raises(StudyError, match=r"pytorch_model\.bin cannot be read as tensors") as caught:
        import_base(str(tied), tmp_path / "small")
    assert "Traceback" not in caught.value.message
    assert not (tmp_path / "executed").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source"}  # nothing is left behind


@pytest.mark.parametrize("content", ["", "text", "zip"])
def test_damaged_pickles_end_in_a_sentence(tied: Path, tmp_path: Path, content: str) -> None:
    (tied / "model.safetensors").unlink()
    file = tied / "pytorch_model.bin"
    file.write_text(content)
    if content == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(StudyError, match="cannot be read as tensors"):
        import_base(str(tied), tmp_path / "small")


GUARDED = """
import sys; sys.path.insert(0, sys.argv[1])
import socket, subprocess, os, pathlib, unpickle
unpickle._guard(pathlib.Path(sys.argv[2]))
tries = {
    "socket": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2),
    "program": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "write": lambda: open(sys.argv[2] + "/../outside", "w"),
    "append": lambda: os.open(sys.argv[2] + "/../outside", os.O_WRONLY | os.O_CREAT),
    "remove": lambda: os.remove(sys.argv[1]),
    "inside": lambda: open(sys.argv[2] + "/inside", "w").close(),
}
for name, attempt in tries.items():
    try: attempt()
    except PermissionError: print(name)
"""


def test_the_process_that_unpickles_reaches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(importing._CHILD.parent), str(out), str(server.getsockname()[1])]
        done = subprocess.run(
            [sys.executable, "-I", "-c", GUARDED, *arguments], capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == ["socket", "program", "system", "write", "append", "remove"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ("config.json", {"model_type": "never-heard-of"}, r"config\.json in .* cannot be loaded"),
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tied: Path, tmp_path: Path, name: str, change: dict[str, Any], text: str
) -> None:
    document = json.loads((tied / name).read_text())
    (tied / name).write_text(json.dumps({**document, **change}))
    with pytest.raises(PrivetError, match=text):
        import_base(str(tied), tmp_path / "small")


def test_sources_that_are_no_model_are_refused(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for source, text in (
        (tmp_path / "gone", "no file or directory"),
        (tmp_path / "empty", "holds no weights"),
        (tmp_path / "notes.txt", "expected a file of weights"),
        ("package:no_such_package_here", "no installed Python package"),
    ):
        with pytest.raises(StudyError, match=text):
            import_base(str(source), tmp_path / "small")
    (tmp_path / "small").mkdir()
    with pytest.raises(StateError, match="exists already"):
        import_base(str(tied), tmp_path / "small")
    shutil.copy(tied / "model.safetensors", tied / "copy.safetensors")
    with pytest.raises(StudyError, match="in two files of weights"):
        import_base(str(tied), tmp_path / "other")
    # One of the files may be named instead.
    import_base(str(tied / "model.safetensors"), tmp_path / "named")


def test_the_commands_print_a_table_that_opens(privet: Run, tied: Path, tmp_path: Path) -> None:
    code, out, err = privet("base", "import", tied, tmp_path / "small")
    assert code == 0, err
    assert out.startswith("# safetensors, numbers as they were; licence: apache-2.0\n[model]\n")
    again = privet("base", tmp_path / "small")[1]
    assert again.partition("[model]")[2] == out.partition("[model]")[2]
    found = json.loads(privet("base", "--json", tmp_path / "small")[1])
    assert found["base"] == "small"
    assert found["sha256"] == pins_of(tmp_path / "small")
    assert privet("base", tied.parent)[0] == 2


# --- GGUF ------------------------------------------------------------------------------------------------


def write_gguf(path: Path, cut: str = "smollm", quantised: bool = True) -> Path:
    """Write a tiny random Llama as GGUF, with the package `gguf`'s own writer."""
    library = pytest.importorskip("gguf")
    import numpy as np

    wide, vocabulary, inner, heads = 64, 260, 64, 2
    writer = library.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(wide)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(wide // heads)
    writer.add_vocab_size(vocabulary)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "12", "ab", "<|im|>"][:vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 2), 3])
    writer.add_token_merges(["1 2", "a b"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, wide), "blk.0.ffn_gate": (inner, wide), "blk.0.ffn_up": (inner, wide)}
    shapes |= {"blk.0.ffn_down": (wide, inner)} | {f"blk.0.attn_{x}": (wide, wide) for x in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        value = random.standard_normal(shape).astype(np.float32)
        kind = library.GGMLQuantizationType.Q8_0
        if quantised:
            writer.add_tensor(f"{name}.weight", library.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(wide, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("quantised", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gguf_file_is_imported_with_its_tokenizer_and_template(
    tmp_path: Path, quantised: bool, dtype: torch.dtype
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", quantised=quantised)
    made = import_base(str(file), tmp_path / "tiny")
    assert import_base(str(tmp_path), tmp_path / "again").pins == made.pins
    assert made.summary["licence"] == "mit"
    assert ("Q8_0 dequantised" in made.summary["conversion"]) == quantised
    values = load_file(made.directory / "model.safetensors")
    assert {value.dtype for value in values.values()} == {dtype}
    assert "lm_head.weight" not in values
    text = "".join(file.read_text() for file in made.directory.iterdir() if file.suffix in (".json", ".jinja"))
    assert str(tmp_path) not in text  # no path of this machine
    assert "transformers_version" not in text
    tokenizer = AutoTokenizer.from_pretrained(made.directory)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|end|>"
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]  # digits apart, as the file's own tokenizer has them
    model = AutoModelForCausalLM.from_pretrained(made.directory, dtype=torch.float32)
    assert model.generation_config.eos_token_id == 0
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)


def test_a_gguf_file_whose_way_to_cut_text_is_unknown_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", cut="never-heard-of")
    with pytest.raises(StudyError, match="never-heard-of"):
        import_base(str(file), tmp_path / "tiny")


def test_damaged_gguf_files_end_in_a_sentence(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for content in (b"", b"GGUF", b"x" * 100, whole[:400], whole[:-4000]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(StudyError, match="cannot be read as a GGUF model"):
            import_base(str(tmp_path / "bad.gguf"), tmp_path / "bad")


def gguf_header(tensors: int, entries: int, *content: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + b"".join(content) + bytes(64)


ENTRY = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    "content",
    [
        gguf_header(2**60, 0),
        gguf_header(0, 2**60),
        gguf_header(0, 1, struct.pack("<Q", 2**60)),
        gguf_header(0, 1, ENTRY, struct.pack("<IQ", 8, 2**60)),
        gguf_header(0, 1, ENTRY, struct.pack("<IIQ", 9, 0, 2**60)),
        gguf_header(0, 1, ENTRY, struct.pack("<IIQ", 9, 8, 2**60)),
        gguf_header(0, 1, ENTRY, struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 6),
        gguf_header(0, 1, ENTRY, struct.pack("<I", 77)),
        gguf_header(1, 0, ENTRY, struct.pack("<I", 2**31)),
    ],
)
def test_a_gguf_file_that_states_more_than_it_holds_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(StudyError, match="cannot be read as a GGUF model: ValueError"):
        import_base(str(tmp_path / "bad.gguf"), tmp_path / "bad")


def test_what_a_model_says_of_itself_stays_on_one_line(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privet: Run
) -> None:
    said = "mit\n[privacy]\nmode = 'none'\x1b[2J"
    about = Description({"F32": 1}, {"license": said, "name": said * 99}, "")
    monkeypatch.setattr(importing, "describe", lambda file: about)
    monkeypatch.setattr(importing, "read_gguf", lambda *_: ({}, None))
    monkeypatch.setattr(importing, "_tied_rows", lambda config: None)
    monkeypatch.setattr(importing, "write_weights", lambda *_: [])
    (tmp_path / "tiny.gguf").touch()
    code, out, _ = privet("base", "import", tmp_path / "tiny.gguf", tmp_path / "small")
    assert code == 0
    assert out.splitlines()[1] == "[model]"
    assert all(0x20 <= ord(character) < 0x7F for character in out.splitlines()[0])
    assert len(json.loads((tmp_path / "small" / SUMMARY).read_text())["name"]) <= 300


def test_no_such_user_is_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no file or directory ~nobody-of-this-name/x"):
        import_base("~nobody-of-this-name/x", tmp_path / "small")


def test_no_file_of_another_place_is_copied(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of whoever imports")
    (tied / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match=r"notes\.txt .* is a link to a file outside"):
        import_base(str(tied), tmp_path / "small")
    (tied / "notes.txt").unlink()
    (tied / "LICENSE").symlink_to(tmp_path / "secret")
    assert licence_files(tied) == []
    import_base(str(tied), tmp_path / "small")
    (tied / "LICENSE").unlink()
    (tied / "LICENSE").symlink_to("README.md")
    assert licence_files(tied) == [tied / "LICENSE"]


def test_the_hubs_cache_keeps_files_beside_a_snapshot(tied: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    snapshot = Path(shutil.copytree(tied, cache / "snapshots" / "main"))
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert import_base(str(snapshot), tmp_path / "small").pins == import_base(str(tied), tmp_path / "other").pins


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(StudyError, match="not installed") as caught:
        import_base(str(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    assert "privet[gguf]" in caught.value.hint
