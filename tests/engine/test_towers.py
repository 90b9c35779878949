"""Adapters of a vision tower on the real engine: a tiny Qwen2.5-VL answers to images as transformers and PEFT compute.

It merges four patches to a token, so the rows of its tower, of its connector and of its language model differ.
"""

import pytest

pytest.importorskip("torchvision")

from models import checkpoints, reference

from engine.test_images import MODEL, PARAMS, PICTURES, PROMPT, expected
from engine.test_models import SMALLEST_EFFECT, TOLERANCE, start

#: Of the language model alone; and of all linear layers, those of the tower and the connector among them.
NAMES = [None, "language", "all"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(MODEL, tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def outputs(engines, checkpoint):
    """Each picture for the base model and for each adapter, in one batch; by adapter."""
    engines.close()
    with start(checkpoint, enable_tower_connector_lora=True) as engine:
        for name in NAMES[1:]:
            engine.load_adapter(name, checkpoint.served_adapters[name])
        jobs = [(picture, name) for picture in PICTURES for name in NAMES]
        prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": picture}} for picture, _ in jobs]
        found = engine.generate(prompts, PARAMS, adapter=[name for _, name in jobs], use_tqdm=False)
        return {name: found[place :: len(NAMES)] for place, name in enumerate(NAMES)}


def test_towers_are_adapted_as_peft_adapts_them(outputs, checkpoint):
    """The log-probabilities of answers to two images are PEFT's, of base and adapters in one batch."""
    for name in outputs:
        base = reference.load(MODEL.architecture, checkpoint.reference)
        jobs = list(zip(PICTURES, outputs[name], strict=True))
        right = plain = [expected(base, checkpoint.reference, *job) for job in jobs]
        if name is not None:
            adapted = reference.with_adapter(base, checkpoint.reference_adapters[name])
            right = [expected(adapted, checkpoint.reference, *job) for job in jobs]
            assert distance(right, plain) > SMALLEST_EFFECT
        if name == "all":  # and not without its factors of the tower and the connector
            assert distance(right, without_towers(adapted, checkpoint, jobs)) > SMALLEST_EFFECT
        given = [output.outputs[0].token_logprobs for output in outputs[name]]
        assert distance(given, right) < TOLERANCE["float32"] * max(distance(right, plain), 1), name


def without_towers(adapted, checkpoint, jobs):
    """What PEFT computes with the language model's part of an adapter alone."""
    for name, weight in adapted.named_parameters():
        if "lora_B" in name and "visual" in name:
            weight.data.zero_()
    return [expected(adapted, checkpoint.reference, *job) for job in jobs]


def distance(rows, others):
    return max(abs(a - b) for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True))
