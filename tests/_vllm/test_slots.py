"""An adapter moved into a slot in a few calls, against one tensor after the other."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_infer._vllm.kernels.loading.slots import Move, Slots

NUM_SLOTS, RANK, INPUTS, SIZES = 3, 4, 5, (6, 2)

#: The rank of each slice's weights; ``None`` where the adapter does not change it.
RANKS = st.tuples(*[st.none() | st.integers(1, RANK)] * len(SIZES))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
MOVES = st.lists(st.tuples(st.integers(0, NUM_SLOTS - 1), st.none() | RANKS), min_size=1, max_size=8)


def stacked():
    a = [torch.zeros(NUM_SLOTS, 1, RANK, INPUTS) for _ in SIZES]
    return a, [torch.zeros(NUM_SLOTS, 1, size, RANK) for size in SIZES]


def reference(a, b, index, lora_a, lora_b):
    """As vLLM's layers do it."""
    for whole, weights in zip((*a, *b), (*lora_a, *lora_b), strict=True):
        whole[index] = 0
        if weights is not None:
            whole[index, 0, : weights.shape[0], : weights.shape[1]].copy_(weights)


@settings(deadline=None)
@given(moves=MOVES, transposed=st.booleans(), dtypes=st.tuples(DTYPES, DTYPES))
def test_slots_hold_what_they_would_hold_tensor_by_tensor(moves, transposed, dtypes):
    """Whatever rank, slices and dtypes an adapter and the one before have; also where B is laid out in another way meanwhile."""
    ours, theirs = stacked(), stacked()
    slots, move = Slots((*ours[0], *ours[1])), Move()
    for number, (index, ranks) in enumerate(moves):
        if ranks is None:
            move.empty(slots, index)
            reference(*theirs, index, [None] * len(SIZES), [None] * len(SIZES))
        else:
            lora_a = [None if rank is None else torch.randn(rank, INPUTS).to(dtypes[0]) for rank in ranks]
            lora_b = [
                None if rank is None else torch.randn(size, rank).to(dtypes[1])
                for rank, size in zip(ranks, SIZES, strict=True)
            ]
            move.fill(slots, index, lora_a, lora_b)
            reference(*theirs, index, lora_a, lora_b)
        before = [tensor.clone() for tensor in (*ours[0], *ours[1])] if number == 0 else None
        if before:
            assert all(not tensor.any() for tensor in before)  # nothing is written before all of it is
        move.make()
        for our, their in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
            assert torch.equal(our, their)
        if transposed:
            for b in ours[1]:
                b.data = b.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_weights_of_one_piece_of_memory_are_cast_together():
    """As pinned.py reads them: A and B of two modules behind each other, in the dtype of the file."""
    a, b = stacked()
    slots, move = Slots((*a, *b)), Move()
    shapes = [(RANK, INPUTS)] * len(SIZES) + [(size, RANK) for size in SIZES]
    piece = torch.randn(sum(rows * columns for rows, columns in shapes)).bfloat16()
    tensors = torch._C._nn.unflatten_dense_tensors(piece, [torch.empty(shape) for shape in shapes])
    move.fill(slots, 2, tensors[: len(SIZES)], tensors[len(SIZES) :])
    move.make()
    for whole, weights in zip((*a, *b), tensors, strict=True):
        assert torch.equal(whole[2, 0], weights.float())


def test_each_change_is_seen_by_who_counts_versions():
    """The kernels for CPUs look at weights again when torch says that they changed."""
    a, b = stacked()
    slots, move = Slots((*a, *b)), Move()
    for lora_a, lora_b in (
        ([torch.ones(RANK, INPUTS)] * 2, [torch.ones(size, RANK) for size in SIZES]),
        ([torch.ones(1, INPUTS)] * 2, [torch.ones(size, 1) for size in SIZES]),
    ):
        before = [tensor._version for tensor in (*a, *b)]
        move.fill(slots, 1, lora_a, lora_b)
        move.make()
        assert all(tensor._version > version for tensor, version in zip((*a, *b), before, strict=True))


def test_a_module_of_one_slice_has_its_weights_without_a_list():
    """As vLLM gives them for o_proj and down_proj."""
    stacked = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 3)
    move = Move()
    move.fill(Slots(stacked), 1, torch.ones(3, 4), torch.ones(5, 3))
    move.make()
    assert [tensor.sum(dim=(1, 2, 3)).tolist() for tensor in stacked] == [[0.0, 12.0], [0.0, 15.0]]


def test_what_one_move_collected_and_did_not_write_is_not_in_the_next():
    """A move that failed half way."""
    a, b = stacked()
    slots, move = Slots((*a, *b)), Move()
    move.fill(slots, 0, [torch.ones(RANK, INPUTS), None], [torch.ones(SIZES[0], RANK), None])
    move.clear()
    move.make()
    assert not any(tensor.any() for tensor in (*a, *b))


def test_vllms_modules_are_moved_at_once():
    """Layers that copy their weights: packed, single, fused in the checkpoint, and of fewer parts than slices; not those split over GPUs."""
    pytest.importorskip("vllm")
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import (
        MergedColumnParallelLinearVariableSliceWithLoRA,
        MergedColumnParallelLinearWithLoRA,
    )

    from qlora_infer._vllm.kernels.loading.slots import move_at_once

    def module(kind, sizes, *, tp_size=1):
        class Layer(kind):
            def __init__(self):
                torch.nn.Module.__init__(self)

        layer = Layer()
        layer.n_slices, layer.tp_size, layer.output_sizes = len(sizes), tp_size, list(sizes)
        layer.base_layer = SimpleNamespace(output_sizes=list(sizes))
        layer.slice_lora_a = layer.slice_lora_b = lambda weights: weights
        layer.lora_a_stacked = tuple(torch.zeros(2, 1, RANK, INPUTS) for _ in sizes)
        layer.lora_b_stacked = tuple(torch.zeros(2, 1, size, RANK) for size in sizes)
        return layer

    def modules():
        return {
            "qkv_proj": module(MergedColumnParallelLinearWithLoRA, (6, 2, 2)),
            "o_proj": module(BaseLinearLayerWithLoRA, (6,)),
            "split": module(BaseLinearLayerWithLoRA, (6,), tp_size=2),
            "in_proj": module(MergedColumnParallelLinearVariableSliceWithLoRA, (6, 2, 2)),
            "in_proj_qkvz": module(MergedColumnParallelLinearWithLoRA, (4, 4, 6, 6)),
        }

    outputs = {"qkv_proj": (6, 2, 2), "o_proj": (6,), "split": (6,), "in_proj": (10,), "in_proj_qkvz": (14, 6)}

    def weights(number, rank):
        generator = torch.Generator().manual_seed(number)
        return {
            name: (
                [torch.randn(rank, INPUTS, generator=generator) for _ in sizes],
                [torch.randn(size, rank, generator=generator) for size in sizes],
            )
            for name, sizes in outputs.items()
        }

    def manager():
        packed = {"qkv_proj": ["q", "k", "v"], "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
        made = SimpleNamespace(modules=modules(), packed_modules=packed)

        def activate_adapter(lora_id):
            for name, layer in made.modules.items():
                lora_a, lora_b = weights(lora_id, RANK - lora_id)[name]
                if name == "o_proj" and lora_id == 2:
                    layer.reset_lora(0)
                elif len(lora_a) == 1:
                    layer.set_lora(0, lora_a[0], lora_b[0])
                else:
                    layer.set_lora(0, lora_a, lora_b)
            return True

        made.activate_adapter = activate_adapter
        return made

    theirs, ours = manager(), manager()
    assert move_at_once(ours) == {"q", "k", "v", "o_proj", "in_proj", "in_proj_qkv", "in_proj_z"}
    changed = {name for name, layer in ours.modules.items() if "set_lora" in vars(layer)}
    assert changed == {"qkv_proj", "o_proj", "in_proj", "in_proj_qkvz"}
    for lora_id in (0, 1, 2):
        assert ours.activate_adapter(lora_id) is theirs.activate_adapter(lora_id) is True
        for name, layer in theirs.modules.items():
            for kind in ("lora_a_stacked", "lora_b_stacked"):
                for our, their in zip(getattr(ours.modules[name], kind), getattr(layer, kind), strict=True):
                    assert torch.equal(our, their)
