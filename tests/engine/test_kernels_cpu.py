"""LoRA's arithmetic on the CPU, against a float64 reference; no engine is started."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402

from qlora_infer.kernels.cpu import GroupedPunicaWrapper, group_rows  # noqa: E402

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
    rows = {}
    for slot, where in group_rows(torch.tensor(slots)):
        for row in torch.arange(len(slots))[where].tolist():
            assert row not in rows
            rows[row] = slot
    assert rows == {row: slot for row, slot in enumerate(slots) if slot >= 0}


@given(slots=slots_of_rows, dtype=dtypes, rank=st.integers(1, 9), prefill=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_linear_layers_add_each_rows_own_adapter(slots, dtype, rank, prefill, seed):
    """Merged slices of several sizes: y + x A^T B^T per slice, to rounding; rows without an adapter to the last bit.

    There are more rows than the mapping names, as in vLLM's padded batches, and x and y are strided.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, sizes = len(slots) + 3, (12, 5, 7)
    x = torch.randn(num_rows, 40, generator=generator).to(dtype)[:, ::2]
    y = torch.randn(num_rows, 2 * sum(sizes), generator=generator).to(dtype)[:, : sum(sizes)]
    lora_a = tuple(stacked(generator, rank, 20, dtype=dtype) for _ in sizes)
    lora_b = tuple(stacked(generator, size, rank, dtype=dtype) for size in sizes)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double()) for a, b in zip(lora_a, lora_b)]
            expected[row] += torch.cat(parts) * 0.5
    before = y.clone()
    wrapper_for(slots, prefill).add_lora_linear(y, x.contiguous(), lora_a, lora_b, 0.5, sizes)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    untouched = [row for row in range(num_rows) if row >= len(slots) or slots[row] < 0]
    assert torch.equal(y[untouched], before[untouched])


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
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(max_num_batched_tokens=8, max_batches=8, device="cpu")
    mapping = LoRAMapping((0, 100), (0, 100), is_prefill=False)
    wrapper.update_metadata(mapping, [100, 101], 3, 512)
    y = torch.zeros(2, 4)
    ones = torch.ones(2, 1, 2, 4), torch.ones(2, 1, 4, 2)
    wrapper.add_lora_linear(y, torch.ones(2, 4), (ones[0],), (ones[1],), 1.0, (4,))
    assert y[0].abs().sum() > 0
