"""What every request passes before anything looks at it: host, key, how many at a time; and what is counted after."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from zero.serving.problems import ApiError
from zero.serving.service import Service, as_api_error
from zero.serving.settings import is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Answered without a key: they tell nothing but that a service is there."""
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/generation"})
KNOWN_PATHS = OPEN_PATHS | GENERATING_PATHS | {"/v1/models", "/metrics", "/status", "/openapi.json"}

CLIENT_LEFT = 499
_SPARE_REQUESTS = 16
_DISCARD_S = 2.0
_MOST_DISCARDED_BYTES = 32 << 20

_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Gate:
    """ASGI around the app.

    Args:
        app: answers.
        service: whose settings and metrics.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service
        self._num_generating = 0
        key = service.settings.api_key
        # Digests have one length: comparing them tells nothing about the length of the key.
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, and counts it."""
        if scope["type"] != "http":
            return
        started_s, reply = time.monotonic(), _Reply(send)
        path = str(scope["path"])
        generates = path in GENERATING_PATHS
        self._num_generating += generates
        try:
            self._check(scope, path, generates)
            await self._app(scope, receive, reply.send)
        except Exception as error:
            if not reply.has_started:
                if scope["method"] == "POST":
                    await discard(receive)
                await refuse(reply.send, as_api_error(error))
            elif not isinstance(error, OSError):
                as_api_error(error)
        finally:
            self._num_generating -= generates
            endpoint = path if path in KNOWN_PATHS else "other"
            self._service.metrics.requests[endpoint, reply.status] += 1
            self._service.metrics.request_s.add(time.monotonic() - started_s)

    def _check(self, scope: Scope, path: str, generates: bool) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_host(headers.get(b"host", b""))
        if path not in OPEN_PATHS:
            self._check_key(headers.get(b"authorization", b""))
        if not generates or scope["method"] != "POST":
            return
        settings = self._service.settings
        # Requests that cannot all be let in do not send their bodies first: those are bytes held, too.
        limits = self._service.worker.loaded.generator.limits if self._service.worker.loaded else None
        if limits is not None and self._num_generating > limits.max_rows + settings.max_queue + _SPARE_REQUESTS:
            self._service.metrics.refused += 1
            retry_after_s = self._service.retry_after_s()
            raise ApiError(429, "too many requests at a time; try again later", None, "queue_full", retry_after_s)
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            # Also what keeps other web pages from posting here: a browser asks first, and is not answered.
            raise ApiError(415, "give the header Content-Type: application/json", code="unsupported_media_type")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > settings.max_body_bytes:
            raise too_large(settings.max_body_bytes)

    def _check_host(self, host: bytes) -> None:
        """Without a key, only this machine's own names are served.

        A page on the web could otherwise point a name of its own at 127.0.0.1 and read answers here.
        """
        name = host.decode("latin-1")
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if self._digest is None and not is_loopback(name):
            raise ApiError(403, "this service answers to localhost only; start it with a key for other names")

    def _check_key(self, authorization: bytes) -> None:
        if self._digest is None:
            return
        scheme, _, given = authorization.partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        is_right = hmac.compare_digest(digest, self._digest)
        if scheme.lower() != b"bearer" or not is_right:
            raise ApiError(401, "give the key of this service: Authorization: Bearer KEY", code="invalid_api_key")


class _Reply:
    """Adds the headers that every reply has, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = CLIENT_LEFT
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_started = message["status"], True
            given = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name, value) for name, value in _HEADERS.items() if name not in given]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self._send(message)


def too_large(max_body_bytes: int) -> ApiError:
    """For a body above the limit."""
    return ApiError(413, f"the body is larger than {max_body_bytes} bytes", code="body_too_large")


async def discard(receive: Receive) -> None:
    """Reads a body that is not wanted, and forgets it: many clients read no reply before they have sent all of theirs.

    Within limits: what is longer or comes slower meets a closed connection.
    """
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while num_bytes < _MOST_DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def refuse(send: Send, error: ApiError) -> None:
    """Sends an error as the whole reply."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
