"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from zero.errors import UserError
from zero.serving.call import Wanted
from zero.serving.chat import chat_prompt
from zero.serving.exchange import answer, read_body
from zero.serving.gate import Gate
from zero.serving.metrics import CONTENT_TYPE, metrics_text
from zero.serving.page import page_response
from zero.serving.problems import ApiError
from zero.serving.replies import ChatShape, CompletionShape, GenerationShape
from zero.serving.schemas import ChatRequest, CompletionRequest, GenerationRequest, Message, OpenAIRequest
from zero.serving.service import Service, State, as_api_error

if TYPE_CHECKING:
    from zero.generation import Sampling  # brings torch: the service listens before that is there

_DEFAULT_COMPLETION_TOKENS = 16
_DEFAULT_CHAT_TOKENS = 256

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Gate:
    """The ASGI app of a service."""
    # No pages of documentation: FastAPI's load scripts from elsewhere.
    app = FastAPI(title="zero serve", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    endpoints = _Endpoints(service)
    for path, schema, endpoint in (
        ("/v1/completions", CompletionRequest, endpoints.complete),
        ("/v1/chat/completions", ChatRequest, endpoints.chat),
        ("/generation", GenerationRequest, endpoints.generate),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=_body_of(schema))
    for path, endpoint in (
        ("/v1/models", endpoints.models),
        ("/status", endpoints.status),
        ("/metrics", endpoints.metrics),
        ("/healthz", endpoints.is_healthy),
        ("/readyz", endpoints.is_ready),
        ("/", endpoints.page),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _mistake)
    return Gate(app, service)


class _Endpoints:
    """One method per endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: Request) -> Response:
        """Continues prompts."""
        service = self._service
        service.require_ready()
        body = await read_body(request, CompletionRequest, service)
        self._check_model(body)
        sampling = _sampling(body, body.max_tokens or _DEFAULT_COMPLETION_TOKENS, body.logprobs)
        wanted = Wanted(body.prompts, sampling, body.n or 1, bool(body.stream))
        echoes = await asyncio.to_thread(self._texts, body.prompts) if body.echo else []
        return await answer(
            request, service, wanted, CompletionShape(service.settings.model_name, body.wants_usage, echoes)
        )

    async def chat(self, request: Request) -> Response:
        """Answers the last message of a chat."""
        service = self._service
        service.require_ready()
        body = await read_body(request, ChatRequest, service)
        self._check_model(body)
        prompt = await asyncio.to_thread(self._chat_prompt, body.messages)
        num_new = body.max_completion_tokens or body.max_tokens or self._room_for_chat(len(prompt))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = Wanted([prompt], _sampling(body, num_new, logprobs), body.n or 1, bool(body.stream))
        return await answer(request, service, wanted, ChatShape(service.settings.model_name, body.wants_usage))

    async def generate(self, request: Request) -> Response:
        """Continues a prompt, as EnergonAI's service did."""
        self._service.require_ready()
        body = await read_body(request, GenerationRequest, self._service)
        sampling = _sampling(OpenAIRequest(**body.model_dump(exclude={"prompt", "max_tokens"})), body.max_tokens, None)
        return await answer(request, self._service, Wanted([body.prompt], sampling), GenerationShape(body.prompt))

    async def models(self, request: Request) -> Response:
        """The one model."""
        service = self._service
        model = {"id": service.settings.model_name, "object": "model", "created": service.loaded_at, "owned_by": "zero"}
        return JSONResponse({"object": "list", "data": [model]})

    async def status(self, request: Request) -> Response:
        """What the page shows."""
        return JSONResponse(self._service.status())

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(metrics_text(self._service), headers={"content-type": CONTENT_TYPE})

    async def is_healthy(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def is_ready(self, request: Request) -> Response:
        """The model can be asked."""
        state = self._service.state
        return JSONResponse({"status": state.value}, 200 if state is State.READY else 503)

    async def page(self, request: Request) -> Response:
        """For people."""
        return page_response()

    def _check_model(self, body: OpenAIRequest) -> None:
        name = self._service.settings.model_name
        if body.model is not None and body.model != name:
            raise ApiError(404, f"this service has one model: {name}", param="model", code="model_not_found")

    def _texts(self, prompts: list[str | list[int]]) -> list[str]:
        """The prompts as texts, for echo."""
        tokenizer = self._service.loaded.tokenizer
        most = len(tokenizer)
        for prompt in prompts:
            if not isinstance(prompt, str) and max(prompt) >= most:
                raise ApiError(400, f"token numbers go from 0 to {most - 1}", param="prompt", code="invalid_value")
        with self._service.tokenizer_lock:
            return [prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt)) for prompt in prompts]

    def _chat_prompt(self, messages: list[Message]) -> list[int]:
        tokenizer = self._service.loaded.tokenizer
        with self._service.tokenizer_lock:
            return chat_prompt(tokenizer, messages)

    def _room_for_chat(self, num_prompt_tokens: int) -> int:
        longest = self._service.limits.max_tokens
        if longest is None:
            return _DEFAULT_CHAT_TOKENS
        return max(1, min(_DEFAULT_CHAT_TOKENS, longest - num_prompt_tokens))


def _sampling(body: OpenAIRequest, num_new_tokens: int, logprobs: int | None) -> Sampling:
    """OpenAI's defaults; where nothing is drawn, what narrows a draw has no meaning and is let be."""
    from zero.generation import Sampling

    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        max_new_tokens=num_new_tokens,
        temperature=temperature,
        top_k=(body.top_k or 0) if temperature else 0,
        top_p=(1.0 if body.top_p is None else body.top_p) if temperature else 1.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        stop=body.stops,
        seed=body.seed,
        logprobs=logprobs,
    )


def _body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The body in ``/openapi.json``: it is read by hand, so that a large one is refused before it is held."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: type[BaseModel]) -> Any:
    """The schema without references, which would point outside of it."""
    document = schema.model_json_schema()
    definitions = document.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
        return {key: resolve(value) for key, value in node.items()}

    return resolve(document)


def _api_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(known.body, known.status, known.headers)


def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return _mistake(request, error)
    texts = {404: "no such path", 405: "this path is not asked with this method"}
    known = ApiError(error.status_code, texts.get(error.status_code, "the request cannot be answered"))
    return JSONResponse(known.body, error.status_code, dict(error.headers or {}))


def _mistake(request: Request, error: Exception) -> Response:
    """Of an error that nobody expected; the gate logs it."""
    return JSONResponse(ApiError(500, "the service made a mistake; its log says which", code="internal").body, 500)
