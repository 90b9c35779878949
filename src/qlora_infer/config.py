"""The options of an engine: their names, defaults, checks and help texts, in one frozen class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen, validators

#: How an engine on a GPU starts: with CUDA graphs alone, or compiled by torch too, as vLLM does by default.
Startup = Literal["fast", "compiled"]

#: Whose LoRA kernels a GPU computes with.
LoraKernels = Literal["auto", "vllm"]

#: The ranks that vLLM takes for ``max_lora_rank`` (read in vLLM 0.32, ``vllm/config/lora.py``).
ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

#: vLLM's arguments that have a parameter of their own in ``QuantizedLoRAEngine``, or that this library sets.
OWN_ENGINE_ARGS: Mapping[str, str] = {
    "model": "the first argument",
    "quantization": "quantization=",
    "max_loras": "max_loras=",
    "max_lora_rank": "max_lora_rank=",
    "max_cpu_loras": "max_cpu_loras=",
    "max_model_len": "max_model_len=",
    "enforce_eager": "enforce_eager=",
    "revision": "revision=",
    "hf_token": "token=",
    "reasoning_parser": "reasoning_parser=",
    "enable_lora": "this library, which always serves adapters",
    "worker_extension_cls": "this library, whose own extension loads and checks adapters",
}

Check = Callable[[Any, "Attribute[Any]", Any], None]


def _positive(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name} must be at least 1, got {value}")


def _positive_or_auto(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(  # noqa: TRY004
            f'{attribute.name} must be a whole number or "auto", got {value!r}'
        )
    _positive(instance, attribute, value)


def _positive_or_none(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None:
        _positive(instance, attribute, value)


def _allowed_rank(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value != "auto" and value not in ALLOWED_RANKS:
        raise ValueError(f'{attribute.name} must be "auto" or one of {ALLOWED_RANKS}, got {value!r}')


def _one_of(*choices: str) -> Check:
    def check(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} must be {' or '.join(map(repr, choices))}, got {value!r}")

    return check


def _yes_no_or_auto(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value != "auto" and not isinstance(value, bool):
        raise TypeError(f'{attribute.name} must be True, False or "auto", got {value!r}')


def _no_own_args(_: Any, attribute: Attribute[Any], value: Any) -> None:
    for key in value:
        if key in OWN_ENGINE_ARGS:
            raise ValueError(f"engine_args[{key!r}] is set by {OWN_ENGINE_ARGS[key]}: leave it out of engine_args")


def _at_least_the_slots(config: EngineConfig, _: Attribute[Any], value: Any) -> None:
    if value != "auto" and config.max_loras != "auto" and value < config.max_loras:
        raise ValueError(f"max_cpu_loras ({value}) must be at least max_loras ({config.max_loras})")


def _instead_of_a_number(config: EngineConfig, _: Attribute[Any], value: Any) -> None:
    if value is not None and config.max_loras != "auto":
        raise ValueError(f'max_slot_bytes and max_loras={config.max_loras} say the same: leave one out (or "auto")')


def _mapping(value: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(value or {})


@frozen(kw_only=True)
class EngineConfig:
    """The options of an engine, checked before anything is downloaded or started.

    This is the one list of them. The constructor of ``QuantizedLoRAEngine`` repeats names and defaults for its readers,
    and a test compares the two. The command line's options are made from the fields and their help texts.
    """

    model: str = field(
        validator=validators.and_(validators.instance_of(str), validators.min_len(1)),
        metadata={"help": "A Hub id or a local folder with a checkpoint."},
    )
    quantization: object = field(
        default="auto",
        metadata={"help": '"auto" (config.json decides; an unquantized model in 4 bits), or the name of a strategy.'},
    )
    max_loras: int | Literal["auto"] = field(
        default=8, validator=_positive_or_auto, metadata={"help": "Adapters that one batch can mix."}
    )
    max_slot_bytes: int | None = field(
        default=None,
        validator=[_positive_or_none, _instead_of_a_number],
        metadata={"help": "With max_loras=auto: bytes for all slots on the device."},
    )
    max_lora_rank: int | Literal["auto"] = field(
        default="auto", validator=_allowed_rank, metadata={"help": "The largest rank of an adapter."}
    )
    max_cpu_loras: int | Literal["auto"] = field(
        default="auto",
        validator=[_positive_or_auto, _at_least_the_slots],
        metadata={"help": "Adapters kept in host memory."},
    )
    max_cpu_bytes: int | None = field(
        default=None,
        validator=_positive_or_none,
        metadata={"help": "Bytes of adapters in host memory."},
    )
    max_disk_bytes: int | None = field(
        default=None,
        validator=_positive_or_none,
        metadata={"help": "Bytes of private copies on disk."},
    )
    max_loaded_adapters: int | None = field(
        default=256,
        validator=_positive_or_none,
        metadata={"help": "Known adapters that stay loaded; above it, the least recently used is unloaded."},
    )
    max_model_len: int | None = field(
        default=None,
        validator=_positive_or_none,
        metadata={"help": "Tokens of prompt and answer together."},
    )
    enforce_eager: bool | Literal["auto"] = field(
        default="auto", validator=_yes_no_or_auto, metadata={"help": "Run without CUDA graphs."}
    )
    startup: Startup = field(
        default="fast",
        validator=_one_of("fast", "compiled"),
        metadata={"help": "On a GPU: CUDA graphs only, or also torch.compile."},
    )
    lora_kernels: LoraKernels = field(
        default="auto",
        validator=_one_of("auto", "vllm"),
        metadata={"help": "On a GPU: the faster LoRA kernels, or always vLLM's."},
    )
    revision: str | None = field(default=None, metadata={"help": "The model's branch, tag or commit."})
    token: str | None = field(default=None, repr=False, metadata={"help": "The Hub's access token; never printed."})
    engine_args: Mapping[str, Any] = field(
        default=None,
        converter=_mapping,
        validator=_no_own_args,
        metadata={"help": "Further arguments of vLLM's EngineArgs."},
    )
    reasoning_parser: str | None = field(
        default=None,
        validator=validators.optional(validators.instance_of(str)),
        metadata={"help": "The vLLM parser that separates reasoning from answers, such as qwen3."},
    )
    tool_call_parser: str | None = field(
        default=None,
        validator=validators.optional(validators.instance_of(str)),
        metadata={"help": "The vLLM parser that finds tool calls in answers, such as hermes."},
    )
    policy: Literal["fair", "fcfs"] = field(
        default="fair",
        validator=_one_of("fair", "fcfs"),
        metadata={"help": "Fair shares among adapters, or first come, first served."},
    )
    max_waiting: int | None = field(
        default=None,
        validator=_positive_or_none,
        metadata={"help": "Requests that can wait at a time."},
    )
    restart: Literal["never", "on-failure"] = field(
        default="never",
        validator=_one_of("never", "on-failure"),
        metadata={"help": "Start a new engine core if one dies, or never."},
    )

    @property
    def tensor_parallel_size(self) -> int:
        """The number of devices that share each layer, as ``engine_args`` says."""
        return int(self.engine_args.get("tensor_parallel_size", 1))
