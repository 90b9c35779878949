"""The hand-made forms that only a GPU serves, taken apart by vLLM's own arithmetic on any machine; no engine is started."""

import pytest
from models import catalog, quantized, tiny

from qlora_infer.model.checkpoint import read_checkpoint

torch = pytest.importorskip("torch")

SIDES = (256, 384)


@pytest.fixture
def weight():
    """A weight in the sizes of a tiny model."""
    return torch.randn(SIDES, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("form", ["w8a8-int8", "w8a8-fp8", "fp8", "fp8-static", "fp8-block", "modelopt-fp8"])
def test_a_weight_of_8_bits_is_its_steps_by_its_scales(form, weight):
    """One scale for a tensor, a row, or a block: spread over the weight, they give what the reference has."""
    tensors, rounded = quantized.FORMS[form].pack(weight)
    scales = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    for side in (0, 1):
        scales = scales.repeat_interleave(SIDES[side] // scales.shape[side], dim=side)
    assert tensors["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
    assert torch.equal(tensors["weight"].float() * scales, rounded)
    assert_near(rounded, weight, 0.03)


@pytest.mark.parametrize("form", ["nvfp4a16", "modelopt-nvfp4"])
def test_nvfp4_is_what_vllm_emulates(form, weight):
    """vLLM's emulation, which it runs on GPUs without a kernel, gives the reference's weights; ours are the scales' names."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    tensors, rounded = quantized.FORMS[form].pack(weight)
    packed = tensors.get("weight_packed", tensors.get("weight"))
    scale = tensors["weight_scale_2"] if form.startswith("modelopt") else 1 / tensors["weight_global_scale"]
    found = dequantize_to_dtype(packed, tensors["weight_scale"], scale, torch.float32, swizzle=False)
    assert torch.allclose(found, rounded, rtol=1e-6)
    assert_near(rounded, weight, 0.11)


def test_mxfp4_is_what_transformers_reads():
    """gpt-oss' experts come back within the rounding of 4 bits, in the order in which they were: inputs, then outputs."""
    experts = torch.randn((2, 64, 96), generator=torch.Generator().manual_seed(0))
    tensors, rounded = quantized.FORMS["mxfp4"].pack_experts(experts)
    assert tensors["blocks"].shape == (2, 96, 2, 16)
    assert tensors["scales"].shape == (2, 96, 2)
    assert_near(rounded, experts, 0.13)


def test_a_cast_as_it_loads_changes_no_value(weight):
    """With the scale that vLLM takes, that of the largest weight, all of them are FP8's numbers."""
    tensors, rounded = quantized.FORMS["fp8-in-flight"].pack(weight)
    scale = tensors["weight"].abs().max() / 448
    cast = (tensors["weight"] / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(cast, rounded)
    assert torch.equal(rounded.bfloat16().float(), rounded)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-w8a16", "llama-w8a8-int8", "llama-fp8-static", "llama-fp8-block", "llama-nvfp4a16"),
        *("llama-modelopt-nvfp4", "gpt-oss-mxfp4", "qwen3-moe-w4a16", "qwen3-moe-fp8-block"),
    ],
)
def test_every_form_has_the_modules_of_16_bits(name, tmp_path):
    """``inspect-adapter --base`` reads the same modules and sizes from packed tensors as from those in 16 bits."""
    model = catalog.FORMATS_ON_GPU[name]
    tiny.build(model, tmp_path / "plain")
    quantized.quantize(tmp_path / "plain", tmp_path / "served", tmp_path / "reference", model.quantization)
    plain, packed = (read_checkpoint(str(tmp_path / form), device="cuda").modules for form in ("plain", "served"))
    assert packed.shapes == plain.shapes
    assert set(packed.unadapted) == set(plain.unadapted)


def assert_near(rounded, weight, share):
    assert 0.1 * share < float((rounded - weight).norm() / weight.norm()) < share
