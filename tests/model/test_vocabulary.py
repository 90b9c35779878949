"""A base model's tokens are read from its files as transformers reads them, and never an error."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_infer.model import vocabulary
from qlora_infer.model.vocabulary import read_vocabulary

ADDED = [{"id": 3, "content": "</s>"}]


@pytest.mark.parametrize(
    "vocab", [{"<s>": 0, "a": 1, "b": 2}, [["<s>", 0.0], ["a", -1.5], ["b", -2.0]]], ids=["BPE", "Unigram"]
)
def test_tokens_and_added_tokens_are_read(vocab, tmp_path):
    """A vocabulary maps tokens to ids, or lists them with their scores."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": ADDED, "model": {"vocab": vocab}}))
    assert read_vocabulary(str(tmp_path)) == {"<s>": 0, "a": 1, "b": 2, "</s>": 3}


def test_they_are_what_transformers_reads(tmp_path):
    """``get_vocab`` is what an engine compares an adapter's tokens with."""
    pytest.importorskip("transformers")
    from models.tiny import tokenizer

    made = tokenizer()
    made.save_pretrained(tmp_path)
    assert read_vocabulary(str(tmp_path)) == made.get_vocab()


@given(content=st.binary(max_size=60) | st.sampled_from([b'{"model": {"vocab": [1]}}', b'{"model": 1}', b"[" * 99_999]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_cannot_be_read_is_not_known(content, tmp_path):
    """Any other content is no vocabulary; so is none, and one that is too large."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_vocabulary(str(tmp_path)) is None


def test_a_file_that_is_missing_or_too_large_is_not_read(tmp_path, monkeypatch):
    """Its size is looked at first."""
    assert read_vocabulary(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    monkeypatch.setattr(vocabulary, "MAX_TOKENIZER_BYTES", 10)
    assert read_vocabulary(str(tmp_path)) is None
