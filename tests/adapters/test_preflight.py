"""Whether an adapter fits a model: every reason why not, told at once, in a message of bearable length."""

from pathlib import Path
from typing import get_args

import pytest
from broken_adapters import BROKEN, BrokenAdapter, inspect

from qlora_infer.adapters.preflight import MAX_KINDS, Fit, check, lora_rank_for
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.files.manifest import AdapterManifest, LoRAModule
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.testing import TINY_MODEL, write_adapter

_LAYER = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
#: The modules of SmolLM2-135M.
SMOLLM2 = {f"model.layers.{layer}.{name}": shape for layer in range(30) for name, shape in _LAYER.items()}
SHAPES = ModelModules({name: ModuleShape(*shape) for name, shape in SMOLLM2.items()})


def manifest(
    modules: dict[str, tuple[int, int]], *, rank: int = 8, unsupported: tuple[str, ...] = ()
) -> AdapterManifest:
    read = {name: LoRAModule(rank, *shape) for name, shape in modules.items()}
    return AdapterManifest(Path("adapter"), None, rank, read, unsupported, 0)


def reasons(adapter: AdapterManifest, max_lora_rank: int = 64) -> tuple[str, ...]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        check("pirate", adapter, SHAPES, max_lora_rank=max_lora_rank)
    assert caught.value.adapter == "pirate"
    assert len(str(caught.value)) < 3000
    return caught.value.reasons


def test_an_adapter_that_fits_says_how_many_modules_it_changes():
    """A fit counts the adapter's modules and the model's, and reads as a sentence's end."""
    assert check("pirate", manifest(SMOLLM2), SHAPES, max_lora_rank=8) == Fit(210, 210)
    some = {name: shape for name, shape in SMOLLM2.items() if "v_proj" in name}
    assert str(check("pirate", manifest(some), SHAPES, max_lora_rank=8)) == "applied to 30 of 210 modules"


def test_the_allowed_ranks_are_those_of_vllm():
    """max_lora_rank may be what vLLM's own LoRAConfig takes, nothing else."""
    pytest.importorskip("vllm")
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ALLOWED_RANKS


@pytest.mark.parametrize(
    ("ranks", "enough"),
    [([1], 1), ([2], 8), ([8], 8), ([9, 4], 16), ([33], 64), ([257], 320), ([321], 512), ([512], 512)],
)
def test_the_smallest_rank_that_is_enough_is_chosen(ranks, enough):
    """vLLM pays for max_lora_rank in every request, so the least that holds all adapters is taken."""
    assert lora_rank_for(ranks) == enough


def test_a_rank_above_the_engines_names_the_argument_that_mends_it():
    """The message says which max_lora_rank to start the engine with."""
    assert reasons(manifest(SMOLLM2, rank=80)) == (
        "It has rank 80, and this engine has room for 64: start it with QuantizedLoRAEngine(max_lora_rank=128).",
    )


def test_a_rank_above_every_limit_says_that_no_engine_can():
    """Above vLLM's largest rank no argument helps, so none is named."""
    assert reasons(manifest(SMOLLM2, rank=513)) == ("It has rank 513, and vLLM serves ranks up to 512.",)


def test_modules_that_the_model_lacks_are_counted_and_named_with_its_layers():
    """Layers beyond the model's are told with the layers that it has."""
    modules = {**SMOLLM2, **{f"model.layers.{layer}.self_attn.q_proj": (576, 576) for layer in range(30, 34)}}
    assert reasons(manifest(modules)) == (
        "It has 4 modules that this model does not have: model.layers.30.self_attn.q_proj, "
        "model.layers.31.self_attn.q_proj, model.layers.32.self_attn.q_proj, … (its layers are 0 to 29).",
    )


def test_shapes_that_differ_are_told_once_for_each_kind_of_module():
    """Thirty layers of another size are one sentence, not thirty."""
    modules = {name: (2048, 2048) if "q_proj" in name else shape for name, shape in SMOLLM2.items()}
    assert reasons(manifest(modules)) == (
        "q_proj has 2048 inputs and 2048 outputs in it, 576 and 576 in the model (30 modules): "
        "it was trained on a model of another size.",
    )


def test_swapped_inputs_and_outputs_do_not_fit():
    """A module with as many numbers but the other way round is refused; vLLM would copy a part of it."""
    modules = {name: (576, 1536) if "down_proj" in name else shape for name, shape in SMOLLM2.items()}
    assert "down_proj has 576 inputs and 1536 outputs in it, 1536 and 576" in reasons(manifest(modules))[0]


@pytest.mark.parametrize("factor", ["in", "out"])
def test_a_smaller_module_does_not_fit_either(factor):
    """vLLM copies a smaller factor into a corner of its slot and says nothing; here it is refused."""
    small = (288, 576) if factor == "in" else (576, 288)
    assert len(reasons(manifest({**SMOLLM2, "model.layers.3.self_attn.q_proj": small}))) == 1


def test_an_adapter_of_another_architecture_is_told_so():
    """When no module matches, both sides' names are shown; vLLM would serve the base model in its place."""
    text = " ".join(reasons(manifest({f"transformer.h.{layer}.attn.c_attn": (64, 192) for layer in range(12)})))
    for words in (
        "None of its 12 modules is in this model",
        "transformer.h.0.attn.c_attn",
        "model.layers.0.self_attn.q_proj",
    ):
        assert words in text


def test_another_architecture_is_named_only_where_names_and_sizes_are_another_s():
    """Sizes of this model under other names, and names of this model in other sizes, are no other architecture."""
    (other_names,) = reasons(manifest({"net.block.0.q": (576, 576)}))
    (other_sizes,) = reasons(manifest({"net.layers.0.self_attn.q_proj": (64, 64)}))
    (other_both,) = reasons(manifest({"net.block.0.q": (64, 64)}))
    assert "None of its 1 modules" in other_names
    assert "trained on" not in other_names
    assert other_sizes.endswith("Their sizes differ, too: it was trained on another model.")
    assert other_both.endswith("Their sizes differ, too: it was trained on another architecture.")


def test_a_resized_vocabulary_is_no_other_size():
    """An embedding of another vocabulary has new tokens; one of another width is of another model."""
    model = ModelModules({"model.embed_tokens": ModuleShape(1000, 64), "lm_head": ModuleShape(64, 1000)})
    for modules, words in (
        ({"model.embed_tokens": (1008, 64)}, "its vocabulary was resized"),
        ({"lm_head": (64, 1008)}, "its vocabulary was resized"),
        ({"lm_head": (32, 1000)}, "a model of another size"),
    ):
        with pytest.raises(IncompatibleAdapterError, match=words):
            check("pirate", manifest(modules), model, max_lora_rank=8)


def test_another_number_of_experts_is_told():
    """The sizes of a layer of experts may be the model's, and their number not."""
    layer = "model.layers.0.mlp.experts"
    model = ModelModules({layer: ModuleShape(8, 16, 4), f"{layer}.base_layer": ModuleShape(16, 32, 4)})
    module = LoRAModule(8, 8, 16, num_experts=2)
    adapter = AdapterManifest(Path("adapter"), None, 8, {layer: module}, (), 0)
    with pytest.raises(IncompatibleAdapterError, match="experts has factors of 2 experts in it, of 4 in the model"):
        check("pirate", adapter, model, max_lora_rank=8)


def test_every_reason_is_in_one_error():
    """Unsupported features, rank, unknown modules and shapes are told together, in this order."""
    modules = {**SMOLLM2, "model.layers.0.mlp.up_proj": (576, 576), "model.layers.40.mlp.up_proj": (576, 1536)}
    found = reasons(manifest(modules, rank=100, unsupported=("It uses DoRA.", "It has biases.")))
    assert [reason.split()[2] for reason in found] == ["DoRA.", "biases.", "rank", "1", "576"]
    assert all(reason.endswith(".") for reason in found)


def test_a_thousand_bad_modules_make_a_short_message():
    """However much is wrong, the message can be read, and it says that there is more."""
    unknown = {f"model.layers.{layer}.mlp.{'x' * 200}": (576, 576) for layer in range(1000)}
    odd = {f"model.layers.{layer}.self_attn.q_proj": (layer + 1, 1) for layer in range(30)}
    found = reasons(manifest({**unknown, **odd}, rank=600))
    assert len(found) == 2 + MAX_KINDS + 1
    assert found[-1] == "22 other kinds of modules have other shapes than the model's, too."


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_the_corpus_fits_a_real_models_modules_too(broken: BrokenAdapter, tmp_path):
    """Each broken adapter, made for SmolLM2-135M's 210 modules, ends in the error of its own fault."""
    modules = {name: shape for name, shape in SMOLLM2.items() if ".0." in name or ".29." in name}
    folder = broken.make(tmp_path / "broken", modules)
    with pytest.raises(broken.error, match=broken.match) as caught:
        inspect(folder, SMOLLM2)
    assert type(caught.value) is broken.error
    assert caught.value.adapter == "broken"


@pytest.mark.parametrize("modules", [TINY_MODEL, SMOLLM2], ids=["tiny", "smollm2"])
def test_a_sound_adapter_passes_everything(modules, tmp_path):
    """What the corpus starts from is sound, so that each refusal is for its own fault."""
    assert inspect(write_adapter(tmp_path / "sound", modules=modules), modules) == Fit(len(modules), len(modules))
