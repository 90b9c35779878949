"""DoRA's magnitudes: read from an adapter's files, refused where they cannot be applied, and written beside vLLM's copy."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from qlora_infer.adapters import loader
from qlora_infer.adapters.placement import place
from qlora_infer.adapters.preflight import check
from qlora_infer.adapters.served import write_served
from qlora_infer.cli.app import app
from qlora_infer.errors import AdapterLoadError, CorruptAdapterError, IncompatibleAdapterError
from qlora_infer.files.manifest import magnitude_of, read_manifest
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.sources.blend import BlendSource
from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter

WEIGHTS = "adapter_model.safetensors"
TINY = ModelModules({name: ModuleShape(*shape) for name, shape in TINY_MODEL.items()})


def write_dora(folder, *, modules=TINY_MODEL, spelling="lora_magnitude_vector", without=(), dtype="<f4", **config):
    """Write an adapter with magnitudes, module by module those of the numbers 1, 2, 3 and so on."""
    write_adapter(folder, modules=modules, use_dora=True, **config)
    tensors = {name: tensor.copy() for name, tensor in map_tensors("dora", folder / WEIGHTS).items()}
    for name, (_, outputs) in modules.items():
        if name not in without:
            tensors[f"base_model.model.{name}.{spelling}"] = np.arange(1, outputs + 1).astype(dtype)
    write_tensors(folder / WEIGHTS, tensors)
    return folder


def refusals(folder, model):
    with pytest.raises(IncompatibleAdapterError) as caught:
        check("dora", read_manifest("dora", folder), model, max_lora_rank=64)
    return caught.value.reasons


@pytest.mark.parametrize("spelling", ["", ".weight", ".default", ".default.weight", ".policy"])
def test_magnitudes_are_read_under_each_name_that_they_have(tmp_path, spelling):
    """As PEFT saves them, and as they are called in a model, with the adapter's name."""
    folder = write_dora(tmp_path / "a", spelling=f"lora_magnitude_vector{spelling}")
    manifest = read_manifest("dora", folder)
    assert manifest.magnitudes == set(TINY_MODEL)
    assert manifest.unsupported == ()
    assert check("dora", manifest, TINY, max_lora_rank=8).num_modules == len(TINY_MODEL)


@pytest.mark.parametrize("name", ["a.lora_magnitude_vectors", "a.lora_A.weight", "lora_magnitude_vector", "a.b.c.d"])
def test_other_tensors_are_no_magnitudes(name):
    """Whatever else a file holds."""
    assert magnitude_of(name) is None


def test_what_peft_saves_has_a_magnitude_for_each_module(tmp_path):
    """Read as PEFT 0.21 writes it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(use_dora=True, target_modules="all-linear")
    )
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    manifest = read_manifest("dora", tmp_path / "a")
    assert len(manifest.magnitudes) == 14
    assert manifest.magnitudes == set(manifest.modules)
    assert manifest.unsupported == ()


def test_magnitudes_without_use_dora_are_tensors_that_would_be_lost(tmp_path):
    """PEFT passes over them; the adapter was trained with them, as torchtune's are."""
    write_dora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    assert "does not set use_dora" in read_manifest("dora", tmp_path / "a").unsupported[0]


def test_a_module_without_its_magnitude_is_named(tmp_path):
    """Without it nobody knows what was trained."""
    missing = list(TINY_MODEL)[3]
    reasons = refusals(write_dora(tmp_path / "a", without=[missing]), TINY)
    assert len(reasons) == 1
    assert f"has no lora_magnitude_vector for {missing}" in reasons[0]


@pytest.mark.parametrize("shape", [(3,), (64, 1), ()])
def test_a_magnitude_of_another_shape_is_corrupt(tmp_path, shape):
    """It is one number for each output."""
    folder = write_dora(tmp_path / "a")
    tensors = {name: tensor.copy() for name, tensor in map_tensors("dora", folder / WEIGHTS).items()}
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    write_tensors(folder / WEIGHTS, {**tensors, name: np.ones(shape, np.float32)})
    with pytest.raises(CorruptAdapterError, match="outputs, and DoRA one"):
        read_manifest("dora", folder)


def test_two_magnitudes_of_a_module_are_corrupt(tmp_path):
    """Nobody could say which counts."""
    folder = write_dora(tmp_path / "a")
    tensors = {name: tensor.copy() for name, tensor in map_tensors("dora", folder / WEIGHTS).items()}
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    write_tensors(folder / WEIGHTS, {**tensors, f"{name}.weight": tensors[name]})
    with pytest.raises(CorruptAdapterError, match="two tensors lora_magnitude_vector"):
        read_manifest("dora", folder)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ModelModules(TINY.shapes, device="cuda"), "served on CPUs so far"),
        (ModelModules(TINY.shapes, device="cpu", no_dora="its norms need whole rows"), "its norms need whole rows"),
    ],
)
def test_an_engine_that_applies_no_dora_refuses_it_in_words(tmp_path, model, words):
    """On a GPU, and where the engine says why not; plain adapters go on."""
    (reason,) = refusals(write_dora(tmp_path / "a"), model)
    assert words in reason
    assert check("plain", read_manifest("plain", write_adapter(tmp_path / "b")), model, max_lora_rank=8)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_magnitudes_of_embeddings_and_output_layers_are_refused(tmp_path, name):
    """Only linear layers inside the model have kernels for them."""
    model = ModelModules({**TINY.shapes, name: ModuleShape(64, 96)})
    (reason,) = refusals(write_dora(tmp_path / "a", modules={**TINY_MODEL, name: (64, 96)}), model)
    assert name in reason and "DoRA" in reason


def test_the_copy_for_vllm_has_no_magnitudes_which_lie_beside_it(tmp_path):
    """vLLM refuses ``use_dora`` and unknown tensors; the magnitudes are under the running model's names."""
    folder = write_dora(tmp_path / "a")
    served = write_served("dora", folder, place(read_manifest("dora", folder).modules, TINY))
    assert json.loads((served / "adapter_config.json").read_text())["use_dora"] is False
    assert not any("magnitude" in name for name in map_tensors("dora", served / WEIGHTS))
    magnitudes = map_tensors("dora", served / "magnitudes.safetensors")
    assert {name: tensor.tolist() for name, tensor in magnitudes.items()} == {
        name: list(range(1, outputs + 1)) for name, (_, outputs) in TINY_MODEL.items()
    }


def test_magnitudes_are_cut_and_ordered_as_factors_are(tmp_path):
    """A module that is one in the adapter and three in the model, and one whose outputs the model has in another order."""
    layer = "model.layers.0.self_attn"
    sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    model = ModelModules(
        {f"{layer}.{name}": ModuleShape(6, size) for name, size in sizes.items()},
        fused={f"{layer}.qkv_proj": [f"{layer}.{name}" for name in sizes]},
    )
    folder = write_dora(tmp_path / "fused", modules={f"{layer}.qkv_proj": (6, 16)})
    served = write_served("dora", folder, place(read_manifest("dora", folder).modules, model))
    found = map_tensors("dora", served / "magnitudes.safetensors")
    assert found[f"{layer}.q_proj"].tolist() == list(range(1, 9))
    assert found[f"{layer}.v_proj"].tolist() == [13, 14, 15, 16]
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    model = ModelModules({f"{layer}.q_proj": ModuleShape(6, 8)}, row_orders={"q_proj": order})
    folder = write_dora(tmp_path / "ordered", modules={f"{layer}.q_proj": (6, 8)})
    served = write_served("dora", folder, place(read_manifest("dora", folder).modules, model))
    found = map_tensors("dora", served / "magnitudes.safetensors")
    assert found[f"{layer}.q_proj"].tolist() == list(range(8, 0, -1))


def test_an_engine_serves_the_copy_and_not_the_adapters_own_files(tmp_path):
    """Also where vLLM would find each module by the adapter's own names."""
    with fake_engine() as engine:
        engine.load_adapter("dora", write_dora(tmp_path / "a"))
        version = engine._registry.current("dora")
        assert version.path != version.snapshot.folder
        assert (version.path / "magnitudes.safetensors").exists()
        assert engine.generate("hello", adapter="dora")[0].text


def test_an_adapter_of_zeros_with_magnitudes_changes_something(tmp_path, caplog):
    """No warning: its magnitudes may be others than the base's norms."""
    folder = write_dora(tmp_path / "a")
    tensors = map_tensors("dora", folder / WEIGHTS)
    zeroed = {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, {name: tensor.astype(np.float32) for name, tensor in zeroed.items()})
    with fake_engine() as engine, caplog.at_level("WARNING", "qlora_infer"):
        engine.load_adapter("dora", folder)
    assert "changes nothing" not in caplog.text


def test_a_blend_of_dora_is_refused_in_words(tmp_path):
    """A sum of factors has no place for magnitudes; the engine goes on."""
    pytest.importorskip("torch")
    with fake_engine() as engine:
        engine.load_adapter("dora", write_dora(tmp_path / "a"))
        engine.load_adapter("plain", write_adapter(tmp_path / "b"))
        with pytest.raises(IncompatibleAdapterError, match="magnitudes no sum of factors can hold"):
            engine.load_adapter("both", BlendSource({"dora": 0.5, "plain": 0.5}))
        assert engine.generate("hello", adapter="dora")[0].text


def test_dora_may_take_longer_than_plain_adapters(tmp_path, monkeypatch):
    """The norms of a large model's weights take minutes; the limit for others ends one that is not read."""
    monkeypatch.setattr(loader, "READ_TIMEOUT", 0.05)
    with fake_engine(backend=FakeEngine(load_seconds=0.2)) as engine:
        engine.load_adapter("dora", write_dora(tmp_path / "a"))
        with pytest.raises(AdapterLoadError, match=r"not read within 0\.05 s"):
            engine.load_adapter("plain", write_adapter(tmp_path / "b"))
        monkeypatch.setattr(loader, "DORA_TIMEOUT", 0.05)
        with pytest.raises(AdapterLoadError, match=r"not read within 0\.05 s"):
            engine.load_adapter("other", write_dora(tmp_path / "c", rank=4))


def test_inspect_adapter_tells_dora(tmp_path):
    """Its magnitudes are counted; a plain adapter's output has no word of them."""
    folder = write_dora(tmp_path / "a")
    found = CliRunner().invoke(app, ["inspect-adapter", str(folder)])
    assert found.exit_code == 0
    assert f"DoRA        magnitudes of {len(TINY_MODEL)} modules, which are served on CPUs\n" in found.stdout
    assert json.loads(CliRunner().invoke(app, ["inspect-adapter", str(folder), "--json"]).stdout)["num_magnitudes"]
    assert "DoRA" not in CliRunner().invoke(app, ["inspect-adapter", str(write_adapter(tmp_path / "b"))]).stdout
