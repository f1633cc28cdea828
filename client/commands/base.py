"""Commands about base models: pin one, import one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from privet.common.options import Json
from privet.common.progress import doing


@doing("Hashing the files of {directory}")
def base(
    directory: Annotated[Path, typer.Argument(help="A model directory with config.json and *.safetensors.")],
    as_json: Json = False,
) -> None:
    """Print the [model] table that pins a base model in a study file.

    The table names the base and the SHA-256 of every file that decides a token: weights, configurations, vocabularies
    and chat templates. The name is that of the directory. Each site maps it to its own copy, under [resources.bases] in
    its site file. To convert a model from GGUF, pickled weights or an installed package: `privet base import`.
    """
    from privet.client.bases.opened import pin

    pins = pin(directory, lambda line: typer.echo(line, err=True))
    _print(directory, pins, {}, as_json)


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


def _print(directory: Path, pins: Mapping[str, str], summary: Mapping[str, object], as_json: bool) -> None:
    name, path = directory.resolve().name, str(directory.resolve())
    if as_json:
        typer.echo(json.dumps({"base": name, "directory": path, "sha256": dict(pins), **summary}))
        return
    if summary:
        licence = summary.get("licence", "not stated; read the model's own terms")
        typer.echo(f"# {summary['conversion']}; licence: {licence}")
    table = "\n".join(f"{json.dumps(file)} = {json.dumps(digest)}" for file, digest in pins.items())
    typer.echo(f"[model]\nbase = {json.dumps(name)}\n[model.sha256]\n{table}")
    typer.echo(
        "# each site file, and a simulation's study file under [simulation.resources.bases]:\n"
        f"# [resources.bases]\n# {json.dumps(name)} = {json.dumps(path)}"
    )
