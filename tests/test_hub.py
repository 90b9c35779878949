"""Adapters from the Hub: a real HTTP server on loopback that speaks the Hub's API."""

import logging

import pytest
from hub_server import HubServer, Repository

from qlora_infer import _hub
from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    ModelNotFoundError,
)
from qlora_infer.testing import fake_engine, write_adapter

TOKEN = "hf_this_is_a_secret"


def adapter_files(folder, prefix="", **arguments):
    write_adapter(folder, **arguments)
    return {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


@pytest.fixture
def repository(hub, tmp_path):
    repository = hub.repositories["org/repo"] = Repository()
    files = adapter_files(tmp_path / "v1", seed=1)
    repository.commit({**files, "model-00001.safetensors": b"x" * 1000, "README.md": b"hello"})
    return repository


@pytest.fixture
def engine():
    with fake_engine() as engine:
        yield engine


def test_an_adapter_is_downloaded_with_its_files_and_no_others(hub, repository, engine):
    """Only the config and the weights of the adapter are fetched, once each."""
    loaded = engine.load_adapter("pirate", "org/repo")
    assert loaded.source == "org/repo"
    assert sorted(path.rpartition("/")[2] for path in hub.downloads()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


def test_a_second_load_downloads_nothing(hub, repository, engine):
    """A branch that has not moved costs one question; a commit that is cached costs none."""
    first = engine.load_adapter("one", "org/repo")
    hub.requests.clear()
    second = engine.load_adapter("two", "org/repo")
    assert first.digest == second.digest
    assert hub.downloads() == []
    assert len(hub.requests) <= 1
    hub.requests.clear()
    engine.load_adapter("three", "org/repo", revision=repository.branches["main"])
    assert hub.requests == []


def test_a_revision_is_pinned(hub, repository, engine, tmp_path):
    """revision= takes a commit or a branch, and @ in the source says the same."""
    old = repository.branches["main"]
    repository.commit(adapter_files(tmp_path / "v2", seed=2))
    repository.commit(adapter_files(tmp_path / "v3", seed=3), branch="dev")
    digests = {
        "main": engine.load_adapter("a", "org/repo").digest,
        "old": engine.load_adapter("b", "org/repo", revision=old).digest,
        "dev": engine.load_adapter("c", "org/repo@dev").digest,
    }
    assert len(set(digests.values())) == 3
    assert engine.load_adapter("d", f"org/repo@{old}").digest == digests["old"]


def test_a_branch_that_moved_is_a_new_version(hub, repository, engine, tmp_path):
    """Loading the same name again after a push serves the new content, under a new integer id."""
    before = engine.load_adapter("pirate", "org/repo")
    repository.commit(adapter_files(tmp_path / "v2", seed=2))
    after = engine.load_adapter("pirate", "org/repo")
    assert after.digest != before.digest
    assert after.int_id > before.int_id


def test_a_subfolder_is_an_adapter_of_its_own(hub, repository, engine, tmp_path):
    """subfolder= finds an adapter inside a repository and fetches nothing beside it."""
    files = adapter_files(tmp_path / "v1") | adapter_files(tmp_path / "sub", prefix="adapters/pirate/", seed=5)
    repository.commit(files)
    loaded = engine.load_adapter("pirate", "org/repo", subfolder="adapters/pirate")
    assert loaded.source == "org/repo:adapters/pirate"
    assert all("/adapters/pirate/" in path for path in hub.downloads())
    with pytest.raises(AdapterNotFoundError, match="subfolder 'adapters/nobody'"):
        engine.load_adapter("nobody", "org/repo:adapters/nobody")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("org/missing", "no repository org/missing"),
        ("org/repo@nowhere", "no revision 'nowhere'"),
        ("org/repo:sub", "no adapter_config.json in the subfolder 'sub'"),
    ],
)
def test_what_is_not_there_is_named(hub, repository, engine, source, match):
    """A missing repository, revision or subfolder is an error that says which of them it is."""
    with pytest.raises(AdapterNotFoundError, match=match):
        engine.load_adapter("x", source)
    assert not engine.adapters


def test_a_repository_without_an_adapter_is_named(hub, engine):
    """A repository that holds a model and no adapter says what is missing."""
    hub.repositories["org/model"] = Repository()
    hub.repositories["org/model"].commit({"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(AdapterNotFoundError, match=r"org/model has no adapter_config.json in its root"):
        engine.load_adapter("x", "org/model")
    assert hub.downloads() == []


def test_a_private_repository_needs_its_token(hub, repository, engine):
    """Without a token it looks missing and the message names the token; with a wrong one access is denied."""
    repository.token = TOKEN
    with pytest.raises(AdapterNotFoundError, match="token="):
        engine.load_adapter("x", "org/repo")
    with pytest.raises(AdapterAccessError, match="the token does not open it"):
        engine.load_adapter("x", "org/repo", token="hf_wrong")
    assert engine.load_adapter("x", "org/repo", token=TOKEN).name == "x"


def test_the_engines_token_opens_adapters_too(hub, repository):
    """The token of the engine is used for adapters that have none of their own."""
    repository.token = TOKEN
    with fake_engine(token=TOKEN, adapters={"x": "org/repo"}) as engine:
        assert "x" in engine.adapters


def test_a_gated_repository_says_what_to_do(hub, repository, engine):
    """A gated repository is an access error that says to ask for access."""
    repository.gated, repository.token = True, TOKEN
    with pytest.raises(AdapterAccessError, match="gated: ask for access"):
        engine.load_adapter("x", "org/repo", token="hf_wrong")


@pytest.mark.parametrize("failure", ["denied", "missing", "broken", "server"])
def test_a_token_is_never_told(hub, repository, failure, caplog):
    """No message, cause, repr or log line has the token in it."""
    if failure == "denied":
        repository.token = "hf_another"
    elif failure == "broken":
        hub.broken_downloads = 1000
    elif failure == "server":
        hub.failing = 500
    source = "org/none" if failure == "missing" else "org/repo"
    with caplog.at_level(logging.DEBUG), fake_engine(token=TOKEN) as engine:
        with pytest.raises(AdapterSourceError) as caught:
            engine.load_adapter("x", source, token=TOKEN)
        told = [repr(engine), caplog.text]
    error = caught.value
    while error is not None:
        told += [str(error), repr(error), str(vars(error))]
        error = error.__cause__
    assert TOKEN not in " ".join(told)


def test_a_connection_that_breaks_in_the_middle_is_an_error_and_a_retry_succeeds(hub, repository, engine):
    """A download that breaks ends in an error, leaves no half a file, and the next try has the whole one."""
    hub.broken_downloads = 1000
    with pytest.raises(AdapterDownloadError, match="org/repo"):
        engine.load_adapter("x", "org/repo")
    assert not engine.adapters
    hub.broken_downloads = 0
    assert engine.load_adapter("x", "org/repo").num_modules == 14


def test_a_server_that_fails_is_a_download_error(hub, repository, engine):
    """A Hub that answers 500 is not taken for a missing adapter."""
    hub.failing = 500
    with pytest.raises(AdapterDownloadError, match="500"):
        engine.load_adapter("x", "org/repo")


def test_offline_takes_the_cached_copy(hub, repository, engine, monkeypatch):
    """With HF_HUB_OFFLINE=1 a cached adapter loads without a request, and one that is not cached says so."""
    digest = engine.load_adapter("x", "org/repo").digest
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert engine.load_adapter("y", "org/repo").digest == digest
    with pytest.raises(AdapterDownloadError, match=r"org/other is not in the Hub's cache.*offline"):
        engine.load_adapter("z", "org/other")
    assert hub.requests == []


def test_without_a_connection_the_cached_copy_serves(hub, repository, engine, monkeypatch):
    """When nobody answers at the Hub's address, a cached adapter loads all the same."""
    digest = engine.load_adapter("x", "org/repo").digest
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert engine.load_adapter("y", "org/repo").digest == digest
    with pytest.raises(AdapterDownloadError, match="cannot be reached"):
        engine.load_adapter("z", "org/other")


def test_a_pickled_adapter_is_fetched_only_where_the_user_allows_it(hub, engine, tmp_path):
    """adapter_model.bin is not even downloaded unless allow_pickle=True."""
    files = adapter_files(tmp_path / "v1")
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    hub.repositories["org/old"] = Repository()
    hub.repositories["org/old"].commit(files)
    with pytest.raises(AdapterNotFoundError, match=r"no adapter_model\.safetensors.*allow_pickle=True"):
        engine.load_adapter("x", "org/old")
    assert not any(path.endswith(".bin") for path in hub.downloads())
    with pytest.raises(CorruptAdapterError, match="not a pickle of tensors"):
        engine.load_adapter("x", "org/old", allow_pickle=True)  # what was fetched is no pickle at all
    assert any(path.endswith("adapter_model.bin") for path in hub.downloads())


def test_a_models_config_is_read_from_the_hub(hub):
    """The base model's config.json is fetched, and nothing else of it."""
    hub.repositories["org/model"] = Repository()
    hub.repositories["org/model"].commit({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    assert _hub.read_model_config("org/model", revision=None, token=None) == {"model_type": "llama"}
    assert [path.rpartition("/")[2] for path in hub.downloads()] == ["config.json"]
    with pytest.raises(ModelNotFoundError, match="no repository org/none"):
        _hub.read_model_config("org/none", revision=None, token=None)


def test_a_models_folder_is_read_without_the_hub(hub, tmp_path):
    """A local model never leads to a request; what is wrong with its folder is named."""
    for model, match in [
        (tmp_path / "none", "no folder"),
        (tmp_path, "has no config.json"),
        (tmp_path / "model.gguf", "GGUF"),
        ("just-a-name", "'org/model'"),
    ]:
        with pytest.raises(ModelNotFoundError, match=match):
            _hub.read_model_config(str(model), revision=None, token=None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        _hub.read_model_config(str(tmp_path), revision=None, token=None)
    assert hub.requests == []
