"""Factors of ``target_parameters``: what PEFT adds to each expert's weight is what the copy for vLLM adds."""

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from basewise.tiny_bases import TinyBase, save  # noqa: E402
from models import catalog, tiny  # noqa: E402

from qlora_infer.adapters.served import write_served  # noqa: E402
from qlora_infer.files.peft_config import read_config, scaling, vllms_pattern_name  # noqa: E402
from qlora_infer.files.safetensors import map_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": []}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
#: In vLLM, gpt-oss holds a layer's experts in one, the others one by one; Llama 4's weights are [inputs, outputs].
MODELS = ["qwen3-moe", "mixtral", "gpt-oss", "llama4"]
PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"experts.down_proj": 2, r"layers\.1\..*gate_up_proj": 8},
        "alpha_pattern": {"experts.gate_up_proj": 5, "layers.1.mlp.experts.down_proj": 3},
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Mixtures of four experts, by transformers' names."""
    found = {}
    for name in MODELS:
        model = catalog.BY_NAME[name]
        folder = tmp_path_factory.mktemp(name)
        # Llama 4 makes every second layer a mixture, unless it is told.
        tiny.build(model, folder)
        found[name] = TinyBase(folder, model.architecture)
    return found


def added_by_peft(base, adapter):
    """Return what PEFT adds to each parameter when it merges an adapter, by the parameter's name."""
    before = dict(base.network().state_dict())
    after = peft.PeftModel.from_pretrained(base.network(), adapter).merge_and_unload().state_dict()
    return {
        name: (after[name] - tensor).numpy() for name, tensor in before.items() if not torch.equal(after[name], tensor)
    }


def added_by_vllm(served, name, num_experts=0):
    """Return what vLLM adds to a module, or to each expert of a layer, with the scale that it finds in the config."""
    tensors, config = (
        map_tensors("x", served / "adapter_model.safetensors"),
        read_config("x", served / "adapter_config.json"),
    )
    a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    rank = len(a) // (num_experts or 1)
    scale = scaling(config, vllms_pattern_name(name), rank)
    if not num_experts:
        return b @ a * scale
    # _stack_moe_lora_weights in vLLM 0.32.0, vllm/lora/model_manager.py
    a, b = a.reshape(num_experts, rank, -1), b.reshape(len(b), rank, num_experts).transpose(2, 0, 1)
    return b @ a * scale


@pytest.mark.parametrize("options", PATTERNS)
@pytest.mark.parametrize(
    "targets",
    [[GATE_UP, DOWN], [GATE_UP], [DOWN], [GATE_UP, f"layers.1.{DOWN}"]],
    ids=["both", "gate-up", "down", "one-layer"],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_expert_gets_what_peft_adds(name, targets, options, bases, tmp_path):
    """One parameter or two, or another set in each layer; ranks, alphas and rsLoRA; halves, and transposed weights."""
    base = bases[name]
    if name == "llama4":
        targets = [target.replace("mlp", "feed_forward") for target in targets]
    config = peft.LoraConfig(**LORA, target_parameters=targets, **PATTERNS[options])
    adapter = save(base, config, tmp_path / "a")
    manifest, fit = base.held_against(adapter, tmp_path / "store")
    served = write_served("x", manifest.folder, fit.placement, fit.conversion)
    expected = added_by_peft(base, adapter)
    assert expected
    network = base.network()
    for parameter, added in expected.items():
        layer, _, last = parameter.rpartition(".")
        if network.get_submodule(layer).__class__.__name__ in ("GptOssExperts", "Llama4TextExperts"):
            added = added.transpose(0, 2, 1)  # [experts, outputs, inputs]
        for expert, theirs in enumerate(added):
            for ours, part in of_expert(name, served, layer, last, expert, theirs):
                assert np.allclose(ours, part, atol=2e-5), (parameter, expert)


def of_expert(name, served, layer, last, expert, theirs):
    """Yield what vLLM adds to each of an expert's projections beside PEFT's part of it."""
    if name == "gpt-oss":
        yield added_by_vllm(served, layer if last == "down_proj" else f"{layer}.base_layer", 4)[expert], theirs
        return
    one = f"{layer}.{expert}".replace("mlp", "block_sparse_moe") if name == "mixtral" else f"{layer}.{expert}"
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if last == "down_proj":
        yield added_by_vllm(served, f"{one}.{names[2]}"), theirs
        return
    half = len(theirs) // 2
    yield added_by_vllm(served, f"{one}.{names[0]}"), theirs[:half]
    yield added_by_vllm(served, f"{one}.{names[1]}"), theirs[half:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"q_proj.weight": 2}, "alpha_pattern": {r"layers.1.self_attn.q_proj.weight": 5, "v_proj": 9}},
    ],
    ids=["plain", "patterns"],
)
@pytest.mark.parametrize("modules", [None, ["v_proj"]], ids=str)
def test_a_matrix_as_a_parameter_is_plain_lora(modules, options, bases, tmp_path):
    """``q_proj.weight`` is q_proj; patterns are about the parameter's name, also where vLLM's are not."""
    base = bases["qwen3-moe"]
    config = peft.LoraConfig(
        **{**LORA, "target_modules": modules}, target_parameters=["self_attn.q_proj.weight"], **options
    )
    adapter = save(base, config, tmp_path / "a")
    manifest, fit = base.held_against(adapter, tmp_path / "store")
    served = write_served("x", manifest.folder, fit.placement, fit.conversion)
    expected = added_by_peft(base, adapter)
    assert sum("q_proj" in name for name in expected) == 2
    for parameter, added in expected.items():
        assert np.allclose(added_by_vllm(served, parameter.removesuffix(".weight")), added, atol=2e-5)
    # Where vLLM reads PEFT's own files, it finds the same.
    is_own = not fit.conversion.is_needed
    assert is_own == (read_config("x", adapter / "adapter_config.json")["target_modules"] is not None and not options)


def test_experts_of_other_modules_are_refused_in_words(bases, tmp_path):
    """A mixture's projections that are modules with a weight of three dimensions, as Granite's."""
    torch.manual_seed(0)
    adapter = save(bases["mixtral"], peft.LoraConfig(**LORA, target_parameters=[GATE_UP, DOWN]), tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    renamed = {
        name.replace("experts.base_layer", "input_linear").replace("mlp.experts", "mlp.output_linear"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(
        {name.replace("experts.", "") if "input" in name else name: tensor for name, tensor in renamed.items()}, path
    )
    config = adapter / "adapter_config.json"
    config.write_text(
        config.read_text()
        .replace("experts.gate_up_proj", "input_linear.weight")
        .replace("experts.down_proj", "output_linear.weight")
    )
    from qlora_infer.errors import IncompatibleAdapterError

    with pytest.raises(IncompatibleAdapterError, match="input_linear"):
        bases["mixtral"].held_against(adapter, tmp_path / "store")
