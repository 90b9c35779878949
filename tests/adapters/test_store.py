"""The private copies on disk: within their budget, made again when they are asked for, on the fake engine."""

import errno
import json
import shutil
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_infer import (
    AdapterLoadError,
    AdapterNotFoundError,
    AdapterSourceError,
    BlendSource,
    CorruptAdapterError,
    EngineClosedError,
    TensorSource,
)
from qlora_infer.adapters import store as copies_module
from qlora_infer.files import content
from qlora_infer.sources import folder as folder_module
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter


class Reader(FakeEngine):
    """Reads the files of what it loads, as vLLM does."""

    def poll_loads(self):
        return {version: error or self.read(version) for version, error in super().poll_loads().items()}

    def read(self, version):
        if not (version.path / "adapter_model.safetensors").is_file():
            self.remove_adapter(version)
            return AdapterLoadError(version.name, f"vLLM found no files of {version.name!r}")
        return None


@pytest.fixture
def folders(tmp_path):
    return [write_adapter(tmp_path / f"source-{number}", seed=number) for number in range(8)]


@pytest.fixture
def size(folders):
    return sum(path.stat().st_size for path in folders[0].iterdir())


def engine_for(max_disk_bytes, **arguments):
    arguments = {"max_loras": 1, "max_cpu_loras": 1, "backend": Reader(), **arguments}
    return fake_engine(max_disk_bytes=max_disk_bytes, **arguments)


def copies(engine):
    return sum(path.is_dir() for path in engine._registry._store._folder.iterdir())


def test_copies_stay_within_their_budget_and_come_back(folders, size):
    """Eight adapters in the room of three: all answer, in any order, and never are there more than three copies."""
    with engine_for(3 * size + size // 2) as engine:
        for number, folder in enumerate(folders):
            engine.load_adapter(f"a{number}", folder)
            assert copies(engine) <= 3
        for names in ([f"a{number}" for number in range(8)], ["a0", "a7", "a0", "a3"]):
            outputs = engine.generate(["x"] * len(names), adapter=names)
            assert [output.text for output in outputs] == [f"{name} says: x" for name in names]
        engine.generate("x", adapter="a1")
        assert copies(engine) <= 3
        assert engine._registry._store.num_bytes <= 3 * size + size // 2


def test_a_source_that_has_changed_is_told(folders, size):
    """A copy that went is not made again from other content; loading the adapter again makes it right."""
    with engine_for(size + size // 2) as engine:
        engine.load_adapter("a", folders[0])
        engine.load_adapter("b", folders[1])
        shutil.rmtree(folders[0])
        with pytest.raises(AdapterNotFoundError):
            engine.generate("x", adapter="a")
        shutil.copytree(folders[2], folders[0])
        with pytest.raises(CorruptAdapterError, match="load it again"):
            engine.generate("x", adapter="a")
        assert engine.generate("x", adapter="b")[0].text == "b says: x"
        engine.load_adapter("a", folders[0])
        assert engine.generate("x", adapter="a")[0].adapter_id == engine.adapters["a"].int_id


def test_what_cannot_be_made_again_stays(folders, size):
    """Blends and adapters from memory are never let go; without room for another, loading says so and changes nothing."""
    pytest.importorskip("torch")
    with engine_for(2 * size + size // 2) as engine:
        engine.load_adapter("a", folders[0])
        engine.load_adapter("mix", BlendSource({"a": 1.0}))
        engine.load_adapter("more", BlendSource({"mix": 1.0}))
        before = engine.adapters
        with pytest.raises(AdapterLoadError, match="max_disk_bytes"):
            engine.load_adapter("most", BlendSource({"mix": 1.0}))
        assert engine.adapters == before
        texts = [output.text for output in engine.generate(["x"] * 3, adapter=["a", "mix", "more"])]
        assert texts == ["a says: x", "mix says: x", "more says: x"]


def test_what_has_requests_is_not_let_go(folders, size):
    """While requests of an adapter run or wait, its copy stays, whatever is loaded."""
    with engine_for(2 * size + size // 2, backend=Reader(step_seconds=0.001)) as engine:
        engine.load_adapter("busy", folders[0])
        running = engine.add_request("word " * 20_000, {"max_tokens": 20_000}, adapter="busy")
        for number in range(1, 6):
            engine.load_adapter(f"a{number}", folders[number])
        version = engine._registry.current("busy")
        assert version.path.is_dir()
        running.cancel()


def test_a_download_is_kept_longer_than_a_folder(folders, size):
    """What costs more to make again goes later than its last use alone would say; but it goes."""
    fsspec = pytest.importorskip("fsspec")

    memory = fsspec.filesystem("memory")
    memory.put(str(folders[0]), "/remote", recursive=True)
    with engine_for(2 * size + size // 2) as engine:
        engine.load_adapter("remote", "memory://remote")
        for number in range(1, 4):
            engine.load_adapter(f"a{number}", folders[number])
        remote = engine._registry.current("remote")
        assert remote.path.is_dir()
        for turn in range(20):
            engine.generate("x", adapter=f"a{turn % 3 + 1}")
        assert not remote.path.is_dir()
        assert engine.generate("x", adapter="remote")[0].text == "remote says: x"


def test_a_copy_that_comes_back_is_made_once(folders, size):
    """At each moment until it is there it is being made, so that nobody begins to make it a second time."""
    with engine_for(size + size // 2) as engine:
        for number in range(2):
            engine.load_adapter(f"a{number}", folders[number])
        held, version = engine._registry._store, engine._registry.current("a0")
        lock, seen = held._lock, []

        class Watched:
            def __enter__(self):
                lock.acquire()

            def __exit__(self, *_):
                seen.append(version in held._fetches or version in held._sizes)
                lock.release()

        held._lock = Watched()
        held.fetch(version).result(10)
        assert version.path.is_dir()
        assert len(seen) > 1
        assert all(seen)


@pytest.fixture
def slow_copies(monkeypatch):
    """From when it is called, each copy that is begun releases the semaphore, and waits for the event."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(*arguments, **keywords):
        begun.release()
        go_on.wait(10)
        content.copy_adapter(*arguments, **keywords)

    def begin():
        monkeypatch.setattr(folder_module, "copy_adapter", slow)
        return begun, go_on

    return begin


@pytest.mark.parametrize("work", ["load", "fetch"])
def test_work_that_outlives_the_engine_leaves_nothing(folders, size, work, slow_copies):
    """A copy that is being made when the engine is closed is deleted when it is done, and so is its folder."""
    engine = engine_for(size + size // 2)
    for number in range(2):
        engine.load_adapter(f"a{number}", folders[number])
    begun, go_on = slow_copies()
    ended = []

    def load():
        try:
            engine.load_adapter("a0", folders[2])
        except Exception as error:
            ended.append(type(error))

    thread = threading.Thread(target=load)
    held = engine._registry._store
    if work == "load":
        thread.start()
    else:
        fetch = held.fetch(engine._registry.current("a0"))
    assert begun.acquire(timeout=10)
    engine.close()
    assert not held._folder.exists()
    go_on.set()
    if work == "load":
        thread.join(10)
        assert ended == [EngineClosedError]
    else:
        with suppress(EngineClosedError):
            fetch.result(10)
    assert not held._folder.exists()


def test_who_waits_for_a_copy_hears_that_the_engine_was_closed(folders, size, slow_copies):
    """Whether its making had begun, was still to begin, or is asked for afterwards."""
    engine = engine_for(size + size // 2)
    for number in range(7):
        engine.load_adapter(f"a{number}", folders[number])
    held = engine._registry._store
    versions = [engine._registry.current(f"a{number}") for number in range(6)]
    begun, go_on = slow_copies()
    ended = []

    def restore(version):
        try:
            held.restore(version)
        except Exception as error:
            ended.append(type(error))

    threads = [threading.Thread(target=restore, args=(version,)) for version in versions[:5]]
    for thread in threads:
        thread.start()
    for _ in range(copies_module.MAX_FETCHES):
        assert begun.acquire(timeout=10)
    while len(held._fetches) < 5:
        time.sleep(0.01)
    engine.close()
    go_on.set()
    for thread in threads:
        thread.join(10)
    restore(versions[5])
    assert ended == [EngineClosedError] * 6


@pytest.mark.parametrize("step", ["_stamps", "_copy"])
@pytest.mark.parametrize("file_name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_gone_while_it_is_copied_is_told(folders, step, file_name, monkeypatch):
    """Somebody deletes the folder after it was looked at: the error is the one of a folder that is not there."""
    before = getattr(content, step)

    def without(*arguments):
        (folders[0] / file_name).unlink(missing_ok=True)
        return before(*arguments)

    with engine_for(None) as engine:
        monkeypatch.setattr(content, step, without)
        with pytest.raises(AdapterNotFoundError, match=f"{file_name} is gone: load the adapter again"):
            engine.load_adapter("a", folders[0])
        assert copies(engine) == 0


def test_files_are_checked_once_and_on_the_copy(folders, monkeypatch):
    """The folder's files are opened to be copied, and all that reads them reads the copy, once."""
    read = []

    def recording(name):
        function = getattr(copies_module, name)

        def record(adapter, path, *arguments, **keywords):
            read.append((name, path))
            return function(adapter, path, *arguments, **keywords)

        monkeypatch.setattr(copies_module, name, record)

    for name in ("read_manifest", "read_extras", "check_finite"):
        recording(name)
    with engine_for(None) as engine:
        loaded = engine.load_adapter("a", folders[0])
        copy = engine._registry._store._folder / str(loaded.int_id)
        weights = copy / "adapter_model.safetensors"
        assert read == [("read_manifest", copy), ("read_extras", copy), ("check_finite", weights)]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors is not a"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: it must hold a"),
    ],
)
def test_an_error_names_the_source_and_not_the_copy(folders, damage, words):
    """What is found on the private copy is told of the file that the user knows, and nothing is left behind."""
    damage(folders[0])
    with engine_for(None) as engine:
        with pytest.raises(CorruptAdapterError) as caught:
            engine.load_adapter("a", folders[0], strict=True)
        assert str(caught.value).startswith(f"{folders[0]}/{words}")
        assert str(engine._registry._store._folder) not in str(caught.value)
        assert copies(engine) == 0


def test_a_disk_that_fails_is_told(folders, monkeypatch):
    """What the operating system says is in the message, and what serves goes on serving."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with engine_for(None) as engine:
        engine.load_adapter("a", folders[0])
        monkeypatch.setattr(content, "_copy", fail)
        with pytest.raises(AdapterSourceError, match=r"could not be copied: .*Input/output error"):
            engine.load_adapter("a", folders[1])
        assert engine.generate("x", adapter="a")[0].text == "a says: x"
        assert copies(engine) == 1


def test_what_rollback_goes_back_to_is_let_go_last(folders, size, tmp_path):
    """The version before, whose source holds a newer content, could not be made again: others make room."""
    policy = shutil.copytree(folders[0], tmp_path / "policy")
    with engine_for(2 * size + size // 2, max_cpu_loras=2) as engine:
        engine.load_adapter("policy", policy)
        write_adapter(policy, seed=9)
        engine.load_adapter("policy", policy)
        for number in range(1, 4):
            engine.load_adapter(f"a{number}", folders[number])
        assert engine.rollback_adapter("policy").version == 1
        for number in range(4, 8):  # the source still holds the other content when the other version is forgotten
            engine.load_adapter(f"a{number}", folders[number])
        assert engine.generate("x", adapter="policy")[0].text == "policy says: x"
        assert copies(engine) <= 2


def test_a_version_that_cannot_come_back_goes_when_nothing_else_can(folders, size, tmp_path):
    """Whoever asks for it then is told; loading is never refused for its sake."""
    policy = shutil.copytree(folders[0], tmp_path / "policy")
    with engine_for(size + size // 2) as engine:
        engine.load_adapter("policy", policy)
        write_adapter(policy, seed=9)
        engine.load_adapter("policy", policy)
        with pytest.raises(CorruptAdapterError, match="load it again"):
            engine.rollback_adapter("policy")
        assert engine.adapters["policy"].version == 2
        shutil.copytree(folders[0], policy, dirs_exist_ok=True)
        assert engine.rollback_adapter("policy").version == 1


@pytest.mark.parametrize("source", ["folder", "tensors", "pickle", "blend"])
def test_a_full_disk_is_no_fault_of_the_adapter(folders, source, monkeypatch):
    """Whatever is loaded, the error says which folder has no room; what serves goes on serving."""
    torch, numbers = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    from safetensors import SafetensorError

    tensors = numbers.load_file(folders[1] / "adapter_model.safetensors")
    config = json.loads((folders[1] / "adapter_config.json").read_text())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_tensors(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with engine_for(None) as engine:
        engine.load_adapter("a", folders[0])
        before = engine.adapters
        if source == "folder":
            monkeypatch.setattr(content, "_copy", full)
        monkeypatch.setattr(numbers, "save_file", full_for_tensors)
        with pytest.raises(AdapterLoadError, match=rf"{engine._registry._store._folder} has no room: .*TMPDIR"):
            if source == "folder":
                engine.load_adapter("b", folders[1])
            elif source == "tensors":
                engine.load_adapter("b", TensorSource(tensors, config))
            elif source == "blend":
                engine.load_adapter("b", BlendSource({"a": 0.5}))
            else:
                (folders[1] / "adapter_model.safetensors").unlink()
                torch.save(tensors, folders[1] / "adapter_model.bin")
                engine.load_adapter("b", folders[1], allow_pickle=True)
        assert engine.adapters == before
        assert copies(engine) == 1


@settings(max_examples=25, deadline=None)
@given(
    room=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from(["load", "ask", "unload"]), st.integers(0, 4)), max_size=25),
)
def test_any_traffic_is_answered_rightly_within_any_budget(room, actions, tmp_path_factory):
    """Whatever is loaded, asked for and unloaded: answers come from the right adapter, and no copy is left behind."""
    folder = tmp_path_factory.mktemp("sources")
    sources = [write_adapter(folder / str(number), seed=number) for number in range(5)]
    size = sum(path.stat().st_size for path in sources[0].iterdir())
    with engine_for(room * size + size // 2) as engine:
        for action, number in actions:
            name = f"a{number}"
            if action == "load":
                engine.load_adapter(name, sources[number])
            elif name in engine.adapters and action == "ask":
                assert engine.generate("x", adapter=name)[0].text == f"{name} says: x"
            elif name in engine.adapters:
                engine.unload_adapter(name)
            assert copies(engine) <= room
        for name in engine.adapters:
            engine.unload_adapter(name)
        assert copies(engine) == 0
    shutil.rmtree(folder)
