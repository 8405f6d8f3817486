"""What a client sent, read key by key; whatever it gets wrong is an ``ApiError`` that names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from toolmem.tools.base import plain_line

SHOWN = 60  # letters of a wrong value that a message repeats


class ApiError(Exception):
    """An answer that is not 200, in OpenAI's shape.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do.
        param: the key of the request that is wrong.
        code: OpenAI's machine-readable word for it, where there is one.
        headers: to send beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class Fields:
    """The keys of a JSON object, each taken once and checked.

    Args:
        data: the object.
        where: its own key, for messages.
    """

    def __init__(self, data: Any, where: str = "") -> None:
        if not isinstance(data, dict):
            raise wrong(where or "the body", data, "a JSON object")
        self.data = dict(data)
        self.where = where

    def key(self, name: str) -> str:
        """A key as a message names it."""
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str, kind: type | tuple[type, ...], wanted: str, default: Any) -> Any:
        """A value of some type; null and a missing key are the default."""
        value = self.data.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise wrong(self.key(name), value, wanted)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        return self.take(name, bool, "true or false", False)

    def text(self, name: str, default: str | None = None) -> Any:
        """A string."""
        return self.take(name, str, "a string", default)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        """A whole number in a range."""
        value = self.take(name, int, "a whole number", default)
        if value is not None and not low <= value <= high:
            raise wrong(self.key(name), value, f"from {low:,} to {high:,}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> Any:
        """A number in a range."""
        value = self.take(name, (int, float), "a number", default)
        if value is not None and not low <= value <= high:
            raise wrong(self.key(name), value, f"from {low:g} to {high:g}")
        return None if value is None else float(value)

    def end(self) -> None:
        """Refuse what nobody took."""
        unknown = sorted(self.data)
        if unknown:
            name = self.key(unknown[0])
            raise ApiError(
                400,
                f"unknown key {name[:SHOWN]}: check its spelling, or leave it out",
                param=name[:SHOWN],
                code="unknown_parameter",
            )


def wrong(key: str, value: Any, wanted: str) -> ApiError:
    """The error for a value that is not what its key wants."""
    try:
        shown = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        shown = type(value).__name__
    if len(shown) > SHOWN:
        shown = shown[:SHOWN] + "…"
    return ApiError(400, f"{key} is {shown}: it must be {wanted}", param=key)


def read_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = plain_line(str(error))[:200] or type(error).__name__
        raise ApiError(400, f"the body is not JSON: {reason}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
