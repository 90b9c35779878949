"""A caller that ends badly leaves the GPU's memory free; tests/engine/test_left_behind.py has what needs no GPU."""

import time

import pytest
from engine.test_left_behind import LIMIT, call  # noqa: F401  # a fixture

from gpu.conftest import LEFT_OVER, used_memory

ONE = {"gpu_memory_utilization": 0.2, "max_num_seqs": 16}


@pytest.fixture(autouse=True)
def alone(engines):
    """No shared engine runs beside these tests' own."""
    engines.close()


def require_free(before):
    """The driver takes memory back shortly after a process has ended."""
    deadline = time.monotonic() + LIMIT
    while used_memory() - before > LEFT_OVER and time.monotonic() < deadline:
        time.sleep(0.1)
    assert used_memory() - before < LEFT_OVER


@pytest.mark.parametrize(
    "engine_args", [ONE, pytest.param({**ONE, "tensor_parallel_size": 2}, marks=pytest.mark.two_gpus)], ids=["1", "2"]
)
def test_a_caller_that_is_killed_frees_the_gpu(call, engine_args):  # noqa: F811
    """kill -9 while requests run: the engine's processes end within 10 s, and the memory is free."""
    before = used_memory()
    caller = call("serves", **engine_args)
    caller.wait_until_it_serves()
    assert used_memory() - before > 10 * LEFT_OVER
    pids = caller.engine_pids()
    caller.process.kill()
    caller.require_nothing_left(pids)
    require_free(before)


@pytest.mark.parametrize("seconds", [6, 15])
def test_a_caller_that_is_killed_during_the_start_frees_the_gpu(call, seconds):  # noqa: F811
    """While weights are read or graphs are captured."""
    before = used_memory()
    caller = call("serves", **ONE)
    caller.wait_until_a_core_starts()
    time.sleep(seconds)
    pids = caller.engine_pids()
    caller.process.kill()
    caller.require_nothing_left(pids)
    require_free(before)
