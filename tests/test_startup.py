"""What vLLM is told at its start where the user says nothing; no vLLM is needed."""

import os

import pytest

from qlora_infer import startup


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_on_a_cpu_vllms_own_operators_are_used():
    """They are off in vLLM for models that it would compile, which it does not with LoRA."""
    arguments = {"model": "m"}
    assert startup.with_defaults(arguments, device="cpu") == {
        "model": "m",
        "compilation_config": {"custom_ops": ["all"]},
    }
    assert startup.with_defaults(arguments, device="cuda") == arguments
    assert arguments == {"model": "m"}


def test_what_the_user_says_stays():
    """Arguments and environment variables that are set are left alone."""
    arguments = {"compilation_config": {"custom_ops": ["none"]}}
    assert startup.with_defaults(arguments, device="cpu") == arguments
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    startup.set_environment(device="cpu", num_cores=2)
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


def test_of_two_cores_both_compute():
    """vLLM would leave one to its own loop; on larger machines, and where threads are bound by hand, it may."""
    startup.set_environment(device="cpu", num_cores=8)
    startup.set_environment(device="cuda", num_cores=2)
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in os.environ
    startup.set_environment(device="cpu", num_cores=2)
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    del os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
    startup.set_environment(device="cpu", num_cores=2)
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in os.environ
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
