"""The checks of requests' arguments: prompts, conversations, values for each prompt, priorities, timeouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Sequences of whole numbers, which are no token ids.
_BYTES = (bytes, bytearray, memoryview)


def check_unknown(method: str, unknown: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for arguments that a method does not have: most are sampling parameters."""
    for name, value in unknown.items():
        raise TypeError(
            f"{method}() has no argument {name!r}; sampling parameters are one argument, such as "
            f"sampling_params={{{name!r}: {value!r}}}"
        )


def check_prompt(prompt: Any) -> str | tuple[int, ...]:
    """Return one prompt, a text or token ids; raise ``TypeError`` for anything else."""
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, _BYTES)
        and prompt
        and set(map(type, prompt)) == {int}  # not isinstance: True is no token
    ):
        return tuple(prompt)
    raise TypeError(f"a prompt must be a string or a list of token ids, got {str(prompt)[:80]!r}")


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def prompt_list(prompts: Any) -> list[str | tuple[int, ...]]:
    """Return a list of prompts, of one or several; raise ``TypeError`` for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise TypeError(f"prompts must be a string, token ids, or a list of them, got {type(prompts).__name__}")
    if prompts and type(prompts[0]) is int:
        return [check_prompt(prompts)]
    return [check_prompt(prompt) for prompt in prompts]


def conversation_list(messages: Any) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Return a list of conversations, of one or several; raise ``TypeError`` for anything else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError(f"messages must be a conversation or a list of them, got {str(messages)[:80]!r}")
    return [messages] if isinstance(messages[0], Mapping) else messages


def one_per_prompt(argument: str, value: Any, num_prompts: int) -> list[Any]:
    """Return one value for each prompt, of one or a list; raise ``ValueError`` for a list of another length."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(f"{argument} has {len(value)} entries for {num_prompts} prompts: give one, or one per prompt")
    return list(value)


def value_per_prompt(argument: str, value: Any) -> Iterator[Any]:
    """Yield one value for each of any number of prompts: the same for all, or from an iterable.

    Raises:
        ValueError: The iterable ends before the prompts do; raised when that is seen.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        yield from itertools.repeat(value)
    yield from value
    raise ValueError(f"{argument} has fewer entries than there are prompts: give one, or one per prompt")


def check_priority(priority: Any) -> int:
    """Return a request's priority; raise ``TypeError`` if it is not a whole number."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, lower goes first, got {priority!r}")
    return priority


def check_timeout(timeout: Any) -> float | None:
    """Return a request's timeout in seconds; raise ``TypeError`` or ``ValueError`` if it is invalid."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout!r}")
    return float(timeout)
