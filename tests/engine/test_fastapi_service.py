"""The example service on the real vLLM, spoken to by OpenAI's own client."""

import httpx
import openai
import pytest
from test_fastapi_service import ADMIN, KEY, running, wait_until

from engine.conftest import unload_others
from qlora_infer.demo import demo_adapters

GREEDY = {"temperature": 0.0, "max_tokens": 24}
PROMPT = "my name is"
HELLO = [{"role": "user", "content": PROMPT}]


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


def test_the_service_answers_as_the_engine_does(awq, monkeypatch):
    """Texts, token counts and streams over HTTP are those of generate and chat; a prompt that is too long is a 400."""
    monkeypatch.setattr(awq, "close", lambda: None)  # the session's engine outlives the service
    (completed,) = awq.generate(PROMPT, GREEDY, adapter="pirate", use_tqdm=False)
    (chatted,) = awq.chat(HELLO, GREEDY, adapter="pirate", use_tqdm=False)
    with running(awq) as (_, url), client(url) as ai:
        reply = ai.completions.create(model="pirate", prompt=PROMPT, **GREEDY)
        assert reply.choices[0].text == completed.text
        assert reply.usage.prompt_tokens == len(completed.prompt_token_ids)
        assert reply.usage.completion_tokens == completed.num_tokens
        chunks = list(ai.chat.completions.create(model="pirate", messages=HELLO, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == chatted.text
        assert chunks[-1].choices[0].finish_reason == chatted.finish_reason
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                ai.completions.create(model="fake/model", prompt="word " * 600, stream=stream)
            assert caught.value.code == "RequestRejectedError"


def test_a_load_and_a_hang_up_over_http(awq, monkeypatch):
    """An adapter that is loaded over HTTP answers; a client that leaves its stream frees the request."""
    monkeypatch.setattr(awq, "close", lambda: None)
    source = demo_adapters()["pirate"]
    with running(awq, adapters_folder=source.parent) as (_, url), client(url) as ai:
        loaded = httpx.put(f"{url}/adapters/matey", json={"source": str(source)}, headers=ADMIN, timeout=120)
        assert loaded.json()["name"] == "matey", loaded.text
        texts = [
            ai.completions.create(model=name, prompt=PROMPT, **GREEDY).choices[0].text for name in ("pirate", "matey")
        ]
        assert texts[0] == texts[1]
        stream = ai.completions.create(model="matey", prompt="Once upon a time", max_tokens=400, stream=True)
        next(stream)
        stream.close()
        wait_until(lambda: awq.stats().num_running == awq.stats().num_waiting == 0, 60)
    unload_others(awq)
