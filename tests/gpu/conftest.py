"""The real vLLM on a GPU: one engine for each quantization, one at a time; tests/engine's fixtures and helpers."""

import json
import os
import subprocess
import time

import pytest

# Read by engine.conftest. Few places, for each of them has a CUDA graph.
os.environ.setdefault("QLORA_INFER_TEST_ENGINE_ARGS", json.dumps({"gpu_memory_utilization": 0.3, "max_num_seqs": 32}))

from engine.conftest import FORMS, Engines, awq, engine  # noqa: F401  # fixtures

#: MiB of the GPU that a closed engine may leave in use. An engine takes 24,000 here; some 500 are the CUDA context of
#: this process, which PEFT and bitsandbytes make when they are imported.
LEFT_OVER = 1000


def used_memory():
    """MiB of the GPUs that these tests may use that are in use, whoever uses them."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["--id", chosen]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


class MeasuredEngines(Engines):
    """Knows what each engine that was closed has left in use."""

    def __init__(self):
        super().__init__()
        self.used_before = used_memory()
        self.left_over = {}

    def close(self):
        name, was_running = self._name, self._engine is not None
        super().close()
        if was_running:
            self.left_over[name] = self._settled()

    def _settled(self):
        """The driver takes memory back shortly after a process has ended."""
        deadline = time.monotonic() + 10
        while (left := used_memory() - self.used_before) > LEFT_OVER and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


@pytest.fixture(scope="session")
def engines():
    engines = MeasuredEngines()
    yield engines
    engines.close()


def pytest_collection_modifyitems(config, items):
    """Tests of one engine stand together; those that end it come last. Tests for two GPUs need two to be chosen."""
    here = os.path.dirname(__file__)
    mine = [item for item in items if str(item.path).startswith(here)]
    if not mine:
        return
    import torch

    num_gpus = torch.cuda.device_count()
    if not num_gpus and not config.option.collectonly:
        raise pytest.UsageError("tests/gpu needs a GPU, and torch sees none")
    chosen = [item for item in mine if num_gpus > 1 or not item.get_closest_marker("two_gpus")]
    config.hook.pytest_deselected(items=[item for item in mine if item not in chosen])

    def place(item):
        if "served" in getattr(item, "fixturenames", ()):
            return 100 + list(item.module.MODELS).index(item.callspec.params["served"])
        if "engine" in getattr(item, "fixturenames", ()):
            return FORMS.index(item.callspec.params["engine"]) * 2 + 2
        return 1 if "awq" in getattr(item, "fixturenames", ()) else 99

    for item in chosen:
        item.add_marker(pytest.mark.gpu)
    items[:] = [item for item in items if item not in mine] + sorted(chosen, key=place)
