"""The embeddings of drafting models, such as EAGLE's heads, which have no adapters.

A drafting model may use the embeddings of the model itself. vLLM's first runner gives it the layer with LoRA, whose
kernels know the rows of the model's step, while a draft has fewer: its rows would get the adapters of other requests,
or end the engine. The second runner gives it the layer below (``maybe_share_target_embed`` in
``vllm/v1/worker/gpu/spec_decode/eagle/utils.py``). Read in vLLM 0.32.0, ``vllm/v1/spec_decode/llm_base_proposer.py``.
"""

from __future__ import annotations

from typing import Any


def share_plain_embeddings() -> None:
    """From now on give drafting models of the first runner the model's embeddings without LoRA."""
    try:
        from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    except ImportError:  # before vLLM 0.32
        return
    from vllm.lora.layers import BaseLayerWithLoRA

    theirs = SpecDecodeBaseProposer._maybe_share_embeddings

    def share(self: Any, target_language_model: Any) -> None:
        theirs(self, target_language_model)
        drafting: Any = getattr(self.model, "model", None)
        embeddings = getattr(drafting, "embed_tokens", None)
        if isinstance(embeddings, BaseLayerWithLoRA):
            drafting.embed_tokens = embeddings.base_layer

    SpecDecodeBaseProposer._maybe_share_embeddings = share
