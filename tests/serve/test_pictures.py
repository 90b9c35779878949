"""Pictures in chats over HTTP, on the fake engine with the processor of a tiny Qwen2.5-VL."""

import base64
import io

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("torchvision")

import anthropic
import openai
from models import catalog, tiny
from PIL import Image
from served import HELLO, KEY, ByteEngine, client, served
from tokenizers import Tokenizer

PICTURE = Image.new("RGB", (80, 60), (200, 30, 30))
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %} {{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %} <|vision_start|> <|image_pad|> <|vision_end|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def data_url(picture=PICTURE):
    written = io.BytesIO()
    picture.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def chat(url, **part):
    picture = {"type": "image_url", "image_url": {"url": url}, **part}
    return [
        {"role": "user", "content": [{"type": "text", "text": "w70 w71"}, picture, {"type": "text", "text": "w72"}]}
    ]


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """A fake engine with vLLM's configuration of a model that sees, without its weights."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    folder = tmp_path_factory.mktemp("model")
    tiny.write_without_weights(catalog.BY_NAME["qwen2.5-vl"], folder, TEMPLATE)

    class SeeingEngine(ByteEngine):
        pass

    SeeingEngine.vllm_config = EngineArgs(model=str(folder)).create_engine_config(UsageContext.LLM_CLASS)
    SeeingEngine.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return SeeingEngine(reply=lambda prompt, adapter: "w1 w2")


@pytest.fixture(scope="module")
def url(tmp_path_factory, backend):
    """A server of it, with an adapter that has a template of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "own").mkdir()
    (folder / "own" / "chat_template.jinja").write_text(TEMPLATE.replace("m.content is string", "false"))
    with served(folder, backend=backend, adapters=("pirate", "own")) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def asked(backend):
    """The requests that the engine got in a test."""
    backend.requests.clear()
    return backend.requests


def test_a_picture_reaches_the_engine_with_its_prompt(url, asked):
    """A data: URL is given to the engine as a picture, for base and adapters, those with templates of their own too."""
    with client(url) as ai:
        for name in ("base", "pirate", "own"):
            reply = ai.chat.completions.create(model=name, messages=chat(data_url()))
            assert reply.choices[0].message.content == "w1 w2"
        content = [{"type": "input_image", "image_url": data_url(), "detail": "auto"}]
        ai.responses.create(model="pirate", input=[{"role": "user", "content": content}])
        ai.chat.completions.create(model="base", messages=HELLO)
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as claude:
        source = {"type": "base64", "media_type": "image/png", "data": data_url().partition(",")[2]}
        content = [{"type": "image", "source": source}]
        claude.messages.create(model="pirate", max_tokens=8, messages=[{"role": "user", "content": content}])
    blind = asked.pop(4)
    assert not blind.media
    assert len(asked) == 5
    for request in asked:
        (picture,) = request.media["multi_modal_data"]["image"]
        assert getattr(picture, "media", picture).size == PICTURE.size
        assert set(request.media) == {"multi_modal_data"}
    assert asked[0].prompt == asked[1].prompt == asked[2].prompt


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (chat("http://127.0.0.1:9/a.png"), "would be downloaded"),
        (chat("file:///etc/hostname"), "a picture is a data: URL"),
        (chat("data:image/png;base64,AAAA"), "picture"),
        (chat(data_url(Image.new("1", (9000, 9000)))), "pixels"),
        (chat(data_url(), uuid="another-s"), "uuid"),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
            "sounds",
        ),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}], "videos"),
        ([{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}], "embeddings"),
    ],
)
@pytest.mark.parametrize("name", ["base", "own"])
def test_other_media_are_refused(url, asked, name, part, words):
    """Nothing is downloaded or read from disk unasked, a small file is no large picture, and the rest is refused."""
    with client(url) as ai, pytest.raises(openai.BadRequestError, match=words):
        ai.chat.completions.create(model=name, messages=part)
    assert not asked


@pytest.mark.parametrize("address", [data_url(), "http://127.0.0.1:9/a.png"])
@pytest.mark.parametrize("name", ["base", "pirate"])
def test_a_model_that_reads_text_only_refuses_pictures(one_server, name, address):
    """Whatever the template, and no address is looked up."""
    with client(one_server) as ai, pytest.raises(openai.BadRequestError, match=r"reads text only|would be downloaded"):
        ai.chat.completions.create(model=name, messages=chat(address))
