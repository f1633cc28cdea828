"""The command line: exit codes, messages, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from privet.common.progress import lasting
from tests.conftest import Run
from tests.simulations.test_simulate import study_file
from tests.support.families import family_base
from tests.support.tiny import class_rows, write_rows


def test_help_names_every_command(privet: Run) -> None:
    code, out, _ = privet("--help")
    assert code == 0
    for name in ("check", "simulate", "predict", "base", "data"):
        assert name in out
        assert privet(name, "--help")[0] == 0
    assert "..." not in out.split("Commands:")[1]  # whole sentences
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in privet("audit", "--help")[1].split("Commands:")[1]
    told = privet("check", "--help")[1]
    assert "The study file (TOML)." in told  # the help of arguments too
    assert "[required]" in told
    assert "\\" not in told


def test_check_says_what_a_study_means(privet: Run, tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}})
    code, out, _ = privet("check", file, "--json")
    meaning = json.loads(out)
    assert code == 0
    assert meaning["bytes_up_per_round_and_site"] == 8 * -(-meaning["trainable_parameters"] // 3)
    assert 7.9 < meaning["privacy"]["epsilon"] <= 8.0
    assert meaning["privacy"]["noise_multiplier"] > 0.3
    code, out, _ = privet("check", file)
    assert code == 0
    assert "noise multiplier" in out
    assert out.splitlines()[-2:] == [
        f"The study is valid: 3 rounds, epsilon {meaning['privacy']['epsilon']:.2f} per record.",
        f"next: simulate it with `privet simulate {file}`; real sites train it with `privet coordinator run {file}`",
    ]
    assert "Real sites will not measure together how good the model is" in " ".join(out.split())
    file.write_text(file.read_text().split("[simulation]")[0])
    assert "next: make the adapter that sites start from" in privet("check", file)[1]


def test_long_work_without_stages_says_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting(between=0.02):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("still at it after 1 s …\nstill at it")


def test_check_ends_with_one_sentence_on_a_base_that_cannot_be_trained(privet: Run, tmp_path: Path) -> None:
    file = study_file(tmp_path, family_base(tmp_path / "base", "t5"), {"lora.targets": ["q", "v"]})
    code, _, err = privet("check", file)
    assert code == 2
    assert err.splitlines()[0] == "error: model.base: an encoder-decoder; take an encoder or a decoder"
    assert len(err.splitlines()) == 2  # and what to do


@pytest.mark.slow
def test_simulate_then_predict(privet: Run, tmp_path: Path, bert: Path) -> None:
    code, out, _ = privet("simulate", study_file(tmp_path, bert), "--out", tmp_path / "run")
    assert code == 0, out
    assert "federated" in out
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    code, out, _ = privet("predict", tmp_path / "run", "--text", "some words to classify", "--json")
    assert code == 0
    (result,) = json.loads(out)
    assert sum(result["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    code, out, _ = privet("simulate", "--resume", tmp_path / "run")
    assert code == 0
    assert "is finished; nothing was changed" in out
    assert out.splitlines()[-1] == f"next: write a report with `privet report {tmp_path / 'run'}`"
    code, out, _ = privet("simulate", "--resume", tmp_path / "run", "--json")
    assert code == 0
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before
    assert json.loads(out.strip().splitlines()[-1])["rounds"] == 3


@pytest.mark.slow
def test_paths_may_be_relative(privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = study_file(tmp_path / "study", bert)
    notes = file.read_text().split("[simulation]")[0]
    (tmp_path / "study" / "notes.toml").write_text(notes + '[simulation]\ndata = "notes"\n')
    monkeypatch.chdir(tmp_path)
    assert privet("simulate", "study/study.toml", "--out", "runs/one")[0] == 0
    assert privet("predict", "runs/one", "--text", "some words")[0] == 0
    # The columns of generated notes are not this study's: the files are found, and then refused.
    code, _, err = privet("simulate", "study/notes.toml", "--out", "runs/two")
    assert code == 2
    assert "the column names text, label" in err
    assert "no data file" not in err


def break_field(folder: Path, base: Path) -> Path:
    return study_file(folder, base, {"training.sampling_rate": 2.0})


def break_key(folder: Path, base: Path) -> Path:
    return study_file(folder, base, {"training.learnrate": 2.0})


def drop_column(folder: Path, base: Path) -> Path:
    file = study_file(folder, base)
    write_rows(folder / "beta.jsonl", [{"text": row["text"], "patient": "p"} for row in class_rows(9)])
    return file


def unknown_label(folder: Path, base: Path) -> Path:
    file = study_file(folder, base)
    write_rows(folder / "beta.jsonl", [{**row, "label": "a-secret-diagnosis"} for row in class_rows(9)])
    return file


def empty_site(folder: Path, base: Path) -> Path:
    file = study_file(folder, base)
    (folder / "beta.jsonl").write_text("")
    return file


def missing_file(folder: Path, base: Path) -> Path:
    file = study_file(folder, base)
    (folder / "beta.jsonl").unlink()
    return file


def nan_loss(folder: Path, base: Path) -> Path:
    return study_file(
        folder,
        base,
        {"lora.alpha": 1e12, "training.optimizer": "sgd", "training.learning_rate": 1e4, "training.local_steps": 3},
    )


def nan_from_the_start(folder: Path, base: Path) -> Path:
    return study_file(folder, base, {"lora.alpha": 1e30, "training.optimizer": "sgd"})


def other_base(folder: Path, base: Path) -> Path:
    copy = shutil.copytree(base, folder / "base")
    file = study_file(folder, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return file


def pickled_base(folder: Path, base: Path) -> Path:
    copy = shutil.copytree(base, folder / "base")
    file = study_file(folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    return file


def too_large_delta(folder: Path, base: Path) -> Path:
    return study_file(folder, base, {"privacy": {"mode": "local", "epsilon": 8.0, "delta": 0.05, "clip_norm": 1.0}})


BAD = [
    (break_field, 2, "training.sampling_rate"),
    (break_key, 2, "training.learnrate: unknown key"),
    (drop_column, 2, "label"),
    (unknown_label, 2, "9"),
    (empty_site, 2, "beta.jsonl"),
    (missing_file, 2, "beta"),
    (nan_loss, 6, "training diverged"),
    (nan_from_the_start, 6, "infinite or not a number before any training"),
    (other_base, 5, "SHA-256"),
    (pickled_base, 2, "safetensors"),
    (too_large_delta, 3, "privacy.delta"),
]


@pytest.mark.parametrize(("broken", "code", "says"), BAD, ids=[case[0].__name__ for case in BAD])
def test_bad_input_ends_clearly_and_leaves_nothing(
    privet: Run, tmp_path: Path, bert: Path, broken: Callable[[Path, Path], Path], code: int, says: str
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    file = broken(folder, bert)
    runs = tmp_path / "runs"
    found, out, err = privet("simulate", file, "--out", runs / "run")
    assert found == code, err
    assert says in err
    assert "\nerror: " in f"\n{err}"
    assert "Traceback" not in err
    assert "secret" not in out + err
    assert not runs.exists() or list(runs.iterdir()) == []


def test_other_mistakes_have_their_codes(privet: Run, tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert)
    assert privet("simulate")[0] == 2
    assert privet("simulate", tmp_path / "none.toml")[0] == 2
    assert privet("simulate", file, "--engine", "steam")[0] == 2
    assert privet("simulate", "--resume", tmp_path)[0] == 6
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert privet("simulate", file, "--out", tmp_path / "taken")[0] == 6
    assert (tmp_path / "taken" / "file").exists()
    code, out, _ = privet("simulate", tmp_path / "none.toml", "--json")
    assert code == 2
    assert json.loads(out)["error"] == "StudyError"
    assert f"; did you mean {file}?" in privet("check", file.with_name(f"a{file.name}"))[2]


def test_slips_in_the_study_and_in_its_simulation_are_named_at_once(privet: Run, tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"training.ruonds": 3}, {"baselnies": ["local"]})
    err = privet("check", file)[2]
    assert "did you mean baselines?" in err
    assert "did you mean rounds?" in err


def test_an_interrupted_command_says_how_to_continue(
    privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("privet.simulations.data.federation.load_plan", "privet.common.cli.build_command"):
        with monkeypatch.context() as stopped:
            stopped.setattr(place, interrupt)
            code, out, err = privet("check", study_file(tmp_path, bert))
        assert (code, out) == (130, "")
        assert err.splitlines()[-1] == "Interrupted. To continue, run the same command again."


def test_a_librarys_warnings_do_not_reach_a_person(privet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(arguments: object) -> Callable[[], None]:
        warnings.warn("`use_return_dict` is deprecated", FutureWarning, stacklevel=2)
        raise SystemExit(0)

    monkeypatch.setattr("privet.common.cli.build_command", build)
    monkeypatch.setattr("sys.warnoptions", [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert privet("serve")[0] == 0
    assert not told


def test_an_interrupted_simulation_says_what_is_kept(
    privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    file, run = study_file(tmp_path, bert), tmp_path / "a run"
    for place in ("runs.simulate.load_plan", "runs.simulate.prepare"):
        with monkeypatch.context() as stopped:
            stopped.setattr(f"privet.simulations.{place}", interrupt)
            code, _, err = privet("simulate", file, "--out", run)
        assert code == 130
        assert "Interrupted. No run directory was made yet" in err
        assert not run.exists()
    monkeypatch.setattr("privet.simulations.runs.simulate.run_simulation", interrupt)
    for arguments in ((file, "--out", run), ("--resume", run)):
        code, _, err = privet("simulate", *arguments)
        assert code == 130
        assert err.endswith(f"{run}: no round is complete yet; continue with `privet simulate --resume '{run}'`.\n")


def test_a_simulation_that_cannot_begin_says_so_before_it_loads_anything(
    privet: Run, tmp_path: Path, bert: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "north.csv").touch()
    code, _, err = privet("simulate", study_file(tmp_path, bert), "--out", tmp_path / "files")
    assert code == 6
    assert "files exists already" in err
    assert "opening" not in err
    assert "None" not in privet("simulate")[2]


def test_an_interrupted_command_of_a_site_or_coordinator_says_nothing_of_simulations(
    privet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "site.toml").write_text('name = "berlin"\ntrain = ["train.csv"]\n')
    monkeypatch.setattr("privet.client.network.serve.serve_site", interrupt)
    code, _, err = privet("site", "serve", tmp_path / "site.toml")
    assert code == 130
    assert "run the same command again" in err
    assert "simulate" not in err


def test_what_the_system_refuses_is_a_message(
    privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "state"))

    monkeypatch.setattr("privet.simulations.data.federation.load_plan", full)
    code, _, err = privet("check", study_file(tmp_path, bert))
    assert code == 6
    assert err.startswith(f"error: {tmp_path / 'state'} cannot be used (No space left on device)\n hint: ")


def test_a_report_is_refused_before_anything_is_computed(privet: Run, tmp_path: Path) -> None:
    code, _, err = privet("report", tmp_path / "absent")
    assert code == 6
    assert "is not a run directory: it does not exist" in err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.json").write_text("{")
    assert f"beside it: {tmp_path / 'run'}; " in privet("report", tmp_path / "absent")[2]
    assert "there is no adapter/adapter_config.json in it" in privet("report", tmp_path / "run")[2]
    for command in (("report", tmp_path), ("predict", tmp_path, "--text", "a")):
        err = privet(*command)[2]
        assert f"; in it: {tmp_path / 'run'}" in err
        assert "backup" not in err  # nothing of a run is in it
    assert "backup" in privet("report", tmp_path / "run")[2]
    (tmp_path / "run").rename(tmp_path / "runs")
    (tmp_path / "runs" / "demo").mkdir()
    (tmp_path / "runs" / "study.json").rename(tmp_path / "runs" / "demo" / "study.json")
    assert f"; in it: {tmp_path / 'runs' / 'demo'}" in privet("report", tmp_path)[2]
    (tmp_path / "file").touch()
    assert "it is a file" in privet("predict", tmp_path / "file", "--text", "a")[2]


def test_base_prints_the_table_that_pins_it(privet: Run, bert: Path, tmp_path: Path) -> None:
    code, out, _ = privet("base", bert)
    assert code == 0
    assert "model.safetensors" in out
    assert privet("base", tmp_path)[0] == 2


def test_data_reports_counts_only(privet: Run, tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert)
    code, out, _ = privet("data", file, tmp_path / "alpha.jsonl")
    assert code == 0
    assert "60 of 60 rows kept" in out
    assert not any(row["text"] in out for row in class_rows(60))
