"""DoRA on the CPU without an engine: its gains against PEFT's own layers, and the kernels against float64."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import numpy as np  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # noqa: E402
from vllm.model_executor.layers.linear import ColumnParallelLinear  # noqa: E402

from qlora_infer._vllm.kernels import dora  # noqa: E402
from qlora_infer._vllm.kernels.cpu import lora, rows  # noqa: E402
from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper  # noqa: E402
from qlora_infer._vllm.kernels.dora import DoRA  # noqa: E402

SLOTS, RANK, INPUTS, SIZES = 4, 5, 40, (72, 5, 19)
WIDTH = sum(SIZES)


def wrapper_for(slots):
    """vLLM's wrapper, told which slot each row uses."""
    wrapper = GroupedPunicaWrapper(max_num_batched_tokens=64, max_batches=64, device="cpu")
    ids = tuple(0 if slot < 0 else 100 + slot for slot in slots)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=False), [100 + slot for slot in range(SLOTS)], 5, 512)
    return wrapper


def stacked(generator, dtype):
    def random(*shape):
        return (torch.randn(SLOTS, 1, *shape, generator=generator) * 0.1).to(dtype)

    return tuple(random(RANK, INPUTS) for _ in SIZES), tuple(random(size, RANK) for size in SIZES)


def random_gains(generator):
    return (1 + 0.5 * torch.randn(2, WIDTH, generator=generator)).numpy()


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.fixture(params=["compiled, one thread", "compiled, all threads", "by group"])
def way(request, monkeypatch):
    """Each of the ways in which a layer is computed, whatever its size."""
    monkeypatch.setattr(lora, "ROWS_UP_TO", -1 if request.param == "by group" else 2**62)
    monkeypatch.setattr(rows, "ALONE_UP_TO", 2**62 if request.param == "compiled, one thread" else -1)


@pytest.mark.usefixtures("way")
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24),
    with_gains=st.sets(st.integers(0, SLOTS - 1)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    empty=st.sets(st.integers(0, SLOTS - 1)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_with_gains_are_scaled_and_others_have_the_bits_that_they_have_without(
    slots, with_gains, dtype, empty, seed
):
    """g (y + x A^T B^T) + c to rounding, also where A and B are zeros; other rows are equal to the last bit.

    Where no adapter of a call changes a layer, a zero may lose its sign beside one that has gains.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(slots) + 2
    x, y = (
        torch.randn(num_rows, INPUTS, generator=generator).to(dtype),
        torch.randn(num_rows, WIDTH, generator=generator),
    )
    y = y.to(dtype)
    y[:, ::3] = -0.0
    lora_a, lora_b = stacked(generator, dtype)
    for tensor in (*lora_a, *lora_b):
        tensor[list(empty)] = 0
    gains = {slot: random_gains(generator) for slot in sorted(with_gains)}
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double()) for a, b in zip(lora_a, lora_b)]
            expected[row] += torch.cat(parts)
            if slot in gains:
                gain, shift = torch.from_numpy(gains[slot]).double()
                expected[row] = expected[row] * gain + shift
    plain, ours = y.clone(), y.clone()
    wrapper_for(slots).add_lora_linear(plain, x, lora_a, lora_b, 1.0, SIZES)
    wrapper = wrapper_for(slots)
    for slot, own in gains.items():
        wrapper.use_gains(slot, {id(lora_a[0]): own})
    wrapper.add_lora_linear(ours, x, lora_a, lora_b, 1.0, SIZES)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    others = [row for row in range(num_rows) if row >= len(slots) or slots[row] not in gains]
    assert torch.equal(ours[others], plain[others])


@pytest.mark.usefixtures("way")
def test_a_slots_gains_are_those_of_its_adapter_and_go_with_it():
    """Another adapter in the slot has its own gains or none; those of other slots and layers stay."""
    generator = torch.Generator().manual_seed(0)
    lora_a, lora_b = stacked(generator, torch.float32)
    wrapper = wrapper_for([0, 1])
    x = torch.randn(2, INPUTS, generator=generator)

    def outputs():
        y = torch.ones(2, WIDTH)
        wrapper.add_lora_linear(y, x, lora_a, lora_b, 1.0, SIZES)
        return y

    plain, layer = outputs(), id(lora_a[0])
    first, second = random_gains(generator), random_gains(generator)
    for own in ({0: first}, {0: first, 1: second}, {0: second, 1: second}, {1: second}, {}):
        for slot in (0, 1):
            wrapper.use_gains(slot, {layer: own[slot], layer + 1: own[slot]} if slot in own else {})
        expected = plain.clone()
        for slot, (gain, shift) in own.items():
            expected[slot] = plain[slot] * torch.from_numpy(gain) + torch.from_numpy(shift)
        torch.testing.assert_close(outputs(), expected)
        if not own:
            assert torch.equal(bits(outputs()), bits(plain))


def test_nothing_is_compiled_or_called_for_gains_while_there_are_none(monkeypatch):
    """An engine without a DoRA adapter pays neither when it starts nor in a step."""
    monkeypatch.setattr(lora, "ROWS_UP_TO", 2**62)
    compiled, theirs = [], rows._compiled
    monkeypatch.setattr(
        rows, "_compiled", lambda dtype, **options: compiled.append(options) or theirs(dtype, **options)
    )
    wrapper = wrapper_for([0, -1])
    lora_a, lora_b = stacked(torch.Generator().manual_seed(0), torch.float32)
    wrapper.add_lora_linear(torch.zeros(2, WIDTH), torch.ones(2, INPUTS), lora_a, lora_b, 1.0, SIZES)
    assert compiled == [{}]


class Weight:
    """A layer's quantization, which rounds its weight to 16 bits and back: DoRA sees what ``apply`` gives."""

    def __init__(self, weight):
        self.weight = weight.bfloat16().float()
        self.num_rows = []

    def apply(self, layer, x, bias):
        self.num_rows.append(len(x))
        assert bias is None
        return x @ self.weight.T


def layer_of(sizes, generator, *, has_bias=True):
    """A LoRA layer of vLLM's, as far as DoRA needs one."""

    class Base:
        forward = ColumnParallelLinear.forward

    class Layer(BaseLinearLayerWithLoRA):
        def __init__(self):
            torch.nn.Module.__init__(self)

    layer, base = Layer(), Base()
    base.quant_method = Weight(torch.randn(sum(sizes), INPUTS, generator=generator))
    base.bias = torch.randn(sum(sizes), generator=generator) if has_bias else None
    base.skip_bias_add = False
    layer.base_layer, layer.tp_size = base, 1
    layer.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, INPUTS) for _ in sizes)
    layer.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, size, RANK) for size in sizes)
    layer.punica_wrapper = wrapper_for([0])
    return layer


def manager_of(modules, packed=None):
    """vLLM's manager, as far as DoRA needs it; it activates whatever it is given in slot 0."""
    manager = SimpleNamespace(modules=modules, packed_modules=packed or {}, _registered_adapters={})
    manager.punica_wrapper_mapping = {name: layer.punica_wrapper for name, layer in modules.items()}
    manager.lora_index_to_id = [None] * SLOTS
    manager.lora_config = SimpleNamespace(lora_dtype=torch.float32)

    def activate_adapter(lora_id):
        manager.lora_index_to_id[0] = lora_id
        return True

    manager.activate_adapter = activate_adapter
    return manager


def adapter_of(loras, magnitudes, int_id=1):
    return SimpleNamespace(id=int_id, loras=loras, magnitudes=magnitudes, biases={}, gains={})


def finish(dora_of_model, adapter):
    while not dora_of_model.advance(adapter, until=0):
        pass


def trained(peft, weight, bias, generator, **options):
    """PEFT's layer with DoRA on a linear layer, with random factors and magnitudes."""
    from peft.tuners.lora.layer import Linear

    base = torch.nn.Linear(INPUTS, len(weight), bias=bias is not None)
    base.weight.data = weight.clone()
    if bias is not None:
        base.bias.data = bias.clone()
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True, **options)
    made = Linear(base, "default", config=config, r=RANK, lora_alpha=2 * RANK)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@pytest.mark.parametrize("has_bias", [True, False])
def test_gains_and_kernels_together_compute_what_pefts_layers_compute(has_bias):
    """Queries, keys and values in one layer of the model, three in PEFT: y from ``W x + bias`` on is PEFT's output."""
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(SIZES, generator, has_bias=has_bias)
    weight, bias = layer.base_layer.quant_method.weight, layer.base_layer.bias
    biases = [None] * len(SIZES) if bias is None else bias.split(SIZES)
    theirs = [trained(peft, part, own, generator) for part, own in zip(weight.split(SIZES), biases, strict=True)]
    names = [f"{letter}_proj" for letter in "qkv"]
    factors = [(made.lora_A["default"].weight.data, 2 * made.lora_B["default"].weight.data) for made in theirs]
    magnitudes = {
        name: made.lora_magnitude_vector["default"].weight.data for name, made in zip(names, theirs, strict=True)
    }
    packed = SimpleNamespace(lora_a=[a for a, _ in factors], lora_b=[b for _, b in factors])
    manager = manager_of({"qkv_proj": layer}, {"qkv_proj": names})
    of_model, adapter = DoRA(manager), adapter_of({"qkv_proj": packed}, magnitudes)
    finish(of_model, adapter)
    manager._registered_adapters[1] = adapter
    manager.activate_adapter(1)
    for number, (a, b) in enumerate(factors):
        layer.lora_a_stacked[number][0, 0], layer.lora_b_stacked[number][0, 0] = a, b
    x = torch.randn(1, INPUTS, generator=generator)
    y = torch.nn.functional.linear(x, weight, bias)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, SIZES)
    with torch.no_grad():
        torch.testing.assert_close(y, torch.cat([made(x) for made in theirs], dim=1), rtol=1e-4, atol=1e-4)


def test_a_part_without_magnitudes_keeps_its_outputs():
    """Of queries, keys and values only values are DoRA's: the others' gains are 1 and their shifts 0."""
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(SIZES, generator)
    a, b = torch.randn(RANK, INPUTS), torch.randn(SIZES[2], RANK)
    packed = SimpleNamespace(lora_a=[None, None, a], lora_b=[None, None, b])
    of_model = DoRA(manager_of({"qkv_proj": layer}, {"qkv_proj": ["q", "k", "v"]}))
    adapter = adapter_of({"qkv_proj": packed}, {"v": torch.ones(SIZES[2])})
    finish(of_model, adapter)
    gains = adapter.gains["qkv_proj"]
    assert (gains[0, : sum(SIZES[:2])] == 1).all() and (gains[1, : sum(SIZES[:2])] == 0).all()
    whole = layer.base_layer.quant_method.weight[-SIZES[2] :] + b @ a
    np.testing.assert_allclose(gains[0, -SIZES[2] :], 1 / whole.norm(dim=1).numpy(), rtol=1e-4)


def test_the_bases_norms_are_computed_once_and_work_can_be_cut_into_pieces(monkeypatch):
    """The second adapter needs products with its own A only; each call makes one product at least, and then looks at the time."""
    monkeypatch.setattr(dora, "MOST_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    layer = layer_of((WIDTH,), generator)
    of_model = DoRA(manager_of({"o_proj": layer}))

    def adapter(int_id):
        factors = SimpleNamespace(lora_a=torch.randn(RANK, INPUTS), lora_b=torch.randn(WIDTH, RANK))
        return adapter_of({"o_proj": factors}, {"o_proj": torch.ones(WIDTH)}, int_id)

    num_rows = layer.base_layer.quant_method.num_rows
    first = adapter(1)
    for number in range(1, 5):
        assert not of_model.advance(first, until=0)
        assert len(num_rows) == number
    assert of_model.advance(first, until=0)
    assert num_rows == [16, 16, 8, RANK]
    finish(of_model, adapter(2))
    assert num_rows == [16, 16, 8, RANK, RANK]


def test_a_row_without_a_direction_is_an_error():
    """An adapter that takes a row of the weight away leaves nothing to scale; the next load begins anew."""
    generator = torch.Generator().manual_seed(0)
    layer = layer_of((WIDTH,), generator)
    layer.base_layer.quant_method.weight[3] = 0
    a, b = torch.randn(RANK, INPUTS), torch.randn(WIDTH, RANK)
    b[3] = 0
    of_model = DoRA(manager_of({"o_proj": layer}))
    adapter = adapter_of({"o_proj": SimpleNamespace(lora_a=a, lora_b=b)}, {"o_proj": torch.ones(WIDTH)})
    for _ in range(2):
        with pytest.raises(ValueError, match="a row of o_proj has the norm 0"):
            finish(of_model, adapter)
    adapter.magnitudes = {}
    assert of_model.advance(adapter, until=0)


def test_a_layer_that_computes_in_its_own_way_is_an_error():
    """Where a layer's forward is not vLLM's, its outputs may be no products with the weight."""
    layer = layer_of((WIDTH,), torch.Generator().manual_seed(0))
    type(layer.base_layer).forward = lambda self, x: x
    adapter = adapter_of({}, {"gate": torch.ones(WIDTH)})
    with pytest.raises(ValueError, match="DoRA and biases are not applied to gate"):
        finish(DoRA(manager_of({"gate": layer})), adapter)


@pytest.mark.parametrize(("change", "why"), [("kernels", "kernels for CPUs"), ("tp_size", "tensor parallelism")])
def test_an_engine_that_cannot_apply_dora_says_why(change, why):
    """Other kernels than ours, or weights that are split."""
    layer = layer_of((WIDTH,), torch.Generator().manual_seed(0))
    manager = manager_of({"o_proj": layer})
    assert dora.why_not(manager) == ""
    if change == "kernels":
        manager.punica_wrapper_mapping = {"": object()}
    else:
        layer.tp_size = 2
    assert why in dora.why_not(manager)


def test_loads_take_a_share_of_the_time_between_steps(monkeypatch):
    """A fifth of the time since they could go on before, but never less than 10 ms or more than 50."""
    of_model, now = DoRA(manager_of({"o_proj": layer_of((WIDTH,), torch.Generator().manual_seed(0))})), [100.0]
    monkeypatch.setattr(dora.time, "monotonic", lambda: now[0])
    taken = []
    for seconds in (60, 0.001, 0.1, 60):
        now[0] += seconds
        taken.append(of_model.end_of_turn() - now[0])
    assert taken == pytest.approx([0.05, 0.01, 0.02, 0.05])


def test_an_adapter_that_vllm_read_by_itself_has_its_gains_before_it_is_used():
    """Whoever brought it, no slot has an adapter with magnitudes and without gains; and vLLM's dummies end those of before."""
    generator = torch.Generator().manual_seed(0)
    layer = layer_of((WIDTH,), generator)
    manager = manager_of({"o_proj": layer})
    DoRA(manager)
    factors = SimpleNamespace(lora_a=torch.randn(RANK, INPUTS), lora_b=torch.randn(WIDTH, RANK))
    adapter = adapter_of({"o_proj": factors}, {"o_proj": torch.ones(WIDTH)})
    manager._registered_adapters = {1: adapter, 2: SimpleNamespace(id=2, loras={})}
    used = []
    layer.punica_wrapper.use_gains = lambda slot, gains: used.append((slot, list(gains)))
    manager.activate_adapter(1)
    manager.activate_adapter(2)
    assert adapter.gains["o_proj"].shape == (2, WIDTH)
    assert used == [(0, [id(layer.lora_a_stacked[0])]), (0, [])]


def test_a_magnitude_of_no_module_is_an_error():
    """Nothing of an adapter is left out without a word."""
    layer = layer_of((WIDTH,), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="the model has no other"):
        finish(DoRA(manager_of({"o_proj": layer})), adapter_of({}, {"other": torch.ones(WIDTH)}))
