"""``examples/adapters.ipynb``, executed by a real kernel with the fake engine in vLLM's place, and the real demo adapters."""

import re

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from notebook_run import read_notebook, run_notebook

#: Puts the fake in vLLM's place, with the modules of the demo model, and answers such as its adapters give.
FAKE = """
import qlora_infer.demo, qlora_infer.engine
from qlora_infer.testing import FakeEngine

QUERY, KEY, MLP = (576, 576), (576, 192), (576, 1536)
LAYER = {
    **{"self_attn.q_proj": QUERY, "self_attn.k_proj": KEY, "self_attn.v_proj": KEY, "self_attn.o_proj": QUERY},
    **{"mlp.gate_proj": MLP, "mlp.up_proj": MLP, "mlp.down_proj": MLP[::-1]},
}
MODULES = {f"model.layers.{layer}.{name}": shape for layer in range(30) for name, shape in LAYER.items()}
qlora_infer.demo.demo_model = lambda quantization: "HuggingFaceTB/SmolLM2-135M-Instruct"
qlora_infer.engine._vllm_backend = lambda: FakeEngine(
    reply=lambda prompt, adapter: " ".join([f"{adapter} says: {prompt}", *["and on"] * 300]),
    step_seconds=0.01,
    modules=MODULES,
)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the notebook shows."""
    return run_notebook(tmp_path_factory.mktemp("notebook"), first_cell=FAKE, timeout=1500)


def test_the_notebook_is_kept_without_outputs():
    """What is in the repository has never been run: no output, no number, no metadata of somebody's editor."""
    notebook = read_notebook()
    assert all(
        cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"


def test_an_engine_is_a_table_in_the_notebook(shown):
    """A cell that ends with the engine shows the model, and the adapters with what they are."""
    assert "<th" in shown.html("load")
    model, adapters = shown.text("load").split("\n\n")
    assert model.splitlines()[0] == "model         HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [line.split()[:2] for line in adapters.splitlines()] == [
        ["adapter", "version"],
        *(["json", "1"], ["pirate", "1"], ["spanish", "1"]),
    ]


def test_base_and_adapters_stand_side_by_side(shown):
    """What generate returns is a table: for each prompt the base model, then each adapter."""
    rows = [line.split()[0] for line in shown.text("compare").splitlines()]
    assert rows == ["adapter", *["@base", "json", "pirate", "spanish"] * 2]
    assert "<td" in shown.html("compare")


def test_a_stream_ends_with_the_finished_output(shown):
    """The parts replace each other in one place, and the last is the finished output."""
    assert "spanish says: The capital of Italy is" in shown.text("stream")
    assert re.search(r"^finish reason  length$", shown.text("stream"), re.M)
    assert len([output for output in shown.outputs["stream"] if "data" in output]) == 1


def test_an_adapter_is_swapped_while_a_request_runs(shown):
    """The old request runs on, the new one gets the new version, and the version before comes back."""
    running, old, new = shown.printed("swap").splitlines()
    assert running == "while a request ran: True"
    assert old.startswith("the old one went on: pirate says: my name is and on")
    assert new.startswith("the new one says:    pirate says: The capital of Japan is")
    assert shown.text("rollback").splitlines()[1].split()[:5] == ["pirate", "my", "name", "is", "pirate"]


def test_throughput_is_a_picture(shown):
    """The plot is drawn in the notebook."""
    assert shown.has_picture("throughput")


def test_stats_and_the_end_are_shown(shown):
    """The statistics are tables with a row for each adapter; the closed engine says so."""
    totals, adapters = shown.text("stats").split("\n\n")
    assert totals.startswith("engine           running\n")
    assert "failed requests  none" in totals
    names = [line.split()[0] for line in adapters.splitlines()[1:]]
    assert names == ["@base", *(f"copy-{number}" for number in range(8)), "json", "pirate", "spanish"]
    assert shown.printed("close").startswith("<QuantizedLoRAEngine HuggingFaceTB/SmolLM2-135M-Instruct closed, ")
