"""Structured outputs are checked before anything is queued, and answers are parsed, by vLLM's own code; no engine runs."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from attrs import evolve
from chat.families import WEATHER
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import FINISH_REASON_STRINGS
from vllm.v1.structured_output.request import get_structured_output_key

from qlora_infer._vllm.asking import parsers, sampling
from qlora_infer._vllm.asking.parsers import AnswerParser
from qlora_infer._vllm.asking.sampling import SamplingReader
from qlora_infer._vllm.engine import VLLMBackend, _Begun
from qlora_infer.chat.conversation import Conversation
from qlora_infer.errors import RequestRejectedError
from qlora_infer.requests.arguments import STRUCTURE_OPTIONS, STRUCTURES
from qlora_infer.requests.request import GenerationRequest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def reader(renderer):
    return SamplingReader({}, renderer.config, renderer.tokenizer)


@pytest.mark.parametrize(
    "given",
    [{"json": SCHEMA}, {"json": '{"type": "object"}'}, {"regex": "[ab]+"}, {"choice": ["yes", "no"]},
     {"choice": ("yes", "no")}, {"grammar": 'root ::= "yes" | "no"'}, {"json_object": True},
     {"json": SCHEMA, "regex": None, "disable_any_whitespace": True}],
)  # fmt: skip
def test_a_plain_mapping_says_what_an_answer_looks_like(reader, given):
    """Each kind of structure, as JSON and YAML can write it, becomes vLLM's StructuredOutputsParams."""
    made = reader.read({"structured_outputs": given}, {})
    assert isinstance(made.structured_outputs, StructuredOutputsParams)
    assert made.structured_outputs._backend is not None


def test_the_fields_are_vllms():
    """vLLM's class has these fields, and no other that users set."""
    fields = {name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    assert fields == {*STRUCTURES, *STRUCTURE_OPTIONS}


def test_an_option_that_vllm_ignores_in_a_request_is_logged_once(reader, caplog):
    """vLLM compiles the same with and without it; where the engine has the option, nothing is logged."""
    options = {"disable_any_whitespace": True, "disable_additional_properties": True, "whitespace_pattern": " ?"}
    assert {*options} == {*STRUCTURE_OPTIONS}
    bare = get_structured_output_key(StructuredOutputsParams(json=SCHEMA))
    assert get_structured_output_key(StructuredOutputsParams(json=SCHEMA, **options)) == bare
    sampling._warn_of_ignored.cache_clear()
    for _ in range(2):
        reader.read({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, {})
    (record,) = caplog.records
    assert "ignores a request's disable_any_whitespace" in record.getMessage()
    sampling._warn_of_ignored.cache_clear()
    of_engine = StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True)
    config = SimpleNamespace(model_config=reader.vllm_config.model_config, structured_outputs_config=of_engine)
    made = evolve(reader, vllm_config=config).read({"structured_outputs": {"json": SCHEMA, **options}}, {})
    assert made.structured_outputs._backend == "guidance"
    assert [record.args for record in caplog.records[1:]] == [(name,) for name in STRUCTURE_OPTIONS[1:]]


@pytest.mark.parametrize(
    "given",
    [{"json": {"type": "nothing"}}, {"json": "{"}, {"regex": "(("}, {"regex": "a(?=b)"}, {"choice": []},
     {"grammar": "root ::= undefined"}, {"grammar": " "}, {"json_object": False}],
)  # fmt: skip
@pytest.mark.parametrize("form", [dict, lambda given: StructuredOutputsParams(**given)])
def test_an_impossible_structure_is_an_error_before_anything_is_queued(reader, given, form):
    """The error is one of the arguments, and vLLM's reason stands in it."""
    with pytest.raises(ValueError, match=r"sampling_params: structured_outputs: ."):
        reader.read(
            SamplingParams(structured_outputs=form(given)) if form is not dict else {"structured_outputs": given}, {}
        )


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"guided_json": SCHEMA}, TypeError, r'"structured_outputs": \{"json": …\}'),
        ({"guided_choice": ["a"]}, TypeError, r'"structured_outputs": \{"choice": …\}'),
        ({"guided_decoding": {}}, TypeError, "structured_outputs"),
        ({"response_format": {}}, TypeError, "structured_outputs"),
        ({"max_new_tokens": 3}, TypeError, "'max_tokens'"),
        ({"temprature": 3}, TypeError, "did you mean 'temperature'"),
        ({"structured_outputs": SCHEMA}, TypeError, "'type'.*json, regex"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, ValueError, "one of json, regex"),
        ({"structured_outputs": {}}, ValueError, "one of json, regex"),
        ({"structured_outputs": "json"}, TypeError, "a mapping such as"),
    ],
)
def test_old_and_wrong_names_are_told_the_right_one(reader, given, error, words):
    """Names of older versions and other libraries are errors with what to write."""
    with pytest.raises(error, match=words):
        reader.read(given, {})


def test_a_request_that_vllm_ends_with_an_error_fails():
    """The core ends a request whose grammar it cannot compile after all; that is an error and no empty answer."""
    backend = VLLMBackend()
    backend._requests["0"] = _Begun(GenerationRequest("0", "hi", None))
    ended = SimpleNamespace(
        request_id="0", finished=True, prompt_token_ids=[1], outputs=[SimpleNamespace(index=0, finish_reason="error")]
    )
    output = backend._output(ended)
    assert isinstance(output.error, RequestRejectedError)
    assert "structured_outputs" in str(output.error)
    assert backend._requests == {}
    assert "error" in FINISH_REASON_STRINGS


# Parsers

TOOLS = Conversation.of([{"role": "user", "content": "hi"}], tools=[WEATHER])
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def parser_of(renderer, *, reasoning="", tools=None):
    config = VllmConfig(model_config=renderer.model_config)
    config.structured_outputs_config.reasoning_parser = reasoning
    return AnswerParser.of(config, renderer.tokenizer, tools)


TALK = Conversation.of([{"role": "user", "content": "hi"}])


def parse(parser, text, conversation=TALK):
    return parser.parse(text, parser.tokenizer.encode(text, add_special_tokens=False), [1], conversation)


def test_thoughts_are_found(renderer):
    """What stands between the marks is reasoning, and the rest is content."""
    parsed = parse(parser_of(renderer, reasoning="deepseek_r1"), THOUGHT + "It rains.")
    assert (parsed.reasoning.strip(), parsed.content.strip(), parsed.tool_calls) == ("Let me see.", "It rains.", ())


def test_calls_of_tools_are_found(renderer):
    """A call has its name, its arguments as text and as values, and an id; without tools, nothing is looked for."""
    parser = parser_of(renderer, tools="hermes")
    parsed = parse(parser, "Well. " + CALL, TOOLS)
    (call,) = parsed.tool_calls
    assert (call.name, call.arguments) == ("weather", {"city": "Köln"})
    assert call.id
    assert call.to_message()["function"] == {"name": "weather", "arguments": call.text}
    assert parsed.content.strip() == "Well."
    assert parse(parser, CALL).tool_calls == ()


def test_thoughts_and_calls_of_one_answer_are_found(renderer):
    """Both parsers work on one answer."""
    parsed = parse(parser_of(renderer, reasoning="deepseek_r1", tools="hermes"), THOUGHT + CALL, TOOLS)
    assert parsed.reasoning.strip() == "Let me see."
    assert [call.name for call in parsed.tool_calls] == ["weather"]


def test_an_answer_that_is_no_call_is_content(renderer):
    """Half a call, and text, stay as they are."""
    parser = parser_of(renderer, tools="hermes")
    for text in ("It rains.", "<tool_call>\n{not json}\n</tool_call>"):
        assert parse(parser, text, TOOLS).tool_calls == ()


def test_without_names_there_is_no_parser(renderer):
    """An engine without parsers spends no time on it."""
    assert parser_of(renderer) is None


def test_an_unknown_parser_is_an_error_with_the_names():
    """The error has the nearest name and all of them."""
    with pytest.raises(ValueError, match="no tool_call_parser 'hermess': did you mean 'hermes'"):
        parsers.check_names(None, "hermess")
    with pytest.raises(ValueError, match=r"no reasoning_parser 'x'.*qwen3"):
        parsers.check_names("x", None)
