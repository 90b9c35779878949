"""LoRA's kernel for GPUs against float64: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as environment:
    if DEVICE == "cpu":
        environment.setenv("TRITON_INTERPRET", "1")  # read where kernels are decorated, and when they run
    from qlora_infer._vllm.kernels.cpu.tiles import tiles_of
    from qlora_infer._vllm.kernels.cuda import fused


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as environment:
        if DEVICE == "cpu":
            environment.setenv("TRITON_INTERPRET", "1")
        yield


PDL = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
#: Of the length of the result: the numbers' own precision, which the first product and the result are rounded to.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case:
    """A module's weights and a batch, in memory that outlives the batch."""

    def __init__(self, *, sizes, num_inputs, rank, num_slots=3, max_rows=96, dtype=torch.float16, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.sizes, self.rank, self.num_slots = dtype, sizes, rank, num_slots
        self.a = tuple(self.draw(num_slots, 1, rank, num_inputs) for _ in sizes)
        self.b = tuple(self.draw(num_slots, 1, size, rank) for size in sizes)
        self.module = fused.Module.of(self.a, self.b)
        self.batch = fused.Batch(max_rows, num_slots, DEVICE)
        self.scratch = fused.Scratch(max_rows, num_slots, rank, len(sizes), DEVICE)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random).to(self.dtype).to(DEVICE)

    def rows(self, num_rows, num_columns, *, stride=None):
        """Rows that lie further apart than they are long."""
        return self.draw(num_rows, stride or num_columns)[:, :num_columns]

    def expected(self, y, x, slots, changes=None, signed=torch.Tensor.double):
        expected = signed(y.double())
        for slot in range(self.num_slots):
            rows = torch.from_numpy(np.flatnonzero(slots == slot)).to(DEVICE)
            for piece, (out, a, b) in enumerate(zip(expected.split(self.sizes, dim=1), self.a, self.b)):
                if changes is None or (slot, piece) in changes:
                    x_rows, a_slot, b_slot = (signed(each.double()) for each in (x[rows], a[slot, 0], b[slot, 0]))
                    out[rows] += x_rows @ a_slot.T @ b_slot.T
        return expected

    def check(self, slots, *, heads=None, changes=None, x=None, y=None):
        slots = np.asarray(slots, np.int32)
        x = self.rows(len(slots), self.a[0].shape[-1]) if x is None else x
        y = self.rows(len(slots), sum(self.sizes)) if y is None else y
        before, expected = y.clone(), self.expected(y, x, slots, changes)
        self.batch.update(slots, heads)
        fused.add_lora(y, x, self.module, self.batch, self.scratch, pdl=PDL)
        # Terms that cancel each other leave their roundings: the error is held against what they are without signs.
        terms = self.expected(before, x, slots, changes, signed=torch.abs).norm()
        assert float((y.double() - expected).norm() / terms) < TOLERANCE[self.dtype] / 3
        assert torch.equal(y[slots < 0], before[slots < 0])
        return y


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 16, 24, 48, 100]), min_size=1, max_size=3),
    num_inputs=st.sampled_from([1, 40, 64, 576]),
    rank=st.sampled_from([1, 4, 8, 16, 32]),
    slots=st.lists(st.integers(-1, 2), min_size=1, max_size=90),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]) if DEVICE == "cuda" else st.just(torch.float16),
    gap=st.sampled_from([0, 3, 16]),
)
def test_any_batch_is_what_float64_says(sizes, num_inputs, rank, slots, dtype, gap):
    """Any shapes, ranks and mixture of adapters and none, strided rows: float64's result; base rows bit for bit."""
    case = Case(sizes=sizes, num_inputs=num_inputs, rank=rank, dtype=dtype)
    x = case.rows(len(slots), num_inputs, stride=num_inputs + gap)
    y = case.rows(len(slots), sum(sizes), stride=sum(sizes) + gap)
    case.check(slots, x=x, y=y)


def test_batches_follow_each_other_in_the_same_memory():
    """Larger, smaller and empty batches in turn: nothing of an earlier one is left in a later one."""
    case = Case(sizes=[48, 16], num_inputs=64, rank=8)
    for slots in ([0] * 40 + [1] * 30, [2], [-1] * 5, [2, -1, 0], list(range(3)) * 20, [1] * 96):
        case.check(slots)


def test_a_graph_of_more_rows_serves_a_batch_of_fewer():
    """Rows beyond those of the batch, which a padded step has, stay as they are."""
    case = Case(sizes=[32], num_inputs=64, rank=8)
    case.check([0] * 70)
    case.batch.update(np.asarray([1, -1, 2], np.int32))
    x, y = case.rows(70, 64), case.rows(70, 32)
    before = y.clone()
    fused.add_lora(y, x, case.module, case.batch, case.scratch, pdl=PDL)
    assert torch.equal(y[3:], before[3:])
    assert torch.equal(y[1], before[1])
    assert not torch.equal(y[0], before[0])


@pytest.mark.parametrize("num_rows", [3, 40])
def test_a_row_does_not_depend_on_the_rows_beside_it(num_rows):
    """A row gets the same bits alone as among others of all adapters, in steps that are cut up alike."""
    case = Case(sizes=[48, 48], num_inputs=192, rank=16, max_rows=64)
    x, y = case.rows(num_rows, 192), case.rows(num_rows, 96)
    slots = np.arange(num_rows, dtype=np.int32) % 4 - 1
    together = case.check(slots, x=x, y=y.clone())
    for row in range(3):
        alone = case.check(slots[row : row + 1], x=x[row : row + 1], y=y[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])


def test_an_adapter_costs_its_own_rank():
    """With its rank told, what lies beyond it in the stacked weights is not even read: garbage there changes nothing."""
    case = Case(sizes=[32, 16], num_inputs=64, rank=32)
    for a, b in zip(case.a, case.b):
        a[:, :, 8:] = float("nan")
        b[:, :, :, 8:] = float("nan")
    slots = np.asarray([0, 1, -1, 2, 2], np.int32)
    x, y = case.rows(5, 64), case.rows(5, 48)
    case.batch.update(slots, dict.fromkeys(range(3), (8, -1)))
    fused.add_lora(y, x, case.module, case.batch, case.scratch, pdl=PDL)
    assert not y.isnan().any()


def test_slices_that_an_adapter_does_not_change_are_left_out():
    """An adapter without weights for a slice leaves its outputs bit for bit as they were, whatever the slot holds."""
    case = Case(sizes=[32, 16], num_inputs=64, rank=8)
    case.a[1][0] = float("nan")
    slots = [0, 1, 0, -1]
    y = case.check(slots, heads={0: (8, 0b01), 1: (8, 0b10)}, changes={(0, 0), (1, 1)})
    assert not y.isnan().any()


def test_an_embedding_has_its_first_product_already():
    """With the rows of A looked up, only the second product is made."""
    case = Case(sizes=[48], num_inputs=16, rank=16)
    slots = np.asarray([0, -1, 2, 1] * 6, np.int32)
    shrunk, y = case.rows(24, 16), case.rows(24, 48)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += shrunk[row].double() @ case.b[0][slot, 0].double().T
    case.batch.update(slots)
    fused.add_lora(y, shrunk, case.module, case.batch, case.scratch, is_shrunk=True, pdl=PDL)
    assert torch.allclose(y.double(), expected, atol=2e-2, rtol=2e-3)


def test_writing_instead_of_adding():
    """With ``add=False`` rows with an adapter become what it adds; the others stay."""
    case = Case(sizes=[32], num_inputs=64, rank=8)
    slots = np.asarray([0, -1, 1], np.int32)
    x, y = case.rows(3, 64), case.rows(3, 32)
    before = y.clone()
    case.batch.update(slots)
    fused.add_lora(y, x, case.module, case.batch, case.scratch, add=False, pdl=PDL)
    expected = case.expected(torch.zeros_like(y), x, slots)
    assert torch.allclose(y[[0, 2]].double(), expected[[0, 2]], atol=3e-2, rtol=3e-3)
    assert torch.equal(y[1], before[1])


@given(slots=st.lists(st.integers(-1, 4), max_size=200), block_m=st.sampled_from([16, 32, 64]))
def test_tiles_hold_each_row_once(slots, block_m):
    """Every row with an adapter is in one tile, of its slot; a tile has no more rows than it may, and no tile is lost."""
    tiles = tiles_of(np.asarray(slots, np.int32), block_m)
    rows = [(int(row), int(tile[0])) for tile in tiles for row in tile[4 : 4 + tile[1]]]
    assert sorted(rows) == [(row, slot) for row, slot in enumerate(slots) if slot >= 0]
    assert len(tiles) <= fused.most_tiles(len(slots), block_m, 5)
    assert all(1 <= tile[1] <= block_m for tile in tiles)


def test_settings_fit_the_memory_that_is_there():
    """Every setting's tiles exist for the steps that it is for, and its partial sums have room."""
    for by_rows in fused.SETTINGS.values():
        for most_rows, chosen in by_rows.items():
            assert most_rows <= fused.MOST_ROWS[chosen.block_m]
            for num_inputs in (1, 576, 4096, 14336, 28672):
                splits = chosen.splits(num_inputs)
                assert splits * chosen.block_m <= fused.SUMS_OF_TILE
                assert splits.bit_count() == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_infer._vllm.kernels.cuda import fused

kernel, chosen = fused.lora_kernel, fused.settings_for(64, 16)
names = kernel.arg_names
pointers = {"x": "*fp16", "y": "*fp16", "a_pointers": "*i64", "b_pointers": "*i64", "sums": "*i64", "rounds": "*i64"}
pointers |= {"tiles": "*i32", "blocks": "*i32"}
integers = ["num_tiles", "num_blocks", "K", "chunk_k", "x_stride", "y_stride", "a_slot_stride", "first_bit"]
constants = dict(
    SLICES=3, SPLITS=chosen.splits(4096), RANK=16, BLOCK_R=16, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
    BLOCK_K=chosen.block_k, SUMS=4096, AT_ONCE=8, EVEN_K=True, ALIGNED=True, SHRUNK=False, ADD=True, PDL=True,
    launch_pdl=True,
)
signature = {name: "constexpr" for name in names} | pointers | {name: "i32" for name in integers}
multiples = [*pointers, "K", "x_stride", "y_stride", "a_slot_stride"]
source = ASTSource(
    fn=kernel,
    signature=signature,
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 4}).asm["ptx"])
"""


def test_weights_are_read_16_bytes_at_a_time():
    """Compiled for Hopper, the kernel reads A and x in asynchronous copies, and no single numbers of 16 bits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "cp.async.cg.shared.global" in done.stdout
    assert "ld.global.b16" not in done.stdout
    assert "ld.global.v4.b32" in done.stdout


def test_compiled_layers_give_what_they_give_uncompiled():
    """torch.compile takes what vLLM's LoRA layers call as one graph, and each model's rows keep their own adapters."""
    script = Path(__file__).with_name("compiled_layers.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) in (6, 12)
    assert max(differences) < TOLERANCE[torch.float16]
