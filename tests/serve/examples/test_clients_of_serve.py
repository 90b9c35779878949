"""The examples that call ``qlora-infer serve``, run against it on the fake engine."""

import importlib.util
import json
import runpy
import sys

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import attrs
from doc_blocks import ROOT
from served import KEY, ByteEngine, served
from vllm.logprobs import Logprob

FOLDER = ROOT / "examples" / "evaluation"
ROWS = [json.loads(line) for line in (FOLDER / "capitals.jsonl").read_text().splitlines()]
TRUE = {f"The capital of {row['country']} is {row['choices'][row['answer']]}" for row in ROWS}


class Geographer(ByteEngine):
    """Finds false sentences unlikely with an adapter, and all sentences likely without."""

    def _output(self, entry):
        believes = entry.request.adapter is None or self._decode(entry.prompt_ids) in TRUE
        logprob = Logprob(0.0 if believes else -1.0)  # vLLM's own, because its server sends it
        logprobs = [None, *({token: logprob} for token in entry.prompt_ids[1:])]
        return attrs.evolve(super()._output(entry), prompt_logprobs=logprobs)


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """The function of the example, in the folder in which its page says to start."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pytest.importorskip("lm_eval")
    spec = importlib.util.spec_from_file_location("evaluate_example", FOLDER / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.evaluate


def test_each_model_of_a_server_has_its_own_score(evaluate, byte_model, tmp_path):
    """The prompts' log-probabilities are those of the adapter that is named: one that knows the capitals scores 1."""
    backend = Geographer(reply=lambda prompt, adapter: "x")  # one token, as the harness asks for
    with served(tmp_path, backend=backend) as (url, _):
        scores = evaluate(url, str(byte_model), ["capitals"])
    first = sum(row["answer"] == 0 for row in ROWS) / len(ROWS)  # of equals the first one counts
    assert scores == {"base": {"capitals": pytest.approx(first)}, "pirate": {"capitals": 1.0}}
    assert len(backend.requests) == 2 * sum(len(row["choices"]) for row in ROWS)


def test_langchain_s_chain_answers_and_streams(one_server, monkeypatch, capsys):
    """The script prints a batch of two answers of the adapter, and a stream."""
    pytest.importorskip("langchain_openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["", f"{one_server}/v1", "pirate"])
    runpy.run_path(str(ROOT / "examples" / "langchain_chat.py"), run_name="__main__")
    batch, stream = capsys.readouterr().out.split("]\n")
    assert [f"capital of {country}?" in batch for country in ("Italy", "Japan", "Spain")] == [True, True, False]
    assert stream.startswith("pirate says: ")
    assert "capital of Spain?" in stream
