"""The errors that this library raises.

    QLoRAInferError                       never raised itself: catch it to catch them all
    ├── MissingDependencyError            (ImportError)   a package is not installed, or its install is broken
    ├── QuantizationError                 (ValueError)    this checkpoint cannot be served this way here
    │   └── UnknownQuantizationError      (LookupError)   no strategy has that name
    ├── ModelNotFoundError                (OSError)       the base model does not exist under its name
    ├── UnsupportedModelError             (ValueError)    vLLM has no such architecture, or has it without LoRA
    ├── EngineStartError                  (RuntimeError)  vLLM did not start
    ├── ForkedEngineError                 (RuntimeError)  the engine belongs to the process that was forked
    ├── StorageError                      (OSError)       no temporary folder can be written
    ├── EngineClosedError                 (RuntimeError)  the engine was closed
    ├── EngineDeadError                   (RuntimeError)  vLLM's engine core died
    ├── AdapterError                      never raised itself: everything about one adapter
    │   ├── AdapterNotLoadedError         (LookupError)   no adapter of that name is loaded
    │   ├── AdapterConflictError          (RuntimeError)  the name has moved on from the version that was expected
    │   ├── AdapterSourceError            (OSError)       the source could not be read
    │   │   ├── AdapterNotFoundError      (LookupError)   no such folder, repository, revision or file
    │   │   ├── AdapterAccessError        (PermissionError)  the source needs a token, or another one
    │   │   └── AdapterDownloadError      (ConnectionError)  the connection failed, or there is none
    │   ├── CorruptAdapterError           (ValueError)    the files cannot be read: truncated, malformed, NaN
    │   ├── UnsafeAdapterError            (ValueError)    the files could do harm: pickles, links that leave the folder
    │   ├── IncompatibleAdapterError      (ValueError)    the files are sound but cannot run on this model
    │   └── AdapterLoadError              (RuntimeError)  vLLM refused an adapter that looked right
    └── RequestError                      never raised itself: everything about one request
        ├── RequestCancelledError         it was cancelled, or its handle was dropped
        ├── RequestTimeoutError           (TimeoutError)  it has not finished within its timeout
        ├── QueueFullError                too many requests wait already
        └── RequestRejectedError          (ValueError)    vLLM cannot run it: too long, a parameter out of range

Wrong argument values are plain ``ValueError`` and ``TypeError``, and waiting too long is the built-in ``TimeoutError``.
"""

from __future__ import annotations

from collections.abc import Iterable


class QLoRAInferError(Exception):
    """The base of this library's errors; catch it to catch all others."""


class MissingDependencyError(QLoRAInferError, ImportError):
    """A package that this call needs is missing or broken.

    The message ends with the command that installs it.
    """


class QuantizationError(QLoRAInferError, ValueError):
    """The checkpoint cannot be served with this quantization on this machine."""


class UnknownQuantizationError(QuantizationError, LookupError):
    """No strategy is registered under that name; the message lists the names."""


class ModelNotFoundError(QLoRAInferError, OSError):
    """The base model is neither a local checkpoint nor a readable model on the Hub."""


class UnsupportedModelError(QLoRAInferError, ValueError):
    """vLLM does not serve the model's architecture, or not with LoRA adapters; raised before weights are read."""


class EngineStartError(QLoRAInferError, RuntimeError):
    """vLLM did not start; the message has the first error of its processes, and vLLM's own error is chained."""


class ForkedEngineError(QLoRAInferError, RuntimeError):
    """The engine belongs to the parent of this forked process; make it after the fork, or spawn."""


class StorageError(QLoRAInferError, OSError):
    """No temporary folder is writable, and every adapter is copied into one."""


class EngineClosedError(QLoRAInferError, RuntimeError):
    """The engine was closed, before this call or during it."""


class EngineDeadError(QLoRAInferError, RuntimeError):
    """vLLM's engine core died (killed, out of memory, a fault in a kernel). Start a new engine."""


class AdapterError(QLoRAInferError):
    """The base of all errors about one adapter.

    Attributes:
        adapter: The adapter's name, or its source if it has no name yet.
    """

    def __init__(self, adapter: str, message: str) -> None:
        super().__init__(message)
        self.adapter = adapter

    def __str__(self) -> str:
        # OSError's own __str__ would print the two arguments as an errno and a text.
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return (type(self), (self.adapter, str(self.args[0])))


class AdapterNotLoadedError(AdapterError, LookupError):
    """No adapter of that name is loaded; the message lists the loaded ones."""


class AdapterConflictError(AdapterError, RuntimeError):
    """The name stands for another version than ``expect``; nothing was changed."""


class AdapterSourceError(AdapterError, OSError):
    """The source cannot be read."""


class AdapterNotFoundError(AdapterSourceError, LookupError):
    """The folder, repository, revision, subfolder or adapter file does not exist."""


class AdapterAccessError(AdapterSourceError, PermissionError):
    """The source needs a token, or another one."""


class AdapterDownloadError(AdapterSourceError, ConnectionError):
    """The connection to the source failed or broke, or the process is offline and has no copy."""


class CorruptAdapterError(AdapterError, ValueError):
    """The adapter's files cannot be read, or contain values that no weight can have."""


class UnsafeAdapterError(AdapterError, ValueError):
    """Reading the adapter could do harm: a pickle, or a link that leaves its folder."""


class IncompatibleAdapterError(AdapterError, ValueError):
    """The adapter is valid but cannot run on this engine.

    Attributes:
        reasons: Every reason, each a sentence.
    """

    def __init__(self, adapter: str, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(adapter, f"adapter {adapter!r} cannot run here: " + " ".join(self.reasons))

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, tuple[str, ...]]]:  # type: ignore[override]
        return (type(self), (self.adapter, self.reasons))


class AdapterLoadError(AdapterError, RuntimeError):
    """An adapter that passed every check was not loaded: vLLM refused it, or there was no room or no time."""


class RequestError(QLoRAInferError):
    """The base of all errors about one request."""


class RequestCancelledError(RequestError):
    """The request was cancelled before it finished."""


class RequestTimeoutError(RequestError, TimeoutError):
    """The request did not finish within its ``timeout``, and was stopped."""


class QueueFullError(RequestError):
    """``max_waiting`` requests wait already; this one was refused."""


class RequestRejectedError(RequestError, ValueError):
    """vLLM cannot run this request: a prompt that is too long, or a sampling parameter out of range."""
