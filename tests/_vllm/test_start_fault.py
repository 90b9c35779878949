"""The first error of an engine's processes, left for the one that starts them; without vLLM."""

import logging
import os

import pytest

from qlora_infer._vllm import start_fault
from qlora_infer._vllm.start_fault import fault_folder, format_error, leave_fault, shorten

TOKEN = "hf_" + "Qx7" * 12


@pytest.fixture
def vllm_log():
    """vLLM's logger, as one of its modules has it, without what the test adds."""
    logger = logging.getLogger("vllm")
    before = list(logger.handlers)
    yield logging.getLogger("vllm.v1.engine.core")
    logger.handlers[:] = before


def fail(log, words, error, cause=None):
    try:
        raise error from cause
    except Exception:
        log.exception(words)


def test_the_first_error_is_kept(vllm_log):
    """Of several errors that end a start, the first is left, by its innermost cause; other errors are not of interest."""
    with fault_folder() as folder:
        leave_fault()
        fail(vllm_log, "Error saving model info cache.", OSError("disk full"))
        assert folder.read() is None
        fail(vllm_log, "WorkerProc failed to start.", RuntimeError("weights"), KeyError("lm_head"))
        fail(vllm_log, "EngineCore failed to start.", RuntimeError("See stack trace for root cause"))
        assert folder.read() == "KeyError: 'lm_head'"


def test_nothing_is_left_after_the_start(vllm_log):
    """The folder and its name in the environment go with the start, and later errors write nothing."""
    with fault_folder() as folder:
        leave_fault()
        assert os.environ[start_fault.FOLDER] == str(folder.path)
    assert start_fault.FOLDER not in os.environ
    fail(vllm_log, "WorkerProc hit an exception.", ValueError("an adapter that does not fit"))
    assert not folder.path.exists()


def test_a_process_that_nobody_starts_has_no_writer(vllm_log):
    """Without a folder in the environment, vLLM's log stays as it is."""
    before = list(logging.getLogger("vllm").handlers)
    leave_fault()
    assert logging.getLogger("vllm").handlers == before


def test_tokens_are_in_no_message(vllm_log, monkeypatch):
    """The Hub's tokens, the environment's and the engine's own are redacted, in the file where it can know them."""
    monkeypatch.setenv("HF_TOKEN", "old-style-secret")
    with fault_folder() as folder:
        leave_fault()
        fail(vllm_log, "EngineCore failed to start.", ValueError(f"401 for {TOKEN}, old-style-secret and given-secret"))
        assert folder.read() == "ValueError: 401 for ***, *** and given-secret"
        assert shorten(folder.read(), ["given-secret", None]) == "ValueError: 401 for ***, *** and ***"


def test_a_long_error_is_shortened(vllm_log):
    """A message stays readable, and a token at its end is not cut before it is recognized."""
    with fault_folder() as folder:
        leave_fault()
        fail(vllm_log, "EngineCore failed to start.", ValueError("x" * 1975 + " given-secret " + "y" * 100_000))
        assert len(folder.read()) == 64_000
        message = shorten(folder.read(), ["given-secret"])
    assert len(message) < 2_100
    assert "given" not in message


def test_an_assertion_without_words_has_its_line():
    """An error without a message is told by the line that raised it."""
    try:
        assert [1] == [2]
    except AssertionError as error:
        bare = AssertionError().with_traceback(error.__traceback__)
    assert format_error(bare).startswith("AssertionError: assert [1] == [2]")
    assert "test_start_fault.py, line" in format_error(bare)
