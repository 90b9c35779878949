"""The HTTP statuses of this library's errors, for whatever serves an engine over HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_infer import errors

_STATUSES: Mapping[type[Exception], int] = {
    ValueError: 400,
    TypeError: 400,
    errors.RequestRejectedError: 400,
    errors.AdapterNotLoadedError: 404,
    errors.AdapterConflictError: 409,
    errors.AdapterError: 422,
    errors.QueueFullError: 429,
    errors.AdapterLoadError: 500,
    errors.QLoRAInferError: 500,
    errors.AdapterDownloadError: 502,
    errors.EngineClosedError: 503,
    errors.EngineDeadError: 503,
    errors.RequestCancelledError: 503,
    errors.RequestTimeoutError: 504,
}


def http_status(kind: type[Exception]) -> int:
    """Return the status of an error's class, or else of its nearest base class; 500 for errors of others."""
    return next((_STATUSES[base] for base in kind.__mro__ if base in _STATUSES), 500)
