"""What vLLM is told at its start where the user says nothing; no vLLM is needed."""

import logging
import os

import pytest

from qlora_infer.plan import startup
from qlora_infer.quantization import Platform
from qlora_infer.testing import FakeEngine, fake_engine


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "VLLM_CPU_INT4_W4A8",
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_WORKER_MULTIPROC_METHOD",
    ):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_on_a_cpu_vllms_own_operators_are_used():
    """They are off in vLLM for models that it would compile, which it does not with LoRA."""
    arguments = {"model": "m"}
    assert startup.with_defaults(arguments, device="cpu") == {
        "model": "m",
        "compilation_config": {"custom_ops": ["all"]},
    }
    assert arguments == {"model": "m"}


def test_on_a_cpu_the_kv_cache_takes_what_is_there(monkeypatch):
    """A quarter of the free memory, where vLLM would want 0.92 of all, unless the user says how much."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    free = {"device": "cpu", "free_memory": 8 << 30}
    assert startup.with_cpu_memory({"model": "m"}, **free) == {"model": "m", "kv_cache_memory_bytes": 2 << 30}
    for given in ({"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 1}):
        assert startup.with_cpu_memory(given, **free) == given
    assert startup.with_cpu_memory({}, device="cuda", free_memory=8 << 30) == {}
    assert startup.with_cpu_memory({}, device="cpu", free_memory=None) == {}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert startup.with_cpu_memory({}, **free) == {}


def test_on_a_gpu_steps_are_captured_and_nothing_compiled(caplog):
    """By default: CUDA graphs of all steps up to 512 tokens, no torch.compile, and never FULL; it is logged."""
    with caplog.at_level(logging.INFO, "qlora_infer"):
        chosen = startup.with_defaults({"model": "m", "max_num_seqs": 32}, device="cuda")
    assert chosen == {
        "model": "m",
        "max_num_seqs": 32,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "cudagraph_capture_sizes": startup.graph_sizes({"max_num_seqs": 32}),
        },
    }
    assert 'startup="fast"' in caplog.text


def test_compiled_is_vllms_own_default(caplog):
    """startup="compiled" tells vLLM nothing, and logs that it takes longer."""
    with caplog.at_level(logging.INFO, "qlora_infer"):
        assert startup.with_defaults({"model": "m"}, device="cuda", startup="compiled") == {"model": "m"}
    assert "minutes" in caplog.text


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64, 100, 512])
def test_every_decoding_batch_has_a_graph(max_num_seqs):
    """Also the full one: vLLM does not decode in graphs of more than max_num_seqs."""
    sizes = startup.graph_sizes({"max_num_seqs": max_num_seqs})
    assert max_num_seqs in sizes
    assert sizes[-1] == 512


def test_vllm_is_told_of_breakable_graphs_while_such_an_engine_starts(monkeypatch):
    """Only then, so that another engine of the process starts as it would alone; and not against the user's word."""
    chosen = startup.with_defaults({}, device="cuda")
    with startup.breakable_graphs(chosen):
        assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "1"
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" not in os.environ
    for others in ({}, {"compilation_config": 3}, {"compilation_config": {"mode": 3}}):
        with startup.breakable_graphs(others):
            assert "VLLM_USE_BREAKABLE_CUDAGRAPH" not in os.environ
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    chosen = startup.with_defaults({}, device="cuda")
    assert chosen["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    for any_of_them in (chosen, {"compilation_config": startup.GRAPHS}):
        with startup.breakable_graphs(any_of_them):
            assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "0"
    assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "0"


def test_graphs_are_as_large_as_vllms_and_fewer():
    """Where vLLM would capture 51 sizes up to 512, 23 are captured; from 8 on, none is more than twice the one before.

    Over 32, a batch is padded by less than a quarter.
    """
    sizes = startup.graph_sizes({})
    assert sizes == startup.graph_sizes({"max_num_seqs": 1024})
    assert (len(sizes), sizes[-1]) == (23, 512)
    assert all(larger <= 1.25 * smaller + 1 for smaller, larger in zip(sizes, sizes[1:]) if smaller >= 32)


@pytest.mark.parametrize(
    ("num_parameters", "largest"),
    [(968_884_224, 4096), (6_979_321_856, 4096), (12_600_000_000, 2560), (32_000_000_000, 1024), (70_000_000_000, 512)],
)
def test_the_smaller_a_model_the_larger_steps_have_graphs(num_parameters, largest):
    """4096 tokens up to 8 billion parameters, 512 of 70 billion; they are padded by less than a quarter as well."""
    sizes = startup.graph_sizes({}, num_parameters)
    assert sizes[-1] == largest
    assert all(larger <= 1.25 * smaller + 1 for smaller, larger in zip(sizes, sizes[1:]) if smaller >= 32)


@pytest.mark.parametrize(
    ("given", "largest"),
    [
        ({"max_num_batched_tokens": 2048}, 2048),
        ({"max_num_batched_tokens": 3000}, 3000),
        ({"max_num_batched_tokens": 8192, "max_model_len": 512, "max_num_seqs": 2}, 4096),
        ({"max_model_len": 512, "max_num_seqs": 2}, 1024),
        ({"max_model_len": 512}, 4096),
    ],
)
def test_no_graph_is_larger_than_a_step_can_be(given, largest):
    """vLLM would take it out, and warn of it; the largest step has one where it is not over 4096 tokens."""
    assert startup.graph_sizes(given, 1_000_000_000)[-1] == largest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("given", [{"compilation_config": {"mode": 3}}, {"optimization_level": 0}])
def test_how_the_user_compiles_stays(given, device):
    """Who says how to compile is not corrected, whatever startup says."""
    assert startup.with_defaults(given, device=device, startup="fast") == given


def test_without_graphs_there_are_none():
    """enforce_eager=True is left alone; so is a device that is neither a CPU nor a GPU of NVIDIA or AMD."""
    assert startup.with_defaults({"enforce_eager": True}, device="cuda") == {"enforce_eager": True}
    assert startup.with_defaults({}, device="xpu") == {}


@pytest.mark.parametrize(
    "given",
    [{"cudagraph_capture_sizes": [4]}, {"max_cudagraph_capture_size": 64}, {"performance_mode": "interactivity"}],
)
def test_who_chooses_graph_sizes_gets_them(given):
    """vLLM takes sizes from one place only."""
    chosen = startup.with_defaults(given, device="cuda")
    assert chosen["compilation_config"] == {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}


class GPU(FakeEngine):
    """A Llama in 4 bits on a GPU of so many GiB; of 8 billion parameters, unless it has other layers than 32."""

    def __init__(self, gib, num_layers=32):
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": num_layers, "vocab_size": 128256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
        super().__init__(model_config={**shape, **heads, "quantization_config": {"quant_method": "awq", "bits": 4}})
        self._gib = gib

    def platform(self):
        return Platform("cuda", 90, frozenset({"vllm"}), self._gib << 30, 64 << 30)


def test_an_engine_on_a_gpu_starts_fast(caplog):
    """What the engine hands to vLLM, from its own arguments; the compiled start only when it is asked for.

    A model of 17 billion parameters has graphs of up to 1792 tokens; where two GPUs share one, each computes half of it.
    """
    backend = GPU(80, num_layers=80)
    for engine_args, largest in (({"max_num_seqs": 32}, 1792), ({"tensor_parallel_size": 2}, 3584)):
        with fake_engine(backend=backend, engine_args=engine_args):
            sizes = backend.engine_args["compilation_config"]["cudagraph_capture_sizes"]
            assert (sizes[:3], sizes[-1]) == ([1, 2, 4], largest)
            assert backend.engine_args["enforce_eager"] is False
    with fake_engine(backend=backend, startup="compiled"):
        assert "compilation_config" not in backend.engine_args


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
def test_graphs_are_given_up_only_where_memory_is_short(gib, arguments, is_eager, caplog):
    """enforce_eager="auto" is True where weights and slots leave less than 3 GiB of the GPU's share; and says so."""
    backend = GPU(gib)
    with caplog.at_level(logging.WARNING, "qlora_infer"), fake_engine(backend=backend, **arguments):
        assert backend.engine_args["enforce_eager"] is is_eager
        assert ("compilation_config" in backend.engine_args) is not is_eager
    assert ("too little of the GPU is left" in caplog.text) is (is_eager and "enforce_eager" not in arguments)


def test_what_the_user_says_stays():
    """Arguments and environment variables that are set are left alone."""
    arguments = {"compilation_config": {"custom_ops": ["none"]}}
    assert startup.with_defaults(arguments, device="cpu") == arguments
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    startup.set_environment(device="cpu", num_cores=2)
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


def test_a_cpu_does_not_round_what_comes_into_a_layer_to_8_bits():
    """vLLM would with AWQ and GPTQ on CPUs that have AMX; whoever sets its variable has it so."""
    startup.set_environment(device="cuda")
    assert "VLLM_CPU_INT4_W4A8" not in os.environ
    startup.set_environment(device="cpu")
    assert os.environ["VLLM_CPU_INT4_W4A8"] == "0"
    os.environ["VLLM_CPU_INT4_W4A8"] = "1"
    startup.set_environment(device="cpu")
    assert os.environ["VLLM_CPU_INT4_W4A8"] == "1"


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
