"""The names for vLLM's server: the base model's, and those of this engine's adapters.

Read in vLLM 0.32.0, ``vllm/entrypoints/openai/models/serving.py`` and ``vllm/entrypoints/serve/engine/serving.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.lora.request import LoRARequest

from qlora_infer._vllm.openai.choice import AdapterChooser, current_choice
from qlora_infer._vllm.openai.faults import served_errors

if TYPE_CHECKING:
    from qlora_infer.adapters.registry import AdapterRegistry


class CurrentAdapter(Mapping[str, LoRARequest]):
    """The one adapter of the current request, by the name that the request has for it.

    It stands where vLLM's server has a dictionary of all adapters. Nothing opens the path of its ``LoRARequest``: this
    engine finds the version by the request's choice.
    """

    def __getitem__(self, name: str) -> LoRARequest:
        choice = current_choice()
        if choice is None or choice.asked != name:
            raise KeyError(name)
        return LoRARequest(choice.asked, choice.version.int_id, choice.exact)

    def __iter__(self) -> Iterator[str]:
        choice = current_choice()
        return iter(() if choice is None else (choice.asked,))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class AdapterModels(OpenAIServingModels):  # type: ignore[misc]
    """The base model and the adapters that requests may name; adapters come and go while it is used."""

    def __init__(self, client: Any, base_model_paths: Any, registry: AdapterRegistry, chooser: AdapterChooser) -> None:
        super().__init__(client, base_model_paths)
        self.lora_requests = CurrentAdapter()
        self._registry = registry
        self._chooser = chooser

    async def check_model(self, request: Any) -> None:
        """Choose the adapter that a request names; stands where each serving class has ``_check_model``.

        Raises:
            ServedError: There is no such adapter, or it cannot be loaded.
        """
        is_base = not request.model or self.is_base_model(request.model)
        with served_errors():
            await self._chooser.choose(None if is_base else request.model)

    async def show_available_models(self) -> Any:
        """List the base model and the loaded adapters, with their versions."""
        models = await super().show_available_models()
        models.data += [
            ModelCard(
                id=name,
                owned_by="qlora_infer",
                root=loaded.source,
                parent=self.base_model_paths[0].name,
                permission=[ModelPermission()],
                version=loaded.version,
                digest=loaded.digest,
            )
            for name, loaded in self._registry.records().items()
            if not self.is_base_model(name)
        ]
        return models


class AdapterDefaults(Mapping[str, Any]):
    """The defaults of sampling parameters: the adapter's own over the model's, for the current request."""

    def __init__(self, of_model: Mapping[str, Any]) -> None:
        self._of_model = of_model

    def _current(self) -> Mapping[str, Any]:
        choice = current_choice()
        return self._of_model if choice is None else {**self._of_model, **choice.version.extras.sampling_defaults}

    def __getitem__(self, name: str) -> Any:
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())
