"""vLLM's environment variables: which are decided, and how they are set while an engine starts."""

import os
import threading

import pytest
from machines import cpu, gpu, plan_of

from qlora_infer._vllm.environment import LONGEST_SOCKET_FOLDER, applied, sockets_in, users_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)


def test_a_cpu_does_not_round_what_comes_into_a_layer_to_8_bits():
    """vLLM would with AWQ and GPTQ on CPUs that have AMX; whoever sets its variable has it so."""
    assert "VLLM_CPU_INT4_W4A8" not in plan_of(gpu()).environment
    assert plan_of(cpu()).environment["VLLM_CPU_INT4_W4A8"] == "0"
    assert "VLLM_CPU_INT4_W4A8" not in plan_of(cpu(environment={"VLLM_CPU_INT4_W4A8": "1"})).environment


def test_of_two_cores_both_compute():
    """vLLM would leave one to its own loop; on larger machines, and where threads are bound by hand, it may."""
    name = "VLLM_CPU_NUM_OF_RESERVED_CPU"
    assert plan_of(cpu(num_cores=2)).environment[name] == "0"
    bound = cpu(num_cores=2, environment={"VLLM_CPU_OMP_THREADS_BIND": "0"})
    for others in (cpu(num_cores=8), cpu(), gpu(num_cores=2), bound, cpu(num_cores=2, environment={name: "1"})):
        assert name not in plan_of(others).environment


def test_the_core_is_spawned():
    """Unless the user says how processes are made."""
    assert plan_of(gpu()).environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    forking = cpu(environment={"VLLM_WORKER_MULTIPROC_METHOD": "fork"})
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in plan_of(forking).environment


def test_variables_are_set_while_an_engine_starts():
    """Only then, so that another engine of the process starts as it would alone; and not against the user's word."""
    os.environ["VLLM_CPU_INT4_W4A8"] = "1"
    with applied({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "VLLM_CPU_INT4_W4A8": "0"}):
        assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "1"
        assert os.environ["VLLM_CPU_INT4_W4A8"] == "1"
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" not in os.environ
    assert os.environ["VLLM_CPU_INT4_W4A8"] == "1"


def test_an_engine_that_starts_meanwhile_keeps_its_variables():
    """Of two engines that start at a time, the first to be ready takes no variable away from the other.

    Nor does the second one's plan take the first one's variables for the user's.
    """
    variables, is_set, may_end = {"VLLM_CPU_INT4_W4A8": "0"}, threading.Event(), threading.Event()

    def start_another():
        with applied(variables):
            is_set.set()
            may_end.wait(10)

    other = threading.Thread(target=start_another)
    other.start()
    assert is_set.wait(10)
    assert users_variables() == {}
    with applied(variables):
        may_end.set()
        other.join(10)
        assert os.environ["VLLM_CPU_INT4_W4A8"] == "0"
    assert "VLLM_CPU_INT4_W4A8" not in os.environ


def test_the_users_variables_are_vllms_only():
    """A plan sees no other variable, such as a token."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    assert users_variables() == {"VLLM_CPU_KVCACHE_SPACE": "1"}


def test_sockets_have_names_that_fit(tmp_path):
    """A folder whose name is too long for a socket's is not used."""
    (variable,) = sockets_in(tmp_path.parents[-1]).values()
    assert variable == str(tmp_path.parents[-1])
    assert sockets_in(tmp_path / ("x" * LONGEST_SOCKET_FOLDER)) == {}
