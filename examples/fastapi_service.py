"""An engine in a web application of your own. For the whole of OpenAI's API there is ``qlora-infer serve``.

pip install 'qlora-infer[cuda]' fastapi uvicorn
python examples/fastapi_service.py org/model-AWQ pirate=me/pirate-lora
curl 'http://127.0.0.1:8000/answer?adapter=pirate&prompt=ahoy'
"""

import contextlib
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException

import qlora_infer as ql


def create_app(engine: ql.QuantizedLoRAEngine) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:  # closed when the application ends
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/answer")
    async def answer(prompt: str, adapter: str | None = None) -> dict[str, str]:
        try:
            output = await engine.add_request(prompt, {"max_tokens": 64}, adapter=adapter, timeout=60, block=False)
        except ql.AdapterNotLoadedError as error:
            raise HTTPException(404, str(error)) from error
        except ql.QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        return {"text": output.text}

    return app


if __name__ == "__main__":
    model, *adapters = sys.argv[1:]
    sources = dict(adapter.split("=", 1) for adapter in adapters)
    uvicorn.run(create_app(ql.QuantizedLoRAEngine(model, adapters=sources, restart="on-failure", max_waiting=256)))
