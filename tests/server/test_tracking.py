"""`privet track`: what is handed on of a released run, what is refused, and what MLflow and TensorBoard read back.

The tools are extras of their own. Without them, the tests that need them are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privet.common.errors import PrivetError, RefusedError, StateError, StudyError, VerificationError
from privet.server.commands.tracking import track
from privet.server.tracking import stores
from privet.server.tracking.figures import Tracked, _point, tracked
from privet.server.tracking.stores import to_mlflow, to_tensorboard
from tests.support.consortium_world import run
from tests.support.logged_world import world_of
from tests.support.masked_world import masked_study


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds with its release. Read only."""
    study = masked_study(
        training={"rounds": 2}, privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
    )
    world = world_of(tmp_path_factory.mktemp("world"), study)
    world.play()
    return world.folder / "run"


def statements(path: Path) -> list[Any]:
    return [json.loads(file.read_bytes()) for file in sorted((path / "rounds").glob("*.json"))]


def test_only_what_is_published_is_handed_on(released: Path) -> None:
    (released / "curve.jsonl").write_text('{"secret": 0.123}')
    found = tracked(released)
    assert [point.round for point in found.points] == [1, 2]
    for point, statement in zip(found.points, statements(released), strict=True):
        assert point.figures["sites"] == len(statement["survivors"])
        assert point.figures["epsilon"] == max(statement["privacy"]["epsilon"].values())
        assert len(point.figures) == 2
    noisy = {"validation_loss": 0.7, "validation_accuracy": 0.6}
    assert _point({**statements(released)[0], "metrics": noisy}).figures.items() > noisy.items()
    assert found.adapter == statements(released)[-1]["adapter_published"]
    assert found.parameters["privacy.epsilon"] == json.dumps(found.study.privacy.epsilon)
    assert set(found.files) == {file.name for file in (released / "release").iterdir()}
    assert "secret" not in repr(found)


def test_what_is_not_a_release_is_refused(released: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(released, tmp_path / name))

    candidate = copied("candidate")
    shutil.rmtree(candidate / "release")
    with pytest.raises(RefusedError, match="has released nothing, so its figures are not published") as caught:
        tracked(candidate)
    assert "privet coordinator resume candidate" in caught.value.hint
    for file, what in (
        ("personal.json", "trained for itself"),
        ("received.json", "received"),
        ("evaluation.json", "evaluation"),
    ):
        own = tmp_path / "own" / file
        own.mkdir(parents=True)
        (own / file).write_text("{}")
        with pytest.raises(RefusedError, match=f"{what}, which stays at the site"):
            tracked(own)
    for number, file in enumerate(("README.md", "adapter_model.safetensors", "lineage.json")):
        changed = copied(f"changed{number}")
        data = (changed / "release" / file).read_bytes()
        (changed / "release" / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(VerificationError):
            tracked(changed)
        (changed / "release" / file).unlink()
        with pytest.raises(VerificationError, match=f"lacks {file}"):
            tracked(changed)
    with pytest.raises(StateError, match="is not a run directory"):
        tracked(tmp_path)


def test_nothing_is_tracked_unasked_or_elsewhere(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudyError, match="expected --mlflow or --tensorboard"):
        run(track, released)
    with pytest.raises(StudyError, match="--experiment: expected --mlflow"):
        run(track, released, "--experiment", "a", "--tensorboard", tmp_path)
    found = tracked(released)
    for uri in ("https://tracking.example.org", "databricks://a", "postgresql://u:p@h/db", "file://host/share"):
        with pytest.raises(StudyError, match="expected sqlite:///FILE") as caught:
            to_mlflow(found, uri)
        assert "p@h" not in caught.value.hint
    of_mlflow: Callable[[Tracked, Path], object] = lambda run, place: to_mlflow(run, str(place))  # noqa: E731
    for package, store in (("mlflow", of_mlflow), ("tensorboard", to_tensorboard)):
        for name in (package, "mlflow.exceptions", "tensorboard.summary.writer.event_file_writer"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(StudyError, match="needs the package") as missing:
            store(found, tmp_path)
        assert f"privet[{package}]" in missing.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_mlflow_s_client_reads_back_what_was_logged(
    released: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    mlflow: Any = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/store/runs.db" if kind == "sqlite" else (tmp_path / "store").as_uri()
    said = run(track, released, "--mlflow", uri).output
    found = tracked(released)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(found.study.name)
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.run_id in said
    assert logged.info.status == "FINISHED"
    assert logged.data.params == dict(found.parameters)
    assert {name: logged.data.tags[name] for name in found.tags} == dict(found.tags)
    for name in found.points[0].figures:
        curve = client.get_metric_history(logged.info.run_id, name)
        assert [(each.step, each.value) for each in curve] == [(p.round, p.figures[name]) for p in found.points]
    listed = {Path(each.path).name for each in client.list_artifacts(logged.info.run_id, "release")}
    assert listed == set(found.files)
    copy = Path(client.download_artifacts(logged.info.run_id, "release/adapter_model.safetensors", str(tmp_path)))
    assert copy.read_bytes() == (released / "release/adapter_model.safetensors").read_bytes()

    with pytest.raises(StateError, match="is in experiment"):
        to_mlflow(found, uri)
    # Half of a run is none.
    monkeypatch.setattr(stores, "_fill", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StateError, match="No space left on device"):
        to_mlflow(found, uri, "another")
    other = client.get_experiment_by_name("another")
    assert list(client.search_runs([other.experiment_id])) == []
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.slow
def test_tensorboard_s_reader_reads_back_what_was_written(released: Path, tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said = run(track, released, "--tensorboard", tmp_path / "logs").output
    found = tracked(released)
    folder = tmp_path / "logs" / found.name
    assert str(folder) in said
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(found.points[0].figures)
    for name in found.points[0].figures:
        curve = [(each.step, each.value, each.wall_time) for each in read.Scalars(name)]
        assert curve == [(p.round, pytest.approx(p.figures[name], rel=1e-6), p.time) for p in found.points]
    (card,) = read.Tensors("model card/text_summary")
    assert card.tensor_proto.string_val[0].decode() == found.card
    (identity,) = read.Tensors("identity/text_summary")
    assert found.adapter in identity.tensor_proto.string_val[0].decode()
    from tensorboard.plugins.hparams import metadata

    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parameters = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: value.string_value for name, value in parameters.items()} == dict(found.parameters)
    with pytest.raises(PrivetError, match="exists already"):
        to_tensorboard(found, tmp_path / "logs")
