"""Errors as clients see them: the OpenAI API's shape, a status, and whether to come again."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from controlplane.gateway.messages import Failed, Failure
from controlplane.runtime.errors import PerdureError, Rejected, Retryable

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CONTEXT_CODE = "context_length_exceeded"


class ApiError(Exception):
    """A refusal with its HTTP status. `retry_after_s` None: no advice; 0 or more: come again then."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        # Clients that retry by status must not: repeating would only do harm.
        self.final = final

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.final:
            found["x-should-retry"] = "false"
        return found


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400 that names the parameter."""
    return ApiError(400, message, param=param, code=code)


def from_validation(error: ValidationError) -> ApiError:
    """The first parameter that pydantic found wrong, and what is wrong with it."""
    found = error.errors(include_url=False, include_context=False)
    # Of a union's alternatives the one that got furthest is what the client meant.
    first = max((one for one in found if one["loc"][:1] == found[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    path = [str(part) for part in first["loc"] if not _is_union_branch(part)]
    param = path[0] if path else None
    where = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    return bad(param, f"{where}: {message}" if where else message, code=first["type"])


def _is_union_branch(part: object) -> bool:
    """pydantic names the alternatives of a union in the path; clients never wrote those."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


_FAILURES: dict[Failure, tuple[int, str, str | None, bool]] = {
    Failure.UNKNOWN_MODEL: (404, INVALID_REQUEST, "model_not_found", False),
    Failure.TOO_LONG: (400, INVALID_REQUEST, CONTEXT_CODE, False),
    Failure.INVALID: (400, INVALID_REQUEST, None, False),
    Failure.OVERLOADED: (429, "rate_limit_error", "overloaded", False),
    Failure.UNAVAILABLE: (503, SERVER_ERROR, "unavailable", False),
    Failure.DEADLINE: (504, SERVER_ERROR, "deadline_exceeded", False),
    Failure.POISON: (500, SERVER_ERROR, "request_crashes_engine", True),
    Failure.RETRIES: (503, SERVER_ERROR, "retries_exhausted", False),
    Failure.CANCELLED: (499, SERVER_ERROR, "cancelled", True),
    Failure.ENGINE: (500, SERVER_ERROR, "engine_error", False),
    Failure.SUPERSEDED: (409, INVALID_REQUEST, "superseded", True),
}


def from_failure(failed: Failed) -> ApiError:
    """What the client of a failed journal is told."""
    status, kind, code, final = _FAILURES[failed.failure]
    message = failed.reason.text or failed.reason.kind.name.lower().replace("_", " ")
    retry = failed.retry_ms / 1000 if status in (429, 503) else None
    return ApiError(status, message, kind=kind, code=code, retry_after_s=retry, final=final)


def from_error(error: PerdureError) -> ApiError:
    """One of our own refusals, raised on the way in."""
    if isinstance(error, Retryable):
        return ApiError(
            429, str(error), kind="rate_limit_error", code="overloaded", retry_after_s=error.retry_ms / 1000
        )
    if isinstance(error, Rejected):
        return bad(None, str(error))
    return ApiError(503, str(error), kind=SERVER_ERROR, code="unavailable")
