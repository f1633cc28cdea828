"""What the endpoint of `privet serve` does with requests of strangers, without a model behind it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from privet.client.release.card import modelfile
from privet.client.release.monitoring import Monitor
from privet.client.release.served import Endpoint, Limits
from tests.support.tiny import tiny_study

TOKEN = "a-token-of-some-length"


@dataclass
class NoModels:
    """Names of models alone."""

    studies: dict[str, Any] = field(default_factory=lambda: {"base": None})


def answer_to(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str]]:
    """Return the status and the headers with which the endpoint answers a request."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    endpoint: Any = Endpoint(NoModels(), TOKEN, Limits(), Monitor({}))  # type: ignore[arg-type]
    asyncio.run(endpoint.app(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize("name", ["\x1b]0;evil\x07", "a\x0b12:00:00 GET", "name-of-a-patient"])
def test_a_stranger_writes_nothing_into_the_log(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "privet.serve")
    for headers in ({}, {"authorization": f"Bearer {TOKEN}"}):
        assert answer_to(f"/v1/models/{name}", **headers)[0] in (401, 404)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["GET /v1/models/{name}"] * 2
    assert name not in caplog.text


def test_a_page_in_a_browser_gets_nothing() -> None:
    page = {"origin": "https://evil.example", "host": "evil.example"}
    for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/chat/completions"), ("POST", "/v1/completions")):
        status, headers = answer_to(path, method, **page)
        assert status in (401, 405)
        assert not [name for name in headers if name.startswith("access-control")]
    assert answer_to("/v1/models", authorization=f"Bearer {TOKEN}")[0] == 200


@pytest.mark.parametrize("quotes", range(1, 12))
def test_a_system_prompt_ends_no_instruction_of_a_modelfile(quotes: int, llama: Path) -> None:
    for prompt in ("kind" + '"' * quotes, f'kind{quotes * chr(34)}\nFROM /elsewhere\nSYSTEM "'):
        study = tiny_study(llama, **{"task.kind": "causal-lm", "task.system_prompt": prompt})
        text = modelfile(study, ".", [])
        assert text.count('"""') == 2
        assert text.endswith('"""\n')
        assert text.index('"""', 20) == len(text) - 4
