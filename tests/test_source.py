"""What a user writes as a source, and what it stands for."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_infer import AdapterSource
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError, UnsafeAdapterError
from qlora_infer.testing import fake_engine, write_adapter

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)


@given(
    org=names,
    repo=names,
    revision=st.none() | names,
    subfolder=st.none() | st.lists(names, min_size=1, max_size=3),
)
def test_a_hub_source_is_read_as_it_is_written(org, repo, revision, subfolder):
    """org/repo, @revision and :sub/folder are found in the text, and the text is given back."""
    folder = "/".join(subfolder) if subfolder else None
    text = f"{org}/{repo}" + (f"@{revision}" if revision else "") + (f":{folder}" if folder else "")
    source = AdapterSource.parse(text)
    assert (source.location, source.is_local) == (f"{org}/{repo}", False)
    assert (source.revision, source.subfolder) == (revision, folder)
    assert str(source) == text
    assert AdapterSource.parse(source) == source
    assert AdapterSource.parse(f"{org}/{repo}", revision=revision, subfolder=folder) == source


@given(st.text(max_size=60))
def test_any_text_is_a_source_or_a_value_error(text):
    """No text makes parse fail in any other way."""
    try:
        source = AdapterSource.parse(text)
    except ValueError:
        return
    assert source.is_local or source.location.count("/") == 1


@pytest.mark.parametrize("text", ["/a/b", "./a", "../a", "~/a", ".", "a/b/c", "a/b/c/d"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(text):
    """A path that does not exist says so, and is not taken for a Hub id."""
    source = AdapterSource.parse(text)
    assert source.is_local
    with pytest.raises(AdapterNotFoundError):
        source.resolve("x", default_token=None, allow_pickle=False)


@pytest.mark.parametrize(
    "text", ["", "name", "a b/c", "org/", "/".join(["..", ""])[:0], "org/repo:", "org/repo@", "s3:/x"]
)
def test_what_is_neither_is_refused(text):
    """Text that is no path and no Hub id is a ValueError that shows both forms."""
    with pytest.raises(ValueError, match="'org/repo'"):
        AdapterSource.parse(text)


def test_an_existing_folder_is_a_path(tmp_path, monkeypatch):
    """A folder called like a Hub id is taken for the folder."""
    write_adapter(tmp_path / "org" / "repo")
    monkeypatch.chdir(tmp_path)
    assert AdapterSource.parse("org/repo").is_local


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": "org/repo@v1", "revision": "v2"}, "contradicts"),
        ({"source": "org/repo:a", "subfolder": "b"}, "contradicts"),
        ({"source": "/tmp", "revision": "v1"}, "no revisions"),
        ({"source": "org/repo", "subfolder": "../up"}, "relative path"),
        ({"source": "org/repo", "subfolder": "/abs"}, "relative path"),
        ({"source": "org/repo:a/../../b"}, "relative path"),
        ({"source": "org/repo", "subfolder": ""}, "relative path"),
    ],
)
def test_contradictions_and_escapes_are_refused(arguments, match):
    """A keyword may not contradict the text, a folder has no revision, a subfolder stays inside."""
    with pytest.raises(ValueError, match=match):
        AdapterSource.parse(**arguments)


def test_a_token_is_never_printed():
    """Neither repr nor str of a source has its token."""
    source = AdapterSource.parse("org/repo", token="hf_secret")
    assert "hf_secret" not in repr(source) + str(source)


def test_a_folder_without_an_adapter_says_what_is_there(tmp_path):
    """A folder of adapters names its subfolders; a file says that a folder is meant."""
    write_adapter(tmp_path / "all" / "pirate")
    with fake_engine() as engine:
        with pytest.raises(AdapterNotFoundError, match=r"subfolders pirate: pass subfolder="):
            engine.load_adapter("x", tmp_path / "all")
        assert engine.load_adapter("x", tmp_path / "all", subfolder="pirate").rank == 8
        with pytest.raises(AdapterNotFoundError, match="is a file"):
            engine.load_adapter("y", tmp_path / "all" / "pirate" / "adapter_config.json")


def test_links_inside_the_folder_are_followed(tmp_path):
    """A link to another file of the same folder is no danger."""
    folder = write_adapter(tmp_path / "linked")
    (folder / "adapter_model.safetensors").rename(folder / "v2.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("v2.safetensors")
    with fake_engine() as engine:
        assert engine.load_adapter("x", folder).num_modules == 14


def test_a_folder_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    """A trainer that writes while the adapter is copied gets an error, not a mixture served."""
    from qlora_infer.adapters import snapshot

    folder = write_adapter(tmp_path / "moving")
    copy = snapshot._copy

    def copy_and_disturb(source, target, digest):
        size = copy(source, target, digest)
        if source.name == "adapter_model.safetensors":
            write_adapter(folder, seed=2)
        return size

    monkeypatch.setattr(snapshot, "_copy", copy_and_disturb)
    with fake_engine() as engine, pytest.raises(CorruptAdapterError, match="changed while it was read"):
        engine.load_adapter("x", folder)


def to_pickle(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    return folder


def test_a_pickled_adapter_is_converted_where_the_user_allows_it(tmp_path):
    """allow_pickle=True serves the same tensors as the safetensors file would have."""
    with fake_engine() as engine:
        folder = to_pickle(write_adapter(tmp_path / "old"))
        with pytest.raises(UnsafeAdapterError, match="allow_pickle=True"):
            engine.load_adapter("x", folder)
        loaded = engine.load_adapter("x", folder, allow_pickle=True)
        assert (loaded.num_modules, loaded.rank) == (14, 8)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.bin"]


def test_a_pickle_that_calls_something_is_refused_even_where_pickles_are_allowed(tmp_path):
    """A pickle that names a function is an error, and the function is not called."""
    pytest.importorskip("torch")
    witness = tmp_path / "called"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (witness,))

    folder = write_adapter(tmp_path / "evil")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
    with fake_engine() as engine, pytest.raises(CorruptAdapterError, match="not a pickle of tensors"):
        engine.load_adapter("x", folder, allow_pickle=True)
    assert not witness.exists()


def test_a_config_is_read_as_peft_writes_it(tmp_path):
    """Every field that PEFT's LoraConfig writes is understood, and none of its defaults is taken for a fault."""
    peft = pytest.importorskip("peft")
    from qlora_infer.adapters.manifest import read_manifest

    folder = write_adapter(tmp_path / "peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True).to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    assert read_manifest("x", folder).unsupported == ()
