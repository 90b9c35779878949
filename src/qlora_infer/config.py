"""What an engine is asked to be: one frozen, validated object, made before anything is downloaded or started."""

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
    "enable_lora": "this library, which always serves adapters",
    "worker_extension_cls": "this library, whose own extension loads and checks adapters",
}


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


def _known_rank(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value != "auto" and value not in ALLOWED_RANKS:
        raise ValueError(f'{attribute.name} must be "auto" or one of {ALLOWED_RANKS}, got {value!r}')


def _one_of(*choices: str) -> Callable[[Any, Attribute[Any], Any], None]:
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


@frozen(kw_only=True)
class EngineConfig:
    """The arguments of ``QuantizedLoRAEngine``, checked.

    It has no defaults of its own: those are in the engine's signature.

    Attributes:
        model: A Hub id or a local folder with a checkpoint.
        quantization: ``"auto"``, the name of a registered strategy, or a strategy.
        max_loras: Adapters that one batch may mix, or ``"auto"``; each takes a slot in the device's memory.
        max_slot_bytes: Bytes for these slots, from which ``"auto"`` chooses; ``None`` for a share of the memory.
        max_lora_rank: The largest rank that an adapter may have, or ``"auto"``.
        max_cpu_loras: Adapters kept in host memory, ready to move into a slot, or ``"auto"``.
        max_cpu_bytes: Bytes of adapters kept in host memory; ``None`` for no limit but their number.
        max_disk_bytes: Bytes of private copies on disk; ``None`` for no limit.
        max_model_len: Tokens of prompt and answer together; ``None`` for what the model allows.
        enforce_eager: Whether to run without CUDA graphs, or ``"auto"``: only on a GPU that is short of memory.
        startup: On a GPU, ``"fast"`` for CUDA graphs without torch.compile, or ``"compiled"``.
        lora_kernels: On a GPU, ``"auto"`` for our LoRA kernels where they were tried, or ``"vllm"``.
        revision: The model's branch, tag or commit on the Hub.
        token: The Hub's access token; never printed.
        engine_args: Further arguments of vLLM's ``EngineArgs``, as they are.
        policy: Whether adapters share the engine fairly or requests are served as they come.
        max_waiting: Requests that may wait at a time; ``None`` for no limit.
        restart: Whether an engine core that dies is started again.
    """

    model: str = field(validator=validators.and_(validators.instance_of(str), validators.min_len(1)))
    quantization: object
    max_loras: int | Literal["auto"] = field(validator=_positive_or_auto)
    max_slot_bytes: int | None = field(validator=validators.optional(_positive))
    max_lora_rank: int | Literal["auto"] = field(validator=_known_rank)
    max_cpu_loras: int | Literal["auto"] = field(validator=_positive_or_auto)
    max_cpu_bytes: int | None = field(validator=validators.optional(_positive))
    max_disk_bytes: int | None = field(validator=validators.optional(_positive))
    max_model_len: int | None = field(validator=validators.optional(_positive))
    enforce_eager: bool | Literal["auto"] = field(validator=_yes_no_or_auto)
    startup: Startup = field(validator=_one_of("fast", "compiled"))
    lora_kernels: LoraKernels = field(validator=_one_of("auto", "vllm"))
    revision: str | None
    token: str | None = field(repr=False)
    engine_args: Mapping[str, Any] = field(converter=dict, validator=_no_own_args)
    policy: Literal["fair", "fcfs"] = field(validator=_one_of("fair", "fcfs"))
    max_waiting: int | None = field(validator=validators.optional(_positive))
    restart: Literal["never", "on-failure"] = field(validator=_one_of("never", "on-failure"))

    @max_cpu_loras.validator
    def _at_least_the_slots(self, _: Attribute[Any], value: int | Literal["auto"]) -> None:
        if value != "auto" and self.max_loras != "auto" and value < self.max_loras:
            raise ValueError(f"max_cpu_loras ({value}) must be at least max_loras ({self.max_loras})")

    @max_slot_bytes.validator
    def _in_place_of_a_number(self, _: Attribute[Any], value: int | None) -> None:
        if value is not None and self.max_loras != "auto":
            raise ValueError(f'max_slot_bytes and max_loras={self.max_loras} say the same: leave one out (or "auto")')

    @property
    def num_slots(self) -> int:
        """``max_loras``, once it has been chosen."""
        assert self.max_loras != "auto"
        return self.max_loras

    @property
    def tensor_parallel_size(self) -> int:
        """The number of devices that share each layer, as ``engine_args`` says."""
        return int(self.engine_args.get("tensor_parallel_size", 1))

    @property
    def num_cpu_loras(self) -> int:
        """``max_cpu_loras``, once it has been chosen."""
        assert self.max_cpu_loras != "auto"
        return self.max_cpu_loras

    def vllm_args(self, strategy_args: Mapping[str, Any], *, max_lora_rank: int) -> dict[str, Any]:
        """Everything that vLLM's ``EngineArgs`` is given.

        Args:
            strategy_args: What the quantization strategy asks for.
            max_lora_rank: The rank chosen where the user said ``"auto"``.

        Raises:
            ValueError: ``engine_args`` contradicts the strategy.
        """
        for key, value in self.engine_args.items():
            if key in strategy_args and strategy_args[key] != value:
                raise ValueError(
                    f"engine_args[{key!r}] = {value!r} contradicts the quantization strategy, which needs "
                    f"{strategy_args[key]!r}: leave it out, or pass a strategy of your own as quantization="
                )
        own = {
            "model": self.model,
            "revision": self.revision,
            "hf_token": self.token,
            "max_model_len": self.max_model_len,
            "enforce_eager": self.enforce_eager,
            "max_loras": self.max_loras,
            "max_lora_rank": max_lora_rank,
            # So many that vLLM never evicts an adapter by itself (see HostMemory): each may be being replaced, and one
            # comes before another leaves.
            "max_cpu_loras": 2 * self.num_cpu_loras + 1,
        }
        return {**self.engine_args, **strategy_args, **own}
