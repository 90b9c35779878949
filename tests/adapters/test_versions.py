"""The versions of an adapter: replaced in one step, named exactly, taken back, pushed from memory; on the fake engine."""

import gc
import shutil
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_infer import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    AdapterNotLoadedError,
    BlendSource,
    CorruptAdapterError,
    EngineDeadError,
    FolderSource,
    IncompatibleAdapterError,
    TensorSource,
)
from qlora_infer.adapters.effect import Scores, effect
from qlora_infer.adapters.version import VersionNumbers
from qlora_infer.files.lineage import lineage
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter


@pytest.fixture
def backend():
    return FakeEngine()


@pytest.fixture
def engine(backend):
    with fake_engine(backend=backend) as engine:
        yield engine


def tensors_of(seed, rank=4):
    generator = np.random.default_rng(seed)
    return {
        f"base_model.model.{name}.lora_{factor}.weight": generator.normal(0, 0.02, shape).astype(np.float32)
        for name, (in_features, out_features) in TINY_MODEL.items()
        for factor, shape in (("A", (rank, in_features)), ("B", (out_features, rank)))
    }


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_a_version_can_be_named_by_number_and_by_digest(engine, tmp_path):
    """name@2, name@<beginning of the digest> run exactly that; the bare name runs the newest."""
    first = engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    second = engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    assert (first.version, second.version) == (1, 2)
    assert [held.version for held in engine.adapter_versions("a")] == [2, 1]
    names = ["a", "a@1", "a@2", f"a@{first.digest}", f"a@{second.digest[:7]}"]
    outputs = engine.generate(["x"] * 5, adapter=names)
    ids = [second.int_id, first.int_id, second.int_id, first.int_id, second.int_id]
    assert [output.adapter_id for output in outputs] == ids
    assert [output.text for output in outputs] == ["a says: x"] * 5
    for wrong in ("a@3", "a@0", "a@", f"a@{first.digest[:6]}", "b@1"):
        with pytest.raises(AdapterNotLoadedError):
            engine.generate("x", adapter=wrong)
    with pytest.raises(AdapterNotLoadedError, match=r"no version '9' now \(held: 1 \("):
        engine.generate("x", adapter="a@9")
    with pytest.raises(ValueError, match="'@'"):
        engine.load_adapter("a@1", tmp_path / "1")


def test_only_the_version_before_is_held(engine, backend, tmp_path):
    """The one that serves and the one before it are on disk; older ones are gone; old ones leave host memory at once."""
    for seed in range(4):
        engine.load_adapter("a", write_adapter(tmp_path / str(seed), seed=seed))
    assert [held.version for held in engine.adapter_versions("a")] == [4, 3]
    with pytest.raises(AdapterNotLoadedError, match="held: 3"):
        engine.generate("x", adapter="a@2")
    engine.generate("flush")
    assert backend.resident == ("a",)
    assert len(list(engine._registry._store._folder.iterdir())) == 2


def test_rollback_goes_back_and_forgets_the_newer(engine, backend, tmp_path):
    """After rollback the version before serves; running requests finish on theirs; there is no way further back."""
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    back = engine.rollback_adapter("a")
    assert back.version == 1
    assert engine.adapters["a"] == back
    assert engine.generate("x", adapter="a")[0].adapter_id == back.int_id
    with pytest.raises(AdapterNotLoadedError, match="no version of 'a' before 1"):
        engine.rollback_adapter("a")
    with pytest.raises(AdapterNotLoadedError):
        engine.rollback_adapter("nobody")
    third = engine.load_adapter("a", write_adapter(tmp_path / "3", seed=3))
    assert third.version == 3
    assert engine.rollback_adapter("a").version == 1
    engine.generate("flush")
    assert backend.resident == ("a",)
    assert len(list(engine._registry._store._folder.iterdir())) == 1


def test_a_rollback_that_cannot_be_loaded_changes_nothing(engine, backend, tmp_path):
    """When the version before does not load, the newer one still serves."""
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    newer = engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    engine.generate("flush")
    backend.refuse("a", "bad luck")
    with pytest.raises(AdapterLoadError):
        engine.rollback_adapter("a")
    assert engine.adapters["a"] == newer


def test_expect_lets_only_one_of_two_trainers_win(engine, tmp_path):
    """expect= names the version that must serve now, by number or digest, 0 for none; else nothing changes."""
    first = engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1), expect=0)
    with pytest.raises(AdapterConflictError, match="version 1, digest"):
        engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2), expect=0)
    with pytest.raises(AdapterConflictError):
        engine.load_adapter("a", tmp_path / "2", expect=2)
    with pytest.raises(AdapterConflictError, match="not loaded"):
        engine.load_adapter("b", tmp_path / "2", expect=1)
    assert engine.adapters == {"a": first}
    assert engine.load_adapter("a", tmp_path / "2", expect=first.digest).version == 2

    won, barrier = [], threading.Barrier(8)

    def push(seed):
        folder = write_adapter(tmp_path / f"race{seed}", seed=100 + seed)
        barrier.wait()
        try:
            won.append(engine.load_adapter("a", folder, expect=2).version)
        except AdapterConflictError:
            pass

    threads = [threading.Thread(target=push, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert won == [3]


def test_an_adapter_comes_straight_from_memory(engine, tmp_path):
    """A TensorSource serves like a folder with the same content, of numpy or torch, with PEFT's own names."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    tensors = tensors_of(1)
    loaded = engine.load_adapter("a", TensorSource(tensors, CONFIG))
    assert (loaded.source, loaded.rank, loaded.num_modules) == ("tensors in memory", 4, 14)
    assert engine.generate("x", adapter="a")[0].text == "a says: x"
    named = {name.replace(".weight", ".default.weight"): torch.from_numpy(t) for name, t in tensors.items()}
    again = engine.load_adapter("a", TensorSource(named, CONFIG))
    assert again.int_id == loaded.int_id  # the same bytes: nothing to load
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert engine.load_adapter("b", TensorSource(named, config)).rank == 4
    for wrong in ({}, [1], {"x": 1}):
        with pytest.raises(TypeError, match="tensors must be"):
            engine.load_adapter("c", TensorSource(wrong, CONFIG))
    with pytest.raises(TypeError, match="config must be"):
        engine.load_adapter("c", TensorSource(tensors, None))
    with pytest.raises(CorruptAdapterError):
        engine.load_adapter("c", TensorSource({"lora": np.array([1, 2], dtype=object)}, CONFIG))
    assert set(engine.adapters) == {"a", "b"}
    assert len(list(engine._registry._store._folder.iterdir())) == 2


def test_a_blend_serves_like_any_adapter(engine, tmp_path):
    """A BlendSource makes an adapter of loaded ones, of exact versions too, which later versions do not change."""
    pytest.importorskip("torch")
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1, rank=4, alpha=4))
    engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2, rank=4, alpha=4))
    engine.load_adapter("b", write_adapter(tmp_path / "3", seed=3, rank=8))
    blend = engine.load_adapter("mix", BlendSource({"a@1": 0.7, "b": -0.3}))
    assert (blend.rank, blend.version, blend.source) == (12, 1, "linear blend of 0.7 a@1, -0.3 b@1")
    assert engine.generate("x", adapter="mix")[0].text == "mix says: x"
    engine.load_adapter("b", write_adapter(tmp_path / "4", seed=4, rank=8))
    assert engine.adapters["mix"] == blend
    ties = engine.load_adapter("mix", BlendSource({"a@1": 0.5, "a": 0.5}, method="ties"), expect=1)
    assert (ties.rank, ties.version) == (4, 2)


def test_what_is_in_memory_loads_while_a_source_waits_for_its_turn(tmp_path):
    """A blend, and tensors, are loaded also while two contents of another name are loaded one after the other."""
    pytest.importorskip("torch")
    with fake_engine(backend=FakeEngine(load_seconds=0.3)) as engine:
        engine.load_adapter("a", write_adapter(tmp_path / "a"))
        folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
        threads = [threading.Thread(target=engine.load_adapter, args=("other", folder)) for folder in folders]
        for thread in threads:
            thread.start()
        time.sleep(0.1)  # one is read, the other waits
        assert engine.load_adapter("mix", BlendSource({"a": 1.0})).version == 1
        assert engine.load_adapter("tensors", TensorSource(tensors_of(3), CONFIG)).version == 1
        for thread in threads:
            thread.join()
        assert engine.adapters["other"].version == 2


@pytest.mark.parametrize(
    ("adapters", "arguments", "error", "message"),
    [
        ({"a": 1, "gone": 1}, {}, AdapterNotLoadedError, "'gone'"),
        ({}, {}, ValueError, "at least one"),
        ({"a": float("nan")}, {}, ValueError, "finite"),
        ({"a": 1}, {"method": "magic"}, ValueError, "dare_ties"),
        ({"a": 1}, {"method": "ties", "density": 0}, ValueError, "density"),
        ({"a": 1, "b": 1}, {"method": "ties"}, ValueError, "one rank"),
        ({"a": 1, "b": 1, "c": 1}, {}, IncompatibleAdapterError, "rank 76"),
        (["a"], {}, TypeError, "mapping"),
    ],
)
def test_a_blend_that_cannot_be_changes_nothing(adapters, arguments, error, message, tmp_path):
    """Each mistake is told; what is loaded stays as it was, and no file is left behind."""
    pytest.importorskip("torch")
    with fake_engine(max_lora_rank=64) as engine:
        for name, rank in (("a", 4), ("b", 8), ("c", 64)):
            engine.load_adapter(name, write_adapter(tmp_path / name, rank=rank))
        before = engine.adapters
        with pytest.raises(error, match=message):
            engine.load_adapter("mix", BlendSource(adapters, **arguments))
        assert engine.adapters == before
        assert len(list(engine._registry._store._folder.iterdir())) == 3


def test_an_effect_is_measured_on_any_texts(engine, tmp_path):
    """verify_adapter compares each token but a text's first; what it cannot compare is told at the door."""
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    found = engine.verify_adapter("a@1", ["one two three", "four five"])
    assert (found.adapter, found.num_tokens, found.share_changed, found.mean_shift) == ("a@1", 3, 0.0, 0.0)
    assert engine.verify_adapter("a").num_tokens > 50
    with pytest.raises(ValueError, match="at least two tokens"):
        engine.verify_adapter("a", ["one"])
    with pytest.raises(ValueError, match="at least one text"):
        engine.verify_adapter("a", [])
    with pytest.raises(AdapterNotLoadedError):
        engine.verify_adapter("gone")


def test_scores_are_compared_token_by_token():
    """The share counts places with another favourite, the shift is the mean distance of log-probabilities."""
    base = [Scores([-1.0, -2.0], [5, 6]), Scores([-3.0], [7])]
    adapted = [Scores([-1.5, -2.0], [5, 9]), Scores([-2.0], [8])]
    found = effect("a@1", base, adapted, (base, base))
    assert (found.num_tokens, found.share_changed) == (3, pytest.approx(2 / 3))
    assert (found.mean_shift, found.reference_base_shift, found.reference_shift) == (0.5, 0.0, 0.5)


def test_a_pinned_adapter_stays_in_host_memory(tmp_path):
    """pin keeps an adapter, and the version that replaces it, while others come and go; unpin lets it leave."""
    backend = FakeEngine()
    with fake_engine(backend=backend, max_loras=1, max_cpu_loras=2) as engine:
        for seed, name in enumerate(["kept", "b", "c", "d"]):
            engine.load_adapter(name, write_adapter(tmp_path / name, seed=seed))
        engine.pin_adapter("kept")
        engine.generate(["x"] * 9, adapter=["b", "c", "d"] * 3)
        assert "kept" in backend.resident
        engine.load_adapter("kept", write_adapter(tmp_path / "new", seed=9))
        engine.generate(["x"] * 9, adapter=["b", "c", "d"] * 3)
        assert "kept" in backend.resident
        with pytest.raises(AdapterLoadError, match="unpin one"):
            engine.pin_adapter("b")
        engine.unpin_adapter("kept")
        engine.generate(["x"] * 9, adapter=["b", "c", "d"] * 3)
        assert "kept" not in backend.resident
        for call in (engine.pin_adapter, engine.unpin_adapter, lambda name: engine.prefetch_adapters([name])):
            with pytest.raises(AdapterNotLoadedError):
                call("nobody")


def test_prefetch_reads_ahead(tmp_path):
    """prefetch brings adapters into host memory before anybody asks for them, as far as there is room."""
    backend = FakeEngine()
    with fake_engine(backend=backend, max_loras=1, max_cpu_loras=2) as engine:
        for seed, name in enumerate("abc"):
            engine.load_adapter(name, write_adapter(tmp_path / name, seed=seed))
        assert "a" not in backend.resident
        del backend.loads[:]
        engine.prefetch_adapters(["a"])
        assert backend.loads == ["a"]
        assert engine.generate("x", adapter="a")[0].text == "a says: x"


class SlowReader(FakeEngine):
    """Reads an adapter in the time of twenty steps, as long as there is anything to step."""

    def start_load(self, version):
        super().start_load(version)
        self.begun_at = self.num_steps

    def poll_loads(self):
        is_read = not self._being_read or self.num_steps >= self.begun_at + 20 or not self.num_unfinished
        return super().poll_loads() if is_read else {}


def test_steps_go_on_while_an_adapter_is_read(tmp_path):
    """Neither load_adapter nor a request of a cold adapter holds up the requests that run."""
    backend = SlowReader(step_seconds=0.002)
    with fake_engine(backend=backend, max_loras=1, max_cpu_loras=1) as engine:
        busy = engine.add_request(" ".join(["word"] * 30_000), {"max_tokens": 30_000})
        while not backend.num_steps:
            pass
        engine.load_adapter("a", write_adapter(tmp_path / "a", seed=1))
        engine.load_adapter("b", write_adapter(tmp_path / "b", seed=2))
        assert backend.num_steps >= 40
        assert backend.resident == ("b",)
        assert engine.add_request("x", adapter="a").result(timeout=30).text == "a says: x"
        assert backend.num_steps >= 60
        cancelled = engine.add_request("x", adapter="b")
        while backend.loads[-1] != "b":
            pass
        cancelled.cancel()
        assert engine.add_request("x", adapter="a").result(timeout=30).text == "a says: x"
        assert not busy.done()


def test_an_adapter_is_read_at_once_while_nothing_else_runs(tmp_path):
    """With nobody to hold up, the first request of a cold adapter does not wait for steps that never come."""
    with fake_engine(backend=FakeEngine(load_seconds=0.1), max_loras=1, max_cpu_loras=1) as engine:
        for seed, name in enumerate("ab"):
            engine.load_adapter(name, write_adapter(tmp_path / name, seed=seed))
        assert engine.add_request("x", adapter="a").result(timeout=30).text == "a says: x"


def test_many_calls_for_one_adapter_are_one_or_two(engine, backend, tmp_path):
    """Threads that ask for the same source at once share its load; one that began before they asked is not theirs."""
    folder = write_adapter(tmp_path / "a", seed=1)
    began, go_on = threading.Event(), threading.Event()

    def start_load(version):
        began.set()
        go_on.wait(30)
        FakeEngine.start_load(backend, version)

    backend.start_load = start_load
    results = []

    def load():
        results.append(engine.load_adapter("a", folder).digest)

    first = threading.Thread(target=load)
    first.start()
    began.wait(30)
    write_adapter(folder, seed=2)
    others = [threading.Thread(target=load) for _ in range(10)]
    for thread in others:
        thread.start()
    while len(engine._loader._waiting) != 1 or sum(thread.is_alive() for thread in others) < 10:
        pass
    go_on.set()
    for thread in [first, *others]:
        thread.join(30)
    assert backend.loads == ["a", "a"]
    assert len(set(results[1:])) == 1
    assert results[0] != results[1] == engine.adapters["a"].digest
    assert not engine._loader._waiting


def test_a_thousand_adapters_on_eight_slots(tmp_path):
    """A thousand registered adapters answer through eight slots and few places, each with its own name."""
    backend = FakeEngine()
    adapters = {f"a{i}": write_adapter(tmp_path / str(i), rank=1, seed=i) for i in range(1000)}
    with fake_engine(backend=backend, adapters=adapters, max_loras=8, max_cpu_loras=16) as engine:
        outputs = engine.generate(["x"] * 1000, adapter=list(adapters))
        assert [output.text for output in outputs] == [f"{name} says: x" for name in adapters]
        assert len(backend.resident) <= 16


def test_a_thousand_replacements_under_load(tmp_path):
    """Replaced a thousand times while requests run: each request is answered by one version, and nothing piles up."""
    backend = FakeEngine()
    folders = [write_adapter(tmp_path / str(seed), rank=1, seed=seed) for seed in range(4)]
    with fake_engine(backend=backend, max_loras=2) as engine:
        engine.load_adapter("a", folders[0])
        stop, seen = threading.Event(), set()

        def ask():
            while not stop.is_set():
                parts = list(engine.stream("one two three", {"max_tokens": 9}, adapter="a"))
                assert len({part.adapter_id for part in parts}) == 1
                seen.add(parts[-1].adapter_id)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 1001):
            loaded = engine.load_adapter("a", folders[number % 4])
        stop.set()
        for thread in threads:
            thread.join(30)
        assert loaded.version == 1001
        assert len(seen) > 10
        engine.generate("flush")
        gc.collect()
        assert len(backend.resident) == 1
        assert len(list(engine._registry._store._folder.iterdir())) == 2
        assert len(engine.adapter_versions("a")) == 2
        assert engine._registry._num_alive == {"a": 2}


def test_replacing_keeps_an_adapter_s_numbers(engine, tmp_path):
    """stats() counts by name: a new version goes on where the old one was; unloading ends it."""
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    engine.generate("x", adapter="a")
    engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    engine.generate("x", adapter="a")
    assert engine.stats().adapters["a"].num_finished == 2
    engine.unload_adapter("a")
    engine.generate("flush")
    assert "a" not in engine.stats().adapters


@pytest.mark.parametrize(
    ("trained_on", "served", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "same"),
        ("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B", "quantized"),
        ("unsloth/Llama-3.1-8B-bnb-4bit", "org/Llama-3.1-8B-AWQ", "quantized"),
        ("unsloth/Llama-3.1-8B-unsloth-bnb-4bit", "org/Llama-3.1-8B-GPTQ-Int4", "quantized"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v0.3", "TheBloke/TinyLlama-1.1B-Chat-v0.3-AWQ", "quantized"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/x/demo-v3/SmolLM2-135M-Instruct-none", "quantized"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "other"),
        ("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3", "other"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B", "other"),
        (None, "org/model", "unknown"),
    ],
)
def test_lineage_is_read_from_names(trained_on, served, expected):
    """Another quantization of the same model is told from another model."""
    assert lineage(trained_on, served) == expected


HUB_CACHE = "/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd6066d109eabc6255188de91218"


@pytest.mark.parametrize(
    ("trained_on", "served", "expected"),
    [
        (HUB_CACHE, "Qwen/Qwen3-8B", "same"),
        ("Qwen/Qwen3-8B", HUB_CACHE + "/", "same"),
        (HUB_CACHE.replace("/", "\\"), "Qwen/Qwen3-8B", "same"),
        (HUB_CACHE, "Qwen/Qwen3-8B-AWQ", "quantized"),
        (HUB_CACHE, "org/Qwen3-4B", "other"),
        ("hub/models--gpt2/snapshots/607a30d", "gpt2", "same"),
        ("/mnt/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-AWQ", "quantized"),
        ("/kaggle/input/qwen2.5/transformers/0.5b-instruct/1", "Qwen/Qwen2.5-0.5B-Instruct", "quantized"),
        ("/kaggle/input/qwen-3/transformers/8b/1/", "Qwen/Qwen3-8B", "quantized"),
        ("/kaggle/input/gemma-2/transformers/gemma-2-9b-it/2", "google/gemma-2-9b-it", "quantized"),
        ("/kaggle/input/models/qwen-lm/qwen-3/transformers/8b/1", "Qwen/Qwen3-8B-AWQ", "quantized"),
        ("/kaggle/input/mistral-7b-v0.3/pytorch/default/1", "mistralai/Mistral-7B-v0.3", "quantized"),
        ("/kaggle/input/llama-3-1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", "quantized"),
        ("/kaggle/input/my-models/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "quantized"),
        ("~/.cache/kagglehub/models/google/gemma/transformers/2b/2", "google/gemma-2b", "quantized"),
        ("/kaggle/input/gemma/transformers/2b/2", "google/gemma-7b", "other"),
        ("/kaggle/input/qwen-3/transformers/8b/1", "Qwen/Qwen3-4B", "other"),
    ],
)
def test_lineage_knows_where_caches_put_a_model(trained_on, served, expected):
    """A trainer that was given a folder of the Hub's, ModelScope's or Kaggle's cache writes that folder as its base."""
    assert lineage(trained_on, served) == expected


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_name_has_a_lineage(trained_on, served):
    """Names are untrusted text; comparing them never fails."""
    assert lineage(trained_on, served) in ("same", "quantized", "other", "unknown")


def test_lineage_is_told(tmp_path, caplog):
    """Loading says when an adapter was trained on another build of the model, and warns when on another model."""
    with fake_engine("org/Llama-3-8B-AWQ") as engine, caplog.at_level("INFO", logger="qlora_infer"):
        build = engine.load_adapter("a", write_adapter(tmp_path / "1", base_model="unsloth/Llama-3-8B-bnb-4bit"))
        other = engine.load_adapter("b", write_adapter(tmp_path / "2", base_model="org/Mistral-7B"))
    assert (build.lineage, other.lineage) == ("quantized", "other")
    assert "is a build" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "org/Mistral-7B" in warnings[0]


class SeesImages(FakeEngine):
    """A model with a vision tower."""

    def lora_modules(self):
        shapes = {name: ModuleShape(*shape) for name, shape in TINY_MODEL.items()}
        return ModelModules(shapes, left_out=("model.visual.",))


def without_effect(folder, *, factor="lora_B", but=(), **options):
    """An adapter as it is before training: one factor of each module is zeros, but of those that are named."""
    weights = write_adapter(folder, **options) / "adapter_model.safetensors"
    tensors = {
        name: tensor.copy() if factor not in name or any(part in name for part in but) else tensor * 0
        for name, tensor in map_tensors("zero", weights).items()
    }
    write_tensors(weights, tensors)
    return folder


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_nothing_is_loaded_with_a_warning_that_names_it(tmp_path, caplog, factor):
    """All B are zeros before training begins: it is served, exactly as the base, and the log says why."""
    with fake_engine() as engine, caplog.at_level("WARNING", logger="qlora_infer"):
        engine.load_adapter("trained", write_adapter(tmp_path / "trained"))
        engine.load_adapter("half", without_effect(tmp_path / "half", factor=factor, but=["layers.1.mlp.down_proj"]))
        assert not caplog.records
        engine.load_adapter("fresh", without_effect(tmp_path / "fresh", factor=factor))
        assert engine.generate("x", adapter="fresh")[0].text
    (record,) = caplog.records
    assert "adapter 'fresh' changes nothing" in record.getMessage()
    assert "each of the 14 modules" in record.getMessage()


def test_an_adapter_whose_only_changes_are_left_out_changes_nothing(tmp_path, caplog):
    """What it learned is in the vision tower, which text does not pass: for this engine it is untrained."""
    tower = "model.visual.blocks.0.attn.proj"
    folder = without_effect(tmp_path / "a", but=[tower], modules={**TINY_MODEL, tower: (64, 64)})
    with fake_engine(backend=SeesImages()) as engine, caplog.at_level("WARNING", logger="qlora_infer"):
        assert engine.load_adapter("blind", folder).num_modules == len(TINY_MODEL)
    (record,) = caplog.records
    assert "adapter 'blind' changes nothing" in record.getMessage()


def test_a_name_that_is_unloaded_during_a_rollback_leaves_nothing(tmp_path):
    """The version that was on its way back is neither in host memory nor on disk afterwards, nor asked of its source."""
    backend = FakeEngine(load_seconds=0.5)
    with fake_engine(backend=backend) as engine:
        for seed in (0, 1):
            engine.load_adapter("pirate", write_adapter(tmp_path / str(seed), seed=seed))
            shutil.rmtree(tmp_path / str(seed))
        refused = []

        def roll_back():
            with pytest.raises(AdapterNotLoadedError) as error:
                engine.rollback_adapter("pirate")
            refused.append(error)

        thread = threading.Thread(target=roll_back)
        thread.start()
        before = engine._registry.before("pirate")
        time.sleep(0.2)  # while it is read
        engine.unload_adapter("pirate")
        thread.join(10)
        assert refused
        engine.generate("hello")  # what was posted to the driving thread is done
        assert backend.resident == ()
        assert not before.path.exists()


def test_a_pin_ends_with_a_name_that_is_unloaded_before_it_began(tmp_path):
    """The places in host memory are not fewer for a name that nobody has any more."""
    with fake_engine(backend=FakeEngine(load_seconds=0.5), max_loras=1, max_cpu_loras=2) as engine:
        for name in ("a", "b"):
            engine.load_adapter(name, write_adapter(tmp_path / name))
        engine.load_adapter("c", write_adapter(tmp_path / "c"))  # a is in host memory no more
        thread = threading.Thread(target=engine.pin_adapter, args=("a",))
        thread.start()
        time.sleep(0.2)  # while it is read
        engine.unload_adapter("a")
        thread.join(10)
        engine.pin_adapter("b")


def test_a_number_is_never_another_content_s(engine, tmp_path):
    """After unload_adapter a name's numbers go on: name@1 and expect=1 of before mean nothing of what came after."""
    engine.load_adapter("a", write_adapter(tmp_path / "1", seed=1))
    engine.unload_adapter("a")
    again = engine.load_adapter("a", write_adapter(tmp_path / "2", seed=2))
    assert again.version == 2
    with pytest.raises(AdapterNotLoadedError, match="held: 2"):
        engine.generate("x", adapter="a@1")
    with pytest.raises(AdapterConflictError):
        engine.load_adapter("a", tmp_path / "1", expect=1)


@given(
    events=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["load", "load", "unload"]))),
    num_remembered=st.integers(0, 2),
)
def test_numbers_grow_however_few_names_are_remembered(events, num_remembered):
    """Each number of a name is larger than all before it, and what is kept of names that are gone is bounded."""
    numbers = VersionNumbers(num_remembered)
    newest, loaded = {}, set()
    for name, event in events:
        if event == "load":
            number = numbers.next(name)
            assert number > newest.get(name, 0)
            newest[name] = number
            loaded.add(name)
        elif name in loaded:
            numbers.end(name)
            loaded.remove(name)
        assert numbers.num_names <= len(loaded) + num_remembered


def test_names_that_are_gone_leave_no_locks(engine, tmp_path):
    """A service that loads ever new names, well or badly, keeps nothing of them."""
    source = write_adapter(tmp_path / "source")
    for number in range(5):
        engine.load_adapter(f"good-{number}", source)
        engine.unload_adapter(f"good-{number}")
        with pytest.raises(AdapterNotFoundError):
            engine.load_adapter(f"bad-{number}", tmp_path / "nothing")
    assert len(engine._registry._loading) == 0


def with_a_death(engine, backend, folder):
    """Prepare that the engine is found dead as ``rollback`` has an adapter read."""
    for seed in range(2):
        engine.load_adapter("a", write_adapter(folder / str(seed), seed=seed))
    engine.generate("x")  # the version before has left memory
    backend.die()


def test_who_keeps_an_error_keeps_no_lock(tmp_path, backend):
    """The lock of a name is gone when the call ends, though the error is kept, and frames with its traceback."""
    with fake_engine(backend=backend, restart="on-failure") as engine:
        with_a_death(engine, backend, tmp_path)
        with pytest.raises(EngineDeadError) as raised:
            engine.rollback_adapter("a")
        assert "rollback" in {entry.name for entry in raised.traceback}
        assert len(engine._registry._loading) == 0
        assert engine.rollback_adapter("a").version == 1


def test_a_log_keeps_no_frames(tmp_path, backend, caplog):
    """A log handler that keeps its records keeps no error, whose traceback has the frames of those who called."""
    with fake_engine(backend=backend, restart="on-failure") as engine:
        with_a_death(engine, backend, tmp_path)
        with pytest.raises(EngineDeadError):
            engine.rollback_adapter("a")
        engine.generate("x")
    assert ("it was killed",) in [record.args for record in caplog.records]


@pytest.mark.parametrize(
    ("kind", "error_class"),
    [("bad source", AdapterNotFoundError), ("refused", AdapterLoadError), ("death", EngineDeadError)],
)
def test_an_error_is_gone_with_the_last_who_holds_it(tmp_path, backend, kind, error_class):
    """It and the frames of its traceback are freed at once, and wait for no garbage collection."""
    with fake_engine(backend=backend, restart="on-failure") as engine:
        with_a_death(engine, backend, tmp_path)
        if kind != "death":
            engine.generate("x")  # it is alive again
        if kind == "refused":
            backend.refuse("a", "not any more")
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(error_class) as raised:
                engine.load_adapter("a", tmp_path / "nothing") if kind == "bad source" else engine.rollback_adapter("a")
            error = weakref.ref(raised.value)
            del raised
            engine.generate("x")  # the driving thread has gone on
            assert error() is None
        finally:
            gc.enable()


# Copies that have made room for others -----------------------------------------------------------------------------


def with_few_copies(folder, backend, *, names="abc", copies=1, **arguments):
    """An engine with some adapters, of which the disk holds so many copies: those of the first have made room."""
    sources = {name: write_adapter(folder / name, seed=seed) for seed, name in enumerate(names)}
    size = sum(path.stat().st_size for path in sources["a"].iterdir())
    engine = fake_engine(backend=backend, max_disk_bytes=int(size * (copies + 0.5)), **arguments)
    for name, source in sources.items():
        engine.load_adapter(name, source)
    return engine, sources


def test_a_source_that_fails_slowly_stops_nobody(tmp_path, monkeypatch):
    """Its requests get the error, all of one fetch, while others get their tokens; later ones have it fetched again."""
    backend = FakeEngine(step_seconds=0.01, reply=lambda prompt, adapter: "word " * 500)
    engine, _ = with_few_copies(tmp_path, backend, max_cpu_loras=1, max_loras=1)
    threads = []

    def fail(source, name, into, **how):
        threads.append(threading.current_thread().name)
        time.sleep(0.5)
        raise AdapterNotFoundError(name, "it is gone")

    monkeypatch.setattr(FolderSource, "fetch", fail)
    with engine:
        stream = engine.add_request("hello", {"max_tokens": 500})
        next(iter(stream))
        asked = [engine.add_request("hello", adapter="a") for _ in range(3)]
        for handle in asked:
            with pytest.raises(AdapterNotFoundError):
                handle.result(20)
        assert len(threads) == 1
        with pytest.raises(AdapterNotFoundError):
            engine.generate("hello", adapter="a")
        assert len(threads) == 2
        assert not any("drive" in name for name in threads), threads
        assert stream.result(20).finished


def test_a_source_that_is_gone_does_not_keep_the_engine_from_running_again(tmp_path):
    """After a restart the other adapters answer, and the requests of the one that is gone get its error."""
    backend = FakeEngine()
    engine, sources = with_few_copies(tmp_path, backend, max_cpu_loras=8, max_loras=1, restart="on-failure")
    shutil.rmtree(sources["a"])
    with engine:
        assert engine.generate("hello", adapter="a")[0].finished  # from host memory
        backend.die("killed")
        assert engine.generate("hello", adapter="c")[0].finished
        assert engine.is_running
        with pytest.raises(AdapterNotFoundError):
            engine.generate("hello", adapter="a")


def test_blends_are_made_of_adapters_whose_copies_are_gone(tmp_path):
    """They are fetched again."""
    pytest.importorskip("torch")
    engine, _ = with_few_copies(tmp_path, FakeEngine(), names="abcde", copies=4, max_cpu_loras=8)
    with engine:
        assert engine.load_adapter("both", BlendSource({"a": 0.5, "b": 0.5})).rank > 0


def test_the_same_content_is_had_from_where_it_was_named_last(tmp_path):
    """A source that is gone is not asked again once the same content was loaded from another."""
    engine, sources = with_few_copies(tmp_path, FakeEngine(), max_cpu_loras=1, max_loras=1)
    shutil.copytree(sources["a"], tmp_path / "moved")
    shutil.rmtree(sources["a"])
    with engine:
        assert engine.load_adapter("a", tmp_path / "moved").version == 1
        assert engine.adapters["a"].source == str(tmp_path / "moved")
        assert engine.generate("hello", adapter="a")[0].finished


def test_adapters_may_be_more_than_the_disk_holds_also_at_the_start(tmp_path):
    """Those that are given to the engine are loaded as those that come one by one."""
    sources = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abcd")}
    size = sum(path.stat().st_size for path in sources["a"].iterdir())
    with fake_engine(adapters=sources, max_disk_bytes=int(2.5 * size)) as engine:
        assert [output.adapter for output in engine.generate(["hello"] * 4, adapter=list("abcd"))] == list("abcd")


# Pins --------------------------------------------------------------------------------------------------------------


def test_a_pin_ends_with_its_adapter(tmp_path):
    """Its place is free again, and a later adapter of that name is not pinned unasked; a version can be unpinned."""
    backend = FakeEngine()
    source = write_adapter(tmp_path / "source")
    with fake_engine(backend=backend, max_cpu_loras=3, max_loras=2) as engine:
        for name in ("a", "b", "c", "b"):
            engine.load_adapter(name, source)
            engine.pin_adapter(name)
            engine.unload_adapter(name)
        version = engine.load_adapter("a", source).version
        engine.pin_adapter(f"a@{version}")
        engine.unpin_adapter(f"a@{version}")
        engine.load_adapter("b", source)
        engine.pin_adapter("b")


def test_pinned_adapters_may_be_replaced_at_once(tmp_path):
    """None of them leaves the engine behind the library's back, and each answers with its new content."""
    sources = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(10)]
    backend = FakeEngine(step_seconds=0.01, load_seconds=0.05, reply=lambda prompt, adapter: "word " * 400)
    with fake_engine(backend=backend, max_cpu_loras=6, max_loras=1) as engine:
        for number in range(5):
            engine.load_adapter(f"a{number}", sources[number])
            engine.pin_adapter(f"a{number}")
        engine.load_adapter("running", sources[5])
        running = engine.add_request("hello", {"max_tokens": 400}, adapter="running")
        next(iter(running))
        threads = [
            threading.Thread(target=engine.load_adapter, args=(f"a{number}", sources[5 + number]))
            for number in range(1, 5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running.cancel()
        for number in range(5):
            output = engine.generate("hello", {"max_tokens": 1}, adapter=f"a{number}")[0]
            assert output.adapter == f"a{number}"
        assert engine.stats().num_restarts == 0


def test_what_a_trainer_pushed_is_not_kept_alive(engine):
    """The engine has its own copy: the trainer's tensors are free once the call returns."""
    tensors = tensors_of(1)
    kept = weakref.ref(next(iter(tensors.values())))
    engine.load_adapter("pushed", TensorSource(tensors, CONFIG))
    del tensors
    gc.collect()
    assert kept() is None
    assert engine.adapters["pushed"].source == "tensors in memory"
