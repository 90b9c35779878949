"""The example of an engine in a web application of one's own, on the fake engine."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from fastapi.testclient import TestClient

from qlora_infer.testing import fake_engine, write_adapter

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_service.py"


def test_the_example_answers_and_closes_its_engine(tmp_path):
    """It answers with base and adapter, has statuses for errors, and closes the engine when the application ends."""
    spec = importlib.util.spec_from_file_location("fastapi_service", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    engine = fake_engine(adapters={"pirate": write_adapter(tmp_path / "pirate")})
    with TestClient(example.create_app(engine)) as http:
        assert http.get("/answer", params={"prompt": "ahoy"}).json() == {"text": "You said: ahoy"}
        assert http.get("/answer", params={"prompt": "ahoy", "adapter": "pirate"}).json() == {
            "text": "pirate says: ahoy"
        }
        assert http.get("/answer", params={"prompt": "ahoy", "adapter": "parrot"}).status_code == 404
    assert not engine.is_running
