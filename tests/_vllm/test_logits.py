"""Which adapter each row of logits gets, without an engine: PromptLogits, and the LoRA kernels of GPUs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from qlora_infer._vllm.kernels.logits import PromptLogits, first_row, follow, slots_of  # noqa: E402


class Kernels:
    """Remembers the rows of logits that it was given."""

    def __init__(self):
        self.given = []

    def use_logits_rows(self, slots):
        self.given.append(slots if slots is None else slots.tolist())


def test_rows_of_prompts_get_the_slots_of_their_tokens():
    """Any views of a step's hidden states, padded or cut, get their own tokens' slots, and the step's own come back."""
    kernels, memory = Kernels(), torch.arange(40.0).view(10, 4)
    step = memory[2:9]
    slots = np.asarray([-1, 0, 0, 2, 2, 2, 1], np.int32)
    with PromptLogits(kernels, lambda rows: rows * 2, step, lambda: slots) as logits:
        assert torch.equal(logits(step[1:3]), step[1:3] * 2)
        logits(step[:5][3:])
        logits(step)
    assert kernels.given == [[0, 0], [2, 2], slots.tolist(), None]


def test_a_step_without_prompts_to_read_costs_nothing():
    """Where no logits of a prompt are computed, nobody asks for slots, and the kernels are given nothing."""
    kernels = Kernels()
    with PromptLogits(kernels, lambda rows: rows, torch.zeros(2, 2), lambda: pytest.fail("asked")):
        pass
    assert kernels.given == []


def test_a_step_that_fails_leaves_its_own_rows():
    """An error of the model's goes on to vLLM, and the next logits have the step's own rows."""
    kernels, step = Kernels(), torch.zeros(3, 2)

    def fails(rows):
        raise MemoryError

    with (
        pytest.raises(MemoryError),
        PromptLogits(kernels, fails, step, lambda: np.zeros(3, np.int32)) as logits,
    ):
        logits(step[:2])
    assert kernels.given == [[0, 0], None]


@pytest.mark.parametrize(
    "rows",
    [
        lambda step: step.clone(),
        lambda step: step[::2],
        lambda step: step[:, 1:],
        lambda step: step.as_strided((3, 4), (4, 1), 36),
    ],
)
def test_rows_of_unknown_tokens_are_refused(rows):
    """Rows that are no part of the step's hidden states, token by token, raise instead of getting somebody's adapter."""
    step = torch.zeros(12, 4)[2:8]
    with pytest.raises(RuntimeError, match="not the step's hidden states"):
        first_row(step, rows(step))


def test_slots_are_found_by_vllms_ids():
    """An id's slot is its place in vLLM's list, and -1 for no adapter."""
    assert slots_of([7, 0, 9, 7], [9, None, 7]).tolist() == [2, -1, 0, 2]
    with pytest.raises(KeyError):
        slots_of([8], [9, None, 7])


def test_a_model_without_an_adapted_head_is_left_alone():
    """Where vLLM adapts no lm_head, and on ranks of a pipeline that have none, nothing of the runner is replaced."""
    pytest.importorskip("vllm")
    manager = SimpleNamespace(modules={"model.layers.0.self_attn.q_proj": torch.nn.Linear(2, 2)})
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    before = dict(vars(runner))
    follow(runner)
    assert vars(runner) == before


def test_the_kernels_of_gpus_add_each_rows_own_adapter():
    """Sampled, drafted and prompts' rows are float64's with each of the kernels for GPUs, base rows bit for bit."""
    pytest.importorskip("vllm")
    script = Path(__file__).with_name("logits_rows.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = ["FusedPunicaWrapper torch.float16"]
    if torch.cuda.is_available():
        kinds = ("FusedPunicaWrapper", "PunicaWrapperGPU")
        expected = [f"{kind} torch.{dtype}" for kind in kinds for dtype in ("float16", "bfloat16")]
    assert done.stdout.splitlines()[-len(expected) :] == expected
