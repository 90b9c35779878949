"""Where an adapter's modules go in the running model, and the copy that vLLM reads where it would not place them."""

import json
import logging

import numpy as np
import pytest

from qlora_infer.adapters.placement import place
from qlora_infer.adapters.preflight import check
from qlora_infer.adapters.served import write_served
from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.files.manifest import LoRAModule, read_manifest
from qlora_infer.files.peft_config import read_config, scaling
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.model.modules import ModelModules, ModuleShape, Renames
from qlora_infer.testing import fake_engine, write_adapter

PROJECTIONS = {"self_attn.q_proj": ModuleShape(8, 16), "mlp.down_proj": ModuleShape(12, 8)}

#: A multimodal model as vLLM names it, with the renamings of vLLM's Qwen3-VL.
MULTIMODAL = ModelModules(
    {f"language_model.model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in PROJECTIONS.items()},
    renames=Renames(
        prefix=(
            ("model.visual.", "visual."),
            ("lm_head.", "language_model.lm_head."),
            ("model.language_model.", "language_model.model."),
        )
    ),
    left_out=("visual.",),
    unadapted={"language_model.lm_head": "ParallelLMHead"},
    model="Qwen3VLForConditionalGeneration",
    device="cpu",
)
FORMS = ["model.language_model.layers", "language_model.model.layers", "model.layers", "language_model.layers"]
EXPERTS, RANK, HIDDEN, INNER = 3, 2, 8, 6


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_names_finds_the_language_model(form):
    """Names of the multimodal class, of its form before transformers 4.52, and of the text-only class are the same modules."""
    module = LoRAModule(4, 8, 16)
    placement = place({f"{form}.{layer}.self_attn.q_proj": module for layer in range(2)}, MULTIMODAL)
    assert set(placement.pieces) == {f"language_model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert (placement.absent, placement.left_out, placement.repeated) == ([], [], [])
    assert placement.is_vllms_own(MULTIMODAL) == (form in FORMS[:2])


def test_a_tower_is_left_out_and_not_taken_for_the_language_model():
    """Modules of a vision tower have numbers and names like a language model's, and stay out of it."""
    module = LoRAModule(4, 8, 16)
    names = ["model.visual.layers.0.self_attn.q_proj", "model.vision_tower.layers.0.self_attn.q_proj"]
    placement = place({names[0]: module, names[1]: module, "model.layers.1.self_attn.q_proj": module}, MULTIMODAL)
    assert set(placement.pieces) == {"language_model.model.layers.1.self_attn.q_proj"}
    assert placement.left_out == names


def test_one_module_under_two_names_is_refused(tmp_path):
    """Of two modules that are one in the model, one would be lost."""
    shapes = {f"{form}.0.self_attn.q_proj": (8, 16) for form in FORMS[:2]}
    manifest = read_manifest("twice", write_adapter(tmp_path / "a", modules=shapes))
    with pytest.raises(IncompatibleAdapterError, match="are one in this model: keep one of them"):
        check("twice", manifest, MULTIMODAL, max_lora_rank=8)


def test_a_layer_that_vllm_does_not_adapt_is_called_that(tmp_path):
    """The model has an output layer, which vLLM does not adapt for this class; so it is no module that is missing."""
    shapes = {"model.layers.0.self_attn.q_proj": (8, 16), "lm_head": (8, 64)}
    manifest = read_manifest("head", write_adapter(tmp_path / "a", modules=shapes))
    with pytest.raises(IncompatibleAdapterError) as caught:
        check("head", manifest, MULTIMODAL, max_lora_rank=8)
    assert caught.value.reasons == (
        "It changes lm_head, which vLLM does not adapt in Qwen3VLForConditionalGeneration: train it without them.",
    )


def test_names_that_differ_show_the_models_nearest_and_no_other_architecture(tmp_path):
    """Where sizes are the model's, the message has what the adapter calls a module and what the model calls the nearest."""
    manifest = read_manifest("odd", write_adapter(tmp_path / "a", modules={"blocks.1.attn.q_proj": (8, 16)}))
    with pytest.raises(IncompatibleAdapterError) as caught:
        check("odd", manifest, MULTIMODAL, max_lora_rank=8)
    (reason,) = caught.value.reasons
    assert "blocks.1.attn.q_proj" in reason
    assert "the model has language_model.model.layers.1.self_attn.q_proj" in reason
    assert "architecture" not in reason


def test_the_copy_for_vllm_has_the_models_names_and_the_adapters_numbers(tmp_path):
    """Tensors are bit for bit the adapter's under the running model's names; patterns become plain names; towers go."""
    q_proj, tower = "model.layers.{}.self_attn.q_proj", "visual.blocks.0.proj"
    shapes = {q_proj.format(0): (8, 16), q_proj.format(1): (8, 16), tower: (8, 8)}
    patterns = {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}, "rank_pattern": {}}
    folder = write_adapter(tmp_path / "a", modules=shapes, rank=4, dtype="BF16", **patterns)
    placement = place(read_manifest("text", folder).modules, MULTIMODAL)
    served = write_served("text", folder, placement)
    before = map_tensors("text", folder / "adapter_model.safetensors")
    after = map_tensors("text", served / "adapter_model.safetensors")
    assert len(after) == 4
    for layer in range(2):
        for factor in "AB":
            name = f"{q_proj.format(layer)}.lora_{factor}.weight"
            renamed = f"base_model.model.language_model.{name}"
            assert np.array_equal(after[renamed], before[f"base_model.model.{name}"])
    manifest = read_manifest("text", served)
    assert manifest.scaled_by_pattern == ("language_model.model.layers.1.self_attn.q_proj",)
    config = json.loads((served / "adapter_config.json").read_text())
    assert list(config["alpha_pattern"].values()) == [3]


#: A module's name as wrappers leave it, and what is left out of it.
WRAPPED = {
    "base_model.model._orig_mod.{}": "'_orig_mod'",
    "_orig_mod.base_model.model.{}": "'_orig_mod' and 'base_model.model'",
    "base_model.model.module.{}": "'module'",
    "base_model.model.base_model.model.{}": "'base_model.model'",
    "base_model.model._fsdp_wrapped_module.model.layers.{layer}._checkpoint_wrapped_module.self_attn.q_proj": (
        "'_fsdp_wrapped_module' and '_checkpoint_wrapped_module'"
    ),
}


def rename_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in map_tensors("a", path).items()}
    write_tensors(path, {change(name): tensor for name, tensor in tensors.items()})


def served_copy(engine, name):
    """The tensors that the engine reads for an adapter, by the names that vLLM needs."""
    with engine._registry.in_use(name) as version:
        return {
            name: np.array(tensor)
            for name, tensor in map_tensors("a", version.path / "adapter_model.safetensors").items()
        }


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_are_left_out_where_then_everything_fits(wrapped, tmp_path, caplog):
    """The names of torch.compile, FSDP, checkpointing and DataParallel are left out of modules'; the log says which."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    patterns = {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}
    folder = write_adapter(tmp_path / "a", modules=dict.fromkeys(names, (64, 64)), rank=4, **patterns)
    before = {name: np.array(tensor) for name, tensor in map_tensors("a", folder / "adapter_model.safetensors").items()}

    def wrap(tensor):
        module, factor = tensor.removeprefix("base_model.model.").split(".lora_")
        return f"{wrapped.format(module, layer=module.split('.')[2])}.lora_{factor}"

    rename_tensors(folder, wrap)
    with caplog.at_level(logging.INFO, "qlora_infer"), fake_engine() as engine:
        assert engine.load_adapter("a", folder).num_modules == 2
        after = served_copy(engine, "a")
        with engine._registry.in_use("a") as version:
            assert read_manifest("a", version.path).scaled_by_pattern == (names[1],)
    assert {name: tensor.tolist() for name, tensor in after.items()} == {n: t.tolist() for n, t in before.items()}
    assert f"whose names were read without {WRAPPED[wrapped]}" in caplog.text


def test_the_adapters_name_is_left_out_of_its_tensors(tmp_path, caplog):
    """Factors that torch saved, lora_A.default.weight, are served from a folder as those that PEFT saved."""
    folder = write_adapter(tmp_path / "a", rank=4)
    before = {name: np.array(tensor) for name, tensor in map_tensors("a", folder / "adapter_model.safetensors").items()}
    rename_tensors(folder, lambda name: name.replace(".weight", ".default.weight"))
    with caplog.at_level(logging.INFO, "qlora_infer"), fake_engine() as engine:
        engine.load_adapter("a", folder)
        after = served_copy(engine, "a")
    assert {name: tensor.tolist() for name, tensor in after.items()} == {n: t.tolist() for n, t in before.items()}
    assert "whose names were read without 'default'" in caplog.text


def test_a_wrapper_stays_where_not_everything_fits_without_it(tmp_path):
    """Where a module is missing either way, the message has the names that the adapter has."""
    names = ["_orig_mod.model.layers.0.self_attn.q_proj", "_orig_mod.model.layers.9.self_attn.q_proj"]
    folder = write_adapter(tmp_path / "a", modules=dict.fromkeys(names, (64, 64)), rank=4)
    with fake_engine() as engine, pytest.raises(IncompatibleAdapterError, match=r"_orig_mod\.model\.layers\.0"):
        engine.load_adapter("a", folder)


def mixture(*, one_by_one):
    """A model of one layer of experts, and of attention."""
    layer = "model.layers.0.mlp.experts"
    if one_by_one:
        out, into = ModuleShape(INNER, HIDDEN), ModuleShape(HIDDEN, INNER)
        names = {"gate_proj": into, "down_proj": out, "up_proj": into}  # vLLM's order
        shapes = {f"{layer}.{expert}.{name}": shape for expert in range(EXPERTS) for name, shape in names.items()}
    else:
        shapes = {
            f"{layer}.base_layer": ModuleShape(HIDDEN, 2 * INNER, EXPERTS),
            layer: ModuleShape(INNER, HIDDEN, EXPERTS),
        }
    return ModelModules({**shapes, "model.layers.0.self_attn.q_proj": ModuleShape(HIDDEN, HIDDEN)})


def save_experts(folder, parameters):
    """What PEFT saves for experts' 3D parameters, and what it adds to each of them."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
            self.down_proj = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    model = torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict(
                {
                    "layers": torch.nn.ModuleList(
                        [torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": Experts()})})]
                    )
                }
            )
        }
    )
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_parameters=[f"mlp.experts.{name}" for name in parameters],
        init_lora_weights=False,
        alpha_pattern={"mlp.experts.down_proj": 5},
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    after = adapted.merge_and_unload().state_dict()
    prefix = "model.layers.0.mlp.experts."
    return {name: (after[prefix + name] - before[prefix + name]).numpy() for name in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
def test_experts_in_one_tensor_become_a_pair_of_factors_for_each_expert(tmp_path, parameters):
    """For a model that has its experts one by one, each gets exactly what PEFT adds to it, and zeros for what it leaves."""
    added = save_experts(tmp_path / "a", parameters)
    model = mixture(one_by_one=True)
    manifest = read_manifest("experts", tmp_path / "a")
    assert check("experts", manifest, model, max_lora_rank=8).num_modules == len(parameters)
    served = write_served("experts", tmp_path / "a", place(manifest.modules, model))
    tensors, copy = map_tensors("experts", served / "adapter_model.safetensors"), read_manifest("experts", served)
    assert set(copy.modules) == {name for name in model.shapes if "experts" in name}
    config = read_config("experts", served / "adapter_config.json")
    for expert in range(EXPERTS):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        for name, expected in (
            ("gate_proj", added["gate_up_proj"][expert, :INNER]),
            ("up_proj", added["gate_up_proj"][expert, INNER:]),
            ("down_proj", added["down_proj"][expert]),
        ):
            a, b = (tensors[f"base_model.model.{prefix}.{name}.lora_{factor}.weight"] for factor in "AB")
            assert np.allclose(b @ a * scaling(config, f"{prefix}.{name}", RANK), expected, atol=1e-5)


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",)])
def test_experts_in_one_tensor_stay_so_where_the_model_has_them_so(tmp_path, parameters):
    """PEFT's layout is kept, with the names that vLLM has for the two projections, and zeros for one that is missing."""
    save_experts(tmp_path / "a", parameters)
    model = mixture(one_by_one=False)
    placement = place(read_manifest("experts", tmp_path / "a").modules, model)
    served = write_served("experts", tmp_path / "a", placement)
    shapes = {name: tensor.shape for name, tensor in map_tensors("x", served / "adapter_model.safetensors").items()}
    layer, ranks = "base_model.model.model.layers.0.mlp.experts", RANK * EXPERTS
    assert shapes == {
        f"{layer}.base_layer.lora_A.weight": (ranks, HIDDEN),
        f"{layer}.base_layer.lora_B.weight": (2 * INNER, ranks),
        f"{layer}.lora_A.weight": (ranks, INNER),
        f"{layer}.lora_B.weight": (HIDDEN, ranks),
    }
    assert placement.is_vllms_own(model) == (len(parameters) == 2)


def test_experts_by_name_of_which_some_are_missing_are_completed(tmp_path):
    """vLLM takes all experts of a layer or none: those that an adapter does not change get zeros."""
    name = "model.layers.0.mlp.experts.1.up_proj"
    manifest = read_manifest("one", write_adapter(tmp_path / "a", modules={name: (HIDDEN, INNER)}, rank=4))
    model = mixture(one_by_one=True)
    placement = place(manifest.modules, model)
    served = write_served("one", tmp_path / "a", placement)
    assert set(read_manifest("one", served).modules) == {name for name in model.shapes if "experts" in name}
    changed = {
        name for name, tensor in map_tensors("one", served / "adapter_model.safetensors").items() if tensor.any()
    }
    assert changed == {f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"}


def test_experts_that_have_no_lora_here_are_refused_in_words(tmp_path):
    """On the CPU the layer of experts is there and not adapted, which the message says with the ways out."""
    save_experts(tmp_path / "a", ("gate_up_proj", "down_proj"))
    shapes = {"model.layers.0.self_attn.q_proj": ModuleShape(HIDDEN, HIDDEN)}
    model = ModelModules(shapes, unadapted={"model.layers.0.mlp.experts": "MoERunner"}, device="cpu")
    with pytest.raises(IncompatibleAdapterError, match=r"vLLM has no LoRA on this device \(cpu\): serve it on a GPU"):
        check("experts", read_manifest("experts", tmp_path / "a"), model, max_lora_rank=8)


def test_tensors_are_written_as_they_were_read(tmp_path):
    """Every dtype of factors survives, also bfloat16, which numpy does not have."""
    for dtype in ("BF16", "F16", "F32", "F64"):
        folder = write_adapter(tmp_path / dtype, dtype=dtype)
        before = map_tensors("a", folder / "adapter_model.safetensors")
        write_tensors(tmp_path / "copy.safetensors", before)
        after = map_tensors("a", tmp_path / "copy.safetensors")
        assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
        assert all(np.array_equal(before[name], after[name]) for name in before)


#: GLM-4: its checkpoint has gate_up_proj, and vLLM takes adapters of the two halves.
IN_PARTS = ModelModules(
    {
        "model.layers.0.mlp.gate_proj": ModuleShape(8, 12),
        "model.layers.0.mlp.up_proj": ModuleShape(8, 12),
    },
    fused={"model.layers.0.mlp.gate_up_proj": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]},
)


def test_a_module_that_vllm_takes_in_parts_is_cut(tmp_path):
    """Each part gets the whole of A and its own rows of B, bit for bit, so that the sum is the adapter's."""
    name = "model.layers.0.mlp.gate_up_proj"
    folder = write_adapter(tmp_path / "a", modules={name: (8, 24)}, rank=4)
    fit = check("fused", read_manifest("fused", folder), IN_PARTS, max_lora_rank=8)
    assert fit.num_modules == 1
    assert not fit.placement.is_vllms_own(IN_PARTS)
    given = map_tensors("fused", folder / "adapter_model.safetensors")
    served = map_tensors("fused", write_served("fused", folder, fit.placement) / "adapter_model.safetensors")
    a, b = (given[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    for part, rows in (("gate_proj", b[:12]), ("up_proj", b[12:])):
        prefix = f"base_model.model.model.layers.0.mlp.{part}"
        assert np.array_equal(served[f"{prefix}.lora_A.weight"], a)
        assert np.array_equal(served[f"{prefix}.lora_B.weight"], rows)


def test_a_module_of_another_size_than_its_parts_is_refused(tmp_path):
    """What the parts do not take is a shape that differs, and no module that is cut short."""
    folder = write_adapter(tmp_path / "a", modules={"model.layers.0.mlp.gate_up_proj": (8, 26)})
    with pytest.raises(
        IncompatibleAdapterError, match="up_proj has 8 inputs and 14 outputs in it, 8 and 12 in the model"
    ):
        check("fused", read_manifest("fused", folder), IN_PARTS, max_lora_rank=8)


def test_outputs_are_put_in_the_order_of_the_running_model(tmp_path):
    """Where vLLM loads a module's outputs in another order, B's rows follow, and A stays."""
    name, order = "model.layers.0.self_attn.q_proj", [*range(8, 16), *range(8)]
    model = ModelModules({name: ModuleShape(8, 16)}, row_orders={"q_proj": order})
    folder = write_adapter(tmp_path / "a", modules={name: (8, 16)}, rank=4)
    placement = place(read_manifest("a", folder).modules, model)
    assert not placement.is_vllms_own(model)
    before = map_tensors("a", folder / "adapter_model.safetensors")
    after = map_tensors("a", write_served("a", folder, placement) / "adapter_model.safetensors")
    factors = [f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"]
    assert np.array_equal(after[factors[0]], before[factors[0]])
    assert np.array_equal(after[factors[1]], before[factors[1]][order])


def test_experts_are_found_by_their_layer_whatever_it_calls_their_home(tmp_path):
    """transformers 5 says mlp.experts of a Mixtral, vLLM block_sparse_moe.experts with w1, w2 and w3."""
    added = save_experts(tmp_path / "a", ("gate_up_proj", "down_proj"))
    layer, shape = "model.layers.0.block_sparse_moe.experts", ModuleShape(HIDDEN, INNER)
    shapes = {"w2": ModuleShape(INNER, HIDDEN), "w3": shape, "w1": shape}  # in any order
    model = ModelModules({f"{layer}.{expert}.{name}": shapes[name] for expert in range(EXPERTS) for name in shapes})
    placement = place(read_manifest("experts", tmp_path / "a").modules, model)
    tensors = map_tensors("x", write_served("experts", tmp_path / "a", placement) / "adapter_model.safetensors")
    assert not placement.absent
    for expert in range(EXPERTS):
        for name, expected in (
            ("w1", added["gate_up_proj"][expert, :INNER]),
            ("w3", added["gate_up_proj"][expert, INNER:]),
        ):
            a, b = (tensors[f"base_model.model.{layer}.{expert}.{name}.lora_{factor}.weight"] for factor in "AB")
            assert np.allclose(b @ a * 6 / RANK, expected, atol=1e-5)


def test_layers_of_vllms_own_kernels_are_named_in_the_log(caplog):
    """Whose LoRA falls back to vLLM's kernels, and what cannot be adapted at all, stands in the log, kind by kind."""
    from qlora_infer._vllm.engine import VLLMBackend

    class Answering(VLLMBackend):
        def _rpc(self, method, *arguments):
            assert method == "qlora_lora_modules"
            names = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
            description = {"sizes": {"model.layers.0.self_attn.q_proj": (8, 8, 0)}, "unlisted": {}, "unadapted": {}}
            description |= {
                "fused": {},
                "left_out": [],
                "row_orders": {},
                "model": "M",
                "device": "cuda",
                "no_dora": "",
            }
            description |= {"renames": {"regex": [], "substr": [], "prefix": [], "suffix": [], "is_complete": True}}
            return [{**description, "computed_by_vllm": names, "unlisted": {"model.odd": "OddLayer: no sizes"}}]

    with caplog.at_level(logging.INFO, "qlora_infer"):
        assert list(Answering().lora_modules().shapes) == ["model.layers.0.self_attn.q_proj"]
    assert "LoRA of experts (3 modules) is computed by vLLM's own kernels" in caplog.text
    assert "adapters cannot change model.odd: vLLM's layer does not tell its sizes (OddLayer: no sizes)" in caplog.text
