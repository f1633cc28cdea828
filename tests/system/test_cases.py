"""Inputs that once failed, kept beside the repository as `../shared/cases`: each behaves as its `expected.txt` says.

Each folder there has a study, a tiny random base and data. Its kind is a test of its own in the part that it concerns;
here the very inputs run, through the commands or through what the commands call. Elsewhere this file is skipped.
"""

from __future__ import annotations

import json
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from privet.client.network import consortium
from privet.client.release.opened import mounted, open_release
from privet.client.training.data import Records, load_records
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.tasks import collate, forward
from privet.common.errors import ProtocolError
from privet.common.pki.certificates import create_authority
from privet.common.pki.enrolment import Nothing, Status
from privet.common.pki.tls import tls_context
from privet.common.study.study import Study
from privet.simulations.data.federation import load_plan
from privet.simulations.deploy import Deployment, free_ports
from tests.conftest import Run
from tests.support.family_table import collect
from tests.support.losses import one_by_one
from tests.support.released import CPU
from tests.support.tiny import random_adapter

CASES = Path(__file__).parents[2].parent / "shared" / "cases"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="the cases lie beside the repository, in ../shared/cases"),
]
Case = Callable[[str], Path]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return a function that copies a case and makes its copy the working directory."""

    def copied(number: str) -> Path:
        folder = tmp_path / number
        shutil.copytree(CASES / number, folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        monkeypatch.chdir(folder)
        return folder

    return copied


def change(folder: Path, old: str, new: str) -> None:
    """Replace a part of the case's study."""
    study = folder / "study.toml"
    text = study.read_text()
    assert old in text
    study.write_text(text.replace(old, new))


def opened(folder: Path) -> tuple[Study, ModelHost, Records]:
    """Return the case's study, its model, and the records of its site."""
    plan = load_plan(folder / "study.toml")
    host = open_host(plan.study, plan.simulation.resources)
    return plan.study, host, load_records(folder / "north" / "train.jsonl", plan.study)[0]


def trains(privet: Run, folder: Path) -> None:
    """Check and simulate the case's study."""
    code, _, told = privet("check", "study.toml")
    assert code == 0, told
    code, _, told = privet("simulate", "study.toml", "--out", "run")
    assert code == 0, told
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").exists()


def refused(privet: Run, *arguments: object) -> str:
    """Run a command that must end with exit code 2, and return its one line of error."""
    code, _, told = privet(*arguments)
    assert code == 2
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    return line


def gradient_error(folder: Path, count: int) -> float:
    """Return the largest relative error of a record's gradient, against plain autograd over one record at a time."""
    study, host, records = opened(folder)
    host.mount(random_adapter(host.spec, scale=0.1))
    features = encode_records(study, host.tokenizer, records)[:count]
    trained = [parameter for _, parameter in host.train_only(host.spec.trained("fedavg"))]
    found = collect(host, features, trained)
    with host.computing():
        expected = one_by_one(host, features, trained)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@contextmanager
def tokens(folder: Path) -> Iterator[tuple[ModelHost, Records, list[int]]]:
    """Yield the model, the records, and the tokens of the first record as they are trained."""
    study, host, records = opened(folder)
    yield host, records, list(encode_records(study, host.tokenizer, records)[0].ids)


@pytest.mark.parametrize("number", ["01", "04", "21"])
def test_what_ended_in_a_traceback_trains(privet: Run, case: Case, number: str) -> None:
    trains(privet, case(number))


def test_03_gradients_are_the_records_own_where_the_first_axis_is_the_token(privet: Run, case: Case) -> None:
    folder = case("03")
    assert gradient_error(folder, 8) < 0.02
    trains(privet, folder)


def test_04_the_system_text_goes_in_front_of_the_question(case: Case) -> None:
    folder = case("04")
    change(folder, "max_length = 32", "max_length = 128")
    with tokens(folder) as (host, records, ids):
        text = host.tokenizer.decode(ids)
    assert text.index("Answer briefly.") < text.index(str(records.rows[0]["prompt"]))


def test_06_an_answer_ends_as_the_template_ends_it(case: Case) -> None:
    with tokens(case("06")) as (host, _, ids):
        end = host.tokenizer("<end_of_turn>", add_special_tokens=False)["input_ids"]
    assert ids[-len(end) :] == end


def test_07_a_tokenizer_without_places_is_refused(privet: Run, case: Case) -> None:
    case("07")
    assert "token-classification needs a fast tokenizer" in refused(privet, "check", "study.toml")


def test_08_words_have_the_pieces_of_running_text(case: Case) -> None:
    with tokens(case("08")) as (host, records, ids):
        running = host.tokenizer(" " + " ".join(records.rows[0]["tokens"]))["input_ids"]
    assert ids == list(running)


@pytest.mark.parametrize("name", ["stray.csv", "backslash.csv"])
def test_09_malformed_quoting_is_refused(privet: Run, case: Case, name: str) -> None:
    case("09")
    line = refused(privet, "data", "study.toml", name)
    assert f"{name} is not a readable CSV file: line 2: text after a closing quote" in line


def test_11_a_tied_head_is_not_trained_in_full(privet: Run, case: Case) -> None:
    case("11")
    assert "lora.modules_to_save: lm_head is tied to the embedding" in refused(privet, "check", "study.toml")


def test_12_an_encoder_decoder_is_refused(privet: Run, case: Case) -> None:
    case("12")
    found = refused(privet, "check", "study.toml")
    assert "model.base: an encoder-decoder; take an encoder or a decoder" in found


def test_14_a_multimodal_checkpoint_trains_its_text_model_alone(privet: Run, case: Case) -> None:
    folder = case("14")
    trains(privet, folder)
    with safe_open(folder / "run" / "adapter" / "adapter_model.safetensors", "np") as file:
        names = list(file.keys())
    assert names
    assert not [name for name in names if "vision" in name]


def test_15_longformer_trains_on_right_gradients(privet: Run, case: Case) -> None:
    # Its `expected.txt` asks for a refusal, since its gradients could not be had. They can by now, a record a pass.
    folder = case("15")
    _, host, _ = opened(folder)
    assert not host.shape.packed
    assert gradient_error(folder, 6) < 0.02
    change(folder, 'precision = "bf16"', 'precision = "fp32"')
    assert gradient_error(folder, 6) < 1e-5
    trains(privet, folder)


def test_16_messages_are_read(privet: Run, case: Case) -> None:
    folder = case("16")
    assert 'data.columns = { messages = "messages" }' in refused(privet, "data", "study.toml", "messages.jsonl")
    change(folder, 'prompt = "prompt"\nanswer = "answer"', 'messages = "messages"')
    code, _, told = privet("data", "study.toml", "messages.jsonl")
    assert code == 0, told


def test_17_integers_are_places_in_the_labels(privet: Run, case: Case) -> None:
    case("17")
    code, out, told = privet("data", "study.toml", "tags.parquet", "--json")
    assert code == 0, told
    assert json.loads(out)


def test_18_a_classifier_works_in_plain_libraries(privet: Run, case: Case) -> None:
    folder = case("18")
    trains(privet, folder)
    code, out, told = privet("export", "run", "sentences", "--json")  # proves itself with sentence-transformers
    assert code == 0, told
    assert json.loads(out)["largest_difference"] <= 1e-4
    change(folder, 'kind = "text-classification"', 'kind = "text-classification"\nhead = "library"\npooling = "cls"')
    shutil.rmtree("run")
    trains(privet, folder)
    code, _, told = privet("export", "run", "merged", "--format", "merged")
    assert code == 0, told
    study, host, records = opened(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    batch = collate(host, encode_records(study, host.tokenizer, records)[:4])
    with mounted(open_release(folder / "run"), CPU) as trained, torch.no_grad():
        expected = forward(trained, batch)
        found = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_20_loopback_goes_direct_and_errors_name_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    tmp_path.joinpath("deployed").mkdir()
    made = Deployment(tmp_path / "deployed")
    try:
        made.found(free_ports(3))
        made.enrol("alder")  # over the network of this machine
    finally:
        made.end_all()
    trusting = tls_context(ssl.PROTOCOL_TLS_CLIENT, create_authority("north", datetime.now(UTC)).certificate)
    with pytest.raises(ProtocolError, match=r"through the proxy 127\.0\.0\.1:9 "):
        consortium._call("coordinator.example:9443", trusting, "/any", Nothing(), Status)


def test_21_all_linear_layers_but_the_head_are_adapted(case: Case) -> None:
    _, host, _ = opened(case("21"))
    kinds = (nn.Linear, Conv1D)
    linear = {
        name.removesuffix(".base_layer") for name, module in host.model.named_modules() if isinstance(module, kinds)
    }
    adapted = {name.partition(".lora_A")[0] for name in host.spec.names if ".lora_A" in name}
    linear = {name for name in linear if ".lora_" not in name and not name.endswith("lm_head")}
    assert adapted == linear
    assert adapted
