"""Read a GGUF file: the model, its tokenizer and chat template, and what the file says about itself.

`transformers` maps the tensors and the tokenizer; the package `gguf` holds the formats of quantised numbers. Values are
computed by NumPy, element by element, so they depend on no number of threads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from privet.client.bases.written import Read, write_json
from privet.common.errors import StudyError
from privet.common.privacy.accounting import quiet_warnings

_PLAIN = ("F32", "F16", "BF16", "F64")
# What libraries write about the machine, or about themselves.
_INCIDENTAL = (
    "_name_or_path",
    "_model_name_or_path",
    "name_or_path",
    "is_local",
    "local_files_only",
    "backend",
    "transformers_version",
    "quantization_config",
    "torch_dtype",
    "dtype",
)
# How byte-level vocabularies cut text before merging, by the names that files give (llama.cpp, src/llama-vocab.cpp).
# `transformers` knows those that cut by one expression; these cut as GPT-2 does, or first part digits from each other.
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-v2-es", "jina-v2-de", "trillion", "granite-docling")
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@dataclass(frozen=True)
class Description:
    """What a GGUF file says about itself.

    Attributes:
        kinds: Number of tensors of each format of numbers, most frequent first.
        metadata: The entries under `general.` that are text.
        cut: How text is cut before it is tokenised; empty if the vocabulary is not a byte-level one.
    """

    kinds: Mapping[str, int]
    metadata: Mapping[str, str]
    cut: str

    @property
    def quantised(self) -> str:
        """The most frequent quantised format; empty if all numbers are plain."""
        return next((kind for kind in self.kinds if kind not in _PLAIN), "")


def describe(file: Path) -> Description:
    """Read the description of a GGUF file.

    Raises:
        StudyError: The package `gguf` is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError:
        raise StudyError(
            "a GGUF file needs the Python package gguf, which is not installed",
            "install it: pip install 'privet[gguf]'",
        ) from None
    try:
        reader = gguf.GGUFReader(file)
        said = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith("general.") or name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        }
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    except Exception as error:  # the reader checks little: a damaged file fails in NumPy, in enums or in slices
        raise _damaged(file, error) from None
    text = {name.removeprefix("general."): value for name, value in sorted(said.items()) if isinstance(value, str)}
    model, cut = text.pop("tokenizer.ggml.model", ""), text.pop("tokenizer.ggml.pre", "unknown")
    return Description(dict(kinds.most_common()), text, cut if model == "gpt2" else "")


def _damaged(file: Path, error: Exception) -> StudyError:
    reason = " ".join(str(error).split())[:200]
    return StudyError(
        f"{file} cannot be read as a GGUF model: {type(error).__name__}: {reason}",
        "copy the file again; if it is complete, `transformers` cannot read this architecture: take the model in "
        "safetensors format",
    )


def _cut_right(tokenizer: Any, cut: str) -> None:
    """Let a byte-level tokenizer cut text as the file's own does.

    Raises:
        StudyError: It is not known how.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # `transformers` knows the expression
    if cut in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif cut not in _AS_GPT2:
        raise StudyError(
            f"the GGUF file cuts text by a method that is not known here (tokenizer.ggml.pre = {cut!r}), so that its "
            "texts would get other tokens",
            "take this model in safetensors format, with its own tokenizer.json",
        )


def read_gguf(file: Path, cut: str, directory: Path) -> tuple[dict[str, Read], Any]:
    """Read a GGUF model, and write its configuration, tokenizer and chat template into `directory`.

    Args:
        file: The GGUF file.
        cut: How text is cut, from its `Description`.
        directory: Where to write.

    Returns:
        What reads each tensor, by name (float32), and the configuration.

    Raises:
        StudyError: The file is damaged, or of an architecture that `transformers` cannot read.
    """
    options = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    try:
        # A bar of the library's own goes to stderr, whatever its settings say.
        with quiet_warnings(), redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            if cut:
                _cut_right(tokenizer, cut)
            tokenizer.save_pretrained(directory)
    except StudyError:
        raise
    except Exception as error:
        raise _damaged(file, error) from None
    config = model.config
    write_json(
        directory / "config.json", {**_essential(config.to_diff_dict()), "architectures": [type(model).__name__]}
    )
    tokens = {
        key: value for key in ("bos", "eos", "pad") if (value := getattr(config, f"{key}_token_id", None)) is not None
    }
    write_json(directory / "generation_config.json", {f"{key}_token_id": value for key, value in tokens.items()})
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    longest = getattr(config, "max_position_embeddings", None)
    # The name of this class is known to every version of `transformers` and to other libraries.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"model_max_length": longest} if longest else {})
    write_json(directory / "tokenizer_config.json", _essential(settings))
    # Parameters that share memory appear once, under the name of the first. Buffers follow from the configuration.
    return {name: parameter.detach for name, parameter in model.named_parameters()}, config


def _essential(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _INCIDENTAL}
