"""Conversations are asked with tools and variables, in every way to ask; the fake engine needs no vLLM for it."""

import json

import pytest

from qlora_infer import GenerationOutput, RequestRejectedError
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

#: What it gets, one after another.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    "{{ tools | tojson }};{{ mood }};{% if add_generation_prompt %}answer:{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather"}}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine(tmp_path):
    """An engine with an adapter that carries a template, whose answers are its prompts."""
    folder = write_adapter(tmp_path / "own")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with fake_engine(backend=FakeEngine(reply=lambda prompt, adapter: prompt), adapters={"own": folder}) as engine:
        yield engine


def test_a_template_gets_tools_and_variables(engine):
    """Tools and further variables reach an adapter's template under their names."""
    (output,) = engine.chat(HI, adapter="own", tools=[TOOL], chat_template_kwargs={"mood": "calm"}, use_tqdm=False)
    assert output.prompt == f"user=hi;{json.dumps([TOOL])};calm;answer:"


def test_an_answer_goes_on_where_the_last_message_ends(engine):
    """continue_final_message leaves out what the template writes after the last message."""
    begun = [*HI, {"role": "assistant", "content": "It is "}]
    (output,) = engine.chat(begun, adapter="own", continue_final_message=True, use_tqdm=False)
    assert output.prompt == "user=hi;assistant=It is "
    with pytest.raises(ValueError, match="a last message with text"):
        engine.chat([*HI, {"role": "assistant", "content": None}], adapter="own", continue_final_message=True)


def test_a_generation_prompt_can_be_left_out(engine):
    """add_generation_prompt=False ends the prompt with the messages."""
    (output,) = engine.chat(HI, adapter="own", add_generation_prompt=False, use_tqdm=False)
    assert output.prompt == "user=hi;null;;"


def test_a_mapping_holds_a_conversation_with_its_arguments(engine):
    """add_request, stream and generate_iter take chat's arguments beside the messages, each prompt its own."""
    asked = {"messages": HI, "chat_template_kwargs": {"mood": "calm"}, "add_generation_prompt": False}
    expected = "user=hi;null;calm;"
    assert engine.add_request(asked, adapter="own").result().prompt == expected
    assert [part.prompt for part in engine.stream(asked, adapter="own")][-1] == expected
    outputs = engine.generate_iter([asked, HI], adapter="own", use_tqdm=False)
    assert [output.prompt for output in outputs] == [expected, "user=hi;null;;answer:"]


def test_a_mapping_holds_text_or_tokens(engine):
    """vLLM's own mappings are prompts."""
    outputs = engine.generate([{"prompt": "hi", "messages": None}, {"prompt_token_ids": [1, 2]}], use_tqdm=False)
    assert [output.prompt for output in outputs] == ["hi", None]
    assert outputs[1].prompt_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"text": "hi"}, "'prompt' or 'prompt_token_ids'"),
        ({"prompt": "hi", "image": 1}, "multi_modal_data"),
        ({"prompt": 3}, "a string"),
        ({"messages": HI, "temperature": 0.0}, "'messages' and tools"),
        ({"messages": "hi"}, "a list of messages"),
        ([*HI], "engine.chat takes"),
    ],
)
def test_what_is_no_prompt_is_refused(engine, prompt, words):
    """The error has the fields that there are."""
    with pytest.raises(TypeError, match=words):
        engine.generate(prompt, use_tqdm=False)


def test_parts_are_text_for_a_template_that_reads_text(engine):
    """A list of text parts is no list in the prompt."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    for adapter in ("own", None):
        (output,) = engine.chat(parts, adapter=adapter, use_tqdm=False)
        assert "a\nb" in output.prompt
        assert "[" not in output.prompt


def test_a_request_that_the_engine_fails_is_an_error_of_its_own():
    """What the engine underneath ends with an error raises it, and the others and the next are answered."""

    class Picky(FakeEngine):
        def _output(self, entry):
            if entry.request.prompt == "bad":
                return GenerationOutput.failed(entry.request, RequestRejectedError("not this one"))
            return super()._output(entry)

    with fake_engine(backend=Picky()) as engine:
        outputs = list(engine.generate_iter(["bad one", "bad", "good"], on_error="return", use_tqdm=False))
        assert [str(output.error) for output in outputs] == ["None", "not this one", "None"]
        with pytest.raises(RequestRejectedError, match="not this one"):
            engine.generate(["bad", "good"], use_tqdm=False)
        assert engine.generate("good", use_tqdm=False)[0].text == "You said: good"
        assert engine.stats().num_running == 0


def test_outputs_are_plain_values():
    """to_dict is what JSON takes, with log-probabilities as numbers, for answers and for errors."""
    with fake_engine() as engine:
        (output,) = engine.generate("one two", {"logprobs": 0, "n": 2}, use_tqdm=False)
        plain = json.loads(json.dumps(output.to_dict()))
        assert (plain["num_prompt_tokens"], plain["num_tokens"], plain["adapter"]) == (2, 8, None)
        assert [each["token_logprobs"] for each in plain["completions"]] == [[0.0] * 4] * 2
        assert (output.content, output.reasoning, output.tool_calls) == (output.text, None, ())
        (failed,) = engine.generate_iter([["no"]], on_error="return", use_tqdm=False)
        assert json.loads(json.dumps(failed.to_dict()))["error_type"] == "TypeError"


def test_parsers_are_named_for_the_engine():
    """vLLM gets the reasoning parser as its own argument, and the plan keeps the parser of calls; each has one place."""
    backend = FakeEngine()
    with fake_engine(backend=backend, reasoning_parser="qwen3", tool_call_parser="hermes") as engine:
        assert backend.engine_args["reasoning_parser"] == "qwen3"
        assert engine.plan.tool_call_parser == "hermes"
    with pytest.raises(ValueError, match="set by reasoning_parser="):
        fake_engine(engine_args={"reasoning_parser": "qwen3"})


def test_structures_are_checked_by_the_fake_engine_too():
    """A test of one's own sees the error that vLLM would give for a field that there is not."""
    with fake_engine() as engine:
        assert engine.generate("hi", {"structured_outputs": {"choice": ["a"]}}, use_tqdm=False)[0].text
        with pytest.raises(TypeError, match="'type'"):
            engine.generate("hi", {"structured_outputs": {"type": "object"}}, use_tqdm=False)
        with pytest.raises(TypeError, match=r'"structured_outputs": {"json": …}'):
            engine.generate("hi", {"guided_json": {}}, use_tqdm=False)
