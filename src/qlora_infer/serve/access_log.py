"""The log of requests: one line of JSON for each, without prompts, answers or keys."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("qlora_infer.access")

#: Asked every few seconds.
SILENT = ("/health", "/metrics")


class AccessLog:
    """Middleware that logs requests when their responses have ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, and log the result."""
        if scope["type"] != "http" or scope["path"].startswith(SILENT):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        began, first, status = time.monotonic(), None, 0

        async def noting(message: Message) -> None:
            nonlocal first, status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first is None and message.get("body"):
                first = time.monotonic() - began
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            client = scope.get("client")
            line: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,  # the client has hung up before there was one
                "client": client[0] if client else None,
                "seconds": round(time.monotonic() - began, 4),
                "seconds_to_first_byte": None if first is None else round(first, 4),
                "adapter": state.get("adapter"),
                **_usage(state.get("request_metadata")),
            }
            logger.info("%s", json.dumps(line))


def _usage(metadata: Any) -> dict[str, Any]:
    """Return vLLM's record of a request (``entrypoints/generate/base/protocol.py`` in 0.32.0)."""
    usage = getattr(metadata, "final_usage_info", None)
    return {
        "id": getattr(metadata, "request_id", None),
        "prompt_tokens": getattr(usage, "prompt_tokens", None),
        "completion_tokens": getattr(usage, "completion_tokens", None),
    }
