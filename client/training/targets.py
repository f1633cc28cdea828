"""Which layers of a base get an adapter, and PEFT's configuration of it.

Names of a study are resolved here and not by PEFT, which ignores names that match nothing and takes names as regular
expressions. A name matches a module whose own name is it, or ends with a dot and it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from privet.client.training.quantised import QuantisedLinear
from privet.common.errors import StudyError
from privet.common.study.sections import ALL_LINEAR, LoraSection, TaskSection

_LISTED = 20
# A module's layer: the first number in its name that is not at the start, as PEFT has it.
_NUMBERED = re.compile(r".*?\.[^.]*\.(\d+)\.")


def lora_config(lora: LoraSection, task: TaskSection, model: nn.Module) -> LoraConfig:
    """Return PEFT's configuration of the study's adapter for a base.

    Raises:
        StudyError: A name of the study matches no layer, or one that cannot have what the study asks for; the study
            adapts more layers than the base has.
    """
    top = _top_layers(lora, model)
    head = () if task.generates else ("classifier",)
    saved = list(dict.fromkeys((*head, *_saved_names(lora, model))))
    chosen = adapted_names(lora, model, saved, top)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=bool(lora.rslora),
        rank_pattern=_pattern("rank_pattern", lora.rank_pattern, chosen),
        alpha_pattern=_pattern("alpha_pattern", lora.alpha_pattern, chosen),
        target_modules=_peft_targets(lora, model, chosen),
        modules_to_save=saved or None,
        layers_to_transform=top,
        task_type="CAUSAL_LM" if task.generates else None,
    )


def adapted_names(
    lora: LoraSection, model: nn.Module, saved: Collection[str], top: Collection[int] | None
) -> tuple[str, ...]:
    """Return the names of the modules that get an adapter, in the model's order.

    Args:
        lora: The study's adapter.
        model: The base.
        saved: Names of modules that are trained in full, and so have no adapter.
        top: Numbers of the layers that get one; None for every layer, numbered or not.

    Raises:
        StudyError: A target matches no linear layer.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not any(_inside(name, each) for each in saved) and (top is None or _layer(name) in top)
    }
    linear = [name for name, module in modules.items() if _is_linear(module)]
    # Experts see the tokens that are routed to them, and layers outside the numbered ones are heads and projections.
    inner = {name for name in linear if _layer(name) is not None and ".experts." not in name}
    chosen: set[str] = set()
    for target in lora.targets:
        found = inner if target == ALL_LINEAR else {name for name in modules if _matches(name, target)}
        if not found:
            raise _unknown("targets", [target], linear)
        for name in sorted(found):
            _check_linear(target, modules[name], linear)
        chosen |= found
    return tuple(name for name in modules if name in chosen)


def short_names(names: Iterable[str]) -> str:
    """Return the distinct last parts of module names, at most 20."""
    distinct = sorted({name.rpartition(".")[2] for name in names})
    more = f" and {len(distinct) - _LISTED} more" if len(distinct) > _LISTED else ""
    return ", ".join(distinct[:_LISTED]) + more


def _check_linear(target: str, module: nn.Module, linear: Sequence[str]) -> None:
    if isinstance(module, nn.Embedding):
        raise StudyError(
            f"lora.targets: expected the names of linear layers, found {target}, the name of an embedding layer",
            "name the embedding layer in lora.modules_to_save of the study instead",
        )
    if not _is_linear(module):
        raise StudyError(
            f"lora.targets: {target} is no linear layer of the base model (it is a {type(module).__name__}); its "
            f"linear layers are {short_names(linear)}",
            "name linear layers in lora.targets of the study",
        )


def _saved_names(lora: LoraSection, model: nn.Module) -> list[str]:
    """Return the names of the modules to train in full, as PEFT takes them: it compares ends of names.

    Raises:
        StudyError: A name matches no module with values, or one that shares values with others.
    """
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    # As PEFT compares, a part of the last word is enough.
    found = {wanted: [name for name in names if name.endswith(wanted)] for wanted in lora.modules_to_save}
    few = [name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)]
    if cut := [wanted for wanted in lora.modules_to_save if any(_inside(name, wanted) for name in few)]:
        raise StudyError(
            f"lora.modules_to_save: {', '.join(cut)} holds layers that model.quantisation keeps in few bits, and those "
            "cannot be trained in full",
            "remove it from lora.modules_to_save, or model.quantisation and model.quantised from the study",
        )
    if unknown := [wanted for wanted, matches in found.items() if not matches]:
        raise _unknown("modules_to_save", unknown, names)
    saved: list[str] = []
    for wanted, matches in found.items():
        outer = [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
        _check_untied(wanted, outer, model)
        # A module and a part of it would each get a copy, of which the model uses one: the outer ones are named.
        saved += [wanted] if outer == matches else outer
    return saved


def _check_untied(wanted: str, outer: Sequence[str], model: nn.Module) -> None:
    """Refuse modules that share values with others: training would change one of them alone."""
    mine = {id(p) for name in outer for p in model.get_submodule(name).parameters()}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name == each or name.startswith(f"{each}.") for each in outer):
            continue
        if any(id(parameter) in mine for parameter in module.parameters(recurse=False)):
            other = "the embedding" if isinstance(module, nn.Embedding) else name.rpartition(".")[2]
            raise StudyError(
                f"lora.modules_to_save: {wanted} is tied to {other}: both have the same values, and training would "
                "part them",
                f"remove {wanted} from lora.modules_to_save in the study, and add it to lora.targets if it is linear",
            )


def _unknown(field: str, names: Sequence[str], known: Iterable[str]) -> StudyError:
    kinds = "linear layers" if field == "targets" else "adapted layers" if "pattern" in field else "layers"
    listed = short_names(known)
    return StudyError(
        f"lora.{field}: the base model has no layer {', '.join(names)}"
        + (f"; its {kinds} are {listed}" if listed else f", and no {kinds}"),
        "correct the names in the study",
    )


def _top_layers(lora: LoraSection, model: nn.Module) -> list[int] | None:
    """Return the numbers of the layers that get an adapter; None for all."""
    if lora.layers is None:
        return None
    layers = getattr(model.config, "num_hidden_layers", None)
    numbers = {_layer(name) for name, module in model.named_modules() if _is_linear(module)}
    if not isinstance(layers, int) or not set(range(layers)) <= numbers:
        raise StudyError(
            "lora.layers: the top layers of the base model cannot be told: its linear layers are not numbered by layer",
            "remove lora.layers from the study, so that every layer gets an adapter",
        )
    if lora.layers > layers:
        raise StudyError(
            f"lora.layers: expected at most {layers}, the number of layers of the base model, found {lora.layers}",
            "lower lora.layers in the study",
        )
    return list(range(layers - lora.layers, layers))


def _pattern(field: str, pattern: Mapping[str, float], chosen: Sequence[str]) -> dict[str, float]:
    """Return a pattern as PEFT takes it: regular expressions, of which a layer matches one at most."""
    matched: dict[str, str] = {}
    for key in sorted(pattern):
        found = [name for name in chosen if _matches(name, key)]
        if not found:
            raise _unknown(field, [key], chosen)
        if twice := next((name for name in found if name in matched), None):
            raise StudyError(
                f"lora.{field}: {matched[twice]} and {key} both name the layer {twice}",
                "name each layer once",
            )
        matched |= dict.fromkeys(found, key)
    return {re.escape(key): pattern[key] for key in sorted(pattern)}


def _peft_targets(lora: LoraSection, model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """Return what PEFT is told: the study's names, or for all linear layers those that mean them and nothing else."""
    if ALL_LINEAR not in lora.targets:
        return list(lora.targets)
    last = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name, _ in model.named_modules() if any(_matches(name, each) for each in last)}
    return last if all(name in chosen for name in meant) else list(chosen)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _layer(name: str) -> int | None:
    found = _NUMBERED.match(name)
    return int(found[1]) if found else None


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _inside(name: str, wanted: str) -> bool:
    return f".{wanted}." in f".{name}."
