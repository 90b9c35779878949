"""vLLM's parts without an engine."""

import json

import pytest
from chat.families import CHATML

#: Tokens that vLLM's parsers look for.
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="session")
def renderer(tmp_path_factory):
    """vLLM's renderer of a tiny Llama whose tokens are bytes, and whose tokenizer adds a BOS; there is no engine."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.registry import renderer_from_config

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *MARKS])
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, **sizes}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 16}))
    return renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(folder))))
