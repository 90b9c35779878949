"""vLLM's application over the fake engine, with a tokenizer of bytes, on a port of its own."""

import asyncio
import contextlib
import json
import threading
import time

import httpx
import openai

from qlora_infer.serve.allowed import AllowedSources
from qlora_infer.serve.server import make_server
from qlora_infer.serve.settings import Settings
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

KEY, ADMIN_KEY = "a-client-s-secret", "an-admin-s-secret"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
HELLO = [{"role": "user", "content": "ahoy there"}]
ENDLESS = " ".join(["word"] * 900)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_model(folder):
    """A checkpoint without weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class ByteEngine(FakeEngine):
    """The fake engine with the tokens of a tiny model, and vLLM's configuration of it."""

    vllm_config = None  # of the session, set by a fixture
    tokenizer = None

    def __init__(self, **options):
        super().__init__(**options)
        self.requests = []  # what it was given

    def add_request(self, request):
        self.requests.append(request)
        return super().add_request(request)

    def _encode(self, text):
        return tuple(self.tokenizer.encode(text).ids)

    def _decode(self, token_ids):
        return self.tokenizer.decode(list(token_ids))


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def running(engine, **settings):
    """A server of an engine; gives it and its URL."""
    options = {"model_names": ("base",), "api_key": KEY, "admin_key": ADMIN_KEY, "drain": 5.0, **settings}
    made = []

    async def serve():
        made.append(await make_server(engine, Settings(**options), port=0))
        await made[0].serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        wait_until(lambda: (made and made[0].started) or not thread.is_alive(), 60)
        yield made[0], f"http://127.0.0.1:{made[0].servers[0].sockets[0].getsockname()[1]}"
    finally:
        if made:
            made[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def served(folder, *, backend=None, adapters=("pirate",), max_num_seqs=8, engine_options=None, **settings):
    """A server of the fake engine, whose adapters may come from ``folder``; gives its URL and its engine."""
    sources = {name: write_adapter(folder / name) for name in adapters}
    allowed = AllowedSources(folder, ("me/",))
    engine = fake_engine(
        backend=backend or ByteEngine(),
        adapters=sources,
        known_adapters=allowed.find,
        engine_args={"max_num_seqs": max_num_seqs},
        **(engine_options or {}),
    )
    with engine, running(engine, allowed=allowed, **settings) as (_, url):
        yield url, engine


def client(url, key=KEY, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **options)


def wire(url, key=KEY):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def admin(url):
    return wire(url, ADMIN_KEY)
