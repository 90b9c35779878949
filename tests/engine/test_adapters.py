"""Adapters that come and go in the real vLLM while requests run."""

import shutil
import threading

import pytest
from broken_adapters import BROKEN
from safetensors import safe_open

from engine.conftest import LIVELY_FORMS
from qlora_infer import AdapterError, AdapterNotLoadedError
from qlora_infer.demo import demo_adapters

GREEDY = {"temperature": 0.0, "max_tokens": 24}
LONG = {"temperature": 0.0, "max_tokens": 120, "ignore_eos": True}
PROMPT = "The capital of France is"


def test_adapters_tells_what_vllm_was_given(engine, engines):
    """Each adapter has an id of its own, its rank, and how many modules it changes."""
    adapters = engine.adapters
    for name, folder in engines.demo.adapters.items():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            factors = [key for key in file.keys() if "lora_A" in key]  # noqa: SIM118
            assert adapters[name].rank == max(len(file.get_tensor(key)) for key in factors)
        assert adapters[name].num_modules == len(factors)
    assert len({adapter.int_id for adapter in adapters.values()}) == 3


@pytest.mark.parametrize("engine", LIVELY_FORMS, indirect=True)
def test_an_adapter_is_replaced_while_requests_stream(engine, engines, tmp_path):
    """Requests in flight finish on the old version; later ones, with the same prompt, run on the new.

    Only the bytes in the folder change, and prefix caching is on: neither old KV blocks nor the old id may answer.
    """
    folders = engines.demo.adapters
    folder = shutil.copytree(folders["pirate"], tmp_path / "habit")
    old = engine.load_adapter("habit", folder)
    (as_pirate,) = engine.generate(PROMPT, LONG, adapter="habit", use_tqdm=False)
    (as_spanish,) = engine.generate(PROMPT, GREEDY, adapter="spanish", use_tqdm=False)

    running = engine.add_request(PROMPT, LONG, adapter="habit")
    stream = iter(running)
    next(stream)
    shutil.copytree(folders["spanish"], folder, dirs_exist_ok=True)
    new = engine.load_adapter("habit", folder)
    assert not running.done()
    later = engine.add_request(PROMPT, GREEDY, adapter="habit").result(timeout=60)
    finished = running.result(timeout=120)

    assert new.int_id > old.int_id
    assert (finished.adapter_id, later.adapter_id) == (old.int_id, new.int_id)
    assert later.text == as_spanish.text
    assert finished.text[:40] == as_pirate.text[:40]
    assert engine.generate(PROMPT, GREEDY, adapter="habit", use_tqdm=False)[0].text == as_spanish.text
    engine.unload_adapter("habit")
    with pytest.raises(AdapterNotLoadedError):
        engine.generate(PROMPT, GREEDY, adapter="habit")


def test_broken_adapters_disturb_nobody(awq, tmp_path):
    """Each broken adapter is refused by the name of its fault, before and during traffic.

    Meanwhile a stream goes on and gives exactly the text that it gives undisturbed; afterwards the engine answers.
    """
    modules = {
        name: (shape.in_features, shape.out_features) for name, shape in awq._loader.model_modules.shapes.items()
    }
    modules = {name: shape for name, shape in modules.items() if ".layers." in name}
    adapters = awq.adapters
    (undisturbed,) = awq.generate("my name is", LONG, adapter="pirate", use_tqdm=False)
    traffic, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            traffic.append(awq.add_request("my name is", LONG, adapter="pirate").result(timeout=120).token_ids)

    for broken in BROKEN[:10]:
        check_refused(awq, broken, broken.make(tmp_path / f"before-{broken.name}", modules))
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for broken in BROKEN:
            check_refused(awq, broken, broken.make(tmp_path / broken.name, modules))
            shutil.rmtree(tmp_path / broken.name, ignore_errors=True)
    finally:
        stop.set()
        asking.join(120)
    assert traffic
    assert set(traffic) == {undisturbed.token_ids}
    assert awq.adapters == adapters
    assert awq.generate("my name is", LONG, adapter="pirate", use_tqdm=False)[0].token_ids == undisturbed.token_ids


def check_refused(engine, broken, folder):
    with pytest.raises(AdapterError, match=broken.match) as caught:
        engine.load_adapter("broken", folder)
    assert type(caught.value) is broken.error, broken.name


def test_more_adapters_than_places_all_answer_rightly(awq, tmp_path):
    """Adapters that leave host memory and come back answer as before, also when their source is gone."""
    folders = demo_adapters()
    expected = {name: awq.generate(PROMPT, GREEDY, adapter=name, use_tqdm=False)[0].text for name in folders}
    habits = [name for _ in range(7) for name in folders]
    for number, habit in enumerate(habits):
        folder = shutil.copytree(folders[habit], tmp_path / str(number))
        awq.load_adapter(f"many-{number}", folder)
        shutil.rmtree(folder)
    assert len(awq.adapters) > awq.plan.max_cpu_loras
    handles = [awq.add_request(PROMPT, GREEDY, adapter=f"many-{number}") for number in range(len(habits))]
    texts = [handle.result(timeout=300).text for handle in handles]
    assert texts == [expected[habit] for habit in habits]
    for number in range(len(habits)):
        awq.unload_adapter(f"many-{number}")
    awq.generate(PROMPT, {"max_tokens": 1}, use_tqdm=False)
    resident = set(awq._driver.call(awq._backend._engine.list_loras))
    assert resident <= {adapter.int_id for adapter in awq.adapters.values()}
