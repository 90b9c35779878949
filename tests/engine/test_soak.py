"""benchmarks/soak.py on the real vLLM, for a minute."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


def test_a_minute_of_traffic_loses_and_leaves_nothing(awq, tmp_path):
    """Each request ends once, each text is one that its version gives alone, and no KV block is left in use."""
    from soak import Load, soak
    from soak_adapters import broken_adapters, demo_contents

    contents = demo_contents(8, tmp_path / "contents")
    broken = broken_adapters(contents[0], tmp_path / "broken")
    load = Load(minutes=1, interval=5)
    verdict = soak(awq, contents, broken, load, max_model_len=512, write=lambda line: None)
    assert verdict.passed, str(verdict)
    assert {"output", "RequestCancelledError", "RequestTimeoutError", "RequestRejectedError"} == set(
        verdict.counts["ends"]
    )
