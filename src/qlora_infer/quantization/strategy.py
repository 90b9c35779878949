"""The protocol of a quantization strategy, and the registry of all strategies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from attrs import field, frozen

from qlora_infer.config import EngineConfig
from qlora_infer.errors import MissingDependencyError, QuantizationError, UnknownQuantizationError
from qlora_infer.quantization.checkpoint import quant_method


@frozen
class Platform:
    """The machine and the installed packages, for a strategy's ``check``.

    Attributes:
        device: vLLM's device type, such as ``"cuda"`` or ``"cpu"``.
        capability: CUDA's compute capability times ten (90 for an H100); ``None`` on other devices.
        packages: The installed distributions, by normalized name (``"vllm-bnb-plugin"``).
        device_memory: The device's memory in bytes; ``None`` if unknown.
        host_memory: The host's free memory in bytes; ``None`` if unknown.
        num_cores: The CPU cores that this process can use; ``None`` if unknown.
        environment: vLLM's environment variables that you have set.
    """

    device: str
    capability: int | None
    packages: frozenset[str]
    device_memory: int | None = None
    host_memory: int | None = None
    num_cores: int | None = None
    environment: Mapping[str, str] = field(factory=dict, hash=False)

    def require_package(self, name: str, command: str) -> None:
        """Raise ``MissingDependencyError`` if a package is missing.

        Args:
            name: The distribution's name.
            command: The command that installs it, for the message.
        """
        if name not in self.packages:
            raise MissingDependencyError(f"{name} is not installed: {command}")

    def require_gpu(self, quantization: str) -> None:
        """Raise ``QuantizationError`` if the device is not a GPU.

        Args:
            quantization: The name for the message.
        """
        if self.device != "cuda":
            raise QuantizationError(
                f"{quantization} runs on GPUs only, and this is vLLM's build for the {self.device}: take a checkpoint "
                "in AWQ, GPTQ or compressed-tensors with 4-bit weights and 16-bit activations, or the unquantized one"
            )

    def require_capability(self, minimum: int, quantization: str) -> None:
        """Raise ``QuantizationError`` on a CUDA device older than ``minimum``; other devices pass.

        Args:
            minimum: The compute capability times ten.
            quantization: The name for the message.
        """
        if self.capability is not None and self.capability < minimum:
            raise QuantizationError(
                f"{quantization} needs a GPU of compute capability {minimum / 10:.1f} or newer, this one has "
                f"{self.capability / 10:.1f}: use another quantization or another GPU"
            )


@runtime_checkable
class QuantizationStrategy(Protocol):
    """The way to serve one kind of quantized checkpoint.

    Write a class with these four members, and pass an instance as ``quantization=``. Or decorate the class with
    ``register``, which gives it a name and a place in ``"auto"``.

    Example:
        >>> class TorchAO:
        ...     name = "torchao"
        ...
        ...     def matches(self, model_config):
        ...         return model_config.get("quantization_config", {}).get("quant_method") == "torchao"
        ...
        ...     def check(self, config, model_config, platform):
        ...         platform.require_package("torchao", "pip install torchao")
        ...
        ...     def engine_args(self, config, model_config):
        ...         return {"quantization": "torchao"}
        >>> isinstance(TorchAO(), QuantizationStrategy)
        True
    """

    name: str

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return True if a checkpoint is of this kind.

        Args:
            model_config: The checkpoint's ``config.json``.
        """
        ...

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Raise an error if this machine cannot serve the checkpoint, with the command that helps.

        The engine calls it before it downloads any weights.

        Args:
            config: The engine's options.
            model_config: The checkpoint's ``config.json``.
            platform: The machine and the installed packages.

        Raises:
            MissingDependencyError: A package is missing.
            QuantizationError: The checkpoint, the device or the other arguments do not allow it.
        """
        ...

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return vLLM's arguments for the checkpoint; a pure function.

        Args:
            config: The engine's options.
            model_config: The checkpoint's ``config.json``.
        """
        ...


def unserved(model: str, says: str, why: str) -> QuantizationError:
    """Return the error for a checkpoint whose kind of quantization vLLM does not run.

    Args:
        model: The checkpoint.
        says: The field of its quantization config, with the value.
        why: The forms that vLLM runs instead.
    """
    return QuantizationError(
        f"{model} is quantized with {says}: {why}. Take another checkpoint of the same model: one in AWQ or "
        "compressed-tensors, or the unquantized one"
    )


_registry: dict[str, QuantizationStrategy] = {}

S = TypeVar("S", bound=type[Any])


def register(strategy_class: S) -> S:
    """Register a strategy class under its ``name``; use it as a decorator.

    Args:
        strategy_class: A class with the members of ``QuantizationStrategy`` and a constructor without arguments.

    Raises:
        ValueError: The name is taken.
        TypeError: The class lacks a member of ``QuantizationStrategy``.
    """
    strategy = strategy_class()
    if not isinstance(strategy, QuantizationStrategy):
        raise TypeError(f"{strategy_class.__name__} needs name, matches, check and engine_args")
    if strategy.name in _registry:
        taken_by = type(_registry[strategy.name]).__qualname__
        raise ValueError(f"quantization {strategy.name!r} is already registered, by {taken_by}")
    _registry[strategy.name] = strategy
    return strategy_class


def unregister(name: str) -> None:
    """Remove a strategy from the registry.

    Args:
        name: The strategy's name.

    Raises:
        UnknownQuantizationError: No strategy has that name.
    """
    _registry.pop(_find(name).name)


def registered() -> Iterator[str]:
    """Yield the names of the registered strategies, in the order of their registration.

    Example:
        >>> "awq" in registered()
        True
    """
    return iter(tuple(_registry))


def choose(config: EngineConfig, model_config: Mapping[str, Any]) -> QuantizationStrategy:
    """Return the strategy for ``config.quantization``.

    ``"auto"`` returns the strategy that matches the checkpoint. ``None`` does the same, but leaves an unquantized
    checkpoint as it is, as vLLM's ``quantization=None`` does.

    Args:
        config: The engine's options.
        model_config: The checkpoint's ``config.json``.

    Raises:
        UnknownQuantizationError: No strategy has that name.
        QuantizationError: The checkpoint is of another kind, or of none that is registered.
    """
    method = quant_method(model_config)
    if config.quantization is None and method is None:
        return _find("none")
    if config.quantization in ("auto", None):
        return _detect(config.model, model_config, method)
    if isinstance(config.quantization, QuantizationStrategy):
        return config.quantization
    if not isinstance(config.quantization, str):
        raise TypeError(f"quantization must be a name or a strategy, got {config.quantization!r}")
    strategy = _find(config.quantization)
    if not strategy.matches(model_config):
        says = f"is quantized with {method!r}" if method else "is not quantized"
        raise QuantizationError(
            f"{config.model} {says} (quantization_config), which quantization={strategy.name!r} cannot serve: "
            'use quantization="auto", or another checkpoint'
        )
    return strategy


def _detect(model: str, model_config: Mapping[str, Any], method: str | None) -> QuantizationStrategy:
    # The newest registration is asked first, so that a user's strategy can take over a kind of checkpoint.
    for strategy in reversed(_registry.values()):
        if strategy.matches(model_config):
            return strategy
    raise QuantizationError(
        f"{model} is quantized with {method!r}; registered are {', '.join(_registry)}. "
        "Use another checkpoint, or pass a strategy of your own as quantization="
    )


def _find(name: str) -> QuantizationStrategy:
    try:
        return _registry[name]
    except KeyError:
        known = ", ".join(("auto", *_registry))
        raise UnknownQuantizationError(f"no quantization is called {name!r}; there are {known}") from None
