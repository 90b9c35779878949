"""Adapters' tensors in pieces of pinned memory; without a GPU nothing is pinned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_infer.kernels import pieces


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32]), min_size=12, max_size=12),
    piece=st.integers(1, 200),
    order=st.randoms(use_true_random=False),
)
def test_tensors_are_pinned_in_pieces(tmp_path_factory, shapes, dtypes, piece, order):
    """Whatever a file holds, in whatever order it is named: the same numbers, neighbours together up to a piece."""
    given = {f"m{i}.lora_A.weight": torch.randn(shape).to(dtypes[i]) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("pieces") / "a.safetensors"
    save_file(given, path)
    names = list(given)
    order.shuffle(names)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 2 * piece)
        cast = pieces.in_pieces(tensors, torch.float16, pin=False)
    assert list(cast) == names
    for name, tensor in given.items():
        assert torch.equal(cast[name], tensor.half())
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cast.values()}
    largest = max(2 * piece, *(2 * tensor.numel() for tensor in given.values()))
    assert all(size <= largest for size in sizes.values())
