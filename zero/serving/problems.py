"""What a client is told when a request cannot be answered: OpenAI's error shape, without a stack trace."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_MOST_PROBLEMS = 5
_MOST_KEY_CHARACTERS = 80


class ApiError(Exception):
    """A refusal or a failure, as the client will read it.

    Args:
        status: of HTTP.
        message: what was given, what is allowed, what to do.
        param: the key of the request that is wrong.
        code: one word for programs.
        retry_after_s: when it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def of_validation(error: ValidationError) -> ApiError:
    """All that is wrong with a body, by key; what was given is not repeated, since it may be a prompt."""
    problems: dict[str, list[str]] = {}
    unknown = False
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        unknown = unknown or detail["type"] == "extra_forbidden"
        text = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"].removeprefix("Value error, ")
        known = problems.setdefault(_key(detail["loc"]), [])
        if text not in known:
            known.append(text)
    shown = [f"{key}: {' / '.join(texts)}" if key else " / ".join(texts) for key, texts in problems.items()]
    more = f"; and {len(shown) - _MOST_PROBLEMS} more" if len(shown) > _MOST_PROBLEMS else ""
    code = "unknown_parameter" if unknown else "invalid_value"
    return ApiError(400, "; ".join(shown[:_MOST_PROBLEMS]) + more, param=next(iter(problems)) or None, code=code)


def _key(location: tuple[int | str, ...]) -> str:
    """The key of the request, without the names of the alternatives that pydantic tried for it."""
    parts = list(location[:1])
    if location[:1] in (("messages",), ("stream_options",)):
        parts = [part for part in location if isinstance(part, int) or part.isidentifier()][:4]
    return ".".join(str(part) for part in parts)[:_MOST_KEY_CHARACTERS]
