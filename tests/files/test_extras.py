"""What an adapter carries beside its weights is read as transformers writes it, and cannot harm the server."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_infer.chat import process as template_process
from qlora_infer.chat import template as chat_template
from qlora_infer.chat.process import TemplateProcess, TemplateProcesses
from qlora_infer.chat.template import check_template, render
from qlora_infer.errors import (
    AdapterError,
    CorruptAdapterError,
    IncompatibleAdapterError,
    MissingDependencyError,
    UnsafeAdapterError,
)
from qlora_infer.files import added_tokens, extras
from qlora_infer.files import content as adapter_content
from qlora_infer.files.content import copy_adapter
from qlora_infer.files.extras import Extras, check_tokens, read_extras, with_model_tokens
from qlora_infer.testing import write_adapter

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
#: The parts of Jinja that templates of larger models use.
RICH = """
{%- macro show(text, depth=0) -%}
    {{- ("  " * depth) ~ text|trim -}}
{%- endmacro -%}
{%- set state = namespace(turn=0, seen=[]) -%}
{%- for message in messages|rejectattr("role", "equalto", "system") -%}
    {%- set state.turn = state.turn + 1 -%}
    {%- set state.seen = state.seen + [message.role] -%}
    {%- if message.content is string and '</think>' in message.content -%}
        {%- set text = message.content.split('</think>')[-1].lstrip('\\n') -%}
    {%- else -%}
        {%- set text = message.content -%}
    {%- endif -%}
    [{{ state.turn }}:{{ message.role|upper }}] {{ show(text, depth=loop.index0) }}
    {% generation %}{{ message | tojson }}{% endgeneration %}
    {{ {"a": "<b>&'é", "n": [1, 2.5, none, true]} | tojson(indent=2) }}
    {%- if loop.index >= 3 -%}{%- break -%}{%- endif -%}
{%- else -%}
    nobody
{%- endfor -%}
{{ state.seen | join(",") }} {{ messages[0].get("name", "x") | replace("x", "y") }} {{ unk_token is defined }}
{{ undefined_thing }}{{ messages | length }} {{ "%s-%05.1f" | format("a", 2) }} {{ messages | map(attribute="role") | list }}
"""
TEMPLATES = {
    "ChatML": CHATML, "Llama 3": LLAMA_3, "Llama 3.1": LLAMA_31, "Zephyr": ZEPHYR, "Mistral": MISTRAL, "rich": RICH
}  # fmt: skip
CONVERSATIONS = {
    "user": [{"role": "user", "content": "What is a <b>LoRA</b> & why?"}],
    "turns": [
        {"role": "user", "content": "  Hi\n"},
        {"role": "assistant", "content": "<think>hm</think>\n\nGrüß Gott ✨"},
        {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"},
    ],
    "system": [
        {"role": "system", "content": "Be brief.", "name": "x"},
        {"role": "user", "content": "Wer bist du?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Und jetzt?\r\n"},
    ],
    "nothing": [{"role": "system", "content": "only"}],
}
USER = CONVERSATIONS["user"]


def tiny_tokenizer(*added: str, **properties: Any) -> Any:
    """A real fast tokenizer of transformers with a vocabulary of five words."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models

    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **properties},
    )
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def write(folder: Path, **files: Any) -> Path:
    """Files by their names with "_" for "."; text and bytes as they are, other things as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# What is read


def test_an_adapter_without_further_files_carries_nothing(tmp_path: Path) -> None:
    """Most adapters are a config and weights: the base model's own template, defaults and tokens stay in force."""
    write(tmp_path, adapter_config_json={}, adapter_model_safetensors=b"")
    assert read_extras("bare", tmp_path) == Extras() == read_extras("gone", tmp_path / "gone")
    check_tokens("bare", Extras(), {})


def test_what_transformers_writes_is_read_back(tmp_path: Path) -> None:
    """The folder of a fine-tuning run, with the tokenizer and generation config that transformers saved into it."""
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer, GenerationConfig

    tiny_tokenizer("<|im_start|>", "<|im_end|>", chat_template=CHATML, pad_token="</s>").save_pretrained(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, max_new_tokens=99, eos_token_id=[6, 2]).save_pretrained(
        tmp_path
    )
    found, reloaded = read_extras("tuned", tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert found.chat_template == CHATML == reloaded.chat_template
    assert found.sampling_defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert found.stop_token_ids == (6, 2)
    assert found.added_tokens == reloaded.get_added_vocab() == {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 5, "<|im_end|>": 6
    }  # fmt: skip
    assert found.special_tokens == {
        name: reloaded.special_tokens_map[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    assert set(found.file_names) == {path.name for path in tmp_path.iterdir()}
    check_tokens("tuned", found, reloaded.get_vocab())


@pytest.mark.parametrize("in_jinja", [True, False])
@pytest.mark.parametrize("named", [False, True])
def test_the_default_template_is_read_from_each_place_that_transformers_has_used(
    tmp_path: Path, in_jinja: bool, named: bool
) -> None:
    """chat_template.jinja, a text in tokenizer_config.json, and the list of named templates with its default."""
    template = {"tool_use": "tools!", "default": ZEPHYR} if named else ZEPHYR
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path, save_jinja_files=in_jinja)
    assert (tmp_path / "chat_template.jinja").exists() is in_jinja
    assert read_extras("zephyr", tmp_path).chat_template == ZEPHYR


def test_the_jinja_file_goes_before_the_field(tmp_path: Path) -> None:
    """As in transformers, which reads the file with Python's line ends."""
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    tiny_tokenizer(chat_template="old").save_pretrained(tmp_path, save_jinja_files=False)
    write(tmp_path, chat_template_jinja="new\r\n{{ bos_token }}\rend")
    assert read_extras("both", tmp_path).chat_template == "new\n{{ bos_token }}\nend"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "new\n{{ bos_token }}\nend"


def test_a_field_that_is_null_says_nothing(tmp_path: Path) -> None:
    """Written by hand or by older tools; transformers takes it for missing."""
    config = {"chat_template": None, "pad_token": None, "bos_token": {"content": "<s>", "lstrip": False}}
    write(tmp_path, tokenizer_config_json=config, generation_config_json={"eos_token_id": None, "top_p": None})
    found = read_extras("null", tmp_path)
    assert found == Extras(
        special_tokens={"bos_token": "<s>"}, file_names=("tokenizer_config.json", "generation_config.json")
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0},
        {"temperature": None, "max_new_tokens": 256, "max_length": 20, "min_p": 0.05},
        {"presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 0, "num_beams": 4},
        {"temperature": 0, "top_k": -1},
        {"temperature": 2, "top_p": 1, "min_p": 1, "max_new_tokens": 1},
    ],
    ids=str,
)
def test_the_sampling_defaults_are_those_that_vllm_takes_from_a_model(tmp_path: Path, config: dict[str, Any]) -> None:
    """The same file beside a model or an adapter means the same; do_sample counts for neither."""
    pytest.importorskip("transformers")
    from transformers import GenerationConfig

    pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.config.model import ModelConfig

    write(tmp_path, generation_config_json=config)
    model: Any = SimpleNamespace(
        generation_config=str(tmp_path),
        override_generation_config={},
        try_get_generation_config=lambda: GenerationConfig.from_pretrained(tmp_path).to_diff_dict(),
    )
    found = read_extras("sampling", tmp_path).sampling_defaults
    assert found == ModelConfig.get_diff_sampling_param(model)
    SamplingParams(**found)


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([2], (2,)), ([128009, 2, 128009], (128009, 2)), ([], ()), (None, ())]
)
def test_stop_ids_are_a_number_or_a_list(tmp_path: Path, value: object, expected: tuple[int, ...]) -> None:
    """Llama 3 stops at one of several tokens; each is kept once, in the file's order."""
    write(tmp_path, generation_config_json={"eos_token_id": value})
    assert read_extras("stops", tmp_path).stop_token_ids == expected


def test_added_tokens_may_be_any_characters(tmp_path: Path) -> None:
    """Phi-2's added_tokens.json has runs of tabs and blanks, which cannot stand in a message as they are."""
    write(tmp_path, added_tokens_json={"\t\t": 50294, "  ": 50295, "\u2028": 50296})
    found = read_extras("phi", tmp_path)
    assert found.added_tokens == {"\t\t": 50294, "  ": 50295, "\u2028": 50296}
    with pytest.raises(IncompatibleAdapterError) as caught:
        check_tokens("phi", found, {"a": 0})
    assert str(caught.value).isprintable()


def test_added_tokens_of_older_files_are_read(tmp_path: Path) -> None:
    """added_tokens_decoder was written for all tokenizers until transformers 5."""
    decoder = {"5": {"content": "<a>", "special": True}, "6": {"content": "<b>"}}
    write(tmp_path, added_tokens_json={"<c>": 7}, tokenizer_config_json={"added_tokens_decoder": decoder})
    assert read_extras("older", tmp_path).added_tokens == {"<a>": 5, "<b>": 6, "<c>": 7}


@pytest.mark.parametrize("first", [True, False])
def test_only_the_added_tokens_of_a_large_tokenizer_are_parsed(tmp_path: Path, first: bool) -> None:
    """A tokenizer.json of 7 MB with deep merges and a decoy is read with little memory, wherever the part stands."""
    import tracemalloc

    part = {"added_tokens": [{"id": 9, "content": '<"x,}]\\', "special": True}]}
    words = {f"wörd{index}": index for index in range(150_000)}
    merges = [[f"w{index}", "ö"] for index in range(150_000)]
    rest = {"version": "1.0", "model": {"added_tokens": [{"id": 1, "content": "no"}], "vocab": words, "merges": merges}}
    write(tmp_path, tokenizer_json={**part, **rest} if first else {**rest, **part})
    tracemalloc.start()
    found = read_extras("large", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.added_tokens == {'<"x,}]\\': 9}
    assert peak < 3 * (tmp_path / "tokenizer.json").stat().st_size


# What is refused


LONG = "x" * (chat_template.MAX_TEMPLATE_BYTES + 1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template_jinja": b"\xff\xfe"}, "chat_template.jinja: .*codec"),
        ({"chat_template_jinja": " \n"}, "empty"),
        ({"chat_template_jinja": LONG}, "too large"),
        ({"tokenizer_config_json": {"chat_template": LONG}}, "131072 are allowed"),
        ({"tokenizer_config_json": {"chat_template": 3}}, "must be a text"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "'default'"),
        ({"tokenizer_config_json": {"chat_template": [{"name": ["default"], "template": "x"}]}}, "'default'"),
        ({"tokenizer_config_json": {"chat_template": ["x"]}}, "must be a text"),
        ({"tokenizer_config_json": '{"chat_template": "\\ud800"}'}, "surrogates"),
        ({"tokenizer_config_json": [1]}, "must hold a JSON object, not a list"),
        ({"tokenizer_config_json": {"eos_token": 2}}, "'eos_token' must be a short text, got 2"),
        ({"tokenizer_config_json": {"eos_token": "x" * 300}}, "'eos_token' must be a short text"),
        ({"tokenizer_config_json": '{"eos_token": "\\udfff"}'}, "surrogates"),
        ({"tokenizer_config_json": '{"eos_token": {"content": "a"}, "eos_token": 1}'}, "twice"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"-1": {"content": "x"}}}}, "an id from 0"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}}, "an id from 0"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"²": {"content": "x"}}}}, "an id from 0"),
        ({"tokenizer_config_json": {"added_tokens_decoder": ["x"]}}, "must map ids to objects"),
        ({"added_tokens_json": {"x": 1.5}}, "'x' must have an id from 0 to 2147483647"),
        ({"added_tokens_json": {"x": True}}, "an id from 0"),
        ({"added_tokens_json": {"": 1}}, "1 to 1024 characters"),
        ({"added_tokens_json": {"x": 1 << 40}}, "an id from 0"),
        ({"added_tokens_json": {str(i): i for i in range(100_001)}}, "more than 100000"),
        ({"added_tokens_json": "[" * 100_000}, "not valid JSON"),
        ({"tokenizer_json": "[1]"}, "no whole JSON object"),
        ({"tokenizer_json": ""}, "no whole JSON object"),
        ({"tokenizer_json": '{"added_tokens": [{"id": 1, "content": "x"}'}, "no whole JSON object"),
        ({"tokenizer_json": '{"model": "x'}, "no whole JSON object"),
        ({"tokenizer_json": '{"added_tokens": [{"id": 1,}]}'}, "not valid JSON"),
        ({"tokenizer_json": '{"added_tokens": null}'}, "a list of objects"),
        ({"tokenizer_json": '{"added_tokens": }'}, "not valid JSON"),
        ({"tokenizer_json": {"added_tokens": [{"id": -5, "content": "x"}]}}, "an id from 0"),
        ({"tokenizer_json": {"added_tokens": [{"id": 1, "content": None}]}}, "characters"),
        ({"generation_config_json": b"\xff"}, "not valid JSON"),
        ({"generation_config_json": "{"}, "not valid JSON"),
        ({"generation_config_json": '{"temperature": NaN}'}, "NaN is not a number"),
        ({"generation_config_json": '{"temperature": 1e999}'}, "a number from 0 to 2, got inf"),
        ({"generation_config_json": '{"top_k": ' + "9" * 5000 + "}"}, "not valid JSON"),
        ({"generation_config_json": '{"repetition_penalty": ' + "9" * 400 + "}"}, "a number above 0"),
        ({"generation_config_json": {"temperature": -1}}, "'temperature' must be a number from 0 to 2, got -1"),
        ({"generation_config_json": {"temperature": "0.6"}}, "got '0.6'"),
        ({"generation_config_json": {"temperature": True}}, "got True"),
        ({"generation_config_json": {"temperature": [0.6] * 9999}}, "got a list"),
        ({"generation_config_json": {"top_p": 7}}, "'top_p' must be a number above 0 and at most 1, got 7"),
        ({"generation_config_json": {"top_p": 0}}, "got 0"),
        ({"generation_config_json": {"top_k": 2.5}}, "'top_k' must be a whole number"),
        ({"generation_config_json": {"top_k": -2}}, "'top_k' must be a whole number"),
        ({"generation_config_json": {"min_p": 1.01}}, "from 0 to 1"),
        ({"generation_config_json": {"repetition_penalty": 0}}, "above 0"),
        ({"generation_config_json": {"max_new_tokens": 0}}, "at least 1"),
        ({"generation_config_json": {"eos_token_id": -5}}, "'eos_token_id' must be a token's id .*got -5"),
        ({"generation_config_json": {"eos_token_id": "2"}}, "got '2'"),
        ({"generation_config_json": {"eos_token_id": [[2]]}}, "got a list"),
        ({"generation_config_json": {"eos_token_id": [2, 1 << 33]}}, "a list of such"),
        ({"generation_config_json": {"eos_token_id": [*range(100_000)]}}, "100000 ids, 64 are allowed"),
        ({"generation_config_json": b" " * ((1 << 20) + 1)}, "too large"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_value_that_may_not_be_is_a_corrupt_adapter_and_the_message_says_what_was_expected(
    tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    with pytest.raises(CorruptAdapterError, match=said) as caught:
        read_extras("bad", write(tmp_path, **files), strict=True)
    assert caught.value.adapter == "bad"
    assert len(str(caught.value)) < len(str(tmp_path)) + 400
    if "too large" in said:  # refused before it is read
        return
    found = read_extras("bad", tmp_path)
    assert found.file_names == tuple(path.name for path in tmp_path.iterdir())
    (part,) = found.left_out  # without strict, the file or its part is left out with the same reason
    assert part.endswith(found.file_names)
    assert found.left_out[part] in str(caught.value).replace(str(tmp_path) + "/", "")
    assert found == Extras(file_names=found.file_names, left_out=found.left_out)


def test_of_a_file_with_one_bad_part_the_others_are_followed(tmp_path: Path) -> None:
    """An empty template does not cost the end token, nor a bad role another; of a generation config all is left out."""
    config = {"chat_template": "", "pad_token": 2, "eos_token": "</s>"}
    write(
        tmp_path,
        tokenizer_config_json=config,
        generation_config_json={"temperature": 2.5, "top_k": 5, "eos_token_id": 1},
        added_tokens_json={"<a>": 5},
        tokenizer_json="[1]",
    )
    found = read_extras("partly", tmp_path)
    assert found.special_tokens == {"eos_token": "</s>"}
    assert found.added_tokens == {"<a>": 5}
    assert (found.sampling_defaults, found.stop_token_ids, found.chat_template) == ({}, (), None)
    assert found.left_out == {
        "generation_config.json": "'temperature' must be a number from 0 to 2, got 2.5",
        "chat_template of tokenizer_config.json": "its chat template is empty",
        "pad_token of tokenizer_config.json": "'pad_token' must be a short text, got 2",
        "tokenizer.json": "it is no whole JSON object, or has too many parts",
    }
    assert found.followed == ("tokenizer_config.json", "added_tokens.json")


def test_the_ends_of_the_ranges_are_those_of_vllm() -> None:
    """What is refused here would be refused by vLLM at each request, with words about a caller who did nothing."""
    pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for wrong in (
        {"temperature": -0.1}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2}, {"min_p": 1.1},
        {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"repetition_penalty": 0}, {"max_tokens": 0},
    ):  # fmt: skip
        with pytest.raises(VLLMValidationError):
            SamplingParams(**wrong)


@pytest.mark.parametrize("name", extras.MAX_BYTES)
def test_each_file_is_read_up_to_its_limit(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of any size costs no more memory than its limit, and is left out; strict refuses it."""
    monkeypatch.setitem(extras.MAX_BYTES, name, 100)
    (tmp_path / name).write_bytes(b"{" + b" " * 100)
    found = read_extras("large", tmp_path)
    assert (found.left_out, found.file_names) == ({name: f"{name} is too large: it may have 100 bytes"}, ())
    with pytest.raises(CorruptAdapterError, match="too large: it may have 100 bytes"):
        read_extras("large", tmp_path, strict=True)


@pytest.mark.parametrize("name", extras.MAX_BYTES)
def test_another_file_in_a_file_s_place_is_left_out(tmp_path: Path, name: str) -> None:
    """A Git LFS pointer, or a web page, is neither a template nor JSON; strict refuses it."""
    for content, words in (
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!DOCTYPE html>", "web page"),
    ):
        (tmp_path / name).write_text(content)
        found = read_extras("pointer", tmp_path)
        assert words in found.left_out[name]
        assert (found.chat_template, found.file_names) == (None, ())
        with pytest.raises(CorruptAdapterError, match=words):
            read_extras("pointer", tmp_path, strict=True)


@pytest.mark.parametrize("name", extras.MAX_BYTES)
def test_a_file_that_is_too_large_is_not_copied(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it takes no room, and says that it is too large; so does a link that leads nowhere."""
    for module in (extras, adapter_content):
        monkeypatch.setattr(module, "MAX_BYTES", {**extras.MAX_BYTES, name: 1 << 20})
    source = write_adapter(tmp_path / "source")
    (source / name).write_bytes(b" " * ((1 << 20) + 1))
    copy_adapter("large", source, tmp_path / "copy", allow_pickle=False)
    assert (tmp_path / "copy" / name).stat().st_blocks == 0
    assert "too large" in read_extras("large", tmp_path / "copy").left_out[name]
    (source / name).unlink()
    (source / name).symlink_to("nowhere")
    copy_adapter("large", source, tmp_path / "again", allow_pickle=False)
    assert "leads nowhere" in read_extras("large", tmp_path / "again").left_out[name]


@pytest.mark.parametrize("name", extras.MAX_BYTES)
def test_no_file_is_a_link_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    """Else an adapter could show the server's files, or wait for ever for a pipe."""
    write(tmp_path / "outside", secret_txt="{}")
    inside = write(tmp_path / "inside", other_json='{"added_tokens": []}')
    (inside / name).symlink_to(tmp_path / "outside" / "secret.txt")
    with pytest.raises(UnsafeAdapterError, match="outside"):
        read_extras("link", inside)
    (inside / name).unlink()
    os.mkfifo(inside / name)
    with pytest.raises(UnsafeAdapterError, match="not a regular file"):
        read_extras("pipe", inside)
    (inside / name).unlink()
    (inside / name).mkdir()
    with pytest.raises(UnsafeAdapterError, match="not a regular file"):
        read_extras("folder", inside)
    (inside / name).rmdir()
    (inside / name).symlink_to("nowhere")
    with pytest.raises(CorruptAdapterError, match="leads nowhere"):
        read_extras("broken", inside, strict=True)
    (inside / name).unlink()
    (inside / name).symlink_to(name)
    with pytest.raises(CorruptAdapterError, match="leads nowhere"):
        read_extras("loop", inside, strict=True)


def test_links_within_the_folder_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """An adapter from the Hub is all links."""
    blobs = write(tmp_path / "models--a--b", x_y="") / "blobs"
    blobs.mkdir()
    (blobs / "1234").write_text('{"temperature": 0.5}')
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "generation_config.json").symlink_to("../../blobs/1234")
    assert read_extras("hub", snapshot).sampling_defaults == {"temperature": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        b"{" + b"[" * (1 << 22),
        b'{"a":' + b'"",' * (1 << 22),
        b"{" + b'\\"' * (1 << 22),
        b'{"' + b'\\"' * (1 << 22),
        b'{"' + b"\\" * (1 << 22),
        b'{"added_tokens":' + b"[" * (1 << 20) + b"]" * (1 << 20) + b"}",
    ],
    ids=["brackets", "texts", "escapes", "open", "backslashes", "nest"],
)
def test_a_hostile_tokenizer_file_is_refused_in_time(tmp_path: Path, content: bytes) -> None:
    """Each byte of it is looked at once, and the work is bounded."""
    started = time.process_time()
    with pytest.raises(CorruptAdapterError):
        read_extras("slow", write(tmp_path, tokenizer_json=content), strict=True)
    assert time.process_time() - started < 10


def test_the_work_on_a_tokenizer_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of it is well-formed JSON."""
    write(tmp_path, tokenizer_json={"model": [0] * 100, "added_tokens": [{"id": 1, "content": "x"}]})
    assert read_extras("long", tmp_path).added_tokens == {"x": 1}
    monkeypatch.setattr(added_tokens, "MAX_PART_BYTES", 10)
    with pytest.raises(CorruptAdapterError, match="10 are allowed"):
        read_extras("long", tmp_path, strict=True)
    monkeypatch.setattr(added_tokens, "MAX_STEPS", 50)
    with pytest.raises(CorruptAdapterError, match="too many parts"):
        read_extras("long", tmp_path, strict=True)


NAMES = st.sampled_from(sorted(extras.MAX_BYTES))
FIELDS = st.sampled_from([
    "chat_template", "added_tokens_decoder", "added_tokens", "eos_token_id", "temperature", "top_k", "top_p",
    "max_new_tokens", "repetition_penalty", "eos_token", "pad_token", "content", "id", "name", "template", "default",
    "__metadata__", "0", "7",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=3), inner, max_size=4),
)
WHOLE = {
    "chat_template.jinja": ZEPHYR,
    "tokenizer_config.json": json.dumps({
        "chat_template": [{"name": "default", "template": CHATML}], "eos_token": {"content": "</s>"},
        "added_tokens_decoder": {"5": {"content": "<a>"}},
    }),
    "generation_config.json": json.dumps({"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 3, "top_p": 0.5}),
    "added_tokens.json": json.dumps({"<a>": 5, "\t": 6}),
    "tokenizer.json": json.dumps({"added_tokens": [{"id": 5, "content": "<a>"}], "model": {"vocab": {"a": 1}}}),
}  # fmt: skip


MODEL = {"<a>": 5, "</s>": 2}


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        found = read_extras("fuzz", folder)  # invalid or not, it is no error
        str(found.left_out).encode()
        assert read_extras("fuzz", folder, strict=not found.left_out) == found
        check_tokens("fuzz", with_model_tokens(found, MODEL), MODEL, strict=True)
        read_extras("fuzz", folder, strict=True)
        assert not found.left_out
    except CorruptAdapterError as error:
        assert found.left_out
        str(error).encode()  # it can be printed
    except AdapterError as error:
        str(error).encode()  # it can be printed
    finally:
        (folder / name).unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=NAMES, content=st.binary(max_size=200))
def test_random_bytes_are_read_or_refused_with_a_typed_error(folder: Path, name: str, content: bytes) -> None:
    """No other exception, whatever a file holds."""
    read_or_refuse(folder, name, content)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=NAMES, value=st.dictionaries(FIELDS, VALUES, max_size=5) | VALUES)
def test_any_json_is_read_or_refused_with_a_typed_error(folder: Path, name: str, value: object) -> None:
    """Wrong types, NaN, numbers beyond all ranges, broken Unicode: well-formed files that say nonsense."""
    read_or_refuse(folder, name, json.dumps(value).encode())


@settings(max_examples=500, deadline=None)
@given(name=NAMES, data=st.data())
def test_damaged_files_are_read_or_refused_with_a_typed_error(folder: Path, name: str, data: st.DataObject) -> None:
    """What a broken download or a bad disk makes of real files."""
    whole = WHOLE[name].encode()
    cut = data.draw(st.integers(0, len(whole)))
    read_or_refuse(folder, name, whole[:cut])
    read_or_refuse(folder, name, whole[:cut] + data.draw(st.binary(max_size=3)) + whole[cut + 1 :])


# Tokens


def test_tokens_that_the_model_does_not_have_are_named_with_what_to_do() -> None:
    """vLLM serves no new embeddings from an adapter: such an adapter would be served without its tokens."""
    found = Extras(added_tokens={"</s>": 2, "<a>": 6, "<b>": 7, "<c\n>": 8, "<d>": 9}, file_names=("x",))
    with pytest.raises(IncompatibleAdapterError) as caught:
        check_tokens("new", found, {"</s>": 2, "hello": 5})
    (reason,) = caught.value.reasons
    assert "adds 4 tokens" in reason
    assert "'<a>' (6), '<b>' (7), '<c\\n>' (8), …" in reason
    assert "merge it" in reason


def test_tokens_with_other_ids_are_named_with_both() -> None:
    """Its weights have learned another token at that id."""
    with pytest.raises(IncompatibleAdapterError, match=r"'<a>' \(6, here 3\)"):
        check_tokens("moved", Extras(added_tokens={"<a>": 6}), {"<a>": 3})


def test_stop_ids_beyond_the_model_are_refused_if_strict() -> None:
    """With min_tokens vLLM writes to the logits of each stop id: one beyond them would end the engine for everybody."""
    check_tokens("last", Extras(stop_token_ids=(5,)), {"a": 5}, strict=True)
    with pytest.raises(IncompatibleAdapterError, match=r"stops at the token ids 6, 7; the model's end at 5"):
        check_tokens("beyond", Extras(stop_token_ids=(5, 6, 7)), {"a": 5}, strict=True)


def test_stop_ids_beyond_the_model_are_left_out_unless_strict() -> None:
    """The others end answers."""
    beyond = Extras(stop_token_ids=(5, 6, 7))
    check_tokens("beyond", beyond, {"a": 5})
    found = with_model_tokens(beyond, {"a": 5})
    assert found.stop_token_ids == (5,)
    assert list(found.left_out.values()) == ["it stops at the token ids 6, 7; the model's end at 5"]
    assert with_model_tokens(beyond, None) == beyond


def test_another_name_for_one_of_the_model_s_tokens_is_no_new_token() -> None:
    """Trainers rename a reserved token of Llama 3: its embedding is the model's, and as eos_token it ends answers."""
    model = {"<s>": 0, "<|reserved_0|>": 1}
    renamed = Extras(added_tokens={"<|im_end|>": 1}, special_tokens={"eos_token": "<|im_end|>"})
    check_tokens("renames", renamed, model, strict=True)
    found = with_model_tokens(renamed, model)
    assert (found.renamed_tokens, found.stop_token_ids) == ({"<|im_end|>": "<|reserved_0|>"}, (1,))
    pads = Extras(added_tokens={"[PAD]": 1}, special_tokens={"pad_token": "[PAD]"})
    assert with_model_tokens(pads, model) == pads  # it is in no prompt
    with pytest.raises(IncompatibleAdapterError, match=r"adds 1 tokens .*'<tool>' \(2\)"):
        check_tokens("new", Extras(added_tokens={"<|im_end|>": 1, "<tool>": 2}), model)


def test_a_new_token_that_only_pads_is_no_reason() -> None:
    """Many adapters were trained with a new "[PAD]"; it is in no prompt and no answer."""
    tokens = {"[PAD]": 6}
    check_tokens("pads", Extras(added_tokens=tokens, special_tokens={"pad_token": "[PAD]"}), {"a": 5})
    for other in (
        Extras(added_tokens=tokens),
        Extras(added_tokens=tokens, special_tokens={"pad_token": "[PAD]", "eos_token": "[PAD]"}),
        Extras(added_tokens=tokens, special_tokens={"pad_token": "[PAD]"}, chat_template="{{ '[PAD]' }}"),
    ):
        with pytest.raises(IncompatibleAdapterError, match="PAD"):
            check_tokens("uses it", other, {"a": 5})


# Rendering


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(
    tokenizer: Any, name: str, conversation: str, add_generation_prompt: bool
) -> None:
    """The model sees what it saw in training, to the last blank; where transformers refuses, so does this."""
    messages, template = CONVERSATIONS[conversation], TEMPLATES[name]

    def ours() -> str:
        return render(
            "chat", template, messages,
            add_generation_prompt=add_generation_prompt, special_tokens=tokenizer.special_tokens_map,
        )  # fmt: skip

    def theirs() -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    if name == "Mistral" and messages[0]["role"] != "user":
        for refused in (ours, theirs):
            with pytest.raises(Exception, match="roles must alternate"):
                refused()
    else:
        assert ours() == theirs()


def test_a_template_knows_the_special_tokens_that_it_is_given_and_no_others() -> None:
    """As with a tokenizer of transformers that has no such token: it is undefined, and writes nothing."""
    template = "{{ bos_token }}|{{ eos_token is defined }}"
    assert render("tokens", template, USER) == "|False"
    assert render("tokens", template, USER, special_tokens={"bos_token": "<s>", "eos_token": ""}) == "<s>|True"
    assert render("tokens", "{{ messages }}", [], special_tokens={"messages": "no"}) == "[]"


def test_messages_may_be_any_mappings_and_lists_of_parts() -> None:
    """Callers pass what OpenAI's clients pass, and their own mappings."""
    parts = ({"type": "text", "text": "a"}, UserDict(type="text", text="ü"))
    messages: Any = (UserDict(role="user", content=parts),)
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert render("parts", template, messages) == "aü"


@pytest.mark.parametrize("content", [b"bytes", object(), {1, 2}, threading])
def test_messages_that_are_not_data_are_a_type_error(content: object) -> None:
    """Nothing but data reaches a template: no object whose methods it could call."""
    with pytest.raises(TypeError, match="texts, numbers, lists and mappings"):
        render("objects", CHATML, [{"role": "user", "content": content}])


def test_messages_that_contain_themselves_or_are_huge_are_refused() -> None:
    """Before they are sent anywhere."""
    messages: list[Any] = []
    messages.append({"role": "user", "content": messages})
    with pytest.raises(TypeError, match="Circular"):
        render("circle", CHATML, messages)
    with pytest.raises(ValueError, match="bytes as JSON"):
        render("huge", CHATML, [{"role": "user", "content": "x" * (1 << 24)}])


def test_a_long_conversation_is_rendered() -> None:
    """The bound on what a template writes grows with what it is given."""
    messages = [{"role": "user", "content": "✨" * 500_000}, {"role": "assistant", "content": "y" * 2_000_000}]
    assert len(render("long", CHATML, messages)) > 2_500_000


def test_what_a_template_says_of_the_messages_reaches_the_caller() -> None:
    """raise_exception is how templates ask for another conversation: the caller's ValueError, not a broken adapter."""
    with pytest.raises(
        ValueError, match="adapter 'strict' cannot write these messages: roles must  alternate"
    ) as caught:
        render("strict", "{{ raise_exception('roles must\n alternate') }}", USER)
    assert not isinstance(caught.value, AdapterError)
    with pytest.raises(ValueError, match="surrogates"):
        render("strict", CHATML, [{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize(
    "template",
    ["{% if", "{{ x | no_such_filter }}", "{% for i in range(9) %}" * 30 + "{% endfor %}" * 30, "{{ " + "9" * 5000 + " }}",
     "", LONG, "\ud800", "{% generation %}"],
    ids=lambda text: ascii(text)[:30],
)  # fmt: skip
def test_a_malformed_template_is_found_when_the_adapter_is_loaded(template: str) -> None:
    """check_template compiles it, and needs no messages."""
    with pytest.raises(CorruptAdapterError, match=r"template|surrogates"):
        check_template("malformed", template)
    with pytest.raises(CorruptAdapterError):
        render("malformed", template, USER)


@pytest.mark.parametrize("name", TEMPLATES)
def test_well_known_templates_pass_the_check(name: str) -> None:
    """A sound template is not refused."""
    check_template("sound", TEMPLATES[name])


# Hostile templates


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fresh processes that allow half a second."""
    own = TemplateProcesses()
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "processes", own)
    yield own
    own.stop()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "loops": ENDLESS,
    "folded": "{{ 'a' * 10**9 }}",
    "set": "{% set x = 'a' * 10**9 %}",
    "digits": "{{ 10 ** (10 ** 9) }}",
    "int power": "{{ (messages|length + 9) ** 999999999 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent filter": "{{ '%01000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "join": "{{ ('a' * 10**5) | join('b' * 10**5) }}",
    "indent": "{{ 'x' | indent(10**9, true) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(90) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "laughs": "{% set n = namespace(a=[1]) %}{% for i in range(90) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "equal": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(90) %}{% set n.a = [n.a, n.a] %}"
             "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% set x = [1] %}{% for i in [x] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "literal": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "capture": "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
    "nested parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "nested lists": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "nested ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long sum": "{{ 1" + "+1" * 30000 + " }}",
    "sort": "{{ (range(99999) | list * 99) | sort | unique | groupby('x') | list }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute": "{{ (messages | attr('__class__')).__mro__ }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "globals": "{{ raise_exception.__globals__.json }}",
    "mutation": "{{ messages.append(messages) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_and_the_server_goes_on(quick: TemplateProcesses, name: str) -> None:
    """In time, with a typed error, without memory of this process, and the next conversation is written."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((UnsafeAdapterError, CorruptAdapterError)) as caught:
        render("hostile", HOSTILE[name], USER)
    assert time.monotonic() - started < 60  # half a second, and a machine that does other things
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert caught.value.adapter == "hostile"
    assert render("sound", CHATML, USER).startswith("<|im_start|>user\n")


def test_an_endless_template_takes_two_seconds() -> None:
    """The documented bound, with the processes as users have them."""
    started = time.monotonic()
    with pytest.raises(UnsafeAdapterError, match=r"took longer than 2\.0 s"):
        render("endless", ENDLESS, USER)
    assert 1.5 < time.monotonic() - started < 60


def test_a_busy_machine_makes_no_template_hostile(quick: TemplateProcesses) -> None:
    """What counts is the processor's time, not the time that passes."""
    with quick.borrow() as process:
        pid = process._popen.pid
    stop, go = (
        threading.Timer(seconds, os.kill, (pid, sent))
        for seconds, sent in [(0.1, signal.SIGSTOP), (1.5, signal.SIGCONT)]
    )
    stop.start()
    go.start()
    try:
        slow = "{% for a in range(3) %}{% for b in range(50000) %}{% endfor %}{% endfor %}"
        assert [render("slow", slow, USER) for _ in range(3)] == [""] * 3
    finally:
        go.join()


def test_an_endless_template_holds_up_nobody_else(quick: TemplateProcesses) -> None:
    """Other adapters' conversations are written in the meantime, in other processes."""
    done: list[float] = []

    def endless() -> None:
        with pytest.raises(UnsafeAdapterError):
            render("endless", ENDLESS, USER)
        done.append(time.monotonic())

    render("sound", CHATML, USER)
    threads = [threading.Thread(target=endless) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        render("sound", CHATML, USER)
    finished = time.monotonic()
    for thread in threads:
        thread.join()
    assert finished < max(done)


def test_many_threads_render_at_once() -> None:
    """chat may be called by any thread: everybody gets their own prompt, from a handful of processes."""
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(20):
            text = f"{number}/{turn}"
            if render("many", "{{ messages[0].content }}", [{"role": "user", "content": text}]) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(chat_template.processes._idle) <= template_process.MAX_PROCESSES


def test_a_process_has_no_secrets_and_can_open_nothing(
    quick: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a template break out of Jinja's sandbox, it finds no tokens, no files, no network and no other program."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    process = TemplateProcess()
    try:
        proc = Path(f"/proc/{process._popen.pid}")
        assert b"hf_secret" not in (proc / "environ").read_bytes()
        limits = (proc / "limits").read_text()
        for line in (
            "Max open files            0",
            "Max processes             0",
            "Max address space         536870912",
        ):
            assert line in limits
    finally:
        process.stop()


def test_what_a_template_leaves_behind_is_thrown_away(
    quick: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled template may hold much memory; its process is replaced before the others' templates run short."""
    render("sound", CHATML, USER)
    pages = int(Path(f"/proc/{quick._idle[0]._popen.pid}/statm").read_text().split()[1])
    monkeypatch.setattr(template_process, "MAX_IDLE_BYTES", pages * resource.getpagesize() + (45 << 20))
    used = set()
    for number in range(12):
        render("greedy", "{% if messages|length > 1 %}{{ 'a' * 10000000 }}{% endif %}" + str(number), USER)
        used.add(quick._idle[0]._popen.pid)
    assert 1 < len(used) < 12


def test_a_process_that_died_while_idle_is_replaced(quick: TemplateProcesses) -> None:
    """The kernel may take it when memory is short: no adapter is to blame."""
    render("sound", CHATML, USER)
    (idle,) = quick._idle
    os.kill(idle._popen.pid, signal.SIGKILL)
    idle._popen.wait()
    assert render("sound", CHATML, USER).startswith("<|im_start|>")


def test_a_process_that_is_interrupted_is_not_used_again(
    quick: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C an answer may still be under way: nobody may get somebody else's prompt."""
    render("sound", CHATML, USER)
    (idle,) = quick._idle

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TemplateProcess, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("sound", CHATML, USER)
    assert idle._popen.returncode is not None
    assert not quick._idle


@pytest.mark.parametrize("body", ["print(5)", "import time; time.sleep(9)", "raise SystemExit(3)"])
def test_a_process_that_is_none_of_ours_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: TemplateProcesses, body: str
) -> None:
    """A broken installation ends in an error that names what is missing, not in a wait without end."""
    (tmp_path / "worker.py").write_text(body)
    monkeypatch.setattr(template_process, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(template_process, "_GRACE_SECONDS", 0.5)
    with pytest.raises(MissingDependencyError, match="pip install"):
        render("sound", CHATML, USER)


@pytest.mark.parametrize(
    "body",
    [
        "os.write(1, b'\\xff\\xff\\xff\\xff' + b'x' * 99)",
        "os.write(1, b'\\0\\0\\0\\0')",
        "os.write(1, b'\\0\\0\\0\\x09abc'); sys.exit()",
        "time.sleep(99)",
        "os.kill(os.getpid(), 11)",
    ],
)
def test_a_process_that_answers_nonsense_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: TemplateProcesses, body: str
) -> None:
    """What comes from a process that an untrusted template ran in is untrusted as well."""
    script = "import os, sys, time\nos.write(1, b'\\0\\0\\0\\x01R')\nos.read(0, 9)\n"
    (tmp_path / "worker.py").write_text(script + body)
    monkeypatch.setattr(template_process, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(template_process, "_GRACE_SECONDS", 1.0)
    with pytest.raises(UnsafeAdapterError, match="its chat template"):
        render("nonsense", CHATML, USER)


def run_script(script: str) -> subprocess.Popen[bytes]:
    prelude = f"import os, sys, time; sys.path[:0] = {sys.path!r}\nfrom qlora_infer.chat.template import *\n"
    return subprocess.Popen([sys.executable, "-c", prelude + script], stdout=subprocess.PIPE)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("template", [CHATML, ENDLESS], ids=["idle", "endless"])
def test_no_process_outlives_a_killed_server(template: str) -> None:
    """Not even in the middle of an endless template."""
    script = f"""
from qlora_infer.chat.template import _request
from qlora_infer.chat.process import TemplateProcess
process = TemplateProcess()
print(process._popen.pid, flush=True)
process.call(_request({template!r}, {{"messages": []}}), max_bytes=99)
time.sleep(60)
"""
    server = run_script(script)
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    assert is_running(pid)
    time.sleep(0.3)
    server.kill()
    server.wait()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_server_ends_without_waiting_and_a_forked_child_renders_on_its_own() -> None:
    """A fork shares pipes with its parent: both would read the other's prompts."""
    script = """
say = lambda text: render("x", "{{ messages[0] }}", [text])
assert say("parent") == "parent"
child = os.fork()
for i in range(50):
    assert say(f"{child}.{i}") == f"{child}.{i}"
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    server = run_script(script)
    assert server.communicate(timeout=60)[0] == b"done\n"
    assert server.returncode == 0
