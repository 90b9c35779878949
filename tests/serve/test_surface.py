"""The parts of vLLM's server that this library replaces, as they are in the installed vLLM: these fail when it changes."""

import asyncio
import gc
import logging
import sys

import pytest

pytest.importorskip("vllm.entrypoints.launchers")

from served import ByteEngine
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing

from qlora_infer._vllm.openai.application import ROUTES, make_application
from qlora_infer._vllm.openai.models import AdapterDefaults, AdapterModels
from qlora_infer.serve.application import make_app
from qlora_infer.serve.settings import Settings
from qlora_infer.testing import fake_engine


@pytest.fixture(scope="module")
def app(byte_model):
    with fake_engine(backend=ByteEngine()) as engine:
        yield asyncio.run(make_application(engine, served_model_names=["base", "other"]))


def test_every_route_is_vllm_s(app):
    """Each route that is served is there, but for the pages of documentation, which are an option."""
    optional = {route for route in ROUTES if route.startswith(("/docs", "/redoc", "/openapi"))}
    assert {route.path for route in app.routes} == set(ROUTES) - optional


def test_every_part_of_the_server_asks_this_engine(app):
    """No object of the server holds vLLM's own list of models, checks or defaults."""
    parts = [part for part in app.state._state.values() if isinstance(part, BaseServing)]
    assert len(parts) >= 6
    assert {type(part.models) for part in parts} == {AdapterModels}
    assert {part._check_model.__func__ for part in parts} == {AdapterModels.check_model}
    assert {type(part.default_sampling_params) for part in parts if hasattr(part, "default_sampling_params")} == {
        AdapterDefaults
    }
    gc.collect()
    left = [made for made in gc.get_objects() if type(made) is OpenAIServingModels]
    holders = {type(holder).__name__ for made in left for holder in gc.get_referrers(made) if holder is not left}
    assert holders <= {"frame", "list"}


def test_an_application_s_log_stays_as_it_is(byte_model, monkeypatch):
    """vLLM imports a package that sets the root logger to ERROR; the program's own warnings are seen all the same."""
    for name in [name for name in sys.modules if name.startswith("model_hosting_container_standards")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    with fake_engine(backend=ByteEngine()) as engine:
        asyncio.run(make_application(engine, served_model_names=["base"]))
    assert "model_hosting_container_standards.logging_config" in sys.modules
    assert logging.root.level == logging.WARNING


def test_the_engine_s_names(app):
    """All of ``--served-model-name`` are the base model, and the first one is in responses."""
    models = app.state.openai_serving_models
    assert [card.id for card in asyncio.run(models.show_available_models()).data] == ["base", "other"]
    assert models.model_name() == "base"
    assert models.is_base_model("other")


def test_vllm_s_own_key_does_not_open_the_server(app, monkeypatch):
    """vLLM's middleware for keys is left out, and its variable without a key of ours is refused, and not ignored."""
    assert [made.cls.__name__ for made in app.user_middleware] == [
        "HeldAdapters",
        "ScalingMiddleware",
        "CORSMiddleware",
    ]
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    with fake_engine(backend=ByteEngine()) as engine, pytest.raises(ValueError, match="VLLM_API_KEY"):
        asyncio.run(make_app(engine, Settings(("base",))))
