"""The routes that change adapters: this library's, and vLLM's by which others load and unload them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from attrs import asdict
from fastapi import APIRouter, HTTPException, Path
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from qlora_infer.adapters.version import LoadedAdapter
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.errors import QLoRAInferError
from qlora_infer.serve.allowed import SourceNotAllowedError
from qlora_infer.serve.keys import admin_only
from qlora_infer.serve.settings import Settings

#: A name in a path; adapters with other names are loaded and unloaded through vLLM's routes.
Name = Annotated[str, Path(pattern=r"^[\w.-]{1,100}$")]

T = TypeVar("T")


class Load(BaseModel):  # type: ignore[misc]
    """The body of a load: an unknown field is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    source: str
    share: float = 1.0
    expect: int | str | None = None  # the version that is replaced, by number or digest; 0 for none
    strict: bool = False


class LoadLoRA(BaseModel):  # type: ignore[misc]
    """The body of vLLM's ``/v1/load_lora_adapter``, and more of this library's own."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    share: float = 1.0
    expect: int | str | None = None
    strict: bool = False


class UnloadLoRA(BaseModel):  # type: ignore[misc]
    """The body of vLLM's ``/v1/unload_lora_adapter``."""

    lora_name: str


class AdapterRoutes:
    """The work of the routes. It waits in threads, so that a download stops no request."""

    def __init__(self, engine: QuantizedLoRAEngine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(dependencies=[admin_only(self._settings.admin_key)])
        router.add_api_route("/adapters", self.adapters, methods=["GET"])
        router.add_api_route("/adapters/{name}", self.load, methods=["PUT"])
        router.add_api_route("/adapters/{name}", self.unload, methods=["DELETE"], status_code=204)
        router.add_api_route("/adapters/{name}/versions", self.versions, methods=["GET"])
        router.add_api_route("/adapters/{name}/rollback", self.rollback, methods=["POST"])
        router.add_api_route("/adapters/{name}/pin", self.pin, methods=["PUT"], status_code=204)
        router.add_api_route("/adapters/{name}/pin", self.unpin, methods=["DELETE"], status_code=204)
        router.add_api_route("/v1/load_lora_adapter", self.load_lora_adapter, methods=["POST"])
        router.add_api_route("/v1/unload_lora_adapter", self.unload_lora_adapter, methods=["POST"])
        return router

    async def adapters(self) -> dict[str, Any]:
        """List the loaded adapters."""
        return {name: asdict(loaded) for name, loaded in self._engine.adapters.items()}

    async def versions(self, name: Name) -> list[dict[str, Any]]:
        """List the versions that requests may name, the newest first."""
        return [asdict(version) for version in self._engine.adapter_versions(name)]

    async def load(self, name: Name, body: Load) -> dict[str, Any]:
        """Load an adapter, or replace it while requests run."""
        return asdict(await self._load(name, **body.model_dump()))

    async def unload(self, name: Name) -> None:
        """Unload an adapter; running requests finish."""
        await _in_thread(self._engine.unload_adapter, name)

    async def rollback(self, name: Name) -> dict[str, Any]:
        """Serve the version before again."""
        return asdict(await _in_thread(self._engine.rollback_adapter, name))

    async def pin(self, name: Name) -> None:
        """Keep an adapter in host memory."""
        await _in_thread(self._engine.pin_adapter, name)

    async def unpin(self, name: Name) -> None:
        """Allow an adapter to leave host memory again."""
        await _in_thread(self._engine.unpin_adapter, name)

    async def load_lora_adapter(self, body: LoadLoRA) -> PlainTextResponse:
        """Do as vLLM's route of this name, with the checks of this library."""
        name, expect = body.lora_name, body.expect
        if not body.load_inplace and expect is None:
            expect = 0
            if name in self._engine.adapters:  # as vLLM has it; whoever is second in a race gets 409
                raise HTTPException(
                    400, f"The lora adapter '{name}' has already been loaded: set 'load_inplace' to replace it."
                )
        await self._load(name, body.lora_path, share=body.share, expect=expect, strict=body.strict)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora_adapter(self, body: UnloadLoRA) -> PlainTextResponse:
        """Do as vLLM's route of this name."""
        await _in_thread(self._engine.unload_adapter, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _load(self, name: str, source: str, **options: Any) -> LoadedAdapter:
        if not name or name in self._settings.model_names:
            raise HTTPException(400, f"{name!r} is what the base model is called")
        parsed = await _in_thread(self._settings.allowed.parse, source)
        return await _in_thread(self._engine.load_adapter, name, parsed, **options)


async def _in_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function in a thread, and turn the library's errors about arguments into those of the client."""
    try:
        return await asyncio.to_thread(partial(function, *args, **options))
    except QLoRAInferError:
        raise
    except SourceNotAllowedError as error:
        raise HTTPException(403, str(error)) from error
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error)) from error
