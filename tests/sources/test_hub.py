"""Adapters and models from the Hub: a real HTTP server on loopback that speaks the Hub's API."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import evolve
from hub_server import HubServer, Repository

from qlora_infer import HubSource, parse_source
from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    ModelNotFoundError,
    QuantizationError,
    UnsafeAdapterError,
)
from qlora_infer.files import scratch
from qlora_infer.model.config import read_model_config
from qlora_infer.sources import repository as _repository
from qlora_infer.testing import fake_engine, write_adapter

TOKEN = "hf_this_is_a_secret"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = {CONFIG: b"{}", WEIGHTS: bytes(range(256)) * 40}


def adapter_files(folder, prefix="", **arguments):
    write_adapter(folder, **arguments)
    return {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}


def resolve(text, *, allow_pickle=False, **arguments):
    """Download what a text stands for; the folder in the Hub's cache."""
    source = evolve(parse_source(text), **arguments)
    return source.download("x", token=None, allow_pickle=allow_pickle)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything_told(error):
    """The texts of an error, its causes and its contexts, with what hangs on them."""
    seen, waiting = [], [error]
    while waiting:
        error = waiting.pop()
        request = vars(error).get("_request") or getattr(vars(error).get("response"), "request", None)
        seen += [str(error), repr(error), repr(vars(error)), repr(getattr(request, "headers", None))]
        waiting += [other for other in (error.__cause__, error.__context__) if other is not None]
    return " ".join(seen)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield hub


@pytest.fixture
def repository(hub):
    repository = hub.repositories["org/repo"] = Repository()
    repository.commit({**FILES, "model-00001.safetensors": b"x" * 1000, "README.md": b"hello"})
    return repository


@pytest.fixture
def nobody_answers(monkeypatch):
    return lambda: monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


# What is downloaded -------------------------------------------------------------------------------------------------


def test_an_adapter_is_downloaded_with_its_files_and_no_others(hub):
    """The config, the weights and the small files that adapters carry are fetched, once each; nothing beside them."""
    extras = {
        name: name.encode()
        for name in (
            *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
            *("chat_template.jinja", "generation_config.json"),
        )
    }
    others = dict.fromkeys(
        (
            *("model-00001.safetensors", "README.md", "training_args.bin", PICKLE),
            *("old/tokenizer.json", f"old/{WEIGHTS}", "tokenizer/old.json"),
        ),
        b"other",
    )
    hub.repositories["org/repo"] = Repository()
    hub.repositories["org/repo"].commit({**others, **FILES, **extras})
    assert contents(resolve("org/repo", allow_pickle=True)) == {**FILES, **extras}
    assert sorted(hub.downloads()) == sorted([*FILES, *extras])


def test_an_adapter_goes_into_the_hubs_own_cache(repository, tmp_path):
    """Other programs find the files where huggingface_hub would have put them."""
    folder = resolve("org/repo")
    assert folder == tmp_path / "home/hub/models--org--repo/snapshots" / repository.branches["main"]


def test_a_second_load_downloads_nothing(hub, repository):
    """A branch that has not moved, or a commit, costs one question: which files there are."""
    first = resolve("org/repo")
    for revision in (None, repository.branches["main"]):
        hub.requests.clear()
        assert resolve("org/repo", revision=revision) == first
        assert hub.downloads() == []
        assert len(hub.requests) == 1


@pytest.fixture
def public_folder(monkeypatch):
    """A folder where also a user without rights may read and write; temporary files go there meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(scratch, "_folders", {})
        # huggingface_hub has read at its import where a token may be.
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", f"{folder}/token")
        yield Path(folder)


@contextmanager
def read_only(folder):
    """Nothing in a folder can be written; a superuser becomes another meanwhile, for whom that is so."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)
    if user := os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_cache_does_not_keep_an_old_adapter(hub, repository, public_folder, monkeypatch, caplog):
    """A read-only cache behind its branch: the new files go into a folder of this process, and the log says so.

    One that is not behind is read, and of a repository that is not in it all is fetched.
    """
    cache = public_folder / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    first = resolve("org/repo")
    hub.repositories["org/new"] = Repository()
    hub.repositories["org/new"].commit(FILES)
    with read_only(cache):
        assert resolve("org/repo") == first
        assert not caplog.text
        repository.commit({**FILES, WEIGHTS: b"new weights"})
        second = resolve("org/repo")
        assert contents(second) == {**FILES, WEIGHTS: b"new weights"}
        assert contents(resolve("org/new")) == FILES
    assert public_folder in second.parents
    assert cache not in second.parents
    assert "org/repo is downloaded again for this process: the Hub's cache cannot be written" in caplog.text


def test_what_another_program_has_cached_of_a_commit_is_completed(hub, repository, nobody_answers, caplog):
    """PEFT fetches config and weights only: the template is fetched, and what is there already is not."""
    from huggingface_hub import hf_hub_download

    files = {**FILES, "chat_template.jinja": b"{{ messages }}"}
    commit = repository.commit(files)
    for name in FILES:
        hf_hub_download("org/repo", name, revision=commit, endpoint=hub.url, cache_dir=_repository._cache_dir())
    hub.requests.clear()
    assert contents(resolve(f"org/repo@{commit}")) == files
    assert hub.downloads() == ["chat_template.jinja"]
    nobody_answers()
    assert contents(resolve(f"org/repo@{commit}")) == files
    assert f"org/repo@{commit} is taken from the Hub's cache: the connection to the Hub failed" in caplog.text


def test_an_engine_loads_from_the_hub(hub, tmp_path):
    """load_adapter takes a Hub id, and a branch that moved is a new version under a new integer id."""
    repository = hub.repositories["org/repo"] = Repository()
    repository.commit(adapter_files(tmp_path / "v1", seed=1))
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", "org/repo")
        assert before.source == "org/repo"
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
        repository.commit(adapter_files(tmp_path / "v2", seed=2))
        after = engine.load_adapter("pirate", "org/repo")
        assert after.digest != before.digest
        assert after.int_id > before.int_id


# Revisions and subfolders -------------------------------------------------------------------------------------------


def test_a_revision_is_pinned(hub, repository):
    """A revision is a commit, a branch or a tag."""
    old = repository.branches["main"]
    repository.commit({**FILES, WEIGHTS: b"new"})
    repository.commit({**FILES, WEIGHTS: b"dev"}, branch="feature/dev")
    found = {source: contents(resolve(source))[WEIGHTS] for source in ("org/repo", f"org/repo@{old}")}
    assert found == {"org/repo": b"new", f"org/repo@{old}": FILES[WEIGHTS]}
    assert contents(resolve("org/repo@feature/dev"))[WEIGHTS] == b"dev"


def test_a_subfolder_is_an_adapter_of_its_own(hub, repository):
    """An adapter is found inside a repository, nothing beside it is fetched, and its folder's name is literal."""
    inside = {"adapters/[a]*/" + name: b"inside" for name in FILES}
    repository.commit({**FILES, **inside, "adapters/a/tokenizer.json": b"other"})
    folder = resolve("org/repo:adapters/[a]*")
    assert contents(folder) == dict.fromkeys(FILES, b"inside")
    assert sorted(hub.downloads()) == sorted(inside)


def test_a_source_on_the_hub_brings_only_what_an_engine_reads(repository, tmp_path):
    """Of the files in the Hub's cache those that are served are copied, with the source's token or the engine's."""
    repository.commit({**FILES, "tokenizer.json": b"{}", "special_tokens_map.json": b"{}"})
    repository.token = TOKEN
    HubSource("org/repo", token=TOKEN).fetch("x", tmp_path / "a", token="hf_wrong", allow_pickle=False)
    HubSource("org/repo").fetch("x", tmp_path / "b", token=TOKEN, allow_pickle=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == {**FILES, "tokenizer.json": b"{}"}


# What is not there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("org/missing", r"no repository org/missing on the Hub .*'\./org/missing'.* or it is private: pass token="),
        ("org/repo@nowhere", "org/repo has no revision 'nowhere'"),
        ("org/repo@" + "0" * 40, "org/repo has no revision '0{40}'"),
        ("org/repo:sub", r"org/repo has no adapter_config\.json in the subfolder 'sub'; is it an adapter"),
        ("org/many", r"org/many has no adapter_config\.json in its root; .* inside it: name org/many:a, org/many:b/c$"),
        ("org/many:a", r"org/many has no adapter_model\.safetensors in the subfolder 'a'"),
        (
            "org/whole",
            r"org/whole has no adapter_config\.json in its root; it is a whole model .*serve it as the base model",
        ),
        ("org/whole:unet", r"in the subfolder 'unet'; diffusion_pytorch_model\.safetensors is of an image model"),
        ("org/two--dashes", "'org/two--dashes' cannot be a repository's name"),
    ],
)
def test_what_is_not_there_is_named(hub, repository, source, match):
    """A missing repository, revision, subfolder or file is an error that says which of them it is."""
    hub.repositories["org/many"] = Repository()
    hub.repositories["org/many"].commit({f"a/{CONFIG}": b"{}", f"b/c/{CONFIG}": b"{}", "model.safetensors": b"x"})
    hub.repositories["org/whole"] = Repository()
    whole = {"config.json": b"{}", "model.safetensors": b"x", "unet/diffusion_pytorch_model.safetensors": b"x"}
    hub.repositories["org/whole"].commit(whole)
    with pytest.raises(AdapterNotFoundError, match=match):
        resolve(source)
    assert hub.downloads() == []


def test_a_pickled_adapter_is_fetched_only_where_the_user_allows_it(hub):
    """adapter_model.bin is not even downloaded unless allow_pickle=True."""
    hub.repositories["org/old"] = Repository()
    commit = hub.repositories["org/old"].commit({CONFIG: b"{}", PICKLE: b"pickle"})
    with pytest.raises(UnsafeAdapterError, match=r"only pickled weights .* allow_pickle=True"):
        resolve("org/old")
    assert hub.downloads() == []
    assert contents(resolve("org/old", allow_pickle=True)) == {CONFIG: b"{}", PICKLE: b"pickle"}
    hub.requests.clear()
    resolve("org/old", allow_pickle=True, revision=commit)
    assert hub.downloads() == []


# Tokens -------------------------------------------------------------------------------------------------------------


def test_a_private_repository_needs_its_token(hub, repository):
    """Without a token it looks missing, and the message names both; with a wrong one access is denied."""
    repository.token = TOKEN
    with pytest.raises(
        AdapterNotFoundError, match=r"no repository org/repo on the Hub .* or it is private: pass token="
    ):
        resolve("org/repo")
    with pytest.raises(AdapterAccessError, match="the token does not open it: pass another"):
        resolve("org/repo", token="hf_wrong")
    hub.invalid_tokens = {"hf_expired"}
    with pytest.raises(AdapterAccessError, match="the token does not open it: pass another"):
        resolve("org/repo", token="hf_expired")
    assert contents(resolve("org/repo", token=f"{TOKEN}\n")) == FILES


def test_a_token_of_the_environment_is_used(hub, repository, monkeypatch):
    """HF_TOKEN opens a repository for a source that has no token of its own."""
    repository.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert contents(resolve("org/repo")) == FILES


def test_the_engines_token_opens_adapters_too(hub, repository, tmp_path):
    """The token of the engine is used for adapters that have none of their own."""
    repository.commit(adapter_files(tmp_path / "v1"))
    repository.token = TOKEN
    with fake_engine(token=TOKEN, adapters={"x": "org/repo"}) as engine:
        assert "x" in engine.adapters


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository_says_what_to_do(repository, token):
    """A gated repository is an access error that says to ask for access."""
    repository.gated, repository.token = True, TOKEN
    with pytest.raises(AdapterAccessError, match="org/repo is gated: ask for access"):
        resolve("org/repo", token=token)
    assert contents(resolve("org/repo", token=TOKEN)) == FILES


def test_a_cached_private_adapter_is_not_given_to_who_is_refused(repository):
    """A refusal by the Hub is an answer: the cached copy does not stand in for it."""
    repository.token = TOKEN
    resolve("org/repo", token=TOKEN)
    for revision in (None, repository.branches["main"]):
        with pytest.raises(AdapterAccessError):
            resolve("org/repo", token="hf_wrong", revision=revision)


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}\xe9", f"{TOKEN}\nX", f"{TOKEN}\x00"])
@pytest.mark.parametrize("failure", ["denied", "missing", "revision", "truncated", "server", "silent", "gated"])
def test_a_token_is_never_told(hub, repository, failure, token, caplog, monkeypatch):
    """No message, cause, context, repr or log line has the token in it, also where no HTTP header can hold it."""
    monkeypatch.setattr(_repository, "TIMEOUT", 0.2)
    repository.token = {"denied": "hf_another", "gated": "hf_another"}.get(failure)
    repository.gated = failure == "gated"
    hub.truncating, hub.silent = failure == "truncated", failure == "silent"
    hub.failing = 500 if failure == "server" else None
    source = {"missing": "org/none", "revision": "org/repo@none"}.get(failure, "org/repo")
    with caplog.at_level(logging.DEBUG), pytest.raises(AdapterSourceError) as caught:
        resolve(source, token=token)
    assert TOKEN not in everything_told(caught.value) + caplog.text
    if token == TOKEN:
        assert TOKEN in hub.tokens
        assert caught.value.__cause__ is not None


def test_a_token_of_the_environment_is_never_told(repository, monkeypatch):
    """A token that no header can hold is refused unsent and untold, too, when it comes from HF_TOKEN."""
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\xe9")
    with pytest.raises(AdapterAccessError, match="holds a character that no token has") as caught:
        resolve("org/repo")
    assert TOKEN not in everything_told(caught.value)


@pytest.mark.parametrize("kept", ["hf_another", None])
def test_a_cause_that_shows_the_token_is_left_out(kept):
    """Should an HTTP library show a header deep in its errors, the cause is dropped, and else it is kept."""
    inner, outer = ValueError(f"Bearer {kept or TOKEN}"), OSError("it broke")
    outer.__context__ = inner
    assert _repository._without_secrets(outer, TOKEN) is (outer if kept else None)


# Connections --------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_once_is_resumed(hub, repository):
    """A download that breaks in the middle goes on where it broke, and the file is whole."""
    hub.break_at, hub.breaks = 5000, 1
    assert contents(resolve("org/repo")) == FILES


def test_a_connection_that_keeps_breaking_is_an_error_and_a_retry_succeeds(hub, repository, monkeypatch):
    """It ends in an error, half a file is no copy, and the next try has the whole one."""
    hub.break_at = 5000
    with pytest.raises(AdapterDownloadError, match="org/repo is not whole in the Hub's cache, and the connection"):
        resolve("org/repo")
    with monkeypatch.context() as offline, pytest.raises(AdapterDownloadError, match="offline"):
        offline.setenv("HF_HUB_OFFLINE", "1")
        resolve("org/repo")
    hub.break_at = None
    assert contents(resolve("org/repo")) == FILES


@pytest.mark.parametrize("pinned", [True, False])
def test_a_truncated_file_is_an_error_and_a_retry_succeeds(hub, repository, pinned):
    """An answer that is shorter than the file is not taken for it."""
    source = f"org/repo@{repository.branches['main']}" if pinned else "org/repo"
    repository.commits[repository.branches["main"]][CONFIG] = b""
    hub.truncating = True
    with pytest.raises(AdapterDownloadError, match="the download of org/repo"):
        resolve(source)
    hub.truncating = False
    assert contents(resolve(source))[WEIGHTS] == FILES[WEIGHTS]


def test_a_copy_with_weights_is_a_whole_copy(hub, repository, monkeypatch):
    """The weights come last: when a file before them breaks, what is there is not served offline."""
    commit = repository.commit({CONFIG: b"", WEIGHTS: b"", "tokenizer.json": b"tokens"})
    hub.truncating = True
    with pytest.raises(AdapterDownloadError):
        resolve("org/repo")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("org/repo", f"org/repo@{commit}"):
        with pytest.raises(AdapterDownloadError, match="not whole"):
            resolve(source)


def test_a_hub_that_never_answers_is_given_up(hub, repository, monkeypatch):
    """Every wait for the Hub has a bound."""
    monkeypatch.setattr(_repository, "TIMEOUT", 0.2)
    hub.silent = True
    with pytest.raises(AdapterDownloadError, match=r"the connection to the Hub failed \(ReadTimeout\)"):
        resolve("org/repo")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_hub_that_is_down_is_a_download_error(hub, repository, status):
    """A Hub in trouble is not taken for a missing adapter, and a cached copy stands in."""
    hub.failing = status
    with pytest.raises(AdapterDownloadError, match=f"the Hub answered {status}"):
        resolve("org/repo")
    hub.failing = None
    folder = resolve("org/repo")
    hub.failing = status
    assert resolve("org/repo") == folder


def test_a_cache_that_cannot_be_written_says_so(repository, tmp_path, monkeypatch):
    """A fault of this machine's disk is not called the Hub's."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(AdapterDownloadError, match="org/repo cannot be stored in the Hub's cache: "):
        resolve("org/repo")


# Offline ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_takes_the_cached_copy(hub, repository, monkeypatch, caplog, variable):
    """A cached adapter loads without a request and the log says so; one that is not cached says why."""
    folder = resolve("org/repo")
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    with caplog.at_level(logging.INFO, "qlora_infer"):
        assert resolve("org/repo") == folder
    assert "org/repo is taken from the Hub's cache: this process is offline" in caplog.text
    with pytest.raises(AdapterDownloadError, match=r"org/other is not whole in the Hub's cache, and .* offline"):
        resolve("org/other")
    assert hub.requests == []


def test_without_a_connection_the_cached_copy_serves(repository, nobody_answers, caplog):
    """When nobody answers at the Hub's address, a cached adapter loads all the same and the log warns."""
    repository.commit({**FILES, WEIGHTS: b"dev"}, branch="dev")
    folders = [resolve("org/repo"), resolve("org/repo@dev")]
    nobody_answers()
    assert [resolve("org/repo"), resolve("org/repo@dev")] == folders
    assert [record.levelname for record in caplog.records if record.name == "qlora_infer"] == ["WARNING"] * 2
    assert "org/repo@dev is taken from the Hub's cache: the connection to the Hub failed" in caplog.text
    with pytest.raises(AdapterDownloadError, match="the connection to the Hub failed"):
        resolve("org/other")


def test_offline_follows_the_branch_as_it_was_last_seen(repository, nobody_answers):
    """After a branch moved and was loaded, the copy that stands in is the newer one."""
    resolve("org/repo")
    repository.commit({**FILES, WEIGHTS: b"new"})
    resolve("org/repo")
    nobody_answers()
    assert contents(resolve("org/repo"))[WEIGHTS] == b"new"


def test_half_a_cached_copy_is_no_copy(repository, nobody_answers):
    """A snapshot without its weights is not served offline, and is completed online."""
    folder = resolve("org/repo")
    (folder / WEIGHTS).unlink()
    with pytest.MonkeyPatch.context() as offline, pytest.raises(AdapterDownloadError, match="not whole"):
        offline.setenv("HF_HUB_OFFLINE", "1")
        resolve("org/repo", revision=repository.branches["main"])
    assert contents(resolve("org/repo", revision=repository.branches["main"])) == FILES


# Models -------------------------------------------------------------------------------------------------------------


def read_model(model, revision=None, token=None, **options):
    return read_model_config(model, revision=revision, token=token, **options)


def test_a_models_config_is_read_from_the_hub(hub, monkeypatch):
    """The base model's config.json is fetched at its revision, and its tensors' names; offline the copy serves."""
    repository = hub.repositories["org/model"] = Repository()
    pinned = repository.commit({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    repository.commit({"config.json": b'{"model_type": "qwen3"}'}, branch="next")
    assert read_model("org/model") == {"model_type": "llama"}
    assert hub.downloads() == ["config.json", "model.safetensors"]  # of the latter, what its header says
    assert read_model("org/model", revision="next") == {"model_type": "qwen3"}
    hub.requests.clear()
    assert read_model("org/model", revision=pinned) == {"model_type": "llama"}
    assert "config.json" not in hub.downloads()
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_model("org/model") == {"model_type": "llama"}
    assert hub.requests == []


def test_a_model_that_the_hub_does_not_give_is_named(hub, monkeypatch):
    """What stands in the way of a model is said with the next step, and the token is not told."""
    private = hub.repositories["org/private"] = Repository(token=TOKEN)
    private.commit({"config.json": b"{}"})
    hub.repositories["org/gated"] = Repository(private.commits, private.branches, TOKEN, gated=True)
    hub.repositories["org/gguf"] = Repository()
    hub.repositories["org/gguf"].commit({"model.gguf": b"GGUF"})
    for model, arguments, match in [
        ("org/none", {}, "no repository org/none on the Hub .* or it is private: pass token="),
        ("org/private", {}, "or it is private: pass token="),
        ("org/private", {"token": "hf_wrong"}, "the token does not open it: pass another as token="),
        ("org/gated", {}, "org/gated is gated: ask for access"),
        ("org/gguf", {}, r"org/gguf has no config\.json: .* GGUF files"),
        ("org/gguf", {"revision": "v9"}, "org/gguf has no revision 'v9'"),
        ("org/two--dashes", {}, "cannot be a repository's name"),
    ]:
        with pytest.raises(ModelNotFoundError, match=match):
            read_model(model, **arguments)
    hub.failing = 500
    with pytest.raises(ModelNotFoundError, match="the Hub answered 500") as caught:
        read_model("org/private", token=TOKEN)
    assert TOKEN not in everything_told(caught.value)


def test_a_models_folder_is_read_without_the_hub(hub, tmp_path):
    """A local model never leads to a request; what is wrong with its folder is named."""
    for model, match in [
        (tmp_path / "none", "no folder"),
        (tmp_path, r"has no config\.json"),
        (tmp_path / "model.gguf", "there is no file .*model.gguf"),
        ("just-a-name", "'org/model'"),
        ("~no-such-user/model", "no folder ~no-such-user/model"),
    ]:
        with pytest.raises(ModelNotFoundError, match=match):
            read_model(str(model))
    for content, match in [(b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[]", "no JSON object")]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelNotFoundError, match=match):
            read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_model(str(tmp_path)) == {"model_type": "llama"}
    assert hub.requests == []


# In a process of its own --------------------------------------------------------------------------------------------


def in_subprocess(code, **environment):
    outcome = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1])


def test_offline_from_the_start_works_like_offline_later(hub, repository):
    """HF_HUB_OFFLINE=1 before huggingface_hub is imported gives the cached copy, too."""
    folder = resolve("org/repo")
    hub.requests.clear()
    code = (
        "import json, huggingface_hub; from qlora_infer.sources.hub import HubSource\n"
        "print(json.dumps(str(HubSource('org/repo').download('x', token=None, allow_pickle=False))))"
    )
    assert in_subprocess(code, HF_HUB_OFFLINE="1") == str(folder)
    assert hub.requests == []


def test_a_process_that_began_offline_is_told_so(hub, repository):
    """huggingface_hub reads HF_HUB_OFFLINE once: after that the variable's removal changes nothing, and the error says it."""
    code = (
        "import json, os, huggingface_hub.constants; from qlora_infer.sources.hub import HubSource\n"
        "del os.environ['HF_HUB_OFFLINE']\n"
        "try: HubSource('org/repo').download('x', token=None, allow_pickle=False)\n"
        "except Exception as error: print(json.dumps(str(error)))"
    )
    assert "this process is offline (HF_HUB_OFFLINE is set)" in in_subprocess(code, HF_HUB_OFFLINE="1")


def test_importing_the_module_does_not_import_huggingface_hub():
    """Who uses local adapters does not pay for the Hub's library."""
    code = "import json, sys, qlora_infer.sources.hub; print(json.dumps('huggingface_hub' in sys.modules))"
    assert in_subprocess(code) is False


def test_a_cache_that_was_cleared_is_filled_again(hub, repository, tmp_path):
    """A snapshot whose blobs are gone is downloaded again, not served as a dangling link."""
    folder = resolve("org/repo")
    shutil.rmtree(folder.parent.parent / "blobs")
    assert contents(resolve("org/repo")) == FILES


def header_of(**shapes):
    """A safetensors file's header, without the numbers."""
    entries = {name: {"dtype": "I32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def put(files, place):
    """Put a model's files on the Hub or into a folder; return the model's name there."""
    if isinstance(place, Path):
        for file, content in files.items():
            (place / file).write_bytes(content)
        return str(place)
    place.repositories["org/model"] = Repository()
    place.repositories["org/model"].commit(files)
    return "org/model"


SAYS_NOTHING = b'{"model_type": "llama"}'
QUANTIZATION_FILES = {
    "quantize_config.json": ({"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
    "quant_config.json": ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
    "hf_quant_config.json": ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
    "quantization_config.json": ({"bits": 4, "sym": True}, "auto-round"),
}


@pytest.mark.parametrize("name", QUANTIZATION_FILES)
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_quantization_is_read_from_the_files_beside_the_config(hub, tmp_path, place, name):
    """Where config.json says nothing, the files that vLLM reads tell of the quantization, on the Hub and in a folder."""
    says, method = QUANTIZATION_FILES[name]
    files = {"config.json": SAYS_NOTHING, name: json.dumps(says).encode(), "model.safetensors": b"x"}
    model = put(files, hub if place == "hub" else tmp_path)
    config = read_model(model)
    assert config["quantization_config"] == {"quant_method": method, **says}
    assert config["model_type"] == "llama"
    assert "model.safetensors" not in hub.downloads()


@pytest.mark.parametrize("kind", ["one file", "an index"])
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_packed_weights_of_which_nothing_is_said_are_refused(hub, tmp_path, place, kind):
    """vLLM would take them for no weights at all; the error names a tensor, the files, and the next step."""
    tensor = "model.layers.0.mlp.down_proj.qweight"
    index = json.dumps({"weight_map": {tensor: "model-00001-of-00001.safetensors"}}).encode()
    weights = {"model.safetensors": header_of(**{tensor: [0]})}
    files = weights if kind == "one file" else {"model.safetensors.index.json": index}
    files = {"config.json": SAYS_NOTHING, **files}
    model = put(files, hub if place == "hub" else tmp_path)
    with pytest.raises(QuantizationError, match=rf"is quantized \({tensor}\).*quantize_config.json.* says how: add"):
        read_model(model)


def test_a_quantization_without_a_method_is_refused(tmp_path):
    """vLLM would read packed weights as if they were none; the error says what to add."""
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(QuantizationError, match=r'names no quant_method.*add "quant_method"'):
        read_model(str(tmp_path))


def test_a_gguf_file_has_the_config_beside_it_or_of_another_model(hub, tmp_path):
    """A file, a file on the Hub, and a repository with a kind are known; so is the model whose tokenizer is given."""
    hub.repositories["org/model-GGUF"] = Repository()
    hub.repositories["org/model-GGUF"].commit({"config.json": SAYS_NOTHING, "q4.gguf": b"GGUF"})
    hub.repositories["org/model"] = Repository()
    hub.repositories["org/model"].commit({"config.json": b'{"model_type": "qwen3"}'})
    (tmp_path / "config.json").write_bytes(SAYS_NOTHING)
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    for model in ("org/model-GGUF:Q4_K_M", "org/model-GGUF/q4.gguf", str(tmp_path / "q4.gguf"), f"{tmp_path}:Q4_K_M"):
        said = {"quant_method": "gguf", "file": model}
        assert read_model(model) == {"model_type": "llama", "quantization_config": said}
        assert read_model(model, config_source="org/model") == {"model_type": "qwen3", "quantization_config": said}
    with pytest.raises(ModelNotFoundError, match=r"there is no file \./q4\.gguf"):
        read_model("./q4.gguf")
