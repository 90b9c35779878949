"""What a user writes as a source, and what it stands for."""

import json
import pickle
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_infer import FolderSource, HubSource, TensorSource, parse_source
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError, UnsafeAdapterError
from qlora_infer.files.kinds.folder import next_step
from qlora_infer.testing import fake_engine, write_adapter

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)


def fetch(source, into):
    parse_source(source).fetch("x", into, token=None, allow_pickle=False)


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
    source = parse_source(text)
    assert source == HubSource(f"{org}/{repo}", revision=revision, subfolder=folder)
    assert str(source) == text
    assert parse_source(source) is source


texts = st.text(max_size=60) | st.text(alphabet="ab1/@:.~\\ -_*\0\n\u00e9\ud800", max_size=30)


@given(texts)
def test_any_text_is_a_source_or_a_value_error(text):
    """No text makes parse_source fail in any other way, and what a source is written as is read as that source."""
    try:
        source = parse_source(text)
    except ValueError:
        return
    assert isinstance(source, FolderSource) or source.repo_id.count("/") == 1
    assert parse_source(str(source)) == source


@given(
    texts | st.builds(PurePosixPath, texts) | st.none() | st.binary() | st.integers() | st.dictionaries(names, names)
)
def test_anything_is_a_source_or_a_value_or_type_error(value):
    """Whatever comes in, parse_source gives a source that is read again from its text, a ValueError or a TypeError."""
    try:
        parsed = parse_source(value)
    except (ValueError, TypeError):
        return
    assert parse_source(str(parsed)) == parsed


@given(texts)
def test_a_path_object_is_always_a_path(text):
    """A PathLike is never taken for a Hub id."""
    assert isinstance(parse_source(PurePosixPath(text)), FolderSource)
    assert parse_source(PurePosixPath("org/repo")) == parse_source("./org/repo")


@pytest.mark.parametrize(
    "text", ["/a/b", "./a", "../a", "~/a", ".", "a/b/c", "a/b/c/d", "a/b/c@v1", "a\\b", "org/repo:a\\b", "org/repo/"]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(text, tmp_path):
    """A path that does not exist says so, and is not taken for a Hub id."""
    assert isinstance(parse_source(text), FolderSource)
    with pytest.raises(AdapterNotFoundError):
        fetch(text, tmp_path / "copy")


@pytest.mark.parametrize(
    "text", ["", "name", "a b/c", "org/", "org/repo:", "org/repo@", "s3:/x", "nosuch://a/b", "é/a"]
)
def test_what_is_neither_is_refused(text):
    """Text that is no path, no URL and no Hub id is a ValueError that shows the forms."""
    with pytest.raises(ValueError, match="'org/repo'"):
        parse_source(text)


@pytest.mark.parametrize("source", [None, 1, b"org/repo", ["org/repo"]])
def test_what_is_no_text_and_no_path_is_a_type_error(source):
    """Neither bytes nor anything else is a source."""
    with pytest.raises(TypeError, match="a source must be text, a path, a PEFT model, or a source"):
        parse_source(source)


def test_tensors_alone_are_no_source():
    """A state dict has no rank and no alpha; the error names the class that takes both."""
    with pytest.raises(TypeError, match=r"pass TensorSource\(tensors, config\)"):
        parse_source({"a.lora_A.weight": 1})


def test_a_source_of_your_own_is_loaded_like_any_other(tmp_path):
    """An object with fetch, refetch_cost and a text is a source; what it writes is checked like any other."""

    class Written:
        refetch_cost = None

        def fetch(self, adapter, into, *, token, allow_pickle):
            write_adapter(into, rank=4)

        def __str__(self):
            return "written here"

    class Broken(Written):
        def fetch(self, adapter, into, *, token, allow_pickle):
            write_adapter(into)
            (into / "adapter_config.json").write_text("{")

    with fake_engine() as engine:
        loaded = engine.load_adapter("x", Written())
        assert (loaded.rank, loaded.source) == (4, "written here")
        with pytest.raises(CorruptAdapterError, match=r"^written here/adapter_config\.json is not valid JSON"):
            engine.load_adapter("x", Broken())
        assert engine.adapters == {"x": loaded}


@pytest.mark.parametrize("adapters", [["./pirate"], "./pirate", {"./pirate"}])
def test_adapters_without_names_are_refused_at_once(adapters):
    """The error shows what is wanted: a mapping of names to sources."""
    with pytest.raises(TypeError, match=r'adapters must map names to sources, such as \{"pirate": "./pirate"\}, got '):
        fake_engine(adapters=adapters)


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    """A folder or file called like a Hub id is taken for it, with and without a subfolder, and has no revision."""
    write_adapter(tmp_path / "org" / "repo" / "sub")
    (tmp_path / "org" / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/repo") == FolderSource("./org/repo") == FolderSource("org/repo")
    assert parse_source("org/repo:sub") == FolderSource("./org/repo/sub")
    with pytest.raises(ValueError, match="no revisions"):
        parse_source("org/repo@v1")
    with pytest.raises(ValueError, match="relative path"):
        parse_source("org/repo:../sub")
    with pytest.raises(AdapterNotFoundError, match="org/file is a file"):
        fetch("org/file", tmp_path / "copy")
    (tmp_path / "org" / "repo:odd").mkdir()
    assert parse_source("org/repo:odd") == FolderSource("./org/repo:odd")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: parse_source("org/repo@../../refs"), ValueError, "branch or tag"),
        (lambda: parse_source("org/repo:a/../../b"), ValueError, "relative path"),
        (lambda: HubSource("name"), ValueError, "'org/repo'"),
        (lambda: HubSource("org/repo@v1"), ValueError, "'org/repo'"),
        (lambda: HubSource("\u00e9/a"), ValueError, "'org/repo'"),
        (lambda: HubSource(Path("org/repo")), TypeError, "repo_id"),
        (lambda: HubSource("org/repo", revision=""), ValueError, "branch or tag"),
        (lambda: HubSource("org/repo", revision="a:b"), ValueError, "branch or tag"),
        (lambda: HubSource("org/repo", revision="../../etc"), ValueError, "branch or tag"),
        (lambda: HubSource("org/repo", revision=1), TypeError, "revision"),
        (lambda: HubSource("org/repo", subfolder="../up"), ValueError, "relative path"),
        (lambda: HubSource("org/repo", subfolder="/abs"), ValueError, "relative path"),
        (lambda: HubSource("org/repo", subfolder="a//b"), ValueError, "relative path"),
        (lambda: HubSource("org/repo", subfolder="a/"), ValueError, "relative path"),
        (lambda: HubSource("org/repo", subfolder=""), ValueError, "relative path"),
        (lambda: HubSource("org/repo", token=b"hf_x"), TypeError, "token must be text, got bytes"),
        (lambda: FolderSource(""), ValueError, "current folder"),
        (lambda: FolderSource(b"a"), TypeError, "must be text"),
    ],
)
def test_a_source_never_leaves_its_place(make, error, match):
    """A revision is a revision, a subfolder stays inside, and there is no way around these checks."""
    with pytest.raises(error, match=match):
        make()


def test_a_token_is_never_printed():
    """Neither repr nor str of a source, nor an error about it, has its token."""
    source = HubSource("org/repo", token="hf_secret")
    with pytest.raises(ValueError, match="branch or tag") as caught:
        HubSource("org/repo", revision="a b", token="hf_secret")
    with pytest.raises(TypeError) as wrong:
        HubSource("org/repo", token=["hf_secret"])
    assert "hf_secret" not in repr(source) + str(source) + repr(caught.value) + repr(wrong.value)


def test_a_folder_without_an_adapter_says_what_is_there(tmp_path):
    """A folder of adapters names its subfolders; a file says that a folder is meant."""
    write_adapter(tmp_path / "all" / "pirate")
    with fake_engine() as engine:
        with pytest.raises(AdapterNotFoundError, match=rf"there are adapters inside it: name {tmp_path}/all/pirate"):
            engine.load_adapter("x", tmp_path / "all")
        assert engine.load_adapter("x", tmp_path / "all" / "pirate").rank == 8
        with pytest.raises(AdapterNotFoundError, match="is a file"):
            engine.load_adapter("y", tmp_path / "all" / "pirate" / "adapter_config.json")


@given(names=st.lists(st.text(max_size=40), max_size=8), tensors=st.lists(st.text(max_size=40), max_size=4))
@settings(deadline=None)
def test_any_names_of_files_give_a_next_step(names, tensors):
    """Whatever stands in a folder, the message about it is one that can be printed."""
    step = next_step([], names, tensors)
    assert step
    assert step.isprintable() or not all(map(str.isprintable, tensors))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("~no-such-user/a", "'~no-such-user/a' cannot be opened as a folder: "),
        ("/" + "a" * 5000, "cannot be opened as a folder: File name too long"),
        ("/a\0b", "no folder|cannot be opened"),
    ],
)
def test_a_path_that_cannot_be_opened_says_why(text, match, tmp_path):
    """Every fault of a path is an AdapterNotFoundError, and none is an error of the operating system."""
    with pytest.raises(AdapterNotFoundError, match=match):
        fetch(text, tmp_path / "copy")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """~ is expanded when the folder is read, and printed as it was written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_adapter(tmp_path / "adapters" / "pirate")
    source = parse_source("~/adapters/pirate")
    assert str(source) == "~/adapters/pirate"
    fetch(source, tmp_path / "copy")
    assert (tmp_path / "copy/adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()


def test_links_inside_the_folder_are_followed(tmp_path):
    """A link to another file of the same folder is no danger."""
    folder = write_adapter(tmp_path / "linked")
    (folder / "adapter_model.safetensors").rename(folder / "v2.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("v2.safetensors")
    with fake_engine() as engine:
        assert engine.load_adapter("x", folder).num_modules == 14


def test_a_folder_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    """A trainer that writes while the adapter is copied gets an error, not a mixture served."""
    from qlora_infer.files import content

    folder = write_adapter(tmp_path / "moving")
    copy = content._copy

    def copy_and_disturb(adapter, source, *arguments):
        copy(adapter, source, *arguments)
        if source.name == "adapter_model.safetensors":
            write_adapter(folder, seed=2)

    monkeypatch.setattr(content, "_copy", copy_and_disturb)
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
        assert engine.load_adapter("x", TensorSource(named, config)).num_modules == 14
        before = engine.adapters
        with pytest.raises(CorruptAdapterError, match=rf"several adapters \(.*{words}.*\): pass those of one, as peft"):
            engine.load_adapter("x", TensorSource({**named, **some}, config))
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
