"""An image in a prompt reaches vLLM's processor as from vLLM's own chat, and no file or address is read unasked."""

import base64
import io
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytest.importorskip("torchvision")

from models import catalog, tiny
from PIL import Image
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.renderers.registry import renderer_from_config

from qlora_infer._vllm.engine import VLLMBackend
from qlora_infer.chat.conversation import Conversation
from qlora_infer.files.extras import Extras
from qlora_infer.requests.arguments import check_prompt
from qlora_infer.requests.client import Client
from qlora_infer.requests.request import GenerationRequest

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
    " <|vision_start|> <|image_pad|> <|vision_end|>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
PICTURE = Image.new("RGB", (80, 60), (200, 30, 30))


def png():
    written = io.BytesIO()
    PICTURE.save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder from which images may be read, and one from which they may not."""
    allowed, other = tmp_path_factory.mktemp("allowed"), tmp_path_factory.mktemp("other")
    for folder in (allowed, other):
        (folder / "picture.png").write_bytes(png())
    (allowed / "link.png").symlink_to(other / "picture.png")
    return allowed, other


@pytest.fixture(scope="module")
def renderer(tmp_path_factory, files):
    """vLLM's renderer and processor of a tiny Qwen2.5-VL, without its weights and without an engine."""
    folder = tmp_path_factory.mktemp("model")
    tiny.write_without_weights(catalog.BY_NAME["qwen2.5-vl"], folder, TEMPLATE)
    settings = ModelConfig(model=str(folder), allowed_local_media_path=str(files[0]), dtype="float32")
    return renderer_from_config(VllmConfig(model_config=settings))


@pytest.fixture
def backend(renderer):
    backend = VLLMBackend()
    backend._renderer, backend._tokenizer = renderer, renderer.tokenizer
    backend._engine = SimpleNamespace(renderer=renderer, model_config=renderer.model_config)
    return backend


def conversation(part):
    return [{"role": "user", "content": [{"type": "text", "text": "w70 w71"}, part, {"type": "text", "text": "w72"}]}]


def rendered(backend, prompt, *, own=False):
    """What our engine hands to vLLM's core."""
    version = SimpleNamespace(name="own", extras=Extras(chat_template=TEMPLATE)) if own else None
    written = Client(backend, None, None, None, model="tiny")._write(check_prompt(prompt), version)
    is_chat = not isinstance(prompt, dict)
    return backend._render(
        GenerationRequest("0", written.prompt, None, add_special_tokens=not is_chat, media=written.media)
    )


def seen(made):
    return made["prompt_token_ids"], made["mm_placeholders"]["image"][0].length, made["mm_hashes"]["image"]


@pytest.fixture
def expected(renderer):
    """What vllm.LLM.chat hands to it."""
    llm = SimpleNamespace(renderer=renderer, model_config=renderer.model_config, chat_template=None)
    messages = conversation({"type": "image_pil", "image_pil": PICTURE})
    (made,) = OfflineInferenceMixin._preprocess_chat(llm, [messages])
    return seen(made)


@pytest.mark.parametrize("own", [False, True], ids=["the model's template", "an adapter's"])
@pytest.mark.parametrize("kind", ["pil", "data", "file"])
def test_an_image_is_seen_as_from_vllms_chat(backend, expected, files, kind, own):
    """A PIL image, a data: URL and a file in the allowed folder give vLLM's tokens and the same image."""
    part = {
        "pil": {"type": "image_pil", "image_pil": PICTURE},
        "data": {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(png()).decode()},
        },
        "file": {"type": "image_url", "image_url": {"url": f"file://{files[0]}/picture.png"}},
    }[kind]
    tokens, length, _ = seen(rendered(backend, conversation(part), own=own))
    assert (tokens, length) == expected[:2]
    assert length > 1
    assert tokens.count(backend._tokenizer.convert_tokens_to_ids("<|image_pad|>")) == length


def test_vllms_mapping_is_a_prompt(backend, expected):
    """Text with the model's placeholder, and the image beside it."""
    text = " w70 w71 <|vision_start|> <|image_pad|> <|vision_end|> w72"
    assert seen(rendered(backend, {"prompt": text, "multi_modal_data": {"image": PICTURE}}))[:2] == expected[:2]


@pytest.mark.parametrize("own", [False, True])
def test_other_files_are_not_read(backend, files, own):
    """A file beside the allowed folder, and a link that leads out of it, are refused."""
    for path in (files[1] / "picture.png", files[0] / "link.png", f"{files[0]}/../other0/picture.png"):
        with pytest.raises(ValueError, match="allowed-local-media-path"):
            rendered(backend, conversation({"type": "image_url", "image_url": {"url": f"file://{path}"}}), own=own)


def test_an_address_is_not_fetched(backend):
    """Hosts have to be allowed, where vLLM alone fetches from any."""
    with pytest.raises(ValueError, match="would be downloaded"):
        backend.render_chat(
            Conversation.of(conversation({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}))
        )
