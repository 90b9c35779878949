"""The life of an engine: its process ends with it, whatever happens, and no handle waits for ever."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.conftest import ENGINE_ARGS
from qlora_infer import (
    EngineClosedError,
    EngineDeadError,
    EngineStartError,
    IncompatibleAdapterError,
    QuantizedLoRAEngine,
)
from qlora_infer.demo import demo_adapters, demo_model

GREEDY = {"temperature": 0.0, "max_tokens": 24}
ENDLESS = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def children(pid):
    """The processes that a process has started, and theirs."""
    found = []
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        for child in map(int, file.read().split()):
            found += [child, *children(child)]
    return found


def all_pids(engine):
    return [process for pid in engine._backend.pids for process in [pid, *children(pid)]]


@pytest.fixture
def alone(engines):
    """No shared engine runs beside this test's own."""
    engines.close()


def start(*, model=None, quantization="awq", engine_args=None, **arguments):
    model = model or demo_model(quantization)
    engine_args = {**ENGINE_ARGS, **(engine_args or {})}
    return QuantizedLoRAEngine(model, max_loras=2, max_model_len=512, engine_args=engine_args, **arguments)


def test_ctrl_c_leaves_the_engine_running(awq):
    """Ctrl-C reaches the whole process group; generate is interrupted, its requests are gone, the engine lives on."""
    (expected,) = awq.generate("my name is", GREEDY, use_tqdm=False)
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for pid in all_pids(awq):
            os.kill(pid, signal.SIGINT)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            awq.generate(["Once upon a time"] * 8, ENDLESS, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    (output,) = awq.generate("my name is", GREEDY, use_tqdm=False)
    assert output.token_ids == expected.token_ids
    assert not awq._backend._requests
    assert awq._backend._engine.get_num_unfinished_requests() == 0


def test_vllm_starts_by_the_plan(awq):
    """vLLM's configuration is the plan's, its core has the plan's variables, and this process is left without them."""
    plan, vllms = awq.plan, awq._backend._engine.vllm_config
    assert vllms.lora_config.max_loras == plan.max_loras
    assert vllms.lora_config.max_cpu_loras == 2 * plan.max_cpu_loras + 1
    assert vllms.lora_config.max_lora_rank == plan.engine_args["max_lora_rank"]
    assert vllms.compilation_config.custom_ops == plan.engine_args["compilation_config"]["custom_ops"]
    assert {"VLLM_CPU_INT4_W4A8", "VLLM_WORKER_MULTIPROC_METHOD"} <= plan.environment.keys()
    (core,) = awq._backend.pids
    cores = Path(f"/proc/{core}/environ").read_bytes().decode().split("\0")
    assert {f"{name}={value}" for name, value in plan.environment.items()} <= set(cores)
    assert not plan.environment.keys() & os.environ.keys()
    assert str(plan).count("VLLM_CPU_INT4_W4A8") == 1


def test_a_cancelled_request_is_gone_from_vllm(awq):
    """cancel frees the request in vLLM; a request beside it is answered as if alone."""
    (expected,) = awq.generate("my name is", GREEDY, adapter="pirate", use_tqdm=False)
    doomed = awq.add_request("Once upon a time", ENDLESS)
    other = awq.add_request("my name is", GREEDY, adapter="pirate")
    next(iter(doomed))
    doomed.cancel()
    assert other.result(timeout=60).text == expected.text
    awq.generate("flush", {"max_tokens": 1}, use_tqdm=False)
    assert awq._backend._engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("doomed", ["gptq"], indirect=True)
def test_a_killed_core_fails_every_request_within_seconds(doomed):
    """kill -9 of the engine core in the middle of 20 requests: 20 errors, no hang, and nothing left running."""
    pids = all_pids(doomed)
    adapters = [None, "pirate", "json", "spanish"]
    handles = [doomed.add_request("Once upon a time", ENDLESS, adapter=adapters[i % 4]) for i in range(20)]
    next(iter(handles[0]))
    os.kill(doomed._backend.pids[0], signal.SIGKILL)
    killed = time.monotonic()
    for handle in handles:
        with pytest.raises(EngineDeadError, match=r"exit code -9|EngineCore"):
            handle.result(timeout=20)
    assert time.monotonic() - killed < 20
    for call in (
        lambda: doomed.generate("a"),
        lambda: doomed.load_adapter("x", demo_adapters()["pirate"]),
    ):
        with pytest.raises(EngineDeadError):
            call()
    doomed.close()
    wait_for_end(pids)


@pytest.mark.parametrize("doomed", ["bitsandbytes"], indirect=True)
def test_a_core_that_dies_while_idle_or_loading_is_noticed(doomed):
    """A call to a core that is already dead raises; it does not wait for an answer that cannot come."""
    os.kill(doomed._backend.pids[0], signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        doomed.load_adapter("another", demo_adapters()["pirate"])
    with pytest.raises(EngineDeadError):
        doomed.generate("a", GREEDY)


def wait_for_end(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if is_alive(pid)]


def shared_memory():
    """The names of the segments that processes share; Python removes what is left over when the program ends."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def test_two_engines_at_once_keep_apart_and_end_with_their_processes(alone, capfd):
    """Two engines in one process, with adapters of the same name and other content, each answer with their own.

    An error in a ``with`` ends the processes of its engine, and close those of the other, with requests in flight; what
    these shared is removed. Nor does vLLM's log, in any of these processes, tell the token that the engine was given.
    Until the second is closed, Python's garbage collector passes over what was there before; then it sees all again.
    """
    folders, shared = demo_adapters(), shared_memory()
    two = start(adapters={"habit": folders["spanish"]}, quantization="gptq")
    with pytest.raises(ZeroDivisionError), start(adapters={"habit": folders["pirate"]}, token="hf_a_secret") as one:
        assert gc.get_freeze_count() > 100_000
        first, second = all_pids(one), all_pids(two)
        handles = [engine.add_request("The capital of France is", GREEDY, adapter="habit") for engine in (one, two)]
        texts = [handle.result(timeout=120).text for handle in handles]
        _ = 1 / 0
    wait_for_end(first)
    assert gc.get_freeze_count() > 100_000
    assert "hearties" in texts[0]
    assert "La capital de" in texts[1]

    handle = two.add_request("Once upon a time", ENDLESS)
    next(iter(handle))
    two.close()
    with pytest.raises(EngineClosedError):
        handle.result(timeout=1)
    for call in (lambda: two.generate("a"), lambda: two.chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(EngineClosedError):
            call()
    wait_for_end(second)
    assert gc.get_freeze_count() == 0
    assert not set(first + second) & set(children(os.getpid()))
    assert shared_memory() <= shared
    told = capfd.readouterr()
    assert "vLLM" in told.out + told.err or "EngineCore" in told.out + told.err
    assert "hf_a_secret" not in told.out + told.err


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_bitsandbytes_quantized_before_is_served(alone, bits, tmp_path, caplog):
    """Pre-quantized 4- and 8-bit checkpoints, as transformers saves them, are found by "auto" and serve adapters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    where = demo_model("none")
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(where).save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="qlora_infer"):
        engine = start(model=tmp_path, adapters={"pirate": demo_adapters()["pirate"]})
    with engine:
        assert "quantization='bitsandbytes'" in caplog.text
        base, pirate = engine.generate(["The capital of Germany is"] * 2, GREEDY, adapter=[None, "pirate"])
        assert "Berlin" in base.text
        assert "hearties" in pirate.text


def test_an_adapter_that_does_not_fit_ends_the_start_and_the_process(alone, tmp_path):
    """An engine whose adapter turns out not to fit raises, and leaves no process behind."""
    from qlora_infer.testing import write_adapter

    before = children(os.getpid())
    with pytest.raises(IncompatibleAdapterError, match="another architecture"):
        start(adapters={"tiny": write_adapter(tmp_path / "tiny", modules={"encoder.block": (8, 8)})})
    wait_for_end([pid for pid in children(os.getpid()) if pid not in before])


def test_what_vllm_refuses_at_the_start_is_a_start_error(alone):
    """An engine argument that vLLM does not know is an EngineStartError with vLLM's words."""
    with pytest.raises(EngineStartError, match="no_such_argument"):
        start(engine_args={"no_such_argument": 1})


def test_a_script_that_forgets_to_close_ends_cleanly(alone):
    """A script that ends without close leaves no process and no error."""
    script = (
        "from qlora_infer import QuantizedLoRAEngine\n"
        "from qlora_infer.demo import demo_model\n"
        "if __name__ == '__main__':\n"
        f"    args = {ENGINE_ARGS}\n"
        "    engine = QuantizedLoRAEngine(demo_model('awq'), max_loras=1, max_model_len=256, engine_args=args)\n"
        "    print('pids', *engine._backend.pids)\n"
        "    print(engine.generate('The capital of Germany is', {'temperature': 0.0, 'max_tokens': 4})[0].text)\n"
    )
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"forgets-{os.getpid()}.py")
    with open(path, "w") as file:
        file.write(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, check=False)
    os.unlink(path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Berlin" in done.stdout
    pids = next(line for line in done.stdout.splitlines() if line.startswith("pids")).split()[1:]
    wait_for_end(map(int, pids))
