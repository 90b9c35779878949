"""An engine leaves nothing behind, however its caller ends, and does not end while its caller lives."""

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from engine.conftest import ENGINE_ARGS
from engine.test_life import children, is_alive, shared_memory, start, wait_for_end
from engine.twelve_heads import their_adapters, twelve_heads
from qlora_infer import EngineStartError, ForkedEngineError, QuantizedLoRAEngine
from qlora_infer._vllm.shared_memory import segments_of
from qlora_infer.demo import demo_adapters, demo_model

CALLER = Path(__file__).with_name("caller.py")
GREEDY = {"temperature": 0.0, "max_tokens": 8}
ENDLESS = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}

#: Seconds after which nothing is alive any more.
LIMIT = 10

TWO = {"tensor_parallel_size": 2}


@pytest.fixture(autouse=True)
def alone(engines):
    """No shared engine runs beside these tests' own."""
    engines.close()


@pytest.fixture
def call(tmp_path):
    """Start callers that a failing test does not leave behind."""
    callers = []

    def start(what, kind=Caller, **engine_args):
        callers.append(kind(what, tmp_path, engine_args))
        return callers[-1]

    yield start
    for caller in callers:
        caller.process.kill()


class Caller:
    """A process that makes an engine, and what the engine consists of."""

    def __init__(self, what, folder, engine_args):
        environment, model, adapters = {**os.environ}, demo_model("awq"), demo_adapters()
        if engine_args.get("tensor_parallel_size"):
            model, adapters = twelve_heads(folder, "awq"), their_adapters(folder)
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two workers, and maybe no core for each
        arguments = [what, model, json.dumps({**ENGINE_ARGS, **engine_args}), json.dumps(adapters, default=str)]
        self.process, self.lines = self.begin([str(CALLER), *map(str, arguments)], environment)
        self.pid = self.process.pid
        self.scratch = Path(self.wait_for_line("qlora-infer-"))
        self.segments = set()

    def begin(self, command, environment):
        """Return the process and what it prints."""
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
        return process, process.stdout

    def wait_for_line(self, words):
        """Read on until a line with these words; vLLM prints, too."""
        for line in self.lines:
            if words in line:
                return line.strip()
        raise AssertionError(f"it ended with {self.process.wait()} without printing {words}")

    def wait_until_it_serves(self):
        self.wait_for_line("the caller serves")

    def wait_until_a_core_starts(self):
        """Return when the core's process is there, before it has imported anything."""
        while not any(is_core(pid) for pid in self.engine_pids()):
            assert self.process.poll() is None
            time.sleep(0.02)

    def engine_pids(self):
        """All that the caller has started, and those have, whichever thread did."""
        pids = [process.pid for process in psutil.Process(self.pid).children(recursive=True)]
        self.segments |= segments_of(pids)  # theirs, because other engines of this machine have some, too
        return pids

    def require_nothing_left(self, pids):
        """What the caller had started is gone in time, and so are its files and what was shared in memory."""
        self.process.wait(LIMIT)
        wait_for_end(pids, LIMIT)
        deadline = time.monotonic() + LIMIT
        while (self.scratch.exists() or shared_memory() & self.segments) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.scratch.exists()
        assert not shared_memory() & self.segments


class NotebookKernel(Caller):
    """The same program in a cell of a notebook."""

    def begin(self, command, environment):
        from jupyter_client import KernelManager  # which a machine that runs other tests may lack

        kernel = KernelManager()
        kernel.start_kernel(env=environment)
        client = kernel.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.execute(f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')")
        return kernel.provisioner.process, self.printed(client)

    def printed(self, client):
        while True:
            content = client.get_iopub_msg(timeout=120)["content"]
            yield from content.get("text", "").splitlines()


class Server(Caller):
    """``qlora-infer serve`` as a process."""

    def begin(self, command, environment):
        _, _, model, engine_args, adapters = command
        program = (
            "from qlora_infer.files.scratch import scratch_folder\n"
            "from qlora_infer.cli import main\n"
            "print(scratch_folder(), flush=True)\n"
            "main()"
        )
        options = ["--served-model-name", "base", "--port", "0", "--max-model-len", "512", "--engine-args", engine_args]
        for name, source in json.loads(adapters).items():
            options += ["--adapter", f"{name}={source}"]
        command = [sys.executable, "-c", program, "serve", model, *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        return process, process.stdout

    def wait_until_it_serves(self):
        """Return the beginning of a stream, which runs on."""
        url = self.wait_for_line("serving on").split()[-1]
        http = httpx.Client(base_url=url, timeout=60)
        body = {"model": "json", "prompt": "Once upon a time", "max_tokens": 150, "ignore_eos": True, "stream": True}
        response = http.send(http.build_request("POST", "/v1/completions", json=body), stream=True)
        self.stream = response.iter_lines()
        assert next(self.stream).startswith("data: ")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_takes_its_engine_along(call, number):
    """kill -9 with a stream running leaves nothing; SIGTERM lets it finish, and leaves nothing either."""
    pytest.importorskip("vllm.entrypoints.launchers")
    server = call("serves", kind=Server)
    server.wait_until_it_serves()
    pids = server.engine_pids()
    assert len(pids) >= 4
    server.process.send_signal(number)
    if number == signal.SIGTERM:
        assert list(server.stream)[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(60) == 0
    server.require_nothing_left(pids)


@pytest.mark.parametrize(
    ("what", "engine_args"), [("serves", {}), ("loads", {}), ("serves", TWO)], ids=["serving", "loading", "two"]
)
def test_a_caller_that_is_killed_takes_its_engine_along(call, what, engine_args):
    """kill -9, as the OOM killer does, with requests running, adapters loading, two workers: all is gone in 10 s."""
    caller = call(what, **engine_args)
    caller.wait_until_it_serves()
    pids = caller.engine_pids()
    assert len(pids) >= (5 if engine_args else 4)  # Python's resource tracker, the core, its guard, the workers
    caller.process.kill()
    caller.require_nothing_left(pids)


@pytest.mark.parametrize(
    ("kind", "what", "status"), [(Caller, "exits", 1), (NotebookKernel, "aborts", -signal.SIGABRT)]
)
def test_a_caller_that_ends_without_python_noticing_takes_its_engine_along(call, kind, what, status):
    """os._exit in a program, and the crash of a notebook's kernel in some library's code."""
    caller = call(what, kind=kind)
    caller.wait_until_it_serves()
    pids = caller.engine_pids()
    assert caller.process.wait(LIMIT) == status
    caller.require_nothing_left(pids)


def test_a_caller_that_is_terminated_takes_its_engine_along(call):
    """SIGTERM, by which services are stopped, with requests running."""
    caller = call("serves")
    caller.wait_until_it_serves()
    pids = caller.engine_pids()
    caller.process.terminate()
    caller.require_nothing_left(pids)


@pytest.mark.parametrize("seconds", [0.2, 5, 9])
def test_a_caller_that_is_killed_during_the_start_leaves_nothing(call, seconds):
    """So many seconds after the core's process is there: while it imports, reads weights, or captures."""
    caller = call("serves")
    caller.wait_until_a_core_starts()
    time.sleep(seconds)
    pids = caller.engine_pids()
    caller.process.kill()
    caller.require_nothing_left(pids)


def is_core(pid):
    """Whether a process is one that multiprocessing spawned, and not its resource tracker."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_forked_process_that_lives_on_does_not_keep_the_engine(call):
    """It holds copies of all that its parent held; the engine ends with the parent all the same."""
    caller = call("forks")
    forked = int(caller.wait_for_line("forked").split()[1])
    caller.wait_until_it_serves()
    trackers = {pid for pid in caller.engine_pids() if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    pids = set(caller.engine_pids()) - {forked} - trackers  # these serve the forked process, too
    try:
        caller.process.kill()
        wait_for_end(pids, LIMIT)
        assert is_alive(forked)
    finally:
        os.kill(forked, signal.SIGKILL)
    caller.require_nothing_left(trackers)


@pytest.fixture(scope="module")
def lone(engines):
    """One engine that was made by a thread that has ended since."""
    engines.close()
    made = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: made.put(start(adapters=demo_adapters())))
    thread.start()
    thread.join()
    with made.get() as engine:
        yield engine


def test_an_engine_outlives_the_thread_that_made_it(lone):
    """And forks of its process that end: it answers as before."""
    (expected,) = lone.generate("my name is", GREEDY, adapter="pirate", use_tqdm=False)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    process = multiprocessing.get_context("fork").Process(target=str)
    process.start()
    process.join()
    time.sleep(2)
    (output,) = lone.generate("my name is", GREEDY, adapter="pirate", use_tqdm=False)
    assert output.token_ids == expected.token_ids


def ask_in_a_forked_process(engine, handle, answers):
    """Do what a process may try with its parent's engine, and send back what came of it, and after how long."""
    calls = {
        "generate": lambda: engine.generate("a", GREEDY),
        "load": lambda: engine.load_adapter("other", demo_adapters()["pirate"]),
        "stats": lambda: engine.stats(),
        "result": lambda: handle.result(),
        "iterate": lambda: next(iter(handle)),
        "close": lambda: engine.close(),
        "after close": lambda: engine.generate("a", GREEDY),
        "repr": lambda: repr(engine),
    }
    for name, call in calls.items():
        began = time.monotonic()
        try:
            outcome = call()
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        answers.put((name, outcome, time.monotonic() - began))


def test_a_forked_process_is_told_whose_engine_it_is(lone):
    """Each call fails at once, close does nothing, and the request and the engine of the parent go on."""
    handle = lone.add_request("Once upon a time", ENDLESS)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=ask_in_a_forked_process, args=(lone, handle, answers))
    process.start()
    outcomes = {}
    while len(outcomes) < 8:
        name, outcome, seconds = answers.get(timeout=30)
        outcomes[name] = outcome
        assert seconds < 5
    process.join(30)
    assert process.exitcode == 0
    for name in ("generate", "load", "stats", "result", "iterate", "after close"):
        assert outcomes[name].startswith(f"ForkedEngineError: the engine belongs to process {os.getpid()}")
    assert outcomes["close"] is None
    assert outcomes["repr"].endswith("of another process>")
    assert len(handle.result(timeout=60).token_ids) == 400
    assert lone.is_running
    assert issubclass(ForkedEngineError, RuntimeError)


def make_one(model, answers):
    began = time.monotonic()
    try:
        QuantizedLoRAEngine(model)
    except Exception as error:
        answers.put((type(error), str(error), time.monotonic() - began))


def test_a_daemon_of_multiprocessing_is_refused_at_once():
    """It may start no processes: Python would say so when the model's configuration has been read."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=make_one, args=(demo_model("awq"), answers), daemon=True)
    process.start()
    error, message, seconds = answers.get(timeout=60)
    process.join()
    assert error is EngineStartError
    assert "daemon=False" in message
    assert seconds < 5


def test_a_core_that_is_killed_takes_its_workers_and_its_guard_along(lone):
    """Also those that hang: here they are stopped, and cannot notice anything."""
    (core,) = lone._backend.pids
    pids = children(core)
    assert len(pids) >= 2
    for pid in pids:
        if b"_vllm/guard.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    os.kill(core, signal.SIGKILL)
    wait_for_end(pids, LIMIT)
