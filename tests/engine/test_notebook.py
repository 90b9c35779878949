"""A Jupyter notebook, executed by a real kernel, with the real vLLM."""

import nbformat
import pytest
from nbclient import NotebookClient

from engine.conftest import ENGINE_ARGS

CELLS = {
    "start": f"""
from qlora_infer import QuantizedLoRAEngine
from qlora_infer.demo import demo_adapters, demo_model
engine = QuantizedLoRAEngine(
    demo_model("awq"), adapters=demo_adapters(), max_loras=4, max_model_len=512, engine_args={ENGINE_ARGS!r}
)
greedy = {{"temperature": 0.0, "max_tokens": 16}}
prompt = "The capital of Germany is"
""",
    "generate": "print(engine.generate([prompt] * 2, greedy, adapter=[None, 'pirate'])[1].text)",
    "await": "print((await engine.add_request(prompt, greedy)).text)",
    "gather": """
import asyncio
outputs = await asyncio.gather(*(engine.add_request(prompt, greedy, adapter=name) for name in engine.adapters))
print([output.adapter for output in outputs])
""",
    "stream": """
async for part in engine.stream(prompt, greedy, adapter="pirate"):
    pass
print(part.finished, part.text)
for part in engine.stream(prompt, greedy, adapter="pirate"):
    pass
print(part.finished, part.text)
""",
    "close": "engine.close()\nprint(engine)",
}


@pytest.fixture(scope="module")
def printed(engines):
    """What each cell printed."""
    engines.close()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=300).execute()
    return {
        name: {
            stream: "".join(o.text for o in cell.outputs if o.get("name") == stream) for stream in ("stdout", "stderr")
        }
        for name, cell in zip(CELLS, notebook.cells, strict=True)
    }


def test_every_way_to_ask_works_in_a_notebook(printed):
    """generate, top-level await, gather, for and async for, in cells, while the kernel's own event loop runs."""
    assert "hearties" in printed["generate"]["stdout"]
    assert "Berlin" in printed["await"]["stdout"]
    assert "['json', 'pirate', 'spanish']" in printed["gather"]["stdout"]
    first, second = printed["stream"]["stdout"].splitlines()
    assert first == second
    assert "hearties" in first
    assert "closed" in printed["close"]["stdout"]


def test_a_notebook_shows_progress(printed):
    """The bar is there in a notebook, whose output is no terminal."""
    assert "2/2" in printed["generate"]["stderr"] + printed["generate"]["stdout"]
