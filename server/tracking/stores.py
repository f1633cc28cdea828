"""Hand a released run to MLflow, through its own client, or to TensorBoard, as one event file.

Both are packages of their own, in the extras `mlflow` and `tensorboard`. They are loaded here alone, and only when a
person asks. Stores are files of this machine: nothing is sent to another one, and MLflow's telemetry is switched off.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from privet.common.errors import StateError, StudyError
from privet.common.files import make_directory, staged
from privet.server.tracking.figures import Tracked

_BATCH = 100
_UNNAMED = re.compile(r"[^\w\-. /]")
_AGAIN = "it is there already; delete it with the tool first, or name another store"


def to_mlflow(run: Tracked, uri: str, experiment: str | None = None) -> str:
    """Log a run to MLflow: parameters, a curve for each figure, tags, and the released files as artifacts.

    Args:
        run: The run.
        uri: `sqlite:///FILE`, `file:///DIRECTORY`, or the path of a directory.
        experiment: Name of the experiment; None: that of the study.

    Returns:
        MLflow's identifier of the run.

    Raises:
        StudyError: The package is not installed, or the store is not on this machine.
        StateError: The run is in the store already, or the store cannot be written.
    """
    home = _home(uri)
    # Before it is imported: it reads them then. File stores are refused without the third.
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_ALLOW_FILE_STORE="true")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise StudyError(f"MLflow needs the package {error.name}", "run pip install 'privet[mlflow]'") from None
    make_directory(home)
    try:
        client: Any = mlflow.MlflowClient(tracking_uri=uri)
        name = experiment or run.study.name
        found = client.get_experiment_by_name(name)
        place = (home.resolve() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        where = found.experiment_id if found else client.create_experiment(name, artifact_location=place)
        condition = f"tags.`privet.adapter` = '{run.adapter}' and tags.`privet.run` = '{run.name}'"
        if client.search_runs([where], condition, max_results=1):
            raise StateError(f"the run {run.name} is in experiment {name} of {uri}", _AGAIN)
        began = client.create_run(where, start_time=_milliseconds(run.points[0].time), tags=run.tags, run_name=run.name)
        with _whole(client, began.info.run_id):
            _fill(client, mlflow.entities, began.info.run_id, run)
    except MlflowException as error:
        raise StateError(
            f"MLflow's store {uri}: {error.error_code}", "check that the path is a store of MLflow"
        ) from None
    except OSError as error:
        raise StateError(
            f"MLflow's store {uri} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None
    return str(began.info.run_id)


def _home(uri: str) -> Path:
    """Return the directory of a store on this machine."""
    kind, _, rest = uri.partition(":")
    if kind == "sqlite" and rest.startswith("///"):
        return Path(unquote(rest[3:])).parent
    parts = urlsplit(uri)
    if parts.scheme == "file" and not parts.netloc:
        return Path(unquote(parts.path))
    if "://" not in uri:
        return Path(uri)
    raise StudyError(
        f"--mlflow: expected sqlite:///FILE, file:///DIRECTORY or a directory, found {uri}",
        "privet writes to this machine alone: name a store here, and move its runs with MLflow's own tools",
    )


@contextmanager
def _whole(client: Any, run: str) -> Iterator[None]:
    """Delete MLflow's run if the block fails: half of a run would look like one."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            client.delete_run(run)
        raise


def _fill(client: Any, entities: Any, identifier: str, run: Tracked) -> None:
    parameters = [entities.Param(_UNNAMED.sub("_", name), text) for name, text in run.parameters.items()]
    curves = [
        entities.Metric(name, value, _milliseconds(point.time), point.round)
        for point in run.points
        for name, value in point.figures.items()
    ]
    for first in range(0, len(parameters), _BATCH):
        client.log_batch(identifier, params=parameters[first : first + _BATCH])
    for first in range(0, len(curves), _BATCH):
        client.log_batch(identifier, metrics=curves[first : first + _BATCH])
    for file in run.files:
        client.log_artifact(identifier, str(run.folder / file), "release")
    client.set_terminated(identifier, "FINISHED", _milliseconds(run.points[-1].time))


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def to_tensorboard(run: Tracked, folder: Path) -> Path:
    """Write a run as an event file: a curve for each figure, the parameters as hyperparameters, the card as text.

    Args:
        run: The run.
        folder: TensorBoard's log directory. The run has a directory of its own in it.

    Returns:
        That directory.

    Raises:
        StudyError: The package is not installed.
        StateError: The directory exists already, or cannot be written.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError as error:
        raise StudyError(
            f"TensorBoard needs the package {error.name}", "run pip install 'privet[tensorboard]'"
        ) from None
    target = folder / run.name
    make_directory(folder)
    try:
        with staged(target, _AGAIN) as staging:
            writer = EventFileWriter(str(staging))
            try:
                for event in _events(run):
                    writer.add_event(event)
            finally:
                writer.close()
    except OSError as error:
        raise StateError(
            f"{target} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None
    return target


def _events(run: Tracked) -> Iterator[Any]:
    """Yield TensorBoard's events. Their formats are protocol buffers of the package."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    began = run.points[0].time if run.points else time.time()
    for tag, text in (("model card", run.card), ("identity", _table({**run.tags}))):
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=plugin, tensor=tensor)
        yield Event(wall_time=began, step=0, summary=Summary(value=[value]))
    yield Event(wall_time=began, step=0, summary=hparams_pb(dict(run.parameters), start_time_secs=began))
    for point in run.points:
        values = [Summary.Value(tag=name, simple_value=figure) for name, figure in point.figures.items()]
        yield Event(wall_time=point.time, step=point.round, summary=Summary(value=values))


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
