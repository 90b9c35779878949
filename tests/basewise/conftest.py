"""Tiny base models, which the tests of this folder share."""

import pytest
from basewise.tiny_bases import TinyBase


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyBase]:
    """A Llama with an output layer of its own, and a Qwen3 without one; both in float32."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    from models import catalog, tiny

    bases = {}
    for name in ("llama", "qwen3", "qwen3-moe"):
        model = catalog.BY_NAME[name]
        folder = tmp_path_factory.mktemp(name)
        tiny.build(model, folder)
        bases[name] = TinyBase(folder, model.architecture)
    return bases
