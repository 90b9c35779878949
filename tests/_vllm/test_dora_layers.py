"""DoRA's gains from vLLM's own layers and its 4-bit kernel on the CPU, against PEFT on the dequantized weights."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear  # noqa: E402
from vllm import _custom_ops  # noqa: E402, F401
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.layers import (  # noqa: E402
    ColumnParallelLinearWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format  # noqa: E402
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter  # noqa: E402
from vllm.scalar_type import scalar_types  # noqa: E402

from qlora_infer._vllm import kernels  # noqa: E402
from qlora_infer._vllm.kernels.cpu import int4, lora  # noqa: E402
from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper  # noqa: E402
from qlora_infer._vllm.kernels.dora import DoRA  # noqa: E402
from qlora_infer.demo._pack import GROUP_SIZE, pack_awq, pack_gptq, quantize  # noqa: E402

INPUTS, RANK, SLOTS = 192, 8, 2


@pytest.fixture
def one_worker(tmp_path):
    """Parallel groups of one worker."""
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
        parallel_state.cleanup_dist_env_and_memory()


class FourBits:
    """vLLM's quantization of a layer, as its steps use it: the packed weight, through the CPU's kernel."""

    def __init__(self, matrix, form):
        is_awq = form == "awq"
        config = MPLinearLayerConfig(
            full_weight_shape=(INPUTS, len(matrix.dequantized().T)),
            partition_weight_shape=(INPUTS, len(matrix.dequantized().T)),
            weight_type=scalar_types.uint4 if is_awq else scalar_types.uint4b8,
            act_type=torch.bfloat16,
            group_size=GROUP_SIZE,
            zero_points=is_awq,
        )
        tensors = pack_awq(matrix) if is_awq else pack_gptq(matrix)
        options = {"input_dim": 0, "output_dim": 1, "weight_loader": None}
        self._layer = torch.nn.Module()
        self._layer.qweight = PackedvLLMParameter(
            data=tensors["qweight"], packed_dim=1 if is_awq else 0, packed_factor=8, **options
        )
        self._layer.qzeros = PackedvLLMParameter(data=tensors["qzeros"], packed_dim=1, packed_factor=8, **options)
        self._layer.scales = GroupQuantScaleParameter(data=tensors["scales"], **options)
        if is_awq:
            _convert_awq_to_standard_format(self._layer, "qweight", "qzeros", 4)
        kind = CPUWNA16LinearKernel if hasattr(torch.ops._C, "cpu_gemm_wna16") else int4.ExpandedLinearKernel
        self._kernel = kind(config, "qweight", "scales", "qzeros")
        self._kernel.process_weights_after_loading(self._layer)

    def apply(self, layer, x, bias):
        return self._kernel.apply_weights(self._layer, x, bias)


def wrapped(lora_class, base, dtype):
    """Return vLLM's LoRA layer around a layer, with its slots and our kernels."""
    layer = lora_class(base)
    layer.create_lora_weights(SLOTS, LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=dtype))
    wrapper = GroupedPunicaWrapper(max_num_batched_tokens=64, max_batches=64, device="cpu")
    wrapper.update_metadata(LoRAMapping((7, 0, 7), (7, 0, 7), is_prefill=False), [None, 7], SLOTS + 1, 512)
    layer.set_mapping(wrapper)
    return layer


def trained(weight, bias, generator, **options):
    """PEFT's layer on a linear layer in float32, by default with DoRA, with random factors, magnitudes and LoRA biases."""
    base = torch.nn.Linear(INPUTS, len(weight), bias=bias is not None)
    base.weight.data = weight.float()
    if bias is not None:
        base.bias.data = bias.float()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, **{"use_dora": True, **options})
    made = Linear(base, "default", config=config, r=RANK, lora_alpha=RANK)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.normal_(generator=generator)
            elif "lora_A" in name or "lora_B" in name:
                parameter.copy_((0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16())
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def serve(layer, names, theirs, biases=None):
    """Load an adapter of PEFT's layers into slot 1, as a worker does it; ``biases`` is what it adds to outputs."""

    def activate_adapter(lora_id):
        manager.lora_index_to_id[1] = lora_id
        if len(names) == 1:
            layer.set_lora(1, factors[0][0], factors[0][1])
        else:
            layer.set_lora(1, [a for a, _ in factors], [b for _, b in factors])
        return True

    dtype = layer.lora_a_stacked[0].dtype
    factors = [[made[x]["default"].weight.data.to(dtype) for x in (0, 1)] for made in
               ((one.lora_A, one.lora_B) for one in theirs)]  # fmt: skip
    single = len(names) == 1
    loras = SimpleNamespace(
        lora_a=factors[0][0] if single else [a for a, _ in factors],
        lora_b=factors[0][1] if single else [b for _, b in factors],
    )
    manager = SimpleNamespace(
        modules={"a": layer},
        packed_modules={} if single else {"a": names},
        punica_wrapper_mapping={"": layer.punica_wrapper},
        lora_index_to_id=[None] * SLOTS,
        activate_adapter=activate_adapter,
    )
    magnitudes = {
        name: made.lora_magnitude_vector["default"].weight.data
        for name, made in zip(names, theirs, strict=True)
        if "default" in made.lora_magnitude_vector
    }
    adapter = SimpleNamespace(id=7, loras={"a": loras}, magnitudes=magnitudes, biases=biases or {}, gains={})
    dora = DoRA(manager)
    while not dora.advance(adapter, until=0):
        pass
    manager._registered_adapters = {7: adapter}
    manager.activate_adapter(7)
    return adapter


#: Of each class: its layer, what it is in PEFT, and the outputs of each.
LAYERS = {
    "column": (ColumnParallelLinearWithLoRA, lambda bias: linear.ColumnParallelLinear(INPUTS, 96, bias=bias), [96]),
    "row": (RowParallelLinearWithLoRA, lambda bias: linear.RowParallelLinear(INPUTS, 96, bias=bias), [96]),
    "replicated": (ReplicatedLinearWithLoRA, lambda bias: linear.ReplicatedLinear(INPUTS, 96, bias=bias), [96]),
    "gate, up": (
        MergedColumnParallelLinearWithLoRA,
        lambda bias: linear.MergedColumnParallelLinear(INPUTS, [96, 96], bias=bias),
        [96, 96],
    ),
    "q, k, v": (
        MergedQKVParallelLinearWithLoRA,
        lambda bias: linear.QKVParallelLinear(INPUTS, 16, 8, 2, bias=bias),
        [128, 32, 32],
    ),
}


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_of_vllms_layers_computes_what_pefts_does(name, has_bias, one_worker):
    """A whole forward of vLLM's LoRA layer, on a weight as its CPU build lays it out; a base row beside it is the base's."""
    generator = torch.Generator().manual_seed(0)
    lora_class, build, outputs = LAYERS[name]
    base = build(has_bias)
    base.weight.data = torch.randn(base.weight.shape, generator=generator)
    weight, bias = base.weight.data.clone(), None
    if has_bias:
        base.bias.data = torch.randn(base.bias.shape, generator=generator)
        bias = base.bias.data.clone()
    base.quant_method.process_weights_after_loading(base)
    layer = wrapped(lora_class, base, torch.float32)
    biases = [None] * len(outputs) if bias is None else bias.split(outputs)
    theirs = [trained(part, own, generator) for part, own in zip(weight.split(outputs), biases, strict=True)]
    serve(layer, ["a"] if len(outputs) == 1 else [f"a.{number}" for number in range(len(outputs))], theirs)
    x = torch.randn(3, INPUTS, generator=generator)
    with torch.no_grad():
        y, expected = layer(x)[0], torch.cat([made(x) for made in theirs], dim=1)
        plain = base(x)[0]
    torch.testing.assert_close(y[::2], expected[::2], rtol=1e-4, atol=1e-3)
    assert torch.equal(y[1], plain[1])


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_gains_of_packed_weights_are_those_of_the_dequantized(form, one_worker, monkeypatch):
    """vLLM's kernel for 4-bit weights, in bfloat16: gains as PEFT's to the precision of products that are rounded to 16 bits."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # as this library's engines have it
    kernels._request_amx()
    generator = torch.Generator().manual_seed(0)
    matrix = quantize(torch.randn(INPUTS, 96, generator=generator), symmetric=form != "awq")
    base = linear.ColumnParallelLinear(INPUTS, 96, bias=True, params_dtype=torch.bfloat16)
    base.bias.data = torch.randn(96, generator=generator).bfloat16()
    base.quant_method = FourBits(matrix, form)
    layer = wrapped(ColumnParallelLinearWithLoRA, base, torch.bfloat16)
    weight = matrix.dequantized().T.float()
    made = trained(weight, base.bias.data, generator)
    adapter = serve(layer, ["a"], [made])
    product = made.lora_B["default"].weight.data @ made.lora_A["default"].weight.data
    expected = made.lora_magnitude_vector["default"].weight.data / (weight + product).norm(dim=1)
    gains = torch.from_numpy(adapter.gains["a"])
    torch.testing.assert_close(gains[0], expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(gains[1], (1 - gains[0]) * base.bias.data.float())
    x = torch.randn(3, INPUTS, generator=generator).bfloat16()
    with torch.no_grad():
        y, expected = layer(x)[0].float(), made(x.float())
    torch.testing.assert_close(y[::2], expected[::2], rtol=0.02, atol=0.02 * float(expected.std()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_group", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize("kind", ["lora_bias", "trained bias", "trained bias and DoRA", "a bias alone"])
@pytest.mark.parametrize("name", ["row", "q, k, v"])
def test_biases_of_an_adapter_are_added_as_peft_does(name, kind, by_group, dtype, one_worker, monkeypatch):
    """A LoRA bias, or another bias for the base's, with magnitudes or factors or neither; a base row is the base's, to the bit."""
    if by_group:
        monkeypatch.setattr(lora, "ROWS_UP_TO", -1)
    generator = torch.Generator().manual_seed(0)
    lora_class, build, outputs = LAYERS[name]
    base = build(True)
    base.weight.data = torch.randn(base.weight.shape, generator=generator).to(dtype)
    base.bias.data = torch.randn(base.bias.shape, generator=generator).to(dtype)
    weight, bias = base.weight.data.clone(), base.bias.data.clone()
    base.quant_method.process_weights_after_loading(base)
    layer = wrapped(lora_class, base, dtype)
    options = {"use_dora": "DoRA" in kind, "lora_bias": kind == "lora_bias"}
    theirs = [
        trained(part, own, generator, **options)
        for part, own in zip(weight.split(outputs), bias.split(outputs), strict=True)
    ]
    names, biases = ["a"] if len(outputs) == 1 else [f"a.{number}" for number in range(len(outputs))], {}
    for part, made in zip(names, theirs, strict=True):
        with torch.no_grad():
            if kind == "a bias alone":
                made.lora_A["default"].weight.zero_()
                made.lora_B["default"].weight.zero_()
            if kind == "lora_bias":
                biases[part] = made.lora_B["default"].bias.data.clone()
            else:
                biases[part] = torch.randn(made.out_features, generator=generator)
                made.get_base_layer().bias += biases[part]
    serve(layer, names, theirs, biases)
    x = torch.randn(3, INPUTS, generator=generator).to(dtype)
    with torch.no_grad():
        y, expected = layer(x)[0].float(), torch.cat([made(x.float()) for made in theirs], dim=1)
        plain = base(x)[0].float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.02 * float(expected.std())
    torch.testing.assert_close(y[::2], expected[::2], rtol=0.02 * (dtype != torch.float32), atol=tolerance)
    assert torch.equal(y[1], plain[1])
