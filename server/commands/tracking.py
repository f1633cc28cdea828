"""The command that hands a released run to a tracking tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privet.common.errors import StudyError
from privet.common.options import RunPath
from privet.common.progress import closing, doing


@doing("Checking the release of {run}")
def track(
    run: RunPath,
    mlflow: Annotated[
        str | None,
        typer.Option(
            "--mlflow",
            metavar="URI",
            help="MLflow's store on this machine: sqlite:///FILE, file:///DIR or a directory.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="DIR", help="TensorBoard's log directory.", show_default=False),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="With --mlflow: name of the experiment. Default: the study's name.")
    ] = None,
) -> None:
    """Hand a released run to MLflow or TensorBoard: parameters, published curves, and the released files.

    RUN is a run directory. A run that has released nothing is refused, and so is what belongs to a site. Only figures
    that the release or the round log publishes are written, to files on this machine.
    """
    from privet.server.tracking.figures import tracked
    from privet.server.tracking.stores import to_mlflow, to_tensorboard

    if mlflow is None and tensorboard is None:
        raise StudyError(
            "expected --mlflow or --tensorboard, found neither", f"name a tool: `privet track {run} --tensorboard DIR`"
        )
    if experiment is not None and mlflow is None:
        raise StudyError("--experiment: expected --mlflow beside it", f"leave it out: `privet track {run}`")
    found = tracked(run)
    if mlflow is not None:
        identifier = to_mlflow(found, mlflow, experiment)
        typer.echo(
            closing(
                f"The run {found.name} is in MLflow's store as {identifier}.",
                f"look at it with mlflow ui --backend-store-uri {mlflow}",
            )
        )
    if tensorboard is not None:
        folder = to_tensorboard(found, tensorboard)
        typer.echo(
            closing(f"The run {found.name} is in {folder}.", f"look at it with tensorboard --logdir {tensorboard}")
        )
