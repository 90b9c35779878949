"""A model that is split among several workers of the real vLLM."""

import pytest

from engine.conftest import ENGINE_ARGS
from engine.test_answers import ADAPTERS, PEFT_TOLERANCE, assert_same_up_to_a_near_tie

PARAMS = {"temperature": 0.0, "max_tokens": 24, "logprobs": 5}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("doomed", ["awq"], indirect=True)
def test_three_workers_answer_as_one_does(doomed, monkeypatch):
    """With tensor parallelism, base and adapters in one batch choose the tokens that they choose without, up to near ties."""
    from qlora_infer import QuantizedLoRAEngine
    from qlora_infer.demo import demo_adapters, demo_model

    prompts = ["The capital of France is"] * 4
    alone = doomed.generate(prompts, PARAMS, adapter=ADAPTERS)
    doomed.close()
    # vLLM wants a NUMA node for each worker, or to be told not to bind them.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with QuantizedLoRAEngine(
        demo_model("awq"),
        adapters=demo_adapters(),
        max_loras=4,
        max_model_len=256,
        engine_args={**ENGINE_ARGS, "tensor_parallel_size": 3},  # the demo model has 9 heads
    ) as engine:
        split = engine.generate(prompts, PARAMS, adapter=ADAPTERS)
    for one, other in zip(alone, split, strict=True):
        assert_same_up_to_a_near_tie(one, other, PEFT_TOLERANCE)
    assert sum(one.text == other.text for one, other in zip(alone, split, strict=True)) >= 3
