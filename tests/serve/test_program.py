"""``qlora-infer serve`` as a process, on the fake engine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import openai
from served import ADMIN_KEY, KEY, client

SCRIPT = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from vllm import EngineArgs
from vllm.usage.usage_lib import UsageContext
from qlora_infer.cli import main
from qlora_infer.testing import fake_engine
from served import ByteEngine

def start(model, **options):
    ByteEngine.vllm_config = EngineArgs(model=model).create_engine_config(UsageContext.LLM_CLASS)
    ByteEngine.tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    reply = lambda prompt, adapter: " ".join(["word"] * 100)
    engine = fake_engine(model, backend=ByteEngine(reply=reply, step_seconds=0.02), **options)
    assert engine._config.restart == "on-failure" and engine._config.max_waiting == 7
    return engine

if __name__ == "__main__":
    main(start)
    raise SystemExit("the program went on")
"""


def test_sigterm_lets_requests_finish_and_ends_with_0(tmp_path, byte_model):
    """The program listens, logs without keys, answers, finishes its stream after SIGTERM and exits with 0."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "QLORA_INFER_API_KEY": KEY,
        "QLORA_INFER_ADMIN_KEY": ADMIN_KEY,
    }
    command = [sys.executable, str(tmp_path / "script.py"), "serve", str(byte_model), "--served-model-name", "base"]
    options = ["--port", "0", "--max-waiting", "7", "--adapters-folder", str(tmp_path)]
    with subprocess.Popen([*command, *options], env=environment, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("".join(lines))
        with client(found[1]) as ai:
            with pytest.raises(openai.AuthenticationError), client(found[1], "wrong") as stranger:
                stranger.models.list()
            stream = ai.completions.create(model="base", prompt="x", max_tokens=100, stream=True)
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
        lines += process.stderr
        assert process.wait(60) == 0, "".join(lines)
    assert text == " ".join(["word"] * 100)
    log = "".join(lines)
    assert '"path": "/v1/completions"' in log
    assert KEY not in log
    assert ADMIN_KEY not in log
