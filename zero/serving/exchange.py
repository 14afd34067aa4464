"""A request's body in, its answer out: whole or as a stream; a client that leaves takes its rows with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from zero.serving.call import Call, TooSlow, Wanted
from zero.serving.gate import CLIENT_LEFT, Receive, Scope, Send, discard, too_large
from zero.serving.problems import ApiError, of_validation
from zero.serving.service import Service, as_api_error

Body = TypeVar("Body", bound=BaseModel)
Answer = TypeVar("Answer")

_LAST_WORDS_S = 1.0


class Shape(Protocol):
    """How an endpoint writes its answers."""

    def whole(self, call: Call) -> dict[str, Any]:
        """The reply to a request that is done."""

    def opening(self, call: Call) -> Iterable[dict[str, Any]]:
        """The chunks of a stream before the first token."""

    def chunk(self, call: Call, prompt: int, piece: Any) -> dict[str, Any]:
        """The chunk of one piece."""

    def closing(self, call: Call) -> Iterable[dict[str, Any]]:
        """The chunks after the last token."""


async def read_body(request: Request, schema: type[Body], service: Service) -> Body:
    """Reads and checks a JSON body; never holds more of it than the limit.

    Raises:
        ApiError: 400 with every problem, 408 where it does not come, 413 where it is too large.
    """
    settings, parts, num_bytes = service.settings, [], 0
    try:
        async with asyncio.timeout(settings.body_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > settings.max_body_bytes:
                    await discard(request.receive)
                    raise too_large(settings.max_body_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {settings.body_s:g} s", code="body_timeout") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client left") from None
    try:
        return schema.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise of_validation(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_value") from None


async def answer(request: Request, service: Service, wanted: Wanted, shape: Shape) -> Response:
    """The reply to a request: at once with headers and then piece by piece, or when all of it is there.

    Raises:
        ApiError: it is not let in, fails, or takes too long.
    """
    deadline_s = time.monotonic() + service.settings.deadline_s
    if wanted.streams:
        return EventStream(service, await service.begin(wanted), shape, deadline_s)
    call = await service.begin(wanted)
    try:
        await _unless_gone(request.receive, call.result(), deadline_s)
        return JSONResponse(shape.whole(call))
    except TimeoutError:
        raise _too_late(service) from None
    except _ClientGone:
        raise ApiError(CLIENT_LEFT, "the client left") from None
    except Exception as error:
        raise as_api_error(error) from None
    finally:
        service.leave(call)


class EventStream(Response):
    """Server-sent events: one per piece, then ``[DONE]``; an error after the first byte is an event, too."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, call: Call, shape: Shape, deadline_s: float) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._call = call
        self._shape = shape
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all of it, or as much as the client takes."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _unless_gone(receive, self._copy(send), self._deadline_s, self._call.is_too_slow)
        except TimeoutError:  # before OSError, which it is one of
            await self._end_with(send, _too_late(self._service))
        except (_ClientGone, OSError):
            return
        except Exception as error:
            await self._end_with(send, as_api_error(error))
        finally:
            self._service.leave(self._call)

    async def _copy(self, send: Send) -> None:
        async for text in self._texts():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_with(self, send: Send, error: ApiError) -> None:
        """In time or not at all: a client that does not read must not hold this."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await send({"type": "http.response.body", "body": _event(error.body).encode(), "more_body": False})

    async def _texts(self) -> AsyncIterator[str]:
        call, shape = self._call, self._shape
        for chunk in shape.opening(call):
            yield _event(chunk)
        while True:
            taken = await call.pieces(self._service.settings.keep_alive_s)
            if taken:
                yield "".join(_event(shape.chunk(call, prompt, piece)) for prompt, piece in taken)
            elif call.has_ended:
                break
            else:
                yield ": still here\n\n"
        for chunk in shape.closing(call):
            yield _event(chunk)
        yield "data: [DONE]\n\n"


class _ClientGone(Exception):
    """Nobody is there to read the answer."""


async def _unless_gone(
    receive: Receive, work: Coroutine[Any, Any, Answer], deadline_s: float, is_too_slow: asyncio.Event | None = None
) -> Answer:
    """Waits for work, unless the client leaves, falls behind or the time passes first.

    Raises:
        _ClientGone: the client has left.
        TooSlow: it reads too slowly. The work may be waiting for it to read, and would not notice.
        TimeoutError: it is too late.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    lagging = asyncio.ensure_future((is_too_slow or asyncio.Event()).wait())
    waiting = (working, leaving, lagging)
    try:
        left_s = max(0.0, deadline_s - time.monotonic())
        done, _ = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise _ClientGone()
        raise TooSlow() if done else TimeoutError()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _too_late(service: Service) -> ApiError:
    return ApiError(504, f"no answer within {service.settings.deadline_s:g} s; ask for fewer tokens", code="deadline")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
