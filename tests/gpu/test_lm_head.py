"""Adapters on ``lm_head`` on a GPU: all of tests/engine/test_lm_head.py that is not to the bit, and vLLM's own kernels."""

import pytest
from engine.test_life import start
from engine.test_lm_head import (
    IN_PIECES,
    folders,
    heads,
    reference,
    test_drafted_tokens_are_judged_by_their_own_adapter,
    test_many_short_prompts_of_one_batch_are_read,
    test_prompts_and_answers_of_a_busy_engine_are_those_given_alone,
    test_prompts_are_read_as_peft_reads_them,
    test_prompts_of_everybody_in_one_batch_are_read_as_peft_reads_them,
    test_prompts_that_are_read_in_pieces_are_read_rightly,
    test_verify_adapter_reads_heads_rightly,
    undrafted,
)
from test_logits import test_the_kernels_of_gpus_add_each_rows_own_adapter

__all__ = [
    "folders",
    "heads",
    "reference",
    "test_drafted_tokens_are_judged_by_their_own_adapter",
    "test_many_short_prompts_of_one_batch_are_read",
    "test_prompts_and_answers_of_a_busy_engine_are_those_given_alone",
    "test_prompts_are_read_as_peft_reads_them",
    "test_prompts_of_everybody_in_one_batch_are_read_as_peft_reads_them",
    "test_prompts_that_are_read_in_pieces_are_read_rightly",
    "test_the_kernels_of_gpus_add_each_rows_own_adapter",
    "test_verify_adapter_reads_heads_rightly",
    "undrafted",
]


@pytest.fixture(scope="module", params=["auto", "vllm"])
def in_pieces(request, engines, folders, undrafted):  # the fixtures above
    """An engine that drafts tokens and reads prompts in pieces, with our kernels and with vLLM's."""
    engines.close()
    with start(adapters=folders, engine_args=IN_PIECES, max_lora_rank=8, lora_kernels=request.param) as engine:
        yield engine


def test_a_prompt_longer_than_vllms_pieces_is_read_rightly(awq, heads, reference, undrafted):
    """More than 1,024 tokens of a step, of which vLLM computes logits at a time: base and adapters are PEFT's."""
    from engine.test_lm_head import PROBE, is_right, read

    prompts = [" ".join([*PROBE[place:], *PROBE[:place], *PROBE]) for place in range(5)] * 2
    adapters = ["head", None, "head-and-more", "pirate", "head"] * 2
    outputs = read(heads, prompts, adapters)
    assert sum(len(output.prompt_token_ids) for output in outputs) > 2048
    assert all(is_right(reference, output) for output in outputs)
