"""The form in which vLLM's server sends this library's errors.

Read in vLLM 0.32.0, ``vllm/exceptions.py`` and ``vllm/entrypoints/serve/exception_handling``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GracefulHTTPError

from qlora_infer import errors
from qlora_infer.http_status import http_status

#: OpenAI's client tries again after 429 and any 5xx; a request that took too long is likely to do so again.
HEADERS: Mapping[int, Mapping[str, str]] = {
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
    504: {"x-should-retry": "false"},
}


class ServedError(GracefulHTTPError):  # type: ignore[misc]
    """An error of this library on its way through vLLM's server, which keeps the status that it carries."""

    def __init__(self, cause: errors.QLoRAInferError) -> None:
        super().__init__(str(cause), HTTPStatus(http_status(type(cause))))
        self.cause = cause


@contextmanager
def served_errors() -> Iterator[None]:
    """Turn this library's errors into those that vLLM's server sends with their own status."""
    try:
        yield
    except errors.QLoRAInferError as error:
        raise ServedError(error) from error


async def error_response(_: Any, error: ServedError | errors.QLoRAInferError) -> JSONResponse:
    """Return the response to an error: vLLM's body, with the error's class as its type, and every reason."""
    served = error if isinstance(error, ServedError) else ServedError(error)
    body = create_error_response(served).model_dump()
    body["error"]["type"] = type(served.cause).__name__
    if isinstance(served.cause, errors.IncompatibleAdapterError):
        body["error"]["reasons"] = list(served.cause.reasons)
    status = int(served.http_status)
    return JSONResponse(body, status, HEADERS.get(status))
