"""What the package knows of vLLM's architectures is what the installed vLLM says of them."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from engine.conftest import vllm_release
from qlora_infer.model import architectures
from qlora_infer.model.modules import Renames

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import model_survey

#: Modules as adapters and checkpoints name them, behind every wrapper that a class's rules are about.
NAMES = [
    f"{wrapper}{module}"
    for wrapper in (
        *("", "model.", "language_model.", "language_model.model.", "model.language_model.", "model.text_model."),
        *("model.model.", "thinker.", "thinker.model.", "llm.", "llm.model.", "transformer.", "gpt_neox.", "backbone."),
        *("model.visual.", "visual.", "model.vision_tower.", "vision_tower.", "vision_model.", "model.audio_tower."),
        *("model.multi_modal_projector.", "multi_modal_projector.", "model.connector.", "mm_projector.", "talker."),
    )
    for module in (
        *(
            "layers.0.self_attn.q_proj",
            "layers.11.self_attn.qkv_proj",
            "layers.1.mlp.gate_up_proj",
            "layers.2.mlp.gate",
        ),
        *("layers.0.mlp.experts.3.gate_proj", "layers.0.mlp.experts", "layers.0.mlp.experts.base_layer", "lm_head"),
        *("layers.0.block_sparse_moe.experts.0.w1", "layers.0.mlp.router.gate", "layers.3.linear_attn.in_proj_qkv"),
        *("embed_tokens", "embed_out", "blocks.0.attn.qkv", "encoder.layers.0.mlp.fc1", "h.0.mlp.dense_h_to_4h"),
        *("layers.0.mixer.in_proj", "layers.0.feed_forward.w2", "norm", "output", "merger.mlp.0"),
    )
]


@pytest.fixture(scope="module")
def classes():
    """vLLM's classes by architecture, of those that can be imported here."""
    found = {}
    for name, registered in model_survey.model_classes().items():
        try:
            found[name] = registered.load_model_cls()
        except (ImportError, OSError):
            continue
    return found


def test_modules_are_renamed_as_vllm_renames_them(classes):
    """Renames gives what WeightsMapper.map_name gives, with the rules of every class and every form of names."""
    from qlora_infer._vllm import lora_layers

    num_compared = 0
    for name, model in classes.items():
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is None:
            continue
        ours, theirs = Renames(**lora_layers.rename_rules(mapper)), mapper.get_rename_mapper()
        for module in NAMES:
            for suffix in (".lora_A.weight", ".lora_B.weight", ".weight"):
                assert ours.of_tensor(module + suffix) == theirs.map_name(module + suffix), (name, module)
                num_compared += 1
    assert num_compared > 10_000


def test_the_architectures_are_those_of_the_installed_vllm(classes):
    """The file has every architecture of vLLM that generates text, its class and what the class itself says.

    Where this fails, vLLM has changed: run ``python benchmarks/model_survey.py``.
    """
    written = json.loads(model_survey.DATA.read_text())
    if tuple(map(int, written["vllm"].split(".")[:2])) != vllm_release()[:2]:
        pytest.skip(f"the file is about vLLM {written['vllm']}")
    assert set(written["architectures"]) == set(model_survey.model_classes())
    for name, model in classes.items():
        record = written["architectures"][name]
        said = model_survey.attributes_of(model)
        assert record["model"] == said["model"], name
        assert record.get("lora", True) == said.get("lora", True), name
        is_built_from_its_class_alone = not model.__module__.endswith(".transformers")
        if said.get("renames") and is_built_from_its_class_alone and not record.get("reason"):
            assert record.get("renames", {}) == said["renames"], name
        assert sorted(record.get("embeddings", [])) == sorted(said.get("embeddings", [])), name


@pytest.mark.parametrize(
    "name", ["Qwen3ForCausalLM", "Phi3ForCausalLM", "GptOssForCausalLM", "Qwen3VLForConditionalGeneration"]
)
def test_a_model_that_is_built_again_is_what_the_file_says(name):
    """The survey finds of these classes today what it wrote."""
    found = model_survey.in_a_fork(lambda: model_survey.survey(name, model_survey.model_classes()[name]))
    written = json.loads(model_survey.DATA.read_text())["architectures"][name]
    assert model_survey.brief(found) == written


def test_every_architecture_of_the_file_is_read():
    """Each record makes an Architecture, and a class that vLLM adapts says which modules, or why that is not known."""
    for name in json.loads(model_survey.DATA.read_text())["architectures"]:
        found = architectures.find(name)
        assert found is not None
        assert not found.lora or found.adapted or found.reason, name
        assert not found.unlisted or found.experts == (), name
