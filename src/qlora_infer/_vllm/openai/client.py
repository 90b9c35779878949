"""vLLM's ``EngineClient`` on an engine of this library: the calls that vLLM's server makes to an engine.

Read in vLLM 0.32.0, ``vllm/engine/protocol.py``. docs/internals/serve.md lists which of its methods the server uses.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Any, Never, Protocol

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError
from vllm.v1.engine.input_processor import InputProcessor

from qlora_infer._vllm.openai.choice import current_choice
from qlora_infer._vllm.openai.faults import ServedError, served_errors
from qlora_infer._vllm.openai.outputs import OutputWriter
from qlora_infer._vllm.openai.templates import make_renderer
from qlora_infer.errors import EngineClosedError

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.requests.handle import RequestHandle


class Requests(Protocol):
    """The client of an engine's driver, as the server needs it."""

    def add_request(
        self,
        prompt: Any,
        sampling_params: Any,
        adapter: str | AdapterVersion | None,
        priority: int,
        timeout: float | None,
        *,
        block: bool,
        stream: bool,
    ) -> RequestHandle:
        """Queue one prompt; raise where it cannot be queued."""
        ...

    @property
    def is_open(self) -> bool:
        """True if requests are accepted."""
        ...


class AdapterEngineClient(EngineClient):  # type: ignore[misc]
    """Hands the server's requests to this library's queue, whose order, versions and errors they have then.

    Args:
        requests: Queues requests.
        vllm_config: vLLM's configuration of the running engine.
        timeout: Seconds that a request may take, waiting included; ``None`` for no limit.
    """

    def __init__(self, requests: Requests, vllm_config: Any, *, timeout: float | None) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = make_renderer(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._requests = requests
        self._timeout = timeout
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._handles: weakref.WeakValueDictionary[str, RequestHandle] = weakref.WeakValueDictionary()

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        **_: Any,
    ) -> AsyncGenerator[Any, None]:
        """Queue a request at once, so that a full queue has a status, and yield its outputs.

        The other arguments are for connectors, data-parallel ranks and traces of vLLM's own engine.
        """
        choice = current_choice() if lora_request is not None else None
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        with served_errors():
            handle = self._requests.add_request(
                _prompt(prompt),
                sampling_params,
                choice.version if choice is not None else None,
                _checked_priority(priority),
                self._timeout,
                block=False,
                stream=is_delta,
            )
        self._handles[request_id] = handle
        return _outputs(handle, OutputWriter(request_id, lora_request, is_delta))

    def encode(self, *_: Any, **__: Any) -> Never:
        """Refuse: this engine generates text."""
        raise NotImplementedError("this engine generates text, and has no pooling models")

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Cancel requests; unknown ones have ended."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            handle = self._handles.get(one)
            if handle is not None:
                handle.cancel()

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse a request of more sequences than a batch holds; whether the queue is full, ``generate`` finds out."""
        if n > self._max_num_seqs:
            raise VLLMValidationError(f"n is at most {self._max_num_seqs}, got {n}", parameter="n")

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Return what this engine does."""
        return ("generate",)

    # Health -----------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """True if requests are accepted."""
        return self._requests.is_open

    @property
    def is_stopped(self) -> bool:
        """True if no requests are accepted."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """True if no requests are accepted; the server checks it before a stream begins."""
        return not self.is_running

    @property
    def dead_error(self) -> BaseException:
        """The error of a request that comes too late."""
        return ServedError(EngineClosedError("the engine has ended, or is being closed"))

    async def check_health(self) -> None:
        """Raise the error for which ``/health`` is 503, if no requests are taken."""
        if not self.is_running:
            raise VLLMEngineDeadError

    async def is_tracing_enabled(self) -> bool:
        """Return ``False``: this library traces requests itself."""
        return False

    async def do_log_stats(self) -> None:
        """Do nothing: ``/metrics`` has the numbers."""

    # The rest of the protocol, which no route that is served calls ----------------------------------------------

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        """Do nothing: there are no KV connectors."""

    async def add_lora(self, lora_request: Any) -> bool:
        """Refuse: adapters are loaded by ``load_adapter``, which checks them."""
        raise NotImplementedError("adapters are loaded through PUT /adapters/NAME")

    async def start_profile(self, *_: Any, **__: Any) -> None:
        """Refuse."""
        raise NotImplementedError

    async def stop_profile(self) -> None:
        """Refuse."""
        raise NotImplementedError

    async def reset_mm_cache(self) -> None:
        """Refuse."""
        raise NotImplementedError

    async def reset_encoder_cache(self) -> None:
        """Refuse."""
        raise NotImplementedError

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Refuse."""
        raise NotImplementedError

    async def sleep(self, *_: Any, **__: Any) -> None:
        """Refuse: sleeping drops all adapters."""
        raise NotImplementedError

    async def release_kv_cache_memory(self) -> None:
        """Refuse."""
        raise NotImplementedError

    async def wake_up(self, *_: Any, **__: Any) -> bool:
        """Refuse."""
        raise NotImplementedError

    async def is_sleeping(self) -> bool:
        """Return ``False``."""
        return False

    async def pause_generation(self, *_: Any, **__: Any) -> None:
        """Refuse."""
        raise NotImplementedError

    async def resume_generation(self) -> None:
        """Refuse."""
        raise NotImplementedError

    async def is_paused(self) -> bool:
        """Return ``False``."""
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: the engine belongs to the caller."""


async def _outputs(handle: RequestHandle, writer: OutputWriter) -> AsyncGenerator[Any, None]:
    """Yield a request's outputs; one that is closed, or never begun and dropped, cancels its request."""
    try:
        with served_errors():
            if not writer.is_delta:
                yield writer.write(await handle)
                return
            async for output in handle:
                yield writer.write(output)
    finally:
        handle.cancel()


def _prompt(prompt: Any) -> dict[str, Any]:
    """Return the tokens and pictures of an input as this server's renderer makes it (``vllm/inputs/engine.py``)."""
    if prompt.get("type") != "token" or prompt.get("cache_salt") is not None:
        raise VLLMValidationError("this server takes texts, token ids and pictures: no embeddings or cache_salt")
    return {name: prompt[name] for name in ("prompt_token_ids", "multi_modal_data") if name in prompt}


def _checked_priority(priority: int) -> int:
    """Return a client's priority: it may stand back behind others, and not go before them."""
    if priority < 0:
        raise VLLMValidationError(f"priority must be at least 0 here, got {priority}", parameter="priority")
    return priority
