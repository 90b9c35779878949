"""How vLLM compiles a model, and the steps that have CUDA graphs; no vLLM is needed."""

import logging

import pytest
from machines import AWQ, LLAMA_8B, cpu, gpu, plan_of, reason

from qlora_infer.plan.graphs import GRAPHS, compilation, graph_sizes
from qlora_infer.quantization import Platform


def compilation_config(platform, **options):
    return plan_of(platform, **options).engine_args.get("compilation_config")


def test_on_a_cpu_vllms_own_operators_are_used():
    """They are off in vLLM for models that it would compile, which it does not with LoRA."""
    arguments = {"model": "m"}
    assert compilation(arguments, cpu())[1] == {"custom_ops": ["all"]}
    assert arguments == {"model": "m"}
    assert compilation_config(cpu()) == {"custom_ops": ["all"]}


def test_on_a_gpu_steps_are_captured_and_nothing_compiled():
    """By default: CUDA graphs of all steps up to 512 tokens, no torch.compile, and never FULL; it is a reason to log."""
    plan = plan_of(gpu(), engine_args={"max_num_seqs": 32})
    assert plan.engine_args["compilation_config"] == {
        "mode": 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": graph_sizes({"max_num_seqs": 32}),
    }
    (startup,) = (decision for decision in plan.decisions if decision.name == "startup")
    assert (startup.value, startup.level) == ("fast", logging.INFO)
    assert "without torch.compile" in startup.reason


def test_compiled_is_vllms_own_default():
    """startup="compiled" gives vLLM no argument, and the reason says that it takes longer."""
    plan = plan_of(gpu(), startup="compiled")
    assert "compilation_config" not in plan.engine_args
    assert "minutes" in reason(plan, "startup")


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64, 100, 512])
def test_every_decoding_batch_has_a_graph(max_num_seqs):
    """Also the full one: vLLM does not decode in graphs of more than max_num_seqs."""
    sizes = graph_sizes({"max_num_seqs": max_num_seqs})
    assert max_num_seqs in sizes
    assert sizes[-1] == 512


def test_graphs_are_as_large_as_vllms_and_fewer():
    """Where vLLM would capture 51 sizes up to 512, 23 are captured; from 8 on, none is more than twice the one before.

    Over 32, a batch is padded by less than a quarter.
    """
    sizes = graph_sizes({})
    assert sizes == graph_sizes({"max_num_seqs": 1024})
    assert (len(sizes), sizes[-1]) == (23, 512)
    assert all(larger <= 1.25 * smaller + 1 for smaller, larger in zip(sizes, sizes[1:]) if smaller >= 32)


@pytest.mark.parametrize(
    ("num_parameters", "largest"),
    [(968_884_224, 4096), (6_979_321_856, 4096), (12_600_000_000, 2560), (32_000_000_000, 1024), (70_000_000_000, 512)],
)
def test_the_smaller_a_model_the_larger_steps_have_graphs(num_parameters, largest):
    """4096 tokens up to 8 billion parameters, 512 of 70 billion; they are padded by less than a quarter as well."""
    sizes = graph_sizes({}, num_parameters)
    assert sizes[-1] == largest
    assert all(larger <= 1.25 * smaller + 1 for smaller, larger in zip(sizes, sizes[1:]) if smaller >= 32)


@pytest.mark.parametrize(
    ("engine_args", "largest"), [({"max_num_seqs": 32}, 1792), ({"tensor_parallel_size": 2}, 3584)]
)
def test_a_plan_counts_the_parameters_of_one_gpu(engine_args, largest):
    """A model of 17 billion parameters has graphs of up to 1792 tokens; of two GPUs that share it, each has half of it."""
    model = {**AWQ, **LLAMA_8B, "num_hidden_layers": 80, "vocab_size": 128_256}
    plan = plan_of(gpu(), model, engine_args=engine_args)
    sizes = plan.engine_args["compilation_config"]["cudagraph_capture_sizes"]
    assert (sizes[:3], sizes[-1]) == ([1, 2, 4], largest)
    assert plan.engine_args["enforce_eager"] is False


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
    assert graph_sizes(given, 1_000_000_000)[-1] == largest


@pytest.mark.parametrize("platform", [cpu(), gpu()])
@pytest.mark.parametrize("given", [{"compilation_config": {"mode": 3}}, {"optimization_level": 0}])
def test_how_the_user_compiles_stays(given, platform):
    """Who says how to compile is not corrected, whatever startup says."""
    plan = plan_of(platform, startup="fast", engine_args=given)
    assert plan.engine_args.get("compilation_config") == given.get("compilation_config")


def test_without_graphs_there_are_none():
    """enforce_eager=True is left alone; so is a device that is neither a CPU nor a GPU of NVIDIA or AMD."""
    assert compilation_config(gpu(), enforce_eager=True) is None
    assert compilation({}, Platform("xpu", None, frozenset()))[1] is None


@pytest.mark.parametrize(
    "given",
    [{"cudagraph_capture_sizes": [4]}, {"max_cudagraph_capture_size": 64}, {"performance_mode": "interactivity"}],
)
def test_who_chooses_graph_sizes_gets_them(given):
    """vLLM takes sizes from one place only."""
    assert compilation_config(gpu(), engine_args=given) == {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}


@pytest.mark.parametrize("startup", ["fast", "compiled"])
def test_breakable_graphs_are_switched_on_with_the_graphs_that_need_them(startup):
    """vLLM's variable for them is set for the fast start and for such a compilation_config of the user's, only."""
    plan = plan_of(gpu(), startup=startup)
    assert ("VLLM_USE_BREAKABLE_CUDAGRAPH" in plan.environment) is (startup == "fast")
    for given, is_set in ((GRAPHS, True), ({"mode": 3}, False), (3, False)):
        plan = plan_of(gpu(), startup=startup, engine_args={"compilation_config": given})
        assert ("VLLM_USE_BREAKABLE_CUDAGRAPH" in plan.environment) is is_set


def test_who_switches_breakable_graphs_off_has_graphs_of_decoding_steps():
    """The user's word stands: the variable is not set, and steps with prompts are not captured."""
    off = gpu(environment={"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"})
    assert compilation_config(off)["cudagraph_mode"] == "FULL_DECODE_ONLY"
    for given in ({}, {"compilation_config": GRAPHS}):
        assert "VLLM_USE_BREAKABLE_CUDAGRAPH" not in plan_of(off, engine_args=given).environment
