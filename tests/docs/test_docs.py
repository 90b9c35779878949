"""What the documentation shows is what happens: docstrings' examples and every page's Python are executed."""

import ast
import doctest
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
from doc_blocks import FENCE, ROOT, blocks, first_line, needs_demo_model, pages, run_python, text_of

from qlora_infer.testing import FakeEngine, write_adapter


def with_examples():
    """The modules whose docstrings hold a ``>>>``."""
    source = ROOT / "src"
    for path in sorted(source.rglob("*.py")):
        if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.M):
            yield ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


MODULES = tuple(with_examples())

#: Python that is not executed here: page and first line of the block, and the reason, with the test that runs the like.
NOT_EXECUTED: dict[tuple[str, str], str] = {
    ("docs/index.md", "from qlora_infer import QuantizedLoRAEngine"): "the README's, which is run on the real vLLM",
    ("docs/service.md", "import openai"): "needs the server: tests/serve/test_completions.py runs it against one",
    (
        "docs/service.md",
        "from qlora_infer.serve.application import make_app",
    ): "needs vLLM: tests/serve/test_operation.py",
    **{
        ("docs/ray.md", line): "needs a Ray: tests/services/test_ray.py runs the page on one"
        for line in (
            "from pathlib import Path",
            "from ray import serve",
            "from qlora_infer import AdapterNotLoadedError",
            "from qlora_infer.serve.settings import Settings",
            "def make_parallel_engine():",
        )
    },
}

#: The package that examples need beside the library's own requirements, by module or page.
NEEDED = {
    "qlora_infer.engine": "torch",
    "qlora_infer.sources.blend": "torch",
    "qlora_infer.ray.server": "ray.serve",
    "qlora_infer.ray.stage": "ray.data",
    "docs/adapters.md": "torch",
    "docs/which-adapters.md": "torch",
}

LANGUAGES = {"python", "console", "text", "json", "yaml", "toml"}
PYTHON_PAGES = [page for page in pages() if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    """Every >>> of a module's docstrings gives what it says."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", [page for page in PYTHON_PAGES if not needs_demo_model(page)])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Every Python block of a page runs, one after the other, with the fake engine in vLLM's place, and prints what is shown."""
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_infer.engine._vllm_backend", FakeEngine)
    write_adapter("me/pirate-lora")
    skip = {line for where, line in NOT_EXECUTED if where == page}
    for ran in run_python(page, skip):
        assert ran.shown in (None, ran.printed), ran.block


@pytest.mark.parametrize("page", [page for page in PYTHON_PAGES if needs_demo_model(page)])
def test_the_code_of_a_demo_page_is_python(page):
    """The blocks that need the real vLLM are sound Python, also where there is no time to start it."""
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.code, filename=str(block))


def test_the_sites_first_page_shows_the_readmes_example():
    """The same code, and the same output."""
    shown = [[block.code for block in blocks(page)[:2]] for page in ("README.md", "docs/index.md")]
    assert shown[0] == shown[1]


def test_what_is_not_executed_is_there():
    """Each exception names a block that exists."""
    named = {(page, first_line(block)) for page in pages() for block in blocks(page) if block.language == "python"}
    assert set(NOT_EXECUTED) <= named


@pytest.mark.parametrize("page", pages())
def test_no_block_escapes(page):
    """Every fence is one that the tests see, and says what it holds, so that no Python hides in it under another name."""
    around = FENCE.sub("", text_of(page))
    assert not re.findall(r"^[ >\t]*(?:```|~~~).*$", around, re.M), "a fence of another kind, or one that does not end"
    assert {block.language for block in blocks(page)} <= LANGUAGES
    # What begins like Python and is shown as something else would not be run.
    hidden = [
        str(block)
        for block in blocks(page)
        if block.language != "python" and re.match(r"(import|from) \w|>>> |with \w+\(", block.code)
    ]
    assert not hidden


@pytest.mark.parametrize("page", pages())
def test_json_and_toml_can_be_read(page):
    """A JSON or TOML block is what it says."""
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.code)
        if block.language == "toml":
            tomllib.loads(block.code)


def test_a_wrong_page_is_noticed(tmp_path, monkeypatch):
    """The check itself: what a page shows and does not print, and an error in its code, with the page's own line."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n\n- in a list:\n\n    ```python\n    1 / 0\n    ```\n"
    )
    first, _, last = blocks(str(page))
    assert (first.line, last.line, last.code) == (3, 13, "1 / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        run_python(str(page))
    assert (Path(raised.traceback[-1].path), raised.traceback[-1].lineno + 1) == (page, 14)
    (ran,) = run_python(str(page), skip={"1 / 0"})
    assert (ran.printed, ran.shown) == ("1\n", "2\n")
