"""``QuantizedLoRAEngine``: one quantized base model and its LoRA adapters.

Plain vLLM serves both, with traps: an adapter that does not load ends the engine, an integer id used twice silently
serves the wrong adapter, old KV blocks answer for new bytes under an old name, and on the CPU a base request in a mixed
batch gets another request's adapter. This class removes them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, Self, TypeAlias

from qlora_infer._forked import LivingEngines
from qlora_infer.adapters.effect import PROBE, AdapterEffect, Scores, effect, reference_scores
from qlora_infer.adapters.known import KnownAdapters, Sources
from qlora_infer.adapters.loader import AdapterLoader
from qlora_infer.adapters.memory import HostMemory
from qlora_infer.adapters.registry import AdapterRegistry
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.adapters.version import LoadedAdapter
from qlora_infer.chat.conversation import Message
from qlora_infer.config import EngineConfig, LoraKernels, Startup
from qlora_infer.display import Displayed, Table
from qlora_infer.errors import EngineClosedError, EngineDeadError, EngineStartError, ForkedEngineError
from qlora_infer.files.scratch import new_folder
from qlora_infer.model.weights import BaseWeights
from qlora_infer.plan.engine_plan import EnginePlan
from qlora_infer.quantization import QuantizationStrategy
from qlora_infer.requests.arguments import check_unknown, conversation_list, prompt_list
from qlora_infer.requests.backend import Backend
from qlora_infer.requests.client import Client, OnError
from qlora_infer.requests.driver import Driver
from qlora_infer.requests.handle import PartialOutputs, RequestHandle
from qlora_infer.requests.queue import Policy, RequestQueue
from qlora_infer.requests.request import GenerationOutput, Prompt
from qlora_infer.requests.stats import EngineStats
from qlora_infer.sources.source import Source, SourceLike, parse_source, parse_sources

if TYPE_CHECKING:
    from vllm import SamplingParams
else:
    SamplingParams = Any  # vLLM is loaded by an engine that needs it, not by this module

logger = logging.getLogger("qlora_infer")

#: A mapping of the fields of vLLM's ``SamplingParams`` over the adapter's and the model's defaults, ``None`` for these,
#: or a ``SamplingParams``.
Sampling: TypeAlias = SamplingParams | Mapping[str, Any] | None


class QuantizedLoRAEngine(Displayed):
    """A quantized base model on vLLM that serves many LoRA adapters, which you load and remove while it runs.

    Every thread can call every method. The engine copies, checks and loads an adapter before requests can use it, so a
    broken adapter neither ends the engine nor affects other requests.

    While an engine is open, Python's garbage collector skips the objects that existed when the newest engine started,
    because a pass over all of them stops the process for tenths of a second. ``gc.unfreeze()`` undoes this.

    Args:
        model: A Hub id, or a local folder with a checkpoint.
        quantization: ``"auto"`` reads the checkpoint's ``config.json``, and quantizes an unquantized checkpoint to 4
            bits with bitsandbytes as it loads. ``"none"`` serves an unquantized checkpoint in its own 16 bits. ``None``
            does the same as vLLM: it reads ``config.json``, and leaves an unquantized checkpoint as it is. You can also
            pass a strategy, or the name of a registered one.
        adapters: Adapters to load at the start, name to source.
        known_adapters: Adapters to load when the first request names them: a mapping of names to sources, a folder with
            one adapter in each folder, or a function that returns a name's source, or ``None`` for an unknown name.
            Other requests continue meanwhile.
        max_loras: The number of adapters that one batch can mix. Each takes a slot in the device's memory, whose size
            depends on ``max_lora_rank``. ``"auto"`` chooses the number from the free memory, and logs it.
        max_slot_bytes: With ``max_loras="auto"``, the bytes for all slots; ``None`` for a twentieth of the memory.
        max_lora_rank: The largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512. ``"auto"`` takes the rank
            that ``adapters`` need, or 64 without ``adapters``.
        max_cpu_loras: The number of adapters kept in host memory, ready to move into a slot. ``"auto"`` chooses it from
            the free memory, and logs it.
        max_cpu_bytes: The bytes of adapters in host memory, by their real sizes; ``None`` for no limit.
        max_disk_bytes: The bytes of private copies on disk; ``None`` for no limit. When the limit is exceeded, copies
            of idle adapters are deleted and made again on next use, so a source must not change.
        max_loaded_adapters: The number of known adapters that stay loaded; ``None`` for no limit. When it is exceeded,
            the least recently used one without requests is unloaded until its next request. Pinned adapters, and those
            of ``adapters`` and ``load_adapter``, stay.
        max_model_len: The tokens of prompt and answer together; ``None`` for the model's limit.
        enforce_eager: Run without CUDA graphs, which is several times slower. ``"auto"`` does so only on a GPU with too
            little memory for graphs, and logs it.
        startup: On a GPU, ``"fast"`` captures CUDA graphs without torch.compile and starts in about a minute.
            ``"compiled"`` is vLLM's default, which takes longer for larger models. ``compilation_config`` in
            ``engine_args`` overrides it. On a CPU it has no effect.
        lora_kernels: On a GPU, ``"auto"`` uses this library's LoRA kernels on Hopper and vLLM's on other GPUs;
            ``"vllm"`` always uses vLLM's.
        revision: The model's branch, tag or commit on the Hub.
        token: The Hub's access token, for the model and for adapters without their own. It is never printed.
        engine_args: Further arguments of vLLM's ``EngineArgs``.
        reasoning_parser: The name of vLLM's parser that separates reasoning from answers (``"qwen3"``,
            ``"deepseek_r1"``), for ``output.reasoning`` and ``output.content``.
        tool_call_parser: The name of vLLM's parser that finds tool calls (``"hermes"``, ``"llama3_json"``) in answers
            to ``chat`` with ``tools``, for ``output.tool_calls``.
        policy: ``"fair"`` shares the engine among adapters, so that none starves behind a busy one
            (docs/scheduling.md). ``"fcfs"`` serves requests strictly first come, first served.
        max_waiting: The number of requests that can wait; ``None`` for no limit. Above it, ``add_request`` blocks or
            raises ``QueueFullError``.
        restart: ``"on-failure"`` starts a new engine core if one dies, loads the same adapters, and repeats the
            requests without output; the others fail with ``EngineDeadError``. With ``"never"``, all fail.
        backend: The engine underneath; ``None`` for vLLM. Tests pass ``qlora_infer.testing.FakeEngine()``.

    Raises:
        TypeError: An argument is unknown. Pass vLLM's arguments in ``engine_args``.
        ValueError: An argument is out of range, or ``engine_args`` contradicts another.
        MissingDependencyError: A package is missing; the message has the command that installs it.
        QuantizationError: The checkpoint cannot be served this way on this machine.
        ModelNotFoundError: There is no such model, or the token does not open it.
        AdapterError: One of ``adapters`` cannot be loaded.
        UnsupportedModelError: vLLM does not serve the model's architecture, or not with adapters.
        EngineStartError: vLLM did not start.

    Example:
        >>> from qlora_infer import QuantizedLoRAEngine
        >>> from qlora_infer.testing import FakeEngine, write_adapter
        >>> pirate = write_adapter("pirate")
        >>> with QuantizedLoRAEngine("org/model", adapters={"pirate": pirate}, backend=FakeEngine()) as engine:
        ...     [output.text for output in engine.generate(["ahoy", "hello"], adapter=["pirate", None])]
        ['pirate says: ahoy', 'You said: hello']
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        quantization: str | QuantizationStrategy | None = "auto",
        adapters: Mapping[str, SourceLike] | None = None,
        known_adapters: Sources | None = None,
        max_loras: int | Literal["auto"] = 8,
        max_slot_bytes: int | None = None,
        max_lora_rank: int | Literal["auto"] = "auto",
        max_cpu_loras: int | Literal["auto"] = "auto",
        max_cpu_bytes: int | None = None,
        max_disk_bytes: int | None = None,
        max_loaded_adapters: int | None = 256,
        max_model_len: int | None = None,
        enforce_eager: bool | Literal["auto"] = "auto",
        startup: Startup = "fast",
        lora_kernels: LoraKernels = "auto",
        revision: str | None = None,
        token: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        reasoning_parser: str | None = None,
        tool_call_parser: str | None = None,
        policy: Policy = "fair",
        max_waiting: int | None = None,
        restart: Literal["never", "on-failure"] = "never",
        backend: Backend | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            from qlora_infer._vllm.arguments import format_unknown

            raise TypeError(format_unknown(unknown))
        config = EngineConfig(
            model=os.fspath(model),
            quantization=quantization,
            max_loras=max_loras,
            max_slot_bytes=max_slot_bytes,
            max_lora_rank=max_lora_rank,
            max_cpu_loras=max_cpu_loras,
            max_cpu_bytes=max_cpu_bytes,
            max_disk_bytes=max_disk_bytes,
            max_loaded_adapters=max_loaded_adapters,
            max_model_len=max_model_len,
            enforce_eager=enforce_eager,
            startup=startup,
            lora_kernels=lora_kernels,
            revision=revision,
            token=token,
            engine_args=engine_args or {},
            reasoning_parser=reasoning_parser,
            tool_call_parser=tool_call_parser,
            policy=policy,
            max_waiting=max_waiting,
            restart=restart,
        )
        sources = parse_sources(adapters or {})
        _require_main_guard()
        self._backend = backend or _vllm_backend()
        self._config = config
        self._plan = plan = EnginePlan.of(config, self._backend.read_model_config(config), self._backend.platform())

        # None of these may hold on to this object: when its last reference goes, it is closed.
        folder = new_folder("store-")
        store = AdapterStore(folder, max_bytes=config.max_disk_bytes, token=config.token)
        memory = HostMemory(self._backend, store, plan.max_cpu_loras, plan.max_loras, config.max_cpu_bytes)
        registry = AdapterRegistry(
            store,
            on_idle=lambda version: _unless_ended(driver.post, memory.evict, version),
            on_gone=lambda name: _unless_ended(driver.forget, name),
            on_unused=lambda: known.trim(),
        )
        queue = RequestQueue(config.policy, max_loras=plan.max_loras, is_resident=memory.__contains__)
        driver = Driver(
            self._backend,
            queue,
            memory,
            release=registry.release,
            max_waiting=config.max_waiting,
            restarts=config.restart == "on-failure",
        )
        self._memory, self._registry, self._driver = memory, registry, driver
        self._loader = AdapterLoader(
            registry,
            memory,
            driver,
            model=config.model,
            base=BaseWeights(config.model, revision=config.revision, token=config.token),
            vocabulary=self._backend.vocabulary,
        )
        self._known = known = KnownAdapters(
            known_adapters,
            registry,
            self._loader,
            max_loaded=config.max_loaded_adapters,
            on_failed=lambda name: _unless_ended(driver.forget, name),
        )
        self._client = Client(self._backend, registry, known, driver, model=config.model)
        self._close = weakref.finalize(self, _close, known, driver, store, folder)
        _living.add(self)
        try:
            self._start(sources)
        except BaseException:
            self.close()
            raise

    def _start(self, sources: Mapping[str, Source]) -> None:
        # Adapters are read before the model is, so that a mistake in one shows in seconds.
        versions = [self._loader.prepare(name, source) for name, source in sources.items()]
        max_lora_rank = self._loader.choose_rank(self._config.max_lora_rank, versions)
        if versions and self._config.max_lora_rank == "auto":
            self._plan = self._plan.with_rank(max_lora_rank)
        for decision in self._plan.decisions:
            logger.log(decision.level, "%s", decision)
        logger.info("starting with %s; this takes from half a minute to some minutes", self._config.model)
        began = time.monotonic()
        self._driver.start(self._plan)
        logger.info("ready after %.0f s", time.monotonic() - began)
        self._loader.model_modules = self._driver.call(self._backend.lora_modules)
        for version in versions:
            self._loader.publish(version)

    # Adapters ---------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name; a copy that does not change."""
        return self._registry.records()

    def load_adapter(
        self,
        name: str,
        source: SourceLike | None = None,
        *,
        share: float = 1.0,
        expect: str | int | None = None,
        allow_pickle: bool = False,
        strict: bool = False,
    ) -> LoadedAdapter:
        """Load an adapter, or replace the adapter of this name, while requests run.

        The call fetches, checks and loads the adapter, and then moves the name in one step. Earlier requests finish on
        the old content, later ones use the new. If anything fails, the call raises and the name keeps its adapter.
        Content that the name already has is not loaded again.

        Args:
            name: The name for requests.
            source: A Hub id (``"org/repo"``, ``"org/repo@revision:sub/folder"``), a local folder, the URL of a folder
                on any fsspec filesystem (``"s3://bucket/pirate"``, ``"https://host/pirate"``), or PEFT's ``PeftModel``.
                ``HubSource`` and ``URLSource`` add tokens and options, ``TensorSource`` takes a state dict with its
                config, and ``BlendSource`` blends loaded adapters. ``None`` loads the adapter of this name from
                ``known_adapters``, unless it is loaded; the other arguments then have no effect.
            share: The adapter's weight when others wait too; the base model has 1. If you load the same content again,
                only the share changes.
            expect: The version that you replace, by number or digest, or 0 if no adapter has the name yet. Use it if
                several programs push versions, so that none overwrites another's.
            allow_pickle: Convert an ``adapter_model.bin`` if there is no ``adapter_model.safetensors``.
            strict: Refuse an adapter with an invalid chat template, generation config or tokenizer. By default these
                files are ignored with a warning.

        Returns:
            The loaded adapter.

        Raises:
            ValueError: The source is malformed, or a blend's adapters cannot be blended this way.
            AdapterNotFoundError: The source does not exist.
            AdapterNotLoadedError: An adapter of a blend is not loaded, or ``known_adapters`` does not have the name.
            AdapterAccessError: The source needs a token, or another one.
            AdapterDownloadError: The connection failed.
            AdapterSourceError: The source's files cannot be read.
            MissingDependencyError: The package for this kind of source is not installed.
            CorruptAdapterError: The files are malformed.
            UnsafeAdapterError: Reading the files could do harm.
            IncompatibleAdapterError: The adapter does not fit this engine; ``reasons`` lists every reason.
            AdapterLoadError: vLLM refused the adapter, or there is no room.
            AdapterConflictError: The name stands for another version than ``expect``.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:
            ...     engine.load_adapter("pirate", write_adapter("pirate"), share=2.0).version
            1
        """
        _check_share(share)
        if source is None:
            return self._known.load(name)
        given = parse_source(source)
        self._driver.require_open()
        loaded = self._loader.load(name, given, share=share, allow_pickle=allow_pickle, strict=strict, expect=expect)
        self._known.keep(name)
        return loaded

    def rollback_adapter(self, name: str) -> LoadedAdapter:
        """Go back to the previous version of an adapter, and remove the newer one.

        The engine keeps the previous version of each name on disk. Earlier requests finish on the version that they
        have.

        Args:
            name: The adapter's name.

        Returns:
            The adapter that serves now.

        Raises:
            AdapterNotLoadedError: No adapter has that name, or it has no earlier version.
            AdapterLoadError: vLLM refused the version; the newer one still serves.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:
            ...     for seed in (1, 2):
            ...         _ = engine.load_adapter("pirate", write_adapter("pirate", seed=seed))
            ...     engine.rollback_adapter("pirate").version
            1
        """
        return self._loader.rollback(name)

    def adapter_versions(self, name: str) -> list[LoadedAdapter]:
        """Return the versions of an adapter that requests can use, the newest first.

        Args:
            name: The adapter's name. Requests name a version as ``"name@2"``, or with a digest instead of the number.

        Raises:
            AdapterNotLoadedError: No adapter has that name.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:
            ...     for seed in (1, 2):
            ...         _ = engine.load_adapter("pirate", write_adapter("pirate", seed=seed))
            ...     [loaded.version for loaded in engine.adapter_versions("pirate")]
            [2, 1]
        """
        return self._registry.versions(name)

    def pin_adapter(self, name: str) -> None:
        """Keep an adapter and its later versions in host memory, until you unpin or unload it.

        Args:
            name: The adapter's name; a known adapter is loaded first.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
            AdapterLoadError: No room would be left for adapters that are not pinned.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:
            ...     _ = engine.load_adapter("pirate", write_adapter("pirate"))
            ...     engine.pin_adapter("pirate")
            ...     engine.unpin_adapter("pirate")
        """
        self._known.require(name)
        self._loader.pin(name)
        self._known.keep(name)

    def unpin_adapter(self, name: str) -> None:
        """Allow a pinned adapter to leave host memory again; do nothing if it is not pinned.

        Args:
            name: The adapter's name.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        self._loader.unpin(name)

    def prefetch_adapters(self, names: Iterable[str]) -> None:
        """Start to read adapters into host memory, so that their first requests wait less.

        The call returns at once. It reads as many adapters as there is room for.

        Args:
            names: The names of loaded or known adapters.

        Raises:
            AdapterNotLoadedError: One of them is neither loaded nor known; nothing is read.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine(known_adapters={"pirate": write_adapter("pirate")}) as engine:
            ...     engine.prefetch_adapters(["pirate"])
        """
        names, loaded = list(names), self.adapters
        to_load = {name for name in names if name not in loaded and self._known.knows(name)}
        self._loader.prefetch(name for name in names if name not in to_load)
        for name in to_load:
            self._known.request(name, lambda found: None)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter with all its versions, and unpin it; earlier requests finish.

        Args:
            name: The adapter's name.

        Raises:
            AdapterNotLoadedError: No adapter has that name.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:
            ...     _ = engine.load_adapter("pirate", write_adapter("pirate"))
            ...     engine.unload_adapter("pirate")
            ...     list(engine.adapters)
            []
        """
        self._loader.unload(name)

    def verify_adapter(
        self, name: str, prompts: Sequence[str] | None = None, *, reference: str | os.PathLike[str] | None = None
    ) -> AdapterEffect:
        """Measure how much an adapter changes predictions, and optionally how far it is from PEFT.

        The base model and the adapter read the same texts, and the log-probabilities of each token are compared. An
        adapter that was never trained, or is not applied, changes nothing.

        Args:
            name: A loaded adapter, or one of its versions.
            prompts: Texts of at least two tokens, similar to the adapter's task; by default five texts of everyday
                English and code.
            reference: A checkpoint of the same model that transformers can load, such as the unquantized one. It is
                loaded into this process and the host's memory, with the adapter on top by PEFT.

        Returns:
            The measured effect; ``print`` shows it.

        Raises:
            ValueError: ``prompts`` is empty, or contains a text of one token.
            AdapterNotLoadedError: No adapter has that name.
            MissingDependencyError: With ``reference``, a package is missing.
            ModelNotFoundError: transformers cannot load ``reference``.
            Exception: The errors of ``generate``.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:  # its adapters change no probability
            ...     _ = engine.load_adapter("pirate", write_adapter("pirate"))
            ...     engine.verify_adapter("pirate", ["ahoy my hearties"]).share_changed
            0.0
        """
        texts = prompt_list(PROBE if prompts is None else prompts)
        if not texts:
            raise ValueError("prompts must hold at least one text")
        self._known.require(name)
        with self._registry.in_use(name) as version:
            exact = f"{version.name}@{version.number}"
            outputs = self._client.generate(
                [*texts, *texts],
                {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1},
                [None] * len(texts) + [exact] * len(texts),
                0,
                None,
                use_tqdm=False,
            )
            if any(len(output.prompt_token_ids) < 2 for output in outputs):
                raise ValueError("prompts must be texts of at least two tokens: the first has no probability")
            scores = [Scores.read(output.prompt_token_ids, output.prompt_logprobs or ()) for output in outputs]
            base, adapted = scores[: len(texts)], scores[len(texts) :]
            other = None
            if reference is not None:
                token_ids = [output.prompt_token_ids for output in outputs[: len(texts)]]
                self._registry.fetch(version)
                other = reference_scores(
                    os.fspath(reference), version.snapshot.folder, token_ids, token=self._config.token
                )
        return effect(exact, base, adapted, other)

    # Requests ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        priority: int | Sequence[int] = 0,
        timeout: float | None = None,
        add_special_tokens: bool = True,
        use_tqdm: bool = True,
        **_unknown: Never,
    ) -> list[GenerationOutput]:
        """Answer prompts, and wait for all of them.

        Args:
            prompts: A text, a list of token ids, a mapping as in vLLM (``{"prompt": …, "multi_modal_data": {"image":
                …}}``), or a list of these.
            sampling_params: A mapping of the fields of vLLM's ``SamplingParams``, ``None``, or one of these per prompt.
                Missing fields come from the adapter's ``generation_config.json``, then from the model's, then from vLLM
                (``max_tokens``: 16). A ``SamplingParams`` is used without these defaults. Answers end at the stop
                tokens of model and adapter, unless ``ignore_eos`` is set.
            adapter: The name of an adapter, ``None`` for the base model, or one of these per prompt.
            priority: A lower number goes first, before all fairness; one for all, or one per prompt.
            timeout: Seconds for each prompt from now, waiting included; ``None`` for no limit.
            add_special_tokens: Add the tokenizer's special tokens to texts. Pass ``False`` for a text that a chat
                template has written.
            use_tqdm: Show progress on a terminal or in a notebook.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: The lengths differ, or a sampling parameter is out of range; nothing is queued.
            AdapterNotLoadedError: An adapter is not loaded; nothing is queued.
            RequestRejectedError: vLLM cannot run one of them, such as a prompt that is too long; the rest is cancelled.
            RequestTimeoutError: One of them did not finish in time; the rest is cancelled.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     [output.text for output in engine.generate(["ahoy", "hello"], {"max_tokens": 8})]
            ['You said: ahoy', 'You said: hello']
        """
        check_unknown("generate", _unknown)
        return self._client.generate(
            prompt_list(prompts),
            sampling_params,
            adapter,
            priority,
            timeout,
            add_special_tokens=add_special_tokens,
            use_tqdm=use_tqdm,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Sampling | Sequence[Sampling] = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        priority: int | Sequence[int] = 0,
        timeout: float | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        use_tqdm: bool = True,
        **_unknown: Never,
    ) -> list[GenerationOutput]:
        """Answer conversations, and wait for all of them.

        The adapter's chat template formats each conversation, or the model's if the adapter has none, as
        ``vllm.LLM.chat`` does.

        Args:
            messages: One conversation, a list of messages with ``role`` and ``content``, or a list of conversations.
                ``content`` is a text or a list of OpenAI's parts: ``{"type": "text", "text": …}``, ``{"type":
                "image_url", "image_url": {"url": …}}``.
            sampling_params: As in ``generate``.
            adapter: As in ``generate``.
            priority: As in ``generate``.
            timeout: As in ``generate``.
            tools: The tools that the model can call, each ``{"type": "function", "function": {…}}``.
            chat_template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.
            add_generation_prompt: End the prompt with the beginning of the assistant's turn; ``None`` for yes, unless
                ``continue_final_message``.
            continue_final_message: Continue the last message, which is the beginning of the answer.
            use_tqdm: As in ``generate``.

        Returns:
            One output per conversation, in their order; ``prompt`` is the formatted conversation.

        Raises:
            ValueError: The template cannot format the messages, or they contain an image and the model reads text only.
            Exception: The errors of ``generate``.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     engine.chat([{"role": "user", "content": "ahoy"}], {"max_tokens": 8})[0].prompt
            'user: ahoy'
        """
        check_unknown("chat", _unknown)
        conversations = conversation_list(
            messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._client.generate(conversations, sampling_params, adapter, priority, timeout, use_tqdm=use_tqdm)

    def generate_iter(
        self,
        prompts: Iterable[Prompt | Sequence[Message]],
        sampling_params: Sampling | Iterable[Sampling] = None,
        *,
        adapter: str | Iterable[str | None] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        add_special_tokens: bool = True,
        in_order: bool = True,
        max_pending: int | None = None,
        on_error: OnError = "raise",
        use_tqdm: bool = True,
        **_unknown: Never,
    ) -> Iterator[GenerationOutput]:
        """Answer any number of prompts, and yield outputs while it reads further prompts.

        Args:
            prompts: An iterable of prompts as in ``add_request``, which can be endless.
            sampling_params: As in ``generate``; one for all, or an iterable with one per prompt.
            adapter: As in ``generate``; one for all, or an iterable with one per prompt.
            priority: As in ``generate``, one for all.
            timeout: As in ``generate``; the time of a prompt begins when it is read.
            add_special_tokens: As in ``generate``.
            in_order: Yield outputs in the order of the prompts, else as they finish.
            max_pending: The number of prompts read ahead of the yielded output; ``None`` for four batches (``4 *
                max_num_seqs``). A larger number groups adapters better.
            on_error: ``"raise"`` ends the loop at the first prompt that fails. ``"return"`` yields an output with its
                ``error``, and the others continue; if the engine dies, the loop still raises.
            use_tqdm: As in ``generate``.

        Yields:
            One output per prompt; ``output.index`` is the prompt's position. If you leave the loop early, unfinished
            requests are cancelled.

        Raises:
            Exception: The errors of ``generate``, when the prompt is read or its output is due; the rest is cancelled.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     prompts = (f"number {i}" for i in range(100_000))
            ...     outputs = engine.generate_iter(prompts, {"max_tokens": 8})
            ...     [next(outputs).text, next(outputs).text]
            ['You said: number 0', 'You said: number 1']
        """
        check_unknown("generate_iter", _unknown)
        outputs = self._client.generate_iter(
            prompts,
            sampling_params,
            adapter,
            priority,
            timeout,
            add_special_tokens=add_special_tokens,
            in_order=in_order,
            max_pending=max_pending,
            on_error=on_error,
            use_tqdm=use_tqdm,
        )
        return self._held_by(outputs)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: Sampling = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        add_special_tokens: bool = True,
        block: bool = True,
        **_unknown: Never,
    ) -> PartialOutputs:
        """Answer one prompt, and yield partial outputs as tokens come, each with the whole text so far.

        Use ``for part in engine.stream(...)`` or ``async for part in engine.stream(...)``. If you leave the loop early,
        the request is cancelled.

        Args:
            prompt: As in ``add_request``.
            sampling_params: As in ``generate``.
            adapter: As in ``generate``.
            priority: As in ``generate``.
            timeout: As in ``generate``.
            add_special_tokens: As in ``generate``.
            block: As in ``add_request``.

        Raises:
            QueueFullError: ``max_waiting`` requests wait, and ``block`` is false.
            Exception: The errors of ``generate``. The call itself raises errors of the arguments, the loop the others.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     for part in engine.stream("one two", {"max_tokens": 8}):
            ...         text = part.text
            >>> text
            'You said: one two'
        """
        check_unknown("stream", _unknown)
        return iter(
            self.add_request(
                prompt,
                sampling_params,
                adapter=adapter,
                priority=priority,
                timeout=timeout,
                add_special_tokens=add_special_tokens,
                block=block,
            )
        )

    def add_request(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: Sampling = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        add_special_tokens: bool = True,
        block: bool = True,
        **_unknown: Never,
    ) -> RequestHandle:
        """Queue one prompt and return at once.

        Args:
            prompt: A prompt as in ``generate``, or a conversation: a list of messages, or a mapping with ``messages``
                and the arguments of ``chat``, such as ``{"messages": [...], "tools": [...]}``.
            sampling_params: As in ``generate``.
            adapter: As in ``generate``.
            priority: As in ``generate``.
            timeout: As in ``generate``.
            add_special_tokens: As in ``generate``.
            block: If ``max_waiting`` requests wait already, wait for room, else raise. In a coroutine the call always
                raises, because it must not block the event loop.

        Returns:
            A handle: ``handle.result(timeout)``, ``await handle``, ``for`` and ``async for``, ``handle.cancel()``. If
            you drop the handle, the request is cancelled.

        Raises:
            ValueError: A sampling parameter is out of range, or the template cannot format the conversation.
            AdapterNotLoadedError: The adapter is not loaded.
            QueueFullError: ``max_waiting`` requests wait, and ``block`` is false, or this is a coroutine.
            RequestTimeoutError: There was no room within ``timeout``.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     engine.add_request("one two", {"max_tokens": 8}).result(timeout=10).text
            'You said: one two'
        """
        check_unknown("add_request", _unknown)
        return self._client.add_request(
            prompt, sampling_params, adapter, priority, timeout, add_special_tokens=add_special_tokens, block=block
        )

    def stats(self) -> EngineStats:
        """Return the engine's counters and current load; you can call it every second.

        Example:
            >>> from qlora_infer.testing import fake_engine
            >>> with fake_engine() as engine:
            ...     engine.stats().num_waiting
            0
        """
        return self._driver.stats()

    def _held_by(self, outputs: Iterator[GenerationOutput]) -> Iterator[GenerationOutput]:
        yield from outputs  # a generator holds on to its object, so that the engine is not closed before the last

    # Life -------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> EnginePlan:
        """The decisions before vLLM started, with their reasons; ``print`` shows them."""
        return self._plan

    @property
    def is_running(self) -> bool:
        """True while the engine accepts requests; use it for health checks.

        If an idle core dies, the next request detects it.
        """
        return self._driver.is_open

    def close(self) -> None:
        """Close the engine and free the device's memory.

        Unfinished requests fail with ``EngineClosedError``. The call takes at most about 20 seconds, also if the engine
        hangs. A second call does nothing.
        """
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def aclose(self) -> None:
        """Close the engine as ``close`` does, without blocking the event loop."""
        import asyncio

        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        try:
            names = ", ".join(self.adapters) or "none"
        except ForkedEngineError:
            return f"<QuantizedLoRAEngine {self._config.model} of another process>"
        return f"<QuantizedLoRAEngine {self._config.model} {self._state}, adapters: {names}>"

    @property
    def _state(self) -> str:
        return "running" if self.is_running else "dead" if self._close.alive else "closed"

    def _tables(self) -> Sequence[Table]:
        stats, adapters = self.stats(), self._registry.records()
        rows = [
            ("model", self._config.model),
            ("quantization", self._plan.quantization),
            ("state", self._state),
            ("requests", f"{stats.num_waiting} waiting, {stats.num_running} running"),
            ("adapters", f"{len(adapters)}, {self._plan.max_loras} in a batch at most"),
        ]
        return [Table(rows), *(adapters._tables() if adapters else ())]


_living = LivingEngines(parts=("_backend", "_memory", "_registry", "_driver", "_loader", "_known", "_client"))


def _close(known: KnownAdapters, driver: Driver, store: AdapterStore, folder: Path) -> None:
    known.close()
    driver.close()
    store.close()
    shutil.rmtree(folder, ignore_errors=True)


def _unless_ended(function: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(EngineClosedError, EngineDeadError):  # the memory went with the engine
        function(*args)


def _vllm_backend() -> Backend:
    _require_children()
    from qlora_infer._vllm.engine import VLLMBackend, require_vllm

    require_vllm()
    return VLLMBackend()


def _require_main_guard() -> None:
    # vLLM's core is spawned, which imports the script again; without the guard that would start another engine.
    import multiprocessing  # a child has it already

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "the engine was made while its own child process imported the script: put the code that makes it under\n"
            '    if __name__ == "__main__":'
        )


def _require_children() -> None:
    import multiprocessing

    if multiprocessing.current_process().daemon:
        raise EngineStartError(
            "this process is a daemon of multiprocessing, which may start no processes, and an engine is some: make "
            "the engine in a process with daemon=False, or in a concurrent.futures.ProcessPoolExecutor"
        )


def _check_share(share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"share must be a number, got {share!r}")
    if not 0 < share < math.inf:
        raise ValueError(f"share must be more than 0, got {share!r}")
