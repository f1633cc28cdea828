"""Write a merged causal language model as GGUF, the format of llama.cpp and Ollama.

The format, its keys and tensor names are those of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md);
the package `gguf` writes the bytes. Matrices are stored in F16, vectors in F32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from privet.common.errors import RefusedError, StudyError

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's name of the architecture, by `model_type`."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the ways to split a text before byte-pair encoding, by the pattern that a tokenizer splits at.
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def _refused(what: str) -> RefusedError:
    return RefusedError(
        f"--format gguf: {what}",
        "use `privet export RUN OUT --format merged`, and convert that directory with llama.cpp's own script",
    )


def check_family(model: Any, tokenizer: Any) -> str:
    """Return GGUF's name of a model's architecture, after checking that model and tokenizer can be written.

    Raises:
        RefusedError: They cannot.
        StudyError: The package `gguf` is not installed.
    """
    try:
        import gguf  # noqa: F401 - only whether it is there
    except ImportError:
        raise StudyError("--format gguf needs the package gguf", "run pip install 'privet[export]'") from None
    config = model.config
    if config.model_type not in FAMILIES:
        raise _refused(f"the base is of the family {config.model_type}; supported are {', '.join(FAMILIES)}")
    kind = _rope(config).get("rope_type", "default")
    if kind != "default":
        raise _refused(f"the base scales its rotary positions by the method {kind}; only plain ones are supported")
    if getattr(config, "attention_bias", False) and FAMILIES[config.model_type] == "llama":
        raise _refused("the base has biases in its attention, which this family does not have in GGUF")
    _pre_tokenizer(tokenizer)
    return FAMILIES[config.model_type]


def _rope(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None)
    return found if isinstance(found, dict) else {}


def _pre_tokenizer(tokenizer: Any) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits text."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    split = document.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    if document["model"]["type"] != "BPE" or "ByteLevel" not in kinds or steps[-1].get("add_prefix_space"):
        raise _refused("the tokenizer is not a byte-level BPE without prefix space, the only kind that is supported")
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(steps[0]["pattern"].get("Regex"))):
        return name
    raise _refused("the tokenizer splits text in a way for which llama.cpp's name is not known here")


def write_gguf(model: Any, tokenizer: Any, path: Path, name: str) -> None:
    """Write a merged model and its tokenizer.

    Args:
        model: A causal language model of one of `FAMILIES`, in float32.
        tokenizer: Its tokenizer.
        path: New file.
        name: The model's name.

    Raises:
        RefusedError: Model or tokenizer cannot be written as GGUF.
        StudyError: The package `gguf` is not installed.
    """
    kind = check_family(model, tokenizer)
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    _write_settings(writer, model.config)
    _write_tokenizer(writer, tokenizer, int(model.config.vocab_size))
    for found, array in _tensors(model, kind):
        writer.add_tensor(found, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: Any, config: Any) -> None:
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in document["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(rows):
        if number in added:
            kinds.append(_CONTROL if added[number]["special"] else _USER)
        else:
            kinds.append(_NORMAL if number in names else _UNUSED)
        tokens.append(names.get(number, f"[PAD{number}]"))
    merges = [each if isinstance(each, str) else " ".join(each) for each in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Any, kind: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Return names and values as GGUF has them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == kind)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found = []
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _refused(f"GGUF's family {kind} has no tensor for the base's {name}")
        array = tensor.detach().float().cpu().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _interleaved(array, heads)
        found.append((target, array.astype(np.float16) if array.ndim > 1 else array))
    return found


def _interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of a query or key matrix [heads * width, d].

    Transformers rotates position i of a head with i + width/2; llama.cpp's Llama rotates 2i with 2i + 1.
    """
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))
