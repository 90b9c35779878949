"""An adapter's weights read in a few calls; without a GPU nothing is pinned."""

import json

import pytest

pytest.importorskip("safetensors.torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_infer._vllm.kernels.loading import pinned
from qlora_infer.errors import CorruptAdapterError


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from(list(pinned._DTYPES.values())), min_size=12, max_size=12),
    piece=st.integers(1, 200),
    cast=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    kept=st.sets(st.sampled_from([torch.float16, torch.bfloat16])),
)
def test_whatever_a_file_holds_is_read_and_cast(tmp_path_factory, shapes, dtypes, piece, cast, kept):
    """The same numbers, shapes and names, cast unless they stay; neighbours lie together up to a piece."""
    saved = {f"m{i}.lora_A.weight": torch.randn(shape).to(dtypes[i]) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("pinned") / "a.safetensors"
    save_file(saved, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "PIECE", cast.itemsize * piece)
        read = pinned.read_weights(path, cast, pin=False, kept=kept)
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        expected = tensor if tensor.dtype in kept else tensor.to(cast)
        assert read[name].dtype == expected.dtype
        assert torch.equal(read[name], expected)
        assert read[name].is_contiguous()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in read.values()}
    largest = 4 * max(piece, *(tensor.numel() for tensor in saved.values()))
    assert all(size <= largest for size in sizes.values())


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    """Three numbers of 16 bits before one of 32, as other writers than safetensors' own may put them."""
    header = {
        "a.lora_A.weight": {"dtype": "F16", "shape": [1, 3], "data_offsets": [0, 6]},
        "b.lora_A.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [6, 10]},
    }
    written = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    numbers = torch.ones(3, dtype=torch.float16).numpy().tobytes() + torch.ones(1).numpy().tobytes()
    path.write_bytes(len(written).to_bytes(8, "little") + written + numbers)
    read = pinned.read_weights(path, torch.bfloat16, pin=False)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "a.lora_A.weight": [[1.0, 1.0, 1.0]],
        "b.lora_A.weight": [[1.0]],
    }


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    """Its header says how long it should be."""
    path = tmp_path / "a.safetensors"
    save_file({"m.lora_A.weight": torch.ones(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptAdapterError):
        pinned.read_weights(path, torch.float16, pin=False)
