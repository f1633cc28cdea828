"""An endpoint on loopback for trying adapters, in the form of OpenAI's API: models, chat completions, completions.

One base is loaded, with several adapters. One answer is generated at a time; others wait in a queue of bounded length.
Nothing of a prompt or an answer is logged; answers are counted (`privet.client.release.counts`). A client that
disconnects stops its generation.

It is for trying, by one person on one machine. `docs/use.md` names servers for production.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from peft import get_peft_model
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import nn

from privet.client.release.counts import CUT, FINISHED, Outcome, Reason
from privet.client.release.generation import Answer, Sampling, room_for, stream
from privet.client.release.monitoring import Monitor
from privet.client.release.opened import Release, knowing_bases
from privet.client.site import Resources
from privet.client.training.features import prompt_ids, text_ids
from privet.client.training.host import ModelHost
from privet.client.training.model import forget_hosts, open_host
from privet.client.training.targets import lora_config
from privet.common.errors import PrivetError, RefusedError, StudyError
from privet.common.study.study import Study

BASE = "base"
"""Name under which the base answers without an adapter."""
_log = logging.getLogger("privet.serve")
_ENDED = "[DONE]"


@dataclass(frozen=True)
class Limits:
    """What requests may take.

    Attributes:
        body: Most bytes of a request.
        waiting: Most requests that wait for their turn; further ones are refused with status 429.
        tokens: Most tokens of an answer.
    """

    body: int = 2**20
    waiting: int = 8
    tokens: int = 1024


def _own_name(number: int) -> str:
    """Return PEFT's name of an adapter, which must have no dots; names of runs may."""
    return f"served{number}"


def _config(study: Study, bare: Any) -> Any:
    return lora_config(study.lora, study.task, bare)


class Models:
    """One base with the adapters of several runs, by name. Use it from one thread at a time."""

    def __init__(self, releases: Mapping[str, Release], resources: Resources) -> None:
        """Load the base once, and all adapters onto it.

        Raises:
            StudyError, RefusedError, VerificationError: A base or an adapter cannot be opened, or they do not belong
                together.
        """
        studies = [release.study for release in releases.values()]
        self._check(studies)
        self.studies: dict[str, Study] = {name: release.study for name, release in releases.items()}
        self.studies[BASE] = studies[0]
        first = next(iter(releases.values()))
        opened = open_host(studies[0], knowing_bases(first, resources), training=False, begun=True)
        forget_hosts()  # nobody else may get the host whose adapter is taken off here
        bare: Any = opened.model.unload()
        # Layers are looked for before any adapter is laid over them.
        configs = [_config(study, bare) for study in studies]
        model = get_peft_model(bare, configs[0], adapter_name=_own_name(0))
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(_own_name(number), config)
        model.eval()
        self.host: ModelHost = replace(opened, model=model)
        self._adapters = {name: _own_name(number) for number, name in enumerate(releases)}
        for name, release in releases.items():
            self._fill(self._adapters[name], release)

    @staticmethod
    def _check(studies: Sequence[Study]) -> None:
        for study in studies:
            if not study.task.generates:
                raise RefusedError(
                    f"the study {study.name} trains {study.task.kind}; only language models are served",
                    "use `privet predict RUN --data FILE`",
                )
        if len({(study.model.quantised, *sorted(study.model.sha256.items())) for study in studies}) > 1:
            raise RefusedError(
                "the runs have different bases", "start one `privet serve RUN` with its own --port for each base"
            )

    def _fill(self, own: str, release: Release) -> None:
        """Copy an adapter's values into the model, under PEFT's name of it."""
        model = self.host.model
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if f".{own}." in name:
                parameters[name.replace(f".modules_to_save.{own}.", ".").replace(f".{own}.", ".")] = parameter
        if set(parameters) != set(release.adapter.values):
            raise StudyError(
                f"{release.path}: the adapter's tensors are not those of its study",
                "copy the run directory again: its files belong to different runs",
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data = torch.from_numpy(release.adapter.values[name].copy()).to(self.host.device)

    @contextlib.contextmanager
    def chosen(self, name: str) -> Any:
        """Let one adapter, or the base alone, compute while the context is open."""
        with self.host.lock:
            if name == BASE:
                with self.host.model.disable_adapter():
                    yield self.host
            else:
                self.host.model.set_adapter(self._adapters[name])
                self.host.model.eval()
                yield self.host


# --- requests -----------------------------------------------------------------------------------------------


class ApiError(Exception):
    """An error in OpenAI's form, and the reason by which it is counted."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        kind: str = "invalid_request_error",
        counted: Reason = "malformed",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind, self.counted = status, message, code, kind, counted

    def response(self) -> Response:
        """Return the answer that a client gets."""
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        body = {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}
        return JSONResponse(body, self.status, more)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]

    @property
    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Options(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of requests share. Keys that would change the answer and are not known are refused."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    n: Literal[1] | None = None


class _Chat(_Asked):
    messages: Annotated[list[_Turn], Field(min_length=1)]


class _Completion(_Asked):
    prompt: str


_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Values that ask for nothing, as JSON: Python takes 1 for true.
_NEUTRAL = {"null", "false", "0", "0.0", "[]", "{}", '"none"', '"auto"', '{"type": "text"}'}


def _parsed(kind: type[_Asked], data: bytes) -> Any:
    try:
        asked = kind.model_validate_json(data)
    except ValidationError as error:
        # Places and rules only: the values are somebody's prompt.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(400, f"{place}: {first['msg']}", "invalid_value") from None
    for name, value in (asked.model_extra or {}).items():
        if name not in _IGNORED and json.dumps(value) not in _NEUTRAL:
            raise ApiError(
                400, f"{name[:64]}: this endpoint does not support it; leave it out", "unsupported_parameter"
            )
    return asked


# --- one request --------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One generation. Its pieces go from the thread that generates to the loop that answers."""

    model: str
    prompt: list[int]
    characters: int
    sampling: Sampling
    stops: tuple[str, ...]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[str | Answer | BaseException] = field(default_factory=asyncio.Queue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def say(self, piece: str | Answer | BaseException) -> None:
        """Hand on a piece, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Endpoint:
    """Answers requests. `app` is the ASGI application."""

    def __init__(self, models: Models, token: str, limits: Limits, monitor: Monitor) -> None:
        self._models, self._limits, self._monitor = models, limits, monitor
        self._secret = hashlib.sha256(token.encode()).digest()
        self._thread = ThreadPoolExecutor(1, "privet-serve")
        self._pending = 0
        self._began = int(time.time())
        self.app = Starlette(
            routes=[
                self._route("/v1/models", self._list, "GET"),
                self._route("/v1/models/{name}", self._show, "GET"),
                self._route("/v1/chat/completions", self._chat, "POST"),
                self._route("/v1/completions", self._complete, "POST"),
                self._route("/metrics", self._metrics, "GET"),
            ],
            exception_handlers={HTTPException: _not_found},
        )

    def _route(self, path: str, answer: Callable[[Request], Any], method: str) -> Route:
        return Route(path, self._guarded(path, answer), methods=[method])

    def _guarded(self, path: str, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Let only requests with the token through, and turn every error into OpenAI's form."""

        async def guarded(request: Request) -> Response:
            began = time.monotonic()
            try:
                self._admit(request)
                response: Response = await answer(request)
            except ApiError as error:
                response = error.response()
            except ClientDisconnect:
                response = Response(status_code=499)
            except PrivetError as error:
                response = ApiError(400, error.message, "invalid_value").response()
            except Exception as error:  # whatever a library raises may quote a prompt, so its text is kept nowhere
                _log.warning("a request failed (%s)", type(error).__name__)
                response = ApiError(500, "the request failed at the server", "internal", "server_error").response()
            took = time.monotonic() - began
            # The path as the server names it: a page in a browser, without a token, can ask for any other text.
            _log.info("%s %s: %d, %.1f s", request.method, path, response.status_code, took)
            return response

        return guarded

    def _admit(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(token.strip().encode()).digest()
        if not hmac.compare_digest(found, self._secret) or kind.lower() != "bearer":
            raise ApiError(401, "expected the token of this server as a bearer token", "invalid_api_key")

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "privet"}

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._models.studies]})

    async def _show(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._study(name)
        return JSONResponse(self._described(name))

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._monitor.registry), media_type=CONTENT_TYPE_LATEST)

    def _study(self, name: str) -> Study:
        study = self._models.studies.get(name)
        if study is None:
            known = ", ".join(self._models.studies)
            raise ApiError(404, f"there is no such model; this server has {known}", "model_not_found")
        return study

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._limits.body:
                raise ApiError(413, f"expected a body of at most {self._limits.body} bytes", "request_too_large")
            parts.append(part)
        return b"".join(parts)

    async def _chat(self, request: Request) -> Response:
        asked: _Chat = _parsed(_Chat, await self._body(request))
        study = self._study(asked.model)
        turns = [turn.plain for turn in asked.messages]
        with self._counting(asked.model):
            prompt = list(prompt_ids(study, self._models.host.tokenizer, turns))
            job = self._job(asked, prompt, sum(len(turn["content"]) for turn in turns))
        return await self._answer(request, asked, job, _chat_form)

    async def _complete(self, request: Request) -> Response:
        asked: _Completion = _parsed(_Completion, await self._body(request))
        study = self._study(asked.model)
        with self._counting(asked.model):
            prompt = text_ids(study, self._models.host.tokenizer, asked.prompt)
            if not prompt:
                raise ApiError(400, "prompt: expected a text, found an empty one", "invalid_value", counted="no_text")
            job = self._job(asked, prompt, len(asked.prompt))
        return await self._answer(request, asked, job, _text_form)

    @contextlib.contextmanager
    def _counting(self, model: str) -> Iterator[None]:
        """Count a request that the block refuses, and end the block when too many wait."""
        try:
            if self._pending > self._limits.waiting:
                raise ApiError(
                    429,
                    "too many requests are waiting; try again later",
                    "rate_limit_exceeded",
                    "rate_limit_error",
                    counted="too_many_waiting",
                )
            yield
        except ApiError as error:
            self._monitor[model].refused(error.counted)
            raise
        except PrivetError:
            self._monitor[model].refused("malformed")
            raise

    def _job(self, asked: _Asked, prompt: list[int], characters: int) -> _Job:
        study = self._study(asked.model)
        most = asked.max_completion_tokens or asked.max_tokens or min(study.task.max_new_tokens, self._limits.tokens)
        if most > self._limits.tokens:
            raise ApiError(400, f"max_tokens: expected at most {self._limits.tokens}, found {most}", "invalid_value")
        room = room_for(self._models.host)
        if room is not None and len(prompt) + most > room:
            raise ApiError(
                400,
                f"the model has room for {room} tokens; the prompt has {len(prompt)} and the answer may have {most}",
                "context_length_exceeded",
                counted="too_long",
            )
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        sampling = Sampling(
            asked.temperature or 0.0, 1.0 if asked.top_p is None else asked.top_p, most, (asked.seed or 0) % 2**62
        )
        texts = tuple(stop for stop in stops if stop)
        return _Job(asked.model, prompt, characters, sampling, texts, asyncio.get_running_loop())

    async def _answer(self, request: Request, asked: _Asked, job: _Job, form: _Form) -> Response:
        self._pending += 1
        self._thread.submit(self._generate, job)
        head = {"id": f"privet-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._events(request, job, head, form, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        answer = await self._whole(request, job)
        return JSONResponse({**head, **form(answer.text, _reason(answer), True, True), "usage": _usage(job, answer)})

    def _left(self) -> None:
        self._pending -= 1

    def _generate(self, job: _Job) -> None:
        """Generate, in the one thread that may use the model."""
        last: Answer | BaseException = Answer("", 0, False)
        try:
            if not job.stopped.is_set():
                with self._models.chosen(job.model) as host:
                    study = self._models.studies[job.model]
                    last = stream(host, study, job.prompt, job.sampling, job.say, job.stops, job.stopped.is_set)
                if not job.stopped.is_set():
                    ending = FINISHED if last.finished else CUT
                    self._monitor[job.model].answered(Outcome(job.characters, (ending,), tokens=last.tokens))
        except Exception as error:
            self._monitor[job.model].refused("failed")
            last = error
        # The place is free before the client reads the end of its answer.
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            job.loop.call_soon_threadsafe(self._left)
        job.say(last)

    async def _next(self, request: Request, job: _Job) -> str | Answer | BaseException:
        """Return the next piece.

        Raises:
            ClientDisconnect: The client has left.
        """
        while True:
            if await request.is_disconnected():
                raise ClientDisconnect
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(job.pieces.get(), 0.1)

    async def _whole(self, request: Request, job: _Job) -> Answer:
        """Wait for the whole answer, and stop it if the client leaves."""
        try:
            while True:
                piece = await self._next(request, job)
                if isinstance(piece, BaseException):
                    raise piece
                if isinstance(piece, Answer):
                    return piece
        finally:
            job.stopped.set()

    async def _events(
        self, request: Request, job: _Job, head: Mapping[str, Any], form: _Form, usage: bool
    ) -> AsyncIterator[str]:
        """Yield the events of a streamed answer, and stop it if the client leaves."""
        try:
            first = True
            while True:
                piece = await self._next(request, job)
                if isinstance(piece, BaseException):
                    _log.warning("a request failed (%s)", type(piece).__name__)
                    error = {"message": "the request failed at the server", "type": "server_error", "code": "internal"}
                    yield _event({"error": error})
                    return
                if isinstance(piece, Answer):
                    yield _event({**head, **form("", _reason(piece), False, first)})
                    if usage:
                        yield _event(
                            {**head, **form("", None, False, False), "choices": [], "usage": _usage(job, piece)}
                        )
                    yield f"data: {_ENDED}\n\n"
                    return
                yield _event({**head, **form(piece, None, False, first)})
                first = False
        except ClientDisconnect:
            return
        finally:
            job.stopped.set()


_Form = Callable[[str, str | None, bool, bool], dict[str, Any]]


def _chat_form(text: str, reason: str | None, whole: bool, first: bool) -> dict[str, Any]:
    message = ({"role": "assistant"} if first else {}) | ({"content": text} if text or whole else {})
    choice = {"index": 0, "message" if whole else "delta": message, "logprobs": None, "finish_reason": reason}
    return {"object": "chat.completion" if whole else "chat.completion.chunk", "choices": [choice]}


def _text_form(text: str, reason: str | None, whole: bool, first: bool) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return {"object": "text_completion", "choices": [choice]}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def _usage(job: _Job, answer: Answer) -> dict[str, int]:
    sent, made = len(job.prompt), answer.tokens
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made}


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return ApiError(
        status, "this server has /v1/models, /v1/chat/completions, /v1/completions and /metrics", "unknown_url"
    ).response()
