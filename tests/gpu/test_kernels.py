"""LoRA's kernel on a real GPU: all of tests/_vllm/test_fused.py, models' shapes, CUDA graphs, and vLLM's own kernels beside it."""

import numpy as np
import pytest
import torch
from engine.test_answers import ADAPTERS, PROMPTS
from engine.test_life import start
from test_fused import (
    PDL,
    Case,
    interpreter,
    test_a_graph_of_more_rows_serves_a_batch_of_fewer,
    test_a_row_does_not_depend_on_the_rows_beside_it,
    test_an_adapter_costs_its_own_rank,
    test_an_embedding_has_its_first_product_already,
    test_any_batch_is_what_float64_says,
    test_batches_follow_each_other_in_the_same_memory,
    test_compiled_layers_give_what_they_give_uncompiled,
    test_slices_that_an_adapter_does_not_change_are_left_out,
    test_writing_instead_of_adding,
)

from gpu.test_gpu import GREEDY, TOLERANCE, distance
from qlora_infer._vllm.kernels.cuda import fused

__all__ = [
    "interpreter",
    "test_a_graph_of_more_rows_serves_a_batch_of_fewer",
    "test_a_row_does_not_depend_on_the_rows_beside_it",
    "test_an_adapter_costs_its_own_rank",
    "test_an_embedding_has_its_first_product_already",
    "test_any_batch_is_what_float64_says",
    "test_batches_follow_each_other_in_the_same_memory",
    "test_compiled_layers_give_what_they_give_uncompiled",
    "test_slices_that_an_adapter_does_not_change_are_left_out",
    "test_writing_instead_of_adding",
]

QKV = (4096, (4096, 1024, 1024))
DOWN = (14336, (4096,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("shape", [QKV, DOWN])
@pytest.mark.parametrize("num_rows", [1, 17, 64, 300, 8192])
def test_the_modules_of_a_model_of_eight_billion(shape, rank, dtype, num_rows):
    """float64's result for steps from one token to a prefill of 8192, base rows among them bit for bit."""
    case = Case(num_inputs=shape[0], sizes=shape[1], rank=rank, num_slots=8, max_rows=8192, dtype=dtype)
    for a in case.a:
        a *= 0.05
    generator = np.random.default_rng(0)
    case.check(generator.integers(-1, 8, num_rows))
    case.check(np.sort(generator.integers(-1, 2, num_rows)))


def test_a_cuda_graph_follows_the_batch():
    """One captured graph, replayed with other adapters for its rows, gives float64's result each time."""
    case = Case(num_inputs=QKV[0], sizes=QKV[1], rank=16, num_slots=8, max_rows=64)
    x, y = case.rows(64, QKV[0]), case.rows(64, sum(QKV[1]))
    case.check(np.arange(64) % 8, x=x, y=y.clone())
    result = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.copy_(y)
        for _ in range(3):  # one after the other, as the modules of a model are
            fused.add_lora(result, x, case.module, case.batch, case.scratch, pdl=PDL)
    generator = np.random.default_rng(0)
    for num_rows in (64, 1, 40, 64, 5) * 20:
        slots = generator.integers(-1, 8, num_rows).astype(np.int32)
        case.batch.update(slots)
        graph.replay()
        delta = case.expected(torch.zeros_like(y[:num_rows]), x[:num_rows], slots)
        expected = y.double()
        expected[:num_rows] += 3 * delta
        assert float((result.double() - expected).norm() / expected.norm()) < 2e-3
        assert torch.equal(result[:num_rows][slots < 0], y[:num_rows][slots < 0])


def test_the_same_answers_as_with_vllms_kernels(engine, engines, record_property):
    """A mixed batch gets the tokens that vLLM's own kernels give it, within TOLERANCE of a tie."""
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    prompts, names = [prompt for prompt, _ in jobs], [adapter for _, adapter in jobs]
    ours = engine.generate(prompts, GREEDY, adapter=names)
    with start(
        model=engines.demo.served,
        quantization=engines.demo.quantization,
        adapters=engines.demo.adapters,
        lora_kernels="vllm",
    ) as other:
        theirs = other.generate(prompts, GREEDY, adapter=names)
    distances = list(map(distance, theirs, ours))
    identical = sum(one.token_ids == two.token_ids for one, two in zip(theirs, ours))
    record_property("largest_distance", max(distances))
    record_property("identical_tokens", f"{identical} of {len(jobs)}")
    assert max(distances) < TOLERANCE
    assert identical >= len(jobs) // 2
