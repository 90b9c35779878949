"""Biases that an adapter saves: left out where they are zero or the base model's, and added to outputs elsewhere."""

import json

import pytest
from attrs import evolve

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from basewise.tiny_bases import TinyBase, save  # noqa: E402
from models import catalog, tiny  # noqa: E402

from qlora_infer.adapters import preflight  # noqa: E402
from qlora_infer.adapters.store import AdapterStore  # noqa: E402
from qlora_infer.errors import IncompatibleAdapterError  # noqa: E402
from qlora_infer.files.manifest import read_manifest  # noqa: E402
from qlora_infer.files.safetensors import map_tensors, write_tensors  # noqa: E402
from qlora_infer.sources.folder import FolderSource  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A model whose queries, keys and values have biases."""
    folder = tmp_path_factory.mktemp("qwen2")
    tiny.build(catalog.BY_NAME["qwen2"], folder)
    return TinyBase(folder, "Qwen2ForCausalLM", device="cpu")


@pytest.mark.parametrize(
    "options",
    [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {"bias": "all", "lora_bias": True}],
    ids=str,
)
def test_biases_that_change_nothing_are_left_out(options, qwen2, tmp_path):
    """They were not trained: what is served is exactly the adapter."""
    config = peft.LoraConfig(**LORA, **options)
    adapter = save(qwen2, config, tmp_path / "a", change=zero_lora_biases)
    assert (qwen2.logits(adapter) - qwen2.logits(qwen2.served(adapter, tmp_path / "store"))).abs().max() < 1e-4
    _, fit = qwen2.held_against(adapter, tmp_path / "again")
    assert fit.conversion.equal


def test_a_bias_of_zeros_does_not_make_its_module_one_that_changes_nothing(qwen2, tmp_path):
    """Only zeros in A or B do."""

    def change(model):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()

    adapter = save(qwen2, peft.LoraConfig(**LORA, bias="lora_only"), tmp_path / "a", change=change)
    copies = AdapterStore(tmp_path / "store")
    _, manifest, _ = copies.make("zero", 1, FolderSource(adapter), allow_pickle=False)
    assert manifest.saved
    assert not manifest.zero_modules


def zero_lora_biases(model):
    for name, parameter in model.named_parameters():
        if "lora_B.default.bias" in name:
            parameter.zero_()


def added(base, adapter, module):
    """Return what an adapter adds to a module's outputs where its inputs are 0, in PEFT's own forward."""
    from models import reference

    layer = reference.with_adapter(base.network(), adapter).get_submodule(f"base_model.model.{module}")
    own = base.network().get_submodule(module)
    with torch.no_grad():
        zeros = torch.zeros(1, own.in_features)
        return (layer(zeros) - own(zeros))[0]


def nudge(*endings):
    def change(model):
        for name, parameter in model.named_parameters():
            if name.endswith(endings):
                parameter += torch.randn(parameter.shape)

    return change


@pytest.mark.parametrize(
    ("options", "nudged"),
    [
        ({"lora_bias": True}, ["lora_B.default.bias"]),
        ({"lora_bias": True, "use_rslora": True, "alpha_pattern": {"v_proj": 3}}, ["lora_B.default.bias"]),
        ({"bias": "lora_only"}, ["base_layer.bias"]),
        ({"bias": "all", "lora_bias": True}, [".bias"]),
    ],
    ids=["lora_bias", "rslora", "lora_only", "all"],
)
def test_what_biases_add_is_written_beside_the_factors(options, nudged, qwen2, tmp_path):
    """For each module what PEFT adds, also of one without factors (``bias="all"``), and of no other."""
    adapter = save(qwen2, peft.LoraConfig(**LORA, **options), tmp_path / "a", change=nudge(*nudged))
    _, fit = qwen2.held_against(adapter, tmp_path / "again")
    served = qwen2.served(adapter, tmp_path / "store")
    shifts = map_tensors("a", served / "biases.safetensors")
    modules = {name for name in qwen2.modules.shapes if "_proj" in name}
    changed = {name: expected for name in modules if (expected := added(qwen2, adapter, name)).any()}
    assert changed.keys() == shifts.keys() == set(fit.conversion.biases)
    for name, expected in changed.items():
        torch.testing.assert_close(torch.from_numpy(shifts[name].copy()), expected, rtol=1e-5, atol=1e-5)
    assert ("model.layers.0.self_attn.k_proj" in shifts) == (options.get("bias") == "all")
    config = json.loads((served / "adapter_config.json").read_text())
    assert (config["bias"], config["lora_bias"]) == ("none", False)
    assert not any("bias" in name for name in map_tensors("a", served / "adapter_model.safetensors"))


def test_dora_beside_a_trained_bias(qwen2, tmp_path):
    """PEFT's magnitudes do not scale a bias: what is added is the same as without them."""
    config = peft.LoraConfig(**LORA, bias="lora_only", use_dora=True)
    adapter = save(qwen2, config, tmp_path / "a", change=nudge("base_layer.bias"))
    served = qwen2.served(adapter, tmp_path / "store")
    name = "model.layers.1.self_attn.q_proj"
    shift = torch.from_numpy(map_tensors("a", served / "biases.safetensors")[name].copy())
    torch.testing.assert_close(shift, added(qwen2, adapter, name), rtol=1e-5, atol=1e-5)
    assert name in map_tensors("a", served / "magnitudes.safetensors")


def test_a_bias_alone_changes_something(qwen2, tmp_path):
    """Zeros in B are no reason to say that the adapter changes nothing."""

    def change(model):
        nudge("lora_B.default.bias")(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.weight"):
                parameter.zero_()

    adapter = save(qwen2, peft.LoraConfig(**LORA, lora_bias=True), tmp_path / "a", change=change)
    manifest, fit = qwen2.held_against(adapter, tmp_path / "store")
    assert not manifest.zero_modules
    assert not fit.changes_nothing(manifest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, "served on CPUs so far"),
        ({"no_dora": "that needs whole layers, and this engine splits them"}, "needs whole layers"),
    ],
)
def test_an_engine_that_adds_no_biases_refuses_them_in_words(changes, words, qwen2, tmp_path):
    """The reason has the way out."""
    config = peft.LoraConfig(**LORA, lora_bias=True)
    adapter = save(qwen2, config, tmp_path / "a", change=nudge("lora_B.default.bias"))
    modules = evolve(qwen2.modules, **changes)
    with pytest.raises(IncompatibleAdapterError, match=words) as refusal:
        preflight.check("a", read_manifest("a", adapter), modules, max_lora_rank=8)
    assert "lora_bias=False and bias='none'" in str(refusal.value)


def test_a_bias_of_another_length_is_refused(qwen2, tmp_path):
    """A LoRA bias has one number for each output."""
    adapter = save(qwen2, peft.LoraConfig(**LORA, lora_bias=True), tmp_path / "a", change=nudge("lora_B.default.bias"))
    tensors = {name: tensor.copy() for name, tensor in map_tensors("a", adapter / "adapter_model.safetensors").items()}
    name = next(name for name in tensors if name.endswith("lora_B.bias"))
    write_tensors(adapter / "adapter_model.safetensors", {**tensors, name: tensors[name][:3]})
    with pytest.raises(IncompatibleAdapterError, match=r"lora_B\.bias"):
        qwen2.held_against(adapter, tmp_path / "store")


def test_trained_biases_of_norms_are_refused(tmp_path):
    """They are in no linear layer; the reason names them and the way out."""
    tiny.build(catalog.BY_NAME["starcoder2"], tmp_path / "starcoder2")
    base = TinyBase(tmp_path / "starcoder2", "Starcoder2ForCausalLM", device="cpu")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    adapter = save(base, config, tmp_path / "a", change=nudge("input_layernorm.bias"))
    with pytest.raises(IncompatibleAdapterError, match=r"input_layernorm\.bias.*merge_and_unload"):
        base.held_against(adapter, tmp_path / "store")
