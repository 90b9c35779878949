"""The source of an adapter in memory: a PEFT model, or tensors and their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from attrs import Attribute, field, frozen

from qlora_infer._packages import require
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.manifest import ADAPTER_NAME, check_one_adapter
from qlora_infer.files.snapshot import CONFIG_NAME, WEIGHTS_NAME


def _check_tensors(_: Any, attribute: Attribute[Any], tensors: Any) -> None:
    if not isinstance(tensors, Mapping) or not tensors:
        raise TypeError(f"tensors must be a mapping of names to tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
            raise TypeError(f"tensors must be torch tensors or numpy arrays by name, got {type(tensor).__name__}")


def _as_mapping(config: Any) -> Mapping[str, Any]:
    """PEFT's configuration objects know how to become a dictionary."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise TypeError(f"config must be PEFT's LoraConfig or a mapping of its fields, got {type(config).__name__}")
    return fields


@runtime_checkable
class PeftModel(Protocol):
    """PEFT's ``PeftModel``, as far as it is used here; ``import qlora_infer`` does not load peft."""

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The configuration of each adapter, by name."""
        ...

    @property
    def active_adapters(self) -> Any:
        """The names of the adapters that the model applies."""
        ...


@frozen(eq=False)
class TensorSource:
    """The tensors and the configuration of an adapter, as PEFT has them in memory.

    Attributes:
        tensors: The result of ``peft.get_peft_model_state_dict(model)``, as torch or numpy arrays. Names that contain
            the adapter's own name (``...lora_A.default.weight``) work, too, if all are of one adapter.
        config: PEFT's ``LoraConfig``, or a mapping of its fields.

    Raises:
        TypeError: An argument has another type.
    """

    tensors: Mapping[str, Any] = field(repr=False, validator=_check_tensors)
    config: Mapping[str, Any] = field(repr=False, converter=_as_mapping)

    @property
    def refetch_cost(self) -> None:
        """``None``, because the trainer's tensors are not kept."""
        return None

    @classmethod
    def from_peft(cls, model: PeftModel) -> Self:
        """Return the active adapter of a PEFT model, as its ``save_pretrained`` would write it.

        Args:
            model: A ``PeftModel``.

        Raises:
            ValueError: Not exactly one adapter is active.
            MissingDependencyError: peft is not installed.
        """
        require("a PEFT model's adapter is read", "peft")
        from peft import get_peft_model_state_dict

        active = model.active_adapters
        if not isinstance(active, list) or len(active) != 1:
            raise ValueError(f"one adapter of the PEFT model must be active, got {active!r}: model.set_adapter(name)")
        return cls(get_peft_model_state_dict(model, adapter_name=active[0]), model.peft_config[active[0]])

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Write PEFT's two files into a new folder; ``Source`` describes the arguments.

        Raises:
            CorruptAdapterError: JSON and safetensors cannot contain the values, or they are of several adapters.
            MissingDependencyError: safetensors is not installed.
        """
        require("an adapter from memory is written", "safetensors")
        check_one_adapter(adapter, self.tensors)
        into.mkdir(parents=True)
        tensors = {ADAPTER_NAME.sub("", name): tensor for name, tensor in self.tensors.items()}
        try:
            (into / CONFIG_NAME).write_text(json.dumps(self.config, default=_plain))
            _save(tensors, into / WEIGHTS_NAME)
        except Exception as error:
            raise CorruptAdapterError(adapter, f"its tensors or its config cannot be written: {error}") from error

    def __str__(self) -> str:
        return "tensors in memory"


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    if all(hasattr(tensor, "detach") for tensor in tensors.values()):
        from safetensors.torch import save_file

        # A copy, because the trainer may go on, and because safetensors refuses tensors that share memory.
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
    else:
        import numpy as np
        from safetensors.numpy import save_file as save_arrays

        save_arrays({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path)


def _plain(value: Any) -> Any:
    """Convert the sets and enumerations in PEFT's configurations into plain values."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "value"):
        return value.value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
