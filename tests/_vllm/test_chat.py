"""The prompt of a chat is the one that ``vllm.LLM.chat`` has for the same conversation, whoever renders it."""

import json
from types import SimpleNamespace

import pytest
from chat.families import CONVERSATIONS, READ_PARTS, TEMPLATES, WEATHER

from qlora_infer.chat import worker
from qlora_infer.chat.conversation import Conversation
from qlora_infer.chat.template import content_format
from qlora_infer.files.extras import Extras
from qlora_infer.requests.client import Client
from qlora_infer.requests.request import GenerationRequest

pytest.importorskip("vllm")

from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.exceptions import VLLMValidationError
from vllm.renderers import hf

from qlora_infer._vllm.asking import chat
from qlora_infer._vllm.engine import VLLMBackend

REFUSED = "refused"


def backend_of(renderer):
    backend = VLLMBackend()
    backend._renderer, backend._tokenizer = renderer, renderer.tokenizer
    backend._engine = SimpleNamespace(renderer=renderer, model_config=renderer.model_config)
    return backend


def our_tokens(renderer, arguments, *, own_template=None):
    """The tokens that a request of ours has, with the model's template or an adapter's own."""
    backend = backend_of(renderer)
    version = SimpleNamespace(name="own", extras=Extras(chat_template=own_template)) if own_template else None
    client = Client(backend, None, None, None, model="tiny")
    try:
        written = client._write(Conversation.of(**arguments), version)
    except ValueError:
        return REFUSED
    request = GenerationRequest("0", written.prompt, None, add_special_tokens=False, media=written.media)
    return backend._render(request)["prompt_token_ids"]


def vllms_tokens(renderer, arguments, template):
    """The tokens that ``vllm.LLM.chat`` hands to its engine."""
    llm = SimpleNamespace(renderer=renderer, model_config=renderer.model_config, chat_template=None)
    arguments = json.loads(json.dumps(arguments))  # vLLM writes in them
    try:
        (made,) = OfflineInferenceMixin._preprocess_chat(
            llm, [arguments.pop("messages")], chat_template=template, **arguments
        )
    except (ValueError, VLLMValidationError):
        return REFUSED
    return made["prompt_token_ids"]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_are_vllms(renderer, family, conversation):
    """An adapter's template, rendered in a process of its own, and the model's write what vLLM's own chat does."""
    arguments, template = CONVERSATIONS[conversation], TEMPLATES[family]
    before = json.dumps(arguments)
    expected = vllms_tokens(renderer, arguments, template)
    assert our_tokens(renderer, arguments, own_template=template) == expected
    renderer.tokenizer.chat_template = template
    hf._CONTENT_FORMATS.clear()
    assert our_tokens(renderer, arguments) == expected
    assert json.dumps(arguments) == before  # vLLM's parser writes in what it is given


def test_most_prompts_are_written(renderer):
    """The comparison is no comparison of refusals: most templates write most conversations."""
    refused = {
        (family, name)
        for family, template in TEMPLATES.items()
        for name, arguments in CONVERSATIONS.items()
        if vllms_tokens(renderer, arguments, template) == REFUSED
    }
    assert len(refused) < 0.2 * len(TEMPLATES) * len(CONVERSATIONS), sorted(refused)


@pytest.mark.parametrize("family", TEMPLATES)
def test_content_formats_are_vllms(family):
    """Templates that go through the parts of a content get parts, the others text, as vLLM decides it."""
    ours = content_format("any", TEMPLATES[family])
    assert ours == hf._detect_content_format(TEMPLATES[family], default="string")
    assert (ours == "openai") == (family in READ_PARTS)


@pytest.mark.parametrize(
    "template",
    [
        "{% set a = messages %}{% set b = a[1:] %}{% for m in b %}{% for p in m.content %}{% endfor %}{% endfor %}",
        "{% set a = messages %}{% for m in a | list %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for a, b in m.content %}{% endfor %}{% endfor %}",
        "{% for a, b in messages %}{% endfor %}{% for p in content %}{% endfor %}",
        "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
        "{% macro f(x) %}{% for p in content %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(1) }}{% endfor %}",
        "{% macro f(x, y) %}{% for p in y %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(1, y=m.content) }}{% endfor %}",
        "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content.text) }}{% endfor %}",
        "{% for m in messages if m.content is string %}{% for p in m.content[0:2] %}{% endfor %}{% endfor %}",
        "{% for m in other %}{% for p in m.content %}{% endfor %}{% endfor %}",
        "{% generation %}{% for p in content %}{% break %}{% endfor %}{% endgeneration %}",
        "{% for",
    ],
)
def test_loops_are_found_as_vllm_finds_them(template):
    """Assignments, filters, slices, macros and loops that vLLM does not follow lead to the same format."""
    assert worker._content_format(template).decode() == hf._detect_content_format(template, default="string")


def test_variables_in_a_circle_end():
    """vLLM's own search for loops goes on for ever here, in the process of the server."""
    template = (
        "{% set a = messages %}{% set messages = a %}{% for m in a %}{% for p in m.content %}{% endfor %}{% endfor %}"
    )
    assert content_format("any", template) == "openai"


def test_text_that_has_a_bos_is_warned_of(renderer, caplog):
    """Two BOS tokens are reported once, and add_special_tokens=False leaves one."""
    backend = backend_of(renderer)
    bos = renderer.tokenizer.bos_token_id
    for _ in range(2):
        assert backend._render(GenerationRequest("0", "<s>hi", None))["prompt_token_ids"][:2] == [bos, bos]
    (record,) = caplog.records
    assert "add_special_tokens=False" in record.getMessage()
    once = backend._render(GenerationRequest("0", "<s>hi", None, add_special_tokens=False))["prompt_token_ids"]
    assert once == backend._render(GenerationRequest("0", "hi", None))["prompt_token_ids"]
    assert len(caplog.records) == 1


def test_all_parts_of_vllms_are_known():
    """A part that may hold an address, and that the check does not know, would be fetched."""
    from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

    known = {*chat._ADDRESSES, *chat._MEDIA, *TEXT_PART_TYPES}
    assert set(MM_PARSER_MAP) - known == {
        "input_image",
        "prompt_embeds",
        "tool_reference",
    }  # the first has an image_url


@pytest.mark.parametrize(
    "part", [{"image_url": "data:image/png;base64,AA"}, {"type": "input_audio", "input_audio": {}}]
)
def test_a_model_that_reads_text_only_says_so(renderer, part):
    """An image or a sound for it is an error with its name, for the model's template and for an adapter's."""
    backend = backend_of(renderer)
    conversation = Conversation.of([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="reads text only: it cannot be given a"):
        backend.render_chat(conversation)
    with pytest.raises(ValueError, match="reads text only"):
        backend.parse_chat(conversation, TEMPLATES["Qwen-VL"], "openai")


@pytest.mark.parametrize("url", ["http://host/a.png", "HTTPS://host/a.png", " http://host/a.png", "ftp://host/a.png"])
@pytest.mark.parametrize(
    "part",
    [
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda url: {"image_url": url},
        lambda url: {"type": "video_url", "video_url": url},
    ],
)
def test_nothing_is_downloaded(renderer, url, part):
    """A message that names an address is refused before anything is fetched, unless hosts are allowed."""
    backend = backend_of(renderer)
    conversation = Conversation.of([{"role": "user", "content": [part(url)]}])
    with pytest.raises(ValueError, match=r"would be downloaded.*allowed_media_domains"):
        backend.render_chat(conversation)
    with pytest.raises(ValueError, match="would be downloaded"):
        backend.parse_chat(conversation, TEMPLATES["Qwen-VL"], "openai")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"messages": [{"content": "hi"}]}, ValueError, "role"),
        ({"messages": "hi"}, TypeError, "a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [print]}, TypeError, "get_json_schema"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": WEATHER}, TypeError, "a list of mappings"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": ["x"]}, TypeError, "a mapping"),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": []}},
            ValueError,
            "its own",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "x"}},
            ValueError,
            "the adapter's",
        ),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "add_generation_prompt": True,
                "continue_final_message": True,
            },
            ValueError,
            "add_generation_prompt=False",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(arguments, error, words):
    """A wrong argument is named, with what was expected."""
    with pytest.raises(error, match=words):
        Conversation.of(**arguments)
