"""DoRA and biases in a worker: from an adapter's files, through the reader and the slots, to each layer's outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "vllm", "peft"):
    pytest.importorskip(package)

PROGRAM = Path(__file__).with_name("dora_worker.py")


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [("qwen2-gptq", 0.05), ("llama-awq", 0.05), ("gemma2-bitsandbytes", 0.05), ("phi3-awq", 0.05), ("qwen3", 1e-3)],
)
def test_a_worker_serves_dora_as_peft_and_then_lora_in_the_same_slot(model, tolerance):
    """Each layer of a tiny model gives PEFT's outputs for an adapter with magnitudes, one without, one with biases, and the first again.

    There is one slot. Models with biases, packed 4-bit weights, modules that are fused in the checkpoint, and in float32.
    """
    paths = os.pathsep.join([str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), model], capture_output=True, text=True, timeout=540,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["differences"]) < tolerance, found
    assert found["without"] > 10 * tolerance, found  # the magnitudes and the biases do something
