"""The keys of a server: which routes are open, which need the key of clients, and which the operator's."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Open to probes, routers and Prometheus, which have no keys. The numbers have adapters' names in them, no prompts.
OPEN = ("/health", "/metrics", "/version")

#: The beginnings of the routes that change adapters.
ADMIN = ("/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Keys:
    """Middleware that lets requests through which have the key of their route.

    The operator's key opens clients' routes, too.

    Args:
        app: The application.
        api_key: The key of clients; ``None`` opens their routes.
        admin_key: The operator's key; ``None`` closes the routes that change adapters.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_key: str | None) -> None:
        self.app = app
        self._api_keys = [_digest(key) for key in (api_key, admin_key) if key] if api_key else None
        self._admin_key = _digest(admin_key) if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it with 401 or 403."""
        await (self._refusal(scope) or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope["path"]):
            return None
        if not scope["path"].startswith(ADMIN):
            return None if self._api_keys is None or _has_one(scope, self._api_keys) else _unauthorized()
        if self._admin_key is None:
            return _closed()
        return None if _has_one(scope, [self._admin_key]) else _unauthorized()

    def _is_open(self, path: str) -> bool:
        return any(path == route or path.startswith(f"{route}/") for route in OPEN)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _has_one(scope: Scope, keys: list[bytes]) -> bool:
    headers = Headers(scope=scope)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")  # Anthropic's clients
    digest = _digest(given.strip())
    return any(hmac.compare_digest(digest, key) for key in keys)


def _unauthorized() -> JSONResponse:
    return _refusal(401, "a valid key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})


def _closed() -> JSONResponse:
    return _refusal(403, "adapters cannot be changed here: the server was started without an admin key")


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "AuthenticationError" if status == 401 else "PermissionDeniedError"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)
