"""An adapter's own template, defaults and tokens are followed by its requests and by no others; on the fake engine."""

import json

import pytest

from qlora_infer import CorruptAdapterError, IncompatibleAdapterError, UnsafeAdapterError
from qlora_infer.files.extras import Extras
from qlora_infer.testing import FakeEngine, FakeSamplingParams, fake_engine, write_adapter

LOUD = "{% for message in messages %}{{ message['content'] | upper }}!{% endfor %}"
QUIET = "{% for message in messages %}{{ message['content'] | lower }}.{% endfor %}"
HELLO = [{"role": "user", "content": "Hello You"}]


class Echo(FakeEngine):
    """Says the prompt back, knows four tokens, and keeps the parameters that it was given."""

    def __init__(self):
        super().__init__(reply=lambda prompt, adapter: prompt)
        self.params = []

    def vocabulary(self):
        return {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3}

    def sampling_params(self, params, extras=None):
        self.params.append((params, extras))
        return super().sampling_params(params, extras)


@pytest.fixture
def backend():
    return Echo()


@pytest.fixture
def engine(backend):
    with fake_engine(backend=backend) as engine:
        yield engine


def carrying(folder, *, template=None, generation=None, tokens=None, seed=0):
    """An adapter with these files beside its weights."""
    write_adapter(folder, seed=seed)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokens is not None:
        (folder / "added_tokens.json").write_text(json.dumps(tokens))
    return folder


def test_a_conversation_is_written_with_its_adapter_s_template(engine, tmp_path):
    """Each conversation with the template of its own adapter; those without one, and the base, with the model's."""
    loaded = engine.load_adapter("loud", carrying(tmp_path / "loud", template=LOUD))
    engine.load_adapter("quiet", carrying(tmp_path / "quiet", template=QUIET, seed=1))
    engine.load_adapter("plain", carrying(tmp_path / "plain", seed=2))
    assert loaded.carries == ("chat_template.jinja",)
    outputs = engine.chat([HELLO] * 4, {"max_tokens": 9}, adapter=["loud", "quiet", "plain", None], use_tqdm=False)
    assert [output.text for output in outputs] == ["HELLO YOU!", "hello you.", "user: Hello You", "user: Hello You"]
    assert engine.generate("Hello You", adapter="loud")[0].text == "Hello You"


def test_a_request_may_be_a_conversation(engine, tmp_path):
    """add_request and stream write a conversation as chat does; what the template refuses is told at once."""
    engine.load_adapter("loud", carrying(tmp_path / "loud", template=LOUD))
    engine.load_adapter("strict", carrying(tmp_path / "strict", template="{{ raise_exception('no') }}", seed=1))
    for adapter in ("loud", None):
        (expected,) = engine.chat(HELLO, adapter=adapter, use_tqdm=False)
        handle = engine.add_request(HELLO, adapter=adapter)
        assert (handle.result(10).prompt, handle.result(10).text) == (expected.prompt, expected.text)
        assert [part.text for part in engine.stream(HELLO, adapter=adapter)][-1] == expected.text
        assert handle._pending.request.add_special_tokens is False
    with pytest.raises(ValueError, match="no"):
        engine.add_request(HELLO, adapter="strict")
    assert engine._registry.current("strict").num_uses == 0


def test_a_template_belongs_to_its_version(engine, tmp_path):
    """The same weights with another template are another version, named exactly and rolled back like any other."""
    first = engine.load_adapter("a", carrying(tmp_path / "1", template=LOUD))
    second = engine.load_adapter("a", carrying(tmp_path / "2", template=QUIET))
    assert first.digest != second.digest

    def says(adapter):
        return engine.chat(HELLO, adapter=adapter)[0].text

    assert (says("a"), says("a@1")) == ("hello you.", "HELLO YOU!")
    engine.rollback_adapter("a")
    assert says("a") == "HELLO YOU!"


def test_defaults_are_the_adapter_s_and_the_caller_wins(engine, tmp_path):
    """generation_config.json sets what a mapping leaves out; SamplingParams are taken as they are."""
    engine.load_adapter("short", carrying(tmp_path / "short", generation={"max_new_tokens": 2}))
    prompt = "one two three four"

    def says(params, adapter="short"):
        return engine.generate(prompt, params, adapter=adapter)[0].text

    assert says(None) == says({}) == says({"n": 1}) == "one two"
    assert says({"max_tokens": 3}) == "one two three"
    assert says(FakeSamplingParams(max_tokens=3)) == "one two three"
    assert says(None, adapter=None) == prompt
    assert list(engine.stream(prompt, adapter="short"))[-1].text == "one two"
    assert [output.text for output in engine.generate_iter([prompt], adapter="short")] == ["one two"]
    texts = [output.text for output in engine.generate([prompt] * 2, adapter=["short", None])]
    assert texts == ["one two", prompt]


def test_vllm_gets_the_caller_s_values_then_the_adapter_s_then_the_model_s():
    """In vLLM's SamplingParams each field is from whoever sets it first; a SamplingParams only gains stop tokens."""
    vllm = pytest.importorskip("vllm")
    from qlora_infer._vllm.asking.sampling import SamplingReader
    from qlora_infer._vllm.engine import VLLMBackend

    backend = VLLMBackend()
    backend._sampling = SamplingReader({"temperature": 0.6, "top_p": 0.9, "top_k": 7})
    extras = Extras(sampling_defaults={"temperature": 0.2, "top_p": 0.8}, stop_token_ids=(5,))

    def fields(params, extras=None):
        made = backend.sampling_params(params, extras)
        return made.temperature, made.top_p, made.top_k, made.stop_token_ids

    assert fields(None) == fields({}) == (0.6, 0.9, 7, [])
    assert fields(None, extras) == (0.2, 0.8, 7, [5])
    assert fields({"temperature": 0.0}, extras)[::3] == (0.0, [5])
    assert fields({"top_k": 3, "stop_token_ids": [9]}, extras)[:3] == (0.2, 0.8, 3)
    given = vllm.SamplingParams(temperature=1.5)
    assert fields(given, extras) == (1.5, 1.0, 0, [5])
    assert given.stop_token_ids == []
    assert backend.sampling_params({"ignore_eos": True}, extras).stop_token_ids == []


def test_stop_tokens_reach_the_engine_underneath(engine, backend, tmp_path):
    """The ids of eos_token_id are given with each request of the adapter, whatever its parameters, and no other."""
    engine.load_adapter("stops", carrying(tmp_path / "stops", generation={"eos_token_id": [1, 3]}))
    backend.params.clear()
    engine.generate(["x"] * 2, [None, FakeSamplingParams()], adapter="stops")
    engine.generate("x")
    assert [extras.stop_token_ids if extras else None for _, extras in backend.params] == [(1, 3), (1, 3), None]


def test_the_end_token_of_its_tokenizer_ends_its_answers(engine, backend, tmp_path):
    """eos_token of tokenizer_config.json counts as a stop token, if the model has it."""
    folder = carrying(tmp_path / "chat", generation={"eos_token_id": 3})
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    engine.load_adapter("chat", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<other>"}))
    engine.load_adapter("other", folder)
    backend.params.clear()
    engine.generate(["x"] * 2, adapter=["chat", "other"])
    assert [extras.stop_token_ids for _, extras in backend.params] == [(3, 1), (3,)]


def test_what_stands_beside_a_pickle_is_kept(engine, tmp_path):
    """An adapter that is converted from a pickle keeps its template."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    from safetensors.torch import load_file

    folder = carrying(tmp_path / "old", template=LOUD)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    engine.load_adapter("old", folder, allow_pickle=True)
    assert engine.chat(HELLO, adapter="old")[0].text == "HELLO YOU!"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"tokens": {"<tool>": 4}}, IncompatibleAdapterError, "'<tool>' \\(4\\)"),
        ({"tokens": {"a": 7}}, IncompatibleAdapterError, "other ids than the model's for 1 tokens"),
        ({"generation": {"eos_token_id": 99}}, IncompatibleAdapterError, "stops at the token ids 99"),
        ({"generation": {"temperature": "hot"}}, CorruptAdapterError, "temperature"),
        ({"template": "{% for %}"}, CorruptAdapterError, "malformed"),
    ],
)
def test_with_strict_what_cannot_be_followed_is_refused_when_it_is_loaded(engine, tmp_path, files, error, message):
    """Tokens that the base lacks, and nonsense: a typed error, and what serves goes on serving."""
    engine.load_adapter("a", carrying(tmp_path / "good", template=LOUD, tokens={"a": 3, "</s>": 1}), strict=True)
    before = engine.adapters
    with pytest.raises(error, match=message):
        engine.load_adapter("a", carrying(tmp_path / "bad", seed=1, **files), strict=True)
    assert engine.adapters == before
    assert engine.chat(HELLO, adapter="a")[0].text == "HELLO YOU!"


@pytest.mark.parametrize("tokens", [{"<tool>": 4}, {"a": 7}])
def test_new_and_moved_tokens_are_refused_without_strict_too(engine, tmp_path, tokens):
    """Its weights were trained with other embeddings than the model's: left out, they would change its answers."""
    with pytest.raises(IncompatibleAdapterError, match="tokens"):
        engine.load_adapter("a", carrying(tmp_path / "a", tokens=tokens))


INVALID = {
    "hot": ("generation_config.json", {"temperature": 2.5}, "'temperature' must be a number from 0 to 2, got 2.5"),
    "top_p": ("generation_config.json", {"top_p": 0.0}, "'top_p' must be a number above 0 and at most 1, got 0.0"),
    "stop": ("generation_config.json", {"eos_token_id": -1}, "'eos_token_id' must be a token's id"),
    "beyond": ("generation_config.json", {"eos_token_id": 99}, "stops at the token ids 99; the model's end at 3"),
    "empty": ("tokenizer_config.json", {"chat_template": ""}, "its chat template is empty"),
    "parse": ("tokenizer_config.json", {"chat_template": "{% for %}"}, "its chat template is malformed"),
    "jinja": ("chat_template.jinja", "{{ x | no_such_filter }}", "its chat template is malformed"),
    "list": ("tokenizer_config.json", "[]", "it must hold a JSON object, not a list"),
    "cut": ("tokenizer.json", '{"added_tokens": [', "it is no whole JSON object"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_file_beside_the_weights_is_left_out_with_a_warning(engine, tmp_path, caplog, kind):
    """PEFT reads none of them: the adapter is served as if the file were not there, and the log has file and reason."""
    name, content, reason = INVALID[kind]
    folder = carrying(tmp_path / "a")
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with caplog.at_level("WARNING", logger="qlora_infer"):
        loaded = engine.load_adapter("a", folder)
    (record,) = caplog.records
    for words in ("adapter 'a'", name, reason, "strict=True"):
        assert words in record.getMessage()
    assert str(tmp_path) not in record.getMessage()
    assert (name in loaded.carries) == (" of " in record.getMessage().partition(":")[0])
    assert [output.text for output in engine.chat([HELLO] * 2, adapter=["a", None], use_tqdm=False)] == [
        "user: Hello You"
    ] * 2
    assert engine.generate("one two", {"max_tokens": 1}, adapter="a")[0].text == "one"
    with pytest.raises((CorruptAdapterError, IncompatibleAdapterError), match=name):  # also of the same content
        engine.load_adapter("a", folder, strict=True)
    assert engine.adapters["a"] == loaded


def test_another_name_for_a_token_of_the_model_is_a_warning(engine, backend, tmp_path, caplog):
    """The token has an embedding in the model; prompts need the model's name for it, and as eos_token it ends answers."""
    folder = carrying(tmp_path / "a", tokens={"<|im_end|>": 3})
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with caplog.at_level("WARNING", logger="qlora_infer"):
        engine.load_adapter("a", folder, strict=True)
    (record,) = caplog.records
    assert "adapter 'a' has the name '<|im_end|>' for the model's token 'a'" in record.getMessage()
    backend.params.clear()
    engine.generate("x", adapter="a")
    assert [extras.stop_token_ids for _, extras in backend.params] == [(3,)]


def test_a_template_that_refuses_the_messages_queues_nothing(engine, tmp_path):
    """What one conversation lacks is told before the first of the list is queued."""
    strict = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}ok"
    engine.load_adapter("strict", carrying(tmp_path / "strict", template=strict))
    with pytest.raises(ValueError, match="one at a time"):
        engine.chat([HELLO, HELLO * 2], adapter="strict")
    assert engine.stats().num_waiting == engine.stats().num_running == 0
    assert engine.chat(HELLO, adapter="strict")[0].text == "ok"
    engine.unload_adapter("strict")
    assert not engine.adapters


def test_a_hostile_template_harms_nobody(engine, tmp_path):
    """One that would fill the memory or never end is stopped; its conversation fails, and the others are answered."""
    engine.load_adapter("good", carrying(tmp_path / "good", template=LOUD))
    for name, template in (("large", "{{ 'a' * 10 ** 10 }}"), ("endless", "{% for i in range(10**9) %}{% endfor %}")):
        engine.load_adapter(name, carrying(tmp_path / name, template=template))
        with pytest.raises(UnsafeAdapterError):
            engine.chat(HELLO, adapter=name)
    assert engine.chat(HELLO, adapter="good")[0].text == "HELLO YOU!"
