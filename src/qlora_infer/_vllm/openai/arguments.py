"""The arguments of vLLM's server: vLLM's own defaults, and the few that an operator may set.

Read in vLLM 0.32.0, ``vllm/entrypoints/launchers/cli_args.py``; 0.33 moves it to ``vllm/entrypoints/common``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.argparse_utils import FlexibleArgumentParser

#: The arguments that this library decides, or that would read what clients ask or trust what they send.
REFUSED = frozenset(
    {
        *("model", "served_model_name", "lora_modules", "api_key", "host", "port", "uds", "middleware", "root_path"),
        *("enable_log_requests", "enable_log_outputs", "log_error_stack", "disable_log_stats", "tokens_only"),
        *("trust_request_chat_template", "trust_request_mm_kwargs", "enable_scale_out", "tool_server"),
        *("tool_parser_plugin", "reasoning_parser_plugin", "structured_outputs_config"),
    }
)


def server_arguments(
    vllm_config: Any, *, model: str, served_model_names: Sequence[str], given: Mapping[str, Any]
) -> Namespace:
    """Return the arguments of vLLM's server.

    Args:
        vllm_config: vLLM's configuration of the running engine.
        model: The model.
        served_model_names: Its names in requests; the first one is in responses.
        given: Further arguments, by the names that ``vllm serve --help`` has, with underscores.

    Raises:
        ValueError: There is no such argument, or it is not the operator's to set.
    """
    arguments: Namespace = _parser().parse_args([])
    unknown = sorted(name for name in given if name in REFUSED or not hasattr(arguments, name))
    if unknown:
        raise ValueError(f"server_args: {', '.join(map(repr, unknown))} cannot be set here; see docs/service.md")
    vars(arguments).update(
        given,
        model=model,
        served_model_name=list(served_model_names),
        structured_outputs_config=vllm_config.structured_outputs_config,
        disable_fastapi_docs=given.get("disable_fastapi_docs", True),
        disable_log_stats=True,
    )
    if arguments.tool_call_parser is not None:
        arguments.enable_auto_tool_choice = True
    return arguments


def _parser() -> Any:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser
    return make_arg_parser(FlexibleArgumentParser())
