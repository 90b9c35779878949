"""Chats of gpt-oss, which vLLM's server writes and reads in OpenAI's Harmony format, on the fake engine."""

import json

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import openai
from served import CONFIG, HELLO, TEMPLATE, ByteEngine, client, served, write_model

HARMONY = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "<|start|>assistant"
)


class HarmonyEngine(ByteEngine):
    """The fake engine with the tokens of gpt-oss."""

    encoding = None

    def _encode(self, text):
        return tuple(self.encoding.encode(text, allowed_special="all"))

    def _decode(self, token_ids):
        return self.encoding.decode(list(token_ids))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """vLLM's configuration of a tiny gpt-oss; skips where the format's tokens cannot be downloaded."""
    from openai_harmony import HarmonyError, load_harmony_encoding
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        HarmonyEngine.encoding = load_harmony_encoding("HarmonyGptOss")
    except HarmonyError as error:
        pytest.skip(f"the tokens of Harmony cannot be downloaded here: {error}")
    folder = write_model(tmp_path_factory.mktemp("model") / "gpt-oss")
    sizes = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 201_088}
    config = {**CONFIG, **sizes, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = EngineArgs(model=str(folder), max_num_seqs=8)
    HarmonyEngine.vllm_config = arguments.create_engine_config(UsageContext.LLM_CLASS)


def test_a_template_in_another_format_than_harmony_is_an_error_in_chats(tmp_path, gpt_oss):
    """An adapter with Harmony's template, or none, is chatted with in Harmony; one with another gets no silent mixture."""
    for name in ("plain", "harmony", "chatml"):
        (tmp_path / name).mkdir()
    (tmp_path / "harmony" / "chat_template.jinja").write_text(HARMONY)
    (tmp_path / "chatml" / "chat_template.jinja").write_text(TEMPLATE)
    backend = HarmonyEngine(reply=lambda prompt, adapter: f"<|channel|>final<|message|>{adapter} says ahoy")
    with served(tmp_path, backend=backend, adapters=("plain", "harmony", "chatml")) as (url, _), client(url) as ai:
        for name in ("plain", "harmony"):
            reply = ai.chat.completions.create(model=name, messages=HELLO)
            assert reply.choices[0].message.content == f"{name} says ahoy"
            assert ai.responses.create(model=name, input="ahoy").output_text == f"{name} says ahoy"
        for ask in (
            lambda: ai.chat.completions.create(model="chatml", messages=HELLO),
            lambda: ai.chat.completions.create(model="chatml", messages=HELLO, stream=True),
            lambda: ai.responses.create(model="chatml", input="ahoy"),
        ):
            with pytest.raises(openai.BadRequestError, match="'chatml' has a chat template that is not Harmony's"):
                ask()
        assert ai.completions.create(model="chatml", prompt="ahoy").usage.prompt_tokens == 4
