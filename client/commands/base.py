"""Commands about base models: pin one, import one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import typer

from privet.common.options import Json
from privet.common.progress import doing


@doing("Hashing the files of {directory}")
def base(
    directory: Annotated[Path, typer.Argument(help="A model directory with config.json and *.safetensors.")],
    quantisation: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(
            help="Keep the base's linear layers in few bits while training: nf4 (4.5 bits a value) or int8. The base "
            "is loaded, and the result pinned.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the [model] table that pins a base model in a study file.

    The table names the base and the SHA-256 of every file that decides a token: weights, configurations, vocabularies
    and chat templates. The name is that of the directory. Each site maps it to its own copy, under [resources.bases] in
    its site file. To convert a model from GGUF, pickled weights or an installed package: `privet base import`.
    """
    from privet.client.bases.opened import pin

    pins = pin(directory, lambda line: typer.echo(line, err=True))
    found: dict[str, str] = {}
    if quantisation is not None:
        from privet.client.training.quantised import quantised_digest  # PyTorch, which takes seconds

        typer.echo(f"quantising the base's linear layers to {quantisation}", err=True)
        found = {"quantisation": quantisation, "quantised": quantised_digest(directory, pins, quantisation)}
    _print(directory, pins, {}, as_json, found)


@doing("Importing {source} to {out}")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file; a directory or file of safetensors or pickled weights; or package:NAME, a model inside "
            "an installed Python package.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New directory for the base. Its name is the base's.", metavar="OUT")],
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of the weights: fp32, bf16, or auto (bf16 for quantised weights, else as they are)."
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Convert a model to a pinned base directory of safetensors, and print its [model] table.

    The same source gives the same bytes on every machine with the same versions. Quantised weights are dequantised; the
    file privet-base.json in the directory says from what. Pickled weights are read in a process of their own, without
    network, and only as tensors.
    """
    from privet.client.bases.importing import import_base

    made = import_base(source, out, dtype, lambda line: typer.echo(line, err=True))
    _print(made.directory, made.pins, made.summary, as_json)


def _print(
    directory: Path,
    pins: Mapping[str, str],
    summary: Mapping[str, object],
    as_json: bool,
    quantised: Mapping[str, str] = MappingProxyType({}),
) -> None:
    name, path = directory.resolve().name, str(directory.resolve())
    if as_json:
        typer.echo(json.dumps({"base": name, "directory": path, "sha256": dict(pins), **quantised, **summary}))
        return
    if summary:
        licence = summary.get("licence", "not stated; read the model's own terms")
        typer.echo(f"# {summary['conversion']}; licence: {licence}")
    table = "\n".join(f"{json.dumps(file)} = {json.dumps(digest)}" for file, digest in pins.items())
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"base": name, **quantised}.items())
    typer.echo(f"[model]\n{keys}[model.sha256]\n{table}")
    typer.echo(
        "# each site file, and a simulation's study file under [simulation.resources.bases]:\n"
        f"# [resources.bases]\n# {json.dumps(name)} = {json.dumps(path)}"
    )
