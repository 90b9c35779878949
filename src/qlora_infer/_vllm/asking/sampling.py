"""Sampling parameters: from mappings of plain values to vLLM's ``SamplingParams``, checked before they are queued."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from qlora_infer._vllm.asking.chat import plain
from qlora_infer.requests.arguments import STRUCTURE_OPTIONS, check_sampling_fields, check_structured_outputs

logger = logging.getLogger("qlora_infer")


@frozen
class SamplingReader:
    """Makes ``SamplingParams``, as the engine's model needs them.

    Attributes:
        defaults: The fields that the model's ``generation_config.json`` sets.
        vllm_config: The engine's configuration; ``None`` before it has been started.
        tokenizer: The model's tokenizer.
    """

    defaults: Mapping[str, Any]
    vllm_config: Any = None
    tokenizer: Any = None

    def read(self, params: object, adapters_own: Mapping[str, Any]) -> Any:
        """Return ``SamplingParams``; what a mapping leaves out is as the adapter says, then as the model does.

        Raises:
            TypeError: It is no mapping, or has a field that there is not.
            ValueError: A value is out of range, or its structured outputs are impossible.
        """
        made = self._make(params, adapters_own)
        self._check_structured_outputs(made)
        return made

    def _make(self, params: object, adapters_own: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams

        if isinstance(params, SamplingParams):
            return params.clone()  # whoever gave it may change it for the next request
        if params is None:
            params = {}
        if not isinstance(params, Mapping):
            raise TypeError(f"sampling_params must be SamplingParams or a mapping of its fields, got {params!r}")
        check_sampling_fields(params, SamplingParams.__struct_fields__)
        given = dict(params)
        if given.get("structured_outputs") is not None:
            given["structured_outputs"] = _structured_outputs(given["structured_outputs"])
        try:
            return SamplingParams(**{**self.defaults, **adapters_own, **given})
        except Exception as error:
            raise ValueError(f"sampling_params: {error}") from error

    def _check_structured_outputs(self, made: Any) -> None:
        """Compile what an answer must look like, as vLLM does again when the request begins.

        ``SamplingParams._validate_structured_outputs`` (read in vLLM 0.32.0): where it passes and the core still
        cannot compile it, the core ends this request alone.
        """
        if made.structured_outputs is None or self.vllm_config is None:
            return
        config = self.vllm_config
        try:
            made._validate_structured_outputs(config.model_config, config.structured_outputs_config, self.tokenizer)
        except Exception as error:
            raise ValueError(f"sampling_params: structured_outputs: {error}") from error
        for option in STRUCTURE_OPTIONS:
            of_engine = getattr(config.structured_outputs_config, option, None)
            if getattr(made.structured_outputs, option) and not of_engine:
                _warn_of_ignored(option)


@functools.cache  # once for each option
def _warn_of_ignored(option: str) -> None:
    """Log that an option has no effect in a request.

    vLLM 0.32.0 compiles a structure from its ``structured_output_key``, which has none of them
    (``v1/structured_output/request.py``), and reads two of them from the engine's configuration.
    """
    logger.warning(
        "structured_outputs: vLLM ignores a request's %s. For all requests of an engine, set disable_any_whitespace or "
        'disable_additional_properties in engine_args={"structured_outputs_config": {"backend": "guidance", …}}',
        option,
    )


def _structured_outputs(value: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if isinstance(value, StructuredOutputsParams):
        return value
    check_structured_outputs(value)
    try:
        return StructuredOutputsParams(**plain(value))
    except Exception as error:
        raise ValueError(f"sampling_params: structured_outputs: {error}") from error
