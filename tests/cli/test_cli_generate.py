"""`qlora-infer generate`: real processes with a fake engine, their files, their exit codes, and Ctrl-C."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

from qlora_infer.testing import write_adapter

PROGRAM = """
import sys
import termios
from qlora_infer.cli import main
from qlora_infer.testing import FakeEngine, fake_engine, echo

def reply(prompt, adapter):
    return " ".join(["word"] * 1_000_000) if prompt == "endless" else echo(prompt, adapter)

def start(model, **given):
    print("started", file=sys.stderr)
    backend = FakeEngine(reply=echo if model == "org/quick" else reply, step_seconds=0.001)
    engine = fake_engine(model, backend=backend, **given)
    if model == "org/mortal":
        add = backend.add_request
        def add_request(request):
            if request.prompt == "deadly":
                backend.die()
            return add(request)
        backend.add_request = add_request
    return engine

if __name__ == "__main__":
    main(start)
"""
LONG = '{"max_tokens": 1000000}'


class Workplace:
    """A folder with prompts, answers and the program."""

    def __init__(self, folder):
        self.folder = folder
        self.prompts, self.output = folder / "prompts.jsonl", folder / "answers.jsonl"
        (folder / "program.py").write_text(PROGRAM)
        self.pirate = write_adapter(folder / "pirate")

    def write(self, *lines):
        self.prompts.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))

    def command(self, *arguments, model="org/model"):
        return [sys.executable, str(self.folder / "program.py"), "generate", model, *map(str, arguments)]

    def run(self, *arguments, model="org/model", **options):
        command = self.command(*arguments, model=model)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    def run_file(self, *arguments, model="org/model"):
        return self.run("--prompts", self.prompts, "--output", self.output, *arguments, model=model)

    def answers(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def texts(self):
        return {answer["line"]: answer["text"] for answer in self.answers()}


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def test_prompts_on_the_command_line(workplace):
    """Answers come in the order of the prompts, alone on standard output; one adapter is the one that is meant."""
    found = workplace.run("-p", "ahoy", "-p", "hello", "-a", f"pirate={workplace.pirate}")
    assert (found.returncode, found.stdout) == (0, "pirate says: ahoy\npirate says: hello\n")
    assert workplace.run("-p", "hello").stdout == "You said: hello\n"


def test_a_line_chooses_its_structure(workplace):
    """``structured_outputs`` is JSON in a line, as in Python; a form that there is not is the error of its line."""
    forms = {"choice": ["Rome", "Madrid"]}, {"json": {"type": "object"}}, {"type": "object"}
    workplace.write(*({"prompt": "a", "sampling_params": {"structured_outputs": form}} for form in forms))
    assert workplace.run_file().returncode == 1
    right, also, wrong = sorted(workplace.answers(), key=lambda answer: answer["line"])
    assert right["text"] == also["text"] == "You said: a"
    assert "structured_outputs" in wrong["error"]
    assert "'type'" in wrong["error"]


def test_a_line_chooses_its_adapter_and_parameters(workplace):
    """What a line says goes before the options; null is the base model; the id comes back."""
    workplace.write(
        {"prompt": "one two three", "id": "a"},
        {"prompt": "one two three", "adapter": None},
        {"prompt": "one two three", "sampling_params": {"max_tokens": 2, "n": 2}},
    )
    found = workplace.run_file("-a", f"pirate={workplace.pirate}", "--sampling-params", '{"max_tokens": 3}')
    assert found.returncode == 0, found.stderr
    answers = sorted(workplace.answers(), key=lambda answer: answer["line"])
    assert answers[0] == {
        "line": 1,
        "id": "a",
        "prompt": "one two three",
        "adapter": "pirate",
        "text": "pirate says: one",
        "finish_reason": "length",
        "num_prompt_tokens": 3,
        "num_tokens": 3,
    }
    assert answers[1]["text"] == "You said: one"
    assert (answers[2]["text"], answers[2]["texts"]) == ("pirate says:", ["pirate says:", "pirate says:"])


def test_adapters_of_a_folder_are_loaded_when_a_line_names_them(workplace):
    """With --known-adapters; a line that names none of them fails alone."""
    write_adapter(workplace.folder / "adapters" / "poet", seed=1)
    workplace.write({"prompt": "ode", "adapter": "poet"}, {"prompt": "hi"}, {"prompt": "hi", "adapter": "parrot"})
    done = workplace.run_file("--known-adapters", workplace.folder / "adapters")
    assert done.returncode == 1, done.stderr
    answers = sorted(workplace.answers(), key=lambda answer: answer["line"])
    assert [answer.get("text") for answer in answers] == ["poet says: ode", "You said: hi", None]
    assert answers[2]["error"].endswith("known_adapters has none of that name (known: 'poet')")


def test_lines_that_fail_are_written_and_fail_the_command(workplace):
    """The others are answered; the same command again asks only those that failed, and puts no line there twice."""
    long = " ".join(["word"] * 50)
    workplace.write(
        {"prompt": "one"},
        "no json",
        {"prompt": "two", "adapter": "nobody"},
        "",
        {"prompt": long},
        {"prompt": "three", "sampling_params": {"max_tokens": 0}},
        {"text": "four"},
        {"prompt": "five"},
    )
    for _ in range(2):
        found = workplace.run_file("--max-model-len", "30")
        assert found.returncode == 1
        answers = {answer["line"]: answer for answer in workplace.answers()}
        assert len(workplace.answers()) == len(answers) == 7
        assert {line: answer["text"] for line, answer in answers.items() if "text" in answer} == {
            1: "You said: one",
            8: "You said: five",
        }
        assert answers[2]["error"].startswith("it is no JSON: ")
        assert answers[3]["error_type"] == "AdapterNotLoadedError"
        assert answers[5]["error"] == "vLLM cannot run this request: 50 tokens of 30"
        assert answers[6]["error"] == "sampling_params: max_tokens and n must be at least 1"
        assert answers[7]["error"] == "it has 'text'; a line has prompt, adapter, sampling_params, id"
    workplace.write({"prompt": "one"}, {"prompt": "mended"}, *[{"prompt": "new"}] * 5, {"prompt": "five"})
    assert workplace.run_file().returncode == 0
    assert workplace.texts()[2] == "You said: mended"


def test_ctrl_c_leaves_what_is_finished_and_the_next_run_goes_on(workplace):
    """Ends with 130; every whole answer is on disk, and the next run answers the rest, each line exactly once."""
    workplace.write(*({"prompt": f"n {i}"} for i in range(20)), {"prompt": "endless"}, {"prompt": "last"})
    command = workplace.command(
        "--prompts", workplace.prompts, "--output", workplace.output, "--sampling-params", LONG, "--max-pending", 21
    )
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: workplace.output.exists() and len(workplace.output.read_bytes().splitlines()) == 21)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"21 more answers are in {workplace.output}: run the same again" in errors
    assert workplace.texts() == {**{i + 1: f"You said: n {i}" for i in range(20)}, 22: "You said: last"}
    found = workplace.run_file("--sampling-params", LONG, model="org/quick")
    assert found.returncode == 0
    assert "1 of 22 prompts are left" in found.stderr
    assert len(workplace.answers()) == 22
    assert workplace.texts()[21] == "You said: endless"


def test_a_terminal_shows_a_bar_that_goes_on_where_it_was(workplace):
    """The bar counts all lines of the file; after an interruption it begins with those that are answered already."""
    workplace.write(*({"prompt": f"n {i}"} for i in range(4)))
    assert workplace.run_file().returncode == 0
    kept = workplace.output.read_text().splitlines(keepends=True)[:3]
    workplace.output.write_text("".join(kept))
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 80))
    command = workplace.command("--prompts", workplace.prompts, "--output", workplace.output)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=inside)
    os.close(inside)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that nobody writes to any more is an error, on Linux
        while part := os.read(terminal, 1000):
            shown += part
    os.close(terminal)
    assert process.wait(60) == 0
    assert b"Answered:  75%" in shown
    assert b"Answered: 100%" in shown
    assert b"4/4" in shown


def test_a_torn_last_line_is_asked_again(workplace):
    """What a killed process left half-written is cut off, wherever it was cut; the rest stays as it was."""
    workplace.write({"prompt": "one"}, {"prompt": "two"})
    assert workplace.run_file().returncode == 0
    whole = workplace.output.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for cut in (1, 8, 20, len(second) - 1):
        workplace.output.write_bytes(first + second[:cut])
        assert workplace.run_file().returncode == 0
        assert sorted(workplace.texts().values()) == ["You said: one", "You said: two"]
        assert workplace.output.read_bytes().startswith(first)


def test_nothing_left_starts_no_engine(workplace):
    """A finished command is done at once."""
    workplace.write({"prompt": "one"})
    assert "started" in workplace.run_file().stderr
    again = workplace.run_file()
    assert (again.returncode, again.stderr) == (0, "0 of 1 prompts are left\n")


def test_a_file_that_is_not_ours_is_not_touched(workplace):
    """Neither another file nor the answers to other prompts: a usage error, before any engine starts."""
    workplace.write({"prompt": "one"})
    for content in ("my diary\n", "my diary", '{"text": "mine"}\n'):
        workplace.output.write_text(content)
        found = workplace.run_file()
        assert found.returncode == 2
        assert "started" not in found.stderr
        assert workplace.output.read_text() == content
    workplace.output.unlink()
    assert workplace.run_file().returncode == 0
    workplace.write({"prompt": "another"})
    assert workplace.run_file().returncode == 2
    assert workplace.texts() == {1: "You said: one"}
    assert workplace.run("--prompts", workplace.output, "--output", workplace.output).returncode == 2


def test_files_that_cannot_be_opened_are_usage_errors(workplace):
    """No such prompts, and no folder for the answers: with 2, before any engine starts."""
    workplace.write({"prompt": "one"})
    nowhere = workplace.folder / "none" / "file.jsonl"
    for arguments in (("--prompts", nowhere), ("--prompts", workplace.prompts, "--output", nowhere)):
        found = workplace.run(*arguments)
        assert found.returncode == 2
        assert "Traceback" not in found.stderr
        assert "started" not in found.stderr


def test_a_dead_engine_ends_the_command(workplace):
    """With 1 and one message; what was answered stays, and later lines are not written off as errors."""
    workplace.write({"prompt": "one"}, {"prompt": "deadly"}, *({"prompt": f"n {i}"} for i in range(50)))
    found = workplace.run_file("--max-pending", 1, model="org/mortal")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("error: the engine core died (it was killed)")
    assert [answer["line"] for answer in workplace.answers() if "text" in answer] == [1]
    assert len(workplace.answers()) < 5  # those that it had; not the 50
    assert workplace.run_file().returncode == 0
    assert len(workplace.texts()) == 52


def test_prompts_are_read_as_answers_are_written(workplace):
    """From a pipe that stays open: no more than --max-pending are read ahead, so that any number fits."""
    command = workplace.command("--prompts", "-", "--max-pending", 2)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    for i in range(3):
        process.stdin.write(json.dumps({"prompt": f"n {i}"}).encode() + b"\n")
    first = json.loads(read_line(process.stdout))
    assert first["text"] in ("You said: n 0", "You said: n 1")
    rest, _ = process.communicate(timeout=60)
    assert len(rest.splitlines()) == 2
    assert process.returncode == 0


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_line(stream):
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(stream.fileno(), 1)
        assert part
        line += part
    return line
