"""The adapter that a request over HTTP names: found or loaded once, and held until the response has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import define, field, frozen

from qlora_infer.errors import AdapterNotLoadedError

if TYPE_CHECKING:
    from qlora_infer.adapters.registry import AdapterRegistry
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.requests.client import KnownNames

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


@frozen(eq=False)
class Choice:
    """The version that answers a request.

    Attributes:
        asked: The name in the request: an adapter's, or that of one of its versions.
        version: The version that the name stood for when the request came.
    """

    asked: str
    version: AdapterVersion

    @property
    def exact(self) -> str:
        """The name of the version, as in ``"name@2"``."""
        return f"{self.version.name}@{self.version.number}"


@define
class _HTTPRequest:
    choice: Choice | None = None
    held: list[AdapterVersion] = field(factory=list)


_request: ContextVar[_HTTPRequest] = ContextVar("qlora_infer_http_request")


def current_choice() -> Choice | None:
    """Return the adapter of the request that the running task belongs to; ``None`` for the base model."""
    request = _request.get(None)
    return request.choice if request is not None else None


class HeldAdapters:
    """Middleware that keeps the version of a request from being freed until its response has ended.

    A task that a request starts has a copy of its context, and so the same choice. The version's exact name is left in
    the request's state, for logs.
    """

    def __init__(self, app: Application, registry: AdapterRegistry) -> None:
        self.app, self.registry = app, registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a choice of its own."""
        request = _HTTPRequest()
        token = _request.set(request)
        try:
            await self.app(scope, receive, send)
        finally:
            _request.reset(token)
            if request.choice is not None:
                scope.setdefault("state", {})["adapter"] = request.choice.exact
            for version in request.held:
                self.registry.release(version)


class AdapterChooser:
    """Finds the version that a name stands for, and loads a known adapter when it is first named."""

    def __init__(self, registry: AdapterRegistry, known: KnownNames) -> None:
        self._registry = registry
        self._known = known

    async def choose(self, name: str | None) -> None:
        """Make an adapter that of the current request; ``None`` is the base model.

        Raises:
            AdapterNotLoadedError: No adapter has that name, and none is known by it.
            Exception: The errors of ``load_adapter``, if the adapter is loaded now.
        """
        request = _request.get()
        request.choice = None
        if name is not None:
            version = self._loaded(name) or await self._load(name)
            request.held.append(version)
            request.choice = Choice(name, version)

    def _loaded(self, name: str) -> AdapterVersion | None:
        try:
            return self._registry.acquire(name)
        except AdapterNotLoadedError as error:
            if self._known.knows(name):
                return None
            raise self._known.unknown(error) from None

    async def _load(self, name: str) -> AdapterVersion:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[AdapterVersion] = loop.create_future()

        def settle(found: AdapterVersion | Exception, *, acquired: bool) -> None:
            if ended.done():  # the client has hung up
                if acquired and not isinstance(found, Exception):
                    self._registry.release(found)
            elif isinstance(found, Exception):
                ended.set_exception(found)
            else:
                ended.set_result(found)

        def waiter(found: AdapterVersion | Exception) -> None:
            acquired = not isinstance(found, Exception)
            if not isinstance(found, Exception):
                self._registry.acquire(found)
            with suppress(RuntimeError):  # the loop has ended, and the engine ends with it
                loop.call_soon_threadsafe(lambda: settle(found, acquired=acquired))

        self._known.request(name, waiter)
        return await ended
