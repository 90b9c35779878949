"""Faults on purpose, on the fake engine: each ends in a typed error, and what was serving serves.

Those that need vLLM are in ``tests/engine/test_faults.py`` and ``test_left_behind.py``; those of sources in
``test_fsspec.py`` and ``test_hub.py``; those of templates' processes in ``test_extras.py``.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qlora_infer import (
    AdapterLoadError,
    BlendSource,
    MissingDependencyError,
    QuantizedLoRAEngine,
    StorageError,
    TensorSource,
)
from qlora_infer.adapters.registry import HELD_VERSIONS
from qlora_infer.files import scratch as _scratch
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

LONG = {"max_tokens": 64}


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A folder for temporary files that is this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(_scratch, "_folders", {})
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def require_serving(engine, adapter):
    """It answers, with the adapter that was there before the fault."""
    assert engine.generate("hello", adapter=adapter)[0].text == f"{adapter} says: hello"


def test_without_a_folder_for_temporary_files_the_error_says_so(monkeypatch, tmp_path):
    """No engine is half made, and the message names the variable that chooses another folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(_scratch, "_folders", {})
    backend = FakeEngine()
    with pytest.raises(StorageError, match=r"set TMPDIR") as caught:
        QuantizedLoRAEngine("org/model", backend=backend)
    assert isinstance(caught.value, OSError)
    assert backend.num_starts == 0


def test_a_store_that_is_deleted_costs_no_adapter_that_serves(scratch, tmp_path):
    """What is loaded answers; the next adapter is copied into a new folder, or refused with a typed error."""
    source = write_adapter(tmp_path / "pirate")
    with fake_engine(adapters={"pirate": source}) as engine:
        for folder in scratch.iterdir():
            shutil.rmtree(folder)
        require_serving(engine, "pirate")
        engine.load_adapter("other", write_adapter(tmp_path / "other"))
        require_serving(engine, "other")
        require_serving(engine, "pirate")
    assert not list(scratch.glob("*/store-*"))


def test_a_copy_that_is_gone_is_made_again_when_it_is_needed(scratch, tmp_path, caplog):
    """As where old temporary files are removed each night: an adapter that must be read again comes from its source."""
    sources = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("pirate", "other"))}
    with fake_engine(adapters=sources, max_loras=1, max_cpu_loras=1) as engine:
        require_serving(engine, "other")
        (store,) = scratch.glob("*/store-*")
        for path in store.rglob("*.safetensors"):
            path.unlink()
        require_serving(engine, "pirate")
        assert "the copy of adapter pirate is gone" in caplog.text
        assert len(list(store.rglob("*.safetensors"))) == 1


@pytest.fixture
def small_disk(scratch):
    """A filesystem of 8 MiB for temporary files."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(scratch)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a test may not mount a filesystem here; test_copies.py has the fault as a raised error")
    yield scratch
    subprocess.run(["umount", "--lazy", str(scratch)], check=True)


def test_a_disk_that_is_full_refuses_one_adapter(small_disk, tmp_path):
    """While its copy is made: the message says where room is missing, and what is loaded serves."""
    source, large = write_adapter(tmp_path / "pirate"), write_adapter(tmp_path / "large", rank=64)
    with fake_engine(adapters={"pirate": source}, max_lora_rank=64) as engine:
        filling = next(small_disk.glob("qlora-infer-*")) / "filling"
        filling.write_bytes(bytes(shutil.disk_usage(small_disk).free - 16_384))
        with pytest.raises(AdapterLoadError, match="has no room"):
            engine.load_adapter("large", large)
        require_serving(engine, "pirate")
        assert set(engine.adapters) == {"pirate"}
        filling.unlink()
        engine.load_adapter("large", large)
        require_serving(engine, "large")


def test_a_clock_that_jumps_ends_no_request(monkeypatch, tmp_path):
    """Deadlines follow the clock that only goes forward; the system's time may be set while requests run."""
    now = time.time
    with fake_engine(
        backend=FakeEngine(step_seconds=0.005), adapters={"pirate": write_adapter(tmp_path / "pirate")}
    ) as engine:
        handles = [engine.add_request("a " * 40, LONG, adapter="pirate", timeout=30) for _ in range(4)]
        for jump in (86_400, -86_400):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            time.sleep(0.05)
        assert {handle.result(timeout=10).text for handle in handles} == {"pirate says: " + "a " * 40}


def test_ten_deaths_in_a_row_end_no_engine_that_restarts(tmp_path):
    """With restart="on-failure", each new core has the adapters, and answers."""
    backend = FakeEngine()
    with fake_engine(
        backend=backend, restart="on-failure", adapters={"pirate": write_adapter(tmp_path / "pirate")}
    ) as engine:
        num_threads = threading.active_count()
        for number in range(10):
            backend.die(f"death {number}")
            require_serving(engine, "pirate")
        assert engine.stats().num_restarts == 10
        assert threading.active_count() <= num_threads


def test_a_thousand_loads_of_one_name_leave_one_adapter(scratch, tmp_path):
    """From 50 threads, while requests run: every load is a version of its own, the name ends on one, nothing is left."""
    sources = [write_adapter(tmp_path / f"source-{number}", seed=number) for number in range(5)]
    with fake_engine(adapters={"same": sources[0]}) as engine:
        with ThreadPoolExecutor(50) as pool:
            loads = [pool.submit(engine.load_adapter, "same", sources[number % 5]) for number in range(1000)]
            while not all(load.done() for load in loads):
                require_serving(engine, "same")
        versions = [load.result() for load in loads]
        assert len({version.int_id for version in versions}) == len({version.version for version in versions})
        assert engine.adapters["same"] in versions
        assert engine.adapters["same"].version == max(version.version for version in versions)
        require_serving(engine, "same")
        (store,) = scratch.glob("*/store-*")
        assert len(list(store.iterdir())) <= HELD_VERSIONS


@pytest.mark.parametrize(
    ("call", "packages"),
    [
        (lambda engine, _: engine.load_adapter("new", TensorSource({"a": np.zeros(1)}, {})), "safetensors"),
        (lambda engine, pickled: engine.load_adapter("new", pickled, allow_pickle=True), "torch safetensors"),
        (lambda engine, _: engine.load_adapter("new", BlendSource({"pirate": 0.5, "other": 0.5})), "torch safetensors"),
    ],
    ids=["memory", "pickle", "blend"],
)
def test_a_package_that_is_missing_is_no_fault_of_the_adapter(call, packages, tmp_path, monkeypatch):
    """A light install has neither torch nor safetensors: the error has the command, and what is loaded serves."""
    pickled = tmp_path / "pickled"
    write_adapter(pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    adapters = {"pirate": write_adapter(tmp_path / "pirate"), "other": write_adapter(tmp_path / "other")}
    for package in packages.split():
        monkeypatch.setitem(sys.modules, package, None)
    with fake_engine(adapters=adapters) as engine:
        with pytest.raises(MissingDependencyError, match=f"pip install {packages}$"):
            call(engine, pickled)
        assert set(engine.adapters) == set(adapters)
        require_serving(engine, "pirate")


def test_what_a_killed_process_left_is_removed_by_the_next(scratch):
    """Its folder of temporary files goes; those of living processes stay, and whatever is new or has another name."""
    program = "import os; from qlora_infer.files.scratch import scratch_folder; print(scratch_folder()); os.abort()"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    left = Path(ended.stdout.strip())
    assert left.is_dir()
    new, living, other = (scratch / name for name in ("qlora-infer-run-new", "qlora-infer-run-living", "qlora-infer-x"))
    for folder in (new, living, other):
        folder.mkdir()
    for folder in (left, living, other):
        os.utime(folder, (0, 0))
    holder = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        mine = _scratch.scratch_folder()
    finally:
        os.close(holder)
    assert set(scratch.iterdir()) == {new, living, other, mine}
    assert _scratch.scratch_folder() == mine
