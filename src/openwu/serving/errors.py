"""Errors as clients of OpenAI's API expect them: a status, a code, the parameter at fault, and whether to retry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openwu.errors import OpenwuError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Failure:
    """Why a request was not served; plain data, so that it can travel between processes."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds after which it makes sense to try again; None: unknown."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further members of the error object, such as `suggestions`."""

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 429, 503)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: all four keys that the SDKs read, then ours."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.further}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell the SDKs whether, and when, to try again."""
        headers = {"x-should-retry": "true" if self.retryable else "false"}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, min(120, round(self.retry_after))))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


STOPPED = Failure(499, "cancelled", "the request was cancelled")
"""What became of a task that nobody waits for any more."""


class ServiceError(OpenwuError):
    """A request that is answered with an error object."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class WorkerLostError(OpenwuError):
    """A worker process or node that died while it computed."""


def refused(status: int, code: str, message: str, param: str | None = None, **more: Any) -> ServiceError:
    """Make the error of a request that is refused; `more`: further fields of `Failure`."""
    return ServiceError(Failure(status, code, message, param, **more))


def unsupported(param: str, message: str) -> ServiceError:
    """Make the error of a parameter or value that this service does not have."""
    return refused(400, "unsupported_value", message, param)
