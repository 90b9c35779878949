"""The HTTP server, which lets requests finish after a signal to end."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import uvicorn
from typing_extensions import override

from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.serve.application import make_app
from qlora_infer.serve.settings import Settings

logger = logging.getLogger("qlora_infer")

#: Seconds that closing an engine takes at most, with some to spare.
CLOSING = 30


class Server(uvicorn.Server):  # type: ignore[misc]
    """A server that gives requests ``drain`` seconds to finish; the engine then ends the rest, with an error."""

    def __init__(self, config: uvicorn.Config, engine: QuantizedLoRAEngine, drain: float) -> None:
        super().__init__(config)
        self._engine, self._drain = engine, drain

    @override
    async def startup(self, sockets: Any = None) -> None:
        """Listen, and log where."""
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                logger.info("serving on http://%s:%s", host, port)

    @override
    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more connections, and wait for the requests that are there."""
        self.config.app.state.is_draining = True
        closing = threading.Thread(target=self._engine.close, name="qlora-infer-drain", daemon=True)
        timer = asyncio.get_running_loop().call_later(self._drain, closing.start)
        await super().shutdown(sockets)
        timer.cancel()


async def make_server(engine: QuantizedLoRAEngine, settings: Settings, **options: Any) -> Server:
    """Create a server on a running engine, which the caller closes.

    Args:
        engine: The engine.
        settings: The operator's decisions.
        options: uvicorn's, such as ``host``, ``port`` and ``ssl_keyfile``.
    """
    app = await make_app(engine, settings)
    options = {
        "log_config": None,  # the caller's
        "access_log": False,  # there is one of this library's
        "server_header": False,
        "timeout_graceful_shutdown": int(settings.drain) + CLOSING,
        **options,
    }
    return Server(uvicorn.Config(app, **options), engine, settings.drain)


def run(engine: QuantizedLoRAEngine, settings: Settings, **options: Any) -> None:
    """Serve until SIGTERM or Ctrl-C; the arguments are those of ``make_server``."""

    async def serve() -> None:
        server = await make_server(engine, settings, **options)
        await server.serve()

    uvicorn_loop = uvicorn.Config("").get_loop_factory()
    with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
        runner.run(serve())
