"""Room for adapters and for CUDA graphs, decided from the memory that a machine has."""

import logging

import pytest
from machines import AWQ, GIB, LLAMA_8B, cpu, gpu, plan_of, reason

from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter

MODEL = {**AWQ, **LLAMA_8B}


@pytest.mark.parametrize(
    ("device", "host", "arguments", "expected"),
    [
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16}, (16, 819)),
        (24 * GIB, 16 * GIB, {"max_lora_rank": 64}, (3, 12)),
        (8 * GIB, 16 * GIB, {"max_lora_rank": 512}, (1, 4)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_slot_bytes": 400 << 20}, (5, 819)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_cpu_bytes": 1 * GIB}, (16, 1024)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_cpu_loras": 3}, (3, 3)),
        (None, None, {}, (8, 32)),
    ],
)
def test_auto_chooses_from_the_memory(device, host, arguments, expected):
    """max_loras="auto" and max_cpu_loras="auto" fit adapters of max_lora_rank into the memory, with the reason."""
    plan = plan_of(gpu(device_memory=device, host_memory=host), MODEL, max_loras="auto", **arguments)
    assert (plan.max_loras, plan.max_cpu_loras) == expected
    assert plan.engine_args["max_loras"] == expected[0]
    wanted = "there are" if device else "is not known"
    assert wanted in reason(plan, "max_loras")


def test_numbers_that_are_given_are_taken():
    """What the caller says is not second-guessed."""
    plan = plan_of(gpu(8, host_memory=8 * GIB), MODEL, max_loras=32, max_cpu_loras=100, max_lora_rank=512)
    assert (plan.max_loras, plan.max_cpu_loras, plan.engine_args["max_lora_rank"]) == (32, 100, 512)
    assert reason(plan, "max_loras") == "given"


def test_vllm_has_more_places_than_are_used():
    """It never evicts by itself, also while all adapters are replaced."""
    assert plan_of(gpu(), max_cpu_loras=32).engine_args["max_cpu_loras"] == 2 * 32 + 1


def test_bytes_bound_what_is_in_host_memory(tmp_path):
    """With max_cpu_bytes the adapters in host memory take no more than that, however many are registered."""
    backend = FakeEngine()
    size = sum(2 * 4 * (i + o) for i, o in TINY_MODEL.values()) * 2  # rank 4, float32
    with fake_engine(backend=backend, max_loras=1, max_cpu_bytes=3 * size) as engine:
        for seed in range(8):
            adapter = engine.load_adapter(f"a{seed}", write_adapter(tmp_path / str(seed), rank=4, seed=seed))
        assert adapter.num_bytes <= size
        engine.generate("x", adapter="a0")
        assert sum(engine.adapters[name].num_bytes for name in backend.resident) <= 3 * size
        assert "a0" in backend.resident


@pytest.mark.parametrize(
    ("gib", "arguments", "is_eager"),
    [
        (80, {}, False),
        (24, {}, False),
        (8, {"max_loras": 1, "max_lora_rank": 16}, True),
        (8, {"max_loras": 1, "max_lora_rank": 16, "enforce_eager": False}, False),
        (12, {"max_loras": 16, "max_lora_rank": 64}, True),
        (12, {"max_loras": 4, "max_lora_rank": 16}, False),
        (12, {"max_loras": 4, "max_lora_rank": 16, "engine_args": {"gpu_memory_utilization": 0.5}}, True),
        (12, {"max_loras": 1, "max_lora_rank": 16, "engine_args": {"gpu_memory_utilization": 0.68}}, True),
        (8, {"engine_args": {"tensor_parallel_size": 2}, "max_loras": 1}, False),
        (80, {"enforce_eager": True}, True),
    ],
)
def test_graphs_are_given_up_only_where_memory_is_short(gib, arguments, is_eager):
    """enforce_eager="auto" is True where weights and slots leave less than 3 GiB of the GPU's share; with a warning."""
    plan = plan_of(gpu(gib), {**MODEL, "vocab_size": 128_256}, **arguments)
    assert plan.engine_args["enforce_eager"] is is_eager
    assert ("compilation_config" in plan.engine_args) is not is_eager
    (eager,) = (decision for decision in plan.decisions if decision.name == "enforce_eager")
    is_chosen = is_eager and "enforce_eager" not in arguments
    assert ("too little of the GPU is left" in eager.reason) is is_chosen
    assert (eager.level == logging.WARNING) is is_chosen


def test_on_a_cpu_the_kv_cache_takes_what_is_there():
    """A quarter of the free memory, where vLLM would want 0.92 of all, unless the user says how much."""
    free = {"host_memory": 8 << 30}
    assert plan_of(cpu(**free)).engine_args["kv_cache_memory_bytes"] == 2 << 30
    for given in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 1}):
        assert given.items() <= plan_of(cpu(**free), engine_args=given).engine_args.items()
        assert plan_of(cpu(**free), engine_args=given).engine_args.get("kv_cache_memory_bytes") in (None, 1)
    for others in (gpu(), cpu(), cpu(**free, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})):
        assert "kv_cache_memory_bytes" not in plan_of(others).engine_args
