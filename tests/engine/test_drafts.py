"""Tokens drafted by an EAGLE head, which uses the model's own embeddings and output layer, on the real engine."""

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

from models import catalog, checkpoints, eagle
from models.comparison import Reference

from engine.test_models import Served, start

MODEL = catalog.BY_NAME["llama"]


@pytest.fixture(scope="module")
def drafting(engines, tmp_path_factory):
    """A tiny Llama with three drafted tokens a step."""
    engines.close()
    folder = tmp_path_factory.mktemp("drafts")
    checkpoint = checkpoints.write(MODEL, folder)
    eagle.write_head(checkpoint.served, folder / "head")
    drafts = {"method": "eagle", "model": str(folder / "head"), "num_speculative_tokens": 3}
    with start(checkpoint, speculative_config=drafts) as engine:
        yield Served(checkpoint, engine, Reference(checkpoint))


def test_base_and_adapters_of_embeddings_and_output_layer_answer_as_peft_computes(drafting):
    """In one batch, with drafts: an adapter's embeddings are not those of another request's draft."""
    for adapter, answers in drafting.answers([None, *drafting.checkpoint.adapters]).items():
        drafting.assert_right(answers, adapter)


def test_one_request_alone_answers_as_peft_computes(drafting):
    """A step then has more tokens than a draft has rows."""
    for adapter in ("heads", None):
        drafting.assert_right(drafting.answers([adapter])[adapter], adapter)
