"""Images on the real engine: a tiny Qwen2.5-VL and a text adapter on it answer as transformers and PEFT compute."""

import base64
import io

import pytest

pytest.importorskip("torchvision")

from models import catalog, checkpoints, reference
from PIL import Image

from engine.test_models import SMALLEST_EFFECT, TOLERANCE, start

MODEL = catalog.BY_NAME["qwen2.5-vl"]
#: Of the language model alone, named as transformers names its modules today.
ADAPTER = MODEL.adapters[1]
PICTURES = [Image.effect_noise((84, 56), 90).convert("RGB"), Image.new("RGB", (56, 112), (220, 40, 10))]
PROMPT = " w70 w71 <|vision_start|> <|image_pad|> <|vision_end|> w72 w73"
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
    " <|vision_start|> <|image_pad|> <|vision_end|>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
PARAMS = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(MODEL, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def seeing(engines, checkpoint):
    """The engine, with the adapter."""
    engines.close()
    with start(checkpoint) as engine:
        engine.load_adapter("text", checkpoint.served_adapters[ADAPTER.name])
        yield engine


@pytest.fixture(scope="module")
def outputs(seeing):
    """Each picture for the base model and for the adapter, in one batch; by adapter."""
    jobs = [(picture, name) for name in (None, "text") for picture in PICTURES]
    prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": picture}} for picture, _ in jobs]
    found = seeing.generate(prompts, PARAMS, adapter=[name for _, name in jobs], use_tqdm=False)
    parts = [{"type": "text", "text": "w70 w71"}, {"type": "image_pil", "image_pil": PICTURES[0]}]
    with pytest.raises(ValueError, match="would be downloaded"):
        seeing.add_request([{"role": "user", "content": [*parts, {"image_url": "http://127.0.0.1:9/a.png"}]}])
    return {None: found[:2], "text": found[2:]}


def expected(network, folder, picture, output):
    """The log-probabilities of the answer's tokens, as transformers computes them."""
    import torch
    import transformers

    seen = transformers.AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    kinds = (ids == MODEL.config().image_token_id).int()
    with torch.no_grad():
        logits = network(
            ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, use_cache=False, **seen
        ).logits
    begin = len(output.prompt_token_ids)
    scores = logits[0].float().log_softmax(-1)
    return [float(scores[begin - 1 + place, token]) for place, token in enumerate(output.token_ids)]


def test_images_are_seen_as_transformers_and_peft_see_them(outputs, checkpoint):
    """The log-probabilities of answers to two images are PEFT's, of base and adapter in one batch."""
    base = reference.load(MODEL.architecture, checkpoint.reference)
    plain = [[expected(base, checkpoint.reference, *each) for each in zip(PICTURES, outputs[name])] for name in outputs]
    adapted = reference.with_adapter(base, checkpoint.reference_adapters[ADAPTER.name])
    right = [plain[0], [expected(adapted, checkpoint.reference, *each) for each in zip(PICTURES, outputs["text"])]]
    effect = max(abs(a - b) for row, other in zip(right[1], plain[1]) for a, b in zip(row, other))
    assert effect > SMALLEST_EFFECT
    for name, rows in zip(outputs, right):
        for output, row in zip(outputs[name], rows):
            errors = [abs(ours - theirs) for ours, theirs in zip(output.outputs[0].token_logprobs, row)]
            assert max(errors) < TOLERANCE["float32"] * max(effect, 1), (name, errors)


def test_a_picture_over_http_is_seen_as_from_python(seeing, outputs):
    """The server's chats with data: URLs have the engine's answers, log-probabilities and numbers of tokens."""
    pytest.importorskip("vllm.entrypoints.launchers")
    from served import client, running

    asked = {
        "temperature": 0.0,
        "max_tokens": PARAMS["max_tokens"],
        "logprobs": True,
        "extra_body": {"ignore_eos": True},
    }
    with running(seeing, server_args={"chat_template": TEMPLATE}) as (_, url), client(url) as ai:
        for name, number in ((None, 0), ("text", 0), ("text", 1)):
            reply = ai.chat.completions.create(model=name or "base", messages=chat(PICTURES[number]), **asked)
            output = outputs[name][number]
            assert reply.choices[0].message.content == output.text
            assert reply.usage.prompt_tokens == len(output.prompt_token_ids)
            scores = [token.logprob for token in reply.choices[0].logprobs.content]
            assert scores == pytest.approx(output.outputs[0].token_logprobs, abs=1e-4)


def chat(picture):
    """The prompt as a conversation, with a picture in a data: URL."""
    written = io.BytesIO()
    picture.save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    parts = [{"type": "text", "text": "w70 w71"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "w72 w73"}]}]


def test_other_images_have_other_answers(outputs):
    """The images are not taken for one another."""
    for name in outputs:
        first, second = (output.outputs[0].token_logprobs for output in outputs[name])
        assert max(abs(a - b) for a, b in zip(first, second)) > 0.01
