"""Adapters with files beside their weights that are invalid, too large, or about other tokens."""

from __future__ import annotations

import json

from corpus.base import TOKENS
from corpus.entry import Entry, Files, lora, refused, served

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 17209920\n"


def _added(**tokens: int) -> str:
    return json.dumps({"added_tokens": [{"id": index, "content": token} for token, index in tokens.items()]})


@served(
    "generation config with a temperature that vLLM refuses",
    "Qwen's and others' defaults",
    warnings=("without generation_config.json",),
)
def hot() -> Files:
    return lora().beside(generation_config__json={"temperature": 2.5})


@served("empty chat template", "Unsloth, transformers", warnings=("without chat_template of tokenizer_config.json",))
def empty_template() -> Files:
    return lora().beside(tokenizer_config__json={"chat_template": ""})


@served("chat template that does not compile", "by hand", warnings=("without chat_template.jinja",))
def broken_template() -> Files:
    return lora().beside(chat_template__jinja="{% for m in messages %}{{ m.content }}")


@served("chat template that is too large", "by hand", warnings=("without chat_template.jinja",))
def large_template() -> Files:
    return lora().beside(chat_template__jinja="x" * 200_000)


@served("tokenizer that was cut off", "an interrupted copy", warnings=("without tokenizer.json",))
def cut_tokenizer() -> Files:
    return lora().beside(tokenizer__json='{"version": "1.0", "added_tokens": [')


@served("tokenizer that is too large", "vocabularies of a million tokens", warnings=("without tokenizer.json",))
def large_tokenizer() -> Files:
    return lora().beside(tokenizer__json=b"{" + b" " * (64 << 20))


@served(
    "tokenizer that is a Git LFS pointer",
    "git clone without LFS",
    warnings=('without tokenizer.json: .*"git lfs pull"',),
)
def tokenizer_pointer() -> Files:
    return lora().beside(tokenizer__json=POINTER)


@served("template that is a Git LFS pointer", "git clone without LFS", warnings=("without chat_template.jinja",))
def template_pointer() -> Files:
    return lora().beside(chat_template__jinja=POINTER)


@served(
    "token that renames one of the base's",
    "templates with role tokens",
    warnings=("has the name '<.tool.>' for the model's token",),
)
def renamed_token() -> Files:
    return lora().beside(tokenizer__json=_added(**{"<|tool|>": 40}))


@served("new token that only pads", "Unsloth", warnings=())
def new_padding() -> Files:
    return lora().beside(
        tokenizer__json=_added(**{"<|PAD|>": len(TOKENS)}), tokenizer_config__json={"pad_token": "<|PAD|>"}
    )


@served("stop token that the base does not have", "a larger tokenizer", warnings=("without a part of eos_token_id",))
def far_stop_token() -> Files:
    return lora().beside(generation_config__json={"eos_token_id": [2, 99_999]})


@served("generation defaults and template", "TRL, transformers")
def carrying() -> Files:
    return lora().beside(
        generation_config__json={"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2]},
        chat_template__jinja="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@refused(
    "new tokens",
    "TRL, Axolotl with special tokens",
    "Its tokenizer adds 2 tokens that the model's does not have: '<think>' (512), '</think>' (513); vLLM serves no new "
    "token embeddings from an adapter: merge it into its base model, or train it without new tokens.",
    way_out="merge it into its base model, or train it without new tokens",
    is_refused_alone=False,
)
def new_tokens() -> Files:
    return lora().beside(tokenizer__json=_added(**{"<think>": 512, "</think>": 513}))


@refused(
    "other ids for the model's tokens",
    "an adapter of another tokenizer",
    "Its tokenizer has other ids than the model's for 1 tokens: '<image>' (99, here 18); it was trained on another model "
    "or with another tokenizer.",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def moved_tokens() -> Files:
    return lora().beside(tokenizer__json=_added(**{"<image>": 99}))


ENTRIES = [value for value in list(globals().values()) if isinstance(value, Entry)]
