"""Which files are fetched from each source: an adapter's in any form, and nothing that lies beside it."""

import json
import sys
from pathlib import Path

import fsspec
import pytest
from effects import make_copy
from mlx_adapters import write_mlx
from test_shards import split

sys.path.append(str(Path(__file__).parent.parent / "sources"))

from file_server import FileServer
from hub_server import HubServer, Repository

from qlora_infer import HubSource, URLSource
from qlora_infer.errors import AdapterDownloadError, AdapterNotFoundError, CorruptAdapterError
from qlora_infer.files.extras import MAX_BYTES
from qlora_infer.testing import fake_engine, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"

#: What trainers leave in checkpoint-NNN beside an adapter: transformers 5.19's Trainer, DeepSpeed 0.18, FSDP.
BESIDE = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json"),
    *("training_args.bin", "README.md", "latest", "zero_to_fp32.py", "pytorch_model.bin", "optimizer.bin"),
    *("global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step500/mp_rank_00_model_states.pt"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata", "adapters.npz", "0000100_adapters.safetensors"),
)

FORMS = {
    "PEFT": lambda folder: write_adapter(folder),
    "MLX": lambda folder: write_mlx(folder),
    "PEFT, in 3 files": lambda folder: split(write_adapter(folder)),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield hub


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_any_form_is_served_and_nothing_beside_it_is_read(form, tmp_path):
    """What else a trainer left may be anything: here folders in the files' places, which cannot be read."""
    folder = FORMS[form](tmp_path / "checkpoint-500")
    for name in BESIDE:
        (folder / name).mkdir(parents=True)
    snapshot, _, _ = make_copy(folder, tmp_path / "copy")
    assert snapshot.format == form
    assert set(contents(snapshot.folder)) == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("form", FORMS)
def test_the_hub_is_asked_for_its_files_and_no_others(form, hub, tmp_path):
    """Of a checkpoint in a repository the adapter's files are downloaded; offline the cached copy serves."""
    files = contents(FORMS[form](tmp_path / "made"))
    hub.repositories["org/repo"] = Repository()
    hub.repositories["org/repo"].commit(
        {f"run/checkpoint-500/{name}": content for name, content in {**dict.fromkeys(BESIDE, b"x"), **files}.items()}
    )
    source = HubSource("org/repo", subfolder="run/checkpoint-500")
    snapshot, _, _ = make_copy(source, tmp_path / "a")
    assert sorted(hub.downloads()) == sorted(f"run/checkpoint-500/{name}" for name in files)
    hub.failing = 503
    again, _, _ = make_copy(source, tmp_path / "b")
    assert (again.digest, again.format) == (snapshot.digest, form)
    if "files" in form:
        cached = source.download("x", token=None, allow_pickle=False)
        (cached / "adapter_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(AdapterDownloadError, match="not whole in the Hub's cache"):
            make_copy(source, tmp_path / "c")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["memory", "http"])
def test_a_url_of_any_form_is_served(kind, form, tmp_path):
    """Without a listing the files are asked for by their names, and those of an index by its names."""
    files = contents(FORMS[form](tmp_path / "made"))
    filesystem = fsspec.filesystem("memory")
    with FileServer({f"sub/{name}": content for name, content in files.items()}) as server:
        for name, content in files.items():
            filesystem.pipe(f"/bucket/{form}/{name}", content)
        url = {"memory": f"memory://bucket/{form}", "http": f"{server.url}/sub"}[kind]
        snapshot, _, _ = make_copy(URLSource(url), tmp_path / "copy")
        asked = server.requests
    assert snapshot.format == form
    if kind == "http" and form == "PEFT":
        assert asked == [f"/sub/{name}" for name in (CONFIG, *MAX_BYTES, WEIGHTS)]


def test_a_url_s_index_leads_nowhere_else(tmp_path):
    """A file that an index names outside of the adapter's own is never asked for; one that is missing is named."""
    folder = split(write_adapter(tmp_path / "made"))
    files = contents(folder)
    places = json.loads(files[INDEX])["weight_map"]
    other = {**places, "a": "../secret/adapter_model-00001-of-00003.safetensors"}
    with FileServer({f"sub/{name}": content for name, content in files.items()}) as server:
        server.files[f"/sub/{INDEX}"] = json.dumps({"weight_map": other}).encode()
        with pytest.raises(CorruptAdapterError, match="secret"):
            make_copy(f"{server.url}/sub", tmp_path / "a")
        assert not any("secret" in path for path in server.requests)
        server.files[f"/sub/{INDEX}"] = files[INDEX]
        del server.files["/sub/adapter_model-00002-of-00003.safetensors"]
        with pytest.raises(AdapterNotFoundError, match=r"no adapter_model-00002-of-00003\.safetensors"):
            make_copy(f"{server.url}/sub", tmp_path / "b")


def test_a_folder_of_checkpoints_names_the_newest(tmp_path):
    """A training's folder has no adapter of its own before its end: the next step is its last checkpoint."""
    for step in (500, 1000, 1500):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}")
    with fake_engine() as engine:
        with pytest.raises(
            AdapterNotFoundError, match=r"of the 3 .* newest is \S+/checkpoint-1500: name that"
        ) as caught:
            engine.load_adapter("pirate", tmp_path / "run")
        engine.load_adapter("pirate", str(caught.value).split("newest is ")[1].split(":")[0])


def test_a_repository_of_checkpoints_names_the_newest(hub, tmp_path):
    """The list of files is enough to say it, and the name that it gives is a source."""
    files = contents(write_adapter(tmp_path / "made"))
    hub.repositories["org/repo"] = Repository()
    hub.repositories["org/repo"].commit(
        {f"checkpoint-{step}/{name}": content for step in (90, 1000) for name, content in files.items()}
    )
    with pytest.raises(AdapterNotFoundError, match=r"newest is org/repo:checkpoint-1000: name that") as caught:
        make_copy("org/repo", tmp_path / "a")
    assert hub.downloads() == []
    text = str(caught.value).split("newest is ")[1].split(": name")[0]
    assert make_copy(text, tmp_path / "b")[1].rank == 8
