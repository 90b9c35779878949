"""Drafting models get the model's embeddings without LoRA; no engine runs."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.spec_decode import llm_base_proposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from qlora_infer._vllm.kernels.drafts import share_plain_embeddings


def test_a_drafting_model_gets_the_embeddings_below_the_lora_layer(monkeypatch):
    """vLLM's first runner gives it the layer with LoRA, whose kernels know the rows of the model's own step only."""
    monkeypatch.setattr(
        SpecDecodeBaseProposer, "_maybe_share_embeddings", SpecDecodeBaseProposer._maybe_share_embeddings
    )
    monkeypatch.setattr(llm_base_proposer, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    plain, adapted = torch.nn.Embedding(4, 2), BaseLayerWithLoRA()
    adapted.base_layer = plain
    target = SimpleNamespace(model=SimpleNamespace(embed_tokens=adapted))

    def drafted_with():
        proposer = SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace()))
        SpecDecodeBaseProposer._maybe_share_embeddings(proposer, target)
        return proposer.model.model.embed_tokens

    assert drafted_with() is adapted  # vLLM's own, read in 0.32.0
    share_plain_embeddings()
    assert drafted_with() is plain
