"""The keys of a server: clients' for every route but probes and metrics, and the operator's for adapters."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Open to probes, routers and Prometheus, which have no keys. The numbers have adapters' names in them, no prompts.
OPEN = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/version"})

NEEDED = "a valid key is needed: Authorization: Bearer KEY"


class Keys:
    """Middleware that lets requests through which have a key, or need none.

    Args:
        app: The application.
        api_key: The key of clients; ``None`` opens all routes that have no check of their own.
        admin_key: The operator's key, which is good for every route.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_key: str | None) -> None:
        self.app = app
        self._keys = [key for key in (api_key, admin_key) if key] if api_key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401."""
        if self._is_allowed(scope):
            await self.app(scope, receive, send)
        else:
            error = {"message": NEEDED, "type": "AuthenticationError", "param": None, "code": 401}
            await JSONResponse({"error": error}, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        # A browser asks with OPTIONS, and without a key, whether it may ask.
        if not self._keys or scope["type"] != "http" or scope["method"] == "OPTIONS":
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in OPEN or _has_one(Headers(scope=scope), self._keys)


def admin_only(admin_key: str | None) -> Any:
    """Return the dependency of the operator's routes, which closes all of them if there is no key."""

    def check(request: Request) -> None:
        if not admin_key:
            raise HTTPException(403, "adapters cannot be changed here: the server was started without an admin key")
        if not _has_one(request.headers, [admin_key]):
            raise HTTPException(401, NEEDED)

    return Depends(check)


def _has_one(headers: Headers, keys: list[str]) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")  # Anthropic's clients
    digest = _digest(given.strip())
    return any(hmac.compare_digest(digest, _digest(key)) for key in keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
