"""The protocol between this library and the engine underneath, vLLM's or the fake one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.chat.conversation import Conversation
    from qlora_infer.chat.template import ContentFormat
    from qlora_infer.config import EngineConfig
    from qlora_infer.errors import AdapterError
    from qlora_infer.files.extras import Extras
    from qlora_infer.model.modules import ModelModules
    from qlora_infer.plan.engine_plan import EnginePlan
    from qlora_infer.quantization import Platform
    from qlora_infer.requests.arguments import PromptInput
    from qlora_infer.requests.request import GenerationOutput, GenerationRequest


@frozen
class StepOutput:
    """The result of one step of an engine.

    Attributes:
        outputs: The outputs that it has for callers.
        num_tokens: How many tokens each of the unfinished requests has been given so far.
        num_waiting: Requests that the engine has taken and not begun.
        kv_cache_usage: The share of the KV cache's blocks that requests hold, 0 to 1.
    """

    outputs: Sequence[GenerationOutput] = ()
    num_tokens: Mapping[str, int] = field(factory=dict)
    num_waiting: int = 0
    kv_cache_usage: float = 0.0


class Backend(Protocol):
    """The engine underneath, as ``QuantizedLoRAEngine`` needs it.

    ``platform``, ``read_model_config``, ``sampling_params``, ``special_tokens``, ``vocabulary``, ``render_chat`` and
    ``parse_chat`` may be called by any thread, the first two before ``start``. Everything else is called by the one
    thread that drives the engine, except ``kill``, which comes from another when that one does not return. After
    ``close`` it may be started again.
    """

    @property
    def max_num_seqs(self) -> int:
        """The sequences that one batch holds, once it is started."""
        ...

    def platform(self) -> Platform:
        """Return the platform: the machine and its installed packages."""
        ...

    def read_model_config(self, config: EngineConfig) -> Mapping[str, Any]:
        """Return the model's ``config.json``; raise ``ModelNotFoundError`` if there is none."""
        ...

    def start(self, plan: EnginePlan) -> None:
        """Load the model as planned; raises ``UnsupportedModelError`` or ``EngineStartError``."""
        ...

    def sampling_params(self, params: object, extras: Extras | None = None) -> Any:
        """Turn a mapping of fields into sampling parameters; raises ``ValueError`` and ``TypeError``.

        What the mapping leaves out is as the adapter carries it, then as the model does. Answers end at the adapter's
        stop tokens, too, whatever was given.
        """
        ...

    def special_tokens(self) -> Mapping[str, str]:
        """Return the tokens that have a role in chat templates, such as ``"eos_token"``."""
        ...

    def vocabulary(self) -> Mapping[str, int] | None:
        """All tokens of the model's tokenizer and their ids; ``None`` where any token is known."""
        ...

    def render_chat(self, conversation: Conversation) -> PromptInput:
        """Write one conversation as a prompt, with the model's chat template; raises ``ValueError``."""
        ...

    def parse_chat(
        self, conversation: Conversation, template: str, content_format: ContentFormat
    ) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]:
        """Return the messages as an adapter's template gets them, and the media in them; raises ``ValueError``."""
        ...

    def lora_modules(self) -> ModelModules:
        """Return the modules of the running model that adapters may change."""
        ...

    def start_load(self, version: AdapterVersion) -> None:
        """Begin to read a version into host memory, while steps go on."""
        ...

    def poll_loads(self) -> Mapping[AdapterVersion, AdapterError | None]:
        """Return the loads that have ended since the last call, with the error of each that left nothing behind."""
        ...

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Forget a version that was loaded, or is being loaded."""
        ...

    def add_request(self, request: GenerationRequest) -> int:
        """Begin a request, whose adapter is loaded, and tell its prompt's tokens; raises ``RequestRejectedError``."""
        ...

    def abort_request(self, request_id: str) -> None:
        """Stop a request and free its memory."""
        ...

    def step(self) -> StepOutput:
        """Wait for the next step of the running requests."""
        ...

    def kill(self) -> None:
        """End the engine at once, so that a call that hangs in another thread fails."""
        ...

    def close(self) -> None:
        """End the engine and free its memory; harmless when it never started or was closed before."""
        ...
