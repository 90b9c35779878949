"""4-bit weights on a CPU without AVX-512: the arithmetic of _vllm/kernels/cpu/int4.py, on any CPU; no engine is started."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm import _custom_ops  # noqa: E402, F401
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.kernels.linear import choose_mp_linear_kernel  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel  # noqa: E402
from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format  # noqa: E402
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig  # noqa: E402
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter  # noqa: E402
from vllm.platforms import PlatformEnum, current_platform  # noqa: E402
from vllm.scalar_type import scalar_types  # noqa: E402

from qlora_infer._vllm import kernels  # noqa: E402
from qlora_infer._vllm.kernels.cpu import int4  # noqa: E402
from qlora_infer._vllm.kernels.cpu.products import product  # noqa: E402
from qlora_infer.demo._pack import GROUP_SIZE, pack_awq, pack_compressed, pack_gptq, quantize  # noqa: E402

K, N = 192, 96


def layer_of(tensors, packed_dim):
    """A layer as vLLM fills it from a checkpoint."""

    def weight(name, kind, **options):
        return kind(data=tensors[name], input_dim=0, output_dim=1, weight_loader=None, **options)

    layer = torch.nn.Module()
    layer.qweight = weight("qweight", PackedvLLMParameter, packed_dim=packed_dim, packed_factor=8)
    layer.qzeros = weight("qzeros", PackedvLLMParameter, packed_dim=1, packed_factor=8)
    layer.scales = weight("scales", GroupQuantScaleParameter)
    return layer


def compressed_layer_of(tensors):
    """A layer as vLLM fills it from a compressed-tensors checkpoint: its outputs come first."""
    layer = torch.nn.Module()
    options = {"input_dim": 1, "output_dim": 0, "weight_loader": None}
    layer.qweight = PackedvLLMParameter(data=tensors["weight_packed"], packed_dim=1, packed_factor=8, **options)
    layer.scales = GroupQuantScaleParameter(data=tensors["weight_scale"], **options)
    return layer


def config_of(weight_type, *, zero_points, is_reordered=False):
    """What vLLM says of a layer when it chooses a kernel; until 0.31 also whether its inputs were reordered."""
    fields = {"has_g_idx": is_reordered} if "has_g_idx" in MPLinearLayerConfig.__dataclass_fields__ else {}
    return MPLinearLayerConfig(
        full_weight_shape=(K, N),
        partition_weight_shape=(K, N),
        weight_type=weight_type,
        act_type=torch.bfloat16,
        group_size=GROUP_SIZE,
        zero_points=zero_points,
        **fields,
    )


@pytest.mark.parametrize("quantization", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_a_layer_is_what_its_steps_stand_for(quantization, num_rows, monkeypatch):
    """All layouts, with zeros of each group and without: the product with the dequantized matrix, rounded once."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    is_awq = quantization == "awq"
    matrix = quantize(torch.randn(K, N, generator=torch.Generator().manual_seed(0)), symmetric=not is_awq)
    config = config_of(scalar_types.uint4 if is_awq else scalar_types.uint4b8, zero_points=is_awq)
    if quantization == "compressed-tensors":
        layer = compressed_layer_of(pack_compressed(matrix))
    else:
        layer = layer_of(pack_awq(matrix) if is_awq else pack_gptq(matrix), packed_dim=1 if is_awq else 0)
    if is_awq:
        _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    kernel = int4.ExpandedLinearKernel(config, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(layer)

    x, bias = torch.randn(num_rows, K).bfloat16(), torch.randn(N).bfloat16()
    expected = x.double() @ matrix.dequantized().double() + bias.double()
    y = kernel.apply_weights(layer, x, bias)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=2**-8, atol=1e-4)


def test_vllms_kernel_is_used_where_there_is_one(monkeypatch):
    """With the operator that vLLM's kernel calls, install changes nothing; without it, vLLM chooses ours."""
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "")
    registered = []
    monkeypatch.setattr(int4, "register_linear_kernel", lambda kernel, *where: registered.append((kernel, *where)))
    kernels._complete_4_bit_weights()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        assert not registered
    else:
        assert registered == [(int4.ExpandedLinearKernel, PlatformEnum.CPU, "mp")]


def test_vllm_still_chooses_as_we_know_it(monkeypatch):
    """vLLM's only kernel for 4-bit weights on a CPU is the one that ours stands in for, and it can be turned off."""
    assert current_platform.is_cpu()
    config = config_of(scalar_types.uint4b8, zero_points=False)
    with set_current_vllm_config(VllmConfig()):
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", "")
        assert choose_mp_linear_kernel(config) is CPUWNA16LinearKernel
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", CPUWNA16LinearKernel.__name__)
        with pytest.raises(ValueError, match="CPUWNA16LinearKernel disabled by environment variable"):
            choose_mp_linear_kernel(config)


def test_a_worker_may_use_amx_before_anything_else_has():
    """The first instruction of a process may be one of a 4-bit kernel: ``kernels.install`` has requested AMX by then."""
    program = (
        "import ctypes, torch\n"
        "from qlora_infer._vllm import kernels\n"
        "kernels.install()\n"
        "granted = ctypes.c_ulong()\n"
        "ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted))\n"  # arch_prctl(ARCH_GET_XCOMP_PERM)
        "assert granted.value >> 18 & 1 or not torch.cpu._is_amx_tile_supported()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_reordered_inputs_are_refused():
    """GPTQ with desc_act, whose groups are not of neighbours, would give wrong text: refused by vLLM, until 0.31 by us."""
    if "has_g_idx" in MPLinearLayerConfig.__dataclass_fields__:
        config = config_of(scalar_types.uint4b8, zero_points=False, is_reordered=True)
        is_possible, reason = int4.ExpandedLinearKernel.can_implement(config)
        assert not is_possible
        assert "desc_act" in reason
    else:
        checkpoint = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
        with pytest.raises(ValueError, match="desc_act"):
            AutoGPTQConfig.from_config(checkpoint)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from([1, 7, 16, 33, 64, 200]), st.booleans())
def test_a_product_is_float64s_and_a_row_is_alone(num_rows, fours, num_inputs, is_strided):
    """Any sizes, strided rows: float64's product to float32's precision; each row to the bit as it is alone."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs + 3 * is_strided, generator=generator)[:, :num_inputs]
    weight = torch.randn(4 * fours, num_inputs, generator=generator)
    y = product(x, weight)
    expected = x.double() @ weight.double().T
    assert float((y - expected).abs().max()) < 1e-5 * (1 + float(expected.abs().max())) * num_inputs**0.5
    assert torch.equal(product(x[-1:], weight)[0], y[-1])
