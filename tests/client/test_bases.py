"""What a base is: every file that decides a token, under a name that each machine maps, and nothing else is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from privet.client.bases import opened
from privet.client.bases.files import SUMMARY, acceptable, decides, deciding, pins_of
from privet.client.bases.names import FOLDERS, as_begun, as_name, completed, keep_bases, kept_bases, locate_base
from privet.client.bases.opened import check_base, open_base
from privet.client.site import Resources, load_site
from privet.client.training import model
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.client.training.verdicts import Verdict
from privet.common.errors import RefusedError, StateError, StudyError, VerificationError
from privet.common.study.sections import ModelSection
from privet.common.study.study import Study, check_shareable
from tests.support.tiny import RECORDS, class_rows, private, site_of, site_toml, tiny_document, tiny_study, worker_of

CPU = Resources(device="cpu", precision="fp32")


@pytest.fixture
def base(bert: Path, tmp_path: Path) -> Path:
    """A base in a directory of its own, called `small`."""
    return Path(shutil.copytree(bert, tmp_path / "small"))


def pinned(base: Path, name: str = "small") -> ModelSection:
    return ModelSection(base=name, sha256=pins_of(base))


# --- what decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("vocab.txt", True),
        ("merges.txt", True),
        ("spiece.model", True),
        ("tokenizer.model.v3", True),
        ("never-heard-of.json", True),
        ("README.md", False),
        ("LICENSE.txt", False),
        (".gitattributes", False),
        ("picture.png", False),
        ("pytorch_model.bin", False),
        ("modules.json", False),
        (SUMMARY, False),
        ("onnx/config.json", False),
    ],
)
def test_what_decides_is_known_by_its_name(name: str, does: bool) -> None:
    assert decides(name) == does


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "a/b.json", "", ".", "additional_chat_templates/../x"]
)
def test_a_pin_names_no_other_place(name: str) -> None:
    assert not acceptable(name)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "additional_chat_templates/tools.jinja", "added_tokens.json", "generation_config.json"],
)
def test_a_file_that_decides_and_is_not_pinned_is_refused_with_the_command_to_run(base: Path, name: str) -> None:
    model, bases = pinned(base), {"small": base}
    open_base(model, bases)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("{}")
    with pytest.raises(VerificationError, match=f"{name} in .* is not pinned") as caught:
        open_base(model, bases)
    assert f"privet base {base}" in caught.value.hint
    open_base(pinned(base), bases)


def test_every_pinned_file_is_compared(base: Path) -> None:
    model = pinned(base)
    for name in model.sha256:
        kept = (base / name).read_bytes()
        (base / name).write_bytes(kept + b" ")
        with pytest.raises(VerificationError, match=f"the file {name} in"):
            open_base(model, {"small": base})
        (base / name).write_bytes(kept)
    open_base(model, {"small": base})


def test_a_library_sees_the_pinned_files_and_no_others(base: Path) -> None:
    # Files that decide nothing for privet, but that a library may one day read.
    for name in ("README.md", "pytorch_model.bin", "modeling_evil.py", "tokenizer.json.bak"):
        (base / name).write_text("x")
    found = open_base(pinned(base), {"small": base})
    assert sorted(file.name for file in found.iterdir()) == deciding(base)
    # What appears after the check does not exist for the library either.
    (base / "chat_template.jinja").write_text("changed")
    assert AutoTokenizer.from_pretrained(found, local_files_only=True).chat_template is None


def test_links_that_a_cleaner_removed_are_made_again(base: Path) -> None:
    first = open_base(pinned(base), {"small": base})
    shutil.rmtree(first.parent.parent)
    again = open_base(pinned(base), {"small": base})
    assert (again / "config.json").is_file()


def test_where_no_links_can_be_made_the_error_says_what_to_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**where: object) -> str:
        raise OSError(28, "No space left on device")

    opened._staged.cache_clear()
    opened._folder.cache_clear()
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StateError, match="No space left") as caught:
        open_base(pinned(base), {"small": base})
    assert "TMPDIR" in caught.value.hint


def test_an_adapter_is_no_base(base: Path) -> None:
    # Libraries lay it over the base, and load the one that it names.
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}')
    with pytest.raises(StudyError, match="holds an adapter"):
        open_base(pinned(base), {"small": base})


def test_a_list_beside_the_model_that_no_library_reads_is_left_alone(base: Path) -> None:
    (base / "data_config.json").write_text("[]")  # as sentence-transformers' training leaves it
    assert not (open_base(pinned(base), {"small": base}) / "data_config.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 10_000])
def test_a_damaged_configuration_ends_in_a_sentence(base: Path, text: str) -> None:
    (base / "config.json").write_text(text)
    with pytest.raises(StudyError, match=r"config\.json is damaged"):
        open_base(pinned(base), {"small": base})


# --- names -----------------------------------------------------------------------------------------------


def test_a_name_leads_to_the_directory_that_the_machine_maps(base: Path) -> None:
    model = pinned(base, "hospital-model")
    assert locate_base(model, {"hospital-model": base}) == base.resolve()
    with pytest.raises(StudyError, match="'hospital-model' is neither") as caught:
        locate_base(model)
    assert '"hospital-model" = "DIRECTORY" under [resources.bases] in the site file' in caught.value.hint
    with pytest.raises(StudyError, match="no such directory"):
        locate_base(model, {"hospital-model": base / "gone"})


def test_a_command_without_a_site_file_looks_where_the_environment_says(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS, f"/nowhere:{base.parent}")
    assert locate_base(pinned(base)) == base.resolve()
    with pytest.raises(StudyError):
        locate_base(pinned(base, "x/../small"))


def test_an_installed_package_that_holds_gguf_only_is_to_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "holds_gguf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StudyError, match="GGUF") as caught:
        locate_base(ModelSection(base="package:holds_gguf", sha256={"config.json": "0" * 64}))
    assert "`privet base import package:holds_gguf DIRECTORY`" in caught.value.hint


def test_a_path_in_a_study_file_becomes_the_directorys_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("./small", "small", str(base)):
        assert as_name(given, base.parent) == ("small", base.resolve())
    monkeypatch.chdir(base.parent)
    assert as_name("./small", Path("/nowhere")) == ("small", base.resolve())
    for name in ("package:small", "someone/small", "other"):
        assert as_name(name, base.parent) is None
    with pytest.raises(StudyError, match="no directory"):
        as_name("./gone", base.parent)


def test_a_site_file_maps_names_relative_to_itself(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('name = "north"\ntrain = ["x.csv"]\n[resources.bases]\n"org/small" = "small"\n')
    resources = load_site(file).resources
    assert resources.bases == {"org/small": base.resolve()}
    assert hash(resources) == hash(load_site(file).resources) != hash(Resources())
    assert "bases" not in Resources().model_dump()  # what was hashed before is hashed the same
    assert resources.knowing({"org/small": Path("/x"), "b": Path("/y")}).bases == {
        "org/small": base.resolve(),
        "b": Path("/y"),
    }


def test_a_run_keeps_where_its_bases_are(base: Path, tmp_path: Path) -> None:
    assert kept_bases(tmp_path) == {}
    keep_bases(tmp_path, {})
    assert not (tmp_path / "bases.json").exists()
    keep_bases(tmp_path, {"small": base})
    assert kept_bases(tmp_path) == {"small": base}
    (tmp_path / "bases.json").write_text("[]")
    with pytest.raises(StateError, match="damaged"):
        kept_bases(tmp_path)


def test_no_path_enters_what_is_published(base: Path) -> None:
    study = tiny_study(base, **{"model.base": "small"})
    host = open_host(study, CPU.knowing({"small": base}))
    text = peft_config_text(host, study)
    assert json.loads(text)["base_model_name_or_path"] == "small"
    assert str(base.parent) not in text + study.model_dump_json()
    assert "privet-bases" not in text


def test_equal_bases_under_other_paths_give_one_study_and_one_adapter(base: Path, tmp_path: Path) -> None:
    study = tiny_study(base, **{"model.base": "small"})
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    made = [initial_adapter(study, open_host(study, CPU.knowing({"small": path}))) for path in (base, moved)]
    assert made[0].digest == made[1].digest


# --- studies of earlier versions, and of researchers -----------------------------------------------------


def test_a_researchers_study_is_completed(base: Path) -> None:
    weights = ModelSection(base="small", sha256={"model.safetensors": pins_of(base)["model.safetensors"]})
    model, added = completed(weights, base)
    assert model.sha256 == pins_of(base)
    assert set(added) == set(pins_of(base)) - {"model.safetensors"}
    assert completed(model, base) == (model, ())


def test_a_study_that_an_earlier_version_began_goes_on(base: Path) -> None:
    whole = pins_of(base)
    old = {name: whole[name] for name in ("model.safetensors", "config.json", "tokenizer.json")}
    study = tiny_study(base, **{"model.base": "small", "model.sha256": old})
    resources = CPU.knowing({"small": base})
    with pytest.raises(VerificationError, match=r"tokenizer_config\.json .* is not pinned"):
        open_host(study, resources)
    open_host(study, resources, begun=True)
    # A study that pins more is one of this version: nothing is added to it.
    newer = ModelSection(base="small", sha256={**old, "tokenizer_config.json": whole["tokenizer_config.json"]})
    (base / "chat_template.jinja").write_text("x")
    assert as_begun(newer, {"small": base}) == newer


@pytest.mark.parametrize("path", ["/models/small", "./small", "~/small", "C:\\models\\small"])
def test_a_real_site_refuses_a_base_that_is_a_path_of_another_machine(base: Path, tmp_path: Path, path: str) -> None:
    document = tiny_document(base, {"model.base": path, "privacy": private()})
    study = Study.parse(document)
    assert study.model.is_path
    site = site_toml(
        tmp_path, "north", class_rows(30), seed=None, limit=RECORDS, studies=[study.digest], declared_count=30
    )
    with pytest.raises(RefusedError, match="by a path of another machine") as caught:
        worker_of(site).offer(study)
    assert "[resources.bases]" in caught.value.hint
    with pytest.raises(StudyError, match="found the path"):
        check_shareable(study)


def test_a_real_site_refuses_a_study_that_pins_less_than_its_base_holds(base: Path, tmp_path: Path) -> None:
    old = {"model.safetensors": pins_of(base)["model.safetensors"], "config.json": pins_of(base)["config.json"]}
    study = tiny_study(base, **{"model.sha256": old, "privacy": private()})
    site = site_toml(
        tmp_path, "north", class_rows(30), seed=None, limit=RECORDS, studies=[study.digest], declared_count=30
    )
    assert not site_of(site).has_begun(study)
    with pytest.raises(VerificationError, match="is not pinned") as caught:
        worker_of(site).offer(study)
    assert "`privet base " in caught.value.hint
    with pytest.raises(StudyError, match="no vocabulary"):
        check_shareable(study)


def test_a_study_that_pins_everything_may_be_shared(base: Path) -> None:
    check_shareable(tiny_study(base))
    with pytest.raises(StudyError, match=r"no config\.json"):
        check_shareable(tiny_study(base, **{"model.sha256": {"model.safetensors": "0" * 64}}))


# --- hostile bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/elsewhere/evil.safetensors", "../evil.safetensors", "deeper/evil.safetensors", 3])
def test_an_index_of_weights_names_no_file_of_another_place(base: Path, name: object) -> None:
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RefusedError, match=r"index\.json .* outside the model's directory"):
        check_base(pinned(base), base)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check_base(pinned(base), base)


@pytest.mark.parametrize(
    ("file", "entry", "value"),
    [
        ("tokenizer_config.json", "fast_tokenizer_files", ["/elsewhere/tokenizer.4.0.0.json"]),
        ("config.json", "configuration_files", ["../config.4.0.0.json"]),
        ("config.json", "transformers_weights", "../evil.safetensors"),
        ("model.safetensors.index.json", "weight_map", "/elsewhere/evil.safetensors"),
    ],
)
def test_a_configuration_names_no_file_of_another_place(base: Path, file: str, entry: str, value: object) -> None:
    document = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / file).write_text(json.dumps({**document, entry: value}))
    with pytest.raises(RefusedError, match="outside the model's directory"):
        check_base(pinned(base), base)


def test_a_versioned_configuration_asks_for_no_code_either(base: Path) -> None:
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**document, "configuration_files": ["config.4.0.0.json"]}))
    (base / "config.4.0.0.json").write_text(json.dumps({**document, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(RefusedError, match="auto_map"):
        check_base(pinned(base), base)


def test_other_weights_under_the_same_names_are_another_model(base: Path) -> None:
    first = open_host(tiny_study(base), CPU, training=False)
    weights = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    second = open_host(tiny_study(base), CPU, training=False)
    assert second is not first
    name = "base_model.model.backbone.embeddings.word_embeddings.weight"
    found = [dict(host.model.named_parameters())[name] for host in (first, second)]
    assert torch.equal(found[0] + 1, found[1])


def test_a_file_whose_time_was_set_back_is_read_again(base: Path) -> None:
    section, file = pinned(base), base / "config.json"
    open_base(section, {"small": base})
    before = file.stat()
    file.write_text(file.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-11'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    with pytest.raises(VerificationError, match=r"config\.json"):
        open_base(section, {"small": base})


def test_the_probe_runs_again_for_other_bytes_of_equal_size_and_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(name: str) -> Verdict:
        asked.append(name)
        return Verdict(packed=False, objection="tried", threads=None, in_parts=False)

    monkeypatch.setattr(model, "recall", noted)
    times = {file.name: file.stat().st_mtime_ns for file in base.iterdir()}
    other = Path(shutil.copytree(base, tmp_path / "other" / "small"))
    config = other / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-11'))
    assert config.read_text() != text
    for file in other.iterdir():
        os.utime(file, ns=(times[file.name], times[file.name]))
    for place in (base, other):
        open_host(tiny_study(place), CPU)
    assert len(set(asked)) == 2
