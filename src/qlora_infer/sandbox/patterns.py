"""The matching of any regular expressions with names, in a process whose time and memory are bounded.

An adapter's patterns are untrusted, and one that backtracks for ever cannot be interrupted from Python. So this file is
also the script of a process that does nothing else: the kernel ends it in time.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: The processor time that all patterns of an adapter may take together.
MATCH_SECONDS = 2
MAX_MEMORY = 512 << 20

# The process ends itself in time; this is for one that does not get its share of a processor.
_GRACE_SECONDS = 60.0


def suffix_match(pattern: str) -> re.Pattern[str]:
    """Return the expression that PEFT 0.21 (``get_pattern_key``) and vLLM 0.32 match names with."""
    return re.compile(rf"(.*\.)?({pattern})$")


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return for each name the index of the first pattern that matches it, as PEFT does, or ``None``.

    Raises:
        ValueError: A pattern is no regular expression.
        TimeoutError: It took more than ``MATCH_SECONDS`` or ``MAX_MEMORY``.
    """
    from qlora_infer.sandbox.bare_process import bare_process  # which the process itself does not need

    try:
        ended = subprocess.run(
            **bare_process(Path(__file__)),
            input=json.dumps([list(patterns), list(names)]).encode(),
            timeout=MATCH_SECONDS + _GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    if ended.returncode:
        raise TimeoutError
    answer = json.loads(ended.stdout)
    if isinstance(answer, str):
        raise ValueError(answer)  # noqa: TRY004  a message of the process, not a wrong type
    indices: list[int | None] = answer
    return indices


def _answer(patterns: Sequence[str], names: Sequence[str]) -> list[int | None] | str:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(suffix_match(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            return f"{pattern[:80]!r}: {error}"
    return [next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MATCH_SECONDS, MATCH_SECONDS + 1))
    json.dump(_answer(*json.load(sys.stdin.buffer)), sys.stdout)


if __name__ == "__main__":
    _main()
