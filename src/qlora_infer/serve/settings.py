"""The decisions of an operator about a server; the secrets are in no ``repr``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from qlora_infer.serve.allowed import AllowedSources


@frozen
class Settings:
    """The settings of a server.

    Attributes:
        model_names: The base model's names in requests; the first one is in responses.
        api_key: The key of requests; ``None`` lets everybody ask who reaches the port.
        admin_key: The key of requests that change adapters; with ``None``, these routes are closed.
        allowed: From where adapters may come.
        max_body_bytes: Bytes of a request's body.
        timeout: Seconds that a request may take, waiting included; ``None`` for no limit.
        drain: Seconds that requests have to finish after a signal to end.
        server_args: Further arguments of vLLM's server, by the names that ``vllm serve --help`` has, with underscores.
    """

    model_names: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    allowed: AllowedSources = field(factory=AllowedSources)
    max_body_bytes: int = 4 << 20
    timeout: float | None = None
    drain: float = 30.0
    server_args: Mapping[str, Any] = field(factory=dict)
