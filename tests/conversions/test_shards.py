"""Weights in several files: merged into one, from every source, or refused for the fault that they have."""

import json

import numpy as np
import pytest
from effects import make_copy

from qlora_infer.conversions import shards
from qlora_infer.errors import AdapterError, AdapterNotFoundError, CorruptAdapterError, UnsafeAdapterError
from qlora_infer.files import content
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.testing import fake_engine, write_adapter

WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


def split(folder, *, num_files=3, index=INDEX):
    """Split an adapter's weights as transformers' ``save_pretrained`` does, which writes the index under this name."""
    tensors = map_tensors("test", folder / WEIGHTS)
    names = list(tensors)
    places = {}
    for number in range(num_files):
        file = f"adapter_model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        write_tensors(folder / file, {name: np.array(tensors[name]) for name in part})
        places |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=2, sort_keys=True)
        (folder / index).write_text(text)
    return folder


def changed_index(folder, change, index=INDEX):
    content = json.loads((folder / index).read_text())
    change(content["weight_map"])
    (folder / index).write_text(json.dumps(content))


@pytest.mark.parametrize("index", [INDEX, "adapter_model.safetensors.index.json", None])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_merged_adapter_is_the_one_that_was_split(dtype, index, tmp_path):
    """Every tensor is there, bit for bit, in one file and in the same order, so that the digest is that of the whole."""
    whole, manifest, _ = make_copy(write_adapter(tmp_path / "whole", dtype=dtype), tmp_path / "a")
    merged, found, _ = make_copy(split(write_adapter(tmp_path / "split", dtype=dtype), index=index), tmp_path / "b")
    assert {path.name for path in merged.folder.iterdir()} == {"adapter_config.json", WEIGHTS}
    assert found.modules == manifest.modules
    expected = map_tensors("test", whole.folder / WEIGHTS)
    for name, tensor in map_tensors("test", merged.folder / WEIGHTS).items():
        assert np.array_equal(tensor, expected.pop(name))
    assert not expected
    assert (whole.format, merged.format) == ("PEFT", "PEFT, in 3 files")


def test_an_engine_serves_it_and_its_digest_stays(tmp_path):
    """The same files are the same version, whatever the index is called; other numbers are another."""
    with fake_engine() as engine:
        first = engine.load_adapter("pirate", split(write_adapter(tmp_path / "one")))
        assert (
            engine.load_adapter("pirate", split(write_adapter(tmp_path / "two"), index=None)).version == first.version
        )
        assert engine.load_adapter("pirate", split(write_adapter(tmp_path / "three", seed=1))).digest != first.digest


def test_transformers_writes_it_so(tmp_path):
    """A model with an adapter, saved by transformers with a small max_shard_size, is such a folder."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.add_adapter(peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("adapter_model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "split" / INDEX).exists()
    model.save_pretrained(tmp_path / "whole")
    merged, found, _ = make_copy(tmp_path / "split", tmp_path / "a")
    whole, manifest, _ = make_copy(tmp_path / "whole", tmp_path / "b")
    assert found.modules == manifest.modules
    expected = map_tensors("test", whole.folder / WEIGHTS)
    found = map_tensors("test", merged.folder / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def remove_one(folder):
    (folder / "adapter_model-00002-of-00003.safetensors").unlink()


def add_other(folder):
    (folder / "adapter_model-00001-of-00002.safetensors").write_bytes(b"")


def repeat(folder):
    content = (folder / "adapter_model-00001-of-00003.safetensors").read_bytes()
    (folder / "adapter_model-00002-of-00003.safetensors").write_bytes(content)


def link_out(folder):
    path = folder / "adapter_model-00003-of-00003.safetensors"
    path.rename(folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")


def truncate(folder):
    path = folder / "adapter_model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def is_folder(folder):
    path = folder / "adapter_model-00002-of-00003.safetensors"
    path.unlink()
    path.mkdir()


def lead_out(folder):
    changed_index(folder, lambda places: places.update({next(iter(places)): "../../secret.safetensors"}))


def name_less(folder):
    changed_index(folder, lambda places: places.pop(next(iter(places))))


def no_map(folder):
    (folder / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("break_it", "error", "match"),
    [
        (remove_one, CorruptAdapterError, r"2 of the 3 files .* \(without 00002\)"),
        (add_other, CorruptAdapterError, "split in two ways"),
        (repeat, CorruptAdapterError, "as another file has"),
        (link_out, UnsafeAdapterError, "link to a place outside"),
        (truncate, CorruptAdapterError, "00002-of-00003.safetensors is not a whole safetensors file"),
        (is_folder, UnsafeAdapterError, "not a regular file"),
        (lead_out, CorruptAdapterError, "secret.safetensors'; an adapter's files are"),
        (name_less, CorruptAdapterError, "differ in 1 tensors"),
        (no_map, CorruptAdapterError, "no 'weight_map'"),
    ],
)
def test_a_fault_is_named(break_it, error, match, tmp_path):
    """What is missing, repeated, cut off, a link, or led out of the folder ends in an error that says so."""
    folder = split(write_adapter(tmp_path / "split"))
    break_it(folder)
    with pytest.raises(error, match=match):
        make_copy(folder, tmp_path / "copy")


def test_the_index_of_a_model_beside_it_is_not_its_own(tmp_path):
    """A folder may hold a whole model, too, whose index has the name that transformers gives an adapter's."""
    folder = split(write_adapter(tmp_path / "split"), index=None)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert make_copy(folder, tmp_path / "copy")[0].format == "PEFT, in 3 files"


def test_the_bounds_are_for_all_files_together(tmp_path, monkeypatch):
    """The bytes of all files count as those of one do, and there are so many at most."""
    folder = split(write_adapter(tmp_path / "split"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(content, "MAX_WEIGHTS_BYTES", size - 1)
    with pytest.raises(CorruptAdapterError, match="is too large"):
        make_copy(folder, tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "MAX_SHARDS", 2)
    with pytest.raises(CorruptAdapterError, match="in 3 files, 2 are allowed"):
        make_copy(folder, tmp_path / "b")


def test_an_index_alone_names_what_is_missing(tmp_path):
    """The next step is to copy the files that it names."""
    folder = split(write_adapter(tmp_path / "split"), index="adapter_model.safetensors.index.json")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(AdapterNotFoundError, match="none of the files that it names"):
        make_copy(folder, tmp_path / "copy")
    assert issubclass(AdapterNotFoundError, AdapterError)
