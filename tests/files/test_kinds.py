"""What a thing is, and how an adapter was trained, is read from names and fields that anybody may have written."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_infer.files.kinds.pointer import in_place_of
from qlora_infer.files.kinds.tensors import foreign_kind, format_strays
from qlora_infer.files.kinds.training import Training

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
FIELDS = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("encoder.block.3.layer.0.SelfAttention.q", "T5"),
        ("decoder.block.3.layer.2.DenseReluDense.wi_0", "T5"),
        ("model.decoder.layers.0.encoder_attn.q_proj", "Whisper"),
        ("bert.encoder.layer.11.attention.self.query", "BERT"),
        ("encoder.layer.0.intermediate.dense", "BERT"),
        ("distilbert.transformer.layer.0.attention.q_lin", "BERT"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "image"),
        ("unet.up_blocks.1.attentions.0.proj_in", "image"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "image"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "image"),
        ("model.layers.0.self_attn.q_proj", ""),
        ("transformer.h.0.attn.c_attn", ""),
        ("transformer.blocks.0.attn.Wqkv", ""),
        ("model.decoder.layers.0.self_attn.q_proj", ""),  # OPT
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", ""),
        ("model.vision_tower.encoder.layer.0.attention.attention.query", ""),
        ("model.language_model.encoder.layers.0.self_attn.q_proj", ""),
    ],
)
def test_models_that_are_no_language_models_are_known_by_their_names(module, kind):
    """T5, Whisper, BERT and image models are named; language models, and towers of theirs, never are."""
    sentence = foreign_kind([module], {})
    assert kind in sentence
    assert bool(sentence) == bool(kind)


def test_a_language_model_with_a_tower_is_a_language_model():
    """One module of a language model is enough, whatever the others are called."""
    modules = ["model.layers.0.self_attn.q_proj", "bert.encoder.layer.0.attention.self.query", "unet.mid_block.proj"]
    assert foreign_kind(modules, {}) == ""


@given(
    names=st.lists(st.text(max_size=60), min_size=1, max_size=6),
    config=st.dictionaries(st.sampled_from(FIELDS), json_values),
)
@settings(deadline=None)
def test_any_names_and_fields_are_read(names, config):
    """No name of a tensor and no value of a field is an error."""
    assert isinstance(foreign_kind(names, config), str)
    assert format_strays(names, num_factors=0)
    training = Training.of(config, {})
    assert all(map(str.isprintable, (training.task, training.model_class, training.peft_version)))


@pytest.mark.parametrize("name", ["controlnet" * 400_000, "lora_" * 800_000, "a." * 2_000_000, "." * 4_000_000])
def test_a_hostile_name_takes_no_time(name):
    """A header has 16 MiB, and a name in it as many."""
    began = time.monotonic()
    foreign_kind([name], {})
    format_strays([name], num_factors=0)
    assert time.monotonic() - began < 2


@given(card=st.text(max_size=200).map(lambda text: f"---\n{text}\n---"), metadata=st.dictionaries(st.text(), st.text()))
@settings(max_examples=50, deadline=None)
def test_any_model_card_is_read(card, metadata):
    """A model card is a stranger's, too."""
    assert isinstance(Training.of({}, metadata, card).tools, tuple)


def test_tools_are_those_of_the_card_s_beginning():
    """Tags and library_name count, words in the text do not."""
    card = "---\nlibrary_name: mlx\ntags:\n- axolotl\n- lora\n---\n# Compare with Unsloth and torchtune\n"
    assert Training.of({}, {}, card).tools == ("Axolotl", "MLX")
    assert Training.of({}, {"format": "mlx", "ss_lr": "1"}, "unsloth").tools == ("MLX", "kohya's sd-scripts")


@given(content=st.binary(max_size=80))
@settings(deadline=None)
def test_any_bytes_are_looked_at(content):
    """What stands for another file is known by its beginning alone."""
    assert in_place_of(content) == "" or content.lstrip()[:1] in (b"v", b"<")
    assert "git lfs pull" in in_place_of(b"version https://git-lfs.github.com/spec/v1\n" + content)
    assert "web page" in in_place_of(b"\n <!doctype HTML>" + content)
