"""What an export says about itself: the model card, the licence of the base, and a Modelfile for Ollama."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privet.client.bases.files import is_own
from privet.client.release.opened import Release
from privet.common.audit.card import lineage_of, model_card
from privet.common.audit.privacy_statement import privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import CARD, LINEAGE, PRIVACY
from privet.common.canonical import canonical_json
from privet.common.study.study import Study

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
_CHECKING = "\n## Checking it\n"
LOADING = {
    ("peft", "causal-lm"): "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), HERE)",
    ("peft", "token-classification"): (
        "PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(BASE, num_labels=LABELS), HERE)"
    ),
    ("peft", "text-classification"): (
        "PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=LABELS), HERE)"
    ),
    ("merged", "causal-lm"): "AutoModelForCausalLM.from_pretrained(HERE)",
    ("merged", "token-classification"): "AutoModelForTokenClassification.from_pretrained(HERE)",
    ("merged", "text-classification"): "AutoModelForSequenceClassification.from_pretrained(HERE)",
    ("gguf", "causal-lm"): "llama-server -m HERE/model.gguf",
    ("sentence-transformers", "text-classification"): "SentenceTransformer(HERE).encode(texts)",
}
"""How plain tools load an export, by format and kind of task; all language models load alike."""


def base_name(study: Study) -> str:
    """Return the base's name without the directories of one machine."""
    name = study.model.base
    is_path = name.startswith(("/", ".", "~")) or Path(name).is_dir()
    return Path(name).name if is_path else name


def release_documents(release: Release) -> dict[str, bytes]:
    """Return the card, lineage and privacy statement of a trained adapter, by file name.

    They are those of its release. A run that released nothing gets those that follow from its rounds.
    """
    for folder in (release.path / "release", release.path):
        if (folder / CARD).is_file():
            names = (CARD, LINEAGE, f"{PRIVACY}.json", f"{PRIVACY}.md")
            return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    study = release.study
    statements = [json.loads(file.read_bytes()) for file in sorted((release.path / "rounds").glob("*.json"))]
    if not any(statement["type"] == "round-close" for statement in statements):
        return {CARD: f"# {study.name}\n\nNo round of this study was closed.\n".encode()}
    privacy = privacy_document(study, statements, simulated=(release.path / "study.toml").is_file())
    lineage = lineage_of(study, release.path.name, statements)
    return {
        CARD: model_card(study, lineage, privacy, statements).encode(),
        LINEAGE: canonical_json(lineage) + b"\n",
        f"{PRIVACY}.json": canonical_json(privacy) + b"\n",
        f"{PRIVACY}.md": privacy_markdown(privacy).encode(),
    }


def licence_files(base: Path) -> list[Path]:
    """Return the files of a base's directory that hold its licence and notices. Links to other places are none."""
    return sorted({file for pattern in _LICENCES for file in base.glob(pattern) if file.is_file() and is_own(file)})


def licence_line(base: Path, study: Study) -> str:
    """Return what is known of the base's licence, as a sentence."""
    if files := licence_files(base):
        return f"The licence of the base is in {', '.join(f'`{file.name}`' for file in files)}."
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() and is_own(card) else ""
    named = re.search(r"^license:\s*(\S+)", text.partition("\n---")[0], re.MULTILINE)
    if named:
        return f"The base names its licence as `{named[1]}`. Its text is not among the base's files."
    return f"The base `{base_name(study)}` comes without a licence file. Its licence applies to these weights too."


def export_card(
    release: Release, text: str, base: Path, form: str, proof: Mapping[str, Any], stops: Sequence[str]
) -> str:
    """Return the model card of an export.

    Args:
        release: The trained adapter.
        text: Its own card.
        base: Directory of the base.
        form: Format of the export.
        proof: What was compared (`export.json`).
        stops: Stop tokens.
    """
    study = release.study
    loaded = "causal-lm" if study.task.generates else study.task.kind
    library = {"merged": "transformers", "gguf": "gguf"}.get(form, form)
    body = text.replace(study.model.base, base_name(study)).partition(_CHECKING)[0]
    body = re.sub(r"^library_name: .*$", f"library_name: {library}", body, count=1, flags=re.MULTILINE)
    size = f"The largest difference of logits is {proof['largest_difference']:.2g}"
    if proof["relative"]:
        size += f" of the largest logit, with a bound of {proof['bound']:g} of it"
    else:
        size += f", with a bound of {proof['bound']:g}"
    lines = [
        body.rstrip(),
        "",
        "## This export",
        "",
        f"* Format: `{form}`, weights in {proof['dtype']}.",
        f"* Load it with `{LOADING[form, loaded].replace('LABELS', str(len(study.task.labels)))}`.",
        f"* Loaded so, it was compared with the trained adapter on {proof['inputs']} fixed inputs, in "
        f"{proof['computed']}. {size}.",
        f"* {licence_line(base, study)}",
        "* `study.json` is the study, with the SHA-256 of each file of the base.",
    ]
    if study.task.generates:
        lines += [f"* An answer ends at {', '.join(f'`{stop}`' for stop in stops)}."] if stops else []
        if study.task.system_prompt:
            quoted = "\n".join(f"> {line}" for line in study.task.system_prompt.splitlines())
            lines += ["", "## Default system message", "", "It was trained with this system message:", "", quoted]
    else:
        unicode = "" if study.data.unicode == "none" else f", normalised to Unicode {study.data.unicode}"
        lines += [
            f"* Labels, in the order of the logits: {', '.join(f'`{label}`' for label in study.task.labels)}.",
            f"* It was trained on texts of at most {study.data.max_length} tokens{unicode}, white space collapsed.",
        ]
    return "\n".join(lines) + "\n"


def modelfile(study: Study, weights: str, stops: Sequence[str]) -> str:
    """Return a Modelfile, from which `ollama create NAME -f Modelfile` makes a model.

    Args:
        study: Names the system message.
        weights: Path of the weights beside the Modelfile.
        stops: Stop tokens.
    """
    lines = [f"FROM {weights}"]
    if study.task.system_prompt:
        # Three quotes would end the text, and what follows would be an instruction.
        quoted = re.sub('"{2,}', '"', study.task.system_prompt)
        quoted += " " * quoted.endswith('"')
        lines.append(f'SYSTEM """{quoted}"""')
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"
