"""Refusals in the shape that clients of OpenAI's interface read."""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """A request that is not answered, as an HTTP status and `{"error": {message, type, param, code}}`.

    `retry_after`: seconds after which it is worth another try, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.parameter, self.code, self.retry_after = status, parameter, code, retry_after

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}
        return {"error": error}

    @property
    def content(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
