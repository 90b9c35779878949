"""``QuantizedLoRAEngine``, the engine that users hold: one quantized base model and its LoRA adapters.

Plain vLLM can serve both, and hands its caller a list of traps: an adapter that does not load ends the engine, an
integer id used twice silently serves the wrong adapter, new bytes under an old name are answered from old KV blocks,
and on the CPU a base request in a mixed batch gets somebody else's adapter. This class exists to take them away.
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
    """A quantized base model on vLLM that serves many LoRA adapters, which come and go while it runs.

    Any thread may call any method. An adapter is copied, checked and loaded before a request can name it, so that no
    adapter, however broken, ends the engine or disturbs another request.

    Until the last engine is closed, Python's garbage collector passes over the objects that were there when the newest
    one started: to go through all of them stops the process for tenths of a second. ``gc.unfreeze()`` ends that before.

    Args:
        model: A Hub id or a local folder with a checkpoint.
        quantization: ``"auto"`` reads ``config.json`` and takes what it says; an unquantized checkpoint is quantized
            to 4 bits with bitsandbytes as it loads. ``"none"`` serves such a checkpoint in its own 16 bits. Or the name
            of a registered strategy, or a strategy. ``None`` is as in vLLM: what ``config.json`` says, and an
            unquantized checkpoint as it is.
        adapters: Adapters to load at once, by name.
        known_adapters: Adapters to load when a request first names them: their sources by name, a folder that has one
            in each of its folders, or a function from a name to a source, or to ``None`` where it knows none. Requests
            for other adapters go on meanwhile.
        max_loras: Adapters that one batch may mix; each takes a slot in the device's memory, of the size that
            ``max_lora_rank`` needs. ``"auto"`` chooses from that size and the memory, and logs it.
        max_slot_bytes: With ``max_loras="auto"``, the bytes for all slots; ``None`` for a twentieth of the memory.
        max_lora_rank: The largest rank that an adapter may have: 1, 8, 16, 32, 64, 128, 256, 320 or 512. ``"auto"``
            takes what ``adapters`` need, or 64 where none are given.
        max_cpu_loras: Adapters kept in host memory, ready to move into a slot. ``"auto"`` chooses from the memory
            that is free, and logs it.
        max_cpu_bytes: Bytes of adapters kept there, by their real sizes; ``None`` for no limit but their number.
        max_disk_bytes: Bytes of private copies on disk, from which adapters are read; ``None`` for no limit. Over it,
            copies of idle adapters go, and are made again from their source when they are asked for: keep what the
            source names as it was.
        max_loaded_adapters: Of more adapters than these that were loaded on first use, the least recently used that
            has no requests is unloaded, until it is asked for again; ``None`` for no limit. Those that ``adapters`` or
            ``load_adapter`` loaded, or that are pinned, stay.
        max_model_len: Tokens of prompt and answer together; ``None`` takes what the model allows.
        enforce_eager: Run without CUDA graphs: several times slower. ``"auto"`` does so only on a GPU that is short of
            memory for them, and logs it.
        startup: On a GPU, ``"fast"`` captures CUDA graphs and does not compile, so that a model is there in about
            a minute; ``"compiled"`` is vLLM's own default, which takes longer, the larger the model.
            ``compilation_config`` in ``engine_args`` goes before it. On a CPU it makes no difference.
        lora_kernels: On a GPU, ``"auto"`` computes LoRA with this library's kernels where they were tried (Hopper), and
            with vLLM's own elsewhere; ``"vllm"`` always with vLLM's own, for whoever wants to compare.
        revision: The model's branch, tag or commit on the Hub.
        token: The Hub's access token, for the model and for adapters without one of their own. Never printed.
        engine_args: Further arguments of vLLM's ``EngineArgs``, as they are.
        reasoning_parser: The name of the parser of vLLM that finds the thoughts in answers (``"qwen3"``,
            ``"deepseek_r1"``): ``output.reasoning``, and ``output.content`` without them.
        tool_call_parser: The name of the parser of vLLM that finds calls of tools (``"hermes"``, ``"llama3_json"``) in
            answers to ``chat`` with ``tools``: ``output.tool_calls``.
        policy: ``"fair"`` shares the engine among adapters, so that none starves behind a busy one; see
            docs/scheduling.md. ``"fcfs"`` serves requests strictly in the order in which they came.
        max_waiting: Requests that may wait at a time; ``add_request`` then blocks or raises. ``None`` for no limit.
        restart: ``"on-failure"`` starts a new engine core when one dies, loads the same adapters, and runs again what
            had not produced a token; what had fails with ``EngineDeadError``. With ``"never"``, everything fails.
        backend: What runs the model; ``None`` for vLLM. Tests pass ``qlora_infer.testing.FakeEngine()``.

    Raises:
        TypeError: There is no such argument; an argument of vLLM belongs into ``engine_args``.
        ValueError: An argument is out of range, or ``engine_args`` contradicts another.
        MissingDependencyError: A package is missing; the message has the command that installs it.
        QuantizationError: The checkpoint cannot be served this way here.
        ModelNotFoundError: There is no such model, or the token does not open it.
        AdapterError: One of ``adapters`` cannot be loaded; nothing is left running.
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
        """The adapters that requests may name now, by name; a copy that does not change."""
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
        """Load an adapter, or replace the one that has this name, while requests go on.

        The call fetches, checks and loads the adapter, and then moves the name over in one step: requests that were
        added before finish on the old content, later ones run on the new. When anything is wrong, it raises, and
        whatever had the name keeps it. The content that a name has already is not loaded again.

        Args:
            name: The name that requests use.
            source: A Hub id (``"org/repo"``, ``"org/repo@revision:sub/folder"``), a local folder, the URL of a folder
                on any fsspec filesystem (``"s3://bucket/pirate"``, ``"https://host/pirate"``), or PEFT's ``PeftModel``.
                ``HubSource`` and ``URLSource`` add tokens and options, ``TensorSource`` is a state dict with its
                config, and ``BlendSource`` blends loaded adapters. ``None`` is what ``known_adapters`` has for the
                name, where it is not loaded already; the other arguments are then those of a first use.
            share: Its share of the engine while others wait too; the base model counts as an adapter of share 1.
                Loading the same content again changes the share only.
            expect: The version that the name stands for now, by number or digest, or 0 for none; for trainers that
                push in a loop, so that none overwrites what it has not seen.
            allow_pickle: Convert an ``adapter_model.bin`` where there is no ``adapter_model.safetensors``.
            strict: Refuse an adapter with an invalid chat template, generation config or tokenizer, which are
                otherwise left out with a warning.

        Returns:
            What was loaded.

        Raises:
            ValueError: The source is not written as one is, or a blend's adapters cannot be blended this way.
            AdapterNotFoundError: The source does not exist.
            AdapterNotLoadedError: An adapter of a blend is not loaded, or ``known_adapters`` does not have the name.
            AdapterAccessError: The source needs a token, or another one.
            AdapterDownloadError: The connection failed.
            AdapterSourceError: Its files cannot be read.
            MissingDependencyError: The package for this kind of source is not installed.
            CorruptAdapterError: The files cannot be read.
            UnsafeAdapterError: Reading the files could do harm.
            IncompatibleAdapterError: The adapter does not fit this engine; ``reasons`` lists every reason.
            AdapterLoadError: vLLM refused it.
            AdapterConflictError: The name does not stand for the version that ``expect`` names.
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
        """Go back to the version before the one that ``name`` stands for, and forget the newer one.

        Of each name the version before is held, on disk; over ``max_disk_bytes`` its copy is the last to go. Requests
        that were added before finish on what they have.

        Returns:
            What serves now.

        Raises:
            AdapterNotLoadedError: No adapter has that name, or no earlier version of it is held.
            AdapterLoadError: vLLM refused it; the newer one still serves.
        """
        return self._loader.rollback(name)

    def adapter_versions(self, name: str) -> list[LoadedAdapter]:
        """Return the versions of an adapter that requests may name (``"name@2"``, or by digest), the newest first.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        return self._registry.versions(name)

    def pin_adapter(self, name: str) -> None:
        """Keep an adapter, and each later version of it, in host memory until it is unpinned or unloaded.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
            AdapterLoadError: No room would be left for adapters that are not pinned.
        """
        self._known.require(name)
        self._loader.pin(name)
        self._known.keep(name)

    def unpin_adapter(self, name: str) -> None:
        """Allow a pinned adapter to leave host memory again; harmless when it was not pinned.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        self._loader.unpin(name)

    def prefetch_adapters(self, names: Iterable[str]) -> None:
        """Begin to read adapters into host memory, as far as there is room, so that their first requests are quick.

        Raises:
            AdapterNotLoadedError: One of them is neither loaded nor known; nothing is read.
        """
        names, loaded = list(names), self.adapters
        to_load = {name for name in names if name not in loaded and self._known.knows(name)}
        self._loader.prefetch(name for name in names if name not in to_load)
        for name in to_load:
            self._known.request(name, lambda found: None)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, all its versions, and that it was pinned; requests that were added before finish on them.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        self._loader.unload(name)

    def verify_adapter(
        self, name: str, prompts: Sequence[str] | None = None, *, reference: str | os.PathLike[str] | None = None
    ) -> AdapterEffect:
        """Measure whether an adapter does anything, and, against PEFT, whether it does the right thing.

        The base model and the adapter read the same texts, and their opinions of each token are compared. An adapter
        that was never trained, or is not applied, changes nothing.

        Args:
            name: A loaded adapter, or one of its versions.
            prompts: Texts of at least two tokens to read, near to what the adapter is for; by default five of
                everyday English and code.
            reference: A checkpoint of the same model that transformers can load, the unquantized one say. It is then
                loaded too, in this process and host memory, with the adapter on top by PEFT, for comparison.

        Returns:
            What was found; ``print`` it.

        Raises:
            ValueError: ``prompts`` is empty, or holds a text of one token.
            AdapterNotLoadedError: No adapter has that name.
            MissingDependencyError: With ``reference``, a package is missing.
            ModelNotFoundError: transformers cannot load ``reference``.
            Exception: What ``generate`` raises.

        Example:
            >>> from qlora_infer.testing import fake_engine, write_adapter
            >>> with fake_engine() as engine:  # whose adapters change no opinion
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
        """Answer prompts and wait for all of them.

        Args:
            prompts: A text, a list of token ids, a mapping as vLLM takes it (``{"prompt": …, "multi_modal_data":
                {"image": …}}``), or a list of these.
            sampling_params: A mapping of the fields of vLLM's ``SamplingParams``, ``None``, or one of these per
                prompt; what is left out is as the adapter's ``generation_config.json`` says, then as the model's
                does, then vLLM's default (16 for ``max_tokens``). Or a ``SamplingParams``, which is taken as it is.
                Answers end at the stop tokens of model and adapter, unless ``ignore_eos``.
            adapter: The name of a loaded adapter, ``None`` for the base model, or one of these per prompt.
            priority: Lower goes first, over all fairness; one for all, or one per prompt.
            timeout: Seconds that each prompt may take from now, waiting included; ``None`` for no limit.
            add_special_tokens: Whether the tokenizer adds its special tokens to texts; ``False`` for a text in which
                a chat template has written them.
            use_tqdm: Whether to show progress on a terminal or in a notebook.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: The lengths differ, or a sampling parameter is out of range; nothing is queued.
            AdapterNotLoadedError: An adapter is not loaded; nothing is queued.
            RequestRejectedError: vLLM cannot run one of them, such as a prompt that is too long; the rest is cancelled.
            RequestTimeoutError: One of them has not finished in time; the rest is cancelled.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.
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
        """Answer conversations and wait for all of them.

        Each is written with the chat template that its adapter carries, or else with the model's, and as
        ``vllm.LLM.chat`` writes it.

        Args:
            messages: One conversation, a list of messages with ``role`` and ``content``, or a list of conversations.
                ``content`` is a text or a list of parts, as OpenAI has them: ``{"type": "text", "text": …}``,
                ``{"type": "image_url", "image_url": {"url": …}}``.
            sampling_params: As in ``generate``.
            adapter: As in ``generate``.
            priority: As in ``generate``.
            timeout: As in ``generate``.
            tools: The tools that the model may call, ``{"type": "function", "function": {…}}`` each.
            chat_template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.
            add_generation_prompt: Whether the prompt ends where the assistant's answer begins; ``None`` for yes, unless
                ``continue_final_message``.
            continue_final_message: Go on with the last message, which is the beginning of the answer.
            use_tqdm: As in ``generate``.

        Returns:
            One output per conversation, in their order; ``prompt`` is the conversation as the template writes it.

        Raises:
            ValueError: The template cannot write the messages, or they hold an image and the model reads text only;
                and everything that ``generate`` raises.
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
        """Answer any number of prompts, and yield outputs while later prompts have not been read yet.

        Args:
            prompts: Any iterable of prompts as in ``add_request``, endless ones too; it is read as outputs are taken.
            sampling_params: As in ``generate``; one for all, or an iterable with one per prompt.
            adapter: As in ``generate``; one for all, or an iterable with one per prompt.
            priority: As in ``generate``, one for all.
            timeout: As in ``generate``; a prompt's time begins when it is read.
            add_special_tokens: As in ``generate``.
            in_order: Whether outputs come in the order of the prompts; otherwise as they finish.
            max_pending: So many prompts are read ahead of the output that is yielded; ``None`` for four batches
                (``4 * max_num_seqs``). The more they are, the better adapters can be kept together.
            on_error: ``"raise"`` ends the loop at the first prompt that fails. ``"return"`` yields an output with its
                ``error`` in its place, and the others go on; the death of the engine is raised.
            use_tqdm: As in ``generate``.

        Yields:
            One output per prompt; ``output.index`` is its place among the prompts. Leaving the loop early cancels
            what is on its way.

        Raises:
            Exception: What ``generate`` raises, when the prompt in question is read or its output due; the rest is
                cancelled.

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
        """Answer one prompt and yield partial outputs as the tokens come, each with all the text so far.

        Both ``for part in engine.stream(...)`` and ``async for part in engine.stream(...)``. Leaving the loop early
        cancels the request.

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
            Exception: What ``generate`` raises; what is wrong with the arguments, already when it is called.
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
            block: What happens while ``max_waiting`` requests wait already: wait for room, or raise. A coroutine, which
                may not block its event loop, is never kept waiting.

        Returns:
            A handle: ``handle.result(timeout)``, ``await handle``, ``for`` and ``async for``, ``handle.cancel()``. A
            handle that is thrown away cancels its request.

        Raises:
            ValueError: A sampling parameter is out of range, or the template cannot write the conversation.
            AdapterNotLoadedError: The adapter is not loaded.
            QueueFullError: ``max_waiting`` requests wait, and ``block`` is false, or this is a coroutine.
            RequestTimeoutError: There was no room within ``timeout``.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.
        """
        check_unknown("add_request", _unknown)
        return self._client.add_request(
            prompt, sampling_params, adapter, priority, timeout, add_special_tokens=add_special_tokens, block=block
        )

    def stats(self) -> EngineStats:
        """Return the engine's counts and current load in numbers; a call every second costs little."""
        return self._driver.stats()

    def _held_by(self, outputs: Iterator[GenerationOutput]) -> Iterator[GenerationOutput]:
        yield from outputs  # a generator holds on to its object, so that the engine is not closed before the last

    # Life -------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> EnginePlan:
        """The decisions that were made before vLLM started, with their reasons; ``print`` shows them."""
        return self._plan

    @property
    def is_running(self) -> bool:
        """True if the engine accepts requests: it is neither closed nor known to be dead. For health checks.

        A core that dies while it has nothing to do is noticed at the next request.
        """
        return self._driver.is_open

    def close(self) -> None:
        """End the engine and free the device's memory; what is unfinished fails with ``EngineClosedError``.

        Takes at most some 20 seconds, also when the engine hangs. Harmless a second time.
        """
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def aclose(self) -> None:
        """Do what ``close`` does, while the event loop goes on."""
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
