"""What the documentation shows is what happens: docstrings' examples and the README's Python are executed."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from qlora_infer.testing import FakeEngine, write_adapter

MODULES = (
    "qlora_infer.adapters.effect",
    "qlora_infer.adapters.lineage",
    "qlora_infer.adapters.source",
    "qlora_infer.demo",
    "qlora_infer.engine",
    "qlora_infer.metrics",
    "qlora_infer.quantization._base",
    "qlora_infer.requests.handle",
    "qlora_infer.testing._engine",
)
PAGES = (
    "README.md",
    "docs/testing.md",
    "docs/quantization.md",
    "docs/scheduling.md",
    "docs/adapters.md",
    "docs/metrics.md",
)
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, tmp_path):
    """Every >>> of a module's docstrings gives what it says."""
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"tmp_path": tmp_path}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Every Python block of a page runs, one after the other, with the fake engine in vLLM's place."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_infer.engine._vllm_backend", FakeEngine)
    for owner in ("jashing/tinyllama-colorist-lora", "me/pirate-lora", "adapters/pirate"):
        write_adapter(tmp_path / owner)
    namespace: dict[str, object] = {"tmp_path": tmp_path}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
