"""MLX's adapters: served as what mlx-lm's LoRALinear computes, or refused with the way out."""

import json
import logging

import numpy as np
import pytest
from effects import assert_same, deltas, make_copy
from mlx_adapters import effects, factors, rounded, save_safetensors, write_mlx

from qlora_infer.cli.app import app
from qlora_infer.demo import demo_adapters
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError, IncompatibleAdapterError
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.testing import TINY_MODEL, fake_engine, write_adapter


def converted(folder, into):
    snapshot, manifest, _ = make_copy(folder, into)
    assert manifest.unsupported == ()
    assert snapshot.format == "MLX"
    assert {path.name for path in snapshot.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    return deltas(snapshot.folder, manifest)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scale", [20.0, 2, 0.1])
def test_an_adapter_of_mlx_lm_does_what_loralinear_computes(dtype, scale, tmp_path):
    """Each module's product, times its scale, is MLX's; the factors are those of the file, bit for bit."""
    tensors = rounded(factors(), dtype)
    found = converted(write_mlx(tmp_path / "mlx", tensors, scale=scale, dtype=dtype), tmp_path / "copy")
    assert_same(found, effects(tensors, scale), tolerance=1e-14)


def test_an_engine_serves_it_and_says_what_it_was(tmp_path, caplog):
    """The log has one line about the conversion, and the record and its table the format."""
    folder = write_mlx(tmp_path / "mlx")
    with caplog.at_level(logging.INFO, "qlora_infer"), fake_engine() as engine:
        loaded = engine.load_adapter("pirate", folder)
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
    assert (loaded.format, loaded.rank, loaded.num_modules) == ("MLX", 8, len(TINY_MODEL))
    assert loaded.base_model == "mlx-community/fake-model-4bit"
    assert "MLX" in str(loaded)
    lines = [record.message for record in caplog.records if "converted" in record.message]
    assert lines == ["adapter 'pirate' was converted to PEFT's LoRA from MLX"]


def test_equal_files_have_equal_digests_and_a_copy_that_is_gone_is_made_again(tmp_path):
    """The digest is of the converted files: another copy of the same adapter is the same version."""
    folder = write_mlx(tmp_path / "mlx")
    with fake_engine(max_disk_bytes=1 << 30) as engine:
        first = engine.load_adapter("pirate", folder)
        assert engine.load_adapter("pirate", write_mlx(tmp_path / "again")).version == first.version
        other = engine.load_adapter("pirate", write_mlx(tmp_path / "other", factors(seed=1)))
        assert other.digest != first.digest
    one, _, _ = make_copy(folder, tmp_path / "a")
    two, _, _ = make_copy(folder, tmp_path / "b")
    assert one.digest == two.digest == first.digest


def test_numbered_checkpoints_beside_it_are_never_read(tmp_path):
    """mlx-lm leaves 0000100_adapters.safetensors of earlier steps; only adapters.safetensors is served."""
    folder = write_mlx(tmp_path / "mlx")
    (folder / "0000100_adapters.safetensors").write_bytes(b"other")
    (folder / "0000200_adapters.safetensors").mkdir()
    assert_same(converted(folder, tmp_path / "copy"), effects(factors(), 20.0))
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError, match=r"no adapter_model\.safetensors"):
        make_copy(folder, tmp_path / "other")


def test_weights_under_pefts_name_are_taken_too(tmp_path):
    """People rename adapters.safetensors for upload; the config says what the weights are."""
    folder = write_mlx(tmp_path / "mlx")
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")
    assert_same(converted(folder, tmp_path / "copy"), effects(factors(), 20.0))


def test_a_config_for_mlx_and_peft_is_read_as_what_its_tensors_are(tmp_path):
    """Programs write the fields of both: MLX's names of tensors make it MLX's, PEFT's make it PEFT's."""
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert_same(converted(write_mlx(tmp_path / "mlx", scale=3.0, **fields), tmp_path / "a"), effects(factors(), 3.0))
    of_peft = write_adapter(tmp_path / "peft", fine_tune_type="lora", lora_parameters={"rank": 8, "scale": 3.0})
    assert make_copy(of_peft, tmp_path / "b")[0].format == "PEFT"


@pytest.mark.parametrize("is_flat", [False, True], ids=["stacked", "before October 2025"])
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.layers.0.mlp.switch_mlp.gate_proj", "model.layers.0.mlp.experts.{}.gate_proj"),
        ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.{}.down_proj"),
        ("model.layers.1.block_sparse_moe.switch_mlp.up_proj", "model.layers.1.block_sparse_moe.experts.{}.w3"),
    ],
)
def test_stacked_experts_become_one_pair_each(module, names, is_flat, tmp_path):
    """Each expert's product is that of LoRASwitchLinear: lora_b[e] lora_a[e], under the checkpoint's name."""
    generator = np.random.default_rng(3)
    a = generator.normal(0, 1, (4, 8, 32)).astype("f4")
    b = generator.normal(0, 1, (4, 16, 8)).astype("f4")
    tensors = {f"{module}.lora_a": a.reshape(32, 32) if is_flat else a, f"{module}.lora_b": b}
    found = converted(write_mlx(tmp_path / "mlx", tensors, scale=3.0), tmp_path / "copy")
    assert_same(found, {names.format(expert): 3.0 * b[expert].astype("f8") @ a[expert] for expert in range(4)})


def test_dora_of_mlx_is_written_as_pefts(tmp_path):
    """Its magnitudes get PEFT's name, so that it is served, or refused, as PEFT's DoRA is."""
    tensors = factors()
    tensors |= {f"{name}.m": np.ones(shape[1], "f4") for name, shape in TINY_MODEL.items()}
    snapshot, manifest, _ = make_copy(write_mlx(tmp_path / "mlx", tensors, fine_tune_type="dora"), tmp_path / "copy")
    config = json.loads((snapshot.folder / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert not manifest.unsupported or "DoRA" in manifest.unsupported[0]


def old_vlm(folder, tensors, **config):
    renamed = {name.replace("lora_a", "A").replace("lora_b", "B"): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_safetensors(folder / "adapters.safetensors", renamed)
    return folder


def test_an_old_adapter_of_mlx_vlm_is_served_where_its_scale_is_known(tmp_path):
    """Its config has rank and alpha, which its versions read in two ways: with rank 1 they agree; a scale decides."""
    one = old_vlm(tmp_path / "one", factors(rank=1), rank=1, alpha=0.5, dropout=0.1)
    assert_same(converted(one, tmp_path / "a"), effects(factors(rank=1), 0.5))
    with pytest.raises(IncompatibleAdapterError, match=r'"lora_parameters": \{"rank": 8'):
        make_copy(old_vlm(tmp_path / "two", factors(), rank=8, alpha=0.1, dropout=0.1), tmp_path / "b")
    said = {"rank": 8, "alpha": 0.1, "lora_parameters": {"rank": 8, "scale": 0.1}}
    assert_same(converted(old_vlm(tmp_path / "three", factors(), **said), tmp_path / "c"), effects(factors(), 0.1))


def test_an_old_adapter_of_mlx_lm_is_served_where_its_scale_is_known(tmp_path):
    """Since 0.14.2 alpha is not looked at; before October 2024 a config does not say which version wrote it."""
    parameters = {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    newer = write_mlx(tmp_path / "newer", parameters=parameters)
    assert_same(converted(newer, tmp_path / "a"), effects(factors(), 10.0))
    unknown = write_mlx(
        tmp_path / "unknown", parameters=parameters, lora_layers=16, without=["num_layers", "fine_tune_type"]
    )
    with pytest.raises(IncompatibleAdapterError, match="remove 'alpha'"):
        make_copy(unknown, tmp_path / "b")
    del parameters["alpha"]
    old = write_mlx(tmp_path / "old", parameters=parameters, lora_layers=16, without=["num_layers", "fine_tune_type"])
    assert_same(converted(old, tmp_path / "c"), effects(factors(), 10.0))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"fine_tune_type": "full", "parameters": {}}, IncompatibleAdapterError, "full fine-tune .* 'mlx_lm fuse'"),
        ({"tensors": factors({"model.embed_tokens": (96, 64)})}, IncompatibleAdapterError, "tied embeddings"),
        ({"parameters": {"rank": 8}}, CorruptAdapterError, "'scale' in lora_parameters"),
        ({"parameters": {"rank": 8, "scale": True}}, CorruptAdapterError, "'scale' in lora_parameters"),
        ({"parameters": {"rank": "8", "scale": 1}}, CorruptAdapterError, "'rank' in lora_parameters"),
        ({"parameters": [8]}, CorruptAdapterError, "no 'lora_parameters'"),
        ({"parameters": {"rank": 4, "scale": 1}}, CorruptAdapterError, r"with rank 4, .* \[inputs, 4\]"),
        ({"tensors": {"model.layers.0.self_attn.q_proj.lora_a": np.ones((64, 8))}}, CorruptAdapterError, "no lora_b"),
        ({"tensors": {"a.lora_a": np.ones((0, 8)), "a.lora_b": np.ones((8, 0))}}, CorruptAdapterError, "no numbers"),
        (
            {"tensors": {"a.lora_a": np.ones((1 << 20, 0, 8)), "a.lora_b": np.ones((1 << 20, 8, 0)), "x": np.ones(1)}},
            CorruptAdapterError,
            "has the shapes",
        ),
    ],
)
def test_what_cannot_be_converted_says_why(fields, error, match, tmp_path):
    """A full fine-tune, an embedding and faults end in their own errors, with the next step."""
    folder = write_mlx(tmp_path / "mlx", **fields)
    with pytest.raises(error, match=match) as caught:
        make_copy(folder, tmp_path / "copy")
    assert str(tmp_path / "copy") not in str(caught.value)


def test_tensors_that_are_no_factors_are_named(tmp_path):
    """Norms that were trained, too, would be lost: the adapter is refused with their names."""
    tensors = factors() | {"model.norm.weight": np.ones(64, "f4")}
    with fake_engine() as engine, pytest.raises(IncompatibleAdapterError, match=r"model\.norm"):
        engine.load_adapter("pirate", write_mlx(tmp_path / "mlx", tensors))


def test_inspect_adapter_shows_the_format_and_refuses_as_the_engine_does(tmp_path, capsys):
    """Exit code 0 for one that can be served; 1 with the reason for one that was read and cannot be converted."""
    from typer.testing import CliRunner

    good = CliRunner().invoke(app, ["inspect-adapter", str(write_mlx(tmp_path / "good")), "--json"])
    assert (good.exit_code, json.loads(good.output)["format"]) == (0, "MLX")
    full = CliRunner().invoke(app, ["inspect-adapter", str(write_mlx(tmp_path / "full", fine_tune_type="full"))])
    assert full.exit_code == 1
    assert "mlx_lm fuse" in full.output


def test_an_adapter_of_pefts_in_mlxs_form_becomes_what_it_was(tmp_path):
    """The demo's pirate, with its factors transposed and its scale for alpha / r, has its own factors again, bit for bit."""
    pirate = demo_adapters()["pirate"]
    config = json.loads((pirate / "adapter_config.json").read_text())
    original = map_tensors("test", pirate / "adapter_model.safetensors")
    tensors = {}
    for name, tensor in original.items():
        plain = name.removeprefix("base_model.model.").removesuffix(".weight")
        tensors[plain.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = tensor.T
    folder = write_mlx(tmp_path / "mlx", {}, rank=config["r"], scale=config["lora_alpha"] / config["r"])
    write_tensors(folder / "adapters.safetensors", tensors)
    snapshot, manifest, _ = make_copy(folder, tmp_path / "copy")
    found = map_tensors("test", snapshot.folder / "adapter_model.safetensors")
    assert found.keys() == original.keys()
    assert all(np.array_equal(found[name], original[name]) for name in original)
    assert all(found[name].dtype == original[name].dtype for name in original)
    written = json.loads((snapshot.folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (config["r"], config["lora_alpha"])
    assert manifest.rank == config["r"]
