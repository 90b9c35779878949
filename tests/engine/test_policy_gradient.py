"""``examples/policy_gradient.py``: a trainer that pushes its versions from memory, on the shared engine."""

import importlib.util

import pytest
from doc_blocks import ROOT

pytest.importorskip("peft")


def test_the_reward_rises_from_version_to_version(awq, monkeypatch, capsys):
    """Each step's answers come from the version before it; after five steps the answers are better than the base's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("policy_gradient", ROOT / "examples" / "policy_gradient.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, *_, before_last, last = example.train(awq, num_steps=6)
    assert (before_last + last) / 2 > first + 0.15
    adapters = [line.split()[3] for line in capsys.readouterr().out.splitlines()]
    assert adapters == ["none", *(f"policy@{number}" for number in range(1, 6))]
