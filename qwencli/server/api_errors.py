"""What is wrong with a request, in the form that clients of OpenAI's API read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from qwencli.errors import (
    CaptionError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    PromptTooLongError,
    QwenCliError,
    UsageError,
)
from qwencli.server.answers import (
    ClientGoneError,
    EngineStoppedError,
    RequestTimeoutError,
    TooManyRequestsError,
)

# Of errors by the status they come with; the first class that fits.
_STATUS: tuple[tuple[type[QwenCliError], int, str | None], ...] = (
    (PromptTooLongError, 400, "context_length_exceeded"),
    (InputError, 400, None),
    (UsageError, 400, None),
    (CaptionError, 400, None),
    (TooManyRequestsError, 429, "rate_limit_exceeded"),
    (RequestTimeoutError, 504, "timeout"),
    (ClientGoneError, 499, "client_closed_request"),
    (MissingDependencyError, 501, None),
    (OutOfMemoryError, 503, "out_of_memory"),
    (EngineStoppedError, 503, None),
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with the status that tells it.

    Args:
        param: what of the request is wrong, such as `messages.0.content`.
        code: OpenAI's word for it, where there is one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


class PictureError(InputError):
    """A picture of a request that is none, damaged or too large.

    Args:
        place: where it stands in the request.
    """

    def __init__(self, message: str, hint: str, place: str) -> None:
        super().__init__(message, hint)
        self.place = place


def body_error(error: ValidationError, data: bytes) -> ApiError:
    """What is wrong with a body, and where: as deep in it as is known.

    Where several kinds of value may stand, each says why it is not that one; the deepest is about
    the kind that was meant.
    """
    found = error.errors(include_url=False, include_input=False)
    within = found[0]["loc"][:-1]
    about = [each for each in found if each["loc"][: len(within)] == within]
    deepest = max(about, key=lambda each: len(each["loc"]))
    place = ".".join(_path(deepest["loc"], data, missing=deepest["type"] == "missing"))[:200]
    told = _WORDS.get(deepest["type"], "{msg}").format(msg=deepest["msg"], **deepest.get("ctx", {}))
    said = f"{place}: {told}" if place else told if found[0]["loc"] else f"the body {told}"
    return ApiError(400, said[:500], param=place or None)


# What pydantic finds, by its names for it, in words for people who write JSON.
_WORDS = {
    "json_invalid": "is not JSON: {error}",
    "missing": "is missing",
    "string_type": "must be a string",
    "string_unicode": "must be Unicode",
    "string_too_short": "must have {min_length} characters or more",
    "string_too_long": "must have {max_length} characters or fewer",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "must have {min_length} or more",
    "too_long": "must have {max_length} or fewer",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "union_tag_not_found": "its type is missing",
    "union_tag_invalid": "its type must be one of {expected_tags}",
}


def _path(found: tuple[str | int, ...], data: bytes, *, missing: bool) -> Iterator[str]:
    """The place in the body, without pydantic's names of what might stand there."""
    value: Any = from_json(data) if found else None
    for number, part in enumerate(found):
        in_list = isinstance(value, list) and part in range(len(value))
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
            yield str(part)
        elif missing and number == len(found) - 1:
            yield str(part)


def api_error(error: QwenCliError) -> ApiError:
    """An error of the engine as one of the API. What its hint says of options is left out."""
    status, code = next(
        ((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, None)
    )
    told = error.message
    if error.hint and "--" not in error.hint:
        told += f" ({error.hint})"
    headers = {"retry-after": "1"} if status in (429, 503) else None
    place = error.place if isinstance(error, PictureError) else None
    return ApiError(status, told, param=place, code=code, headers=headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Lone surrogates of a file's name or a model's text have no UTF-8.
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(data, status, headers, "application/json")
