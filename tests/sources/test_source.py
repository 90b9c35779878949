"""What a user writes as a source, and what it stands for."""

import json
import pickle
import zipfile
from pathlib import Path, PurePosixPath

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


texts = st.text(max_size=60) | st.text(alphabet="ab1/@:.~\\ -_*\0\n\u00e9\ud800", max_size=30)


@given(texts)
def test_any_text_is_a_source_or_a_value_error(text):
    """No text makes parse fail in any other way, and what a source is written as is read as that source."""
    try:
        source = AdapterSource.parse(text)
    except ValueError:
        return
    assert source.is_local or source.location.count("/") == 1
    assert AdapterSource.parse(str(source)) == source


@given(
    source=texts | st.builds(PurePosixPath, texts) | st.just("org/repo") | st.none() | st.binary() | st.integers(),
    revision=st.none() | names | texts | st.integers(),
    subfolder=st.none() | names | texts | st.binary(),
    token=st.none() | st.integers(),
)
def test_any_arguments_are_a_source_or_a_value_or_type_error(source, revision, subfolder, token):
    """Whatever comes in, parse gives a source that is read again from its text, a ValueError or a TypeError."""
    try:
        parsed = AdapterSource.parse(source, revision=revision, subfolder=subfolder, token=token)
    except (ValueError, TypeError):
        return
    assert AdapterSource.parse(str(parsed)) == parsed
    assert AdapterSource.parse(parsed) == parsed


@given(texts)
def test_a_path_object_is_always_a_path(text):
    """A PathLike is never taken for a Hub id."""
    assert AdapterSource.parse(PurePosixPath(text)).is_local
    assert AdapterSource.parse(PurePosixPath("org/repo")) == AdapterSource.parse("./org/repo")


@pytest.mark.parametrize(
    "text", ["/a/b", "./a", "../a", "~/a", ".", "a/b/c", "a/b/c/d", "a/b/c@v1", "a\\b", "org/repo:a\\b", "org/repo/"]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(text):
    """A path that does not exist says so, and is not taken for a Hub id."""
    source = AdapterSource.parse(text)
    assert source.is_local
    with pytest.raises(AdapterNotFoundError):
        source.resolve("x")


@pytest.mark.parametrize(
    "text", ["", "name", "a b/c", "org/", "org/repo:", "org/repo@", "s3:/x", "nosuch://a/b", "é/a"]
)
def test_what_is_neither_is_refused(text):
    """Text that is no path, no URL and no Hub id is a ValueError that shows the forms."""
    with pytest.raises(ValueError, match="'org/repo'"):
        AdapterSource.parse(text)


@pytest.mark.parametrize("source", [None, 1, b"org/repo", ["org/repo"]])
def test_what_is_no_text_and_no_path_is_a_type_error(source):
    """Neither bytes nor anything else is a source."""
    with pytest.raises(TypeError):
        AdapterSource.parse(source)


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    """A folder or file called like a Hub id is taken for it, with and without a subfolder, and has no revision."""
    write_adapter(tmp_path / "org" / "repo" / "sub")
    (tmp_path / "org" / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert AdapterSource.parse("org/repo") == AdapterSource.parse("./org/repo")
    assert AdapterSource.parse("org/repo:sub").resolve("x") == Path("org/repo/sub")
    assert AdapterSource.parse("org/repo", subfolder="sub") == AdapterSource.parse("org/repo:sub")
    with pytest.raises(ValueError, match="no revisions"):
        AdapterSource.parse("org/repo@v1")
    with pytest.raises(AdapterNotFoundError, match="org/file is a file"):
        AdapterSource.parse("org/file").resolve("x")
    assert not AdapterSource("org/repo").is_local
    (tmp_path / "org" / "repo:odd").mkdir()
    assert AdapterSource.parse("org/repo:odd").location == "./org/repo:odd"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": "org/repo@v1", "revision": "v2"}, "contradicts"),
        ({"source": "org/repo:a", "subfolder": "b"}, "contradicts"),
        ({"source": "/tmp", "revision": "v1"}, "no revisions"),
        ({"source": Path("a"), "revision": "v1"}, "no revisions"),
        ({"source": "org/repo", "revision": ""}, "branch or tag"),
        ({"source": "org/repo", "revision": "a:b"}, "branch or tag"),
        ({"source": "org/repo@../../refs"}, "branch or tag"),
        ({"source": "org/repo", "subfolder": "../up"}, "relative path"),
        ({"source": "org/repo", "subfolder": "/abs"}, "relative path"),
        ({"source": "org/repo", "subfolder": "a//b"}, "relative path"),
        ({"source": "org/repo", "subfolder": "a/"}, "relative path"),
        ({"source": "org/repo:a/../../b"}, "relative path"),
        ({"source": "org/repo", "subfolder": ""}, "relative path"),
        ({"source": "/tmp", "subfolder": "../up"}, "relative path"),
    ],
)
def test_contradictions_and_escapes_are_refused(arguments, match):
    """A keyword may not contradict the text, a folder has no revision, a subfolder stays inside."""
    with pytest.raises(ValueError, match=match):
        AdapterSource.parse(**arguments)


def test_a_subfolder_of_a_path_is_the_paths_end():
    """A path and its subfolder are one path, so that its text names the same folder again."""
    assert AdapterSource.parse("/a", subfolder="b/c") == AdapterSource.parse("/a/b/c")
    assert AdapterSource.parse("/", subfolder="b") == AdapterSource.parse("/b")


def test_a_keyword_may_repeat_what_the_text_says():
    """Only a different revision or subfolder contradicts."""
    source = AdapterSource.parse("org/repo@v1:a")
    assert AdapterSource.parse("org/repo@v1:a", revision="v1", subfolder="a") == source
    assert AdapterSource.parse(source, revision="v1", subfolder="a") == source
    assert AdapterSource.parse(source, token="hf_x").token == "hf_x"
    with pytest.raises(ValueError, match="contradicts"):
        AdapterSource.parse(source, revision="v2")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"location": "name"}, ValueError),
        ({"location": "org/repo@v1"}, ValueError),
        ({"location": "\u00e9/a"}, ValueError),
        ({"location": "org/repo", "subfolder": "../../etc"}, ValueError),
        ({"location": "org/repo", "revision": "../../etc"}, ValueError),
        ({"location": "./a", "revision": "v1"}, ValueError),
        ({"location": Path("a")}, TypeError),
        ({"location": "org/repo", "token": b"hf_x"}, TypeError),
    ],
)
def test_a_source_that_is_made_directly_is_checked_too(arguments, error):
    """There is no way to a source that leaves its folder."""
    with pytest.raises(error):
        AdapterSource(**arguments)


def test_a_token_is_never_printed():
    """Neither repr nor str of a source, nor an error about it, has its token."""
    source = AdapterSource.parse("org/repo", token="hf_secret")
    with pytest.raises(ValueError, match="branch or tag") as caught:
        AdapterSource.parse(source, revision="a b")
    assert "hf_secret" not in repr(source) + str(source) + repr(caught.value)


def test_a_folder_without_an_adapter_says_what_is_there(tmp_path):
    """A folder of adapters names its subfolders; a file says that a folder is meant."""
    write_adapter(tmp_path / "all" / "pirate")
    with fake_engine() as engine:
        with pytest.raises(AdapterNotFoundError, match=r"subfolders pirate: pass subfolder="):
            engine.load_adapter("x", tmp_path / "all")
        assert engine.load_adapter("x", tmp_path / "all", subfolder="pirate").rank == 8
        with pytest.raises(AdapterNotFoundError, match="is a file"):
            engine.load_adapter("y", tmp_path / "all" / "pirate" / "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("~no-such-user/a", "'~no-such-user/a' cannot be opened as a folder: "),
        ("/" + "a" * 5000, "cannot be opened as a folder: File name too long"),
        ("/a\0b", "no folder|cannot be opened"),
    ],
)
def test_a_path_that_cannot_be_opened_says_why(text, match):
    """Every fault of a path is an AdapterNotFoundError, and none is an error of the operating system."""
    with pytest.raises(AdapterNotFoundError, match=match):
        AdapterSource.parse(text).resolve("x")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """~ is expanded when the source is resolved, and printed as it was written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_adapter(tmp_path / "adapters" / "pirate")
    source = AdapterSource.parse("~/adapters", subfolder="pirate")
    assert str(source) == "~/adapters/pirate"
    assert source.resolve("x") == folder


def test_links_inside_the_folder_are_followed(tmp_path):
    """A link to another file of the same folder is no danger."""
    folder = write_adapter(tmp_path / "linked")
    (folder / "adapter_model.safetensors").rename(folder / "v2.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("v2.safetensors")
    with fake_engine() as engine:
        assert engine.load_adapter("x", folder).num_modules == 14


def test_a_folder_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    """A trainer that writes while the adapter is copied gets an error, not a mixture served."""
    from qlora_infer.files import snapshot

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
    torch, load_file = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").load_file
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


def stretched(torch):
    """A matrix of 4 MiB whose storage has one number."""
    return {"a": torch.zeros(1).expand(1024, 1024)}


def repeated(torch):
    """One matrix under many names."""
    matrix = torch.zeros(64, 64)
    return {f"a{number}": matrix for number in range(100)}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (stretched, "'a' has 4194304 bytes, of which the file holds 4: save the adapter again"),
        (repeated, "its tensors have 1638400 bytes, and the whole file .*: save the adapter again"),
        (lambda _: {"a": [1.0]}, "'a' is no tensor of numbers: save the adapter again"),
        (lambda torch: {"a": torch.zeros(2, 2).to_sparse()}, "'a' is no tensor of numbers"),
        (lambda torch: [torch.zeros(1)], "it holds a list: save the adapter again"),
    ],
)
def test_a_pickle_never_takes_more_memory_than_its_file(tensors, match, tmp_path):
    """Tensors that a small file makes large, and what is no tensor, are refused before anything is copied."""
    folder = to_pickle(write_adapter(tmp_path / "large"))
    torch = pytest.importorskip("torch")
    torch.save(tensors(torch), folder / "adapter_model.bin")
    with fake_engine() as engine, pytest.raises(CorruptAdapterError, match=f"not a pickle of tensors by name: {match}"):
        engine.load_adapter("x", folder, allow_pickle=True)


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    """torch never compresses what it saves, and a thousand times the file's size could come out."""
    torch = pytest.importorskip("torch")
    folder = to_pickle(write_adapter(tmp_path / "packed"))
    path = folder / "adapter_model.bin"
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with fake_engine() as engine, pytest.raises(CorruptAdapterError, match="it is compressed: save the adapter again"):
        engine.load_adapter("x", folder, allow_pickle=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_a_pickled_adapter_does_not_leave_its_folder(name, tmp_path):
    """allow_pickle=True allows pickles, and no link to a file that is not the adapter's own."""
    folder = to_pickle(write_adapter(tmp_path / "old"))
    (folder / name).rename(folder / "real")
    (folder / name).symlink_to("real")
    with fake_engine() as engine:
        assert engine.load_adapter("x", folder, allow_pickle=True).rank == 8
        (folder / "real").rename(tmp_path / "real")
        (folder / name).unlink()
        (folder / name).symlink_to("../real")
        with pytest.raises(UnsafeAdapterError, match=f"{name} is a link to a place outside"):
            engine.load_adapter("y", folder, allow_pickle=True)


@pytest.mark.parametrize("other", [".reference", ""])
def test_the_tensors_of_two_adapters_are_not_mixed(other, tmp_path):
    """A model's state_dict has all of its adapters: their names are told, and one of them is to be passed."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    folder = write_adapter(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    some = {name.replace(".weight", f"{other}.weight"): tensors[name] for name in list(tensors)[:3]}
    words = "'reference'" if other else "one without a name"
    with fake_engine() as engine:
        assert engine.load_adapter("x", tensors=named, config=config).num_modules == 14
        before = engine.adapters
        with pytest.raises(CorruptAdapterError, match=rf"several adapters \(.*{words}.*\): pass those of one, as peft"):
            engine.load_adapter("x", tensors={**named, **some}, config=config)
        assert engine.adapters == before


def test_a_config_is_read_as_peft_writes_it(tmp_path):
    """Every field that PEFT's LoraConfig writes is understood, and none of its defaults is taken for a fault."""
    peft = pytest.importorskip("peft")
    from qlora_infer.files.manifest import read_manifest

    folder = write_adapter(tmp_path / "peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True).to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    assert read_manifest("x", folder).unsupported == ()
