"""`privet serve`, as a process, asked over HTTP by the `openai` client."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers

from privet.client.release.applied import predict
from privet.client.release.opened import mounted, open_release
from privet.client.release.server import read_token
from privet.common.errors import RefusedError, StateError
from tests.conftest import Run
from tests.support.forks import Forks
from tests.support.released import CPU, run_of
from tests.support.tiny import tiny_base

SECRET = "man chest pain since monday"
TOKEN = "a-token-of-some-length"


@dataclass
class Server:
    """A server in a process of its own, and a client of it."""

    url: str
    client: Any
    runs: list[Path]
    log: Path

    def ask(self, model: str, **more: object) -> str:
        asked = self.client.chat.completions.create(model=model, messages=[{"role": "user", "content": SECRET}], **more)
        return str(asked.choices[0].message.content)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Server]:
    """Two adapters, of different ranks, over one base that takes 4096 tokens."""
    folder = tmp_path_factory.mktemp("served")
    base = tiny_base(folder / "base", "llama", chat=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    runs = [run_of(folder / "one", base, "causal-lm", seed=1)[0]]
    runs.append(run_of(folder / "two", base, "causal-lm", {"lora.rank": 3, "task.system_prompt": "lunch"}, 2)[0])
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    arguments = ("serve", *runs, "--port", 0, "--token-file", token, "--counts", folder / "counts")
    arguments = (*arguments, "--queue", 0, "--max-tokens", 3000)
    reading, writing = os.pipe()
    with open(reading) as output, (folder / "log").open("wb") as log:  # noqa: PTH123 - no path
        with open(writing, "wb") as theirs:  # noqa: PTH123
            process = forks.start(arguments, os.environ, theirs, errors=log)
        try:
            lines = [output.readline().split() for _ in range(3)]
            assert lines[0][:1] == ["address"], (folder / "log").read_text()
            url = lines[0][1]
            assert TOKEN not in str(lines)
            client = openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=60)
            yield Server(url, client, runs, folder / "log")
        finally:
            ended = time.time()
            process.terminate()
            assert process.wait(30) == 0
    kept = {file.name for file in (folder / "counts").glob("*.*") if not file.name.startswith(".")}
    assert kept == {f"{name}.{ending}" for name in ("one", "two", "base") for ending in ("counts.json", "prom")}
    assert (folder / "counts/one.counts.json").stat().st_mtime >= ended - 1  # kept at the end, not only now and then


pytestmark = pytest.mark.slow


def test_the_models_are_the_runs_and_the_base(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert [model.id for model in server.client.models.list()] == ["one", "two", "base"]
    assert server.client.models.retrieve("two").id == "two"


def test_each_model_answers_as_it_predicts(server: Server) -> None:
    found = {name: server.ask(name) for name in ("one", "two", "base", "one")}
    for run in server.runs:
        release = open_release(run)
        with mounted(release, CPU, scoring=False) as host:
            (expected,) = predict(host, release.study, [SECRET])
        assert found[run.name] == expected["answer"]
    assert len(set(found.values())) == 3


def test_a_stream_has_the_pieces_of_the_answer(server: Server) -> None:
    whole = server.ask("one", max_tokens=40)
    events = list(
        server.client.chat.completions.create(
            model="one",
            messages=[{"role": "user", "content": [{"type": "text", "text": SECRET}]}],
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces).strip() == whole
    assert len([piece for piece in pieces if piece]) > 3
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason in ("stop", "length")
    usage = events[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 40
    stopped = server.ask("one", max_tokens=40, stop=[whole[10:13]])
    assert stopped == whole[: whole.find(whole[10:13])].strip()


def test_completions_take_plain_text(server: Server) -> None:
    asked = {"model": "base", "prompt": SECRET, "max_tokens": 8}
    found = server.client.completions.create(**asked)
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    streamed = server.client.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].text for event in streamed).strip() == found.choices[0].text


def test_a_seed_decides_the_draws(server: Server) -> None:
    first, again, other = (server.ask("one", temperature=1.5, seed=seed, max_tokens=30) for seed in (1, 1, 2))
    assert first == again != other


def test_a_conversation_has_several_turns(server: Server) -> None:
    turns = [("system", "work"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    found = server.client.chat.completions.create(
        model="two", messages=[{"role": role, "content": text} for role, text in turns], max_tokens=4
    )
    assert found.usage is not None
    assert found.usage.completion_tokens == 4


def test_errors_have_openai_s_form(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has one, two, base"):
        server.ask("three")
    with pytest.raises(openai.BadRequestError, match="at most 3000"):
        server.ask("one", max_tokens=3001)
    with pytest.raises(openai.BadRequestError, match="does not support it"):
        server.ask("one", logprobs=True)
    with pytest.raises(openai.BadRequestError, match=r"temperature: Input should be") as refused:
        server.ask("one", temperature=3.0)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="room for 4096 tokens") as refused:
        server.client.completions.create(model="one", prompt=SECRET * 2000, max_tokens=9)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="at most 1048576 bytes") as large:
        server.client.completions.create(model="one", prompt="a" * 2**21, max_tokens=9)
    assert large.value.status_code == 413
    other = openai.OpenAI(base_url=server.url, api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="bearer token"):
        other.models.list()
    with pytest.raises(urllib.error.HTTPError) as bare:
        urllib.request.urlopen(f"{server.url}/models")  # noqa: S310 - the server's own address
    assert bare.value.code == 401
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model="one", input="a")


def test_whoever_leaves_stops_the_answer_and_a_full_queue_refuses(server: Server) -> None:
    def long() -> Any:
        return server.client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": SECRET}], max_tokens=800, stream=True
        )

    began = time.monotonic()
    assert sum(1 for _ in long()) > 300, "the answer is too short to show anything"
    whole = time.monotonic() - began
    running = long()
    assert next(iter(running)).object == "chat.completion.chunk"
    with pytest.raises(openai.RateLimitError, match="waiting"):
        server.ask("one")
    running.close()
    _until_free(server, whole / 2)
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).chat.completions.create(
            model="base", messages=[{"role": "user", "content": SECRET}], max_tokens=3000
        )
    _until_free(server, whole / 2)


def _until_free(server: Server, seconds: float) -> None:
    """Wait until the server takes a request, for less time than a whole long answer takes."""
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        try:
            server.ask("one", max_tokens=1)
        except openai.RateLimitError:
            time.sleep(0.02)
        else:
            return
    pytest.fail("the server is still busy")


def test_nothing_of_a_prompt_is_logged(server: Server) -> None:
    answer = server.ask("one", max_tokens=20)
    text = server.log.read_text()
    assert "POST /v1/chat/completions: 200" in text
    assert not any(part in text for part in (SECRET, answer, TOKEN, "Traceback"))


def test_answers_are_counted_for_whoever_has_the_token(server: Server) -> None:
    for _ in range(10):
        server.ask("two", max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model="two", prompt="", max_tokens=2)
    address = server.url.removesuffix("/v1") + "/metrics"
    asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})  # noqa: S310 - its own
    with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
        text = answer.read().decode()
    # How many have a length or an ending is shown in steps of ten; other tests ask this model, too.
    inputs = next(line for line in text.splitlines() if line.startswith('privet_model_inputs_total{model="two"}'))
    assert float(inputs.split()[1]) >= 10
    assert 'privet_model_predictions_total{class="cut",model="two"} 10.0' in text
    assert 'privet_model_refused_total{model="two",reason="no_text"} 1.0' in text
    assert 'privet_model_answer_tokens_bucket{le="2.0",model="two"} 10.0' in text
    assert SECRET.split()[1] not in text
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address, timeout=10)  # noqa: S310
    assert refused.value.code == 401


def test_what_cannot_be_served_is_refused(privet: Run, tmp_path: Path, bert: Path, llama: Path) -> None:
    classifier, _ = run_of(tmp_path / "classifier", bert, "text-classification")
    code, _, err = privet("serve", classifier, "--port", "0")
    assert code == RefusedError.exit_code
    assert "privet predict RUN" in err
    one, _ = run_of(tmp_path / "one", llama, "causal-lm")
    (tmp_path / "other").mkdir()
    copy = shutil.copytree(one, tmp_path / "other" / "one")
    code, _, err = privet("serve", one, copy, "--port", "0")
    assert code == 2
    assert "different names" in err
    base = tiny_base(tmp_path / "base", "llama")
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base)).save_pretrained(base)
    two, _ = run_of(tmp_path / "two", base, "causal-lm")
    code, _, err = privet("serve", one, two, "--port", "0")
    assert code == RefusedError.exit_code
    assert "different bases" in err


def test_a_token_is_its_owner_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(StateError, match="other users"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.write_text("short")
    with pytest.raises(StateError, match="at least 16"):
        read_token(file)
    with pytest.raises(StateError, match="cannot be read"):
        read_token(tmp_path / "none")
